"""Simulate `repmlp-map` on many workers, and compare with real actors whose images come late and which are killed.

python benchmarks/cluster.py [--out FILE.md]     a minute or two, then the plan for 10^9 images

Model: a worker starts, then makes part after part of a chunk. A part takes its images times the seconds an image, which
the network or the store sets, whichever is slower. A worker that dies is replaced, and its part is made again. The
chunks are those that the engines use. The real run has Ray actors, the digits bundle, and a file system that waits
before it opens a file: with 40 ms an image, many actors fit on a machine of two cores. The seconds an image come from a
run of one actor. Actors that start together share the cores, so their start is the mean time of the first parts;
one that takes a dead one's place starts as fast as the single one.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import psutil
import pyarrow.fs

from repmlp_deploy import Predictor, export
from repmlp_deploy.card import data_root
from repmlp_deploy.evaluation.filling import chunks_of
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.ray_engine import Actors
from repmlp_deploy.evaluation.remote import RemoteFile
from repmlp_deploy.evaluation.sources import Item, Source, open_source
from repmlp_deploy.runtime.ray_cluster import join_or_start, leave
from train_digits import digit_images

LATENCY_SECONDS = 0.04
IMAGES_PER_ACTOR = 448
PART = 32
CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class Cluster:
    """What the simulation knows.

    Attributes:
        workers: that run at a time.
        image_seconds: of one worker, while it is not limited by the store.
        start_seconds: from the start of a worker to its first image.
        restart_seconds: the same of a worker that takes the place of another.
        death_seconds: mean life of a worker; 0 for no deaths.
        spread: standard deviation of a part's time, as a share of it.
        store_images: images a second that the store gives to all workers together; 0 for no limit.
    """

    workers: int
    image_seconds: float
    start_seconds: float
    restart_seconds: float
    death_seconds: float = 0
    spread: float = 0
    store_images: float = 0


def simulate(cluster: Cluster, images: int, part: int, kills: tuple[float, ...] = (), seed: int = 0) -> float:
    """Return the seconds until the last part is written.

    Args:
        cluster: what runs.
        images: in all.
        part: images of a part.
        kills: seconds at which some worker dies, beside the random deaths.
        seed: of everything that is random.
    """
    rng = random.Random(seed)  # noqa: S311 - no secret
    chunks = chunks_of(range(-(-images // part)), cluster.workers * CHUNKS_PER_WORKER)
    each = max(cluster.image_seconds, cluster.workers / cluster.store_images if cluster.store_images else 0)
    waiting_kills = sorted(kills, reverse=True)
    # (when, worker, parts left of its chunk); a worker dies while it makes the part that ends then
    events = [(cluster.start_seconds, worker, 0) for worker in range(cluster.workers)]
    heapq.heapify(events)
    end = 0.0
    while events:
        now, worker, left = heapq.heappop(events)
        end = max(end, now)
        if not left:
            if not chunks:
                continue
            left = len(chunks.popleft())
        seconds = part * each * max(0.1, rng.gauss(1, cluster.spread))
        if waiting_kills and waiting_kills[-1] <= now + seconds:
            died = max(now, waiting_kills.pop())
        elif cluster.death_seconds:
            died = now + rng.expovariate(1 / cluster.death_seconds)
        else:
            died = now + seconds
        if died < now + seconds:
            heapq.heappush(events, (died + cluster.restart_seconds, worker, left))  # the part again
        else:
            heapq.heappush(events, (now + seconds, worker, left - 1))
    return end


class Late:
    """A file system whose files open after a while."""

    def __init__(self) -> None:
        self._files = pyarrow.fs.LocalFileSystem()

    def open_input_file(self, path: str) -> Any:
        """Open a file, as pyarrow's file systems do."""
        time.sleep(LATENCY_SECONDS)
        return self._files.open_input_file(path)


def late_items(paths: list[str], first: int) -> Iterator[Item]:
    """Yield images that come late."""
    files = Late()
    for path in paths[first:]:
        yield Item(path, RemoteFile(files, path, 1 << 20))


def real_run(
    predictor: Predictor, paths: list[str], out: Path, actors: int, kills: int
) -> tuple[list[float], list[float]]:
    """Return when parts were written, in seconds from the start, and when actors were killed."""
    told: list[float] = []
    killed: list[float] = []

    def progress(_done: int, _total: int, errors: int) -> None:
        told.append(time.perf_counter() - begun)
        if errors:
            raise SystemExit("an image has no prediction")
        if len(killed) < kills and len(told) >= 2 * actors + 8 * len(killed):
            victim = next(one for one in psutil.Process().children(recursive=True) if "ray::_Worker" in one.name())
            victim.kill()
            killed.append(told[-1])

    source = Source(len(paths), f"{actors}-{kills}", partial(late_items, paths))
    begun = time.perf_counter()
    found = map_images(predictor, source, out, engine=Actors(count=actors), progress=progress, fresh=True)
    if found.count != len(paths) or len(killed) != kills:
        raise SystemExit("the run is not what was wanted")
    return told, killed


def calibrated(predictor: Predictor, paths: list[str], folder: Path) -> Cluster:
    """Return a cluster of one worker with the times of a real one."""
    told, _ = real_run(predictor, paths[:IMAGES_PER_ACTOR], folder / "one.parquet", 1, 0)
    image = (told[-1] - told[0]) / (IMAGES_PER_ACTOR - PART)
    start = max(0.0, told[0] - PART * image)
    return Cluster(1, image, start, start)


def measured(folder: Path) -> Iterator[str]:
    """Yield the table of real runs beside the simulation."""
    checkpoint = data_root() / "weights" / "repmlp-digits.safetensors"
    bundle = export(checkpoint, formats="onnx", batch="1:16:64", out=folder / "bundle")
    (folder / "png").mkdir()
    for i, image in enumerate(digit_images()[0]):
        image.save(folder / "png" / f"{i:04d}.png")
    paths = [str(folder / "png" / item.key) for item in open_source(str(folder / "png")).items(0)] * 2
    own = join_or_start(cpus=16)
    with Predictor(bundle, format="onnx", threads=1) as predictor:
        one = calibrated(predictor, paths, folder)
        yield f"One actor: {1e3 * one.image_seconds:.1f} ms an image, {one.start_seconds:.1f} s to start.\n"
        yield "| actors | images | killed | start, s | measured, s | simulated, s | difference |"
        yield "|--:|--:|--:|--:|--:|--:|--:|"
        for actors, kills in ((2, 0), (4, 0), (8, 0), (8, 3)):
            images = actors * IMAGES_PER_ACTOR
            told, at = real_run(predictor, paths[:images], folder / "run.parquet", actors, kills)
            start = sum(told[:actors]) / actors - PART * one.image_seconds
            cluster = replace(one, workers=actors, start_seconds=start)
            expected = simulate(cluster, images, PART, kills=tuple(at))
            row = f"{start:.1f} | {told[-1]:.1f} | {expected:.1f} | {told[-1] / expected - 1:+.0%}"
            yield f"| {actors} | {images:,} | {kills} | {row} |"
    leave(own=own)


SCALE = 10  # parts are so much larger than they are: fewer events, and a death costs more than it would

PLAN = {
    "2 CPU cores, B224 float32": 1 / 20,
    "2 CPU cores, B224 int8 (OpenVINO)": 1 / 117,
    "GPU that gives 2,000 images/s": 1 / 2000,
}
"""Worker to its seconds an image. The CPU's rates were measured; the GPU's is the low end of an L4 in fp16."""

STORES = {"no limit": 0.0, "5,500 reads/s": 5500.0, "100 Gbit/s at 52 KB": 100e9 / 8 / 52e3}


def plan() -> Iterator[str]:
    """Yield the table of what 10^9 images take."""
    yield "\n10⁹ images; a worker starts in 30 s and lives a day on average; times of parts spread by 10 %. Hours:\n"
    yield f"| worker | workers | ideal | {' | '.join(STORES)} |\n|---|--:|--:|" + "--:|" * len(STORES)
    for name, seconds in PLAN.items():
        for workers in (10, 100, 1000):
            cluster = Cluster(workers, seconds, 30, 30, death_seconds=86_400, spread=0.1)
            cells = " | ".join(
                f"{simulate(replace(cluster, store_images=store), 10**9, 512 * SCALE) / 3600:,.1f}"
                for store in STORES.values()
            )
            yield f"| {name} | {workers:,} | {1e9 * seconds / workers / 3600:,.1f} | {cells} |"


def main() -> None:
    """Measure, simulate, and print or write a report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        text = "\n".join([*measured(Path(folder)), *plan(), ""])
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
