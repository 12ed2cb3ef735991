"""The runner's full sequence on a simulated GPU that executes the bundle's ONNX graph and forgives nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.errors import DeviceError, InputError
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tensorrt.worker import batch_buckets
from support.fakes.machine import FORMATS, MEMORIES, Machine, with_engines

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def engines(_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_engines(Bundle.load(_exported), tmp_path_factory.mktemp("engines") / "digits")


@pytest.fixture(params=[(f, m) for f in FORMATS for m in MEMORIES], ids="-".join)
def machine(
    request: pytest.FixtureRequest, engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    artifact_format, memory = request.param
    made = Machine(engines, artifact_format, memory).install(monkeypatch)
    made.cache = RunnerOptions(cache=tmp_path / "cache")
    yield made
    made.gpu.assert_clean()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def answers(bundle: Bundle, batch: np.ndarray) -> np.ndarray:
    runner = OnnxRunner(bundle, RunnerOptions(device="cpu", threads=1))
    return np.concatenate([runner.run(batch[i : i + 16]) for i in range(0, len(batch), 16)])


def test_the_engine_answers_like_the_graph_at_every_batch_size(machine: Machine) -> None:
    runner = machine.open(machine.cache)
    for n in range(1, 17):
        batch = images(n, seed=n)
        for _ in range(2):  # a graph is captured at the first, launched at the second
            np.testing.assert_allclose(runner.run(batch), answers(machine.bundle, batch), **CLOSE)
    runner.close()


@pytest.mark.parametrize("artifact_format", FORMATS)
def test_the_predictor_pads_splits_and_passes_its_self_check(
    artifact_format: str,
    _exported: Path,  # noqa: PT019 - its value is used
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = with_engines(Bundle.load(_exported), tmp_path / "digits")
    machine = Machine(bundle, artifact_format).install(monkeypatch)
    with Predictor(bundle, format=artifact_format) as predictor:
        predictor.self_check()
        batch = images(37)
        np.testing.assert_allclose(predictor.logits(batch), answers(bundle, batch), **CLOSE)
        assert (predictor.format, predictor.device) == (artifact_format, "cuda")
    machine.gpu.assert_clean()


def test_outputs_are_the_callers_own(machine: Machine) -> None:
    runner = machine.open(machine.cache, workers=1)
    first = runner.run(images(4, seed=1))
    kept = first.copy()
    runner.run(images(4, seed=2))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable, and nobody else's
    runner.close()
    assert first.flags.owndata


def test_the_input_is_not_modified_and_need_not_be_contiguous(machine: Machine) -> None:
    runner = machine.open(machine.cache)
    batch = images(8)
    strided, before = batch[::2], batch.copy()
    np.testing.assert_allclose(runner.run(strided), answers(machine.bundle, batch)[::2], **CLOSE)
    np.testing.assert_array_equal(batch, before)
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_sixteen_threads_get_their_own_answers(machine: Machine, cuda_graphs: bool) -> None:
    """16 threads × 500 requests, all inputs distinct: none is wrong, none is lost."""
    threads, requests = 16, 500 if cuda_graphs else 20  # the other way has no more of its own than the batches above
    inputs = images(threads * requests)
    expected = answers(machine.bundle, inputs)
    assert len(np.unique(np.round(expected, 2), axis=0)) == len(expected)
    runner = machine.open(machine.cache, workers=4, cuda_graphs=cuda_graphs)
    outputs = np.full_like(expected, np.nan)

    def serve(thread: int) -> int:
        for i in range(thread, len(inputs), threads):
            outputs[i] = runner.run(inputs[i : i + 1])[0]
        return thread

    with ThreadPoolExecutor(threads) as pool:
        assert sorted(pool.map(serve, range(threads))) == list(range(threads))
    np.testing.assert_allclose(outputs, expected, **CLOSE)
    runner.close()


def test_no_more_workers_than_allowed_run_at_a_time(machine: Machine) -> None:
    """With one worker, memory is had once; the second thread waits for the first."""
    runner = machine.open(machine.cache, workers=1)
    runner.run(images(1))
    streams = len(machine.gpu._streams)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: runner.run(images(2, seed)), range(32)))
    assert len(machine.gpu._streams) == streams
    runner.close()


def test_a_closed_runner_refuses_and_closes_twice(machine: Machine) -> None:
    runner = machine.open(machine.cache)
    runner.run(images(1))
    runner.close()
    runner.close()
    with pytest.raises(InputError, match="the runner was closed"):
        runner.run(images(1))


def test_closing_waits_for_what_runs(machine: Machine) -> None:
    runner = machine.open(machine.cache, workers=1)
    started, results = threading.Event(), []
    machine.gpu.on_execute = started.set
    thread = threading.Thread(target=lambda: results.append(runner.run(images(16))))
    thread.start()
    assert started.wait(10)
    runner.close()
    thread.join(10)
    np.testing.assert_allclose(results[0], answers(machine.bundle, images(16)), **CLOSE)


def test_a_worker_that_failed_is_replaced(machine: Machine) -> None:
    """A failure on the device is reported; the next request gets another worker and a right answer."""
    runner = machine.open(machine.cache, workers=1)

    def fail() -> None:
        machine.gpu.on_execute = lambda: None
        raise DeviceError("the device fell over")

    machine.gpu.on_execute = fail
    with pytest.raises(DeviceError, match="fell over"):
        runner.run(images(1))
    np.testing.assert_allclose(runner.run(images(1)), answers(machine.bundle, images(1)), **CLOSE)
    runner.close()


def test_a_gpu_without_room_says_so_and_keeps_nothing(machine: Machine) -> None:
    runner = machine.open(machine.cache)
    call = {"cuda-python": "cudaMalloc", "pycuda": "mem_alloc"}[machine.memory]
    machine.gpu.failing[call] = 2
    with pytest.raises(DeviceError, match="out of memory"):
        runner.run(images(1))
    machine.gpu.failing.clear()
    np.testing.assert_allclose(runner.run(images(1)), answers(machine.bundle, images(1)), **CLOSE)
    runner.close()


class TestDeviceArrays:
    """Inputs that already lie on the device."""

    class Array:
        """What torch, CuPy and PyCUDA offer of an array."""

        def __init__(self, machine: Machine, value: np.ndarray, offset: int = 0, **interface: object) -> None:
            self._gpu = machine.gpu
            self.address = machine.gpu.allocate(value.nbytes + offset)
            _, memory = machine.gpu.find(self.address + offset, value.nbytes)
            memory[:] = value.reshape(-1).view(np.uint8)
            self.__cuda_array_interface__ = {
                "shape": value.shape,
                "typestr": value.dtype.str,
                "data": (self.address + offset, False),
                "version": 3,
                "stream": None,
                **interface,
            }

        def free(self) -> None:
            self._gpu.free(self.address)

    def test_they_are_read_where_they_lie(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = machine.open(machine.cache)
        copies: list[int] = []
        copy_in = machine.gpu.copy_in
        monkeypatch.setattr(machine.gpu, "copy_in", lambda *args: copies.append(1) or copy_in(*args))
        monkeypatch.setattr(machine.gpu, "copy_within", lambda *_args: pytest.fail("a copy on the device"))
        for n in (3, 4, 4):
            array = self.Array(machine, images(n))
            np.testing.assert_allclose(runner.run(array), answers(machine.bundle, images(n)), **CLOSE)
            array.free()
        assert not copies
        # host arrays afterwards go through the worker's own buffers again
        np.testing.assert_allclose(runner.run(images(4, 9)), answers(machine.bundle, images(4, 9)), **CLOSE)
        assert copies
        runner.close()

    def test_an_unaligned_address_is_copied_on_the_device(self, machine: Machine) -> None:
        runner = machine.open(machine.cache)
        array = self.Array(machine, images(2), offset=4)
        np.testing.assert_allclose(runner.run(array), answers(machine.bundle, images(2)), **CLOSE)
        array.free()
        runner.close()

    @pytest.mark.parametrize("version", [2, 3])
    def test_their_producer_is_waited_for(self, machine: Machine, version: int) -> None:
        """Version 3 names the stream; before it, the default stream is meant."""
        runner = machine.open(machine.cache)
        producer = machine.gpu.create_stream() if version == 3 else 1
        array = self.Array(machine, np.zeros_like(images(2)), version=version, stream=producer)
        if version == 2:
            del array.__cuda_array_interface__["stream"]
        source = machine.gpu.allocate_pinned(images(2).nbytes)
        source[:] = images(2).reshape(-1).view(np.uint8)
        machine.gpu.copy_in(array.address, source.ctypes.data, source.nbytes, producer)
        np.testing.assert_allclose(runner.run(array), answers(machine.bundle, images(2)), **CLOSE)
        machine.gpu.synchronize(producer)
        machine.gpu.free_pinned(source.ctypes.data)
        if version == 3:
            machine.gpu.destroy_stream(producer)
        array.free()
        runner.close()

    @pytest.mark.parametrize(
        ("interface", "message"),
        [
            ({"strides": (12288, 4, 128, 4)}, "C-contiguous"),
            ({"typestr": "<f2"}, "is float16; the engine takes float32"),
            ({"shape": (2, 3, 16, 64)}, r"is \(2, 3, 16, 64\); the engine takes \(N, 3, 32, 32\)"),
            ({"stream": 0}, "stream 0"),
            ({"mask": object()}, "masked"),
        ],
    )
    def test_those_that_an_engine_cannot_read_are_refused(
        self, machine: Machine, interface: dict[str, object], message: str
    ) -> None:
        runner = machine.open(machine.cache)
        array = self.Array(machine, images(2), **interface)
        with pytest.raises(InputError, match=message):
            runner.run(array)
        array.free()
        runner.close()

    def test_explicit_strides_of_a_contiguous_array_are_fine(self, machine: Machine) -> None:
        runner = machine.open(machine.cache)
        array = self.Array(machine, images(1), strides=(77, 4096, 128, 4))  # a single sample has no batch stride
        np.testing.assert_allclose(runner.run(array), answers(machine.bundle, images(1)), **CLOSE)
        array.free()
        runner.close()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((0, 3, 32, 32), np.float32), "batch is 0; the engine serves 1 to 16"),
        (np.zeros((17, 3, 32, 32), np.float32), "batch is 17; the engine serves 1 to 16"),
        (np.zeros((1, 3, 32, 33), np.float32), r"images is \(1, 3, 32, 33\); the engine takes \(N, 3, 32, 32\)"),
        (np.zeros((1, 3, 32, 32), np.float64), "images is float64; the engine takes float32"),
        ([[1.0]], "images is list; expected a NumPy array"),
    ],
)
def test_inputs_that_are_not_the_networks_are_refused(machine: Machine, batch: object, message: str) -> None:
    runner = machine.open(machine.cache)
    with pytest.raises(InputError, match=message):
        runner.run_all(batch)
    with pytest.raises(InputError, match="2 inputs are given; the engine has 1"):
        runner.run_all(batch, batch)
    runner.close()


def test_details_say_what_runs(machine: Machine) -> None:
    runner = machine.open(machine.cache)
    assert runner.details["memory"] == machine.memory
    assert runner.details["compute_capability"] == "8.6"
    expected = {
        ("trt", "cuda-python"): "captured at batch 1, 2, 4, 8, 16",
        ("trt", "pycuda"): "off: pycuda captures none",
        ("trt-rtx", "cuda-python"): "captured by TensorRT-RTX",
        ("trt-rtx", "pycuda"): "captured by TensorRT-RTX",
    }
    assert runner.details["cuda_graphs"] == expected[machine.format, machine.memory]
    assert ("runtime_cache" in runner.details) == (machine.format == "trt-rtx")
    runner.close()
    runner = machine.open(machine.cache, cuda_graphs=False)
    assert runner.details["cuda_graphs"] == "off"
    runner.close()


class TestGraphs:
    """CUDA graphs that a worker captures itself."""

    @pytest.fixture
    def machine(self, engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
        made = Machine(engines, "trt", "cuda-python").install(monkeypatch)
        yield made
        made.gpu.assert_clean()

    def test_a_bucket_is_captured_once_and_launched_afterwards(self, machine: Machine) -> None:
        runner = machine.open(workers=1)
        launched: list[int] = []
        launch = machine.gpu.launch
        machine.gpu.launch = lambda graph, stream: launched.append(graph) or launch(graph, stream)
        for n in (4, 4, 3, 4, 16, 3, 16):
            np.testing.assert_allclose(runner.run(images(n)), answers(machine.bundle, images(n)), **CLOSE)
        assert len(launched) == 3  # not for the first of its size, and not for 3, which is no bucket
        assert len(set(launched)) == 2
        runner.close()

    def test_an_engine_that_cannot_be_captured_runs_without(self, machine: Machine) -> None:
        machine.gpu.refuses_capture = True
        runner = machine.open(workers=1)
        for _ in range(2):
            np.testing.assert_allclose(runner.run(images(4)), answers(machine.bundle, images(4)), **CLOSE)
        assert runner.details["cuda_graphs"].startswith("off: TensorRT refuses the inference")
        runner.close()

    def test_off_means_off(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine.gpu, "begin_capture", lambda *_args: pytest.fail("captured"))
        runner = machine.open(cuda_graphs=False)
        runner.run(images(4))
        runner.close()

    def test_buckets_are_the_ends_the_best_and_powers_of_two(self) -> None:
        assert batch_buckets(3, 24, [6]) == {3, 4, 6, 8, 16, 24}
        assert batch_buckets(8, 8, [8]) == {8}


def test_several_profiles_serve_their_batches(
    _exported: Path,  # noqa: PT019 - its value is used
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tightest profile that fits is taken; going back and forth forgets no shape."""
    profiles = [
        {"images": [[n, 3, 32, 32] for n in (1, 8, 16)]},
        {"images": [[n, 3, 32, 32] for n in (1, 1, 2)]},
    ]
    bundle = with_engines(Bundle.load(_exported), tmp_path / "digits", profiles=profiles)
    machine = Machine(bundle).install(monkeypatch)
    runner = machine.open(workers=1)
    assert [runner._loaded.find_profile(n) for n in (1, 2, 3, 16, 17)] == [1, 1, 0, 0, None]
    for n in (1, 16, 2, 3, 5, 1):
        np.testing.assert_allclose(runner.run(images(n)), answers(bundle, images(n)), **CLOSE)
    runner.close()
    machine.gpu.assert_clean()


def test_pycuda_leaves_the_services_context_as_it_was(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(engines, "trt", "pycuda").install(monkeypatch)
    runner = machine.open()
    driver = sys.modules["pycuda.driver"]
    assert driver.Context.get_current() is None
    with machine.context():
        own = driver.Context.get_current()
        runner.run(images(1))
        assert driver.Context.get_current() is own
    runner.close()
    machine.gpu.assert_clean()
