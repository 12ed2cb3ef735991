"""Layouts of checkpoints: where the state dict is, whose names its keys have, and what our networks call them.

A layout is a list of (theirs, ours) pieces of keys, so that it works in both directions: merged weights can be
written back under the names they came in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repmlp_deploy.errors import CheckpointError

__all__ = [
    "LAYOUTS",
    "Layout",
    "StateDict",
    "find_state_dict",
    "from_layout",
    "own_state_dict",
    "select_weights",
    "to_layout",
]


@dataclass(frozen=True)
class Layout:
    """The names that one implementation gives to a family's weights.

    Attributes:
        name: `official`, `mmpretrain`, or `own` for a network of this project.
        family: an entry of `nets.families.FAMILIES`.
        anchor: a key that every state dict of this layout has.
        renames: (theirs, ours), applied in order; every ours is theirs again in reverse.
        without: what no key begins with, where that tells it from another layout of the same anchor.
    """

    name: str
    family: str
    anchor: str
    renames: tuple[tuple[str, str], ...] = ()
    without: str = ""

    def ours(self, key: str) -> str:
        """What our network calls `key`."""
        for theirs, ours in self.renames:
            key = key.replace(theirs, ours) if theirs.startswith(".") else _swap_start(key, theirs, ours)
        return key

    def theirs(self, key: str) -> str:
        """What this layout calls our `key`."""
        for theirs, ours in reversed(self.renames):
            key = key.replace(ours, theirs) if theirs.startswith(".") else _swap_start(key, ours, theirs)
        return key


_MMPRETRAIN_TRUNK = (
    ("patch_embed.projection.", "conv_embedding.conv."),
    ("patch_embed.norm.", "conv_embedding.bn."),
    ("stages.", "stages."),
    ("downsample_layers.", "embeds."),
    ("final_norm.", "head_norm."),
)
_MMPRETRAIN_UNIT = (
    (".gp.conv1.conv.", ".gp.fc1."),
    (".gp.conv2.conv.", ".gp.fc2."),
    (".norm1.", ".prebn1."),
    (".norm2.", ".prebn2."),
)

LAYOUTS = (
    Layout("official", "repmlpnet-backbone", "conv_embedding.conv.weight", without="head."),
    Layout("official", "repmlpnet", "conv_embedding.conv.weight"),
    Layout("official", "repmlp-resnet", "stage0.0.conv.weight"),
    Layout("own", "pure-mlp", "stages.0.0.repmlp.fc3.weight"),
    Layout(
        "mmpretrain",
        "repmlpnet",
        "backbone.patch_embed.projection.weight",
        (
            *((f"backbone.{theirs}", ours) for theirs, ours in _MMPRETRAIN_TRUNK),
            ("head.fc.", "head."),
            *_MMPRETRAIN_UNIT,
        ),
    ),
    Layout(
        "mmpretrain",
        "repmlpnet-backbone",
        "patch_embed.projection.weight",
        (*_MMPRETRAIN_TRUNK, *_MMPRETRAIN_UNIT),
    ),
    Layout("own", "pspnet", "backbone.conv_embedding.conv.weight"),
    Layout("own", "mobilefacenet", "gdc.conv.weight"),
)

OWN = Layout("own", "custom", "")
"""A user's network: its names are its own."""

_CONTAINERS = {"model": ("state_dict", "model"), "ema": ("ema", "model_ema", "state_dict_ema")}
_PREFIXES = ("module.", "_orig_mod.")
_BOOKKEEPING = ("n_averaged",)  # torch.optim.swa_utils counts its averages beside the weights


@dataclass(frozen=True)
class StateDict:
    """A state dict under our networks' names, and what it took to get there.

    Attributes:
        tensors: our key to tensor, float32 but for counters.
        layout: whose names the file uses.
        container: the key of the file under which it was, `""` for the file itself.
        prefix: what every key began with.
        merged: whether the branches are merged into FC3 already.
        others: containers with further weights in the same file.
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    container: str
    prefix: str
    merged: bool
    others: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our key to shape."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}


def find_state_dict(content: Any, *, weights: str | None = None, name: str = "checkpoint") -> StateDict:
    """The state dict in what a weights file holds, under our names, every tensor checked.

    Args:
        content: as `read_checkpoint` returns it.
        weights: `model` or `ema`; by default `model`, or the only one there is.
        name: what messages call the file.

    Raises:
        CheckpointError: there is none, it is of no network we know, or a tensor cannot be weights.
    """
    found, container, others = select_weights(content, weights, name)
    odd = next((key for key in found if not isinstance(key, str)), None)
    if odd is not None:
        raise CheckpointError(f"{name} has the key {odd!r}; expected names")
    for key in _BOOKKEEPING:
        found.pop(key, None)
    prefix = ""
    while head := next((p for p in _PREFIXES if found and all(key.startswith(p) for key in found)), None):
        prefix += head
        found = {key.removeprefix(head): value for key, value in found.items()}
    layout = _recognise(found, name)
    return from_layout(found, layout, container=container, prefix=prefix, others=others, name=name)


def own_state_dict(
    content: Any, expected: Collection[str], *, weights: str | None = None, name: str = "checkpoint"
) -> StateDict:
    """The state dict of a network that is no family's, under its own names, every tensor checked.

    Args:
        content: as `read_checkpoint` returns it.
        expected: the network's keys; prefixes of wrappers are taken off until some of them are found.
        weights: see `find_state_dict`.
        name: what messages call the file.

    Raises:
        CheckpointError: there is none, or a tensor cannot be weights.
    """
    found, container, others = select_weights(content, weights, name)
    prefix = ""
    while not any(key in expected for key in found):
        head = next((p for p in _PREFIXES if all(key.startswith(p) or key in _BOOKKEEPING for key in found)), None)
        if head is None:
            break
        prefix += head
        found = {key.removeprefix(head): value for key, value in found.items()}
    tensors = {
        key: _checked(value, key, name, integers=True)
        for key, value in found.items()
        if key not in _BOOKKEEPING or key in expected
    }
    return StateDict(tensors, OWN, container, prefix, merged=False, others=others)


def from_layout(  # noqa: PLR0913 - it records where the state dict was
    found: Mapping[str, Any],
    layout: Layout,
    *,
    container: str = "",
    prefix: str = "",
    others: tuple[str, ...] = (),
    name: str = "checkpoint",
) -> StateDict:
    """A state dict of a known layout under our names; see `find_state_dict`."""
    tensors = {layout.ours(key): _checked(value, key, name) for key, value in found.items()}
    if len(tensors) != len(found):
        raise CheckpointError(f"{name} mixes names of two layouts: {layout.name} and our own")
    merged = [key for key in tensors if key.endswith("fc3.bias")]
    trained = [key for key in tensors if key.endswith("fc3_bn.weight")]
    if merged and trained:
        raise CheckpointError(f"{name} is half merged: it has {merged[0]} and {trained[0]}")
    return StateDict(tensors, layout, container, prefix, bool(merged), others)


def to_layout(tensors: Mapping[str, Tensor], origin: StateDict) -> dict[str, Any]:
    """Weights under the names, prefix and container that `origin` came in."""
    named = {origin.prefix + origin.layout.theirs(key): tensor for key, tensor in tensors.items()}
    for part in reversed(origin.container.split(".") if origin.container else []):
        named = {part: named}  # type: ignore[dict-item]
    return dict(named)


def select_weights(content: Any, weights: str | None, name: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The state dict to use, the path of keys it lies under, and the paths of the others in the file."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}; expected a state dict or a dictionary of them")
    places = _places(content)
    if not places:
        keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{name} holds no state dict; its keys are {keys}")
    kinds = dict(reversed(places))
    if weights is not None and weights not in kinds:
        raise CheckpointError(f"{name} holds no {weights} weights, only {', '.join(kinds)}: drop --weights {weights}")
    chosen = kinds[weights or ("model" if "model" in kinds else "ema")]
    value: Any = content
    for part in chosen.split(".") if chosen else []:
        value = value[part]
    return dict(value), chosen, tuple(path for _, path in places if path != chosen)


def _places(content: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """(`model` or `ema`, dotted path) of every state dict in `content`, the likeliest first."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return [("model", "")]
    places = []
    for kind, names in _CONTAINERS.items():
        for outer in (key for key in names if isinstance(content.get(key), Mapping)):
            inner = content[outer]
            if any(isinstance(value, Tensor) for value in inner.values()):
                places.append((kind, outer))
            else:
                nested = ("state_dict", "model", "module")
                places += [(kind, f"{outer}.{key}") for key in nested if isinstance(inner.get(key), Mapping)]
    return places


def _recognise(found: Mapping[str, Any], name: str) -> Layout:
    for layout in LAYOUTS:
        if layout.anchor in found and not (layout.without and any(str(k).startswith(layout.without) for k in found)):
            return layout
    if any(key.endswith("fc3.weight") for key in found):
        anchors = dict.fromkeys(layout.anchor for layout in LAYOUTS)
        raise CheckpointError(f"{name} has RepMLP blocks but no known network's frame: it lacks {' or '.join(anchors)}")
    some = ", ".join(list(found)[:3])
    raise CheckpointError(f"{name} is no RepMLP: no key ends in fc3.weight; it begins with {some}")


def _checked(value: Any, key: str, name: str, *, integers: bool = False) -> Tensor:
    """`value` as dense float32 weights that own what they claim; counters stay integers, with `integers` others too."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name}: {key} is a {type(value).__name__}; expected a tensor")
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
        raise CheckpointError(f"{name}: {key} is not a dense tensor of real numbers ({value.layout}, {value.dtype})")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{name}: {key} claims {tuple(value.shape)}, more than the file stores for it")
    if key.endswith("num_batches_tracked"):
        return value.detach().long()
    if integers and not value.is_floating_point():
        return value.detach()
    if not value.is_floating_point():
        raise CheckpointError(f"{name}: {key} is {value.dtype}; expected floating-point weights")
    tensor = value.detach().float().contiguous()
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{name}: {key} has {bad} values that are NaN or infinite: the training diverged")
    if key.endswith("running_var") and tensor.numel() and float(tensor.min()) <= 0:
        raise CheckpointError(f"{name}: {key} has a variance of {float(tensor.min()):g}; variances must be positive")
    return tensor


def _swap_start(key: str, start: str, replacement: str) -> str:
    return replacement + key.removeprefix(start) if key.startswith(start) else key
