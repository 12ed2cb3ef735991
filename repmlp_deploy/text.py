"""Make text from files, libraries and users safe to print.

A name, a label, a path or an exception text may hold escape sequences, characters that reverse the writing direction,
or a megabyte. `printable` shows such characters as escapes and shortens the rest; every way out uses it.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["LONGEST", "escape_document", "escape_unsafe", "first_fault", "first_line", "kind_and_line", "printable"]

LONGEST = 2_000
"""Characters of one piece of text that are shown; a full path and a reason fit."""

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1 control characters
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible and bidirectional
    "\U000e0000-\U000e0fff"  # tags and variation selectors
    "\ud800-\udfff]"  # lone surrogates, which no encoding can write
)


def printable(text: object, limit: int = LONGEST) -> str:
    """Return the text as one line of at most `limit` characters, without control or direction characters."""
    said = str(text)
    if len(said) > limit:
        said = f"{said[:limit]}… ({len(said):,} characters)"
    return escape_unsafe(" ".join(said.split()))


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_line(error: BaseException) -> str:
    """Return an exception's kind and the first line of its text, as `KeyError: 'a'`."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def first_fault(error: Any) -> tuple[str, str]:
    """Return where the first fault in a ValidationError of pydantic is, as `network.depth.0`, and what it is."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"]


def escape_unsafe(text: str) -> str:
    r"""Return the text with every unsafe character as `\uNNNN`, the escapes of JSON."""
    return _UNSAFE.sub(lambda found: _escaped(found.group()), text)


def escape_document(text: str) -> str:
    """Return the text of a file with its line ends, and every other unsafe character as an escape."""
    return "\n".join(map(escape_unsafe, text.split("\n")))


def _escaped(character: str) -> str:
    code = ord(character)
    if code <= 0xFFFF:  # noqa: PLR2004 - the end of the basic plane
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
