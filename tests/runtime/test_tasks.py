import json
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from repmlp_deploy import Embedding, Predictor, Segmentation, export
from repmlp_deploy.card import ModelCard, TaskName, load_card
from repmlp_deploy.cli.predict import _SHOWN, predict_command
from repmlp_deploy.cli.shared.console import _run
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.description import _NAMED
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import BundleError, CardError, InputError, VerificationError
from repmlp_deploy.evaluation.datasets import DATASETS
from repmlp_deploy.evaluation.metrics import TALLIES
from repmlp_deploy.evaluation.tables import _ANSWERS
from repmlp_deploy.nets.families import build_network
from repmlp_deploy.numerics import compare, require_close
from repmlp_deploy.runtime.images import preprocess, to_image
from repmlp_deploy.runtime.tasks import TASKS, embeddings_from_outputs, find_task, masks_from_logits, palette
from repmlp_deploy.serving.images import IMAGE_OUTPUTS
from repmlp_deploy.zoo import inference_model
from support.task_cases import filled, random_inputs, save_network, small_card, small_network


@pytest.fixture(scope="module", params=["pspnet", "mobilefacenet"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    network = small_network(request.param)
    checkpoint = save_network(network, folder / "net.pth")
    bundle = export(checkpoint, formats="onnx,trt-rtx", batch="1:2:4", out=folder / "bundle")
    return network, bundle


@pytest.fixture(scope="module")
def photograph():
    return load_sample_image("china.jpg")[:120, :200]


def run_predict(capsys, *arguments):
    import typer

    app = typer.Typer()
    app.command()(predict_command)
    code = _run(typer.main.get_command(app), [str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_tasks_of_cards_are_those_of_the_table():
    assert set(ModelCard.model_fields["task"].annotation.__args__) == set(TASKS)
    with pytest.raises(BundleError, match="this version knows"):
        find_task("describe")


def test_a_network_of_every_task_passes_all_stations(exported):
    _, bundle = exported
    manifest = bundle.manifest
    steps = {hop.name for hop in manifest.certificate if hop.passed}
    assert {"merged", "folded", "exported ONNX", "simplified ONNX"} <= steps
    assert set(manifest.artifacts) == {"onnx", "trt-rtx"}
    assert manifest.task in TASKS
    assert manifest.output.name == TASKS[manifest.task].output
    has_top1 = {hop.top1 is not None for hop in manifest.certificate if hop.batch}
    assert has_top1 == {TASKS[manifest.task].class_axes is not None}
    assert not any("not simplified" in note for note in manifest.notes)


def test_every_table_has_tasks_that_a_card_may_have():
    known = set(get_args(TaskName))
    assert set(TASKS) == known
    assert set(DATASETS) == set(TALLIES)
    for table in (_ANSWERS, _NAMED, _SHOWN, DATASETS, IMAGE_OUTPUTS):
        assert set(table) <= known


def test_the_exported_graph_has_no_batch_norm(exported):
    import onnx

    _, bundle = exported
    graph = onnx.load_from_string(bundle.read(bundle.artifact("onnx")))
    assert not [node for node in graph.graph.node if node.op_type == "BatchNormalization"]


def test_the_bundle_checks_itself_and_notices_a_change(exported):
    _, bundle = exported
    with Predictor(bundle) as predictor:
        assert all(found.max_abs < 1e-3 for _, found in predictor.self_check())
        runner = predictor._served.runner
        run = runner.run_all
        runner.run_all = lambda batch: [output * np.float32(1.001) for output in run(batch)]
        with pytest.raises(VerificationError, match="differs"):
            predictor.self_check()


def test_answers_are_those_of_the_trained_network(exported, photograph):
    network, bundle = exported
    with Predictor(bundle) as predictor:
        answer = predictor(photograph)
        batch = torch.from_numpy(preprocess(to_image(photograph), bundle.manifest.preprocessing)[None])
        raw = network(batch).detach().numpy()
        assert predictor.details
        assert len(predictor([photograph] * 5)) == 5
    if bundle.manifest.task == "segment":
        assert isinstance(answer, Segmentation)
        assert answer.mask.shape == photograph.shape[:2]
        assert answer.mask.dtype == np.uint8
        expected = masks_from_logits(raw, [photograph.shape[:2]])[0].mask
        assert np.mean(answer.mask == expected) > 0.999
        assert len(np.unique(expected)) > 1
    else:
        assert isinstance(answer, Embedding)
        assert np.isclose(np.linalg.norm(answer.vector), 1, atol=1e-6)
        assert np.allclose(answer.vector, raw[0] / np.linalg.norm(raw[0]), atol=1e-4)


def test_the_command_shows_every_task(exported, photograph, tmp_path, capsys):
    _, bundle = exported
    image = tmp_path / "view.png"
    Image.fromarray(photograph).save(image)
    code, out, _ = run_predict(capsys, bundle.folder, image, "--json")
    assert code == 0
    found = json.loads(out)["predictions"][0]
    if bundle.manifest.task == "embed":
        assert found["similarity_to_first"] == pytest.approx(1)
        code, _, said = run_predict(capsys, bundle.folder, image, "--out", tmp_path / "masks")
        assert code == 2
        assert "made to embed" in said
        return
    assert sum(entry["share"] for entry in found["classes"]) == pytest.approx(1)
    code, _, _ = run_predict(capsys, bundle.folder, image, "--out", tmp_path / "masks")
    assert code == 0
    with Image.open(tmp_path / "masks" / "view-mask.png") as mask:
        assert mask.mode == "L"
        assert mask.size == (200, 120)
    with Image.open(tmp_path / "masks" / "view-overlay.png") as overlay:
        assert overlay.mode == "RGB"
        assert overlay.size == (200, 120)
    twin = tmp_path / "other" / "view.png"
    twin.parent.mkdir()
    Image.fromarray(photograph).save(twin)
    code, _, said = run_predict(capsys, bundle.folder, image, twin, "--out", tmp_path / "masks")
    assert code == 2
    assert "one name" in said


def test_a_mask_follows_the_logits_and_the_image_s_size():
    logits = np.zeros((1, 3, 4, 4), np.float32)
    logits[0, 1, :, 2:] = 5
    logits[0, 2, 3:, :] = 9
    mask = masks_from_logits(logits, [(4, 4)])[0].mask
    assert mask.tolist() == [[0, 0, 1, 1]] * 3 + [[2, 2, 2, 2]]
    large = masks_from_logits(logits, [(40, 80)])[0]
    assert large.mask.shape == (40, 80)
    assert (large.mask[0, 0], large.mask[0, -1], large.mask[-1, 0]) == (0, 1, 2)
    shares = [share for _, share in large.shares()]
    assert shares == sorted(shares, reverse=True)
    assert sum(share for _, share in large.shares()) == pytest.approx(1)


def test_many_classes_need_more_than_a_byte():
    logits = np.zeros((1, 300, 2, 2), np.float32)
    logits[0, 299] = 1
    found = masks_from_logits(logits, [(2, 2)])[0]
    assert found.mask.dtype == np.int32
    assert found.mask.max() == 299
    assert np.asarray(found.mask_image()).max() == 299
    found = masks_from_logits(logits, [(4, 4)])[0]
    assert found.mask.min() == 299


def test_an_overlay_belongs_to_its_image():
    found = Segmentation(np.array([[0, 1]], np.uint8))
    image = np.full((1, 2, 3), 100, np.uint8)
    assert np.asarray(found.overlay(image, alpha=0)).tolist() == image.tolist()
    assert np.asarray(found.overlay(image, alpha=1)).tolist() == [[[0, 0, 0], [128, 0, 0]]]
    with pytest.raises(InputError, match="the mask is 1x2"):
        found.overlay(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(InputError, match="alpha"):
        found.overlay(image, alpha=2)


def test_the_palette_tells_256_classes_apart():
    assert len(np.unique(palette(256), axis=0)) == 256
    assert palette(16)[15].tolist() == [192, 128, 128]  # VOC's person


def test_embeddings_have_length_one_and_a_cosine():
    first, second, zero = embeddings_from_outputs(np.array([[3, 4], [4, -3], [0, 0]], np.float32))
    assert first.vector.tolist() == pytest.approx([0.6, 0.8])
    assert first.similarity(first) == pytest.approx(1)
    assert first.similarity(second) == pytest.approx(0)
    assert first.similarity(zero) == 0
    with pytest.raises(InputError, match="2 and 3"):
        first.similarity(Embedding(np.zeros(3, np.float32)))


def test_dense_outputs_agree_by_the_pixel():
    reference = np.zeros((1, 2, 2, 2))
    reference[:, 1] = [[1, 1], [1, -1]]
    output = reference.copy()
    output[0, 1, 0, 0] = -1
    assert compare(output, reference).top1 == 0.75
    assert compare(reference, reference).top1 == 1
    assert require_close("x", reference, reference, floor=1, classes=False).top1 is None


def test_a_segmentation_card_must_see_every_pixel():
    data = small_card("pspnet").model_dump()
    data["preprocessing"] = {**data["preprocessing"], "crop": (32, 32)}
    with pytest.raises(ValueError, match="every pixel"):
        ModelCard.model_validate(data)


def test_inference_model_only_classifies():
    network = small_network("mobilefacenet")
    network.card = load_card("repmlp-mobilefacenet")
    with pytest.raises(InputError, match="made to embed"):
        inference_model(network, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(CardError):
        load_card("repmlp-facenet")


@pytest.mark.slow
def test_a_full_size_embedder_is_recognised_and_exported(tmp_path):
    checkpoint = save_network(filled(build_network(load_card("repmlp-mobilefacenet"))), tmp_path / "net.pth")
    bundle = export(checkpoint, batch="1:2:3", out=tmp_path / "bundle")
    assert bundle.manifest.name == "repmlp-mobilefacenet"
    with Predictor(bundle) as predictor:
        predictor.self_check()
        first, second = predictor([load_sample_image("china.jpg"), load_sample_image("flower.jpg")])
    assert first.similarity(second) < 1


@pytest.mark.slow
def test_a_full_size_segmenter_is_recognised_and_merged(tmp_path):
    network = filled(build_network(load_card("repmlp-pspnet-t256")))
    trained = load_trained(save_network(network, tmp_path / "net.pth"))
    assert trained.card.name == "repmlp-pspnet-t256"
    x = random_inputs((1, 3, 256, 256)).float()
    torch.testing.assert_close(merge_branches(network)(x), network(x), rtol=1e-4, atol=1e-4)
