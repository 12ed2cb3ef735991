"""The user's own network: any module with RepMLP blocks inside is exported and proved, without configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from repmlp_deploy import Bundle, Predictor, VerificationError, export, get_model
from repmlp_deploy.card import ModelCard, Preprocessing, Resize
from repmlp_deploy.convert import transform
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.own_network import describe_interface, fill_own_network, make_own_network, unwrapped
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.flat import flatten_outputs
from support.networks import randomize
from support.own_networks import Scorer, Segmenter, Tied
from support.task_cases import small_card, small_network


def _make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(kind())


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    return _make(Segmenter)


@pytest.fixture(scope="module")
def exported(segmenter: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    example = {"images": torch.randn(2, 3, 32, 32), "weight": torch.rand(2, 5)}
    out = tmp_path_factory.mktemp("own") / "segmenter"
    return export(segmenter, example_input=example, formats="onnx,checkpoint,trt-rtx", batch="1:2:5", out=out)


def classifier_card(size: tuple[int, int]) -> ModelCard:
    how = Preprocessing(resize=Resize(mode="exact", size=size), mean=(1.0, 1.0, 1.0), std=(2.0, 2.0, 2.0))
    return ModelCard(name="small-one", family="custom", task="classify", input_size=size, network={}, preprocessing=how)


class Labels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).argmax(1)


class HalfABlock(nn.Module):
    """FC3 and its BatchNorm, and nothing that says what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc3, self.fc3_bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3_bn(self.fc3(x))


class Whole(nn.Sequential):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.eval()


OUTPUTS = ["segmentation", "auxiliary", "maps.0", "maps.1"]


def test_inputs_and_outputs_keep_their_names(exported: Bundle) -> None:
    manifest = exported.manifest
    assert [spec.name for spec in manifest.inputs] == ["images", "weight"]
    assert [spec.name for spec in manifest.outputs] == OUTPUTS
    assert (manifest.input, manifest.output) == (manifest.inputs[0], manifest.outputs[0])
    assert manifest.output.shape == (None, 5, 32, 32)
    session = ort.InferenceSession(exported.folder / "model.onnx")
    assert [value.name for value in session.get_outputs()] == OUTPUTS


def test_every_output_is_proved_at_every_batch_size(exported: Bundle) -> None:
    hops = exported.manifest.certificate
    assert {hop.name for hop in hops if hop.passed is None} == {f"trained, float32: {name}" for name in OUTPUTS}
    for step in ("merged", "folded", "exported ONNX", "simplified ONNX"):
        found = {(hop.name, hop.batch) for hop in hops if hop.passed}
        assert {(f"{step}: {name}", size) for name in OUTPUTS for size in (1, 2, 3)} <= found


def test_the_graph_answers_what_the_network_does(exported: Bundle, segmenter: nn.Module) -> None:
    session = ort.InferenceSession(exported.folder / "model.onnx")
    torch.manual_seed(5)
    inputs = {"images": torch.randn(4, 3, 32, 32), "weight": torch.rand(4, 5)}
    answers = session.run(OUTPUTS, {key: value.numpy() for key, value in inputs.items()})
    for answer, expected in zip(answers, flatten_outputs(segmenter(**inputs)).values(), strict=True):
        np.testing.assert_allclose(answer, expected.numpy(), atol=1e-5)


def test_a_network_of_merged_blocks_is_recorded_as_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no summary calls the bundle equal to the trained network."""
    network = merge_branches(_make(Scorer))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    monkeypatch.setattr("support.own_networks.make_merged", lambda: network, raising=False)
    given = {"module": "support.own_networks:make_merged", "example_input": Scorer.example_input}
    result = export(tmp_path / "x.pth", **given, formats="onnx", allow_merged=True, out=tmp_path / "out")
    assert result.manifest.origin.checkpoint.merged


def test_the_merged_checkpoint_has_the_networks_own_names(exported: Bundle, segmenter: nn.Module) -> None:
    merged = torch.load(exported.folder / "model.pth", weights_only=True)
    trained = segmenter.state_dict()
    added = {f"{block}.fc3.bias" for block in ("one", "two", "three")}
    assert set(merged) - set(trained) == added
    gone = set(trained) - set(merged)
    assert all(".repconv" in key or ".fc3_bn." in key or ".avg.bn." in key for key in gone)
    torch.testing.assert_close(merged["head.weight"], trained["head.weight"], rtol=0, atol=0)


class Normalises(nn.Module):
    """Normalise the image where it lies, as a step of preprocessing does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 0.25
        return self.norm(x)


def test_a_network_that_writes_into_its_input_is_exported(tmp_path: Path) -> None:
    network, example = _make(Normalises), torch.full((1, 3, 8, 8), 0.5)
    bundle = export(network, example_input=example, batch="1:2:3", out=tmp_path / "bundle")
    assert (example == 0.5).all()
    images = torch.rand(3, 3, 8, 8)
    with Predictor(bundle, check=True) as predictor, torch.no_grad():
        found = predictor.run(x=images.numpy().copy())["output"]
        np.testing.assert_allclose(found, network(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("make", [Normalises, lambda: nn.Conv2d(3, 4, 3)], ids=["writes", "reads"])
def test_a_network_is_described_in_inference_mode_as_elsewhere(make: Callable[[], nn.Module]) -> None:
    network, example = make().eval(), torch.ones(1, 3, 8, 8)
    usual, _ = describe_interface(network, example)
    with torch.inference_mode():
        found, _ = describe_interface(network, torch.ones(1, 3, 8, 8))
    assert type(found) is type(usual)


class Repeats(nn.Module):
    """Return the input itself and one map twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(x)
        return {"x": x, "first": y, "second": y, "mean": y.mean((2, 3))}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_that_are_an_input_or_each_other_have_names_of_their_own(precision: str, tmp_path: Path) -> None:
    network, formats = _make(Repeats), "onnx,openvino" if precision == "fp32" else "onnx"
    example = torch.zeros(1, 3, 8, 8)
    bundle = export(network, example_input=example, formats=formats, precision=precision, out=tmp_path / "bundle")
    names = ["x_out", "first", "second", "mean"]
    graph = onnx.load(bundle.folder / "model.onnx").graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == [spec.name for spec in bundle.manifest.outputs] == names
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
    for name in bundle.manifest.artifacts:
        with Predictor(bundle, format=name, check=True) as predictor:
            found = predictor.run(x=images.numpy())
        for output, right in zip(names, expected.values(), strict=True):
            np.testing.assert_allclose(found[output], right.numpy(), atol=1e-5 if precision == "fp32" else 1e-2)


def test_predictor_refuses_several_outputs_by_name(exported: Bundle) -> None:
    with Predictor(exported) as predictor, pytest.raises(InputError, match=r"2 inputs \(images, weight\).*run\(\)"):
        predictor.logits(np.zeros((1, 3, 32, 32), np.float32))


def test_any_number_of_inputs_and_outputs_run_by_name(exported: Bundle) -> None:
    """Batches beyond the largest are split, and what does not fit is named."""
    probe = exported.probe()
    (images, weight), references = probe.batches(12)
    with Predictor(exported, check=True) as predictor:
        found = predictor.run(weight=weight, images=images)
        assert list(found) == [spec.name for spec in exported.manifest.outputs]
        for output, reference in zip(found.values(), references, strict=True):
            np.testing.assert_allclose(output, reference, rtol=1e-3, atol=1e-5)
        assert len(predictor.self_check()) == 2 * len(references)
        for inputs, said in [
            ({"images": images}, "inputs are images; Segmenter takes images, weight"),
            ({"images": images, "weight": weight[:3]}, "batches of 3, 12; they must be equal"),
            ({"images": images, "weight": weight.astype(np.float64)}, "input weight is float64"),
            ({"images": images[:, :1], "weight": weight}, r"input images is \(12, 1, 32, 32\); Segmenter takes"),
        ]:
            with pytest.raises(InputError, match=said):
                predictor.run(**inputs)


def test_a_probe_with_several_inputs_and_outputs_survives_its_file(exported: Bundle) -> None:
    probe = exported.probe()
    inputs, references = probe.batches(5)
    assert [value.shape[1:] for value in inputs] == [(3, 32, 32), (5,)]
    assert [value.shape for value in references] == [(5, 5, 32, 32), (5, 7), (5, 8, 8, 8), (5, 12, 4, 4)]
    assert len(np.unique(inputs[1].round(6), axis=0)) == 5  # samples differ in the second input too


def test_a_wrong_second_output_fails_the_export(segmenter: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    """Each output has a floor of its own: an error in one cannot hide behind another's size."""
    merge = transform.merge_branches

    def forgetful(network: nn.Module) -> nn.Module:
        merged = merge(network)
        merged.module.auxiliary.bias = nn.Parameter(merged.module.auxiliary.bias + 1e-4)
        return merged

    monkeypatch.setattr(transform, "merge_branches", forgetful)
    example = {"images": torch.randn(1, 3, 32, 32), "weight": torch.rand(1, 5)}
    with pytest.raises(VerificationError, match="merged: auxiliary at batch"):
        export(segmenter, example_input=example, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_output_runs_in_predictor_but_images_need_a_card(tmp_path: Path) -> None:
    network = _make(Scorer)
    bundle = export(network, example_input=torch.zeros(1, 3, 8, 8), batch=2, out=tmp_path / "scorer")
    assert (len(bundle.manifest.inputs), len(bundle.manifest.outputs)) == (1, 1)
    x = torch.randn(2, 3, 8, 8)
    with Predictor(bundle) as predictor:
        np.testing.assert_allclose(predictor.logits(x.numpy()), network(x).numpy(), atol=1e-5)
        predictor.self_check()
        with pytest.raises(InputError, match="has no card"):
            predictor(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_factory_and_a_checkpoint_give_the_same_network(prefix: str, tmp_path: Path, monkeypatch: Any) -> None:
    network = _make(Scorer)
    (tmp_path / "own_package_for_tests.py").write_text("from support.own_networks import Scorer as make\n")
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {prefix + key: value for key, value in network.state_dict().items()}, "epoch": 3}
    torch.save(content, tmp_path / "trained.pth")
    bundle = export(
        "trained.pth", module="own_package_for_tests:make", formats="onnx,checkpoint", batch=2, out=tmp_path / "out"
    )
    x = torch.randn(2, 3, 8, 8)
    session = ort.InferenceSession(bundle.folder / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x).numpy(), atol=1e-5)
    saved = torch.load(bundle.folder / "model.pth", weights_only=True)["state_dict"]
    assert f"{prefix}block.fc3.bias" in saved
    assert f"{prefix}steps" in saved


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", ["nn.DataParallel", "torch.compile"])
def test_a_factory_may_return_a_wrapped_network(wrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"wrapped_by_{wrap.partition('.')[2]}"
    code = f"import torch\nfrom torch import nn\n\n\ndef make():\n    return {wrap}(nn.Conv2d(3, 2, 3))\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert type(make_own_network(f"{name}:make")) is nn.Conv2d


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = _make(Scorer).state_dict()
    state["fc3.weight"] = torch.zeros(3, 4)
    torch.save(state, tmp_path / "trained.pth")
    with pytest.raises(CheckpointError, match=r"fc3.weight has shape \(3, 4\); Scorer expects \(2, 4\)"):
        export(tmp_path / "trained.pth", module="support.own_networks:Scorer", out=tmp_path / "out")
    del state["fc3.weight"]
    torch.save(state, tmp_path / "trained.pth")
    with pytest.raises(CheckpointError, match=r"has no fc3.weight, which Scorer needs"):
        export(tmp_path / "trained.pth", module="support.own_networks:Scorer", out=tmp_path / "out")


@pytest.mark.parametrize("left_out", ["there.weight", "back.weight"])
def test_one_of_tied_weights_is_enough(left_out: str) -> None:
    trained, network = _make(Tied), _make(Tied)
    nn.init.zeros_(network.there.weight)
    fill_own_network(network, {k: v for k, v in trained.state_dict().items() if k != left_out}, "x.pth")
    assert torch.equal(network.there.weight, trained.there.weight)
    assert network.back.weight is network.there.weight
    with pytest.raises(CheckpointError, match=r"x\.pth has no there\.weight, which Tied needs"):
        fill_own_network(network, {"back.bias": trained.back.bias}, "x.pth")


def test_a_file_of_save_model_is_read(tmp_path: Path) -> None:
    save_model(_make(Tied), str(tmp_path / "x.safetensors"))
    bundle = export(
        tmp_path / "x.safetensors", module="support.own_networks:Tied", formats="onnx", out=tmp_path / "out"
    )
    session = ort.InferenceSession(bundle.folder / "model.onnx")
    x = torch.randn(3, 4)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], _make(Tied)(x).detach().numpy(), atol=1e-6)


def test_tied_weights_that_differ_in_a_file_are_refused() -> None:
    network = _make(Tied)
    state = network.state_dict()
    state["back.weight"] = state["back.weight"] + 1
    with pytest.raises(
        CheckpointError, match=r"there\.weight and back\.weight differ, and Tied has one weight for both"
    ):
        fill_own_network(network, state, "x.pth")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("nowhere", "expected package.module:factory"),
        ("mynet.py:make", "mynet.py is no module's name; expected it as `import` takes it"),
        ("./mynet.py:make", "./mynet.py is no module's name"),
        (".mynet:make", ".mynet is no module's name"),
        ("code:make", "code is a module of Python and holds no network; name or rename your own"),
        ("nowhere.at_all:make", "No module named 'nowhere'"),
        ("support.own_networks:absent", "has no absent"),
        ("support.own_networks:make_nothing", "fails: KeyError: 'no weights here'"),
        ("support.fails_on_import:make", "importing it fails: RuntimeError: no GPU here"),
        ("support.configs:Config", "expected a torch.nn.Module"),
    ],
)
def test_a_factory_that_is_none_is_refused(module: str, said: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=said):
        export(tmp_path / "x.pth", module=module, out=tmp_path / "out")


def test_a_size_that_contradicts_the_example_is_refused(tmp_path: Path) -> None:
    torch.save(_make(Scorer).state_dict(), tmp_path / "x.pth")
    given = {"module": "support.own_networks:Scorer", "out": tmp_path / "out"}
    said = r"contradicts the example_input of Scorer, of shape \(1, 3, 8, 8\): drop one of them"
    with pytest.raises(InputError, match=f"--input-size 16x16 {said}"):
        export(tmp_path / "x.pth", input_size=(16, 16), **given)
    with pytest.raises(InputError, match=f"the card small-one for 32x32 {said}"):
        export(tmp_path / "x.pth", card=classifier_card((32, 32)), **given)
    bundle = export(tmp_path / "x.pth", card=classifier_card((8, 8)), input_size=(8, 8), formats="checkpoint", **given)
    assert bundle.manifest.image_size == (8, 8)


@pytest.mark.parametrize("given", [{"weights": "ema"}, {"state_key": "model"}, {"ignore": ["head.*"]}])
def test_what_only_a_file_has_is_refused_for_a_network_in_memory(given: dict[str, Any], tmp_path: Path) -> None:
    said = f"{next(iter(given))}= is about a weights file, and a {{}} was given: drop it"
    with pytest.raises(InputError, match=said.format("Scorer")):
        export(_make(Scorer), example_input=torch.zeros(1, 3, 8, 8), out=tmp_path / "out", **given)
    with pytest.raises(InputError, match=said.format("RepMLPNet")):
        export(get_model("repmlp-digits"), out=tmp_path / "out", **given)


def test_the_size_of_a_network_in_memory_is_that_of_its_card(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--input-size 64x64 contradicts repmlp-digits, which takes 32x32"):
        export(get_model("repmlp-digits"), input_size=(64, 64), out=tmp_path / "out")


def test_what_cannot_be_proved_here_is_refused(tmp_path: Path) -> None:
    network, x = _make(Scorer), torch.zeros(1, 3, 8, 8)
    cases: list[tuple[nn.Module, Any, str]] = [
        (_make(Scorer).train(), x, "training mode"),
        (_make(Scorer).half(), x, "call .float()"),
        (network, torch.zeros(1, 3, 10, 10), "does not run on example_input"),
        (network, "images", "expected a tensor"),
        (network, {"x": x, "y": torch.zeros(2, 1)}, "they must be equal"),
        (
            RepMLPBlock(4, 4, 4, sharesets=2, hidden=2, deploy=True).eval(),
            torch.zeros(1, 4, 4, 4),
            "has RepMLP blocks, but none with branches",
        ),
        (Whole(Labels()), x, "only float32 outputs can be proved"),
        (Whole(HalfABlock()), x, "has the parts of a RepMLP block, but"),
        (nn.Sequential(nn.Flatten(0)).eval(), x, "first axis must be the batch"),
    ]
    for module, example, said in cases:
        with pytest.raises(InputError, match=re.escape(said)):
            export(module, example_input=example, out=tmp_path / "out")
    with pytest.raises(InputError, match="pass example_input="):
        export(network, out=tmp_path / "out")
    with pytest.raises(InputError, match="drop one"):
        export(network, module="support.own_networks:Scorer", out=tmp_path / "out")


def test_outputs_that_are_called_like_inputs_get_names_of_their_own() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"x": x, "x_out": y, "y": x + y, "z": x - y}

    example = {"x": torch.zeros(1, 2), "y": torch.zeros(1, 2)}
    assert describe_interface(Named().eval(), example)[1].outputs == ("x_out_out", "x_out", "y_out", "z")


def test_two_outputs_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match=r"two outputs are called a\.b: rename one"):
        flatten_outputs({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})


def test_outputs_are_flattened_under_dotted_names() -> None:
    a, b, c = (torch.zeros(i) for i in (1, 2, 3))
    assert list(flatten_outputs(a)) == ["output"]
    assert list(flatten_outputs((a, None, b))) == ["output_0", "output_2"]
    assert flatten_outputs({"x": {"y": a}, "z": [b, c]}) == {"x.y": a, "z.0": b, "z.1": c}
    with pytest.raises(TypeError, match="output z is a str"):
        flatten_outputs({"z": "text"})


class Pair(NamedTuple):
    scores: Tensor
    features: Tensor


def test_fields_of_a_named_tuple_are_the_outputs_names() -> None:
    assert list(flatten_outputs(Pair(torch.zeros(1), torch.ones(1)))) == ["scores", "features"]
    nested = flatten_outputs({"first": Pair(torch.zeros(1), torch.ones(1))})
    assert list(nested) == ["first.scores", "first.features"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_network_is_exported_as_the_one_inside(wrap: Any, tmp_path: Path) -> None:
    network = _make(Scorer)
    assert unwrapped(wrap(network)) is unwrapped(network) is network
    bundle = export(wrap(network), example_input=torch.randn(2, 3, 32, 32), batch="1:2:3", out=tmp_path / "bundle")
    assert bundle.manifest.name == "Scorer"
    assert bundle.manifest.verdict.passed


class Wrapper(nn.Module):
    """Passes on whatever it is called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [AveragedModel, Wrapper])
def test_a_wrapper_that_names_no_input_is_exported(wrap: Any, tmp_path: Path) -> None:
    network = wrap(nn.Conv2d(3, 2, 3)).eval()
    x = torch.randn(3, 3, 8, 8)
    bundle = export(network, example_input=x, formats="onnx", out=tmp_path / "out")
    session = ort.InferenceSession(bundle.folder / "model.onnx")
    answer = session.run(None, {"input_0": x.numpy()})[0]
    np.testing.assert_allclose(answer, network(x).detach().numpy(), atol=1e-5)


def test_a_repmlpnet_inside_an_own_module_becomes_the_graph_of_its_family(tmp_path: Path) -> None:
    card, network = small_card("repmlpnet"), small_network("repmlpnet")
    own = export(Whole(network).eval(), example_input=torch.zeros(1, 3, 32, 32), out=tmp_path / "own")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "own" / "model.onnx").graph.node)
    assert own.manifest.family == "custom"
    assert kinds["BatchNormalization"] == 0
    network.card = card
    export(network, out=tmp_path / "family")
    assert kinds == Counter(node.op_type for node in onnx.load(tmp_path / "family" / "model.onnx").graph.node)
