"""Several processes: `evaluation.process_engine`, `evaluation.process_worker`. One is killed, then the first one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.errors import DeviceError, InputError, OutputError
from repmlp_deploy.evaluation import mapping, process_engine
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.process_engine import Processes
from repmlp_deploy.evaluation.sources import Source, open_source
from repmlp_deploy.reading import DiskError, tried
from train_digits import digit_images

COUNT, CORRUPT, PART = 160, 7, 8
WAIT_SECONDS = 120

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

DRIVER = """
import os, signal, sys
from pathlib import Path
import psutil
from repmlp_deploy import Predictor
from repmlp_deploy.evaluation import mapping
from repmlp_deploy.evaluation.process_engine import Processes
from repmlp_deploy.evaluation.sources import open_source

bundle, data, out = sys.argv[1:]
mapping.PART = 8

def die(done, total, errors):
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

with Predictor(bundle, format="onnx", threads=1) as predictor:
    mapping.map_images(predictor, open_source(data), Path(out), progress=die, engine=Processes(count=2))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, one of them corrupt."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digit_images()[0][:COUNT]):
        image.save(folder / f"{i:03d}.png")
    (folder / f"{CORRUPT:03d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def predictor(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mapping, "PART", PART)
    with Predictor(bundle, format="onnx", threads=1) as opened:
        yield opened


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "process_worker" in " ".join(one.cmdline())]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_killed_processes_lose_and_repeat_nothing(images: Path, predictor: Predictor, tmp_path: Path):
    source, out, told = open_source(str(images)), tmp_path / "out.parquet", []
    command = [sys.executable, "-c", DRIVER, predictor.bundle.folder, images, out]
    first = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert first.returncode == -signal.SIGKILL, first.stderr
    orphans = [int(pid) for pid in first.stdout.split()]
    assert len(orphans) == 2
    end = time.monotonic() + WAIT_SECONDS
    while any(is_alive(pid) for pid in orphans):
        assert time.monotonic() < end, "a process outlived the one that started it"
        time.sleep(0.05)

    def kill_one(done: int, _total: int, _errors: int) -> None:
        if not told:
            workers()[0].kill()
        told.append(done)

    found = map_images(predictor, source, out, progress=kill_one, engine=Processes(count=2))
    assert PART <= found.resumed < COUNT
    assert (found.count, found.errors) == (COUNT, 1)
    assert sorted(told) == told
    assert told[-1] == COUNT
    assert not workers()
    map_images(predictor, source, tmp_path / "alone.parquet")
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "alone.parquet"))  # bit for bit


def test_processes_that_always_die_end_the_run(predictor: Predictor, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(process_engine, "_MOST_DEATHS", 1)
    deadly = Source(COUNT, "deadly", os._exit)  # what is to yield images ends the process
    with pytest.raises(DeviceError, match="2 processes died in a row"):
        map_images(predictor, deadly, tmp_path / "out.parquet", engine=Processes(count=2))
    assert not workers()


def test_a_part_that_cannot_be_written_is_the_outputs_fault(images: Path, predictor: Predictor, tmp_path: Path):
    """As on a full disk: here a folder comes to have the name of the last part."""
    last = tmp_path / "out.parquet.parts" / f"{COUNT - PART:012d}.parquet"
    with pytest.raises(OutputError, match=r"out\.parquet\.parts cannot be written: Is a directory"):
        map_images(
            predictor,
            open_source(str(images)),
            tmp_path / "out.parquet",
            progress=lambda *_: last.mkdir(exist_ok=True),
            engine=Processes(count=2),
        )
    assert not workers()


def test_what_a_process_raises_arrives(images: Path, predictor: Predictor, tmp_path: Path):
    short = replace(open_source(str(images)), count=COUNT + PART)
    with pytest.raises(InputError, match="the images changed during the run: 168 were expected"):
        map_images(predictor, short, tmp_path / "out.parquet", engine=Processes(count=2))
    assert not workers()


def test_a_disk_that_fails_in_a_process_ends_the_run_as_it_does_in_one(predictor: Predictor, tmp_path: Path):
    failing = Source(COUNT, "failing", partial(tried, partial(os.listdir, __file__)))
    with pytest.raises(DiskError, match=r"could not be read 4 times: .*; run again to go on"):
        map_images(predictor, failing, tmp_path / "out.parquet", engine=Processes(count=2))
    assert not workers()
