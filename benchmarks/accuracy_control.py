"""Compare `--max-drop` with NNCF's accuracy control: how many products stay in float32, and how long it takes.

python benchmarks/accuracy_control.py [--rounds 3]

The network is the RepMLPNet that ships, trained on scikit-learn's digits. 450 scans that it was not trained on are the
labelled images. Both quantize one OpenVINO model, with the same calibration scans, the same kind of ranges, and the
same preset and width of weights. Calibration with scans of a lower contrast than the network will see makes int8 lose
accuracy, as a badly chosen calibration set does.

NNCF gets the scans decoded, in memory; the export reads the files anew for every candidate. The time of ours is that of
the steps from the float32 graph to the artifact: quantizing, ranking, building and judging. NNCF's is that of its call.
Subjects take turns. On a busy machine the CPU time, of all threads, says more than the time. Products are Conv and
MatMul; one is in float32 if its weights are.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from repmlp_deploy import LabelledFolder, export
from repmlp_deploy.bundle import GraphRecord
from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.formats.openvino_graph import products
from repmlp_deploy.runtime.images import network_input
from repmlp_deploy.runtime.openvino.int8 import int8_kernels
from train_digits import digit_images, split_indices

CARD = "repmlp-digits"
CHECKPOINT = data_root() / "weights" / f"{CARD}.safetensors"
CALIBRATION, BATCH = 64, 50
SETTINGS = ((0.3, 0.5), (0.6, 0.5), (1.0, 0.2))
"""Contrast of the calibration scans, and points that may be lost."""


@dataclass(frozen=True)
class Found:
    """What one of the two reached.

    Attributes:
        before: right of the images with everything in int8.
        after: right of the images at the end.
        in_float32: products.
        products: in all.
        seconds: it took.
        cpu_seconds: of all threads in that time.
    """

    before: int
    after: int
    in_float32: int
    products: int
    seconds: float
    cpu_seconds: float


def _written(folder: Path, contrasts: Sequence[float]) -> Path:
    """Write the labelled folder, and a folder of calibration scans per contrast beside it."""
    images, labels = digit_images()
    training, held_out = split_indices(labels)
    for index in held_out:
        place = folder / "labelled" / str(labels[index])
        place.mkdir(parents=True, exist_ok=True)
        images[index].save(place / f"{index:04d}.png")
    for contrast in contrasts:
        place = _calibration(folder, contrast)
        place.mkdir()
        for index in training[:CALIBRATION]:
            images[index].point([int(level * contrast) for level in range(256)]).save(place / f"{index:04d}.png")
    return folder / "labelled"


def _calibration(folder: Path, contrast: float) -> Path:
    return folder / f"contrast-{contrast:g}"


def _inputs(files: Sequence[Path]) -> NDArray[np.float32]:
    how = load_card(CARD).preprocessing
    return np.stack([network_input(path, how)[0] for path in files])


def _products(xml: Path) -> tuple[int, int]:
    """Return how many products have float32 weights, and how many there are."""
    kinds = [_stored(op) for op in products(ov.Core().read_model(xml))]
    return kinds.count("f32"), len(kinds)


def _stored(product: Any) -> str:
    """Return the type of a product's weights; that of quantization if a FakeQuantize stands before them."""
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize"):
        if node.get_type_name() == "FakeQuantize":
            return "quantized"
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name())


def ours(folder: Path, contrast: float, points: float) -> Found:
    """Return what `--max-drop` reaches."""
    began: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as out:
        bundle = export(
            CHECKPOINT,
            formats="openvino",
            precision="int8",
            calibration=_calibration(folder, contrast),
            max_drop=points,
            labelled=LabelledFolder(folder / "labelled"),
            out=Path(out, "bundle"),
            progress=lambda step: began.append((step, time.process_time())),
        )
        about = bundle.artifact("openvino").record(GraphRecord).accuracy
        if about is None:
            raise AssertionError("--max-drop is recorded")
        seconds = sum(t for step, t in bundle.manifest.origin.seconds.items() if "openvino" in step)
        counts = _products(Path(out, "bundle", "model.xml"))
    cpu_seconds = sum(end - start for (step, start), (_, end) in pairwise(began) if "openvino" in step)
    before, after = (round(share * about.images) for share in (about.lowered_top1, about.top1))
    return Found(before, after, *counts, seconds, cpu_seconds)


def theirs(folder: Path, contrast: float, points: float, model: Path) -> Found:
    """Return what NNCF's accuracy control reaches on the float32 model."""
    nncf = import_module("nncf")
    ranges = import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet.MINMAX
    files = sorted((folder / "labelled").rglob("*.png"))
    inputs, labels = _inputs(files), np.array([int(path.parent.name) for path in files])
    calibration = _inputs(sorted(_calibration(folder, contrast).iterdir()))
    scores: list[int] = []

    def validate(compiled: Any, data: Iterable[int]) -> tuple[float, None]:
        chosen = np.array(list(data))
        parts = [compiled(inputs[chosen[i : i + BATCH]])[0] for i in range(0, len(chosen), BATCH)]
        right = int((np.concatenate(parts).argmax(axis=1) == labels[chosen]).sum())
        if len(chosen) == len(labels):
            scores.append(right)
        return right / len(chosen), None

    def quantized() -> Any:
        return nncf.quantize_with_accuracy_control(
            ov.Core().read_model(model),
            nncf.Dataset([{"images": image[None]} for image in calibration]),
            nncf.Dataset(list(range(len(labels)))),
            validate,
            max_drop=points / 100,
            drop_type=nncf.DropType.ABSOLUTE,
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(calibration),
            advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=ranges,
                overflow_fix=None if int8_kernels().full_range else nncf.OverflowFix.ENABLE,
            ),
        )

    with captured_output("nncf"), tempfile.TemporaryDirectory() as out:
        started = time.perf_counter(), time.process_time()
        result = quantized()
        seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        ov.save_model(result, Path(out, "model.xml"), compress_to_fp16=False)
        counts = _products(Path(out, "model.xml"))
        validate(ov.Core().compile_model(Path(out, "model.xml"), "CPU"), range(len(labels)))
    return Found(scores[1], scores[-1], *counts, seconds, cpu_seconds)  # the first score is of the float32 model


def _row(name: str, found: Sequence[Found], right: int, images: int) -> str:
    first, seconds = found[0], [one.seconds for one in found]
    drops = [100 * (right - right_now) / images for right_now in (first.before, first.after)]
    timed = f"{statistics.median(one.cpu_seconds for one in found):.1f} | {min(seconds):.1f} to {max(seconds):.1f}"
    return f"| {name} | {drops[0]:.2f} | {drops[1]:.2f} | {first.in_float32} of {first.products} | {timed} |"


def _print_ratio(what: str, ratio: Sequence[float]) -> None:
    span = f"{min(ratio):.2f} to {max(ratio):.2f}"
    print(f"\n{what} against NNCF's: median {statistics.median(ratio):.2f}, {span}", flush=True)


def main() -> None:
    """Run both on every setting, in turns, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, OpenVINO {ov.__version__}, NNCF {import_module('nncf').__version__}")
    with tempfile.TemporaryDirectory(prefix="repmlp-accuracy-") as work:
        folder = Path(work)
        labelled = _written(folder, sorted({contrast for contrast, _ in SETTINGS}))
        export(CHECKPOINT, formats="openvino", out=folder / "float32")
        model = folder / "float32" / "model.xml"
        images = len(list(labelled.rglob("*.png")))
        trained = ov.Core().compile_model(model, "CPU")
        files = sorted(labelled.rglob("*.png"))
        answers = np.concatenate([trained(_inputs(files[i : i + BATCH]))[0] for i in range(0, images, BATCH)])
        right = int((answers.argmax(axis=1) == [int(path.parent.name) for path in files]).sum())
        for contrast, points in SETTINGS:
            found: dict[str, list[Found]] = {"`--max-drop`": [], "NNCF": []}
            for _ in range(arguments.rounds):
                found["`--max-drop`"].append(ours(folder, contrast, points))
                found["NNCF"].append(theirs(folder, contrast, points, model))
            print(
                f"\nContrast {contrast:g}, at most {points:g} points of {images} images, {arguments.rounds} rounds:\n"
            )
            print("| | drop in int8 | drop at the end | products in float32 | CPU seconds, median | seconds |")
            print("|---|--:|--:|--:|--:|--:|")
            for name, those in found.items():
                print(_row(name, those, right, images), flush=True)
            pairs = list(zip(*found.values(), strict=True))
            _print_ratio("CPU time", [a.cpu_seconds / b.cpu_seconds for a, b in pairs])
            _print_ratio("Time", [a.seconds / b.seconds for a, b in pairs])


if __name__ == "__main__":
    main()
