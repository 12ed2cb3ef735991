import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from repmlp_deploy import Predictor, export
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CardError, CheckpointError, InputError
from repmlp_deploy.nets.families import build_network
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec
from support.task_cases import filled, random_inputs, save_network, small_card, small_network

FAMILY = "repmlpnet-backbone"
NAMES = {
    "conv_embedding.conv.": "patch_embed.projection.",
    "conv_embedding.bn.": "patch_embed.norm.",
    "embeds.": "downsample_layers.",
    "head_norm.": "final_norm.",
    ".gp.fc1.": ".gp.conv1.conv.",
    ".gp.fc2.": ".gp.conv2.conv.",
    ".prebn1.": ".norm1.",
    ".prebn2.": ".norm2.",
}


def mmpretrain_key(key):
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs) if ours.startswith(".") or key.startswith(ours) else key
    return key


@torch.no_grad()
def test_maps_are_tapped_where_mmpretrain_taps_them():
    network = small_network(FAMILY).double()
    x = random_inputs((2, 3, 32, 32))
    y = network.conv_embedding(x)
    for unit in network.stages[0]:
        y = unit(y)
    first = network.embeds[0](y)  # behind the downsampling of its stage
    y = first
    for unit in network.stages[1]:
        y = unit(y)
    found = network(x)
    assert list(found) == ["stage0", "stage1"]
    assert torch.equal(found["stage0"], first)
    assert torch.equal(found["stage1"], network.head_norm(y))
    assert found["stage0"].shape == (2, 16, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize("out_indices", [(0,), (1,), (0, 1), None])
def test_merging_and_folding_are_exact_for_every_map(out_indices):
    trained = small_network(FAMILY, out_indices=out_indices).double()
    merged = merge_branches(trained)
    folded = fold_affine(merged)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    x = random_inputs((3, 3, 32, 32))
    expected = trained(x)
    assert list(expected) == [f"stage{i}" for i in (out_indices or (1,))]
    for name, map_ in expected.items():
        assert map_.std(dim=0).max() > 1e-3
        assert torch.allclose(merged(x)[name], map_, rtol=0, atol=1e-11)
        assert torch.allclose(folded(x)[name], map_, rtol=0, atol=1e-11)
    for norm in (m for m in trained.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean += 0.05
    assert all((trained(x)[name] - map_).abs().max() > 1e-3 for name, map_ in expected.items())


@torch.no_grad()
def test_the_classifier_is_the_backbone_with_a_head():
    spec = RepMLPNetSpec(input_size=(32, 32), channels=(8, 16), depths=(1, 2), sharesets=(2, 4), classes=5)
    classifier = filled(RepMLPNet(spec)).double()
    backbone = build_network(small_card(FAMILY)).double()
    backbone.load_state_dict({k: v for k, v in classifier.state_dict().items() if not k.startswith("head.")})
    x = random_inputs((2, 3, 32, 32))
    pooled = backbone(x)["stage1"].mean(dim=(2, 3))
    assert torch.allclose(classifier.head(pooled), classifier(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rename", [lambda key: key, mmpretrain_key], ids=["official", "mmpretrain"])
def test_backbone_only_files_are_recognised(rename, tmp_path):
    network = small_network(FAMILY)
    state = {rename(key): value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    trained = load_trained(tmp_path / "backbone.pth")
    assert trained.card.family == FAMILY
    assert trained.card.task == "features"
    x = random_inputs((1, 3, 32, 32)).float()
    with torch.no_grad():
        expected, found = network(x), trained.network(x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    state.pop(next(key for key in state if key.endswith("fc3_bn.bias")))
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_trained(tmp_path / "damaged.pth")


def test_a_classifier_without_half_its_head_is_no_backbone(tmp_path):
    state = small_network("repmlpnet").state_dict()
    del state["head.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        load_trained(tmp_path / "damaged.pth")


def test_stages_that_are_not_there_are_refused():
    for out_indices in ((2,), (1, 0), (0, 0), ()):
        with pytest.raises(CardError, match="out_indices"):
            build_network(small_card(FAMILY, out_indices=out_indices))


def test_a_backbone_is_exported_with_named_outputs(tmp_path):
    checkpoint = save_network(small_network(FAMILY), tmp_path / "backbone.pth")
    bundle = export(checkpoint, formats="onnx,checkpoint", batch="1:2:4", out=tmp_path / "bundle")
    assert [spec.name for spec in bundle.manifest.outputs] == ["stage0", "stage1"]
    assert {hop.top1 for hop in bundle.manifest.certificate} == {None}
    steps = {hop.name for hop in bundle.manifest.certificate if hop.passed}
    assert {"simplified ONNX: stage0", "simplified ONNX: stage1"} <= steps
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx")
    x = random_inputs((3, 3, 32, 32)).float()
    with torch.no_grad():
        expected = load_trained(checkpoint).network(x)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": x.numpy()}), strict=True))
    for name, map_ in expected.items():
        assert np.allclose(found[name], map_.numpy(), atol=1e-4 * float(map_.abs().max()))
    with Predictor(bundle) as predictor:
        assert list(predictor.run(images=x.numpy())) == [spec.name for spec in bundle.manifest.outputs]
        with pytest.raises(InputError, match="2 outputs"):
            predictor.logits(x.numpy())


def test_one_map_is_served_raw(tmp_path):
    card = small_card(FAMILY, out_indices=(1,))
    checkpoint = save_network(build_network(card), tmp_path / "backbone.pth")
    bundle = export(checkpoint, card=card, batch="1:2:4", out=tmp_path / "bundle")
    assert bundle.manifest.output.name == "stage1"
    with Predictor(bundle) as predictor:
        assert predictor.logits(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 16, 4, 4)
        with pytest.raises(InputError, match="feature maps"):
            predictor(np.zeros((8, 8, 3), np.uint8))
