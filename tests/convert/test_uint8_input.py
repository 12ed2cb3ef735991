"""Bundles that take uint8 images: proved, described, and used like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.bundle import PROBE, ArtifactEntry, describe_file
from repmlp_deploy.card import ModelCard, Preprocessing, Resize, data_root
from repmlp_deploy.convert import graphs
from repmlp_deploy.convert.graph.level_input import level_weights, with_level_input
from repmlp_deploy.convert.rework import refit
from repmlp_deploy.convert.rework.derive import derive_again
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.convert.rework.refit import refit_bundle
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.runtime.images import normalised
from support.task_cases import small_card, small_network

SAMPLES = sorted((data_root() / "samples" / "digits").glob("*.png"))


@pytest.fixture(scope="module")
def uint8_folder(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uint8") / "digits"
    export(digits_checkpoint, formats="onnx,openvino,trt-rtx", input="uint8", batch="1:4:16", out=out)
    return out


def test_manifest_graph_and_probe_say_what_is_taken(uint8_folder: Path) -> None:
    bundle = Bundle.load(uint8_folder)
    assert (bundle.manifest.input.dtype, bundle.manifest.input.shape) == ("uint8", (None, 32, 32, 3))
    assert bundle.manifest.image_size == (32, 32)
    assert bundle.manifest.preprocessing.input == "uint8"
    assert any("uint8 images: the normalisation is folded" in note for note in bundle.manifest.notes)
    assert bundle.probe().inputs.dtype == np.uint8
    model = onnx.load_from_string(bundle.read(bundle.artifact("onnx")))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["preprocessing"])["input"] == "uint8"


def test_the_step_has_rows_of_its_own_and_every_artifact_is_compared_after_it(uint8_folder: Path) -> None:
    names = [hop.name for hop in Bundle.load(uint8_folder).manifest.certificate]
    assert names.count("uint8 input, ONNX") == 3
    assert names.index("simplified ONNX") < names.index("uint8 input, ONNX") < names.index("OpenVINO fp32")


@pytest.mark.parametrize("artifact", ["onnx", "openvino"])
def test_predictions_are_those_of_float_inputs(bundle: Bundle, uint8_folder: Path, artifact: str) -> None:
    with Predictor(bundle.folder, format="onnx") as floats, Predictor(uint8_folder, format=artifact, check=True) as own:
        image = own.preprocess(SAMPLES[0])
        assert (image.dtype, image.shape, image.flags.c_contiguous) == (np.uint8, (32, 32, 3), True)
        np.testing.assert_array_equal(normalised(image, own.manifest.preprocessing), floats.preprocess(SAMPLES[0]))
        stacked = [np.stack([each.preprocess(path) for path in SAMPLES]) for each in (floats, own)]
        np.testing.assert_allclose(own.logits(stacked[1]), floats.logits(stacked[0]), atol=1e-4)
        assert [answer.pred_class for answer in own(SAMPLES)] == [str(i) for i in range(10)]
        with pytest.raises(InputError, match=r"input is \(10, 3, 32, 32\); .* takes \(N, 32, 32, 3\)"):
            own.logits(stacked[0])


def test_the_bundle_is_derived_from_its_checkpoint_again(uint8_folder: Path, digits_checkpoint: Path) -> None:
    bundle = Bundle.load(uint8_folder)
    hops, notes = derive_again(bundle, digits_checkpoint)
    assert all(hop.passed is not False for hop in hops)
    assert "onnx weights" in {hop.name for hop in hops}
    assert not any("of onnx" in note for note in notes)


def test_a_graph_that_is_only_merged_is_derived_again(digits_checkpoint: Path, tmp_path: Path) -> None:
    """There the exporter fuses a BatchNorm into the convolution that takes the levels."""
    made = export(digits_checkpoint, graph="merged", input="uint8", batch="1:2:4", out=tmp_path / "bundle")
    hops, _ = derive_again(made, digits_checkpoint)
    assert all(hop.passed is not False for hop in hops)


@pytest.mark.parametrize("weight", ["conv_embedding.conv.weight", "stages.0.0.fc3", "images_centre"])
def test_a_wrong_weight_is_found_when_it_is_derived_again(
    uint8_folder: Path, digits_checkpoint: Path, tmp_path: Path, weight: str
) -> None:
    changed = _with_graph(uint8_folder, tmp_path / "changed", _scaled(weight, 1.001))
    with pytest.raises(VerificationError, match=weight):
        derive_again(changed, digits_checkpoint)


def _with(folder: Path, out: Path, *names: str) -> Path:
    """A copy of the bundle with these artifacts alone."""
    bundle = Bundle.load(folder)
    kept = {name: bundle.artifact(name) for name in names}
    manifest = bundle.manifest.model_copy(update={"artifacts": kept})
    files = {entry.path: bundle.read(entry) for entry in Bundle(manifest).files()}
    Bundle(manifest, contents=files).save(out)
    return out


def _with_graph(folder: Path, out: Path, change: Callable[[onnx.GraphProto], None]) -> Bundle:
    """A copy of the bundle whose ONNX graph was changed, with a manifest that agrees."""
    bundle = Bundle.load(_with(folder, out, "onnx"))
    entry = bundle.artifact("onnx")
    model = onnx.load_from_string(bundle.read(entry))
    change(model.graph)
    data = model.SerializeToString()
    described = ArtifactEntry.model_validate(entry.model_dump() | describe_file(entry.path, data).model_dump())
    manifest = bundle.manifest.model_copy(update={"artifacts": {"onnx": described}})
    return Bundle(manifest, contents={entry.path: data, PROBE: bundle.read(bundle.manifest.probe)}).save(out)


def _scaled(name: str, factor: float) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def test_bisecting_compares_every_value_and_finds_nothing_wrong(uint8_folder: Path, digits_checkpoint: Path) -> None:
    """The folded convolution is what the trace's own weights fold into, and not a wrong weight."""
    found = blame_bundle(Bundle.load(uint8_folder), digits_checkpoint)
    assert found.blame is None
    assert found.compared == ("onnx", "openvino")


@pytest.mark.parametrize(
    ("weight", "factor"),
    [("conv_embedding.conv.weight", 1.001), ("conv_embedding.conv.bias", 1.01), ("stages.1.0.ffn.0.weight", 1.001)],
)
def test_bisecting_finds_a_wrong_weight(
    uint8_folder: Path, digits_checkpoint: Path, tmp_path: Path, weight: str, factor: float
) -> None:
    model = onnx.load_from_string(Bundle.load(uint8_folder).read(Bundle.load(uint8_folder).artifact("onnx")))
    assert weight in {t.name for t in model.graph.initializer}
    changed = _with_graph(uint8_folder, tmp_path / "changed", _scaled(weight, factor))
    blame = blame_bundle(changed, digits_checkpoint).blame
    assert blame is not None
    assert blame.element is not None
    assert blame.element.name == weight


def test_bisecting_finds_a_wrong_normalisation(uint8_folder: Path, digits_checkpoint: Path, tmp_path: Path) -> None:
    """The constant at the input is no weight of the network, so its fault shows in the first value."""
    changed = _with_graph(uint8_folder, tmp_path / "changed", _scaled("images_centre", 1.1))
    blame = blame_bundle(changed, digits_checkpoint).blame
    assert blame is not None
    assert "conv_embedding" in f"{blame.block} {blame.part}"


@pytest.fixture
def later_checkpoint(digits_checkpoint: Path, tmp_path: Path) -> Path:
    """The digits network after, say, another epoch."""
    state = load_file(digits_checkpoint)
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        if value.is_floating_point():
            value.mul_(1 + 0.02 * torch.rand(value.shape, generator=generator))
    torch.save(state, tmp_path / "later.pth")
    return tmp_path / "later.pth"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_refit_is_what_an_export_of_the_new_weights_is(
    uint8_folder: Path, digits_checkpoint: Path, later_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    if precision == "fp32":
        source = _with(uint8_folder, tmp_path / "source", "onnx")
    else:
        source = tmp_path / "source"
        export(digits_checkpoint, precision=precision, input="uint8", batch="1:4:16", out=source)
    refitted = refit_bundle(source, later_checkpoint, out=tmp_path / "refitted")
    again = export(later_checkpoint, precision=precision, input="uint8", batch="1:4:16", out=tmp_path / "again")
    assert refitted.manifest.verdict.passed
    assert refitted.manifest.preprocessing.input == "uint8"
    assert refitted.probe().inputs.dtype == np.uint8
    names = {hop.name for hop in refitted.manifest.certificate}
    assert ("refitted ONNX weights" in names) == (precision == "fp32")
    ours, theirs = (onnx.load_from_string(b.read(b.artifact("onnx"))).graph.initializer for b in (refitted, again))
    expected = {t.name: onnx.numpy_helper.to_array(t) for t in theirs}
    assert {t.name for t in ours} == expected.keys()
    for tensor in ours:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), expected[tensor.name], err_msg=tensor.name)
    with Predictor(refitted.folder, check=True) as new, Predictor(source) as old:
        error = np.abs(old.logits(refitted.probe().inputs) - refitted.probe().reference).max()
        assert error > 10 * np.abs(new.logits(refitted.probe().inputs) - refitted.probe().reference).max()


def test_a_refit_that_forgets_the_normalisation_is_caught(
    uint8_folder: Path, later_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _with(uint8_folder, tmp_path / "source", "onnx")

    def forgetful(state: dict[str, np.ndarray], graph: onnx.ModelProto, how: Preprocessing) -> dict[str, np.ndarray]:
        return {**level_weights(state, graph, how), **state}

    monkeypatch.setattr(refit, "level_weights", forgetful)
    with pytest.raises(VerificationError, match="refitted ONNX"):
        refit_bundle(source, later_checkpoint, out=tmp_path / "refitted")
    assert not (tmp_path / "refitted").exists()


def test_the_benchmark_measures_it(uint8_folder: Path, tmp_path: Path) -> None:
    """Its inputs are levels, and its answers are those of the trained network."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "repmlp_deploy", "bench", "--bundle", str(uint8_folder), "--json", str(report)]
    done = subprocess.run(
        [*command, "--batch", "1", "--formats", "onnx", "--seconds", "0.2"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in json.loads(report.read_text())["rows"]] == ["measured"]


BGR = Preprocessing(
    resize=Resize(mode="exact", size=(32, 32)),
    mean=(103.53, 116.28, 123.675),
    std=(57.375, 57.12, 58.395),
    colour_order="BGR",
)


def stem_card() -> ModelCard:
    return ModelCard(name="stem", family="custom", task="classify", input_size=(32, 32), network={}, preprocessing=BGR)


class Stem(nn.Module):
    """A network of one's own whose first convolution is padded; its images are BGR."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16 * 16, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_a_padded_first_convolution_gives_the_bits_of_float_inputs(tmp_path: Path) -> None:
    card, answers = stem_card(), []
    for kind in ("float32", "uint8"):
        network, example = Stem().eval(), torch.zeros(2, 3, 32, 32)
        made = export(network, example_input=example, card=card, input=kind, batch="1:2:4", out=tmp_path / kind)
        with Predictor(made.folder, check=True) as predictor:
            answers.append([answer.pred_scores for answer in predictor(SAMPLES)])
    assert any("is at the input" in note for note in made.manifest.notes)
    np.testing.assert_array_equal(answers[0], answers[1])


@pytest.mark.parametrize("formats", ["torch", "torch,onnx"])
def test_a_torch_program_gives_the_bits_of_float_inputs(formats: str, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    answers = []
    for kind, batch in (("float32", normalised(levels, BGR)), ("uint8", levels)):
        network, example = Stem().eval(), torch.zeros(2, 3, 32, 32)
        made = export(
            network,
            example_input=example,
            card=stem_card(),
            formats=formats,
            input=kind,
            batch="1:2:4",
            out=tmp_path / kind,
        )
        assert made.manifest.input.dtype == kind
        program = torch.export.load(tmp_path / kind / "model.pt2").module()
        answers.append(program(torch.from_numpy(batch)).numpy())
        assert "torch.export program" in {hop.name for hop in made.manifest.certificate}
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("pspnet", "folded"),
        ("repmlpnet-backbone", "folded"),
        ("mobilefacenet", "at the input"),
        ("repmlp-resnet", "at the input"),  # its first convolution is 7x7, padded by 3
    ],
)
def test_other_families_take_uint8_images(family: str, where: str, tmp_path: Path) -> None:
    made = export(small_network(family), card=small_card(family), input="uint8", batch="1:2:4", out=tmp_path / family)
    assert made.manifest.verdict.passed
    assert (made.manifest.input.dtype, made.manifest.input.shape) == ("uint8", (None, 32, 32, 3))
    assert any(note.startswith("uint8 images") and where in note for note in made.manifest.notes)
    with Predictor(made.folder, check=True) as predictor:
        assert predictor.run(**{made.manifest.input.name: np.zeros((1, 32, 32, 3), np.uint8)})


def test_a_network_without_convolutions_takes_uint8_images(tmp_path: Path) -> None:
    weights = data_root() / "weights" / "pure-mlp-digits.safetensors"
    made = export(weights, card="pure-mlp-digits", input="uint8", batch="1:2:4", out=tmp_path / "bundle")
    assert made.manifest.input.dtype == "uint8"
    with Predictor(made.folder, check=True) as predictor:
        assert [answer.pred_label for answer in predictor(SAMPLES)] == list(range(10))


def test_a_wrong_normalisation_is_caught_and_nothing_is_written(
    digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean that is a level off for one channel."""

    def wrong(graph: onnx.ModelProto, how: Preprocessing) -> tuple[onnx.ModelProto, str]:
        mean = (how.mean[0] + 1, *how.mean[1:])
        return with_level_input(graph, how.model_copy(update={"mean": mean}))

    monkeypatch.setattr(graphs, "with_level_input", wrong)
    with pytest.raises(VerificationError, match="uint8 input, ONNX at batch 1"):
        export(digits_checkpoint, input="uint8", batch="1:2:4", out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_takes_no_images_is_refused(digits_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="--format checkpoint holds weights alone, for float32: drop it, or --input"):
        export(digits_checkpoint, formats="onnx,checkpoint", input="uint8", out=out)
    with pytest.raises(InputError, match="int8"):
        export(digits_checkpoint, input="int8", out=out)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    with pytest.raises(InputError, match="has no card, so nobody said how its images are normalised"):
        export(own, example_input=torch.zeros(2, 3, 8, 8), input="uint8", out=out)
