"""The trained network that an export begins with: from a file, from memory, or one of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repmlp_deploy.card import ModelCard, load_card
from repmlp_deploy.convert.source.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.source.loading import infer_card, load_network
from repmlp_deploy.convert.source.own_network import (
    Interface,
    default_card,
    describe_interface,
    fill_own_network,
    make_own_network,
)
from repmlp_deploy.convert.source.state_dict import StateDict, find_state_dict, own_state_dict
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.families import FAMILIES, card_spec
from repmlp_deploy.nets.foreign import has_branches
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["OwnRequest", "Trained", "describe_checkpoint", "find_interface", "load_own", "load_trained", "take_trained"]

INPUT = "images"


@dataclass(frozen=True)
class Trained:
    """A network with its weights, and where they came from.

    Attributes:
        network: evaluation mode, float32.
        card: its description.
        checkpoint: the file; None for a network that was handed over in memory.
        state: the file's state dict and its layout; None likewise.
        merged: whether its branches are merged already.
        notes: what a reader of the report should know.
        interface: how it is called, for a network that no family describes.
    """

    network: nn.Module
    card: ModelCard
    checkpoint: Checkpoint | None = None
    state: StateDict | None = None
    merged: bool = False
    notes: tuple[str, ...] = ()
    interface: Interface | None = None

    def without_weights(self) -> Trained:
        """Return this with names and shapes only; memory of its own is freed.

        A network that was handed over in memory, or made by its owner's code, is the owner's and stays unchanged.
        """
        if self.checkpoint is None or self.interface is not None:
            return self
        checkpoint = replace(self.checkpoint, content=None)
        state = None if self.state is None else replace(self.state, tensors={})
        return replace(self, network=self.network.to("meta"), checkpoint=checkpoint, state=state)


def load_trained(
    path: str | Path,
    card: str | Path | ModelCard | None = None,
    *,
    weights: str | None = None,
    input_size: tuple[int, int] | None = None,
    allow_merged: bool = False,
) -> Trained:
    """Load the trained network in a checkpoint of any layout.

    Args:
        path: `.pth`, `.pt` or `.safetensors`.
        card: a card, or the name or path of one; by default it is inferred from keys and shapes.
        weights: `model` or `ema`, where a file holds both; by default `model`.
        input_size: (H, W), where keys and shapes cannot tell it.
        allow_merged: accept a checkpoint whose branches are merged already. Nothing can be proved about the trained
            network then; the merged one takes its place.

    Raises:
        CheckpointError: the file is damaged, unsafe, of no network we know, or does not fit the card.
        CardError: the card is wrong.
    """
    given = card if card is None or isinstance(card, ModelCard) else load_card(card)
    checkpoint = read_checkpoint(path)
    name = str(path)
    state = find_state_dict(checkpoint.content, weights=weights, name=name)
    notes = []
    if state.merged:
        if not allow_merged:
            raise CheckpointError(
                f"{name} is merged already, so its equality with the trained network cannot be proved: give the "
                "training-time checkpoint, or pass --allow-merged to prove equality with the merged one"
            )
        notes.append("the checkpoint is merged already: the reference is the merged network, not the trained one")
    if given is None:
        given, remark = infer_card(
            state.shapes(),
            family=state.layout.family,
            layout=state.layout.name,
            merged=state.merged,
            input_size=input_size,
            name=name,
        )
        notes.append(remark)
    elif given.family != state.layout.family:
        raise CheckpointError(f"{name} is a {state.layout.family}; the card {given.name} describes a {given.family}")
    if input_size is not None and input_size != given.input_size:
        raise InputError(
            f"--input-size {input_size[0]}x{input_size[1]} contradicts {given.name}, "
            f"which takes {given.input_size[0]}x{given.input_size[1]}"
        )
    notes += state.notes
    if checkpoint.replaced:
        notes.append(f"objects in the file were not loaded, only its tensors: {', '.join(checkpoint.replaced)}")
    if state.others:
        notes.append(f"the file also holds {', '.join(state.others)}; used: {state.container or 'its top level'}")
    network = load_network(state.tensors, given, merged=state.merged, name=name)
    return Trained(network, given, checkpoint, state, state.merged, tuple(notes))


def describe_checkpoint(
    path: str | Path, *, weights: str | None = None, input_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Describe a checkpoint for people: file, layout, architecture, parameters.

    Raises:
        CheckpointError: it cannot be read, or is of no network we know.
    """
    trained = load_trained(path, weights=weights, input_size=input_size, allow_merged=True)
    if trained.checkpoint is None or trained.state is None:
        raise AssertionError("a file that was loaded has both")
    return {
        "kind": "checkpoint",
        "sha256": trained.checkpoint.sha256,
        "layout": trained.state.layout.name,
        "container": trained.state.container,
        "prefix": trained.state.prefix,
        "also holds": list(trained.state.others),
        "state": "merged" if trained.merged else "trained",
        "card": trained.card.name,
        "family": trained.card.family,
        **card_spec(trained.card).model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "notes": list(trained.notes),
    }


def find_interface(trained: Trained) -> Interface:
    """Return how the network is called: its inputs, its outputs and examples."""
    if trained.interface is not None:
        return trained.interface
    spec, family = card_spec(trained.card), FAMILIES[trained.card.family]
    images = torch.zeros(1, spec.in_channels, *trained.card.input_size)
    names = (find_task(trained.card.task).output,) if family.outputs is None else family.outputs(spec)
    return Interface((INPUT,), (images,), names)


def take_trained(
    source: nn.Module | str | Path,
    card: str | Path | ModelCard | None,
    weights: str | None,
    input_size: tuple[int, int] | None,
    *,
    allow_merged: bool,
) -> Trained:
    """Take a network of a family, from a file or from memory; arguments as in `load_trained`.

    Raises:
        InputError: it has no card, is in training mode, or has no branches and that is not allowed.
    """
    if not isinstance(source, nn.Module):
        return load_trained(source, card, weights=weights, input_size=input_size, allow_merged=allow_merged)
    own = card if card is not None else getattr(source, "card", None)
    if own is None:
        raise InputError(
            f"{type(source).__name__} carries no card: pass example_input=, a tensor such as it takes, "
            "or card=, a name in models/ or a ModelCard, if it is a network of repmlp_deploy"
        )
    if source.training:
        raise InputError(f"{type(source).__name__} is in training mode: call .eval() first")
    found = own if isinstance(own, ModelCard) else load_card(own)
    return Trained(source, found, merged=_is_merged(source, allow_merged=allow_merged))


@dataclass(frozen=True)
class OwnRequest:
    """What was said about a network that no family describes."""

    module: str | None
    example_input: Any
    card: str | Path | ModelCard | None
    weights: str | None
    input_size: tuple[int, int] | None
    allow_merged: bool


def load_own(source: nn.Module | str | Path, own: OwnRequest) -> Trained:
    """Take a user's own network: from memory, or made by its factory and filled from a weights file."""
    checkpoint = state = None
    if isinstance(source, nn.Module):
        if own.module is not None:
            raise InputError(f"module={own.module} makes a network, and a {type(source).__name__} was given: drop one")
        network = source
    elif own.module is None:
        raise InputError(f"{source} is a weights file: example_input= needs module=, the network it is for")
    else:
        network = make_own_network(own.module)
        checkpoint = read_checkpoint(source)
        expected = network.state_dict()
        state = own_state_dict(checkpoint.content, expected.keys(), weights=own.weights, name=str(source))
        fill_own_network(network, state.tensors, str(source))
    called, interface = describe_interface(network, _example(network, own))
    card = own.card if own.card is not None else getattr(network, "card", None)
    if card is None:
        card = default_card(network, interface)
    elif not isinstance(card, ModelCard):
        card = load_card(card)
    merged = _is_merged(network, allow_merged=own.allow_merged)
    return Trained(called, card, checkpoint, state, merged, interface=interface)


def _example(network: nn.Module, own: OwnRequest) -> Any:
    """Return the example that was given, the network's own, or an image of the given size."""
    example = own.example_input if own.example_input is not None else getattr(network, "example_input", None)
    if example is None and own.input_size is not None:
        return torch.zeros(1, 3, *own.input_size)
    if example is None:
        raise InputError(
            f"{type(network).__name__} does not say what it takes: pass --input-size HxW for RGB images, "
            "or give it an attribute example_input"
        )
    return example


def _is_merged(network: nn.Module, *, allow_merged: bool) -> bool:
    """Return whether no block has branches; raise InputError if that is not allowed."""
    try:
        if has_branches(network):
            return False
    except ValueError as error:  # the parts of a block, but not all of them
        raise InputError(str(error)) from None
    if not allow_merged:
        raise InputError(
            f"{type(network).__name__} has no RepMLP block with branches; if it is merged already, nothing can be "
            "proved about the trained network: export it before switch_to_deploy(), or pass allow_merged=True"
        )
    return True
