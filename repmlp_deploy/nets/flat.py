"""A network called by position and answering with a tuple, whatever its own way is: what tracing and proving need.

Where a network fails, `failing_module` says which of its modules was running.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Flat", "cloned", "failing_module", "flatten_outputs", "map_tensors"]


class Flat(nn.Module):
    """`module` with its tensors in a row: inputs by position, outputs as a tuple in the order of `flatten_outputs`.

    Args:
        module: the network.
        keywords: what it calls its inputs, where they are passed by name; empty where they are passed by position.
        copies: whether it gets copies of its inputs, as it writes into them.
    """

    def __init__(self, module: nn.Module, keywords: Sequence[str] = (), *, copies: bool = False) -> None:
        super().__init__()
        self.module = module
        self.keywords = tuple(keywords)
        self.copies = copies

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(x.clone() for x in inputs) if self.copies else inputs
        named = dict(zip(self.keywords, inputs, strict=True)) if self.keywords else {}
        answer = self.module(**named) if named else self.module(*inputs)
        return tuple(flatten_outputs(answer).values())


def flatten_outputs(answer: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in a network's output by name: keys, fields and positions, joined by dots; None is left out.

    A single tensor is called `output`.

    Raises:
        TypeError: there is something else than tensors, dictionaries, sequences and None, or two have one name.
    """
    if isinstance(answer, Tensor):
        return {name or "output": answer}
    if answer is None:
        return {}
    if isinstance(answer, Mapping):
        parts = [(str(key), value) for key, value in answer.items()]
    elif isinstance(answer, Sequence) and not isinstance(answer, str | bytes):
        fields = getattr(answer, "_fields", None)  # of a named tuple
        names = fields or [str(i) if name else f"output_{i}" for i in range(len(answer))]
        parts = list(zip(names, answer, strict=True))
    else:
        raise TypeError(f"output {name or 'of the network'} is a {type(answer).__name__}; expected tensors")
    found: dict[str, Tensor] = {}
    for key, value in parts:
        inside = flatten_outputs(value, f"{name}.{key}" if name else key)
        twice = next((part for part in inside if part in found), None)
        if twice is not None:
            raise TypeError(f"two outputs are called {twice}: rename one")
        found |= inside
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor in it changed: in tuples, named tuples, lists and dictionaries, at any depth."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, each in value.items():
            made[key] = map_tensors(each, change)
        return made
    if not isinstance(value, tuple | list):
        return value
    parts = [map_tensors(each, change) for each in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def cloned(value: Any) -> Any:
    """Copy the tensors in a value: modules may change their inputs in place."""
    return map_tensors(value, Tensor.clone)


def failing_module(network: nn.Module, run: Callable[[], object]) -> str:
    """Run again what failed, and return the innermost module that is entered and never left, as `name (Class)`.

    Args:
        network: whose modules are watched.
        run: what failed; its error is dropped.

    Returns:
        `the network` if the failure is in no module of it.
    """
    entered: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any) -> None:
            entered.append(f"{name} ({type(module).__name__})")

        return hook

    def leave(_module: nn.Module, _args: Any, _answer: Any) -> None:
        entered.pop()

    handles = []
    for name, module in network.named_modules():
        if name and not (isinstance(network, Flat) and name == "module"):
            shown = name.removeprefix("module.") if isinstance(network, Flat) else name
            handles.append(module.register_forward_pre_hook(enter(shown)))
            handles.append(module.register_forward_hook(leave))
    try:
        run()
    except Exception:  # noqa: BLE001 - the caller has it already
        return entered[-1] if entered else "the network"
    finally:
        for handle in handles:
            handle.remove()
    return "the network"
