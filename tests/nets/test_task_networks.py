import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repmlp_deploy.card import list_cards, load_card
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CardError, CheckpointError
from repmlp_deploy.nets.families import FAMILIES, build_network, card_spec
from repmlp_deploy.nets.networks.pspnet import PSPHead, PSPNet, _pooled
from support.task_cases import random_inputs, save_network, small_card, small_network

FAMILIES_HERE = ("pspnet", "mobilefacenet")


def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("family", FAMILIES_HERE)
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@torch.no_grad()
def test_merging_and_folding_are_exact_in_float64(family, size):
    trained = small_network(family, input_size=size).double()
    merged = merge_branches(trained)
    folded = fold_affine(merged)
    x = random_inputs((3, 3, *size))
    expected = trained(x)
    assert expected.std(dim=0).max() > 1e-3  # outputs depend on their inputs
    assert torch.allclose(merged(x), expected, rtol=0, atol=1e-11)
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-11)
    assert not batch_norms(folded)


@pytest.mark.parametrize("family", FAMILIES_HERE)
@torch.no_grad()
def test_a_forgotten_batch_norm_would_be_seen(family):
    trained = small_network(family).double()
    x = random_inputs((3, 3, 32, 32))
    expected = trained(x)
    for norm in batch_norms(trained):
        damaged = copy.deepcopy(norm.running_mean)
        norm.running_mean += 0.05
        assert (trained(x) - expected).abs().max() > 1e-8
        norm.running_mean.copy_(damaged)


@pytest.mark.parametrize("family", FAMILIES_HERE)
@torch.no_grad()
def test_switching_in_place_equals_merging(family):
    trained = small_network(family).double()
    x = random_inputs((2, 3, 32, 32))
    expected = trained(x)
    trained.switch_to_deploy()
    assert not any(key.endswith("fc3_bn.weight") for key in trained.state_dict())
    assert torch.allclose(trained(x), expected, rtol=0, atol=1e-11)
    fresh = build_network(small_card(family), deploy=True)
    assert set(fresh.state_dict()) == set(trained.state_dict())


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_bare_file_tells_its_network(family, tmp_path):
    path = save_network(small_network(family), tmp_path / "bare.pth")
    trained = load_trained(path)
    own = small_card(family)
    assert trained.card.family == family
    assert trained.card.task == own.task
    assert trained.card.input_size == own.input_size
    assert card_spec(trained.card) == card_spec(own)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_merged_file_tells_its_network(family, tmp_path):
    path = save_network(merge_branches(small_network(family)), tmp_path / "merged.pth")
    trained = load_trained(path, allow_merged=True)
    assert trained.merged
    assert trained.card.input_size == (32, 32)


@pytest.mark.parametrize("name", ["repmlp-pspnet-t256", "repmlp-mobilefacenet"])
def test_the_shipped_card_is_recognised_from_shapes_alone(name):
    card = load_card(name)
    with torch.device("meta"):
        network = build_network(card)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert FAMILIES[card.family].infer(shapes, None) == card_spec(card)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_loading_is_strict(family, tmp_path):
    network = small_network(family)
    state = network.state_dict()
    last = list(state)[-2]
    torch.save({key: value for key, value in state.items() if key != last}, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"missing|has no key"):
        load_trained(tmp_path / "missing.pth")
    torch.save({**state, "further.weight": torch.zeros(1)}, tmp_path / "further.pth")
    with pytest.raises(CheckpointError, match=r"further\.weight is unexpected"):
        load_trained(tmp_path / "further.pth")


def test_a_rectangular_face_network_tells_its_size(tmp_path):
    path = save_network(small_network("mobilefacenet", input_size=(32, 64)), tmp_path / "face.pth")
    assert load_trained(path).card.input_size == (32, 64)
    with pytest.raises(CheckpointError, match="contradicts"):
        load_trained(path, input_size=(64, 64))


@pytest.mark.parametrize("edge", [(8, 8), (7, 5), (6, 12)])
@pytest.mark.parametrize("bins", [1, 2, 3, 5])
def test_pooling_is_adaptive_average_pooling(edge, bins):
    x = random_inputs((2, 3, *edge))
    assert torch.allclose(_pooled(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-14)


def test_the_head_serves_any_backbone_of_one_map():
    backbone = nn.Conv2d(3, 6, 8, stride=8)
    network = PSPNet(backbone, PSPHead(6, hidden=4, bins=(1, 2), classes=3)).eval()
    assert network(torch.zeros(2, 3, 32, 48)).shape == (2, 3, 32, 48)


def test_every_unit_of_a_face_stage_can_be_chosen():
    for unit in ("bottleneck", "repmlp"):
        network = small_network("mobilefacenet", units=(unit,) * 3)
        blocks = [m for m in network.modules() if type(m).__name__ == "RepMLPUnit"]
        assert bool(blocks) == (unit == "repmlp")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("pspnet", {"bins": (1, 9)}, "bins"),
        ("pspnet", {"bins": (2, 2)}, "bins"),
        ("mobilefacenet", {"depths": (1, 2)}, "one entry per stage"),
        ("mobilefacenet", {"input_size": (32, 40)}, "multiples of 16"),
        ("mobilefacenet", {"sharesets": (1, 3, 8)}, "must divide"),
    ],
)
def test_hyper_parameters_that_do_not_fit_are_refused(family, changes, message):
    with pytest.raises(CardError, match=message):
        build_network(small_card(family, **changes))


def test_a_card_of_another_task_is_refused():
    card = small_card("repmlpnet").model_copy(update={"task": "embed"})
    with pytest.raises(CardError, match="can only classify"):
        card_spec(card)


def test_every_shipped_card_has_its_family_s_task():
    for name in list_cards():
        card = load_card(name)
        assert card.task == FAMILIES[card.family].task
