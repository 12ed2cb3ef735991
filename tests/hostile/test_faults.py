"""Disks that are full, consoles that are closed or of another encoding, interruptions, two exports to one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hostile.case import Kit
from repmlp_deploy import Bundle
from repmlp_deploy.bench.report.tables import to_csv, to_markdown
from repmlp_deploy.cli import bench as bench_cli
from repmlp_deploy.errors import RepMLPError
from support.bench_reports import make_report
from support.warm_process import ROOT, WarmProcess

EXPORT = ("export", "--format", "onnx,openvino,checkpoint", "--ckpt")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def old(kit: Kit, tmp_path: Path) -> Path:
    """A bundle of this test alone, in a folder with nothing else."""
    (tmp_path / "place").mkdir()
    return kit.copy_bundle(tmp_path / "place")


@pytest.mark.parametrize("room", [5_000, 400_000])
def test_a_disk_that_fills_at_any_file_loses_nothing(room: int, kit: Kit, old: Path, warm: WarmProcess) -> None:
    before = content(old)
    ended = warm.run(*EXPORT, kit.checkpoint, "--out", old, folder=old.parent, file_bytes=room)
    assert ended.code == 5, ended.err
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.err
    assert content(old) == before
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_a_card_that_cannot_be_written_leaves_no_part(kit: Kit, warm: WarmProcess, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    ended = warm.run(
        "inspect", kit.checkpoint, "--write-card", card, folder=tmp_path, file_bytes=200, out=Path("/dev/null")
    )
    assert ended.code == 5, ended.err
    assert not card.exists()


def test_a_full_disk_behind_the_report_is_an_error(kit: Kit, warm: WarmProcess, tmp_path: Path) -> None:
    ended = warm.run("inspect", kit.bundle, folder=tmp_path, out=Path("/dev/full"))
    assert ended.code == 5, ended.err
    assert ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_a_console_of_any_encoding_ends_no_export(encoding: str, kit: Kit, old: Path, warm: WarmProcess) -> None:
    out = old.parent / "r\u00e9sum\u00e9-\u91cd\u307f"
    words = ("export", "--format", "checkpoint", "--ckpt", kit.checkpoint, "--out", out)
    ended = warm.run(*words, folder=old.parent, environment={"PYTHONIOENCODING": encoding})
    assert ended.code == 0, ended.err
    assert Bundle.load(out)


def test_a_reader_that_leaves_ends_nothing(kit: Kit, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m repmlp_deploy inspect "{kit.bundle}" | head -1; echo ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_while_libraries_are_imported(number: int, code: int, kit: Kit, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "export.py", "--ckpt", kit.checkpoint]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "... loading PyTorch\n"
        time.sleep(number / 40)
        process.send_signal(number)
        said = process.stderr.read().splitlines()
    assert process.returncode == code, said
    assert [line for line in said if not line.startswith("... ")] == [said[-1]]
    assert said[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_while_the_command_itself_is_imported(number: int, code: int, kit: Kit, tmp_path: Path) -> None:
    """The signal comes from the first package that the command imports, before it shows anything."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "typer.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(30)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    command = [sys.executable, ROOT / "export.py", "--ckpt", kit.checkpoint]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


MOMENTS = 50


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(kit: Kit, old: Path, warm: WarmProcess, tmp_path: Path) -> None:
    """SIGKILL at 50 moments of an export, half of them while it is being saved; the next run cleans up."""
    place, temporary = old.parent, tmp_path / "tmp"
    temporary.mkdir()
    words = ("export", "--format", "checkpoint", "--batch", "2", "--ckpt", kit.checkpoint, "--out", old)
    options = {"folder": place, "environment": {"TMPDIR": str(temporary)}}
    begun = time.monotonic()
    assert warm.run(*words, **options).code == 0
    whole = time.monotonic() - begun
    names = set(content(old))
    outcomes = {"killed": 0, "done": 0}
    for moment in range(MOMENTS):
        share = moment / (MOMENTS // 2) if moment < MOMENTS // 2 else 0.85 + 0.3 * (moment / MOMENTS - 0.5)
        begun = time.monotonic()
        ended = warm.run(*words, **options, kill_after=max(0.01, share * whole))
        outcomes["done" if ended.code == 0 else "killed"] += 1
        if ended.code == 0:  # the machine was busier at first
            whole = min(whole, time.monotonic() - begun)
        bundle = Bundle.load(old)
        assert set(content(old)) == names
        for entry in bundle.files():
            bundle.read(entry)  # checks the digest
    assert outcomes["killed"] >= MOMENTS // 3, outcomes
    assert warm.run(*words, **options).code == 0
    assert [path.name for path in place.iterdir()] == [old.name]
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


def _settings(folder: Path, name: str) -> dict[str, str]:
    """Return an environment whose home is `name`: missing, a file, or a folder that nothing can be written to."""
    home = folder / name
    if name == "a-file":
        home.write_text("")
    if name == "full":
        home = Path("/proc/self")  # nobody, root neither, can make a file there
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "REPMLP_CACHE": str(home / "cache")}


@pytest.mark.parametrize("name", ["missing", "a-file", "full"])
def test_no_home_is_needed(name: str, kit: Kit, warm: WarmProcess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", "--format", "onnx,openvino", "--batch", "2", "--ckpt", kit.checkpoint, "--out", out)
    environment = _settings(tmp_path, name)
    ended = warm.run(*words, folder=tmp_path, environment=environment)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert Bundle.load(out)
    ended = warm.run("predict", out, kit.image, folder=tmp_path, environment=environment)
    assert ended.code == 0, ended.err


def test_a_cache_on_a_full_disk_costs_time_alone(kit: Kit, warm: WarmProcess, tmp_path: Path) -> None:
    """What a runtime compiles cannot be kept; the prediction is given all the same, or the cache is refused by name."""
    cache = tmp_path / "cache"
    words = ("predict", kit.bundle, kit.image, "--format", "openvino", "--cache", cache)
    ended = warm.run(*words, folder=tmp_path, file_bytes=20_000)
    assert ended.code in (0, 5), ended.err
    assert "Traceback" not in ended.err
    again = warm.run(*words, folder=tmp_path)
    assert again.code == 0, again.err
    assert again.out == warm.run(*words[:-2], folder=tmp_path).out


def test_an_evaluation_on_a_full_disk_ends_in_one_line(kit: Kit, warm: WarmProcess, tmp_path: Path) -> None:
    for label in ("0", "1"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(3):
            shutil.copy(kit.image, tmp_path / "data" / label / f"{i}.png")
    words = [
        "repmlp",
        "eval",
        str(kit.bundle),
        "--data",
        str(tmp_path / "data"),
        "--state",
        str(tmp_path / "state.json"),
    ]
    script = f"""
import sys
from repmlp_deploy.cli.shared import entry
from repmlp_deploy.evaluation import loop

loop._SAVE_SECONDS = 0  # else it is saved every few seconds
sys.stderr = sys.stdout  # which is no file here
sys.argv = {words}
entry.main()
"""
    ended = warm.run(script=script, folder=tmp_path, file_bytes=50, out=Path("/dev/null"))
    assert ended.code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert warm.run(script=script, folder=tmp_path).code == 0


def test_writers_of_one_folder_leave_one_whole_bundle(kit: Kit, tmp_path: Path) -> None:
    """Two kinds of bundles, with different files: each save is whole, or is refused; readers see one or the other."""
    loaded = Bundle.load(kit.bundle)
    contents = {entry.path: loaded.read(entry) for entry in loaded.files()}
    graph = loaded.manifest.artifacts["onnx"]
    fewer = loaded.manifest.model_copy(update={"name": "fewer", "artifacts": {"onnx": graph}})
    names = {graph.path, loaded.manifest.probe.path}
    drafts = [
        Bundle(loaded.manifest, contents=contents),
        Bundle(fewer, contents={name: data for name, data in contents.items() if name in names}),
    ]
    target, faults = tmp_path / "place" / "bundle", []

    def save(draft: Bundle) -> None:
        for _ in range(20):
            try:
                draft.save(target)
            except RepMLPError:
                pass
            except BaseException as error:  # noqa: BLE001 - whatever else it is, it is a fault
                faults.append(error)

    writers = [threading.Thread(target=save, args=(draft,)) for draft in drafts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not faults
    drafts[0].save(target)
    drafts[1].save(target)
    bundle = Bundle.load(target)
    assert [bundle.read(entry) for entry in bundle.files()]
    assert bundle.manifest.name == "fewer"
    assert {path.name for path in target.iterdir()} == {*names, "manifest.json"}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_first_of_two_writers_does_not_stop_the_second(kit: Kit, tmp_path: Path) -> None:
    """Where the folder comes into being between the look and the rename, the two are exchanged."""
    from repmlp_deploy import files

    partial, target = tmp_path / "partial", tmp_path / "target"
    shutil.copytree(kit.bundle, partial)
    shutil.copytree(kit.bundle, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_dir", lambda path: path != target and os.path.isdir(path))  # noqa: PTH112
        files.take_place(partial, target)
    assert Bundle.load(target)
    assert Bundle.load(partial), "what was there is handed back"


def test_reports_of_a_benchmark_escape_what_they_quote(tmp_path: Path) -> None:
    report = make_report()
    odd = report.rows[0].model_copy(update={"model": "\x1b[31m\u202enet", "reason": "\x9b2J"})
    report = report.model_copy(update={"rows": (odd, *report.rows[1:])})
    for name, text in (("x.csv", to_csv(report)), ("x.md", to_markdown(report)), ("x.json", report.to_json())):
        bench_cli._write(tmp_path / name, text)
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert "net" in written
        assert not {"\x1b", "\u202e", "\x9b"} & set(written)
        assert [path.name for path in tmp_path.glob(".*")] == []
