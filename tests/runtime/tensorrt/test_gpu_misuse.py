"""What the runner must not do is planted, one misuse at a time: the simulated GPU catches every one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.errors import RepMLPError
from repmlp_deploy.runtime.tensorrt import worker as tensorrt_worker
from repmlp_deploy.runtime.tensorrt.engine import LoadedEngine
from repmlp_deploy.runtime.tensorrt.runner import TensorRTRunner
from repmlp_deploy.runtime.tensorrt.worker import Contexts, Worker
from support.fakes.gpu import Gpu, Misuse
from support.fakes.machine import MEMORIES, Machine, with_engines


@pytest.fixture(scope="module")
def engines(_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_engines(Bundle.load(_exported), tmp_path_factory.mktemp("engines") / "digits")


@pytest.fixture(params=MEMORIES)
def machine(request: pytest.FixtureRequest, engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(engines, "trt", request.param).install(monkeypatch)


@pytest.fixture
def runner(machine: Machine) -> Iterator[TensorRTRunner]:
    """With one worker that has served a request and captures no graphs."""
    opened = machine.open(workers=1, cuda_graphs=False)
    opened.run(images(2))
    yield opened
    with suppress(Misuse, RepMLPError):
        opened.close()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def the_worker(runner: TensorRTRunner) -> Worker:
    (worker,) = runner._pool._idle
    return worker


@contextmanager
def caught(machine: Machine, message: str) -> Iterator[None]:
    """The misuse is raised, or at least kept: cleaning up after a failure swallows what comes second."""
    with suppress(Misuse, RepMLPError):
        yield
    assert any(message in misuse for misuse in machine.gpu.misuses), machine.gpu.misuses
    with pytest.raises(Misuse):
        machine.gpu.assert_clean()


def test_a_copy_on_another_stream(machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = runner._memory
    with memory.active():
        other = memory.create_stream()
    copy_out = memory.copy_out
    monkeypatch.setattr(memory, "copy_out", lambda target, address, _stream: copy_out(target, address, other))
    with caught(machine, "wrong stream: copy out"):
        runner.run(images(2))


def test_an_inference_on_another_stream(
    machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runner._memory.active():
        other = runner._memory.create_stream()
    execute = tensorrt_worker._Bound.execute
    monkeypatch.setattr(tensorrt_worker._Bound, "execute", lambda bound, _stream: execute(bound, other))
    with caught(machine, "wrong stream: inference"):
        runner.run(images(2))


def test_a_stream_that_was_destroyed(machine: Machine, runner: TensorRTRunner) -> None:
    machine.gpu.destroy_stream(the_worker(runner)._stream)
    with caught(machine, "does not exist: destroyed"):
        runner.run(images(2))


@pytest.mark.parametrize("name", ["images", "logits"])
def test_a_buffer_that_was_freed(machine: Machine, runner: TensorRTRunner, name: str) -> None:
    machine.gpu.free(the_worker(runner)._device[name])
    with caught(machine, "no live device memory"):
        runner.run(images(2))


def test_a_buffer_that_is_freed_while_it_is_used(
    machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = the_worker(runner)
    monkeypatch.setattr(runner._memory, "synchronize", lambda _stream: runner._memory.free(worker._device["images"]))
    with caught(machine, "that pending work uses"):
        runner.run(images(2))


def test_an_address_that_was_not_set(machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    the_worker(runner)._bound = tensorrt_worker._Bound(runner._pool._contexts.create(None), runner._loaded)
    prepare = tensorrt_worker._Bound.prepare
    monkeypatch.setattr(
        tensorrt_worker._Bound,
        "prepare",
        lambda bound, batch, addresses, stream: prepare(bound, batch, {"images": addresses["images"]}, stream),
    )
    with caught(machine, "address of logits was not set"):
        runner.run(images(2))


def test_a_misaligned_address(machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = tensorrt_worker._Bound.prepare
    monkeypatch.setattr(
        tensorrt_worker._Bound,
        "prepare",
        lambda bound, batch, addresses, stream: prepare(bound, batch, {"images": addresses["images"] + 4}, stream),
    )
    with caught(machine, "is not aligned"):
        runner.run(images(2))


def test_a_shape_outside_the_profile(machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's own check taken out: the context is asked for a batch that nobody built for."""
    monkeypatch.setattr(LoadedEngine, "find_profile", lambda _loaded, _batch: 0)
    worker = the_worker(runner)
    with caught(machine, "outside the profile"):
        worker._bound.prepare(17, worker._device, worker._stream)


def test_two_threads_on_one_context(machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool taken out: the second thread comes while the first one's inference is under way."""
    worker = the_worker(runner)

    def meet(_stream: int) -> None:
        monkeypatch.undo()
        thread = threading.Thread(target=_quietly, args=(worker.run, [images(3)], 3))
        thread.start()
        thread.join()

    monkeypatch.setattr(runner._memory, "synchronize", meet)
    with caught(machine, "two threads use one execution context"):
        worker.run([images(2)], 2)


def _quietly(act: Callable[..., object], *arguments: object) -> None:
    with suppress(Misuse, RepMLPError):
        act(*arguments)


def test_an_output_that_is_read_before_synchronising(
    machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read too early is NaN; the next request writes where a copy still reads, and that is caught."""
    monkeypatch.setattr(runner._memory, "synchronize", lambda _stream: None)
    assert np.isnan(runner.run(images(2, seed=1))).all()
    with caught(machine, "pinned memory was written to before its copy to the device had run"):
        runner.run(images(2, seed=2))


def test_a_double_free(machine: Machine, runner: TensorRTRunner) -> None:
    machine.gpu.free(the_worker(runner)._device["images"])
    with caught(machine, "double free"):
        runner.close()


@pytest.mark.parametrize("what", ["free", "free_pinned", "destroy_stream"])
def test_a_leak_at_close(machine: Machine, runner: TensorRTRunner, what: str) -> None:
    """Nothing is raised where something is forgotten: the check at the end tells."""
    held = the_worker(runner)._held
    for i, (is_sync, callback) in enumerate(list(held._exit_callbacks)):
        if getattr(callback.__wrapped__, "__name__", "").strip("_") == what:
            held._exit_callbacks[i] = (is_sync, lambda *_error: None)
    runner.close()
    with pytest.raises(Misuse, match="leak"):
        machine.gpu.assert_clean()


def test_a_context_that_outlives_the_runner(machine: Machine, runner: TensorRTRunner) -> None:
    kept = the_worker(runner)._bound
    runner.close()
    with pytest.raises(Misuse, match=r"leak.*IExecutionContext"):
        machine.gpu.assert_clean()
    del kept


def test_a_stream_destroyed_with_work_pending(
    machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._memory, "synchronize", lambda _stream: None)
    runner.run(images(2))
    with caught(machine, "that pending work uses"):
        runner.close()


def test_host_code_in_an_engine(machine: Machine) -> None:
    module = sys.modules["tensorrt"]

    class Logger(module.ILogger):
        def log(self, severity: object, msg: str) -> None: ...

    with caught(machine, "host code"):
        module.Runtime(Logger()).engine_host_code_allowed = True


class TestCapture:
    """With graphs, which the cuda-python back end captures."""

    @pytest.fixture
    def machine(self, engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> Machine:
        return Machine(engines, "trt", "cuda-python").install(monkeypatch)

    @pytest.fixture
    def runner(self, machine: Machine) -> Iterator[TensorRTRunner]:
        opened = machine.open(workers=1)
        opened.run(images(2))
        yield opened
        with suppress(Misuse, RepMLPError):
            opened.close()

    def test_an_allocation_while_capturing(self, machine: Machine, runner: TensorRTRunner) -> None:
        memory = runner._memory
        with caught(machine, "allocation of device memory while a thread-local capture is going on"):
            memory.capture(the_worker(runner)._stream, lambda: memory.allocate(1))

    def test_a_global_capture_beside_a_worker_that_allocates(self, machine: Machine, runner: TensorRTRunner) -> None:
        """Why the back end captures thread-locally."""
        memory, stream = runner._memory, the_worker(runner)._stream
        machine.gpu.begin_capture(stream, "global")
        with caught(machine, "while a global capture is going on"):
            thread = threading.Thread(target=lambda: _quietly(memory.allocate, 1))
            thread.start()
            thread.join()
        machine.gpu.end_capture(stream)

    def test_a_synchronisation_while_capturing(self, machine: Machine, runner: TensorRTRunner) -> None:
        memory, stream = runner._memory, the_worker(runner)._stream
        with caught(machine, "synchronisation of a stream that captures"):
            memory.capture(stream, lambda: memory.synchronize(stream))

    def test_a_graph_that_was_destroyed(self, machine: Machine, runner: TensorRTRunner) -> None:
        (captured,) = the_worker(runner)._captured.values()
        machine.gpu.destroy_graph(captured.graph)
        with caught(machine, "does not exist: destroyed"):
            runner.run(images(2))

    def test_scratch_memory_that_is_gone(self, machine: Machine, runner: TensorRTRunner) -> None:
        machine.gpu.free(the_worker(runner)._scratch)
        with caught(machine, "freed before the work"):
            runner.run(images(2))

    def test_scratch_memory_that_was_never_given(
        self, machine: Machine, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strategy = sys.modules["tensorrt"].ExecutionContextAllocationStrategy.USER_MANAGED
        monkeypatch.setattr(
            Contexts, "create", lambda contexts, _scratch: contexts.loaded.engine.create_execution_context(strategy)
        )
        with caught(machine, "scratch memory was not set"):
            runner.run(images(4))

    def test_a_graph_that_is_not_given_back(self, machine: Machine, runner: TensorRTRunner) -> None:
        machine.gpu.keep_graph([])
        runner.close()
        with pytest.raises(Misuse, match=r"leak.*graphs"):
            machine.gpu.assert_clean()


def test_a_pycuda_call_where_no_context_is_current(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(engines, "trt", "pycuda").install(monkeypatch)
    runner = machine.open()
    with caught(machine, "no context is current"):
        runner._memory.allocate(1)


def test_a_clean_gpu_is_clean() -> None:
    gpu = Gpu()
    gpu.free(gpu.allocate(8))
    gpu.assert_clean()
