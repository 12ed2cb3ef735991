import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, files
from repmlp_deploy.bundle import MANIFEST, PROBE, Probe, check_output_folder
from repmlp_deploy.errors import BundleError, InputError, OutputError


def in_memory(folder: Path, *, name: str = "other") -> Bundle:
    """The bundle in `folder` as it is before saving, under another name."""
    loaded = Bundle.load(folder)
    contents = {entry.path: loaded.read(entry) for entry in loaded.files()}
    return Bundle(loaded.manifest.model_copy(update={"name": name}), contents=contents)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(folder: Path, change: object) -> None:
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_bundle_survives_the_disk(bundle_folder: Path, tmp_path: Path) -> None:
    draft = in_memory(bundle_folder)
    saved = draft.save(tmp_path / "a" / "b")
    assert saved.manifest == Bundle.load(tmp_path / "a" / "b").manifest == draft.manifest
    assert set(snapshot(tmp_path / "a" / "b")) == {*draft.contents, MANIFEST}
    assert names(tmp_path / "a") == ["b"]


def test_an_earlier_bundle_is_replaced_whole(bundle_folder: Path) -> None:
    draft = in_memory(bundle_folder)
    (bundle_folder / "model.onnx").write_bytes(b"old")
    draft.save(bundle_folder)
    assert Bundle.load(bundle_folder).manifest.name == "other"
    assert snapshot(bundle_folder)["model.onnx"] == draft.contents["model.onnx"]
    assert names(bundle_folder.parent) == [bundle_folder.name]


def test_without_an_atomic_exchange_two_renames_do(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path) -> None:
    monkeypatch.setattr(files, "_exchange", lambda _a, _b: False)
    in_memory(bundle_folder).save(bundle_folder)
    assert Bundle.load(bundle_folder).manifest.name == "other"
    assert names(bundle_folder.parent) == [bundle_folder.name]


def test_a_linked_bundle_is_replaced_where_it_lies(bundle_folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle_folder)
    in_memory(bundle_folder).save(link)
    assert link.is_symlink()
    assert Bundle.load(bundle_folder).manifest.name == "other"


def test_an_empty_folder_is_filled(bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    in_memory(bundle_folder).save(tmp_path / "empty")
    assert Bundle.load(tmp_path / "empty").manifest.name == "other"


def test_a_full_disk_leaves_the_old_bundle(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path) -> None:
    draft, before = in_memory(bundle_folder), snapshot(bundle_folder)
    real = files.write_new

    def full(path: Path, content: bytes) -> None:
        if path.name == PROBE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr("repmlp_deploy.bundle.storage.write_new", full)
    with pytest.raises(OutputError, match="No space left on device; what was there is untouched"):
        draft.save(bundle_folder)
    assert snapshot(bundle_folder) == before
    assert names(bundle_folder.parent) == [bundle_folder.name]


def test_files_folders_and_foreign_folders_are_not_overwritten(bundle_folder: Path, tmp_path: Path) -> None:
    draft = in_memory(bundle_folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        draft.save(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(cat.jpg\)"):
        draft.save(tmp_path / "photos")
    (bundle_folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt"):
        draft.save(bundle_folder)
    assert (bundle_folder / "notes.txt").read_text() == "mine"


def test_a_parent_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="could not write"):
        check_output_folder(tmp_path / "file" / "out")


def test_the_working_folder_and_those_around_it_are_no_place_for_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty --out is the working folder."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for out in (Path(), Path(".."), Path("/"), tmp_path / "inside"):
        with pytest.raises(InputError, match="is the working folder, or lies around it"):
            check_output_folder(out)
    check_output_folder(Path("new"))


def test_a_loop_of_links_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises((InputError, OutputError), match="could not write"):
        check_output_folder(tmp_path / "a" / "out")


@pytest.mark.parametrize(
    "manifest",
    [
        {"name": "an extension", "manifest_version": 3},
        {"artifacts": {"site": {"path": "index.html"}}, "probe": {"path": "probe.html"}},
        {"schema": 1, "artifacts": {"onnx": {"path": "index.html"}}, "probe": {"path": "probe.html"}},
    ],
)
def test_the_manifest_of_something_else_makes_no_bundle(tmp_path: Path, manifest: object) -> None:
    (tmp_path / "site").mkdir()
    for name in ("index.html", "probe.html"):
        (tmp_path / "site" / name).write_text("mine")
    (tmp_path / "site" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="holds other files"):
        check_output_folder(tmp_path / "site")


def test_a_folder_in_a_bundle_belongs_to_somebody_else(bundle_folder: Path) -> None:
    check_output_folder(bundle_folder)
    (bundle_folder / "photos").mkdir()
    with pytest.raises(InputError, match=r"holds other files \(photos\)"):
        check_output_folder(bundle_folder)
    (bundle_folder / "photos").rmdir()
    (bundle_folder / "model.onnx").unlink()
    (bundle_folder / "model.onnx").mkdir()
    with pytest.raises(InputError, match=r"holds other files \(model.onnx\)"):
        check_output_folder(bundle_folder)


def test_a_volume_is_written_into(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder itself is mounted, nothing can be exchanged: files get their names there, the manifest last."""
    volume = tmp_path / "volume"
    shutil.copytree(bundle_folder, volume)
    (volume / "lost+found").mkdir()
    (volume / ".model.onnx.999999999-0123abcd.part").write_text("left by a killed writer")
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume or ismount(path))
    inode, order = volume.stat().st_ino, []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append(Path(to).name) or replace(self, to))
    in_memory(bundle_folder).save(volume)
    assert Bundle.load(volume).manifest.name == "other"
    assert volume.stat().st_ino == inode
    assert order[-1] == MANIFEST
    assert names(volume) == sorted([*names(bundle_folder), "lost+found"])


def test_a_mount_that_shows_only_when_renaming_is_written_into(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount of the same disk looks like any folder until the kernel calls it busy."""

    def busy(*_: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("repmlp_deploy.bundle.storage.take_place", busy)
    in_memory(bundle_folder).save(bundle_folder)
    assert Bundle.load(bundle_folder).manifest.name == "other"
    assert names(bundle_folder.parent) == [bundle_folder.name]


def test_a_full_volume_keeps_the_old_bundle(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    draft, before = in_memory(bundle_folder), snapshot(bundle_folder)
    monkeypatch.setattr("repmlp_deploy.bundle.storage.can_be_replaced", lambda _: False)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputError, match="No space left on device; what was there is untouched"):
        draft.save(bundle_folder)
    assert snapshot(bundle_folder) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_real_volume_is_written_into(bundle_folder: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(volume)], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        in_memory(bundle_folder).save(volume)
        in_memory(bundle_folder).save(volume)
        assert Bundle.load(volume).manifest.name == "other"
    finally:
        subprocess.run(["umount", str(volume)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="could not write"):
        check_output_folder(tmp_path / "locked" / "out")


def test_a_file_system_that_takes_no_files_is_refused_to_root_too() -> None:
    with pytest.raises(OutputError, match=r"could not write /proc/out: .+ in /proc"):
        check_output_folder(Path("/proc/out"))


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_a_missing_and_a_shortened_file_are_noticed(bundle_folder: Path) -> None:
    bundle = Bundle.load(bundle_folder)
    path = bundle_folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed: its sha256"):
        Bundle.load(bundle_folder).read(bundle.artifact("onnx"))
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        Bundle.load(bundle_folder)
    path.unlink()
    with pytest.raises(BundleError, match=r"has no file model.onnx"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema=2), "has schema 2; this version reads 1"),
        (lambda d: d.pop("batch"), "batch: Field required"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["artifacts"]["onnx"].update(path="../../etc/passwd"), "path"),
        (lambda d: d["artifacts"]["onnx"].update(path="/etc/passwd"), "path"),
        (lambda d: d["artifacts"]["onnx"].update(sha256="abc"), "sha256"),
        (lambda d: d["input"].update(shape="all"), "shape"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(bundle_folder: Path, change: object, said: str) -> None:
    edit(bundle_folder, change)
    with pytest.raises(BundleError, match=said):
        Bundle.load(bundle_folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match="File name too long"):
        Bundle.load("n" * 300)
    (bundle_folder / MANIFEST).write_bytes(b"\xff\xfe{")
    with pytest.raises(BundleError, match="is not JSON"):
        Bundle.load(bundle_folder)
    (bundle_folder / MANIFEST).write_text("[1]")
    with pytest.raises(BundleError, match="has schema None"):
        Bundle.load(bundle_folder)


def test_files_may_be_links_as_in_the_cache_of_a_hub(bundle_folder: Path, tmp_path: Path) -> None:
    """Whatever a link leads to, only content with the manifest's digest is read."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in names(bundle_folder):
        (bundle_folder / name).rename(blobs / name)
        (bundle_folder / name).symlink_to(blobs / name)
    bundle = Bundle.load(bundle_folder)
    for entry in bundle.files():
        bundle.read(entry)
    data = bytearray((blobs / "model.onnx").read_bytes())
    data[-1] ^= 1
    (blobs / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="was changed: its sha256"):
        bundle.read(bundle.artifact("onnx"))
    (blobs / "model.onnx").unlink()
    os.mkfifo(blobs / "model.onnx")
    with pytest.raises(BundleError, match=r"has no file model.onnx"):
        Bundle.load(bundle_folder)


def test_a_probe_that_is_none_is_refused() -> None:
    for data in (b"", b"nothing", b"PK\x03\x04"):
        with pytest.raises(BundleError, match="is not a probe"):
            Probe.from_bytes(data)


def test_a_probe_cycles_through_its_samples() -> None:
    probe = Probe(
        np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1), np.arange(3.0).reshape(3, 1), np.zeros((3, 1), np.float32)
    )
    inputs, reference = probe.batch(5)
    assert inputs.ravel().tolist() == reference.ravel().tolist() == [0, 1, 2, 0, 1]


WRITER = """
import sys
from repmlp_deploy import Bundle
folder = sys.argv[1]
old = Bundle.load(folder)
contents = {entry.path: old.read(entry) for entry in old.files()}
print("ready", flush=True)
for i in range(100_000):
    Bundle(old.manifest.model_copy(update={"name": f"n{i}"}), contents=contents).save(folder)
"""


@pytest.mark.slow
def test_killing_a_writer_at_any_moment_leaves_a_complete_bundle(bundle_folder: Path) -> None:
    """Fifty random moments; abandoned folders are removed by the next writer."""
    rng = random.Random(0)
    for _ in range(50):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(bundle_folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        bundle = Bundle.load(bundle_folder)
        for entry in bundle.files():
            bundle.read(entry)
    in_memory(bundle_folder).save(bundle_folder)
    assert names(bundle_folder.parent) == [bundle_folder.name]
