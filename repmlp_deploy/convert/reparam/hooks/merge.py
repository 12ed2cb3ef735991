"""Merging by hooks: outermost first, each call compared, and the whole network after the last.

A hook changes its module in place, or returns the module that takes its place. It is refused, by name and with the
reason, if what its module computes changes, if it fails, or if it leaves its module's BatchNorms as they were. It may
leave them if modules inside have hooks of their own, or if it merges another module of its class: a block may have no
branches. A module that never runs, such as an auxiliary head of training, is in no exported graph: its hook is not
called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.reparam.hooks.comparing import (
    Call,
    dropped_norm,
    fault_of,
    first_fault,
    is_same,
    lost_child,
    outputs_of,
    record_calls,
)
from repmlp_deploy.convert.reparam.hooks.table import HOOKS, Hook, find_hook
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.flat import Flat
from repmlp_deploy.nets.surgery import in_double
from repmlp_deploy.text import kind_and_line

__all__ = ["describe_hooks", "merge_by_function", "merge_by_hooks"]

_SEED = 20210505
_REMEDY = "repair it, or merge by structure with --merge auto"


@torch.no_grad()
def merge_by_hooks(trained: nn.Module, examples: Sequence[Tensor]) -> nn.Module:
    """Return a copy of `trained`, in its type, on which every hook has been called; `trained` is unchanged.

    Args:
        trained: in evaluation mode, float32 or float64.
        examples: a tensor (n, …) for every input, by position; floating-point inputs are drawn in their shape.

    Raises:
        InputError: no module has a hook.
        VerificationError: a hook is wrong; the message names the module, the hook and the fault.
    """
    hooked = {module for module in trained.modules() if find_hook(module) is not None}
    if not hooked:
        raise InputError(
            f"{_class_of(trained)} has no module with {', '.join(HOOKS[:-1])} or {HOOKS[-1]}: use --merge auto, or "
            "name what merges it, --merge PACKAGE:FUNCTION"
        )
    inputs = _inputs(examples)
    with _in_float64():
        before, root = in_double(trained), _Root(in_double(trained))
        wanted = {module for module in before.modules() if find_hook(module) is not None}
        calls = record_calls(before, wanted, inputs)
        originals = dict(before.named_modules())
        idle, busy = dict[type[nn.Module], str](), set[type[nn.Module]]()
        for name, module, hook in root.hooked():
            if name in calls:
                nothing_done = _call(name, module, hook, root, originals.get(name), calls.pop(name))
                if nothing_done:
                    idle.setdefault(type(module), nothing_done)
                else:
                    busy.add(type(module))
        for kind, called in idle.items():
            if kind not in busy:  # elsewhere the hook does its work: here is nothing for it
                _refuse(
                    called, "does nothing: the module has the same parts and numbers as before, BatchNorms among them"
                )
        after = root.module.eval()
        _require_equal(before, after, "the network after its last hook", inputs)
    return _as(after, trained)


@torch.no_grad()
def merge_by_function(
    trained: nn.Module,
    function: Callable[[nn.Module], object],
    examples: Sequence[Tensor],
    *,
    called: str,
) -> nn.Module:
    """Return what `function` makes of a copy of `trained`, in its type; `trained` is unchanged.

    Args:
        trained: in evaluation mode, float32 or float64.
        function: takes the network; changes it in place, or returns another one.
        examples: see `merge_by_hooks`.
        called: its name in messages.

    Raises:
        VerificationError: it fails, does nothing, or its result computes something else; the first module is named.
    """
    with _in_float64():
        before, given = in_double(trained), in_double(trained)
        inner = given.module if isinstance(given, Flat) else given
        try:
            with captured_output():
                answer = function(inner)
        except Exception as error:  # noqa: BLE001 - another package's code raises anything
            _refuse(called, f"fails: {kind_and_line(error)}")
        made = _taken(answer, inner, called)
        if isinstance(given, Flat):
            given.module = made
            made = given
        made.eval()
        if is_same(before, made):
            _refuse(called, "does nothing: the network has the same parts and numbers as before")
        _require_equal(before, made, called, _inputs(examples))
    return _as(made, trained)


def describe_hooks(before: nn.Module, after: nn.Module) -> str:
    """Return in one line what hooks left of a network's BatchNorms and convolutions."""
    kinds = {"BatchNorms": BatchNorm, "convolutions": nn.Conv2d | nn.Conv1d | nn.Conv3d}
    counts = [f"{name} {_count(before, kind)} -> {_count(after, kind)}" for name, kind in kinds.items()]
    return f"merged by the network's own hooks: {', '.join(counts)}"


def _count(network: nn.Module, kind: object) -> int:
    return sum(isinstance(module, kind) for module in network.modules())  # type: ignore[arg-type]


class _Root:
    """A network whose modules, and which itself, may be replaced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def hooked(self) -> Iterator[tuple[str, nn.Module, tuple[str, Hook]]]:
        """Yield name, module and hook of every module that has one, the outermost first, as they are at that time."""
        waiting, seen = [""], set[nn.Module]()
        while waiting:
            name = waiting.pop(0)
            module = self._at(name)
            if module is None or module in seen:
                continue
            seen.add(module)
            hook = find_hook(module)
            if hook is not None:
                yield name, module, hook
            children = [] if (now := self._at(name)) is None else now.named_children()
            waiting += [f"{name}.{child}" if name else child for child, _ in children]

    def _at(self, name: str) -> nn.Module | None:
        """Return the module of this name, if there is one now."""
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            return None

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` is."""
        if old is self.module:
            self.module = new
        for module in list(self.module.modules()):
            for child, part in list(module._modules.items()):  # noqa: SLF001 - named_children() lists a module once
                if part is old:
                    setattr(module, child, new)


def _call(  # noqa: PLR0913 - the values that meet here
    name: str,
    module: nn.Module,
    hook: tuple[str, Hook],
    root: _Root,
    original: nn.Module | None,
    calls: Sequence[Call],
) -> str:
    """Call one hook and compare; return what to call it if it does nothing about the module's BatchNorms.

    Raises:
        VerificationError: it is wrong.
    """
    shown = name.removeprefix("module.") if isinstance(root.module, Flat) else name
    called = f"{hook[0]}() of {shown or 'the network'} ({_class_of(module)})"
    expected = outputs_of(module, calls)
    try:
        with captured_output():
            answer = hook[1]()
    except Exception as error:  # noqa: BLE001 - another package's code raises anything
        _refuse(called, f"fails: {kind_and_line(error)}")
    made = _taken(answer, module, called).eval()
    if original is not None and is_same(original, made):
        leaves_it = any(part is not made and find_hook(part) for part in made.modules())  # to the hooks inside
        return called if not leaves_it and any(isinstance(part, BatchNorm) for part in made.modules()) else ""
    fault = fault_of(made, calls, expected)
    if fault:
        _refuse(called, _explained(fault, original, made))
    if made is not module:
        root.replace(module, made)
    return ""


def _taken(answer: object, given: nn.Module, called: str) -> nn.Module:
    """Return the module that a hook made; `given`, which it changed in place, if it returns nothing."""
    if answer is None:
        return given
    if not isinstance(answer, nn.Module):
        _refuse(called, f"returns a {type(answer).__name__}; expected a module, or nothing if it works in place")
    return answer


def _require_equal(before: nn.Module, after: nn.Module, called: str, inputs: Sequence[Tensor]) -> None:
    """Raise VerificationError unless both networks compute the same; name the first module that does not."""
    calls = [Call(tuple(inputs), {})]
    fault = fault_of(after, calls, outputs_of(before, calls))
    if not fault:
        return
    first = first_fault(before, after, calls)
    if first is None:
        _refuse(called, _explained(fault, before, after))
    name, said = first
    parts, now = dict(before.named_modules()), dict(after.named_modules())
    place = name.removeprefix("module.") if isinstance(before, Flat) else name
    where = f"{place or 'the network'} ({_class_of(parts[name])})"
    _refuse(called, f"is wrong first at {where}, which {_explained(said, parts[name], now[name], itself=place)}")


def _explained(fault: str, before: nn.Module | None, after: nn.Module, *, itself: str = "") -> str:
    """Return the fault with its cause, where that can be seen: a BatchNorm that was dropped, a child that is None."""
    if before is None:
        return fault
    norm, child = dropped_norm(before, after), lost_child(before, after)
    if norm is not None:
        return f"{fault}; its BatchNorm {norm or itself} became an Identity"
    return fault if child is None else f"{fault}; its child {child} is None now"


def _refuse(called: str, fault: str) -> NoReturn:
    raise VerificationError(f"{called} {fault}: {_REMEDY}")


def _inputs(examples: Sequence[Tensor]) -> list[Tensor]:
    """Return one sample for every input; what is floating-point is drawn, as an example may be all zeros."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        torch.randn(example[:1].shape, dtype=torch.float64, generator=generator)
        if example.is_floating_point()
        else example[:1]
        for example in examples
    ]


@contextmanager
def _in_float64() -> Iterator[None]:
    """Make float64 the type of new layers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _as(made: nn.Module, trained: nn.Module) -> nn.Module:
    """Return `made` in the type of `trained`, rounded once."""
    kind = next((p.dtype for p in trained.parameters() if p.is_floating_point()), torch.float32)
    return made.to(kind).eval().requires_grad_(requires_grad=False)


def _class_of(module: nn.Module) -> str:
    return type(module.module if isinstance(module, Flat) else module).__name__
