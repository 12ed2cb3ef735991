"""Bring the keys of the state dict in a checkpoint under our networks' names.

`containers` finds the state dict. Its keys begin with the prefixes of wrappers (`module.`, `_orig_mod.`, `model.`).
Nothing of this is a fixed list here:

- the prefix is what stands before the key that every network of a layout has, its anchor;
- the wrappers of DataParallel and torch.compile are taken out wherever they stand in a key.

The way back is kept, so that merged weights can be saved under the names they came in.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repmlp_deploy.convert.source.checkpoint import OddTensor, Placeholder
from repmlp_deploy.convert.source.containers import is_averaged, plain_key, select_weights
from repmlp_deploy.convert.source.other_families import OtherFamily, recognise_family
from repmlp_deploy.convert.source.other_families.naming import rename_weights
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.layouts import LAYOUTS, OWN, Layout, odd_layer_number

__all__ = ["StateDict", "find_other_family", "find_state_dict", "own_state_dict", "to_layout"]

_BOOKKEEPING = ("n_averaged", "total_ops", "total_params")
"""Last parts of keys that wrappers and profilers write beside the weights."""
_MMENGINE_COUNTER = "steps"
"""What mmengine's averaged models write beside the keys of `module`."""
_MMCV_EMA = re.compile(r"ema_(backbone|head|neck)_")
"""What mmcv's EMA hook calls the second copy of every weight, in the same state dict."""


@dataclass(frozen=True)
class StateDict:
    """A state dict under our networks' names, and how it was found.

    Attributes:
        tensors: our key to tensor; float32 except for counters.
        layout: whose names the file uses.
        container: the path of keys to it in the file, joined by dots; `""` for the file itself.
        prefix: what every key began with.
        merged: whether the branches are merged already.
        others: the paths of further weights in the same file.
        keys: our key to the file's.
        notes: what a reader of the report should know.
        ignored: the patterns of keys that were left out.
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    container: str
    prefix: str
    merged: bool
    others: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def named(self, file: str) -> str:
        """Return what messages call these weights: the file, and their place in it if there are others."""
        return f"{file} ({self.container or 'its top level'}; --state-key names others)" if self.others else file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return our key to shape."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def file_key(self, key: str) -> str:
        """Return what the file calls our `key`, or would call it."""
        if key in self.keys:
            return self.keys[key]
        parent, _, last = key.rpartition(".")
        for ours, theirs in self.keys.items():  # a merged weight has no key in the file, but its neighbours do
            if ours.rpartition(".")[0] == parent and theirs.endswith(ours.rpartition(".")[2]):
                return theirs[: len(theirs) - len(ours.rpartition(".")[2])] + last
        return self.prefix + self.layout.theirs(key)


def find_state_dict(
    content: Any,
    *,
    weights: str | None = None,
    state_key: str | None = None,
    ignore: Sequence[str] = (),
    name: str = "checkpoint",
) -> StateDict:
    """Return the state dict of a known family, under our names, every tensor checked.

    Args:
        content: as `read_checkpoint` returns it.
        weights: `model` or `ema`; by default `model`, or the only one there is.
        state_key: the path of keys to the state dict, joined by dots, instead of `weights`.
        ignore: patterns, as in a shell, of keys to leave out.
        name: what messages call the file.

    Raises:
        CheckpointError: there is none, it is of no network we know, or a tensor cannot be weights.
        InputError: a pattern of `ignore` matches nothing.
    """
    selected = select_weights(content, weights, name, state_key)
    keys = _plain_keys(selected.found, ignore, name)
    layout, prefix = _recognise(keys, name)
    ours: dict[str, str] = {}
    left_out = []
    for plain, key in keys.items():
        if not plain.startswith(prefix):
            left_out.append(key)
            continue
        renamed = layout.ours(plain.removeprefix(prefix))
        if (odd := odd_layer_number(renamed)) is not None:
            raise CheckpointError(f"{name} has the key {key[:200]}; no network has a layer {odd[:20]}")
        if renamed in ours:
            raise CheckpointError(f"{name} has two keys for one weight: {ours[renamed]} and {key}")
        ours[renamed] = key
    tensors = {renamed: _checked(selected.found[key], key, name) for renamed, key in ours.items()}
    merged = [ours[key] for key in tensors if key.endswith(layout.merged)]
    trained = [ours[key] for key in tensors if key.endswith(layout.trained)]
    if merged and trained:
        raise CheckpointError(f"{name} is half merged: it has {merged[0]} and {trained[0]}")
    notes = (*selected.notes, *_said_of(left_out))
    shown = _common_prefix(ours, layout, prefix)
    return StateDict(tensors, layout, selected.path, shown, bool(merged), selected.others, ours, notes, tuple(ignore))


def own_state_dict(  # noqa: PLR0913 - each says something else about the file
    content: Any,
    expected: Collection[str],
    *,
    weights: str | None = None,
    state_key: str | None = None,
    ignore: Sequence[str] = (),
    rename: bool = False,
    name: str = "checkpoint",
) -> StateDict:
    """Return the state dict of a network of the user's own, under its names, every tensor checked.

    Args:
        content: as `read_checkpoint` returns it.
        expected: the network's keys. One prefix is taken off, or put on, where that makes more keys fit.
        weights: see `find_state_dict`.
        state_key: see `find_state_dict`.
        ignore: see `find_state_dict`.
        rename: the network is timm's, so names of another implementation become timm's. They are not kept.
        name: what messages call the file.

    Raises:
        CheckpointError: there is none, or a tensor cannot be weights.
        InputError: a pattern of `ignore` matches nothing.
    """
    selected = select_weights(content, weights, name, state_key)
    wrapped = not any(key in expected for key in selected.found)
    keys = _plain_keys(selected.found, ignore, name, keep=expected, wrapped=wrapped)
    keys, whose = _under_timms_names(keys, name) if rename else (keys, "")
    off, on = _own_prefix(keys, expected, name)
    ours: dict[str, str] = {}
    left_out = []
    for plain, key in keys.items():
        if off and not plain.startswith(off):
            left_out.append(key)
        else:
            ours[on + plain.removeprefix(off)] = key
    tensors = {own: _checked(selected.found[key], key, name, integers=True) for own, key in ours.items()}
    notes = (*selected.notes, *_said_of(left_out))
    if whose:
        off, ours = "", {own: own for own in ours}
        notes = (*notes, f"the weights have the names of {whose}; timm's take their place")
    return StateDict(tensors, OWN, selected.path, off, False, selected.others, ours, notes, tuple(ignore))


def find_other_family(
    content: Any,
    *,
    weights: str | None = None,
    state_key: str | None = None,
    ignore: Sequence[str] = (),
    name: str = "checkpoint",
) -> tuple[OtherFamily, dict[str, tuple[int, ...]]] | None:
    """Return the other family of the state dict, and timm's key to shape; None for RepMLP and for what is not known.

    Args:
        content: see `find_state_dict`.
        weights: see `find_state_dict`.
        state_key: see `find_state_dict`.
        ignore: see `find_state_dict`.
        name: see `find_state_dict`.

    Raises:
        CheckpointError: there is no state dict.
        InputError: a pattern of `ignore` matches nothing.
    """
    selected = select_weights(content, weights, name, state_key)
    keys = _plain_keys(selected.found, ignore, name)
    other = None if _best_layout(keys) is not None else recognise_family(keys)
    if other is None:
        return None
    keys, _ = _under_timms_names(keys, name)
    values = ((key, selected.found[original]) for key, original in keys.items())
    return other, {key: tuple(value.shape) for key, value in values if isinstance(value, Tensor)}


def to_layout(tensors: Mapping[str, Tensor], origin: StateDict) -> dict[str, Any]:
    """Return weights under the names, prefix and container that `origin` came in."""
    named: dict[str, Any] = {origin.file_key(key): tensor for key, tensor in tensors.items()}
    for part in reversed(origin.container.split(".") if origin.container else []):
        named = {part: named}
    return named


def _plain_keys(
    found: Mapping[str, Any],
    ignore: Sequence[str],
    name: str,
    *,
    keep: Collection[str] = (),
    wrapped: bool = True,
) -> dict[str, str]:
    """Return the keys without wrappers' parts and bookkeeping, each with the file's own.

    Raises:
        InputError: a pattern of `ignore` matches nothing.
    """
    for pattern in ignore:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in found):
            raise InputError(f"--ignore {pattern} matches no key of {name}")
    plain: dict[str, str] = {}
    counters = {_MMENGINE_COUNTER} - set(keep)
    if not all(key.startswith("module.") for key in found if key not in counters):
        counters.clear()
    for key in found:
        parts = key.split(".")
        bare = plain_key(key) if wrapped else key
        if key not in keep and (parts[-1] in _BOOKKEEPING or _MMCV_EMA.match(bare)):
            continue
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore) or key in counters:
            continue
        if bare in plain:
            raise CheckpointError(f"{name} has two keys for one weight: {plain[bare]} and {key}")
        plain[bare] = key
    return plain


def _under_timms_names(keys: dict[str, str], name: str) -> tuple[dict[str, str], str]:
    """Return the keys under timm's names, each with the file's own, and whose names they were; empty if timm's own.

    Raises:
        CheckpointError: two keys get one name.
    """
    found = rename_weights(keys)
    if found is None:
        return keys, ""
    renamed: dict[str, str] = {}
    for plain, key in keys.items():
        other = found.names.get(plain, plain)
        if other in renamed:
            raise CheckpointError(f"{name} has two keys for one weight: {renamed[other]} and {key}")
        renamed[other] = key
    return renamed, found.whose


def _best_layout(keys: Mapping[str, str]) -> tuple[Layout, list[str]] | None:
    """Return the layout whose anchor is among the keys, and what may stand before it."""
    best: tuple[int, Layout, list[str]] | None = None
    for layout in LAYOUTS:
        ends = (key for key in keys if key == layout.anchor or key.endswith(f".{layout.anchor}"))
        starts = [key[: len(key) - len(layout.anchor)] for key in ends]
        if layout.without:
            starts = [prefix for prefix in starts if not any(k.startswith(prefix + layout.without) for k in keys)]
        fitting = max((sum(k.startswith(prefix) for k in keys) for prefix in starts), default=0)
        if fitting and (best is None or (fitting, -min(map(len, starts))) > (best[0], -min(map(len, best[2])))):
            best = (fitting, layout, starts)
    return None if best is None else best[1:]


def _recognise(keys: Mapping[str, str], name: str) -> tuple[Layout, str]:
    """Return the layout whose anchor is among the keys, and what stands before it."""
    best = _best_layout(keys)
    if best is not None:
        return best[0], _one_prefix(best[1], keys, name)
    blocks = next((original for key, original in keys.items() if key.endswith("fc3.weight")), None)
    if blocks is not None:
        anchors = dict.fromkeys(layout.anchor for layout in LAYOUTS)
        raise CheckpointError(
            f"{name} has RepMLP blocks ({blocks}) but no known network's frame: it has no {' or '.join(anchors)}"
        )
    other = recognise_family(keys)
    if other is not None:
        raise CheckpointError(f"{name} is no RepMLP; it looks like {other}: {other.remedy}")
    some = ", ".join(list(keys.values())[:3])
    raise CheckpointError(
        f"{name} is no RepMLP: no key ends in fc3.weight; it begins with {some}. Say what makes the network: "
        "--module PACKAGE.MODULE:FACTORY or --model timm:NAME"
    )


def _own_prefix(keys: Mapping[str, str], expected: Collection[str], name: str) -> tuple[str, str]:
    """Return the prefix to take off the file's keys and the one to put on; at most one is not empty."""
    if any(key in expected for key in keys):
        return "", ""
    starts = _fitting_prefixes(keys, expected)
    if starts:
        return _one_prefix(starts, keys, name), ""
    return "", min(_fitting_prefixes(expected, keys), key=len, default="")


def _fitting_prefixes(longer: Collection[str], shorter: Collection[str]) -> list[str]:
    """Return the prefixes without which most of the longer names are among the shorter."""
    fitting: Counter[str] = Counter()
    for key in longer:
        dots = [place for place, letter in enumerate(key) if letter == "."]
        fitting.update(key[: dot + 1] for dot in dots if key[dot + 1 :] in shorter)
    most = max(fitting.values(), default=0)
    return [prefix for prefix, count in fitting.items() if count == most]


def _one_prefix(starts: Collection[str], keys: Mapping[str, str], name: str) -> str:
    """Return the outermost of the prefixes that fit; of several beside each other the one of no averaged weights.

    Raises:
        CheckpointError: the file holds several such sets of weights under one name.
    """
    outer: list[str] = []
    for start in sorted(starts):  # what begins with another one comes right after it
        if not outer or not start.startswith(outer[-1]):
            outer.append(start)
    usual = [start for start in outer if not is_averaged(start.split("."))] or outer
    if len(usual) > 1:
        begins = [keys[next(key for key in keys if key.startswith(start))] for start in usual]
        raise CheckpointError(
            f"{name} has keys of {len(usual)} such networks, as {begins[0]} and {begins[1]}: leave out the others, "
            f"such as --ignore '{_file_prefix(usual[1], begins[1])}*'"
        )
    return usual[0]


def _file_prefix(prefix: str, key: str) -> str:
    """Return what the file's `key` begins with instead of `prefix`: wrappers may have added parts."""
    ends = (place + 1 for place, letter in enumerate(key) if letter == ".")
    return prefix if key.startswith(prefix) else next(key[:end] for end in ends if plain_key(key[:end]) == prefix)


def _common_prefix(keys: Mapping[str, str], layout: Layout, prefix: str) -> str:
    """Return what every key of the file begins with before the layout's own name."""
    for ours, theirs in keys.items():
        name = layout.theirs(ours)
        if theirs.endswith(name):
            head = theirs[: len(theirs) - len(name)]
            return head if all(key.startswith(head) for key in keys.values()) else prefix
    return prefix


def _said_of(left_out: Sequence[str]) -> tuple[str, ...]:
    if not left_out:
        return ()
    some = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")  # noqa: PLR2004
    return (f"left out {len(left_out)} keys that belong to no part of the network: {some}",)


def _checked(value: Any, key: str, name: str, *, integers: bool = False) -> Tensor:
    """Return `value` as dense float32 weights; counters stay integers, with `integers` others too.

    Raises:
        CheckpointError: it is not a dense, finite tensor that owns what it claims.
    """
    if isinstance(value, OddTensor):
        raise CheckpointError(f"{name}: {key} is not a dense tensor of real numbers (it is {value.kind})")
    if not isinstance(value, Tensor):
        kind = value.name if isinstance(value, Placeholder) else type(value).__name__
        remedy = f": leave it out with --ignore {key}" if isinstance(value, Mapping) else ""
        raise CheckpointError(f"{name}: {key} is a {kind}; expected a tensor{remedy}")
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
    trained = not integers or key.endswith(("weight", "bias", "running_mean", "running_var"))  # a mask may hold −∞
    if bad := int((~tensor.isfinite() if trained else tensor.isnan()).sum()):
        raise CheckpointError(f"{name}: {key} has {bad} values that are NaN or infinite: the training diverged")
    if key.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:  # 0: a channel that never fired
        raise CheckpointError(f"{name}: {key} has a variance of {float(tensor.min()):g}; variances cannot be negative")
    return tensor
