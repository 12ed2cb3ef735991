"""From a state dict to a network: infer the architecture, build it, fill it strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import ModelCard, Preprocessing, data_root, list_cards, load_card
from repmlp_deploy.convert.source.description import usual_preprocessing
from repmlp_deploy.errors import CardError, CheckpointError
from repmlp_deploy.nets.families import FAMILIES, build_network, card_spec

__all__ = ["Inferred", "infer_card", "load_network"]


@dataclass(frozen=True)
class Inferred:
    """A card that was found for weights without one.

    Attributes:
        card: what describes them; without labels unless the weights are the card's own.
        remark: how it was found.
        assumed: whose preprocessing it has, if nobody confirmed it; empty if the weights are the card's own.
    """

    card: ModelCard
    remark: str
    assumed: str


def infer_card(  # noqa: PLR0913 - each says something that shapes cannot
    shapes: Mapping[str, Sequence[int]],
    *,
    family: str,
    layout: str,
    merged: bool,
    sha256: str = "",
    input_size: tuple[int, int] | None = None,
    size_is_sure: bool = False,
    name: str = "checkpoint",
) -> Inferred:
    """Return the card of the network that a state dict belongs to.

    A card of `models/` with this architecture is taken, one of this layout before others. Where there is none, the
    card is made from the shapes, with the preprocessing of the card that differs in its classes alone, or else the
    usual one for ImageNet. Weights of a known architecture may have been trained on anything: unless the file is the
    very one that the card names, preprocessing is only assumed, and there are no labels.

    Args:
        shapes: our key to shape.
        family: the layout's family.
        layout: the layout's name.
        merged: whether the branches are gone, so that kernels cannot be told.
        sha256: of the file.
        input_size: (H, W), where shapes cannot tell it.
        size_is_sure: the size is that of a bundle or a card. Otherwise one that contradicts the shapes is refused: the
            same weights would be cut into other partitions, and compute something else.
        name: the file, for messages; its stem is what a network is called that no card describes.

    Raises:
        CheckpointError: the shapes fit no network of the family.
    """
    try:
        spec = FAMILIES[family].infer(shapes, input_size)
        if input_size is not None and not size_is_sure:
            _require_told_size(family, shapes, input_size)
    except KeyError as error:
        raise CheckpointError(f"{name} has no key {error.args[0]}, which every {family} has") from None
    except (ValidationError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from None
    cards = [card for card in map(load_card, list_cards()) if card.family == family]
    cards.sort(key=lambda card: (not _is_of(card, sha256), card.layout != layout))
    loose = {"kernels"} if merged else set()
    described = spec.model_dump(exclude=loose)
    for card in cards:
        if card_spec(card).model_dump(exclude=loose) == described:
            if _is_of(card, sha256):
                return Inferred(card, f"recognised as {card.name}", "")
            remark = f"recognised as {card.name} by its architecture"
            return Inferred(card.model_copy(update={"labels": None}), remark, card.name)
    for card in cards:
        if card_spec(card).model_dump(exclude={*loose, "classes"}) == spec.model_dump(exclude={*loose, "classes"}):
            own = _own_card(Path(name).stem, family, spec.model_dump(), card.preprocessing)
            return Inferred(own, f"recognised as {card.name} with other classes", card.name)
    given = spec.model_dump()
    own = _own_card(Path(name).stem, family, given, usual_preprocessing(given["input_size"], given["in_channels"]))
    return Inferred(own, "no card has this architecture", "ImageNet")


def _require_told_size(family: str, shapes: Mapping[str, Sequence[int]], given: tuple[int, int]) -> None:
    """Raise ValueError if the shapes alone tell another input size."""
    try:
        told = FAMILIES[family].infer(shapes, None).model_dump()["input_size"]
    except (KeyError, ValueError, ZeroDivisionError):
        return
    if tuple(told) != given:
        raise ValueError(
            f"the weights fit {told[0]}x{told[1]}; with {given[0]}x{given[1]} they would compute something else: "
            f"drop --input-size, or pass a card that says so"
        )


def _is_of(card: ModelCard, sha256: str) -> bool:
    """Return whether a file with this digest is the one that the card names."""
    weights = card.weights
    if weights is None or not sha256:
        return False
    if weights.sha256_prefix is not None:
        return sha256.startswith(weights.sha256_prefix)
    shipped = data_root() / (weights.file or "")
    return shipped.is_file() and hash_file(shipped) == sha256


def load_network(
    tensors: Mapping[str, Tensor], card: ModelCard, *, merged: bool, name: str = "checkpoint"
) -> nn.Module:
    """Build the card's network with these weights: evaluation mode, float32, sharing the tensors' memory.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; the first few are named.
    """
    with torch.device("meta"):
        network = build_network(card, deploy=merged)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = dict(tensors)
    for key in expected:
        if key.endswith("num_batches_tracked") and key not in given:  # a counter that evaluation never reads
            given[key] = torch.zeros((), dtype=torch.long)
    where = f"{name} does not fit {card.name}"
    missing = [key for key in expected if key not in given]
    if missing:
        raise CheckpointError(f"{where}: {_some(missing)} missing")
    unexpected = [key for key in given if key not in expected]
    if unexpected:
        raise CheckpointError(f"{where}: {_some(unexpected)} unexpected")
    for key, shape in expected.items():
        if tuple(given[key].shape) != shape:
            raise CheckpointError(f"{where}: {key} has shape {tuple(given[key].shape)}; expected {shape}")
    network.load_state_dict(given, strict=True, assign=True)
    return network.requires_grad_(requires_grad=False).eval()


def _own_card(name: str, family: str, spec: dict[str, object], preprocessing: Preprocessing) -> ModelCard:
    allowed = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("._-")
    try:
        return ModelCard.model_validate(
            {
                "name": allowed or family,
                "family": family,
                "task": FAMILIES[family].task,
                "input_size": spec.pop("input_size"),
                "network": spec,
                "preprocessing": preprocessing,
            }
        )
    except ValidationError as error:
        raise CardError(f"{name}: {error.errors()[0]['msg']}") from None


def _some(keys: Sequence[str], show: int = 3) -> str:
    rest = f" and {len(keys) - show} more are" if len(keys) > show else " is" if len(keys) == 1 else " are"
    return ", ".join(keys[:show]) + rest
