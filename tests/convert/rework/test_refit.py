"""Refitting: named weights of another checkpoint are those of its own export, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx
import torch
from onnx import numpy_helper

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.bundle import MANIFEST, Verdict
from repmlp_deploy.convert.formats.tensorrt import refit as engine_refit
from repmlp_deploy.convert.formats.tensorrt.refit import refit_engine
from repmlp_deploy.convert.graph.lowering.lower import product_tensors, set_precision
from repmlp_deploy.convert.rework import refit as refitting
from repmlp_deploy.convert.rework.named_weights import named_weights, with_named_weights
from repmlp_deploy.convert.rework.refit import refit_bundle
from repmlp_deploy.errors import BuildError, CheckpointError, InputError, MissingDevice, VerificationError
from repmlp_deploy.runtime.tensorrt.driver import Gpu
from support.graph_cases import SMALL, graph_case
from support.task_cases import network_reaching, save_network, small_card, small_network

FAST = ("repmlpnet", "mobilefacenet")  # the second has PReLUs, whose slopes lose their name


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def state_of(family: str, seed: int) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in graph_case(family, seed).network.state_dict().items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in SMALL]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_graph_of_one_checkpoint_takes_the_weights_of_another(family: str, precision: str) -> None:
    """A's graph with B's named weights has, initializer by initializer, what B's own export has."""
    graphs = [set_precision(graph_case(family, seed).model, precision).model for seed in (0, 1)]
    own = named_weights(state_of(family, 0), graphs[0])
    assert_same(initializers(onnx.load_from_string(with_named_weights(graphs[0], own))), initializers(graphs[0]))
    other = named_weights(state_of(family, 1), graphs[0])
    assert_same(initializers(onnx.load_from_string(with_named_weights(graphs[0], other))), initializers(graphs[1]))
    assert all(not np.array_equal(other[name], own[name]) for name in own)


@pytest.mark.parametrize("family", FAST)
def test_exports_of_one_architecture_differ_in_weights_alone(family: str) -> None:
    a, b = (graph_case(family, seed).model for seed in (0, 1))
    assert [node.SerializeToString() for node in a.graph.node] == [node.SerializeToString() for node in b.graph.node]


def test_weights_of_another_architecture_are_refused() -> None:
    graph, state = graph_case("repmlpnet").model, state_of("repmlpnet", 0)
    with pytest.raises(CheckpointError, match=r"^x\.pth is of another architecture: it has no conv_embedding"):
        named_weights(state_of("mobilefacenet", 0), graph, name="x.pth")
    name = "stages.0.0.fc3"
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(64, 64\); the graph has \(2, 64, 64\)"):
        named_weights({**state, name: state[name][0]}, graph)
    with pytest.raises(CheckpointError, match=r"the graph reads no stages\.9\.9\.fc3"):
        named_weights({**state, "stages.9.9.fc3": state[name]}, graph)
    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(CheckpointError, match=f"it has no {name}, which the graph reads"):
        named_weights(without, graph)


def test_weights_beyond_the_type_are_refused() -> None:
    graph = set_precision(graph_case("repmlpnet").model, "fp16").model
    state = state_of("repmlpnet", 0)
    large = {**state, "stages.0.0.fc3": np.full_like(state["stages.0.0.fc3"], 1e5)}
    with pytest.raises(CheckpointError, match=r"stages.0.0.fc3_float16 holds 1e\+05, beyond float16's 65504"):
        named_weights(large, graph)


def test_int8_scales_are_of_one_checkpoint() -> None:
    graph = graph_case("repmlpnet").model
    lowered = set_precision(graph, "int8", ranges=dict.fromkeys(product_tensors(graph), 4.0)).model
    with pytest.raises(InputError, match="8-bit graphs hold scales that were measured with one checkpoint"):
        named_weights(state_of("repmlpnet", 0), lowered)


# bundles


def with_artifacts(folder: Path, *names: str) -> Path:
    """The bundle with these artifacts alone."""
    data = json.loads((folder / MANIFEST).read_text())
    for name in [name for name in data["artifacts"] if name not in names]:
        (folder / data["artifacts"].pop(name)["path"]).unlink()
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


@pytest.fixture
def other_checkpoint(digits_state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The digits network after, say, another epoch: every weight is a little different."""
    generator = torch.Generator().manual_seed(1)
    state = {key: value.clone() for key, value in digits_state.items()}
    for value in state.values():
        if value.is_floating_point():
            value.mul_(1 + 0.02 * torch.rand(value.shape, generator=generator))
    torch.save(state, tmp_path / "epoch2.pth")
    return tmp_path / "epoch2.pth"


PROVED = {f"{step}{how}" for step in ("merged", "folded") for how in ("", ", float64", ", redrawn", " weights")}
"""The rows of every export, and so of every refit."""


def test_a_refitted_bundle_answers_as_the_new_network(
    bundle_folder: Path, bundle: Bundle, other_checkpoint: Path, tmp_path: Path
) -> None:
    source = with_artifacts(bundle_folder, "onnx")
    refitted = refit_bundle(source, other_checkpoint, out=tmp_path / "out")
    hops = {hop.name for hop in refitted.manifest.certificate if hop.passed}
    assert hops == {*PROVED, "refitted ONNX", "refitted ONNX weights"}
    assert refitted.manifest.verdict == Verdict.of(refitted.manifest.certificate)
    assert refitted.manifest.verdict != bundle.manifest.verdict, "the verdict is the new network's"
    assert refitted.manifest.provenance["checkpoint"]["file"] == "epoch2.pth"
    assert "refitted from a bundle of repmlp-digits.safetensors" in refitted.manifest.notes
    assert (refitted.manifest.labels, refitted.manifest.batch) == (bundle.manifest.labels, bundle.manifest.batch)
    probe = refitted.probe()
    with Predictor(tmp_path / "out") as new, Predictor(source) as old:
        new.self_check()
        assert np.abs(new.logits(probe.inputs) - probe.reference).max() < 1e-4
        assert np.abs(old.logits(probe.inputs) - probe.reference).max() > 1e-2


def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_is_written(
    bundle_folder: Path, digits_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = with_artifacts(bundle_folder, "onnx")
    fewer = dict(digits_state) | {key: digits_state[key][:7] for key in ("head.weight", "head.bias")}
    torch.save(fewer, tmp_path / "seven.pth")
    before = (source / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match=r"seven.pth is of another architecture: head.weight has shape \(7, 96\)"):
        refit_bundle(source, tmp_path / "seven.pth")
    assert (source / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("family", "size", "said"),
    [
        ("repmlpnet", (64, 64), "repmlpnet of 64x64, not repmlpnet of 32x32"),
        ("mobilefacenet", (32, 32), "mobilefacenet of 32x32, not repmlpnet of 32x32"),
    ],
)
def test_a_checkpoint_of_another_family_or_size_is_told_by_its_name(
    bundle_folder: Path, tmp_path: Path, family: str, size: tuple[int, int], said: str
) -> None:
    source = with_artifacts(bundle_folder, "onnx")
    path = save_network(small_network(family, input_size=size), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"^other\.pth is of another architecture: {said}$"):
        refit_bundle(source, path)
    (tmp_path / "none.txt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"none\.txt"):
        refit_bundle(source, tmp_path / "none.txt")


def test_what_cannot_be_refitted_is_refused_before_anything_is_read(bundle_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.pth"
    with pytest.raises(InputError, match="also holds checkpoint, torch, which cannot be refitted"):
        refit_bundle(bundle_folder, missing)
    with_artifacts(bundle_folder, "onnx", "trt-rtx")
    with pytest.raises(InputError, match="the trt-rtx engine was not built with --refittable"):
        refit_bundle(bundle_folder, missing)


def test_a_refittable_engine_asks_for_its_gpu(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_artifacts(bundle_folder, "onnx", "trt-rtx")
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["artifacts"]["trt-rtx"]["options"]["refittable"] = True
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    monkeypatch.setattr(engine_refit, "find_gpus", tuple)
    with pytest.raises(MissingDevice, match="refitting the trt-rtx engine needs the GPU it is for"):
        refit_bundle(bundle_folder, tmp_path / "none.pth")


def test_a_bundle_with_an_engine_gets_it_refitted_with_the_graphs_own_weights(
    bundle_folder: Path, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The refit itself, which needs a GPU, is replaced; what it is given is what the new graph holds."""
    with_artifacts(bundle_folder, "onnx", "trt-rtx")
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["artifacts"]["trt-rtx"]["options"]["strip_weights"] = True
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    given = []

    def refit(name: str, plan: bytes, weights: dict[str, np.ndarray]) -> bytes:
        given.append((name, plan, weights))
        return b"refitted plan"

    monkeypatch.setattr(engine_refit, "find_gpus", lambda: (Gpu("a GPU", "8.6"),))
    monkeypatch.setattr(refitting, "refit_engine", refit)
    refitted = refit_bundle(bundle_folder, other_checkpoint, out=tmp_path / "out")
    ((name, plan, weights),) = given
    old = Bundle.load(bundle_folder)
    assert (name, plan) == ("trt-rtx", old.read(old.artifact("trt-rtx")))
    assert_same(weights, initializers(onnx.load_from_string(refitted.read(refitted.artifact("onnx")))))
    assert refitted.read(refitted.artifact("trt-rtx")) == b"refitted plan"
    options = refitted.artifact("trt-rtx").model_extra["options"]
    assert (options["refittable"], options["strip_weights"]) == (True, False)
    assert refitted.manifest.notes[-1].startswith("the trt-rtx engine was built from the verified graph")


# room in float16


@pytest.fixture(scope="module")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in float16 whose values have room."""
    folder = tmp_path_factory.mktemp("fp16")
    path = save_network(network_reaching(1.0), folder / "small.pth")
    export(path, card=small_card("repmlpnet"), precision="fp16", batch=2, out=folder / "bundle")
    return folder / "bundle"


def test_new_weights_whose_values_are_near_the_end_of_float16_are_refused(fp16_bundle: Path, tmp_path: Path) -> None:
    """Nothing overflows on the probe, and every weight fits into float16; on another image a value would not."""
    path = save_network(network_reaching(2e4), tmp_path / "large.pth")
    with pytest.raises(VerificationError) as caught:
        refit_bundle(fp16_bundle, path, out=tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("fp16 has no room for this network: first at stages.1.0 · ffn_fc1: Conv ")
    assert "export this checkpoint with --keep-fp32 'stages.1.0*', or use bf16" in said
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_the_headroom_of_the_new_weights(fp16_bundle: Path, tmp_path: Path) -> None:
    """It is the one that their own export measures in float32."""
    path = save_network(network_reaching(2e3), tmp_path / "larger.pth")
    refitted = refit_bundle(fp16_bundle, path, out=tmp_path / "out")
    own = export(path, card=small_card("repmlpnet"), precision="fp16", batch=2, out=tmp_path / "own")
    found, expected = (made.artifact("onnx").model_extra["headroom"] for made in (refitted, own))
    assert (found["module"], found["node"]) == (expected["module"], expected["node"])
    assert found["largest"] == pytest.approx(expected["largest"], rel=1e-2)
    assert found["largest"] > 10 * Bundle.load(fp16_bundle).artifact("onnx").model_extra["headroom"]["largest"]


def test_blocks_that_stay_in_float32_need_no_room_in_a_refit(tmp_path: Path) -> None:
    kept = {"keep_fp32": ["stages.1.0*"]}
    first = save_network(network_reaching(1.0), tmp_path / "small.pth")
    export(first, card=small_card("repmlpnet"), precision="fp16", batch=2, out=tmp_path / "bundle", **kept)
    path = save_network(network_reaching(2e4), tmp_path / "large.pth")
    refitted = refit_bundle(tmp_path / "bundle", path, out=tmp_path / "out")
    assert not refitted.artifact("onnx").model_extra["headroom"]["module"].startswith("stages.1.0")


# engines, with a stand-in for what needs a GPU: the module's own types, a refitter that keeps what it is given


class Engine:
    refittable = True

    def __init__(self, plan: bytes) -> None:
        self.weights = {"a": None, "b": None}
        self.plan = plan

    def create_serialization_config(self) -> object:
        return tensorrt_rtx_config()

    def serialize_with_config(self, config: object) -> bytes:
        assert not config.flags_set & {tensorrt_rtx.SerializationFlag.EXCLUDE_WEIGHTS}
        assert config.flags_set == {tensorrt_rtx.SerializationFlag.INCLUDE_REFIT}
        return b"".join(self.weights[name] for name in sorted(self.weights))


class tensorrt_rtx_config:  # noqa: N801 - stands in for a value of the module
    def __init__(self) -> None:
        self.flags_set = {tensorrt_rtx.SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag: object) -> None:
        self.flags_set.discard(flag)

    def set_flag(self, flag: object) -> None:
        self.flags_set.add(flag)


class Refitter:
    """Copies what it is pointed at when it refits, as the real one does; None where a weight was not set."""

    def __init__(self, engine: Engine, _logger: object) -> None:
        self._engine, self._given = engine, {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.weights)

    def set_named_weights(self, name: str, weights: tensorrt_rtx.Weights) -> bool:
        if weights.size != 4:
            return False
        self._given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine.weights if name not in self._given]

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        self._engine.weights = {name: given.numpy().tobytes() for name, given in self._given.items()}
        return True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def __init__(self, _logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            return Engine(plan) if plan == b"plan" else None

    gpus = (Gpu("a GPU", "8.6"),)
    monkeypatch.setattr(engine_refit, "find_gpus", lambda: gpus)
    monkeypatch.setattr(tensorrt_rtx, "Runtime", Runtime)
    monkeypatch.setattr(tensorrt_rtx, "Refitter", Refitter)


WEIGHTS = {"a": np.arange(4, dtype=np.float32), "b": np.arange(4, 8).astype(np.float16), "shape": np.zeros(2, np.int64)}


@pytest.mark.usefixtures("gpu")
def test_an_engine_gets_every_weight_it_asks_for_by_name_and_type() -> None:
    assert refit_engine("trt-rtx", b"plan", WEIGHTS) == WEIGHTS["a"].tobytes() + WEIGHTS["b"].tobytes()


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="cannot read the engine"):
        refit_engine("trt-rtx", b"another plan", WEIGHTS)
    with pytest.raises(BuildError, match="holds the weight b, which its graph does not"):
        refit_engine("trt-rtx", b"plan", {"a": WEIGHTS["a"]})
    with pytest.raises(BuildError, match=r"refuses the weight b, float32 \(5,\)"):
        refit_engine("trt-rtx", b"plan", {**WEIGHTS, "b": np.zeros(5, np.float32)})
    monkeypatch.setattr(Engine, "refittable", False)
    with pytest.raises(BuildError, match="is not refittable: build it again with --refittable"):
        refit_engine("trt-rtx", b"plan", WEIGHTS)


def test_the_real_bindings_have_what_refitting_calls() -> None:
    for owner, names in {
        tensorrt_rtx.Refitter: ("get_all_weights", "set_named_weights", "refit_cuda_engine", "get_missing_weights"),
        tensorrt_rtx.ICudaEngine: ("refittable", "create_serialization_config", "serialize_with_config"),
        tensorrt_rtx.ISerializationConfig: ("set_flag", "clear_flag"),
        tensorrt_rtx.SerializationFlag: ("EXCLUDE_WEIGHTS", "INCLUDE_REFIT"),
        tensorrt_rtx.DataType: tuple(engine_refit._TYPES.values()),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__} has no {name}"
    signatures = tensorrt_rtx.Refitter.set_named_weights.__doc__
    assert "name: str, weights: tensorrt_rtx_bindings.tensorrt_rtx.Weights) -> bool" in signatures
    assert "ptr: typing.SupportsInt, count: typing.SupportsInt" in tensorrt_rtx.Weights.__init__.__doc__


@pytest.mark.gpu
@pytest.mark.parametrize("strip", [False, True])
def test_a_refitted_engine_holds_the_weights_of_the_other_checkpoint(strip: bool) -> None:
    """Read back from the engine: with the weights of B, a plan of A is refitted to what B's own plan holds."""
    from repmlp_deploy.convert.engine_options import EngineOptions
    from repmlp_deploy.convert.formats.tensorrt.build import build_engine
    from repmlp_deploy.runtime.tensorrt.log import shared_logger

    case, other = graph_case("repmlpnet"), graph_case("repmlpnet", 1)
    options = EngineOptions(refittable=True, strip_weights=strip)
    built = build_engine("trt-rtx", case.model.SerializeToString(), case.spec, options)
    weights = initializers(other.model)
    refitted = refit_engine("trt-rtx", built.plan, weights)
    runtime = tensorrt_rtx.Runtime(shared_logger(tensorrt_rtx))
    refitter = tensorrt_rtx.Refitter(runtime.deserialize_cuda_engine(refitted), shared_logger(tensorrt_rtx))
    names = refitter.get_all_weights()
    assert set(names) <= weights.keys()
    assert any("fc3" in name for name in names)
    for name in names:
        held = refitter.get_named_weights(name).numpy().reshape(weights[name].shape)
        np.testing.assert_array_equal(held, weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_refitted_graph_is_emulated_as_an_exported_one_is(
    precision: str, digits_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export(digits_checkpoint, precision=precision, batch="1:4:16", out=tmp_path / "bundle")
    refitted = refit_bundle(tmp_path / "bundle", other_checkpoint, out=tmp_path / "out")
    expected = {hop.name for hop in bundle.manifest.certificate if hop.precision == precision}
    assert expected
    found = {hop.name.removeprefix("refitted ") for hop in refitted.manifest.certificate if hop.precision == precision}
    assert found == expected


def test_a_stored_verdict_that_contradicts_the_certificate_is_not_believed(bundle_folder: Path) -> None:
    """Bundles that an earlier version refitted hold the verdict of the network before."""
    path = bundle_folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    right = dict(data["verdict"])
    data["verdict"] |= {"passed": False, "margin": 0.1, "closest": "another network"}
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Bundle.load(bundle_folder).manifest.verdict.model_dump(mode="json") == right
    row = next(hop for hop in data["certificate"] if hop["passed"])
    row["passed"] = False
    path.write_text(json.dumps(data), encoding="utf-8")
    assert not Bundle.load(bundle_folder).manifest.verdict.passed
