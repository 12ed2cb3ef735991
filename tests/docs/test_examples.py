"""Every example is short and runs from a checkout."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from repmlp_deploy import Bundle
from support.documents import python_script
from support.serving import running_server
from support.warm_process import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RUN_BY_THE_LIST = re.findall(
    r"^python examples/(\S+)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
)
DIGITS = ROOT / "models" / "samples" / "digits"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place like a checkout, where artifacts may be written."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    return tmp_path


def said(warm: WarmProcess, name: str, folder: Path, *arguments: object, path: str = "") -> str:
    """What an example prints, with a folder of modules beside the installed ones."""
    script = python_script([str(EXAMPLES / name), *map(str, arguments)])
    ended = warm.run(folder=folder, script=script, environment={"HOME": str(folder), "PYTHONPATH": path})
    assert ended.code == 0, ended.err
    return ended.out


def test_every_example_is_short_is_listed_and_says_how_to_start_it() -> None:
    listed = re.findall(r"^\| \[(\S+?)\]", (EXAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted([*SCRIPTS, "tour.ipynb"])
    for name in SCRIPTS:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert text.count("\n") <= 60, name
        assert f"python examples/{name}" in text.split('"""')[1], name
        assert f'"{name}"' in Path(__file__).read_text(encoding="utf-8") or name in RUN_BY_THE_LIST


def test_own_network(warm: WarmProcess, folder: Path) -> None:
    found = re.fullmatch(r"largest difference: (\S+)\n", said(warm, "own_network.py", folder))
    assert found
    assert float(found[1]) < 1e-5


def test_timm_network(warm: WarmProcess, folder: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the extra timm is not installed")
    standin = str(ROOT / "tests" / "support" / "torchvision_standin")
    out = said(warm, "timm_network.py", folder, "test_byobnet", path=standin)
    assert "BatchNorms" in out
    found = re.search(r"largest difference: (\S+) of", out)
    assert found
    assert float(found[1]) < 1e-5


def test_batch_job(warm: WarmProcess, folder: Path, bundle: Bundle) -> None:
    images = folder / "images"
    images.mkdir()
    for path in sorted(DIGITS.glob("*.png")):
        (images / path.name).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"no image")
    assert said(warm, "batch_job.py", folder, bundle.folder, images, "out.csv") == "11 images, 1 unreadable\n"
    rows = [line.split(",") for line in (folder / "out.csv").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["image", "class", "error"]
    assert [row[1] for row in rows[1:11]] == [str(digit) for digit in range(10)]
    assert rows[11][0] == "broken.png"
    assert rows[11][2]


def test_service_client(warm: WarmProcess, folder: Path, bundle: Bundle) -> None:
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with running_server(bundle.folder) as server:
        server.wait_for_log("model ready")
        answer = said(warm, "service_client.py", folder, server.http, "repmlp-digits", DIGITS / "7-0081.png")
    assert answer.splitlines()[0] == "repmlp-digits-image takes image"
    assert answer.splitlines()[1].startswith("class 7, score 0.9")


NOTEBOOK = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        shell.run_cell("".join(cell["source"])).raise_error()
"""


def test_tour(warm: WarmProcess, folder: Path) -> None:
    """The cells run one after the other in IPython, which is what a notebook's kernel runs them in."""
    pytest.importorskip("IPython", reason="the extra dev is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    script = python_script(["-c", NOTEBOOK, str(EXAMPLES / "tour.ipynb")])
    ended = warm.run(folder=folder, script=script, environment={"HOME": str(folder)})
    assert ended.code == 0, ended.err
    assert "['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']" in ended.out
