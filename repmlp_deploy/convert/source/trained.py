"""The trained network that an export begins with: from a file, from memory, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repmlp_deploy.card import ModelCard, load_card
from repmlp_deploy.convert.options import parse_model
from repmlp_deploy.convert.source.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.source.class_names import find_class_names
from repmlp_deploy.convert.source.description import Description, complete_card
from repmlp_deploy.convert.source.loading import infer_card, load_network
from repmlp_deploy.convert.source.other_families import notes_on_merged
from repmlp_deploy.convert.source.own_network import (
    Interface,
    default_card,
    describe_interface,
    fill_own_network,
    make_own_network,
    unwrapped,
)
from repmlp_deploy.convert.source.state_dict import StateDict, find_state_dict, own_state_dict
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.families import FAMILIES, card_spec
from repmlp_deploy.nets.foreign import has_branches, holds_blocks
from repmlp_deploy.runtime.tasks import find_task

if TYPE_CHECKING:
    from repmlp_deploy.convert.source.other_families.timm_network import TimmNetwork

__all__ = [
    "SourceRequest",
    "Trained",
    "find_interface",
    "load_own",
    "load_trained",
    "take_trained",
]

INPUT = "images"
_IMAGE_AXES = 4  # (N, C, H, W)


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
        warnings: what may make answers wrong.
        interface: how it is called, for a network that no family describes.
        model: `timm:NAME[,…]`, for a network of timm.
    """

    network: nn.Module
    card: ModelCard
    checkpoint: Checkpoint | None = None
    state: StateDict | None = None
    merged: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    interface: Interface | None = None
    model: str | None = None

    def without_weights(self) -> Trained:
        """Return this with names and shapes only; memory of its own is freed.

        A network that was handed over in memory, or made by its owner's code, is the owner's and stays unchanged.
        """
        if self.checkpoint is None or self.interface is not None:
            return self
        checkpoint = replace(self.checkpoint, content=None)
        state = None if self.state is None else replace(self.state, tensors={})
        return replace(self, network=self.network.to("meta"), checkpoint=checkpoint, state=state)


def load_trained(  # noqa: PLR0913 - each says something that the file does not
    source: str | Path | Checkpoint,
    card: str | Path | ModelCard | None = None,
    *,
    weights: str | None = None,
    state_key: str | None = None,
    ignore: Sequence[str] = (),
    input_size: tuple[int, int] | None = None,
    size_is_sure: bool = False,
    allow_merged: bool = False,
    described: Description | None = None,
) -> Trained:
    """Load the trained network in a checkpoint of any layout.

    Args:
        source: `.pth`, `.pt` or `.safetensors`, or what was read from it.
        card: a card, or the name or path of one; by default it is inferred from keys and shapes.
        weights: `model` or `ema`, where a file holds both; by default `model`.
        state_key: the path of keys to the state dict, joined by dots, instead of `weights`.
        ignore: patterns, as in a shell, of keys to leave out.
        input_size: (H, W), where keys and shapes cannot tell it.
        size_is_sure: see `infer_card`.
        allow_merged: accept a checkpoint whose branches are merged already. Nothing can be proved about the trained
            network then; the merged one takes its place.
        described: what the user says of images and labels.

    Raises:
        CheckpointError: the file is damaged, unsafe, of no network we know, or does not fit the card.
        CardError: the card is wrong.
    """
    given = card if card is None or isinstance(card, ModelCard) else load_card(card)
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    name = str(checkpoint.path)
    state = find_state_dict(checkpoint.content, weights=weights, state_key=state_key, ignore=ignore, name=name)
    notes = []
    if state.merged:
        if not allow_merged:
            raise CheckpointError(
                f"{name} is merged already, so its equality with the trained network cannot be proved: give the "
                "training-time checkpoint, or pass --allow-merged to prove equality with the merged one"
            )
        notes.append("the checkpoint is merged already: the reference is the merged network, not the trained one")
    assumed = ""
    if given is None:
        found = infer_card(
            state.shapes(),
            family=state.layout.family,
            layout=state.layout.name,
            merged=state.merged,
            sha256=checkpoint.sha256,
            input_size=input_size,
            size_is_sure=size_is_sure,
            name=name,
        )
        given, assumed = found.card, found.assumed
        notes.append(found.remark)
    elif given.family != state.layout.family:
        raise CheckpointError(f"{name} is a {state.layout.family}; the card {given.name} describes a {given.family}")
    _require_size_of_card(given, input_size)
    completed = complete_card(given, checkpoint.content, described or Description(), assumed)
    notes += [*completed.notes, *_notes_on_file(checkpoint, state)]
    network = load_network(state.tensors, completed.card, merged=state.merged, name=name)
    return Trained(network, completed.card, checkpoint, state, state.merged, tuple(notes), completed.warnings)


def _require_size_of_card(card: ModelCard, size: tuple[int, int] | None) -> None:
    """Raise InputError unless the size that was given, if one was, is the card's."""
    if size is not None and size != card.input_size:
        raise InputError(
            f"--input-size {size[0]}x{size[1]} contradicts {card.name}, "
            f"which takes {card.input_size[0]}x{card.input_size[1]}"
        )


def _notes_on_file(checkpoint: Checkpoint, state: StateDict) -> list[str]:
    """Return what was left out of a file, and what else it holds."""
    notes = list(state.notes)
    if checkpoint.replaced:
        notes.append(f"objects in the file were not loaded, only its tensors: {', '.join(checkpoint.replaced)}")
    if state.others:
        notes.append(f"the file also holds {', '.join(state.others)}; used: {state.container or 'its top level'}")
    return notes


def find_interface(trained: Trained) -> Interface:
    """Return how the network is called: its inputs, its outputs and examples."""
    if trained.interface is not None:
        return trained.interface
    spec, family = card_spec(trained.card), FAMILIES[trained.card.family]
    images = torch.zeros(1, spec.in_channels, *trained.card.input_size)
    names = (find_task(trained.card.task).output,) if family.outputs is None else family.outputs(spec)
    return Interface((INPUT,), (images,), names)


@dataclass(frozen=True)
class SourceRequest:
    """What was said about the network to export; see `load_trained`.

    Attributes:
        module: `package.module:factory` of a network that no family describes.
        example_input: what such a network takes.
        example_for: returns what such a network takes, for one that is yet to be made.
        card: or its name or path.
        weights: `model` or `ema`.
        state_key: the path of keys to the state dict.
        ignore: patterns of keys to leave out.
        input_size: (H, W).
        described: what the user says of images and labels.
        allow_merged: accept a network without branches.
        model: `timm:NAME[,…]`, a network of timm.
    """

    module: str | None = None
    example_input: Any = None
    card: str | Path | ModelCard | None = None
    weights: str | None = None
    state_key: str | None = None
    ignore: tuple[str, ...] = ()
    input_size: tuple[int, int] | None = None
    described: Description = field(default_factory=Description)
    allow_merged: bool = False
    model: str | None = None
    example_for: Callable[[nn.Module], Any] | None = None


def take_trained(source: nn.Module | str | Path | Checkpoint, said: SourceRequest) -> Trained:
    """Take a network of a family, from a file or from memory.

    Raises:
        InputError: it has no card, is in training mode, or has no branches and that is not allowed.
    """
    if not isinstance(source, nn.Module):
        return load_trained(
            source,
            said.card,
            weights=said.weights,
            state_key=said.state_key,
            ignore=said.ignore,
            input_size=said.input_size,
            allow_merged=said.allow_merged,
            described=said.described,
        )
    _require_file(source, said)
    own = said.card if said.card is not None else getattr(source, "card", None)
    if own is None:
        raise InputError(
            f"{type(source).__name__} carries no card: pass example_input=, a tensor such as it takes, "
            "or card=, a name in models/ or a ModelCard, if it is a network of repmlp_deploy"
        )
    if source.training:
        raise InputError(f"{type(source).__name__} is in training mode: call .eval() first")
    found = own if isinstance(own, ModelCard) else load_card(own)
    _require_size_of_card(found, said.input_size)
    completed = complete_card(found, None, said.described)
    merged = _is_merged(source, allow_merged=said.allow_merged)
    return Trained(source, completed.card, merged=merged, notes=completed.notes, warnings=completed.warnings)


def load_own(source: nn.Module | str | Path | Checkpoint, said: SourceRequest) -> Trained:
    """Take a network of no family: from memory, or made by its factory or by timm and filled from a weights file.

    Raises:
        InputError: it cannot be made or called, or what was said contradicts it.
        CheckpointError: the file is damaged, unsafe, or does not fit the network.
        MissingDependency: timm or what it needs is not installed.
    """
    network, made = _network_for(source.path if isinstance(source, Checkpoint) else source, said)
    checkpoint = state = None
    if isinstance(source, nn.Module):
        merging = notes_on_merged(network.state_dict(), type(network).__name__, allow_merged=said.allow_merged)
    else:
        checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
        state = own_state_dict(
            checkpoint.content,
            network.state_dict().keys(),
            weights=said.weights,
            state_key=said.state_key,
            ignore=said.ignore,
            rename=said.model is not None,
            name=str(checkpoint.path),
        )
        merging = notes_on_merged(state.tensors, str(checkpoint.path), allow_merged=said.allow_merged)
        state = replace(state, merged=bool(merging))
        fill_own_network(network, state.tensors, state.named(str(checkpoint.path)))
    called, interface = describe_interface(network, _example(network, said, made))
    if said.input_size is not None:
        _require_size(network, interface, "--input-size", said.input_size)
    content = None if checkpoint is None else checkpoint.content
    card, assumed, notes = _own_card(network, interface, said, made, content)
    completed = complete_card(
        card, content, said.described, assumed, classes=interface.classes, channels=_channels(interface)
    )
    notes = (*merging, *notes, *completed.notes)
    if checkpoint is not None and state is not None:
        notes = (*notes, *_notes_on_file(checkpoint, state))
    merged = _is_merged(network, allow_merged=said.allow_merged)
    return Trained(called, completed.card, checkpoint, state, merged, notes, completed.warnings, interface, said.model)


def _network_for(source: nn.Module | str | Path, said: SourceRequest) -> tuple[nn.Module, TimmNetwork | None]:
    """Return the network, and what timm says of it if it is timm's."""
    if said.module is not None and said.model is not None:
        raise InputError(f"module={said.module} and model={said.model} both make the network: drop one")
    maker = said.module or said.model
    if isinstance(source, nn.Module):
        if maker is not None:
            kind = "module" if said.module else "model"
            raise InputError(f"{kind}={maker} makes a network, and a {type(source).__name__} was given: drop one")
        _require_file(source, said)
        return unwrapped(source), None
    if said.model is not None:
        # timm, for its networks alone
        parse_model(said.model)  # before timm is asked for
        from repmlp_deploy.convert.source.other_families.timm_network import make_timm_network  # noqa: PLC0415

        made = make_timm_network(said.model, said.input_size)
        return made.network, made
    if said.module is None:
        raise InputError(f"{source} is a weights file: example_input= needs module=, the network it is for")
    return make_own_network(said.module), None


def _own_card(
    network: nn.Module, interface: Interface, said: SourceRequest, made: TimmNetwork | None, content: Any
) -> tuple[ModelCard, str, tuple[str, ...]]:
    """Return the card of a network of no family, whose preprocessing it assumes, and what to say of it."""
    card = said.card if said.card is not None else getattr(network, "card", None)
    if card is not None:
        found = card if isinstance(card, ModelCard) else load_card(card)
        if made is not None and found.family in FAMILIES:
            raise InputError(f"{made.name} is a network of timm; the card {found.name} describes a {found.family}")
        if not find_task(found.task).refusal:
            _require_size(network, interface, f"the card {found.name} for", found.input_size)
        return found, "", ()
    if made is None:
        assumed = "ImageNet" if said.described else ""
        return default_card(network, interface, with_images=bool(said.described)), assumed, ()
    return made.described(interface, names_in_file=find_class_names(content) is not None)


def _channels(interface: Interface) -> int | None:
    """Return the channels of a network's only input, if that can be an image."""
    examples = interface.examples
    return examples[0].shape[1] if len(examples) == 1 and examples[0].ndim == _IMAGE_AXES else None


def _example(network: nn.Module, own: SourceRequest, made: TimmNetwork | None) -> Any:
    """Return the example that was given, the network's own, or an image of the given size."""
    if own.example_for is not None:
        return own.example_for(network)
    if made is not None and own.example_input is None:
        return torch.zeros(1, made.channels, *made.input_size)
    example = own.example_input if own.example_input is not None else getattr(network, "example_input", None)
    if example is None and own.input_size is not None:
        return torch.zeros(1, 3, *own.input_size)
    if example is None:
        raise InputError(
            f"{type(network).__name__} does not say what it takes: pass --input-size HxW for RGB images, "
            "or give it an attribute example_input"
        )
    return example


def _require_size(network: nn.Module, interface: Interface, said_by: str, size: tuple[int, int]) -> None:
    """Raise InputError unless the network takes images of this size."""
    shapes = [tuple(x.shape) for x in interface.examples]
    if not any(len(shape) == _IMAGE_AXES and shape[2:] == size for shape in shapes):
        raise InputError(
            f"{said_by} {size[0]}x{size[1]} contradicts the example_input of {type(network).__name__}, "
            f"of shape {', '.join(map(str, shapes))}: drop one of them"
        )


def _require_file(source: nn.Module, said: SourceRequest) -> None:
    """Raise InputError if something was said that only a weights file has."""
    about_files = {"weights": said.weights, "state_key": said.state_key, "ignore": said.ignore or None}
    given = next((name for name, value in about_files.items() if value is not None), None)
    if given is not None:
        raise InputError(f"{given}= is about a weights file, and a {type(source).__name__} was given: drop it")


def _is_merged(network: nn.Module, *, allow_merged: bool) -> bool:
    """Return whether there are blocks of which none has branches; raise InputError if that is not allowed."""
    try:
        if has_branches(network) or not holds_blocks(network):
            return False
    except ValueError as error:  # the parts of a block, but not all of them
        raise InputError(str(error)) from None
    if not allow_merged:
        raise InputError(
            f"{type(network).__name__} has RepMLP blocks, but none with branches: it is merged already, and nothing "
            "can be proved about the trained network: export it before switch_to_deploy(), or pass allow_merged=True"
        )
    return True
