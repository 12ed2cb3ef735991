"""Files that a runtime gets in memory of its own, checked while they are read, and ahead of the runtime."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from repmlp_deploy.bundle import Bundle, describe_file, storage
from repmlp_deploy.errors import BundleError
from repmlp_deploy.runtime.runner import RUNNERS, Entry, RunnerOptions, open_named


@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_a_view_is_the_content_in_memory_that_can_be_written_to(
    bundle: Bundle, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing into it changes no file."""
    monkeypatch.setattr(storage, "_PIECE_BYTES", piece)
    entry = bundle.artifact("onnx")
    view = bundle.view(entry)
    assert bytes(view) == bundle.read(entry)
    view[:] = bytes(len(view))
    assert bundle.folder is not None
    assert describe_file(entry.path, (bundle.folder / entry.path).read_bytes()).sha256 == entry.sha256


def test_a_view_of_a_bundle_in_memory_is_its_bytes(bundle: Bundle) -> None:
    entry = bundle.artifact("onnx")
    held = replace(bundle, folder=None, contents={entry.path: bundle.read(entry)})
    assert held.view(entry) == held.contents[entry.path]


def _damage(bundle: Bundle, how: str) -> None:
    assert bundle.folder is not None
    path = bundle.folder / bundle.artifact("onnx").path
    data = path.read_bytes()
    changed = {"a bit": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b"x", "empty": b""}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["a bit", "shorter", "longer", "empty", "gone"])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_changed_after_the_bundle_was_opened_is_refused(bundle_folder: Path, how: str, ahead: bool) -> None:
    bundle = Bundle.load(bundle_folder)
    _damage(bundle, how)
    entry = bundle.artifact("onnx")
    said = "No such file" if how == "gone" else "was changed: its sha256 is not the manifest's"
    with bundle.reading_ahead([entry] if ahead else []) as lent, pytest.raises(BundleError, match=said):
        lent.view(entry)


def test_files_are_read_while_the_runtime_is_imported_and_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime opens them after the thread has their digest."""
    read: list[str] = []
    begun = threading.Event()
    plain = storage._read_checked

    def watched(path: object, entry: object) -> memoryview:
        read.append(threading.current_thread().name)
        begun.set()
        return plain(path, entry)  # type: ignore[arg-type]

    class Opened:
        def __init__(self, given: Bundle, _: RunnerOptions) -> None:
            assert begun.wait(20)  # by the thread, before anybody asks for it
            self.content = bytes(given.view(given.artifact("onnx")))

    monkeypatch.setattr(storage, "_read_checked", watched)
    monkeypatch.setattr(f"{__name__}.OPENED", Opened, raising=False)
    monkeypatch.setitem(RUNNERS, "onnx", Entry(f"{__name__}:OPENED", ("cpu",)))
    opened = open_named(bundle, "onnx", RunnerOptions())
    assert opened.content == bundle.read(bundle.artifact("onnx"))  # type: ignore[attr-defined]
    assert len(read) == 1
    assert read[0].startswith("read-ahead")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "sha256"))]


def test_with_a_cache_nothing_is_read_ahead(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A runtime that finds its model there needs no file."""

    class Opened:
        def __init__(self, given: Bundle, _: RunnerOptions) -> None:
            assert not given.ahead

    monkeypatch.setattr(f"{__name__}.OPENED", Opened, raising=False)
    monkeypatch.setitem(RUNNERS, "onnx", Entry(f"{__name__}:OPENED", ("cpu",)))
    open_named(bundle, "onnx", RunnerOptions(cache=tmp_path))  # type: ignore[arg-type]


def test_a_runtime_never_sees_a_changed_file(bundle_folder: Path) -> None:
    bundle = Bundle.load(bundle_folder)
    _damage(bundle, "a bit")
    with pytest.raises(BundleError, match="was changed"):
        open_named(bundle, "onnx", RunnerOptions(threads=1))
