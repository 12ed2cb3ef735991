"""The benchmark on a GPU: which rows it plans, what it refuses without one, and the arithmetics of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
import torch

from repmlp_deploy.bench import worker
from repmlp_deploy.bench.members import Record
from repmlp_deploy.bench.session import run_benchmark
from repmlp_deploy.bench.settings import Settings, read_settings
from repmlp_deploy.bench.subjects import table as subjects
from repmlp_deploy.bench.subjects.cuda import DTYPES, CudaNetwork, network_in, set_float32_products
from repmlp_deploy.bench.subjects.gpu_peaks import measure_gpu_peaks
from repmlp_deploy.bench.subjects.table import ON_CUDA, chosen_rows, require_device, why_not
from repmlp_deploy.card import load_card
from repmlp_deploy.cli.bench import bench_command
from repmlp_deploy.errors import InputError, MissingDevice
from repmlp_deploy.runtime.onnx.providers import PROVIDERS
from support.commands import ends_with
from support.task_cases import random_inputs, small_network

PYTORCH = ("torch-trained", "torch-merged", "torch-folded")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that names a GPU; the packages stay those of this machine."""
    monkeypatch.setattr(subjects, "has_nvidia_gpu", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "has_nvidia_gpu", lambda: False)


@pytest.mark.usefixtures("gpu")
def test_every_pytorch_network_has_a_row_in_every_arithmetic() -> None:
    settings = read_settings(None, {"device": "cuda"})
    assert settings.precision == ON_CUDA == ("fp32", "tf32", "fp16", "bf16")
    rows = chosen_rows(settings.formats, settings.precision, settings.device)
    for name in PYTORCH:
        assert [precision for row, precision in rows if row == name] == list(ON_CUDA)
    assert [row for row in rows if row[0] == "onnx"] == [("onnx", "fp32"), ("onnx", "fp16")]
    assert {("trt", "fp16"), ("trt-rtx", "bf16"), ("onnx-merged", "fp32")} <= set(rows)
    assert not {"openvino", "torch-compile"} & {name for name, _ in rows}


def test_precisions_that_are_named_stay_and_a_cpu_has_no_tf32() -> None:
    assert read_settings(None, {"device": "cuda", "precision": "fp16"}).precision == ("fp16",)
    assert read_settings(None, {}).precision == ("fp32", "bf16")
    with pytest.raises(InputError, match="--precision"):
        chosen_rows(None, ("tf32",))
    with pytest.raises(InputError, match="--device: Input should be 'cpu' or 'cuda'; got 'gpu'"):
        read_settings(None, {"device": "gpu"})


@pytest.mark.usefixtures("gpu")
def test_a_format_that_runs_on_no_gpu_is_refused_with_those_that_do() -> None:
    with pytest.raises(InputError, match=r"--formats: openvino does not run on cuda; these do: .*trt-rtx"):
        chosen_rows(("openvino",), ("fp32",), "cuda")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_command_ends_at_once_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingDevice, match=r"^--device cuda needs an NVIDIA GPU, and \S+ finds none: run on a"):
        run_benchmark(Settings(device="cuda"), lambda _step: None)
    require_device("cpu")
    assert ends_with(bench_command, "--device", "cuda", "--json", tmp_path / "report.json") == 4
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda needs an NVIDIA GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch finds a GPU")
def test_packages_without_cuda_are_rows_with_their_reason() -> None:
    said = why_not("torch-folded", "tf32", "cuda")
    assert said is not None
    assert said.startswith(f"torch {torch.__version__} ")
    assert "install a build of torch that fits the driver" in said
    with pytest.raises(MissingDevice, match="install a build of torch"):
        CudaNetwork(torch.nn.Linear(1, 1), "fp32", compiled=False)
    with pytest.raises(MissingDevice, match="install a build of torch"):
        measure_gpu_peaks()
    if PROVIDERS["cuda"].name not in onnxruntime.get_available_providers():
        assert "ONNX Runtime here has no CUDAExecutionProvider" in str(why_not("onnx", "fp32", "cuda"))
    assert why_not("onnx", "bf16", "cuda") == "onnx computes in fp32, fp16, int8 only"


def test_a_network_gets_the_type_of_its_row_and_stays_near_the_trained_one() -> None:
    images = random_inputs((2, 3, 32, 32))
    with torch.inference_mode():
        exact = small_network("repmlpnet").double()(images)
        for precision, allowed in {"fp32": 1e-5, "tf32": 1e-5, "fp16": 1e-2, "bf16": 1e-1}.items():
            network = network_in(small_network("repmlpnet"), precision, torch.device("cpu"))
            assert {value.dtype for value in network.parameters()} == {DTYPES[precision]}
            error = (network(images.to(DTYPES[precision])).double() - exact).abs().max() / exact.abs().max()
            assert error < allowed
            assert precision in ("fp32", "tf32") or error > 1e-5


def test_tf32_is_on_for_its_own_rows_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", *DTYPES):
            set_float32_products(precision)
            expected = "tf32" if precision == "tf32" else "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == expected
            assert torch.backends.cudnn.conv.fp32_precision == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_onnx_runtime_keeps_float32_products_in_float32() -> None:
    assert PROVIDERS["cuda"].make_options(None) == {"use_tf32": "0"}


@pytest.mark.parametrize("clock", [0.25, None])
def test_times_of_the_gpus_clock_are_told_with_their_batch(
    clock: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Subject:
        proof: ClassVar = {}

        def run(self, batch: np.ndarray) -> np.ndarray:
            return batch

        def device_ms(self, batch: np.ndarray, _calls: int) -> float | None:
            return None if clock is None else clock * len(batch)

    monkeypatch.setattr(worker, "open_subject", lambda _job: Subject())
    card = load_card("repmlp-digits").model_dump()
    own = worker.Worker()
    own.load(
        {"format": "torch-folded", "precision": "tf32", "threads": 1, "card": card, "device": "cuda"}, [3, 4, 4], 1
    )
    assert own.device(batch=8) == ({} if clock is None else {"device_ms at batch 8": 2.0})
    assert Record.__dataclass_fields__["on_device"].default_factory is dict


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ON_CUDA)
def test_on_a_gpu_a_network_answers_and_is_timed(precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    images = random_inputs((2, 3, 32, 32)).float().numpy()
    with torch.inference_mode():
        expected = small_network("repmlpnet")(torch.from_numpy(images)).numpy()
    subject = CudaNetwork(small_network("repmlpnet"), precision, compiled=False)
    np.testing.assert_allclose(subject.run(images), expected, atol=0.1 * np.abs(expected).max())
    assert subject.device_ms(images, 5) > 0
    assert subject.proof["float32 products"] == ("tf32" if precision == "tf32" else "ieee")


@pytest.mark.gpu
def test_on_a_gpu_every_row_of_the_small_network_runs_or_says_why() -> None:
    report = run_benchmark(Settings(models=("repmlp-digits",), device="cuda", precision=ON_CUDA, seconds=0.2), print)
    measured = {row.name: row for row in report.rows if row.status == "measured"}
    assert {f"{name} {precision}" for name in PYTORCH for precision in ON_CUDA} <= set(measured)
    assert all(any(key.startswith("device_ms") for key in measured[f"{name} fp32"].proof) for name in PYTORCH)
