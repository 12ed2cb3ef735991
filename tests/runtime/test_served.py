"""A predictor changes its bundle under load, checks it first, and does not survive a fork."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from repmlp_deploy import Bundle, Predictor, VerificationError
from repmlp_deploy.bundle import describe_file
from repmlp_deploy.errors import BundleError, InputError


def batch_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def saved(bundle: Bundle, folder: Path, *, scale: float = 1.0, reference: float = 1.0) -> Path:
    """A bundle whose logits are `scale` times those of `bundle`, and whose probe expects `reference` times them."""
    model = onnx.load_from_string(bundle.read(bundle.artifact("onnx")))
    for tensor in model.graph.initializer:
        if tensor.name in ("head.weight", "head.bias"):
            values = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    probe = bundle.probe()
    wanted = type(probe)(probe.inputs, probe.reference * reference, probe.float32 * np.float32(reference)).to_bytes()
    data = model.SerializeToString()
    entry = bundle.artifact("onnx").model_copy(update=describe_file("model.onnx", data).model_dump())
    update = {"artifacts": {"onnx": entry}, "probe": describe_file("probe.npz", wanted)}
    made = Bundle(bundle.manifest.model_copy(update=update), contents={"model.onnx": data, "probe.npz": wanted})
    assert made.save(folder).folder is not None
    return folder


@pytest.fixture
def twice(bundle: Bundle, tmp_path: Path) -> Path:
    """Another version: every logit is twice as large, and its probe says so."""
    return saved(bundle, tmp_path / "twice", scale=2.0, reference=2.0)


@pytest.fixture
def wrong(bundle: Bundle, tmp_path: Path) -> Path:
    """A version that computes something else than its probe expects."""
    return saved(bundle, tmp_path / "wrong", scale=1.001)


def test_a_checked_predictor_answers_only_if_the_probe_passes(bundle: Bundle, wrong: Path) -> None:
    Predictor(bundle, check=True).close()
    Predictor(wrong).close()
    with pytest.raises(VerificationError, match="onnx on cpu at batch 1 differs from the trained network"):
        Predictor(wrong, check=True)


def test_another_version_takes_the_place_of_the_first(bundle: Bundle, twice: Path) -> None:
    batch = batch_of(3)
    with Predictor(bundle) as predictor:
        before = predictor.logits(batch)
        predictor.reload(twice)
        np.testing.assert_allclose(predictor.logits(batch), 2 * before, rtol=1e-4)
        assert predictor.bundle.folder == twice


def test_a_version_that_fails_leaves_the_present_one(bundle: Bundle, wrong: Path, tmp_path: Path) -> None:
    batch = batch_of(3)
    with Predictor(bundle) as predictor:
        before = predictor.logits(batch)
        with pytest.raises(VerificationError):
            predictor.reload(wrong)
        with pytest.raises(BundleError):
            predictor.reload(tmp_path / "nothing")
        np.testing.assert_array_equal(predictor.logits(batch), before)
    with pytest.raises(InputError, match="is closed"):
        predictor.reload(bundle)


def test_no_call_fails_or_mixes_versions_while_they_change(bundle: Bundle, twice: Path) -> None:
    """Every answer is wholly that of one version, and the last ones are those of the last version."""
    batch, stop, wrong = batch_of(5), threading.Event(), []
    with Predictor(bundle, threads=1) as predictor:
        one = predictor.logits(batch)
        two = 2 * one

        def call() -> int:
            answered = 0
            while not stop.is_set():
                got = predictor.logits(batch)
                answered += 1
                if not (np.allclose(got, one, rtol=1e-4) or np.allclose(got, two, rtol=1e-4)):
                    wrong.append(got)
            return answered

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(call) for _ in range(4)]
            for _ in range(10):
                predictor.reload(twice)
                predictor.reload(bundle)
            stop.set()
            assert all(future.result() > 0 for future in futures)
        assert wrong == []
        np.testing.assert_array_equal(predictor.logits(batch), one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_told_to_open_its_own(bundle: Bundle) -> None:
    with Predictor(bundle) as predictor:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # nothing but what is tested, and no cleaning up of the parent's things
            said = ""
            for call in (lambda: predictor.logits(batch_of(1)), lambda: predictor.reload(bundle), predictor.close):
                try:
                    said += f"{call()}; "
                except InputError as error:
                    said += f"{error}; "
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            told = "a Predictor does not survive a fork; open Predictor(folder) in each process instead; "
            assert pipe.read() == 2 * told + "None; "
        assert predictor.logits(batch_of(1)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["onnx", "openvino"])
def test_thirty_two_threads_get_their_own_answers(digits_checkpoint: Path, tmp_path: Path, artifact: str) -> None:
    """2,000 distinct inputs from 32 threads, while versions change: none wrong, none lost, memory flat."""
    import psutil

    from repmlp_deploy import export

    made = export(digits_checkpoint, formats="onnx,openvino", batch="1:2:4", out=tmp_path / "bundle")
    other = Path(shutil.copytree(made.folder or tmp_path, tmp_path / "copy"))
    inputs = batch_of(2_000, seed=1)
    process, sizes = psutil.Process(), []
    with Predictor(made, format=artifact, threads=1) as predictor:
        expected = np.concatenate([predictor.logits(inputs[i : i + 1]) for i in range(len(inputs))])

        def call(index: int) -> tuple[int, np.ndarray]:
            return index, predictor.logits(inputs[index : index + 1])[0]

        for _ in range(3):
            with ThreadPoolExecutor(32) as pool:
                futures = [pool.submit(call, i) for i in range(len(inputs))]
                for _ in range(5):
                    predictor.reload(other)
                    predictor.reload(made)
                got = dict(future.result() for future in futures)
            assert sorted(got) == list(range(len(inputs)))
            np.testing.assert_allclose(np.stack([got[i] for i in range(len(inputs))]), expected, rtol=1e-4, atol=1e-5)
            sizes.append(process.memory_info().rss)
        assert sizes[-1] - sizes[0] < 64 << 20, sizes


def test_a_reload_in_an_event_loop_waits_for_no_call(bundle: Bundle, twice: Path) -> None:
    async def run() -> float:
        with Predictor(bundle, format="onnx") as predictor:
            call = asyncio.ensure_future(predictor.logits_async(batch_of(1)))
            await asyncio.sleep(0)  # it is under way, and needs this loop to end
            predictor.reload(twice)
            old, new = await asyncio.wait_for(call, 10), await predictor.logits_async(batch_of(1))
            stale = predictor._stale[0]
            await asyncio.to_thread(stale.close)
            assert stale.ended
            return float(np.abs(new - 2 * old).max())

    assert asyncio.run(run()) < 1e-4
