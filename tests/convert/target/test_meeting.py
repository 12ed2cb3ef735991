"""An export keeps an accuracy on labelled images: digits, calibrated with scans that are fainter than what is seen.

With faint scans the ranges are too small, so that int8 cuts off what real scans reach: the loss is real, and nothing of
it shows on the probe, which is faint too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from repmlp_deploy import Bundle, LabelledFolder, Predictor, export
from repmlp_deploy.bundle import MANIFEST, GraphRecord
from repmlp_deploy.cli import export as export_cli
from repmlp_deploy.convert.formats import onnx as onnx_format
from repmlp_deploy.convert.formats.candidate import BY_ACCURACY
from repmlp_deploy.convert.graph.lowering.lower import Lowered, set_precision
from repmlp_deploy.convert.target import meeting
from repmlp_deploy.errors import InputError
from support.commands import ends_with
from support.digit_cases import scans
from train_digits import digit_images, split_indices

FAINT = 0.3
IMAGES = 120
ALL_BUT_ONE = ("conv_embedding", "stages.*", "embeds.1", "head")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scans, in a folder per class."""
    root = tmp_path_factory.mktemp("labelled")
    images, labels = digit_images()
    for index in split_indices(labels)[1][:IMAGES]:
        (root / str(labels[index])).mkdir(exist_ok=True)
        images[index].save(root / str(labels[index]) / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training scans of a lower contrast."""
    root = tmp_path_factory.mktemp("faint")
    images, labels = digit_images()
    for index in split_indices(labels)[0][:64]:
        images[index].point([int(FAINT * level) for level in range(256)]).save(root / f"{index:04d}.png")
    return root


def right(bundle: Bundle, name: str) -> int:
    """How many of the labelled scans the artifact gets right, in the runner that services use."""
    inputs, labels = scans("repmlp-digits", IMAGES, held_out=True)
    with Predictor(bundle, format=name) as predictor:
        return int((predictor.logits(inputs).argmax(axis=1) == labels).sum())


@pytest.mark.slow
def test_a_real_drop_is_cured_in_every_format_with_few_products(
    digits_checkpoint: Path, labelled: Path, faint: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    bundle = export(
        digits_checkpoint,
        formats="onnx,openvino",
        precision="int8",
        calibration=faint,
        max_drop=0.5,
        labelled=LabelledFolder(labelled),
        out=tmp_path / "out",
        progress=said.append,
    )
    kept = {}
    for name in ("onnx", "openvino"):
        record = Bundle.load(bundle.folder).artifact(name).record(GraphRecord)
        found = record.accuracy
        assert found is not None
        assert found.trained_top1 >= 0.99
        assert 100 * (found.trained_top1 - found.lowered_top1) > 1, "the drop is real"
        assert right(bundle, name) == round(found.top1 * IMAGES), "the artifact is the one that was judged"
        assert found.drop == pytest.approx(100 * (found.trained_top1 - found.top1), abs=1e-5)
        assert found.drop <= 0.5
        assert found.images == IMAGES
        assert found.builds <= 20
        by_accuracy = [line for line in record.kept_fp32 if line.reason == BY_ACCURACY]
        assert 0 < found.products == len(by_accuracy) < sum(record.lowered.values())
        assert all(any((line.module or "").startswith(block) for block in found.kept) for line in by_accuracy)
        kept[name] = found.kept
        assert [line.block for line in record.sensitivity if line.block in found.kept]
        assert any(step.startswith(f"try {name}, 7 of 8 blocks in float32") for step in said)
        assert any(
            note.startswith(f"{name}: top-1 is ") and "points are lost" in note for note in bundle.manifest.notes
        )
    assert "conv_embedding" in kept["openvino"], "what cuts off the input must go"
    assert all(hop.passed for hop in bundle.manifest.certificate if hop.passed is not None)


def test_nothing_is_kept_where_nothing_is_lost(digits_checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """Only the least sensitive block is in int8, which no processor computes badly enough to lose a digit."""
    bundle = export(
        digits_checkpoint,
        precision="int8",
        calibration={"images": scans("repmlp-digits", 64, held_out=False)[0]},
        keep_fp32=ALL_BUT_ONE,
        max_drop=0.9,
        labelled=LabelledFolder(labelled),
        out=tmp_path / "out",
    )
    record = bundle.artifact("onnx").record(GraphRecord)
    assert record.accuracy is not None
    assert (record.accuracy.kept, record.accuracy.products, record.accuracy.builds) == ((), 0, 1)
    assert BY_ACCURACY not in {line.reason for line in record.kept_fp32}
    assert record.lowered == {"Conv": 1}
    assert record.sensitivity == (), "nobody asked which blocks are sensitive"


def test_uint8_images_in_a_fixed_batch_are_scored_too(
    digits_checkpoint: Path, labelled: Path, faint: Path, tmp_path: Path
) -> None:
    bundle = export(
        digits_checkpoint,
        precision="int8",
        input="uint8",
        batch=16,
        calibration=faint,
        max_drop=0.5,
        keep_fp32=["conv_embedding"],
        labelled=LabelledFolder(labelled),
        out=tmp_path / "out",
    )
    record = bundle.artifact("onnx").record(GraphRecord)
    assert record.accuracy is not None
    assert record.accuracy.trained_top1 >= 0.99, "levels are normalised for the trained network"
    assert record.accuracy.drop <= 0.5
    assert "conv_embedding" not in record.accuracy.kept, "the user kept it"
    assert "conv_embedding" not in {line.block for line in record.sensitivity}


def test_a_target_out_of_reach_ends_with_3_and_an_earlier_bundle_stays(  # noqa: PLR0913 - fixtures
    digits_checkpoint: Path,
    labelled: Path,
    faint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quantizer that cuts off nearly everything loses too much in every block."""

    def clipping(graph: onnx.ModelProto, precision: str, **options: object) -> Lowered:
        ranges = {name: value / 500 for name, value in options.pop("ranges").items()}
        return set_precision(graph, precision, ranges=ranges, **options)

    out = tmp_path / "out"
    export(digits_checkpoint, formats="checkpoint", out=out)
    before = (out / MANIFEST).read_bytes()
    monkeypatch.setattr(onnx_format, "set_precision", clipping)
    arguments = ("--ckpt", digits_checkpoint, "--precision", "int8", "--calibration", faint, "--out", out)
    assert ends_with(export_cli.export_command, *arguments, "--max-drop", 0.1, "--eval", labelled) == 3
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: onnx in int8 cannot keep top-1 within 0.1 points of the trained network's ")
    assert "with every block but" in last
    assert "nothing was written" in last
    assert (out / MANIFEST).read_bytes() == before


def test_what_makes_no_sense_is_refused_in_one_line(
    digits_checkpoint: Path, labelled: Path, faint: Path, tmp_path: Path
) -> None:
    whole = {"precision": "int8", "calibration": faint, "max_drop": 0.5, "labelled": LabelledFolder(labelled)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "cat").mkdir(parents=True)
    for changed, message in (
        ({"labelled": None}, "--max-drop POINTS and --eval FOLDER go together"),
        ({"max_drop": None}, "--max-drop POINTS and --eval FOLDER go together"),
        ({"max_drop": -1.0}, "--max-drop is -1; expected percentage points from 0 to 100, such as 0.5"),
        ({"max_drop": float("nan")}, "--max-drop is nan; expected percentage points"),
        ({"precision": "fp32", "calibration": None}, "--max-drop is for int8 and fp8; --precision is fp32"),
        ({"precision": "bf16", "calibration": None}, "--max-drop is for int8 and fp8; --precision is bf16"),
        ({"formats": "onnx,trt-rtx"}, "--max-drop is for onnx and openvino, which run on a CPU: drop --format trt-rtx"),
        ({"labelled": LabelledFolder(tmp_path / "none")}, "--eval .*none: no such file or folder"),
        ({"labelled": LabelledFolder(tmp_path / "empty")}, "--eval .*empty has no folders; expected one per class"),
        ({"labelled": LabelledFolder(tmp_path / "other")}, "--eval .*other has 1 class folders, none with a label"),
    ):
        with pytest.raises(InputError, match=message):
            export(digits_checkpoint, out=tmp_path / "out", **(whole | changed))
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_options(
    digits_checkpoint: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--ckpt", digits_checkpoint, "--precision", "int8", "--calibration", labelled, "--out", tmp_path / "x")
    assert ends_with(export_cli.export_command, *arguments, "--max-drop", "nan", "--eval", labelled) == 2
    assert "error: --max-drop is nan" in capsys.readouterr().err
    assert ends_with(export_cli.export_command, *arguments, "--eval", labelled) == 2
    assert "go together" in capsys.readouterr().err
    chosen = ("--max-drop", 0.9, "--eval", labelled, *(word for p in ALL_BUT_ONE for word in ("--keep-fp32", p)))
    assert ends_with(export_cli.export_command, *arguments, *chosen) == 0
    out, err = capsys.readouterr()
    assert "onnx: top-1 is " in out
    assert "warning: 120 of 120 images in --eval are calibration images, too" in err
    manifest = json.loads((tmp_path / "x" / MANIFEST).read_text())
    assert manifest["artifacts"]["onnx"]["accuracy"]["source"].endswith("folders matched by name")
    assert meeting.RANKED <= IMAGES
    assert np.isfinite(manifest["artifacts"]["onnx"]["accuracy"]["drop"])
