"""Build the documentation site into site/, without network; a broken link or any other warning fails the build.

.venv/bin/python tools/build_site.py

README.md is the home page, and some more files from outside docs/ are pages. Every file has its links as the repository
needs them, relative to the file. On the site a link to another page leads to that page, and a link to a source file
becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import error_messages

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build" / "site-source"
SITE = ROOT / "site"
RESULTS = "benchmarks/results"
REPORTS = "benchmarks/reports.md"
MESSAGES = "reference/messages.md"

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/method.md",
    "examples/README.md": "examples.md",
}
"""File of the repository to the page that it is, beside those in docs/."""

NAVIGATION = {
    "Start": ("quickstart", "examples"),
    "Tutorials": (
        "tutorials/own-checkpoint",
        "tutorials/head-and-labels",
        "tutorials/int8",
        "tutorials/service",
        "tutorials/custom-network",
        "other-families",
        "tutorials/many-images",
    ),
    "How it works": (
        "how-it-works/index",
        "how-it-works/merging",
        "how-it-works/regions",
        "how-it-works/folding",
        "proof",
    ),
    "Reference": (
        "reference/commands",
        "reference/export",
        "reference/python",
        "reference/bundle",
        "reference/errors",
        "reference/messages",
        "reference/models",
    ),
    "Running it": ("serving", "servers", "tensorrt", "past-one-machine"),
    "Benchmarks": ("benchmarks", "benchmarks/method", "benchmarks/reports"),
    "Help": ("faq",),
    "Project": ("contributing", "security", "conduct", "changelog"),
}
"""Title of a part to its pages; a page that no part names is a warning."""

HOSTS = ("arxiv.org", "docs.sigstore.dev", "github.com", "keepachangelog.com")
"""Where links may lead; a host that is not here is new or misspelt. Without network no link is followed."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(?:```+|~~~+)", re.MULTILINE)


class BrokenLinkError(Exception):
    """A link to a file that does not exist, or to an address that nobody knows."""


def reports() -> list[str]:
    """Return the reports of benchmarks, the newest first."""
    return sorted((path.relative_to(ROOT).as_posix() for path in (ROOT / RESULTS).glob("*.md")), reverse=True)


def pages() -> dict[str, str]:
    """Return every file that is a page of the site, with the page that it becomes."""
    inside = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return PAGES | {path: path for path in reports()} | {path: path.removeprefix("docs/") for path in inside}


def translated(target: str, path: str) -> str | None:
    """Return where a link leads on the site, or None if its file is in the repository alone.

    Args:
        target: the link, as the file has it.
        path: the file, from the root of the repository.

    Raises:
        BrokenLinkError: the file that it names does not exist, or its address is not of `HOSTS`.
    """
    address, mark, anchor = target.partition("#")
    if not address:
        return target
    if re.match(r"[a-z]+:", address):
        if not re.fullmatch(rf"https://(?:{'|'.join(map(re.escape, HOSTS))})(?:/[\w./-]*[\w/])?", address):
            raise BrokenLinkError(
                f"{path} links to {target}; links begin with https:// and a host of HOSTS in tools/build_site.py"
            )
        return target
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(path), address))
    where = pages().get(meant) or (meant.removeprefix("docs/") if meant.startswith("docs/") else None)
    if not (ROOT / meant).exists():
        raise BrokenLinkError(f"{path} links to {target}, which does not exist")
    if where is None:
        return None
    return posixpath.relpath(where, posixpath.dirname(pages()[path]) or ".") + mark + anchor


def with_links(text: str, path: str) -> str:
    """Return a page's text with its links as the site has them; code stays as it is."""

    def link(found: re.Match[str]) -> str:
        target = translated(found[3], path)
        return found[2] if target is None else f"{found[1]}[{found[2]}]({target})"

    return "".join(part if is_code else _LINK.sub(link, part) for is_code, part in _split_code(text))


def _split_code(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the text in pieces, each with whether it is a fenced block."""
    inside, start = False, 0
    for found in _FENCE.finditer(text):
        yield inside, text[start : found.start()]
        inside, start = not inside, found.start()
    yield inside, text[start:]


def home(text: str) -> str:
    """Return the home page: README.md, and the tree of all pages, which the side bar shows."""
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *parts, "```"])
        for title, parts in NAVIGATION.items()
    ]
    return "\n\n".join([text, *trees, ""])


def report_list() -> str:
    """Return the page that lists the reports."""
    head = "# Reports\n\nEach is of one run, as `repmlp-bench` or a script in `benchmarks/` wrote it."
    names = [posixpath.relpath(path, "benchmarks") for path in reports()]
    links = [f"- [{Path(name).stem}]({name})" for name in names]
    tree = ["```{toctree}", ":hidden:", "", *(name.removesuffix(".md") for name in names), "```"]
    return "\n".join([head, "", *links, "", *tree, ""])


def stage() -> None:
    """Write all pages to a folder that holds nothing else."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGED, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    for path, page in pages().items():
        text = with_links((ROOT / path).read_text(encoding="utf-8"), path)
        place = STAGED / page
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(home(text) if page == "index.md" else text, encoding="utf-8")
    (STAGED / REPORTS).write_text(report_list(), encoding="utf-8")
    (STAGED / MESSAGES).write_text(error_messages.page(), encoding="utf-8")


def main() -> int:
    """Gather the pages and build the site."""
    from sphinx.cmd.build import build_main  # noqa: PLC0415 - the links can be checked without it

    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    code = build_main(
        ["-b", "html", "-W", "--keep-going", "-q", "-d", str(STAGED.parent / "doctrees"), str(STAGED), str(SITE)]
    )
    if code == 0:
        print(f"open {SITE / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
