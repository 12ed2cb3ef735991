"""Places: what a block and its parts are called in messages, read from the dotted name of a module or a weight."""

from __future__ import annotations

import re

__all__ = ["describe_place", "place_of"]

_CONTAINERS = re.compile(r"\d+|module|backbone|stages?\d*|units|embeds|layers|blocks")
_WORDS = {
    "repmlp_block": "",
    "repmlp": "",
    "conv": "",
    "gp": "global perceptron",
    "fc1_fc2": "global perceptron",
    "scale": "prebn1 fold",
    "offset": "prebn1 fold",
    "ffn.0": "ffn_fc1",
    "ffn.1": "ffn",
    "ffn.2": "ffn_fc2",
}
"""What a module inside a block is called here, where that is not its own name."""


def place_of(name: str) -> tuple[str, str]:
    """Return block and part of a module or parameter of this dotted name: `stages.2.5.gp.fc1` is the block's global perceptron."""  # noqa: E501
    pieces = [piece for piece in name.split(".") if piece]
    taken = 0
    while taken < len(pieces) and _CONTAINERS.fullmatch(pieces[taken]):
        taken += 1
    if not any(piece.isdigit() for piece in pieces[:taken]):
        taken += 1
        while taken < len(pieces) and pieces[taken].isdigit():
            taken += 1
    inside = ".".join(pieces[taken:])
    for theirs, ours in _WORDS.items():
        inside = re.sub(rf"^{re.escape(theirs)}(?=\.|$)", ours, inside).lstrip(".")
    part = inside if " " in inside and "." not in inside else " · ".join(word for word in inside.split(".") if word)
    block = ".".join(piece for piece in pieces[:taken] if piece != "module")
    return block, part


def describe_place(block: str, part: str) -> str:
    """Return `block · part`; `the network` where neither is known."""
    return " · ".join(word for word in (block, part) if word) or "the network"
