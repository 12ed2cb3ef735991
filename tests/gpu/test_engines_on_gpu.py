"""What only a GPU can show. Each has a counterpart on the simulated GPU in tests/runtime or tests/convert.

`pytest -m gpu` runs these; each skips with what is missing, a package or a provider.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmlp_deploy import Bundle, EngineOptions, export
from repmlp_deploy.bundle import ArtifactEntry
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.convert.rework.add_engine import add_engines
from repmlp_deploy.errors import BundleError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from repmlp_deploy.runtime.tensorrt.engine import FLAVOURS
from repmlp_deploy.runtime.tensorrt.runner import TensorRTRunner

pytestmark = pytest.mark.gpu

PACKAGES = {"cuda-python": "cuda.bindings", "pycuda": "pycuda"}
CLOSE = {
    "rtol": 1e-2,
    "atol": 1e-2,
}  # beside another's answer, of the order of one; the certificate is the strict check


def require(package: str) -> None:
    """Skip unless a package is there."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module", params=list(FLAVOURS))
def engines(
    request: pytest.FixtureRequest, digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The digits network with an engine for this GPU."""
    require(FLAVOURS[request.param].module)
    folder = tmp_path_factory.mktemp(request.param) / "digits"
    export(digits_checkpoint, formats="onnx", batch="1:4:16", out=folder)
    capability = find_gpus()[0].capability
    options = EngineOptions(compute_capabilities=(capability,)) if request.param == "trt-rtx" else EngineOptions()
    return add_engines(folder, [request.param], options)


@contextmanager
def opened(bundle: Bundle, memory: str = "cuda-python", **settings: Any) -> Iterator[TensorRTRunner]:
    """A runner; for PyCUDA, where a service's context is current."""
    require(PACKAGES[memory])
    (artifact_format,) = set(bundle.manifest.artifacts) & set(FLAVOURS)
    context = None
    if memory == "pycuda":
        import pycuda.driver as cuda

        cuda.init()
        context = cuda.Device(0).retain_primary_context()
        context.push()
    try:
        options = RunnerOptions(engine=EngineSettings(memory=memory, **settings))
        runner = TensorRTRunner(bundle, options, artifact_format=artifact_format)
        try:
            yield runner
        finally:
            runner.close()
    finally:
        if context is not None:
            context.pop()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def answers(bundle: Bundle, batch: np.ndarray) -> np.ndarray:
    runner = OnnxRunner(bundle, RunnerOptions(device="cpu"))
    return np.concatenate([runner.run(batch[i : i + 16]) for i in range(0, len(batch), 16)])


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("memory", list(PACKAGES))
def test_the_engine_answers_like_the_graph_at_every_batch_size(engines: Bundle, memory: str, cuda_graphs: bool) -> None:
    with opened(engines, memory, cuda_graphs=cuda_graphs) as runner:
        for n in range(1, 17):
            for _ in range(3):  # run, captured, launched
                np.testing.assert_allclose(runner.run(images(n, n)), answers(engines, images(n, n)), **CLOSE)


def test_the_certificate_holds_at_every_batch_size(engines: Bundle) -> None:
    require("cuda.bindings")
    (artifact_format,) = set(engines.manifest.artifacts) & set(FLAVOURS)
    hops, notes = recertify(engines, artifact_format)
    measured = [hop for hop in hops if hop.name.startswith(artifact_format)]
    assert measured, notes
    assert all(hop.passed for hop in measured), measured


@pytest.mark.parametrize("memory", list(PACKAGES))
def test_thirty_two_threads_get_their_own_answers(engines: Bundle, memory: str) -> None:
    inputs = images(32 * 100)
    expected = answers(engines, inputs)
    with opened(engines, memory, workers=4) as runner, ThreadPoolExecutor(32) as pool:
        outputs = list(pool.map(lambda i: runner.run(inputs[i : i + 1])[0], range(len(inputs))))
    np.testing.assert_allclose(np.stack(outputs), expected, **CLOSE)


def test_a_tensor_of_torch_is_read_where_it_lies(engines: Bundle) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    with opened(engines) as runner:
        for n in (1, 3, 4):
            tensor = torch.from_numpy(images(n)).cuda()
            np.testing.assert_allclose(runner.run(tensor), answers(engines, images(n)), **CLOSE)


def test_a_stale_engine_is_refused_before_it_is_deserialised(engines: Bundle, tmp_path: Path) -> None:
    (artifact_format,) = set(engines.manifest.artifacts) & set(FLAVOURS)
    entry = engines.artifact(artifact_format)
    contents = {file.path: engines.read(file) for file in engines.files()}
    for i, (details, message) in enumerate(
        [({"version": "9.9.9"}, "was built by"), ({"compute_capabilities": ["5.0"]}, "is for compute capability 5.0")]
    ):
        stale = ArtifactEntry.model_validate(entry.model_dump() | details)
        manifest = engines.manifest.model_copy(
            update={"artifacts": {**engines.manifest.artifacts, artifact_format: stale}}
        )
        bundle = Bundle(manifest, contents=contents).save(tmp_path / str(i))
        with pytest.raises((BundleError, MissingDevice), match=message), opened(bundle):
            pass


def test_the_runtime_cache_is_reused(engines: Bundle) -> None:
    if "trt-rtx" not in engines.manifest.artifacts:
        pytest.skip("TensorRT compiles nothing where it runs")
    for expected in ("new", "reused"):
        with opened(engines) as runner:
            assert runner.details["runtime_cache"].endswith(expected)
            runner.run(images(4))


def test_a_timing_cache_speeds_a_rebuild(digits_checkpoint: Path, tmp_path: Path) -> None:
    require("tensorrt")
    folder = tmp_path / "digits"
    export(digits_checkpoint, formats="onnx", batch="1:4:16", out=folder)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        add_engines(folder, ["trt"], EngineOptions(timing_cache=str(tmp_path / "trt.timing")))
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 0.8 * seconds[0]


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "rtx"])
def test_onnx_runtimes_providers_run_the_graph(device: str, bundle: Bundle) -> None:
    try:
        runner = OnnxRunner(bundle, RunnerOptions(device=device))
    except (MissingDevice, MissingDependency) as error:
        pytest.skip(str(error))
    assert runner.device == device
    assert runner.details["providers"][0] != "CPUExecutionProvider"
    for n in (1, 3, 16):
        np.testing.assert_allclose(runner.run(images(n)), answers(bundle, images(n)), **CLOSE)
