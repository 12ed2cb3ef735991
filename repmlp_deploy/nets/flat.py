"""A network called by position and answering with a tuple, whatever its own way is: what tracing and proving need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Flat", "flatten_outputs"]


class Flat(nn.Module):
    """`module` with its tensors in a row: inputs by position, outputs as a tuple in the order of `flatten_outputs`.

    Args:
        module: the network.
        keywords: what it calls its inputs, where they are passed by name; empty where they are passed by position.
    """

    def __init__(self, module: nn.Module, keywords: Sequence[str] = ()) -> None:
        super().__init__()
        self.module = module
        self.keywords = tuple(keywords)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.keywords, inputs, strict=True)) if self.keywords else {}
        answer = self.module(**named) if named else self.module(*inputs)
        return tuple(flatten_outputs(answer).values())


def flatten_outputs(answer: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in a network's output by name: keys and positions, joined by dots; None is left out.

    A single tensor is called `output`.

    Raises:
        TypeError: there is something else than tensors, dictionaries, sequences and None.
    """
    if isinstance(answer, Tensor):
        return {name or "output": answer}
    if answer is None:
        return {}
    if isinstance(answer, Mapping):
        parts = [(str(key), value) for key, value in answer.items()]
    elif isinstance(answer, Sequence) and not isinstance(answer, str | bytes):
        parts = [(str(i) if name else f"output_{i}", value) for i, value in enumerate(answer)]
    else:
        raise TypeError(f"output {name or 'of the network'} is a {type(answer).__name__}; expected tensors")
    found: dict[str, Tensor] = {}
    for key, value in parts:
        found |= flatten_outputs(value, f"{name}.{key}" if name else key)
    return found
