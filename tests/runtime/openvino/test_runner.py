import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.errors import BundleError, InputError, MissingDependency, MissingDevice, VerificationError
from repmlp_deploy.runtime.openvino import runner as openvino_runner
from repmlp_deploy.runtime.openvino.runner import CompiledIR, OpenVinoRunner
from repmlp_deploy.runtime.runner import RunnerOptions
from support.bundles import as_int8
from support.openvino_bundle import DIGIT, with_openvino

INPUTS = probe_inputs(DIGIT, 16, seed=5)


@pytest.fixture(scope="module")
def served(_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an fp32 OpenVINO artifact beside the ONNX one: not to be changed."""
    return with_openvino(Bundle.load(_exported), tmp_path_factory.mktemp("openvino") / "bundle")


def with_capabilities(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A CPU with these capabilities alone."""
    real = openvino_runner.ov.Core

    class Core:
        def __init__(self) -> None:
            self._core = real()

        def get_property(self, device: str, name: str) -> object:
            return list(names) if name == "OPTIMIZATION_CAPABILITIES" else self._core.get_property(device, name)

        def __getattr__(self, name: str) -> object:
            return getattr(self._core, name)

    monkeypatch.setattr(openvino_runner.ov, "Core", Core)


def test_the_predictor_prefers_openvino_and_passes_its_own_check(served: Bundle) -> None:
    with Predictor(served, threads=1) as predictor:
        assert (predictor.format, predictor.device) == ("openvino", "cpu")
        assert predictor.details["inference_precision"] == "f32"
        assert (predictor.details["threads"], predictor.details["streams"]) == (1, 1)
        assert "passed_over" not in predictor.details
        assert [size for size, _ in predictor.self_check()] == [1, 4]
        expected = Predictor(served, format="onnx").logits(INPUTS)
        np.testing.assert_allclose(predictor.logits(INPUTS), expected, rtol=0, atol=1e-4)


def test_the_certificate_is_renewed_for_both_artifacts(served: Bundle) -> None:
    hops, notes = recertify(served)
    assert {hop.name for hop in hops} == {"trained, float32", "openvino on cpu", "onnx on cpu"}
    assert all(hop.passed for hop in hops[1:])
    assert notes == []


def test_inputs_are_copied_and_outputs_are_the_callers(served: Bundle) -> None:
    runner = OpenVinoRunner(served, RunnerOptions(threads=1))
    batch = INPUTS[:2].copy()
    first = runner.run(batch)
    kept = first.copy()
    np.testing.assert_array_equal(batch, INPUTS[:2])
    runner.run(INPUTS[2:5])
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    np.testing.assert_array_equal(runner.run(INPUTS[:2]), kept)


def test_sixteen_threads_each_get_their_own_answer(served: Bundle) -> None:
    runner = OpenVinoRunner(served, RunnerOptions(threads=1))
    expected = [runner.run(INPUTS[i : i + 1]) for i in range(16)]
    assert len({answer.tobytes() for answer in expected}) == 16
    wrong: list[int] = []
    begin = threading.Barrier(16)

    def work(i: int) -> None:
        begin.wait()
        wrong.extend(i for _ in range(50) if not np.array_equal(runner.run(INPUTS[i : i + 1]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_another_shape_or_type_is_refused(served: Bundle) -> None:
    """OpenVINO answers two channels instead of three with numbers from somewhere."""
    runner = OpenVinoRunner(served, RunnerOptions(threads=1))
    for wrong in (INPUTS[:, :2], INPUTS[0], INPUTS.astype(np.float64), INPUTS[:, :, :16]):
        with pytest.raises(InputError, match=r"the model takes float32 \(N, 3, 32, 32\)"):
            runner.run(wrong)


@pytest.mark.parametrize("streams", [1, 2])
def test_no_thread_is_tied_to_a_processor(served: Bundle, streams: int) -> None:
    """Each of several processes would tie its only thread to the same one."""
    runner = OpenVinoRunner(served, RunnerOptions(threads=1, streams=streams))
    runner.run(INPUTS)
    assert runner._model.compiled.get_property("ENABLE_CPU_PINNING") is False


def test_a_failed_call_gives_its_request_back(served: Bundle) -> None:
    runner = OpenVinoRunner(served, RunnerOptions(threads=1))

    class Failing:
        def start_async(self, *_: object, **__: object) -> None:
            raise RuntimeError("out of memory")

    waiting = runner._model._requests
    count = waiting.qsize()
    waiting.get()
    waiting.put(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run(INPUTS[:1])
    assert waiting.qsize() == count
    assert waiting.get() is None  # a call that was interrupted may still run in the old one


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_changed_file_is_not_run(served: Bundle, tmp_path: Path, name: str) -> None:
    copy = with_openvino(served, tmp_path / "copy")
    path = tmp_path / "copy" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        OpenVinoRunner(copy, RunnerOptions())


def test_devices_and_threads_are_had_or_refused(served: Bundle) -> None:
    with pytest.raises(InputError, match="device is 'cuda'; the openvino artifact runs on cpu"):
        Predictor(served, format="openvino", device="cuda")
    with pytest.raises(InputError, match="threads is 0"):
        Predictor(served, format="openvino", threads=0)
    with pytest.raises(MissingDevice, match="CUDAExecutionProvider"):
        Predictor(served, device="cuda")  # which only the other artifact knows
    with pytest.raises(InputError, match="device is 'tpu'"):
        Predictor(served, device="tpu")
    assert Predictor(served, device="cpu").format == "openvino"


def test_bf16_without_its_instructions_is_refused_and_passed_over(
    served: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO would emulate it on any AVX-512 machine, slowly, and say nothing."""
    bundle = with_openvino(served, tmp_path / "bf16", "bf16")
    with_capabilities(monkeypatch, "FP32", "INT8")
    said = r"this CPU has no bf16 instructions \(OpenVINO names FP32, INT8\): export fp32 or int8 for it"
    with pytest.raises(MissingDevice, match=said):
        Predictor(bundle, format="openvino")
    with Predictor(bundle) as predictor:
        assert predictor.format == "onnx"
        assert list(predictor.details["passed_over"]) == ["openvino"]
    alone = with_openvino(served, tmp_path / "alone", "bf16", only=True)
    with pytest.raises(MissingDevice, match=said):
        Predictor(alone)


def test_a_precision_other_than_what_was_asked_for_is_noticed(served: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model only says that it computes in bf16: a CPU without bf16 keeps float32, whatever it is asked for."""
    real = openvino_runner._compile

    class Different:
        def __init__(self, compiled: object) -> None:
            self._compiled = compiled

        def get_property(self, name: str) -> object:
            is_hint = name == "INFERENCE_PRECISION_HINT"
            return SimpleNamespace(to_string=lambda: "bf16") if is_hint else self._compiled.get_property(name)

        def __getattr__(self, name: str) -> object:
            return getattr(self._compiled, name)

    def compile_differently(*given: object) -> object:
        compiled, *rest = real(*given)
        return (Different(compiled), *rest)

    monkeypatch.setattr(openvino_runner, "_compile", compile_differently)
    with pytest.raises(MissingDevice, match="asked for f32 and answers bf16"):
        OpenVinoRunner(served, RunnerOptions())


def test_without_openvino_the_next_artifact_runs_and_says_so(served: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.runtime.openvino.runner")
    said = 'openvino is not installed: pip install "repmlp-deploy[openvino]"'
    with Predictor(served) as predictor:
        assert predictor.format == "onnx"
        assert predictor.details["passed_over"] == {"openvino": said}
    with pytest.raises(MissingDependency, match="openvino is not installed"):
        Predictor(served, format="openvino")


def test_with_no_runtime_at_all_the_preferred_one_is_named(served: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, module in (("openvino", "openvino.runner"), ("onnxruntime", "onnx.runner")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"repmlp_deploy.runtime.{module}", raising=False)
    with pytest.raises(MissingDependency, match=r"repmlp-deploy\[openvino\]"):
        Predictor(served)


def test_openvino_runs_without_torch_onnx_or_onnxruntime(served: Bundle, tmp_path: Path) -> None:
    bundle = with_openvino(served, tmp_path / "int8", "int8", only=True)
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "onnxruntime", "nncf", "tensorrt_rtx")))
from repmlp_deploy import Predictor
from repmlp_deploy.card import data_root
with Predictor({str(bundle.folder)!r}) as predictor:
    images = sorted((data_root() / "samples" / "digits").glob("*.png"))
    print(predictor.format, [p.pred_class for p in predictor(images)])
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.strip() == f"openvino {[str(i) for i in range(10)]}"


def test_a_model_that_strays_fails_its_check(served: Bundle, tmp_path: Path) -> None:
    """The weights of one stage at 99 %, their digests in order: only the comparison can notice."""
    bundle = with_openvino(served, tmp_path / "strayed")
    entry = bundle.artifact("openvino")
    weights = np.frombuffer(bundle.read(entry.companions[0]), np.uint8).copy()
    floats = weights[: len(weights) // 8 * 4].view(np.float32)
    floats[(np.abs(floats) > 1e-3) & (np.abs(floats) < 10)] *= np.float32(0.99)  # no integer looks like these
    model = CompiledIR(lambda: (bundle.read(entry), weights.tobytes()), "fp32", RunnerOptions(threads=1))
    predictor = Predictor(bundle)
    predictor._served.runner._model = model
    with pytest.raises(VerificationError, match="openvino on cpu at batch 1"):
        predictor.self_check()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_float_model_is_not_kept_because_it_would_start_more_slowly(served: Bundle, tmp_path: Path) -> None:
    assert OpenVinoRunner(served, RunnerOptions(cache=tmp_path)).details["compiled"] == "here"
    assert entries(tmp_path) == []


def test_the_cache_makes_the_next_start_quick_and_changes_no_result(served: Bundle, tmp_path: Path) -> None:
    served = as_int8(served, "openvino")
    expected = OpenVinoRunner(served, RunnerOptions()).run(INPUTS)
    options = RunnerOptions(cache=tmp_path / "a" / "cache")
    first = OpenVinoRunner(served, options)
    assert first.details["compiled"] == "here, and cached"
    second = OpenVinoRunner(served, options)
    assert second.details["compiled"] == "from the cache"
    assert second.details["threads"] == first.details["threads"]
    for runner in (first, second):
        np.testing.assert_array_equal(runner.run(INPUTS), expected)
    other = RunnerOptions(threads=2 if first.details["threads"] == 1 else 1, cache=options.cache)
    assert OpenVinoRunner(served, other).details["compiled"] != "from the cache"
    assert len(entries(tmp_path / "a" / "cache")) == 2


@pytest.mark.parametrize("damage", ["garbage", "truncated", "flipped", "empty", "foreign"])
def test_a_damaged_cache_changes_nothing_and_is_written_anew(served: Bundle, tmp_path: Path, damage: str) -> None:
    import hashlib

    served, options = as_int8(served, "openvino"), RunnerOptions(cache=tmp_path)
    expected = OpenVinoRunner(served, options).run(INPUTS)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    foreign = b"what some other version wrote" * 1000
    path.write_bytes(
        {
            "garbage": np.random.default_rng(0).bytes(len(whole)),
            "truncated": whole[: len(whole) // 2],
            "flipped": bytes(flipped),
            "empty": b"",
            "foreign": hashlib.sha256(foreign).digest() + foreign,
        }[damage]
    )
    runner = OpenVinoRunner(served, options)
    assert runner.details["compiled"] == "here, and cached"
    np.testing.assert_array_equal(runner.run(INPUTS), expected)
    assert entries(tmp_path) == [path]
    assert OpenVinoRunner(served, options).details["compiled"] == "from the cache"
