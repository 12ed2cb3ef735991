"""The page of all error messages, read from the sources: each has an anchor, and says its exit code.

tools/build_site.py makes the page, so it is never out of date.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

from repmlp_deploy import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "repmlp_deploy"

LEAST_LETTERS = 11  # a text with fewer is made of values alone

HEAD = """# Error messages

Every error that a command or the package raises with a text of its own, by exit code. `…` stands for what the message
names: a file, a value, what was expected. Search this page for a few words of your message. [Questions and
troubleshooting](../faq.md) explains the errors that people meet most, and [exit codes and errors](errors.md) the
exceptions.
"""


def messages() -> Iterator[tuple[str, str]]:
    """Yield the exception and the text of every `raise` of an error of this package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                text = _template(node.exc.args[0])
                if name in errors.__all__ and len(re.findall(r"\w", text)) >= LEAST_LETTERS:
                    yield name, text


def _template(node: ast.expr) -> str:
    """Return the text of an expression, with `…` for every value in it; empty if it has no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return re.sub("…(…)+", "…", "".join(map(str, parts)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return ""


def anchor_of(text: str) -> str:
    """Return the name of a message's anchor: its first ten words."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower())[:10])


def page() -> str:
    """Return the whole page."""
    by_code: dict[int, dict[str, str]] = {}
    for name, text in messages():
        by_code.setdefault(getattr(errors, name).exit_code, {})[text] = name
    lines = [HEAD]
    seen: set[str] = set()
    for code, found in sorted(by_code.items()):
        lines += [f"## Exit code {code}", ""]
        for text, name in sorted(found.items(), key=lambda one: one[0].lstrip("… ").lower()):
            anchor = anchor_of(text)
            mark = "" if anchor in seen else f'<a id="{anchor}"></a>'
            seen.add(anchor)
            lines.append(f"- {mark}<code>{html.escape(' '.join(text.split()), quote=False)}</code> ({name})")
        lines.append("")
    return "\n".join(lines)
