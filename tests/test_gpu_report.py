"""The report of a GPU machine: what it says, and what it does where there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_report
from gpu_report import (
    Latency,
    Line,
    Record,
    calibration_samples,
    find_card,
    measure,
    measure_pytorch,
    settings_of_engines,
    to_markdown,
)
from repmlp_deploy import Bundle, get_model
from repmlp_deploy.bench.subjects.pytorch import NetworkSubject
from repmlp_deploy.card import load_card
from repmlp_deploy.convert.graph.calibrate import take_calibration
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.runtime.runner import EngineSettings
from repmlp_deploy.runtime.tensorrt.driver import Gpu
from support.fakes.machine import Machine, with_engines

ROW = ("trt-rtx on cuda", 8, 1e-6, 4e-6, True)
RECORD = Record(
    model="repmlpnet-b224",
    gpu="NVIDIA GeForce RTX 4090",
    capability="8.9",
    driver="a driver for CUDA 12.8",
    date="2026-11-26",
    platform="Linux",
    versions={"tensorrt-rtx-cu12": "1.7.1"},
    lines=(
        Line(
            "trt-rtx",
            "fp16",
            (ROW, (*ROW[:2], 3e-6, 4e-6, True)),
            (Latency(1, 0.31, 0.35, 0.139, 0.27, 0.2), Latency(8, 1, 1.2)),
        ),
        Line("trt", "fp16", reason="tensorrt is not installed"),
    ),
)


def test_the_report_says_what_ran_how_close_and_how_fast() -> None:
    text = to_markdown(RECORD)
    for said in ("RTX 4090", "capability 8.9", "CUDA 12.8", "tensorrt-rtx-cu12 1.7.1"):
        assert said in text
    assert "| trt-rtx | fp16 | 3.00e-06 / 4.00e-06 | 2 of 2 | 1 | 0.31 | 0.35 | 0.2 | 0.139 – 0.27 |" in text
    assert "|  |  |  |  | 8 | 1 | 1.2 |  |  |" in text
    assert "| trt | fp16 | not run: tensorrt is not installed |" in text
    assert RECORD.passed


@pytest.mark.parametrize(
    ("gpu", "card"),
    [("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"), ("NVIDIA L40", None)],
)
def test_a_cards_peaks_are_found_by_its_name(gpu: str, card: str | None) -> None:
    found = find_card(gpu)
    assert (None if found is None else found.name) == card


@pytest.fixture
def machine(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(with_engines(bundle, tmp_path / "digits"), "trt-rtx").install(monkeypatch)
    yield made
    made.gpu.assert_clean()


def test_an_engine_is_compared_and_timed_at_every_batch_size_it_serves(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the simulated GPU, with a clock that ticks a millisecond at every look."""
    monkeypatch.setattr(gpu_report, "CALLS", 5)
    monkeypatch.setattr(gpu_report, "WARM_UP", 1)
    ticks = count()
    line = measure(machine.bundle, "trt-rtx", "fp32", clock=lambda: 1e-3 * next(ticks))
    assert not line.reason
    assert len(line.rows) == 3
    assert all(row[4] for row in line.rows)
    assert [latency.batch for latency in line.latencies] == [1, 8]
    assert line.latencies[0].median_ms == pytest.approx(1.0)
    assert line.latencies[0].at_best_ms is None, "the roofline is another network's"


@pytest.mark.parametrize("engine", settings_of_engines(), ids=str)
def test_every_way_to_run_an_engine_is_a_line_of_its_own(
    engine: EngineSettings, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "CALLS", 2)
    monkeypatch.setattr(gpu_report, "WARM_UP", 1)
    with_engine = Machine(with_engines(bundle, tmp_path / "digits"), "trt-rtx", engine.memory).install(monkeypatch)
    line = measure(with_engine.bundle, "trt-rtx", "fp32", engine=engine)
    graphs = "CUDA graphs" if engine.cuda_graphs else "no CUDA graphs"
    assert (line.runtime, line.reason) == (f"trt-rtx, {engine.memory}, {graphs}", "")
    assert all(row[4] for row in line.rows)
    with_engine.gpu.assert_clean()


@pytest.mark.parametrize("form", ["merged", "folded"])
def test_a_network_in_pytorch_is_compared_with_the_trained_one_and_timed(
    form: str, bundle: Bundle, digits_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where its rows are those of float32."""
    monkeypatch.setattr(gpu_report, "CALLS", 2)
    monkeypatch.setattr(gpu_report, "WARM_UP", 1)
    trained = get_model("repmlp-digits")
    trained.load_state_dict(digits_state)
    merged = merge_branches(trained)
    network = fold_affine(merged) if form == "folded" else merged
    on_cpu = {"opened": lambda network, _precision: NetworkSubject(network, compiled=False)}
    line = measure_pytorch(bundle, form, network, "fp32", **on_cpu)
    assert (line.runtime, line.reason) == (f"torch {form}", "")
    assert all(row[4] for row in line.rows)
    assert [latency.batch for latency in line.latencies] == [1, 8]
    with torch.no_grad():
        next(iter(network.parameters())).mul_(1.01)
    assert not all(row[4] for row in measure_pytorch(bundle, form, network, "fp32", **on_cpu).rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch finds a GPU")
def test_pytorch_without_cuda_is_a_line_with_its_reason(bundle: Bundle) -> None:
    line = measure_pytorch(bundle, "folded", torch.nn.Linear(1, 1), "tf32")
    assert (line.runtime, line.precision) == ("torch folded", "tf32")
    assert "install a build of torch that fits the driver" in line.reason


@pytest.mark.parametrize("name", ["repmlpnet-b224", "repmlp-digits"])
def test_inputs_for_calibration_reach_as_far_as_images_do(name: str) -> None:
    """Narrower ones clip what the probe reaches: int8 and fp8 would be refused, and the report had no line of them."""
    card = load_card(name)
    samples = calibration_samples(card)
    take_calibration({"images": samples}, {"images": (3, *card.input_size)}, card.preprocessing)
    how = card.preprocessing
    ends = [(level - np.array(how.mean)) / np.array(how.std) for level in (0, 255)]
    np.testing.assert_allclose([samples.min(axis=(0, 2, 3)), samples.max(axis=(0, 2, 3))], ends, rtol=1e-5)


def test_what_cannot_run_is_a_line_with_its_reason(bundle: Bundle) -> None:
    line = measure(bundle, "onnx", "fp32", "cuda")
    assert line.runtime == "onnx on cuda"
    assert "CUDA" in line.reason or "cuda" in line.reason
    assert not line.rows


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "find_gpus", tuple)
    assert gpu_report.main(["--out", str(tmp_path / "report.md")]) == 4
    assert "finds no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 3)])
def test_a_row_that_failed_is_told_by_the_exit_code(
    passed: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line("trt", "fp32", ((*ROW[:4], passed),), (Latency(1, 1.0, 1.0),))
    for name, value in {
        "find_gpus": lambda: (Gpu("a GPU", "8.9"),),
        "driver": lambda: "a driver",
        "lines": lambda *_: iter([line]),
    }.items():
        monkeypatch.setattr(gpu_report, name, value)
    assert gpu_report.main(["--out", str(tmp_path / "report.md")]) == code
    assert (tmp_path / "report.md").read_text().startswith("# repmlpnet-b224 on a GPU")
    assert json.loads((tmp_path / "report.json").read_text())["lines"][0]["runtime"] == "trt"


def test_an_error_of_pytorch_is_a_line_and_no_pass(bundle: Bundle) -> None:
    def opened(_network: torch.nn.Module, _precision: str) -> NetworkSubject:
        raise RuntimeError("CUDA out of memory\nTried to allocate")

    line = measure_pytorch(bundle, "merged", torch.nn.Linear(1, 1), "fp32", opened=opened)
    assert line == Line("torch merged", "fp32", reason="RuntimeError: CUDA out of memory", defect=True)
    assert not Record(**{**RECORD.__dict__, "lines": (*RECORD.lines, line)}).passed


def test_an_export_that_fails_in_any_way_costs_its_own_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, precision: str, **_more: object) -> Bundle:
        raise RuntimeError(precision)

    monkeypatch.setattr(gpu_report, "export", fail)
    found = list(gpu_report.lines("repmlp-digits", "a GPU", "8.9"))
    assert [line.reason for line in found] == [f"RuntimeError: {name}" for name in gpu_report.PRECISIONS]


def test_what_was_measured_is_kept_when_the_run_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*_: object) -> Iterator[Line]:
        yield from RECORD.lines
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "find_gpus", lambda: (Gpu("a GPU", "8.9"),))
    monkeypatch.setattr(gpu_report, "driver", lambda: "a driver")
    monkeypatch.setattr(gpu_report, "lines", lines)
    with pytest.raises(KeyboardInterrupt):
        gpu_report.main(["--out", str(tmp_path / "report.md")])
    assert "tensorrt is not installed" in (tmp_path / "report.md").read_text()
    assert len(json.loads((tmp_path / "report.json").read_text())["lines"]) == len(RECORD.lines)


def test_a_report_in_which_nothing_ran_did_not_pass() -> None:
    assert not Record(**{**RECORD.__dict__, "lines": RECORD.lines[1:]}).passed


@pytest.mark.gpu
def test_on_a_gpu_the_report_is_written(tmp_path: Path) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "report.md"), "--model", "repmlp-digits"]) == 0
    assert "not run" not in (tmp_path / "report.md").read_text().partition("| trt-rtx |")[2].splitlines()[0]
