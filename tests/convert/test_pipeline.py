import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from repmlp_deploy import Bundle, Predictor, export, get_model
from repmlp_deploy.bundle import MANIFEST
from repmlp_deploy.card import load_card
from repmlp_deploy.convert import graphs, pipeline, transform
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats import parse_formats
from repmlp_deploy.convert.graph.simplify import SimplificationFailed
from repmlp_deploy.convert.options import parse_batch, parse_size
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.checkpoint import read_checkpoint
from repmlp_deploy.convert.source.state_dict import find_state_dict
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CheckpointError, InputError, VerificationError


def test_the_manifest_says_what_the_contract_asks(bundle: Bundle) -> None:
    data = json.loads((bundle.folder / MANIFEST).read_text())
    assert data["schema"] == 1
    assert (data["name"], data["family"], data["task"]) == ("repmlp-digits", "repmlpnet", "classify")
    assert data["input"] == {"name": "images", "dtype": "float32", "shape": [None, 3, 32, 32]}
    assert data["output"] == {"name": "logits", "dtype": "float32", "shape": [None, 10]}
    assert data["preprocessing"]["resize"] == {"mode": "exact", "size": [32, 32]}
    assert data["labels"] == [str(i) for i in range(10)]
    assert data["batch"] == {"min": 1, "opt": 4, "max": 16}
    assert set(data["artifacts"]) == {"onnx", "torch", "checkpoint", "trt-rtx"}
    for entry in data["artifacts"].values():
        assert {"path", "sha256", "bytes", "precision"} <= set(entry)
        assert (bundle.folder / entry["path"]).stat().st_size == entry["bytes"]
    provenance = data["provenance"]
    assert provenance["checkpoint"]["layout"] == "official"
    assert len(provenance["checkpoint"]["sha256"]) == 64
    assert {"versions", "platform", "date", "cpu"} <= set(provenance)


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    clock = pipeline._Clock(shown.append)
    with clock.step("calibrate") as tell:
        tell(4, 12)  # too early to say anything
        monkeypatch.setattr(pipeline, "_TELL_SECONDS", 0)
        tell(8, 12)
        tell(12, 12)
    assert shown == ["calibrate", "calibrate: 8 of 12"]
    assert list(clock.seconds) == ["calibrate"]


def test_every_hop_is_in_the_certificate_at_three_batch_sizes(bundle: Bundle) -> None:
    hops = bundle.manifest.certificate
    steps = ["merged", "folded", "torch.export program", "exported ONNX", "simplified ONNX"]
    runs = [hop.name for hop in hops if hop.name in steps]
    assert runs == [step for step in steps for _ in range(3)]
    assert [hop.name for hop in hops if hop.name not in steps] == [
        "trained, float32",
        *("merged, float64", "merged weights", "folded, float64", "folded weights"),
        *("merged, redrawn", "folded, redrawn"),
        *("exported ONNX weights", "simplified ONNX weights"),
    ]
    assert {hop.batch for hop in hops if hop.name == "merged"} == {1, 3, 4}
    assert all(hop.passed and hop.max_abs <= hop.allowed for hop in hops[1:])
    assert hops[0].passed is None


def test_the_graph_has_no_batch_norm_and_a_symbolic_batch(bundle: Bundle) -> None:
    graph = onnx.load(bundle.folder / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in kinds
    assert "MatMul" in kinds
    dims = graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [d.dim_value for d in dims[1:]] == [3, 32, 32]


def test_the_graph_carries_its_metadata(bundle: Bundle) -> None:
    session = ort.InferenceSession(bundle.folder / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["name"] == "repmlp-digits"
    assert json.loads(metadata["labels"]) == [str(i) for i in range(10)]
    assert json.loads(metadata["preprocessing"])["mean"] == [78.0, 78.0, 78.0]


def test_the_graph_refuses_other_sizes(bundle: Bundle) -> None:
    session = ort.InferenceSession(bundle.folder / "model.onnx", providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="Got: 64 Expected: 32"):
        session.run(None, {"images": np.zeros((1, 3, 64, 64), np.float32)})


def test_the_torch_program_gives_the_same_answers(bundle: Bundle) -> None:
    program = torch.export.load(bundle.folder / "model.pt2")
    probe = bundle.probe()
    output = program.module()(torch.from_numpy(probe.inputs)).numpy()
    np.testing.assert_allclose(output, probe.reference, rtol=0, atol=1e-4)


def test_the_merged_checkpoint_is_recognised_and_gives_the_same_answers(
    bundle: Bundle, digits_state: dict[str, torch.Tensor]
) -> None:
    """Trained → merged checkpoint → loaded again: upstream's deploy-mode keys, the same outputs."""
    path = bundle.folder / "model.safetensors"
    keys = set(find_state_dict(read_checkpoint(path).content).tensors)
    gone = {key for key in digits_state if "repconv" in key or "fc3_bn" in key}
    blocks = {key.removesuffix("fc3.weight") for key in digits_state if key.endswith("fc3.weight")}
    assert keys == (set(digits_state) - gone) | {f"{block}fc3.bias" for block in blocks}
    with pytest.raises(CheckpointError, match=r"merged already.*--allow-merged"):
        load_trained(path)
    again = load_trained(path, allow_merged=True)
    assert again.merged
    probe = bundle.probe()
    np.testing.assert_allclose(again.network(torch.from_numpy(probe.inputs)).numpy(), probe.reference, atol=1e-4)


def test_a_merged_checkpoint_exports_when_that_is_accepted(bundle: Bundle, tmp_path: Path) -> None:
    result = export(bundle.folder / "model.safetensors", out=tmp_path / "out", allow_merged=True)
    assert any("merged already" in note for note in result.manifest.notes)
    assert result.manifest.provenance["checkpoint"]["merged"]


def test_the_merged_graph_keeps_upstreams_form(digits_checkpoint: Path, tmp_path: Path) -> None:
    result = export(digits_checkpoint, graph="merged", batch=2, out=tmp_path / "out")
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    grouped = [n for n in nodes if n.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in n.attribute)]
    assert grouped
    assert "MatMul" not in {n.op_type for n in nodes}
    assert [hop.name for hop in result.manifest.certificate if "folded" in hop.name] == []


def test_a_single_batch_size_is_fixed(digits_checkpoint: Path, tmp_path: Path) -> None:
    result = export(digits_checkpoint, batch=3, out=tmp_path / "out")
    assert result.manifest.input.shape == (3, 3, 32, 32)
    with Predictor(tmp_path / "out") as predictor:
        x = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
        assert predictor.logits(x).shape == (7, 10)


def test_a_network_in_memory_exports_by_its_card(tmp_path: Path) -> None:
    model = get_model("repmlp-digits", pretrained=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = export(model, formats="checkpoint", out=tmp_path / "out")
    assert result.manifest.provenance["checkpoint"] is None
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.switch_to_deploy()
    with pytest.raises(InputError, match=r"before switch_to_deploy\(\)"):
        export(model, formats="checkpoint", out=tmp_path / "again")
    with pytest.raises(InputError, match="carries no card"):
        export(torch.nn.Linear(2, 2).eval(), out=tmp_path / "again")
    with pytest.raises(InputError, match="training mode"):
        export(get_model("repmlp-digits").train(), out=tmp_path / "again")


def drop_a_branch(trained: torch.nn.Module) -> torch.nn.Module:
    merged = merge_branches(trained)
    block = trained.stages[1][0].repmlp_block
    merged.stages[1][0].repmlp_block.fc3.bias -= block.repconv3.bn.bias.repeat_interleave(block.h * block.w)
    return merged


def test_a_network_in_memory_is_left_alone_and_one_from_a_file_gives_its_memory_back(digits_checkpoint: Path) -> None:
    loaded = load_trained(digits_checkpoint)
    left = loaded.without_weights()
    assert {parameter.device.type for parameter in left.network.parameters()} == {"meta"}
    assert left.checkpoint is not None
    assert loaded.checkpoint is not None
    assert left.checkpoint.sha256 == loaded.checkpoint.sha256
    own = replace(loaded, network=get_model("repmlp-digits"), checkpoint=None)
    assert {parameter.device.type for parameter in own.without_weights().network.parameters()} == {"cpu"}


def test_nothing_holds_the_checkpoints_tensors_once_the_network_is_traced(
    digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name for the loaded network that outlives `without_weights` costs a copy of all weights until the end."""
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    take, trace = pipeline.open_source, pipeline.trace_for

    def recorded(*arguments: object, **options: object) -> object:
        trained = take(*arguments, **options)
        tensors.extend(weakref.ref(tensor) for tensor in trained.state.tensors.values())
        return trained

    def counted(*arguments: object, **options: object) -> object:
        alive.append(sum(tensor() is not None for tensor in tensors))
        return trace(*arguments, **options)

    monkeypatch.setattr(pipeline, "open_source", recorded)
    monkeypatch.setattr(pipeline, "trace_for", counted)
    export(digits_checkpoint, out=tmp_path / "out")
    assert len(tensors) > 100
    assert alive == [0]


def test_a_wrong_merge_is_caught_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(transform, "merge_branches", drop_a_branch)
    with pytest.raises(VerificationError, match="merged at batch 1 differs from the trained network by"):
        export(digits_checkpoint, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_an_earlier_bundle(
    monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path, bundle_folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in bundle_folder.iterdir()}
    monkeypatch.setattr(transform, "merge_branches", drop_a_branch)
    with pytest.raises(VerificationError):
        export(digits_checkpoint, out=bundle_folder)
    assert {path.name: path.read_bytes() for path in bundle_folder.iterdir()} == before


def crash(_graph: onnx.ModelProto, _simplifier: object) -> onnx.ModelProto:
    raise SimplificationFailed("onnxsim crashed with signal 11")


def spoil(graph: onnx.ModelProto, _simplifier: object) -> onnx.ModelProto:
    """A simplifier that changes the output: the head's bias is doubled."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    bias = next(t for t in result.graph.initializer if list(t.dims) == [10])
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) * 2).tobytes()
    return result


@pytest.mark.parametrize(("simplifier", "said"), [(crash, "crashed with signal 11"), (spoil, "changed the output by")])
def test_a_simplifier_that_fails_is_done_without_and_said_so(
    monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path, tmp_path: Path, simplifier: object, said: str
) -> None:
    monkeypatch.setattr(graphs, "simplify_graph", simplifier)
    result = export(digits_checkpoint, out=tmp_path / "out")
    assert any(note.startswith("not simplified") and said in note for note in result.manifest.notes)
    assert not any(hop.name == "simplified ONNX" for hop in result.manifest.certificate)
    with Predictor(tmp_path / "out") as predictor:
        predictor.self_check()


def test_card_and_checkpoint_that_disagree(digits_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit repmlpnet-t224"):
        load_trained(digits_checkpoint, "repmlpnet-t224")
    with pytest.raises(InputError, match="--input-size 64x64 contradicts repmlp-digits, which takes 32x32"):
        load_trained(digits_checkpoint, load_card("repmlp-digits"), input_size=(64, 64))
    with pytest.raises(CheckpointError, match="does not divide"):
        load_trained(digits_checkpoint, input_size=(80, 80))


@pytest.mark.parametrize("text", ["0", "a", "1:2", "8:4:2", "1:8:64:128", "-1", "", "1.5", "1:0:2", "²"])
def test_wrong_batches(text: str) -> None:
    with pytest.raises(InputError, match="--batch is"):
        parse_batch(text)


@pytest.mark.parametrize("text", ["224", "224x", "0x3", "axb", "1x2x3"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(InputError, match="expected HxW"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration_method": "entropy"}, "--calibration-method is for int8 and fp8; --precision is fp32: drop"),
        ({"calibration_method": "minmax", "precision": "fp16"}, "is for int8 and fp8; --precision is fp16: drop"),
        ({"opset": 20, "precision": "bf16"}, "bf16 needs opset 22 or later; --opset is 20"),
        (
            {"opset": 18, "formats": "torch,checkpoint"},
            "--opset is about the ONNX graph, of which --format torch,check",
        ),
        (
            {"sensitivity": True, "precision": "fp16", "formats": "openvino"},
            "about the fp16 ONNX graph: drop it, or add",
        ),
        ({"engine": EngineOptions(tf32=True)}, "--tf32 is about engines; add --format trt or trt-rtx"),
        ({"batch": "1:2:4,4:8:16"}, "--batch is about engines; add --format trt or trt-rtx"),
    ],
)
def test_options_that_would_say_nothing_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        export(tmp_path / "no.pth", out=tmp_path / "out", **options)


def test_ranges_that_openvino_chooses_have_no_method(tmp_path: Path) -> None:
    samples = {"images": np.zeros((32, 3, 32, 32), np.float32)}
    given: dict[str, Any] = {"precision": "int8", "calibration": samples, "formats": "openvino"}
    with pytest.raises(InputError, match="--calibration-method is about the int8 ONNX graph: drop it, or add"):
        export(tmp_path / "no.pth", calibration_method="entropy", out=tmp_path / "out", **given)


def test_formats_have_aliases_and_suggestions() -> None:
    assert parse_formats("engine, ONNX,tensorrt") == ("trt", "onnx")
    with pytest.raises(InputError, match=r"--format onxx: unknown; did you mean onnx\?"):
        parse_formats("onxx")
    with pytest.raises(InputError, match="unknown; expected one of onnx"):
        parse_formats("")
