"""`--engine ray`: `evaluation.ray_engine`, `evaluation.judging`. A driver is killed, then an actor; nothing differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.cli.eval import eval_command
from repmlp_deploy.cli.map import map_command
from repmlp_deploy.evaluation import mapping
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.sources import open_source
from support.commands import ends_with
from train_digits import digit_images

COUNT, CORRUPT, PART = 100, 7, 8

DRIVER = """
import json, os, signal, sys
from functools import partial
from pathlib import Path
import psutil
from repmlp_deploy import Predictor
from repmlp_deploy.cli.eval import _opened
from repmlp_deploy.evaluation import mapping, ray_engine
from repmlp_deploy.evaluation.datasets import read_dataset
from repmlp_deploy.evaluation.loop import evaluate
from repmlp_deploy.evaluation.ray_engine import Actors, Judges
from repmlp_deploy.runtime.ray_cluster import join_or_start
from repmlp_deploy.evaluation.sources import open_source

bundle, data, out, victim, table, labelled = sys.argv[1:]
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

with Predictor(bundle, format="onnx", threads=1) as predictor:
    join_or_start()  # once for all; an engine leaves what it did not start
    found = mapping.map_images(predictor, open_source(data), Path(out), progress=kill, engine=Actors(count=2))
    mapping.map_images(predictor, open_source(table), Path(out + ".of-table"), engine=Actors(count=1))
    runs, samples = {"onnx": predictor.logits}, read_dataset(Path(labelled), predictor.manifest)
    engine = Judges(partial(_opened, Path(bundle), ["onnx"], None, 1, None), count=1)
    scored = [evaluate(runs, predictor.manifest, samples, skip_unreadable=True, engine=one) for one in
              (engine, ray_engine.judge)]
print(json.dumps([found.count, found.resumed, [[one.scores, one.count, one.unreadable] for one in scored]]))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, one of them corrupt."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digit_images()[0][:COUNT]):
        image.save(folder / f"{i:03d}.png")
    (folder / f"{CORRUPT:03d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def table(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in a parquet file."""
    path = tmp_path_factory.mktemp("table") / "digits.parquet"
    files = sorted(images.iterdir())
    both = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": both}), path, row_group_size=30)
    return path


@pytest.fixture(scope="module")
def labelled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in a list, with labels that are not all right."""
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text("".join(f"{file} {i % 10}\n" for i, file in enumerate(sorted(images.iterdir()))))
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_driver_and_a_killed_actor_lose_and_repeat_nothing(  # noqa: PLR0913 - fixtures
    bundle: Bundle, images: Path, table: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-c", DRIVER, bundle.folder, images, out]
    first = subprocess.run([*command, "driver", table, labelled], capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    parts = len(list((tmp_path / "out.parquet.parts").glob("*.parquet")))
    assert 2 <= parts < -(-COUNT // PART)
    second = subprocess.run([*command, "worker", table, labelled], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "killed one" in second.stderr
    assert "listens on 127.0.0.1 ::ffff:127.0.0.1\n" in second.stderr
    count, resumed, (by_ray, here) = json.loads(second.stdout.splitlines()[-1])
    assert count == COUNT
    assert resumed >= 2 * PART
    assert by_ray == here
    assert by_ray[1] == COUNT - 1
    monkeypatch.setattr(mapping, "PART", PART)
    with Predictor(bundle, format="onnx", threads=1) as predictor:
        map_images(predictor, open_source(str(images)), tmp_path / "alone.parquet")
    alone = pq.read_table(tmp_path / "alone.parquet")
    assert alone["error"].null_count == COUNT - 1
    assert pq.read_table(out).equals(alone)  # bit for bit; `test_mapping` compares it with Predictor
    columns = [name for name in alone.column_names if name != "error"]  # it says where the image was
    assert pq.read_table(tmp_path / "out.parquet.of-table", columns=columns).equals(alone.select(columns))


def test_options_that_do_not_fit_are_refused(bundle: Bundle, images: Path, tmp_path: Path, capsys):
    given = (bundle.folder, "--data", images, "--out", tmp_path / "out.parquet")
    assert ends_with(map_command, *given, "--engine", "spark") == 2
    assert "expected local or ray" in capsys.readouterr().err
    assert ends_with(eval_command, bundle.folder, "--data", images, "--engine", "spark") == 2
    assert "expected local or ray" in capsys.readouterr().err


def test_without_ray_the_remedy_is_named(bundle: Bundle, images: Path, tmp_path: Path):
    script = "import sys; sys.modules['ray'] = None; from repmlp_deploy.cli.shared.entry import run; run('map')"
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
