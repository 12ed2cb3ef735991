"""Measure `repmlp-map` on this machine: stages, engines, memory, and what is left when processes are killed.

python benchmarks/mapping.py [--images 20000] [--rounds 3] [--out FILE.md]      digits, as PNG files and as parquet
python benchmarks/mapping.py --photographs CARD [--images 300] [--rounds 2]     JPEG of 500x375, seeded weights

The digits come from scikit-learn; 1 in 400 files is corrupt. Every table is compared with `Predictor`, row by row.
Stages and engines take turns in every round. A stage runs in one process, and in one per CPU at the same time: then it
has the same share of a machine that others use, too, as the engines have. Rates of engines leave out the start of the
processes; seconds include it. CPU time an image is what a busy machine changes least.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from repmlp_deploy import Bundle, Predictor, export, load_card
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.bench.subjects.seeding import seeded_network
from repmlp_deploy.card import data_root
from repmlp_deploy.errors import ImageError
from repmlp_deploy.evaluation.mapping import Engine, map_images
from repmlp_deploy.evaluation.process_engine import Processes
from repmlp_deploy.evaluation.ray_engine import Actors
from repmlp_deploy.evaluation.sources import Source, open_source
from repmlp_deploy.runtime.cpus import usable_cpus
from train_digits import digit_images

CORRUPT = 400  # one image in so many
STAGE_SECONDS = 2.0
PHOTOGRAPH = (500, 375)
SETTLED = (0.15, 0.95)  # of a run: between them, all processes are at work


@dataclass
class Found:
    """Rates in images a second, one per round, and seconds of whole runs."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, rate: float, cpu: float, seconds: float = 0.0) -> None:
        """Keep what a turn gave: images a second, seconds of CPU time an image, seconds in all."""
        sys.stderr.write(f"{name}: {rate:.1f} images/s, {1e6 * cpu:.0f} us of CPU, {seconds:.1f} s\n")
        for kept, value in ((self.rates, rate), (self.cpu, cpu), (self.seconds, seconds)):
            kept.setdefault(name, []).append(value)

    def cpu_us(self, name: str) -> str:
        """Return the median of the CPU time an image; nothing for Ray, whose processes are no children of this one."""
        return "" if name.startswith("ray") else f"{1e6 * statistics.median(self.cpu[name]):.0f}"

    def rate(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.rates[name])


def main() -> None:
    """Measure, and print or write a report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", metavar="CARD")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mapping-"))
    try:
        lines = [*_head(), *(_photographs(folder, given) if given.photographs else _digits(folder, given))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = "\n".join(lines) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text)


def _head() -> Iterator[str]:
    machine = describe_machine()
    amx = "with AMX" if "amx_int8" in machine["cpu_flags"] else "without AMX"
    load = os.getloadavg()[0]
    yield f"{machine['cpu']} {amx}, {usable_cpus()} cores, load {load:.1f} at the start. ONNX Runtime, float32."


def _digits(folder: Path, given: argparse.Namespace) -> Iterator[str]:
    count = given.images or 20_000
    checkpoint = data_root() / "weights" / "repmlp-digits.safetensors"
    bundle = export(checkpoint, formats="onnx", batch="1:16:64", out=folder / "bundle")
    png, parquet = _write_digits(folder, count)
    yield f"\n{count:,} digits, {count // CORRUPT} of them corrupt; `python benchmarks/mapping.py --images {count}`"
    engines: dict[str, tuple[str, Engine | None]] = {
        "local, PNG": (str(png), Processes()),
        "local, parquet": (str(parquet), Processes()),
        "one process, PNG": (str(png), None),
        "ray, PNG": (str(png), Actors()),
        "ray, parquet": (str(parquet), Actors()),
    }
    found, tables = _rounds(bundle, engines, folder, given.rounds)
    yield from _table(found, engines)
    yield from _compared(bundle, str(png), tables)
    yield from _killed(bundle, png, folder, tables["local, PNG"])
    few = folder / "few"
    few.mkdir()
    for i, path in enumerate(sorted(png.rglob("*.png"))[: count // 10]):
        (few / f"{i}.png").hardlink_to(path)
    for name, data in ((f"{count // 10:,}", few), (f"{count:,}", png)):
        total, largest = _memory(bundle, data, folder)
        yield f"\nMemory at {name} images: {total:.0f} MB in all processes, {largest:.0f} MB in the largest."


def _photographs(folder: Path, given: argparse.Namespace) -> Iterator[str]:
    count, card = given.images or 300, load_card(given.photographs)
    bundle = export(seeded_network(card), card=card, formats="onnx", batch="1:8:64", out=folder / "bundle")
    data = _write_photographs(folder / "jpeg", count)
    yield f"\n{count:,} JPEG of 500x375, {card.name}; `python benchmarks/mapping.py --photographs {given.photographs}`"
    engines: dict[str, tuple[str, Engine | None]] = {
        "local, JPEG": (str(data), Processes()),
        "one process, JPEG": (str(data), None),
    }
    found, tables = _rounds(bundle, engines, folder, given.rounds)
    yield from _table(found, engines)
    yield from _compared(bundle, str(data), tables)
    total, largest = _memory(bundle, data, folder)
    yield f"\nMemory: {total:.0f} MB in all processes, {largest:.0f} MB in the largest."


def _write_digits(folder: Path, count: int) -> tuple[Path, Path]:
    """Write the images as PNG files and as a parquet file of the same bytes, in the same order."""
    encoded, names = [], []
    for image in digit_images()[0]:
        file = io.BytesIO()
        image.save(file, "PNG")
        encoded.append(file.getvalue())
    png, contents = folder / "png", []
    for i in range(count):
        data = encoded[i % len(encoded)]
        data = data[: len(data) // 2] if i % CORRUPT == CORRUPT // 2 else data
        name = f"{i // 1000:03d}/{i:06d}.png"
        (png / name).parent.mkdir(parents=True, exist_ok=True)
        (png / name).write_bytes(data)
        contents.append(data)
        names.append(name)
    table = pa.table({"image": [{"bytes": data, "path": name} for data, name in zip(contents, names, strict=True)]})
    pq.write_table(table, folder / "digits.parquet", row_group_size=1000)
    return png, folder / "digits.parquet"


def _write_photographs(folder: Path, count: int) -> Path:
    """Write crops of scikit-learn's two photographs."""
    folder.mkdir()
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        edge = rng.uniform(0.6, 1.0)
        width, height = (int(edge * side) for side in (photograph.width, photograph.width * 3 // 4))
        height = min(height, photograph.height)
        left, top = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
        crop = photograph.crop((left, top, left + width, top + height)).resize(PHOTOGRAPH)
        crop.save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def _rounds(
    bundle: Bundle, engines: dict[str, tuple[str, Engine | None]], folder: Path, rounds: int
) -> tuple[Found, dict[str, Any]]:
    """Return the rates of stages and engines, and the table of every engine."""
    found, tables, cpus = Found(), dict[str, Any](), usable_cpus()
    data = next(iter(engines.values()))[0]
    with ProcessPoolExecutor(cpus, mp_context=get_context("spawn")) as pool:
        for _ in range(rounds):
            for stage in ("decode", "network"):
                for several in (1, cpus):
                    turns = [pool.submit(_stage, stage, str(bundle.folder), data) for _ in range(several)]
                    rates, cpu = zip(*(turn.result() for turn in turns), strict=True)
                    found.add(f"{stage} x {several}", sum(rates), statistics.mean(cpu))
            for name, (given, engine) in engines.items():
                out = folder / f"{name}.parquet"
                found.add(name, *_run(bundle, open_source(given), out, engine))
                tables[name] = pq.read_table(out)
    return found, tables


@cache
def _opened(bundle: str, data: str) -> tuple[Predictor, list[Any], Any]:
    predictor = Predictor(bundle, format="onnx", threads=1)
    contents = [item.content for item, _ in zip(open_source(data).items(0), range(1000), strict=False)]
    inputs = [predictor.preprocess(content) for content in contents[: predictor.manifest.batch.opt]]
    return predictor, contents, np.stack(inputs)


def _stage(name: str, bundle: str, data: str) -> tuple[float, float]:
    """Return images a second of one stage alone, in one thread, and seconds of CPU time an image."""
    predictor, contents, batch = _opened(bundle, data)
    done, begun, cpu = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - begun) < STAGE_SECONDS:
        if name == "network":
            predictor.logits(batch)
            done += len(batch)
        else:
            for content in contents[done % len(contents) :][:8]:
                try:
                    predictor.preprocess(content)
                except ImageError:
                    continue
                finally:
                    done += 1
    return done / seconds, (time.process_time() - cpu) / done


def _run(bundle: Bundle, source: Source, out: Path, engine: Engine | None) -> tuple[float, float, float]:
    """Return images a second while all processes work, CPU time an image, and the seconds of the whole run."""
    told: list[tuple[float, int, float]] = []
    with Predictor(bundle, format="onnx", threads=1 if engine else None, check=True) as predictor:
        begun = time.perf_counter()
        map_images(
            predictor,
            source,
            out,
            fresh=True,
            engine=engine,
            progress=lambda done, _total, _errors: told.append((time.perf_counter(), done, _cpu_seconds())),
        )
        seconds = time.perf_counter() - begun
    low, high = (share * source.count for share in SETTLED)
    settled = [one for one in told if low <= one[1] <= high]
    (first, before, cpu), (last, after, more_cpu) = settled[0], settled[-1]
    return (after - before) / (last - first), (more_cpu - cpu) / (after - before), seconds


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that make parts for it."""
    me = psutil.Process()
    workers = [one for one in me.children() if "process_worker" in " ".join(one.cmdline())]
    return sum(sum(one.cpu_times()[:2]) for one in (me, *workers))


def _table(found: Found, engines: dict[str, Any]) -> Iterator[str]:
    """Yield the rates, and what share they are of three limits."""
    cpus = usable_cpus()
    stages = [f"{stage} x {n}" for stage in ("decode", "network") for n in (1, cpus)]
    yield "\n| stage alone | images a second | CPU, µs an image |\n|---|--:|--:|"
    for name in stages:
        yield f"| {name} | {found.rate(name):.0f} | {found.cpu_us(name)} |"
    slowest, on_all = (min(found.rate(f"{stage} x {n}") for stage in ("decode", "network")) for n in (1, cpus))
    shared = 1 / sum(1 / found.rate(f"{stage} x {cpus}") for stage in ("decode", "network"))
    yield f"\nThe slowest stage allows {slowest:.0f} in one process, {on_all:.0f} in {cpus}. Stages that share cores"
    yield f"allow {shared:.0f} together.\n"
    limits = f"of the slowest stage in 1 process | in {cpus} | of both stages on the cores"
    yield f"| engine | images a second | {limits} | CPU, µs an image | so {cpus} free cores reach | run, s |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for name in engines:
        rate, seconds = found.rate(name), statistics.median(found.seconds[name])
        shares = " | ".join(f"{rate / limit:.0%}" for limit in (slowest, on_all, shared))
        cpu = found.cpu_us(name)
        free = f"{1e6 * cpus / float(cpu):.0f}" if cpu and engines[name][1] else ""
        yield f"| {name} | {rate:.0f} | {shares} | {cpu} | {free} | {seconds:.1f} |"


def _compared(bundle: Bundle, data: str, tables: dict[str, Any]) -> Iterator[str]:
    """Compare every table with the first, bit for bit, and the first with `Predictor`, row by row."""
    first, *others = tables.values()
    columns = [name for name in first.column_names if name != "error"]  # an error names the file, or the bytes of one
    same = [
        name
        for name, table in tables.items()
        if table.select(columns).equals(first.select(columns))
        and table["error"].is_null().equals(first["error"].is_null())
    ]
    right, furthest, corrupt = 0, 0.0, 0
    with Predictor(bundle, format="onnx") as predictor:
        for row, item in zip(first.to_pylist(), open_source(data).items(0), strict=True):
            if row["key"] != item.key:
                raise SystemExit(f"row {row['row']} is {row['key']}; expected {item.key}")
            try:
                expected = predictor(item.content)
            except ImageError as error:
                right += row["error"] == str(error)
                corrupt += 1
                continue
            right += (row["index"], row["label"], row["error"]) == (expected.pred_label, expected.pred_class, None)
            furthest = max(furthest, abs(row["score"] - expected.pred_score))
    yield f"\nThe same bits in {len(same)} of {1 + len(others)} tables: {', '.join(same)}."
    yield f"Compared with `Predictor`, an image at a time: {right:,} of {len(first):,} rows right, {corrupt} errors;"
    yield f"scores differ by at most {furthest:.1e}."
    if right != len(first):
        raise SystemExit(f"{len(first) - right} rows are wrong")


def _command(bundle: Bundle, data: Path, out: Path, *more: str) -> list[str]:
    given = [str(bundle.folder), "--data", str(data), "--out", str(out), "--format", "onnx", *more]
    return [sys.executable, "-m", "repmlp_deploy", "map", *given]


def _killed(bundle: Bundle, data: Path, folder: Path, expected: Any) -> Iterator[str]:
    """Kill a worker and the driver of either engine, then let the run end."""
    for engine, name in (("local", "process_worker"), ("ray", "ray::_Worker")):
        out = folder / f"killed-{engine}.parquet"
        command = _command(bundle, data, out, "--engine", engine)
        driver = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at_worker = _wait_for_parts(out, 2, driver)
        workers = [one for one in driver.children(recursive=True) if name in " ".join(one.cmdline())]
        workers[0].kill()
        _wait_for_parts(out, at_worker + 4, driver)
        descendants = driver.children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        at_driver = _parts(out)
        _, alive = psutil.wait_procs(descendants, timeout=30)
        alive = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        names = ", ".join(one.name() for one in alive)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        same = pq.read_table(out).equals(expected)
        yield f"\n{engine}: a worker killed after {at_worker} parts, the driver after {at_driver}."
        table = "the same" if same else "ANOTHER"
        yield f"{len(alive)} processes are left 30 s later ({names or 'none'})."
        yield f"The next run ended, and the table is {table}, bit for bit."
        if not same:
            raise SystemExit("a killed run gave another table")


def _parts(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.parts").glob("*.parquet")))


def _wait_for_parts(out: Path, count: int, driver: Any) -> int:
    """Wait until a run has written so many parts, and return how many there are."""
    while (written := _parts(out)) < count:
        if driver.poll() is not None:
            raise SystemExit("the run ended before it could be killed: give it more images")
        time.sleep(0.01)
    return written


def _memory(bundle: Bundle, data: Path, folder: Path) -> tuple[float, float]:
    """Return the largest memory in MB, shared pages divided, of all processes of a run, and of one."""
    command = _command(bundle, data, folder / "memory.parquet", "--fresh")
    driver = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total, largest = 0.0, 0.0
    while driver.poll() is None:
        sizes = []
        for one in [driver, *driver.children(recursive=True)]:
            try:
                sizes.append(one.memory_full_info().pss / 1e6)
            except psutil.Error:
                continue
        total, largest = max(total, sum(sizes)), max(largest, *sizes, 0.0)
        time.sleep(0.05)
    if driver.returncode:
        raise SystemExit(f"the run ended with {driver.returncode}")
    return total, largest


if __name__ == "__main__":
    main()
