"""The families of networks: one entry each. A new one is a file in `networks/` and an entry here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from repmlp_deploy.card import ModelCard
from repmlp_deploy.errors import CardError
from repmlp_deploy.nets.networks.mobilefacenet import MobileFaceNet, MobileFaceNetSpec, infer_mobilefacenet
from repmlp_deploy.nets.networks.pspnet import PSPNetSpec, build_pspnet, infer_pspnet
from repmlp_deploy.nets.networks.pure_mlp import PureMLP, PureMLPSpec, infer_pure_mlp
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNet, RepMLPResNetSpec, infer_repmlp_resnet
from repmlp_deploy.nets.networks.repmlpnet import (
    RepMLPBackbone,
    RepMLPBackboneSpec,
    RepMLPNet,
    RepMLPNetSpec,
    infer_backbone,
    infer_repmlpnet,
)
from repmlp_deploy.text import first_fault

__all__ = ["FAMILIES", "Family", "build_network", "card_spec"]


@dataclass(frozen=True)
class Family:
    """How networks of a family are described, built and recognised.

    Attributes:
        spec: hyper-parameters, `input_size` among them.
        build: (spec, deploy=…) -> the network.
        infer: (state-dict shapes, input size or None) -> the hyper-parameters; raises KeyError or ValueError.
        task: what its outputs mean, an entry of `runtime.tasks.TASKS`.
        outputs: (hyper-parameters) -> names of the outputs in their order; None where the task names the only one.
    """

    spec: type[BaseModel]
    build: Callable[..., nn.Module]
    infer: Callable[[Mapping[str, Sequence[int]], tuple[int, int] | None], BaseModel]
    task: str = "classify"
    outputs: Callable[[Any], tuple[str, ...]] | None = None


FAMILIES: dict[str, Family] = {
    "repmlpnet": Family(RepMLPNetSpec, RepMLPNet, infer_repmlpnet),
    "repmlpnet-backbone": Family(
        RepMLPBackboneSpec, RepMLPBackbone, infer_backbone, task="features", outputs=RepMLPBackboneSpec.output_names
    ),
    "pspnet": Family(PSPNetSpec, build_pspnet, infer_pspnet, task="segment"),
    "mobilefacenet": Family(MobileFaceNetSpec, MobileFaceNet, infer_mobilefacenet, task="embed"),
    "repmlp-resnet": Family(RepMLPResNetSpec, RepMLPResNet, infer_repmlp_resnet),
    "pure-mlp": Family(PureMLPSpec, PureMLP, infer_pure_mlp),
}


def card_spec(card: ModelCard) -> Any:
    """Return the hyper-parameters of a card, checked by its family.

    Raises:
        CardError: the family is unknown, or a hyper-parameter is wrong.
    """
    if card.family not in FAMILIES:
        near = difflib.get_close_matches(card.family, FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(FAMILIES)}"
        raise CardError(f"{card.name}: no family {card.family!r}; {hint}")
    if card.task != FAMILIES[card.family].task:
        raise CardError(f"{card.name}: task is {card.task}; a {card.family} can only {FAMILIES[card.family].task}")
    try:
        return FAMILIES[card.family].spec.model_validate({**card.network, "input_size": card.input_size})
    except ValidationError as error:
        where, said = first_fault(error)
        raise CardError(f"{card.name}: network.{where}: {said}") from None


def build_network(card: ModelCard, *, deploy: bool = False) -> nn.Module:
    """Build the card's network, in evaluation mode, with fresh weights.

    Raises:
        CardError: the card's hyper-parameters do not fit one another.
    """
    spec = card_spec(card)
    try:
        return FAMILIES[card.family].build(spec, deploy=deploy).eval()
    except ValueError as error:
        raise CardError(f"{card.name}: {error}") from None
