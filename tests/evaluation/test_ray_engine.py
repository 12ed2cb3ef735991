"""`repmlp-map --engine ray`: `evaluation.ray_engine`. A driver is killed, then an actor; the table is right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.cli.map import map_command
from repmlp_deploy.evaluation.sources import open_source
from support.commands import ends_with
from train_digits import digit_images

COUNT, CORRUPT, PART = 100, 7, 8

DRIVER = """
import os, signal, sys
from pathlib import Path
import psutil
from repmlp_deploy import Predictor
from repmlp_deploy.evaluation import mapping
from repmlp_deploy.evaluation.ray_engine import Actors
from repmlp_deploy.evaluation.sources import open_source

bundle, data, out, victim = sys.argv[1:]
mapping.PART = 8
calls = []

def workers():
    for process in psutil.Process().children(recursive=True):
        if "ray::_Worker" in " ".join(process.cmdline()):
            yield process

def listening():
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        yield from (c.laddr.ip for c in process.net_connections() if c.status == "LISTEN")

def kill(done, total, errors):
    calls.append(done)
    if len(calls) == 2 and victim == "driver":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(calls) == 2 and victim == "worker":
        print("listens on", *sorted(set(listening())), file=sys.stderr)
        next(workers()).kill()
        print("killed one", file=sys.stderr)

with Predictor(bundle, format="onnx") as predictor:
    found = mapping.map_images(predictor, open_source(data), Path(out), progress=kill, engine=Actors(count=2))
print(found.count, found.resumed)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, one of them corrupt."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digit_images()[0][:COUNT]):
        image.save(folder / f"{i:03d}.png")
    (folder / f"{CORRUPT:03d}.png").write_bytes(b"no image")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_driver_and_a_killed_actor_lose_and_repeat_nothing(bundle: Bundle, images: Path, tmp_path: Path):
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-c", DRIVER, bundle.folder, images, out]
    first = subprocess.run([*command, "driver"], capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    parts = len(list((tmp_path / "out.parquet.parts").glob("*.parquet")))
    assert 2 <= parts < -(-COUNT // PART)
    second = subprocess.run([*command, "worker"], capture_output=True, text=True, check=True)
    assert "killed one" in second.stderr
    assert "listens on 127.0.0.1 ::ffff:127.0.0.1\n" in second.stderr
    count, resumed = second.stdout.splitlines()[-1].split()
    assert int(count) == COUNT
    assert int(resumed) >= 2 * PART
    table = pq.read_table(out).to_pylist()
    assert [row["row"] for row in table] == list(range(COUNT))
    with Predictor(bundle, format="onnx") as predictor:
        for row, item in zip(table, open_source(str(images)).items(0), strict=True):
            assert row["key"] == item.key
            if row["row"] == CORRUPT:
                assert "not a readable image" in row["error"]
                continue
            expected = predictor(item.content)
            assert (row["error"], row["index"], row["label"]) == (None, expected.pred_label, expected.pred_class)
            assert row["score"] == pytest.approx(expected.pred_score, rel=1e-5)


def test_options_that_do_not_fit_are_refused(bundle: Bundle, images: Path, tmp_path: Path, capsys):
    given = (bundle.folder, "--data", images, "--out", tmp_path / "out.parquet")
    assert ends_with(map_command, *given, "--engine", "spark") == 2
    assert "expected local or ray" in capsys.readouterr().err


def test_without_ray_the_remedy_is_named(bundle: Bundle, images: Path, tmp_path: Path):
    script = "import sys; sys.modules['ray'] = None; from repmlp_deploy.cli.entry import run; run('map')"
    given = [bundle.folder, "--data", images, "--out", tmp_path / "out.parquet", "--engine", "ray"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 4
    assert 'pip install "repmlp-deploy[ray]"' in done.stderr.splitlines()[-1]
