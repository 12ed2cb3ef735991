"""Draw the badges of README.md from what pyproject.toml says, so that they are true without a network.

python tools/badges.py           # write docs/images/badge-*.svg
python tools/badges.py --check   # fail if one is not what would be written
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "images"
MARKER = ROOT / "repmlp_deploy" / "py.typed"

BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{what}: {says}">
<title>{what}: {says}</title>
<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{split}" height="20" fill="#444c56"/>\
<rect x="{split}" width="{rest}" height="20" fill="#1a6fb5"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{first}" y="14" textLength="{what_long}">{what}</text>
<text x="{second}" y="14" textLength="{says_long}">{says}</text>
</g>
</svg>
"""


def badges() -> dict[str, str]:
    """Return the name of every badge's file with its text."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    start = "Programming Language :: Python :: 3."
    versions = [f"3.{one.removeprefix(start)}" for one in project["classifiers"] if one.startswith(start)]
    typed = "Typing :: Typed" in project["classifiers"] and MARKER.is_file()
    return {
        "badge-python.svg": _drawn("Python", " | ".join(versions)),
        "badge-license.svg": _drawn("license", project["license"]),
        "badge-types.svg": _drawn("types", "checked by mypy --strict" if typed else "none"),
    }


def _drawn(what: str, says: str) -> str:
    """Return a badge: two fields, each as wide as its text."""
    what_long, says_long = round(6.6 * len(what)), round(6.2 * len(says))
    split, rest = what_long + 12, says_long + 12
    return BADGE.format(
        what=what,
        says=says,
        width=split + rest,
        split=split,
        rest=rest,
        first=split / 2,
        second=split + rest / 2,
        what_long=what_long,
        says_long=says_long,
    )


def main() -> None:
    """Write the badges, or compare them."""
    for name, text in badges().items():
        path = FOLDER / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what pyproject.toml says: python tools/badges.py")


if __name__ == "__main__":
    main()
