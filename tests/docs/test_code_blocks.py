"""Every block of code in README.md and docs/ runs, and prints what the document says."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import safetensors.torch
import torch

from support.documents import Block, blocks, faults, matches, run_block, served, steps, with_free_ports
from support.warm_process import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name / "README.md" for name in ("benchmarks", "examples")),
    )
    if path.name != "CHANGELOG.md"
)
RUNNING = [
    name
    for name in DOCUMENTS
    if name != "README.md" and any(block.runs for block in blocks((ROOT / name).read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, digits_checkpoint: Path) -> Path:
    """A folder with what the documents call a reader's own: `x.pth`, its bundle, and folders of images.

    The README makes the bundle: its blocks run here, as a user's shell runs them.
    """
    folder = tmp_path_factory.mktemp("reader")
    for name in ("models", "examples", "benchmarks", "tools", "export.py"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    do_what_it_says("README.md", folder, tmp_path_factory.mktemp("home"))
    shutil.copytree(folder / "artifacts" / "digits", folder / "artifacts" / "x")
    state = safetensors.torch.load_file(digits_checkpoint)
    torch.save({"state_dict": state}, folder / "x.pth")
    _write_digits(folder)
    shutil.copy(ROOT / "models" / "samples" / "digits" / "7-0081.png", folder / "cat.jpg")
    card = (ROOT / "models" / "repmlp-digits.toml").read_text(encoding="utf-8")
    (folder / "digits.toml").write_text(card.split("[weights]")[0], encoding="utf-8")
    return folder


def do_what_it_says(name: str, folder: Path, home: Path, warm: WarmProcess | None = None) -> None:
    """Run the blocks of a document in a folder, and fail where one does not do what the document says."""
    environment = {
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",  # two threads that wait for each other cost more than they bring
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support' / 'torchvision_standin'}",
        "REPMLP_CACHE": str(home / "cache"),
    }
    text = with_free_ports((ROOT / name).read_text(encoding="utf-8"))
    with ExitStack() as servers:
        for block in blocks(text):
            if block.runs and block.serves:
                servers.enter_context(served(block, folder, environment))
            elif block.runs:
                run_block(block, folder, environment, warm)


def _write_digits(folder: Path) -> None:
    """Write 96 training scans into `images/` and `photos/`, and 40 others by class into `labelled/`."""
    from train_digits import digit_images, split_indices

    images, labels = digit_images()
    train, held_out = split_indices(labels)
    for name, indices in (("images", train[:96]), ("photos", train[:8])):
        (folder / name).mkdir()
        for index in indices:
            images[index].save(folder / name / f"{index}.png")
    for index in held_out[:40]:
        place = folder / "labelled" / str(labels[index])
        place.mkdir(parents=True, exist_ok=True)
        images[index].save(place / f"{index}.png")


def test_the_readme_does_what_it_says(checkout: Path) -> None:
    assert (checkout / "artifacts" / "digits" / "manifest.json").is_file()


@pytest.mark.parametrize("name", RUNNING)
def test_a_document_does_what_it_says(name: str, checkout: Path, warm: WarmProcess, tmp_path: Path) -> None:
    """Plain commands and Python run in a warm process, everything else as in the README."""
    folder = tmp_path / "reader"
    shutil.copytree(checkout, folder, symlinks=True)
    do_what_it_says(name, folder, tmp_path, warm)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_block_escapes_a_test_without_a_reason(name: str) -> None:
    assert list(faults((ROOT / name).read_text(encoding="utf-8"))) == []


def test_a_block_that_prints_something_else_is_noticed(tmp_path: Path) -> None:
    text = "```bash\necho one; echo two\n```\n\nIt prints:\n\n```text\none\n…\n```\n"
    (block,) = blocks(text)
    assert (block.line, block.printed) == (1, "one\n…\n")
    run_block(block, tmp_path, {})
    for code, printed in (("echo three", "one\n…\n"), ("false", None), ("false; echo one", "one\n")):
        with pytest.raises(AssertionError):
            run_block(Block(1, "bash", code, "", printed), tmp_path, {})
    with pytest.raises(AssertionError, match="ended with 3"):
        run_block(Block(1, "python", "raise SystemExit(3)", "ends with: 2"), tmp_path, {})
    run_block(Block(1, "python", "import sys; sys.exit('no')", "ends with: 1", "no"), tmp_path, {})


def test_commands_that_need_no_shell() -> None:
    def found(code: str) -> list[str | list[str]]:
        return list(steps(Block(1, "bash", code, ""), warm=True))

    assert found("repmlp-verify a --ckpt x.pth  # again\n") == [["verify", "a", "--ckpt", "x.pth"]]
    assert found("python -c 'a; b' c\n") == [["python", "-c", "a; b", "c"]]
    assert found("cd a\npython examples/x.py\n") == ["cd a", ["python", "examples/x.py"]]
    for code in ("repmlp-verify a | cat\n", "repmlp-verify $A\n", "repmlp-serve a\n", "python -m pytest\n", "x > y\n"):
        assert found(code) == [code]


def test_marks_and_text() -> None:
    assert matches("a … c", "a b\nb c\n")
    assert not matches("a", "a b")
    assert not matches("a.c", "abc")
    assert list(faults("<!-- not run: I am lazy -->\n```bash\ntrue\n```\n"))
    assert list(faults("```\nrepmlp-export\n```\n"))
    assert list(faults("    repmlp-export --ckpt x.pth\n"))
    assert not list(faults("<!-- not run: needs a GPU -->\n```bash\ntrue\n```\n"))
