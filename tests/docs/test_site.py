"""The documentation site builds with one command, loads nothing from elsewhere, and fits a screen and a phone."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import build_site
import command_reference
import error_messages
import repmlp_deploy

pytest.importorskip("furo", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` builds it, from a copy of what is in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "benchmarks", "examples", "tools", "repmlp_deploy", "models", "tests/mutants"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    done = subprocess.run(
        [sys.executable, "tools/build_site.py"], cwd=copy, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "site"


class Loaded(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "img", "iframe", "source"} and given.get("src"):
            self.addresses.append(str(given["src"]))
        if tag == "link" and given.get("rel") in {"stylesheet", "icon", "preload", "preconnect"}:
            self.addresses.append(str(given["href"]))


def test_every_file_of_the_documentation_is_a_page(site: Path) -> None:
    for page in build_site.pages().values():
        assert (site / page).with_suffix(".html").is_file(), page


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        addresses = Loaded(page.read_text(encoding="utf-8")).addresses
        assert addresses
        assert not [address for address in addresses if re.match(r"(https?:)?//", address)], page


def test_the_python_page_has_every_public_name(site: Path) -> None:
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    missing = [name for name in repmlp_deploy.__all__ if f'id="repmlp_deploy.{name}"' not in text]
    assert missing == ["__version__"]


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


LOOK = """<!doctype html><title>no answer</title><body><script>
const pages = PAGES, found = [];
(async () => {
  for (const page of pages) {
    const frame = document.createElement('iframe');
    frame.style.width = 'WIDTHpx'; frame.style.height = '800px'; frame.style.border = 0; frame.src = page;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    const root = frame.contentDocument.documentElement;
    const pictures = [...frame.contentDocument.querySelectorAll('article img')];
    const lost = pictures.filter(one => !one.complete || one.naturalWidth === 0).length;
    if (root.scrollWidth > WIDTH || lost) found.push([page, root.scrollWidth, lost]);
    frame.remove();
  }
  document.title = JSON.stringify(found);
})();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to look at the pages with")
@pytest.mark.parametrize("width", [1280, 400], ids=["desktop", "phone"])
def test_a_browser_shows_every_page_without_sideways_scrolling(
    width: int, site: Path, address: str, tmp_path: Path
) -> None:
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    look = LOOK.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
    (site / f"look-{width}.html").write_text(look, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width + 100},900"]
    command += ["--virtual-time-budget=60000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, f"{address}/look-{width}.html"], capture_output=True, text=True, check=False, timeout=300
    )
    (site / f"look-{width}.html").unlink()
    assert "<title>[]</title>" in done.stdout, re.findall("<title>.*?</title>", done.stdout)


@pytest.mark.parametrize(
    ("target", "path", "leads_to"),
    [
        ("docs/proof.md", "README.md", "proof.md"),
        ("CONTRIBUTING.md", "README.md", "contributing.md"),
        ("../proof.md#the-proof", "docs/tutorials/int8.md", "../proof.md#the-proof"),
        ("../benchmarks/README.md", "docs/benchmarks.md", "benchmarks/method.md"),
        ("results/2026-11-25-repmlpnet-b224.md", "benchmarks/README.md", "results/2026-11-25-repmlpnet-b224.md"),
        ("../repmlp_deploy/precision.py", "docs/proof.md", None),
        ("#install", "README.md", "#install"),
        ("https://arxiv.org", "README.md", "https://arxiv.org"),
    ],
)
def test_links_lead_to_pages(target: str, path: str, leads_to: str | None) -> None:
    assert build_site.translated(target, path) == leads_to


def test_a_link_to_a_missing_file_is_an_error() -> None:
    with pytest.raises(build_site.BrokenLinkError, match=r"README\.md links to docs/none\.md, which does not exist"):
        build_site.translated("docs/none.md", "README.md")


@pytest.mark.parametrize(
    "target",
    [
        "http://arxiv.org/abs/1",
        "https://arxiv.og/abs/1",
        "https://arxiv.org/abs/1,",
        "https://arxiv.org//x y",
        "mail:x",
    ],
)
def test_an_address_that_nobody_knows_is_an_error(target: str) -> None:
    with pytest.raises(build_site.BrokenLinkError, match=r"README\.md links to .*HOSTS"):
        build_site.translated(target, "README.md")


def test_every_known_host_is_linked_to_and_no_address_is_written_in_two_ways() -> None:
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in build_site.pages()]
    links = {found for text in texts for found in re.findall(r"\]\((https://[^()\s]+)\)", text)}
    assert {link.split("/")[2] for link in links} == set(build_site.HOSTS)
    assert len({link.lower().rstrip("/").removesuffix(".html").replace("//www.", "//") for link in links}) == len(links)


def test_links_in_code_stay_as_they_are() -> None:
    text = "[a](docs/proof.md)\n```text\n[a](docs/proof.md)\n```\n[b](export.py)\n"
    assert build_site.with_links(text, "README.md") == "[a](proof.md)\n```text\n[a](docs/proof.md)\n```\nb\n"


def test_every_error_message_has_an_anchor(site: Path) -> None:
    text = (site / "reference" / "messages.html").read_text(encoding="utf-8")
    found = list(error_messages.messages())
    assert len(found) > 200
    missing = [message for _, message in found if f'id="{error_messages.anchor_of(message)}"' not in text]
    assert missing == []
    assert "needs calibration images: pass --calibration" in text
    assert "--calibration" in text, "two dashes stay two dashes"


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    assert command_reference.PAGE.read_text(encoding="utf-8") == command_reference.page()
