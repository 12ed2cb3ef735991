"""Blaming: the first place where a network made from the trained one computes something else.

Both networks keep the module names of the trained one outside what was replaced, so their module trees are walked
together while the trained network runs in float64: every module of the other is given exactly what the trained one
was given there, and runs beside it. Errors cannot propagate, so the first module that differs, the innermost first,
is where the fault is. Inside a block whose parts were merged or folded away, `suspects` names the part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.convert.diagnosis.places import describe_place, place_of
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.block_types import block_of
from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.blocks.checks import Check, Element, Finding, first_finding, parameter_checks
from repmlp_deploy.nets.blocks.conv_bn import ChannelAffine
from repmlp_deploy.nets.flat import cloned, flatten_outputs, map_tensors
from repmlp_deploy.nets.foreign import adopt_blocks
from repmlp_deploy.numerics import allowed_error, compare, noise_floor
from repmlp_deploy.text import first_line, kind_and_line

__all__ = ["Blame", "blame_network", "blamed", "describe_blame"]

_MODES_MATTER = (BatchNorm, nn.modules.dropout._DropoutNd)  # noqa: SLF001 - torch's names for all of a kind


@dataclass(frozen=True)
class Blame:
    """The first place that differs.

    Attributes:
        block: module name of the block, `stages.2.5`; empty for the network as a whole.
        part: of the block, `fc3 · branch repconv3`; empty where the block has none.
        fault: what went wrong, where that is known.
        error: largest absolute error of the place's output, given the trained network's own inputs; None where
            it was not run.
        floor: the noise floor of that output.
        element: the stored number that is furthest off; None where numbers are not to blame.
    """

    block: str
    part: str = ""
    fault: str = ""
    error: float | None = None
    floor: float | None = None
    element: Element | None = None

    @property
    def place(self) -> str:
        """Block and part."""
        return describe_place(self.block, self.part)

    def __str__(self) -> str:
        off = ""
        if self.error is not None and self.floor:
            off = f"off by {self.error:.2e}, {self.error / self.floor:.3g} times its noise floor"
        said = "; ".join(text for text in (self.fault, str(self.element or ""), off) if text)
        return f"first at {self.place}: {said}" if said else f"first at {self.place}"


@contextmanager
def blamed(find: Callable[[], Blame | None]) -> Iterator[None]:
    """Add the blame to the message of a VerificationError that is raised inside."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"{error}; {describe_blame(find)}") from error


def describe_blame(find: Callable[[], Blame | None]) -> str:
    """Describe what `find` found. An error of the search itself must not replace the one that started it."""
    try:
        blame = find()
    except Exception as error:  # noqa: BLE001 - whatever stops the search, the failure it explains is what matters
        return f"the place could not be found: {kind_and_line(error)}"
    return "no single place differs: the error is spread over many" if blame is None else str(blame)


@torch.no_grad()
def blame_network(trained: nn.Module, candidate: nn.Module, inputs: Sequence[NDArray[Any]]) -> Blame | None:
    """Return the first place where `candidate` differs from `trained`; None if no single place does.

    Args:
        trained: with its branches, evaluation mode, float32.
        candidate: made from it; module names are the trained network's outside what was replaced.
        inputs: of the trained network, (n, …) each.
    """
    for name, module in candidate.named_modules():
        if module.training and isinstance(module, _MODES_MATTER):
            block, part = place_of(name)
            return Blame(block, part, f"{type(module).__name__} is left in training mode")
    walk = _Walk(trained, candidate)
    precise = copy.deepcopy(trained).double()
    handles = walk.attach(precise)
    try:
        precise(*(torch.from_numpy(np.ascontiguousarray(x)).to(_wide(x)) for x in inputs))
    except _FoundError as found:
        return found.blame
    finally:
        for handle in handles:
            handle.remove()
    return None


class _FoundError(Exception):
    """Ends a walk."""

    def __init__(self, blame: Blame) -> None:
        super().__init__(str(blame))
        self.blame = blame


def _wide(x: NDArray[Any]) -> torch.dtype:
    kind: torch.dtype = torch.from_numpy(np.zeros(1, x.dtype)).dtype
    return torch.float64 if kind.is_floating_point else kind


@dataclass(frozen=True)
class _Outcome:
    """What a module answered and how far off it is; where that cannot be told, why."""

    got: Any
    error: float | None
    floor: float | None
    said: str = ""


class _Walk:
    """Two networks side by side: `trained` runs, `candidate` gets the same inputs."""

    def __init__(self, trained: nn.Module, candidate: nn.Module) -> None:
        self._trained = dict(trained.named_modules())
        self._stored = dict(candidate.named_modules())
        self._candidate = dict(copy.deepcopy(candidate).double().named_modules())
        self._adopted = adopt_blocks(trained, confirm=False)
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def attach(self, precise: nn.Module) -> list[Any]:
        """Attach hooks to the modules of `precise` that have a counterpart; the innermost run first."""
        handles = []
        for name, module in precise.named_modules():
            if self._is_compared(name):
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        return handles

    def _is_compared(self, name: str) -> bool:
        """Return whether a module has a counterpart, and is not inside one that was replaced as a whole."""
        if name not in self._candidate or isinstance(self._trained[name], nn.ModuleList | nn.ModuleDict):
            return False
        pieces = name.split(".") if name else []
        owners = [".".join(pieces[:i]) for i in range(len(pieces))]
        if name:
            owner, made = block_of(self._trained.get(owners[-1])), self._stored.get(owners[-1])
            if owner is not None and made is not None and pieces[-1] in owner.judged_together(made):
                return False
        return not any(self._is_whole(owner) for owner in owners)

    def _is_whole(self, name: str) -> bool:
        """Return whether a module can only be judged as a whole, as its children have no counterparts."""
        trained, other = self._trained.get(name), self._stored.get(name)
        if trained is None or other is None:
            return True
        block = block_of(trained)
        return type(other) is not type(trained) or (block is not None and block.mergeable)

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given.append((cloned(args), cloned(kwargs)))

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, answer: Any) -> None:
            args, kwargs = self._given.pop()
            outcome = self._outcome(name, args, kwargs, answer)
            if outcome is not None:
                raise _FoundError(self._blame(name, args, outcome))

        return hook

    def _outcome(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> _Outcome | None:
        """Return the wrong output of the counterpart; None if it is right."""
        try:
            got = self._candidate[name](*cloned(args), **cloned(kwargs))
            pairs = list(zip(_arrays(got), _arrays(answer), strict=True))
        except (RuntimeError, ValueError, TypeError) as failure:
            return _Outcome(None, None, None, f"does not run: {first_line(failure)}")
        single = self._trained[name](*_narrow(args), **_narrow(kwargs))
        for (y, reference), float32 in zip(pairs, _arrays(single), strict=True):
            floor = noise_floor(float32, reference)
            try:
                error = compare(y, reference, classes=False).max_abs
            except VerificationError as failure:
                return _Outcome(got, None, floor, str(failure))
            if not error <= allowed_error("fp32", floor):
                return _Outcome(got, error, floor)
        return None

    def _blame(self, name: str, args: tuple[Any, ...], outcome: _Outcome) -> Blame:
        block, part = place_of(name)
        found = self._finding(name, args, outcome)
        words = " · ".join(word for word in (part, found.part) if word)
        return Blame(block, words, found.fault, outcome.error, outcome.floor, found.element)

    def _finding(self, name: str, args: tuple[Any, ...], outcome: _Outcome) -> Finding:
        """Return the part of one module that is wrong."""
        stored, trained = self._stored[name], self._trained[name]
        if trained in self._adopted:
            trained = self._adopted[trained]
        block = block_of(trained)
        geometry = None if block is None else block.wrong_geometry(stored)
        if geometry is not None:
            return geometry
        found = first_finding(_checks(trained, stored))
        if found is not None:
            return found
        if outcome.error is None:
            return Finding("", outcome.said)
        known = None if block is None or not args else block.wrong_forward(stored, args[0], outcome.got)
        if known is not None:
            return known
        inner = "its parts are right, what it does with them is not" if list(stored.children()) else ""
        return Finding("forward" if inner else "", inner or "computes something else")


def _checks(trained: nn.Module, stored: nn.Module) -> Iterator[Check]:
    """Yield the checks of a module that was merged or folded, or of one that should be unchanged."""
    block = block_of(trained)
    if block is not None:
        yield from block.checks(stored)
    elif isinstance(stored, ChannelAffine) and isinstance(trained, BatchNorm):
        yield from stored.checks(trained)
    else:
        yield from parameter_checks(trained, stored, "")


def _narrow(value: Any) -> Any:
    """Convert float64 tensors to float32, and copy the others."""
    return map_tensors(value, lambda x: x.float() if x.is_floating_point() else x.clone())


def _arrays(answer: Any) -> list[NDArray[Any]]:
    return [value.detach().numpy() for value in flatten_outputs(answer).values()]
