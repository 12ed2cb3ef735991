"""Folders are read whole or not at all, links and all, and a fault of a disk is not one of a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from repmlp_deploy import reading
from repmlp_deploy.errors import InputError
from repmlp_deploy.reading import files_below, is_folder, is_hidden, opened, require_file, state_of


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in files_below(folder))


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    for name in ("in/a", "in/b/c", "in/.hidden/d", "elsewhere/e", "elsewhere/more/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b" / "itself").symlink_to("itself")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    inside = ["again/f", "b/c", "b/itself", "gone", "link/e", "link/more/f"]
    assert names(tmp_path / "in") == sorted(["a", *inside])


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(place: str) -> object:
        if place.endswith("closed"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        names(tmp_path)


def test_links_from_folder_to_folder_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six folders that all link to each other have 1,957 paths, twelve a billion."""
    monkeypatch.setattr(reading, "_MOST_FOLDERS", 500)
    folders = [tmp_path / f"{i}" for i in range(6)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    with pytest.raises(InputError, match="has more than 500 folders, links followed; name a part of it"):
        names(tmp_path)


def test_a_name_that_windows_does_not_take_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The star of a glob is none of a file's name there."""

    def refused(_path: Path) -> os.stat_result:
        error = OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect")
        error.winerror = 123  # Windows alone has it
        raise error

    monkeypatch.setattr(Path, "stat", refused)
    assert state_of(tmp_path / "*.png", "--data") is None


def test_what_is_hidden() -> None:
    assert [is_hidden(name) for name in (".a", "b/.c/d", "lost+found", "./b", "../b", "b/c.d")] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_a_disk_that_fails_is_tried_again_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"content")
    waits: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if len(waits) < 2:
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert opened(tmp_path / "x", 100).read() == b"content"
    assert waits == [0.2, 0.4]
    with opened(tmp_path / "x", 6) as large:  # whoever needs it all reads it
        assert large.read(3) == b"con"
    monkeypatch.setattr(Path, "read_bytes", lambda _path: os.read(-1, 1))
    with pytest.raises(InputError, match=r"x could not be read 4 times: .*; run again to go on"):
        opened(tmp_path / "x", 100)
    assert waits == [0.2, 0.4, 0.2, 0.4, 0.8]


@pytest.mark.parametrize("name", ["gone", "file/below", "x" * 300, "loop"])
def test_a_name_that_no_file_has_is_a_missing_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert state_of(tmp_path / name, name) is None
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / name, 100)


def test_what_this_user_may_not_see_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(InputError, match=r"^--data x cannot be read: Permission denied$"):
        state_of(tmp_path, "--data x")
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        opened(tmp_path / "x", 100)


def test_files_and_folders_are_told_apart_whatever_the_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    os.mkfifo(tmp_path / "pipe")
    assert [is_folder(path, path) for path in (tmp_path, file, tmp_path / "none", Path("n" * 300))] == [
        True,
        False,
        False,
        False,
    ]
    require_file(file, "--ckpt")
    for path, said in ((tmp_path, "is not a regular file"), (tmp_path / "pipe", "is not a regular file")):
        with pytest.raises(InputError, match=f"--ckpt {said}"):
            require_file(path, "--ckpt")
    with pytest.raises(InputError, match="--ckpt: no such file"):
        require_file(Path("n" * 300), "--ckpt")
