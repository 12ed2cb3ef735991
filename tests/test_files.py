"""Files are replaced whole or not at all, and caches have one folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from repmlp_deploy.card import read_labels
from repmlp_deploy.convert.formats.tensorrt.timing_cache import default_timing_cache
from repmlp_deploy.evaluation.loop import state_folder
from repmlp_deploy.evaluation.remote import RemoteStore
from repmlp_deploy.files import cache_folder, read_json, read_text, read_toml, replace_file, write_named


def test_a_reader_sees_the_old_content_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    replace_file(path, b"ne", b"w", durable=True)
    assert path.read_bytes() == b"new"

    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_what_a_user_names_stays_a_pipe_or_a_link(tmp_path: Path) -> None:
    """`--engine-report /dev/stdout`: as root, a rename would put a file in the place of the device."""
    pipe, link, target = (tmp_path / name for name in ("pipe", "link", "target"))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_named(pipe, b"said")
    assert os.read(reader, 10) == b"said"
    os.close(reader)
    assert pipe.is_fifo()
    link.symlink_to(target)
    for content in (b"new", b"newer"):
        write_named(link, content)
        assert (link.is_symlink(), target.read_bytes()) == (True, content)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("list", "a.png 1\ncat\n"), ("json", '{"a": 1}'), ("toml", "a = 1")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_text(tmp_path / "list", 100) == "a.png 1\ncat\n"
    assert read_json(tmp_path / "json", 100) == read_toml(tmp_path / "toml", 100) == {"a": 1}
    assert read_labels(tmp_path / "list") == ("a.png 1", "cat")
    store, path = RemoteStore.of((tmp_path / "list").as_uri())
    assert store.text(path, 100) == "a.png 1\ncat\n"


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_text(tmp_path / "none", 100)
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_text(tmp_path, 100)


def test_every_cache_follows_one_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPMLP_CACHE", str(tmp_path / "ours"))
    assert cache_folder("a", "b") == tmp_path / "ours" / "a" / "b"
    assert state_folder().is_relative_to(tmp_path / "ours")
    assert default_timing_cache("tensorrt", "11.4", "8.6").parent == tmp_path / "ours"
    monkeypatch.delenv("REPMLP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "repmlp-deploy"
    assert default_timing_cache("tensorrt", "11.4", "8.6").name == "tensorrt-11.4-sm86.timing"


def test_only_one_module_renames_or_locks() -> None:
    """The one exception is the probe of a folder's rights, which renames nothing."""
    package = Path(__file__).resolve().parents[1] / "repmlp_deploy"
    renaming = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(word in line for word in ("os.replace(", "os.rename(", ".rename(", "fcntl.flock", "partial.replace("))
    }
    assert renaming == {"files.py"}
