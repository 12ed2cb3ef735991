"""Compare modules before and after a hook, on the inputs that reach them in the trained network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.flat import Flat, cloned, flatten_outputs
from repmlp_deploy.text import kind_and_line

__all__ = ["Call", "dropped_norm", "fault_of", "first_fault", "is_same", "lost_child", "outputs_of", "record_calls"]

CLOSE = 1e-9
"""Of the largest output, in float64: a right merge leaves 1e-15, one that rounds to float32 on the way 1e-7."""


@dataclass(frozen=True)
class Call:
    """What a module was given, once."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def record_calls(network: nn.Module, wanted: Collection[nn.Module], inputs: Sequence[Tensor]) -> dict[str, list[Call]]:
    """Run `network`, and return for each of the `wanted` modules that was run, by name, what it was given."""
    names = {module: name for name, module in network.named_modules() if module in wanted}
    calls: dict[str, list[Call]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(names[module], []).append(Call(cloned(args), cloned(kwargs)))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in names]
    try:
        network(*cloned(tuple(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def outputs_of(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """Return every tensor that a module returns for the calls."""
    answers = (module(*cloned(call.args), **cloned(dict(call.kwargs))) for call in calls)
    return [value for answer in answers for value in flatten_outputs(answer).values()]


def fault_of(module: nn.Module, calls: Sequence[Call], expected: Sequence[Tensor]) -> str:
    """Return what is wrong with a module's outputs; empty if they are what is expected."""
    try:
        got = outputs_of(module, calls)
    except Exception as error:  # noqa: BLE001 - a broken module raises anything
        return f"does not run any more: {kind_and_line(error)}"
    if [value.shape for value in got] != [value.shape for value in expected]:
        return "returns tensors of other shapes"
    for value, reference in zip(got, expected, strict=True):
        if value.dtype != reference.dtype:
            return f"returns {value.dtype}; expected {reference.dtype}"
        if not value.numel():
            continue
        off, size = float((value - reference).abs().max()), float(reference.abs().max())
        if not off <= CLOSE * max(size, torch.finfo(torch.float64).tiny):
            return f"computes something else: off by {off:.2e} where outputs reach {size:.2e}"
    return ""


def first_fault(before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> tuple[str, str] | None:
    """Return name and fault of the first module that differs, the innermost first, each given its own right inputs.

    Args:
        before: runs; its modules' inputs go to the modules of the same name in `after`.
        after: made from it.
        calls: of `before`.
    """
    made = dict(after.named_modules())
    given: list[Call] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(Call(cloned(args), cloned(kwargs)))

    def leave(name: str, answer: Any) -> None:
        call = given.pop()
        fault = fault_of(made[name], [call], list(flatten_outputs(answer).values()))
        if fault:
            raise _FoundError(name, fault)

    handles = []
    for name, module in before.named_modules():
        if name in made and not isinstance(module, nn.ModuleList | nn.ModuleDict | Flat):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda _m, _a, answer, name=name: leave(name, answer)))
    try:
        outputs_of(before, calls)
    except _FoundError as found:
        return found.name, found.fault
    finally:
        for handle in handles:
            handle.remove()
    return None


class _FoundError(Exception):
    """Ends a walk."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(name)
        self.name, self.fault = name, fault


def is_same(before: nn.Module, after: nn.Module) -> bool:
    """Return whether a module has the same parts and the same numbers as before."""
    parts, now = dict(before.named_modules()), dict(after.named_modules())
    if parts.keys() != now.keys() or any(type(parts[name]) is not type(now[name]) for name in parts):
        return False
    state, then = after.state_dict(), before.state_dict()
    return state.keys() == then.keys() and all(torch.equal(state[key], then[key]) for key in state)


def dropped_norm(before: nn.Module, after: nn.Module) -> str | None:
    """Return the name of the first BatchNorm in whose place there is an Identity now."""
    now = dict(after.named_modules())
    names = (name for name, module in before.named_modules() if isinstance(module, BatchNorm))
    return next((name for name in names if isinstance(now.get(name), nn.Identity)), None)


def lost_child(before: nn.Module, after: nn.Module) -> str | None:
    """Return the name of the first child, at any depth, in whose place there is None now."""
    parts = dict(before.named_modules())
    for name, module in after.named_modules():
        for child, value in module._modules.items():  # noqa: SLF001 - children that are None are listed nowhere else
            full = f"{name}.{child}" if name else child
            if value is None and full in parts:
                return full
    return None
