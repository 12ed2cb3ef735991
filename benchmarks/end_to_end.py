"""Measure a bundle from image files to classes, and under the load scenarios that MLPerf defines.

python benchmarks/end_to_end.py BUNDLE [--rounds 5] [--images 64] [--large 12] [--scenarios] [--limit-ms 100]

Every subject is a part of this process, and they take turns in every round, so that what else keeps the machine busy
meets all of them. Rates are medians over rounds; ratios are medians of the ratios within a round. The images are JPEG
files of scikit-learn's photographs, 500x375 and 4000x3000 pixels, which are made first.

`--scenarios` adds SingleStream (one sample after the other: the 90th percentile of latency), Offline (all samples at
once: samples per second) and Server (samples arrive by a Poisson process: the highest rate whose 99th percentile keeps
the limit), each from tensors and, but for Server, from JPEG bytes. The load is this script's own, as its rates are for
comparing ways of running a bundle with each other and not for a submission.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.runtime.batching import Batcher, Queueing
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.decoding import Decoder

SMALL, LARGE = (500, 375), (4000, 3000)  # width, height
PERCENTILE = 0.99
SEARCH_STEPS = 6

Subject = Callable[[], int]
"""Runs once and returns how many images it has done."""


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--large", type=int, default=12, help="files of 12 megapixels; 0 for none")
    parser.add_argument("--scenarios", action="store_true")
    parser.add_argument("--limit-ms", type=float, default=100, help="of the Server scenario")
    given = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {usable_cpus()} cores, flags {', '.join(machine['cpu_flags'])}")
    print(f"Python {platform.python_version()}, load when it began {machine.get('load')}\n")
    bundle = Bundle.load(given.bundle)
    with tempfile.TemporaryDirectory() as folder:
        small = _files(Path(folder), SMALL, given.images)
        large = _files(Path(folder), LARGE, given.large)
        with (
            Predictor(bundle, format=given.format) as latency,
            Predictor(bundle, format=given.format, streams=usable_cpus()) as throughput,
            Predictor(bundle, format=given.format, decode="fast") as fast,
        ):
            print(f"{bundle.manifest.name}: {latency.format}, {latency.details.get('chosen', 'the only one')}\n")
            subjects = _offline(latency, throughput, small)
            if large:
                subjects |= _large(latency, fast, large)
            rates = _rates(subjects, given.rounds)
            _print(rates)
            if given.scenarios:
                _scenarios(latency, throughput, small, given.limit_ms / 1000)


def _files(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEG files of `size`, each another part of a photograph."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    paths = []
    for i in range(count):
        photograph = Image.fromarray(photographs[i % len(photographs)])
        left, top = (int(edge) for edge in rng.integers(0, 100, 2))
        path = folder / f"{size[0]}-{i}.jpg"
        photograph.crop((left, top, left + 500, top + 320)).resize(size, Image.Resampling.BICUBIC).save(
            path, quality=90
        )
        paths.append(path)
    return paths


def _offline(latency: Predictor, throughput: Predictor, files: Sequence[Path]) -> dict[str, Subject]:
    """Return the subjects that work on 500x375 files."""
    how, best = latency.manifest.preprocessing, latency.manifest.batch.opt
    decoder, images = Decoder(), list(files)
    tensors = np.stack([latency.preprocess(path) for path in images])

    def decoding() -> int:
        return sum(len(sizes) for _, sizes in decoder.batches(images, how, best))

    def one_after_the_other() -> int:
        for start in range(0, len(images), best):
            latency.logits(np.stack([latency.preprocess(path) for path in images[start : start + best]]))
        return len(images)

    return {
        "decoding alone": decoding,
        "inference alone": lambda: len(latency.logits(tensors)),
        "inference alone, streams": lambda: len(throughput.logits(tensors)),
        "files, decoded before each batch": one_after_the_other,
        "files, Predictor": lambda: len(latency(images)),
        "files, Predictor, streams": lambda: len(throughput(images)),
    }


def _large(latency: Predictor, fast: Predictor, files: Sequence[Path]) -> dict[str, Subject]:
    """Return the subjects that work on files of 12 megapixels."""
    images = list(files)

    def one_after_the_other() -> int:
        latency.logits(np.stack([latency.preprocess(path) for path in images]))
        return len(images)

    return {
        "12 MP, decoded before each batch": one_after_the_other,
        "12 MP, Predictor": lambda: len(latency(images)),
        "12 MP, Predictor, decode=fast": lambda: len(fast(images)),
    }


def _rates(subjects: dict[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Return images per second of every subject and round, after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(rounds + 1):
        for name, run in subjects.items():
            start = time.perf_counter()
            done = run()
            if i:
                rates[name].append(done / (time.perf_counter() - start))
    return rates


def _print(rates: dict[str, list[float]]) -> None:
    print("| | images/s | range |\n|---|--:|--:|")
    for name, seen in rates.items():
        print(f"| {name} | {statistics.median(seen):.1f} | {min(seen):.1f} to {max(seen):.1f} |")
    limit = [min(pair) for pair in zip(rates["decoding alone"], rates["inference alone"], strict=True)]
    ratios = {"files, of the slower of decoding and inference": (rates["files, Predictor"], limit)}
    ratios["files, streams, of the same"] = (rates["files, Predictor, streams"], limit)
    before = rates["files, decoded before each batch"]
    ratios["files, against decoding before each batch"] = (rates["files, Predictor"], before)
    ratios["files, streams, against the same"] = (rates["files, Predictor, streams"], before)
    ratios["streams against one at a time"] = (rates["inference alone, streams"], rates["inference alone"])
    if "12 MP, Predictor" in rates:
        fast, large = rates["12 MP, Predictor, decode=fast"], rates["12 MP, decoded before each batch"]
        ratios["12 MP, fast, against decoding before each batch"] = (fast, large)
        ratios["12 MP, fast, against Predictor"] = (fast, rates["12 MP, Predictor"])
    print("\n| ratio | median | range |\n|---|--:|--:|")
    for name, (ours, theirs) in ratios.items():
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"| {name} | {statistics.median(each):.2f} | {min(each):.2f} to {max(each):.2f} |")
    print(flush=True)


def _scenarios(latency: Predictor, throughput: Predictor, files: Sequence[Path], limit: float) -> None:
    """Measure SingleStream, Offline and Server, and print them."""
    encoded = [path.read_bytes() for path in files]
    tensors = np.stack([latency.preprocess(path) for path in files])
    rows = [("one at a time", latency), ("streams", throughput)]
    print("| SingleStream, 90th percentile, ms | tensors | JPEG bytes |\n|---|--:|--:|")
    for name, predictor in rows:
        print(f"| {name} | {_single_stream(predictor, tensors, encoded)} |")
    print("\n| Offline, samples/s | tensors | JPEG bytes |\n|---|--:|--:|")
    for name, predictor in rows:
        print(f"| {name} | {_all_at_once(predictor, tensors, encoded)} |")
    print(f"\n| Server, samples/s with a 99th percentile of at most {1000 * limit:g} ms | tensors |\n|---|--:|")
    ways = {"one request at a time": (latency, 1, 1), "batched": (latency, latency.manifest.batch.max, 1)}
    ways["batched, streams"] = (throughput, throughput.manifest.batch.max, usable_cpus())
    print("".join(f"| {name} | {_highest_rate(*way, tensors, limit):.1f} |\n" for name, way in ways.items()))


def _single_stream(predictor: Predictor, tensors: NDArray[np.generic], encoded: Sequence[bytes]) -> str:
    times = [_taken(lambda i=i: predictor.logits(tensors[i : i + 1])) for i in range(len(tensors))]
    from_bytes = [_taken(lambda one=one: predictor(one)) for one in encoded]
    return f"{_quantile(times, 0.9):.1f} | {_quantile(from_bytes, 0.9):.1f}"


def _all_at_once(predictor: Predictor, tensors: NDArray[np.generic], encoded: Sequence[bytes]) -> str:
    times = [_taken(lambda: predictor.logits(tensors)) for _ in range(3)]
    from_bytes = [_taken(lambda: predictor(list(encoded))) for _ in range(3)]
    count = 1000 * len(encoded)
    return f"{count / statistics.median(times):.1f} | {count / statistics.median(from_bytes):.1f}"


def _highest_rate(
    predictor: Predictor, largest: int, workers: int, tensors: NDArray[np.generic], limit: float
) -> float:
    """Return the highest Poisson rate that keeps the limit, by bisection."""
    batcher = Batcher(lambda inputs: [predictor.logits(inputs[0])], largest, Queueing(1 << 20, workers=workers))
    low, high = 0.0, 1.5 * 1000 * len(tensors) / _taken(lambda: predictor.logits(tensors))
    for step in range(SEARCH_STEPS):
        rate = (low + high) / 2
        latencies = _arriving(batcher, tensors, rate, seed=step)
        low, high = (rate, high) if _quantile(latencies, PERCENTILE) <= limit else (low, rate)
    batcher.close()
    return low


def _arriving(batcher: Batcher, tensors: NDArray[np.generic], rate: float, seed: int) -> list[float]:
    """Return the latencies, in seconds, of samples that arrive by a Poisson process for some seconds."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, max(200, int(5 * rate))))
    ended = np.zeros(len(arrivals))
    futures: list[Future[list[NDArray[np.generic]]]] = []
    start = time.perf_counter()
    for i, arrival in enumerate(arrivals):
        time.sleep(max(0.0, start + arrival - time.perf_counter()))
        future = batcher.submit([tensors[i % len(tensors)][None]])
        future.add_done_callback(lambda _, i=i: ended.__setitem__(i, time.perf_counter()))
        futures.append(future)
    for future in futures:
        future.result()
    return [float(value) for value in ended - start - arrivals]


def _taken(run: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(np.asarray(values), share))


if __name__ == "__main__":
    main()
