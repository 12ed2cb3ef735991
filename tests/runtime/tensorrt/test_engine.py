"""Engines that do not fit are refused from the manifest, before anything native sees the file."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.errors import BundleError, InputError, MissingDependency, MissingDevice, RepMLPError
from repmlp_deploy.runtime.choice import open_runner
from repmlp_deploy.runtime.runner import RunnerOptions
from support.fakes.gpu import Gpu
from support.fakes.machine import FORMATS, Machine, with_engines

SHAPES = [[n, 3, 32, 32] for n in (1, 4, 16)]


@pytest.fixture
def source(_exported: Path) -> Bundle:
    return Bundle.load(_exported)


def refusal(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    artifact_format: str = "trt",
    *,
    gpu: Gpu | None = None,
    versions: dict[str, str] | None = None,
) -> RepMLPError:
    """Why the engine is refused: one line, and nothing was deserialised."""
    machine = Machine(bundle, artifact_format, gpu=gpu or Gpu())
    machine.versions.update(versions or {})
    machine.install(monkeypatch)
    with pytest.raises(RepMLPError) as error:
        machine.open()
    assert "deserialize" not in machine.gpu.calls
    assert "\n" not in str(error.value)
    machine.gpu.assert_clean()
    return error.value


def accepted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, artifact_format: str = "trt", **machine: Any) -> bool:
    made = Machine(bundle, artifact_format, **machine).install(monkeypatch)
    made.open(RunnerOptions(cache=bundle.folder.parent / "cache")).close()
    made.gpu.assert_clean()
    return True


def test_a_file_that_was_changed(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_engines(source, tmp_path / "digits")
    file = bundle.folder / bundle.artifact("trt").path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    # the modules are made of the bundle as it was
    pristine = Machine(with_engines(source, tmp_path / "pristine")).install(monkeypatch)
    pristine.bundle = Bundle.load(bundle.folder)
    with pytest.raises(BundleError, match="its sha256 is not the manifest's"):
        pristine.open()
    assert "deserialize" not in pristine.gpu.calls


@pytest.mark.parametrize("artifact_format", FORMATS)
def test_an_engine_of_the_other_flavour(
    artifact_format: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FORMATS[1 - FORMATS.index(artifact_format)]
    error = refusal(with_engines(source, tmp_path / "digits", flavour=other), monkeypatch, artifact_format)
    assert str(error).startswith(f"the {artifact_format} artifact is an engine of {other}; ")
    assert isinstance(error, BundleError)


@pytest.mark.parametrize("artifact_format", FORMATS)
@pytest.mark.parametrize("version", ["10.14.1.48", "1.8.0.1", "10.13.2.7"])
def test_an_engine_of_another_version(
    artifact_format: str, version: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(
        with_engines(source, tmp_path / "digits"), monkeypatch, artifact_format, versions={artifact_format: version}
    )
    assert f"this machine has {version}: install that version, or build" in str(error)


def test_a_version_compatible_engine_runs_in_later_ones_of_its_major(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_engines(source, tmp_path / "digits", options={"version_compatible": True})
    assert accepted(bundle, monkeypatch, versions={"trt": "10.14.1.48", "trt-rtx": "1.7.1.116"})
    for version in ("10.12.0.1", "11.0.0.1"):
        assert "was built by tensorrt 10.13.2.6" in str(refusal(bundle, monkeypatch, versions={"trt": version}))


@pytest.mark.parametrize(
    ("artifact_format", "targets", "capability", "remedy"),
    [
        ("trt", ["8.6"], (8, 9), "is for compute capability 8.6; this GPU has 8.9: build it on this machine"),
        ("trt", ["9.0"], (8, 6), "is for compute capability 9.0; this GPU has 8.6: build it on this machine"),
        ("trt-rtx", ["8.9", "12.0"], (8, 6), "8.9, 12.0; this GPU has 8.6: build it with --compute-capability 8.6"),
        ("trt-rtx", None, (7, 5), "8.0 and later; this GPU has 7.5: build it with --compute-capability 7.5"),
    ],
)
def test_an_engine_for_other_gpus(  # noqa: PLR0913 - fixtures and cases
    artifact_format: str,
    targets: list[str] | None,
    capability: tuple[int, int],
    remedy: str,
    source: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = with_engines(source, tmp_path / "digits", compute_capabilities=targets)
    error = refusal(bundle, monkeypatch, artifact_format, gpu=Gpu(capability=capability))
    assert remedy in str(error)
    assert isinstance(error, MissingDevice)


def test_engines_for_several_gpus_run_on_each(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = with_engines(source, tmp_path / "several", compute_capabilities=["8.6", "12.0"])
    assert accepted(several, monkeypatch, "trt-rtx", gpu=Gpu(capability=(12, 0)))
    hardware = with_engines(source, tmp_path / "hardware", options={"hardware_compatible": True})
    assert accepted(hardware, monkeypatch, "trt", gpu=Gpu(capability=(12, 0)))
    assert "8.0 and later" in str(refusal(hardware, monkeypatch, "trt", gpu=Gpu(capability=(7, 5))))


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([{"images": [*SHAPES[:2], [8, 3, 32, 32]]}], "profiles serve batches 1 to 8; the bundle says 1 to 16"),
        ([{"images": [[n, 3, 64, 64] for n in (1, 4, 16)]}], r"is for images (4, 3, 64, 64); repmlp-digits takes"),
        ([{"pictures": SHAPES}], "is for pictures (4, 3, 32, 32); repmlp-digits takes images (N, 3, 32, 32)"),
        ([{"images": SHAPES, "masks": SHAPES}], "is for images (4, 3, 32, 32), masks"),
        ([{}], "export again"),
    ],
)
def test_a_profile_that_is_not_the_bundles(
    profiles: list[Any], message: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in str(refusal(with_engines(source, tmp_path / "digits", profiles=profiles), monkeypatch))


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"profiles": []}, "trt artifact: profiles: "),
        ({"profiles": [{"images": [[1], [2]]}]}, "trt artifact: profiles.0.images"),
        ({"profiles": [{"images": [[], [], []]}]}, "trt artifact: profiles.0.images.0"),
        ({"version": 10}, "trt artifact: version: "),
        ({"flavour": None}, "trt artifact: flavour: "),
    ],
)
def test_a_manifest_that_says_nothing_usable(
    details: dict[str, Any], message: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_engines(source, tmp_path / "digits")
    machine = Machine(bundle).install(monkeypatch)
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["artifacts"]["trt"].update(details)
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    machine.bundle = Bundle.load(bundle.folder)
    with pytest.raises(BundleError) as error:
        machine.open()
    assert message in str(error.value)
    assert "deserialize" not in machine.gpu.calls


def test_an_engine_that_tensorrt_refuses(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(with_engines(source, tmp_path / "digits")).install(monkeypatch)
    sys.modules["tensorrt"].Runtime.deserialize_cuda_engine = lambda runtime, _plan: runtime._logger.log(
        sys.modules["tensorrt"].ILogger.ERROR, "Error Code 6: the engine is corrupt\nand more"
    )
    with pytest.raises(
        BundleError, match=r"tensorrt 10.13.2.6 refuses the engine: Error Code 6: the engine is corrupt$"
    ):
        machine.open()


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("get_tensor_name", lambda _engine, index: ["pixels", "logits"][index], "the engine has input pixels, output"),
        ("get_tensor_shape", lambda _engine, _name: (-1, 3, 64, 64), r"is float \(-1, 3, 64, 64\); the manifest says"),
        (
            "get_tensor_profile_shape",
            lambda _engine, _name, _index: [(1, 3, 32, 32), (8, 3, 32, 32), (16, 3, 32, 32)],
            "profiles are not those of the manifest",
        ),
        ("num_optimization_profiles", 2, "profiles are not those of the manifest"),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says(  # noqa: PLR0913 - fixtures and cases
    method: str, value: Any, message: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(with_engines(source, tmp_path / "digits")).install(monkeypatch)
    engine = sys.modules["tensorrt"].ICudaEngine
    monkeypatch.setattr(engine, method, value)
    if method == "get_tensor_name":
        modes = sys.modules["tensorrt"].TensorIOMode
        monkeypatch.setattr(
            engine, "get_tensor_mode", lambda _e, name: modes.OUTPUT if name == "logits" else modes.INPUT
        )
    with pytest.raises(BundleError, match=message):
        machine.open()


@pytest.mark.parametrize(("memory", "says"), [("cuda-python", "CUDA error 35"), ("pycuda", "cuInit failed")])
def test_no_driver(memory: str, says: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(with_engines(source, tmp_path / "digits"), memory=memory).install(monkeypatch)
    machine.gpu.devices = 0
    machine.context = nullcontext
    with pytest.raises(MissingDevice, match=f"no usable NVIDIA driver.*{says}.*install or update the driver"):
        machine.open()


def test_no_such_device(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_engines(source, tmp_path / "digits")
    machine = Machine(bundle).install(monkeypatch)
    with pytest.raises(MissingDevice, match="CUDA has no device 3; it has 1"):
        machine.open(device=3)
    machine = Machine(bundle, memory="pycuda").install(monkeypatch)
    with pytest.raises(MissingDevice, match="current PyCUDA context is not on device 3"):
        machine.open(device=3)


def test_pycuda_without_a_context_to_join(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It creates none: a second context beside the service's would share nothing with it."""
    machine = Machine(with_engines(source, tmp_path / "digits"), memory="pycuda").install(monkeypatch)
    machine.context = nullcontext
    with pytest.raises(MissingDevice, match="no PyCUDA context is current in this thread"):
        machine.open()


@pytest.mark.parametrize(
    ("absent", "extra"),
    [("tensorrt", "trt"), ("cuda.bindings", "rtx"), ("pycuda.driver", "pycuda")],
)
def test_a_missing_package_names_its_extra(
    absent: str, extra: str, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = "pycuda" if extra == "pycuda" else "cuda-python"
    machine = Machine(with_engines(source, tmp_path / "digits"), memory=memory).install(monkeypatch)
    machine.context = nullcontext
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setitem(sys.modules, f"{absent}.runtime", None)
    with pytest.raises(MissingDependency, match=rf'pip install "repmlp-deploy\[{extra}\]"'):
        machine.open()


@pytest.mark.parametrize(
    ("options", "memory", "workers", "message"),
    [
        (RunnerOptions(device="cpu"), "cuda-python", 1, "device is 'cpu'; trt engines run on cuda"),
        (RunnerOptions(), "cuda-python", 0, "workers is 0; it must be at least 1"),
        (RunnerOptions(), "cupy", 1, "'cupy'; expected one of cuda-python, pycuda"),
    ],
)
def test_unusable_options(  # noqa: PLR0913 - fixtures and cases
    options: RunnerOptions,
    memory: str,
    workers: int,
    message: str,
    source: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(with_engines(source, tmp_path / "digits"), memory=memory).install(monkeypatch)
    with pytest.raises(InputError, match=message):
        machine.open(options, workers=workers)


def test_the_real_engine_is_refused_on_a_machine_without_a_gpu(source: Bundle) -> None:
    """With the real packages: one line that names a package or the driver, and no native call."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has what the test lacks")
    with pytest.raises((MissingDevice, MissingDependency)) as error:
        open_runner(source, "trt-rtx", RunnerOptions())
    assert "\n" not in str(error.value)


def test_the_runner_needs_neither_torch_nor_onnx(source: Bundle, tmp_path: Path) -> None:
    """The whole sequence in a process where they, and what converts, cannot be imported."""
    bundle = with_engines(source, tmp_path / "digits")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
import pytest
absent = ("torch", "onnx", "onnxscript", "onnxsim", "repmlp_deploy.convert", "repmlp_deploy.nets")
sys.modules.update(dict.fromkeys(absent))
import numpy as np
from support.fakes.machine import Machine
from repmlp_deploy import Bundle
with pytest.MonkeyPatch.context() as patch:
    machine = Machine(Bundle.load({str(bundle.folder)!r})).install(patch)
    runner = machine.open()
    print(runner.run(np.zeros((2, 3, 32, 32), np.float32)).shape)
    runner.close()
    machine.gpu.assert_clean()
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.stdout.strip() == "(2, 10)", child.stderr
