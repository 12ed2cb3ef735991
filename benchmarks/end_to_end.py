"""Measure a bundle from image files to classes, and what several inferences at a time give.

python benchmarks/end_to_end.py BUNDLE [--rounds 5] [--images 64] [--large 24]

Every subject is a part of this process, and they take turns in every round, so that what else keeps the machine busy
meets all of them. Rates are medians over rounds; ratios are medians of the ratios within a round. The images are JPEG
files of scikit-learn's photographs, 500x375 and 4000x3000 pixels, which are made first.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.decoding import Decoder

SMALL, LARGE = (500, 375), (4000, 3000)  # width, height

Subject = Callable[[], int]
"""Runs once and returns how many images it has done."""


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--large", type=int, default=24, help="files of 12 megapixels; 0 for none")
    given = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {usable_cpus()} cores, flags {', '.join(machine['cpu_flags'])}")
    print(f"Python {platform.python_version()}, load average when it began {os.getloadavg()[0]:.1f}\n")
    bundle = Bundle.load(given.bundle)
    with tempfile.TemporaryDirectory() as folder:
        small = photographs(Path(folder), SMALL, given.images)
        large = photographs(Path(folder), LARGE, given.large)
        with (
            Predictor(bundle, format=given.format) as latency,
            Predictor(bundle, format=given.format, streams=usable_cpus()) as throughput,
            Predictor(bundle, format=given.format, decode="fast") as fast,
            Predictor(bundle, format=given.format, decode="fast", streams=usable_cpus()) as both,
        ):
            print(f"{bundle.manifest.name}: {latency.format}, {latency.details.get('chosen', 'the only one')}\n")
            subjects = _offline(latency, throughput, small)
            if large:
                subjects |= _large(latency, fast, both, large)
            rates = _rates(subjects, given.rounds)
            _print(rates)


def photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEG files of `size`, each another part of a photograph."""
    rng, pictures = np.random.default_rng(0), load_sample_images().images
    paths = []
    for i in range(count):
        photograph = Image.fromarray(pictures[i % len(pictures)])
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


def _large(latency: Predictor, fast: Predictor, both: Predictor, files: Sequence[Path]) -> dict[str, Subject]:
    """Return the subjects that work on files of 12 megapixels."""
    images = list(files)

    def one_after_the_other() -> int:
        best = latency.manifest.batch.opt
        for start in range(0, len(images), best):
            latency.logits(np.stack([latency.preprocess(path) for path in images[start : start + best]]))
        return len(images)

    return {
        "12 MP, decoded before each batch": one_after_the_other,
        "12 MP, Predictor": lambda: len(latency(images)),
        "12 MP, Predictor, decode=fast": lambda: len(fast(images)),
        "12 MP, Predictor, decode=fast, streams": lambda: len(both(images)),
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
        ratios["12 MP, fast, streams, against the same"] = (rates["12 MP, Predictor, decode=fast, streams"], large)
        ratios["12 MP, fast, against Predictor"] = (fast, rates["12 MP, Predictor"])
    print("\n| ratio | median | range |\n|---|--:|--:|")
    for name, (ours, theirs) in ratios.items():
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"| {name} | {statistics.median(each):.2f} | {min(each):.2f} to {max(each):.2f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
