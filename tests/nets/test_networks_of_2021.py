"""RepMLP-Res50 and the pure MLP: official outputs, and the architecture told by keys and shapes alone."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel

from repmlp_deploy import load_card
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.loading import infer_card, load_network
from repmlp_deploy.convert.source.state_dict import find_state_dict
from repmlp_deploy.nets.families import FAMILIES, card_spec
from repmlp_deploy.nets.networks.pure_mlp import PureMLP, PureMLPSpec
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNet, RepMLPResNetSpec
from repmlp_deploy.nets.networks.shapes import branch_kernels, count_layers
from support.golden_cases import GoldenCase, assert_matches_golden, names
from support.networks import randomize

RES50 = [GoldenCase(name) for name in names("repmlp-res50-")]
SMALL = {
    "input_size": (32, 48),
    "depths": (1, 3, 2, 1),
    "channels": (16, 32, 64, 32),
    "stem": 8,
    "partition": (2, 3),
    "groups": 2,
    "kernels": (1, 3),
    "reduction": 2,
    "classes": 5,
}
LIGHT = RepMLPResNetSpec(block="light", **SMALL)
BOTTLENECK = RepMLPResNetSpec(block="bottleneck", squeeze=(2, 4), **SMALL)
SQUARE = LIGHT.model_copy(update={"input_size": (64, 64), "partition": (2, 2), "kernels": (1, 3, 5)})
PURE = PureMLPSpec(
    input_size=(16, 24),
    channels=(4, 8),
    depths=(2, 1),
    partitions=((8, 8), (8, 12)),
    groups=(2, 4),
    kernels=(3,),
    reduction=3,
    classes=6,
)
SPECS = [("repmlp-resnet", LIGHT), ("repmlp-resnet", BOTTLENECK), ("repmlp-resnet", SQUARE), ("pure-mlp", PURE)]


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", RES50, ids=lambda case: case.name)
def test_the_official_networks_are_recognised_and_equal_trained_merged_and_folded(case: GoldenCase) -> None:
    state = find_state_dict(case.weights())
    card = infer_card(state.shapes(), family=state.layout.family, layout=state.layout.name, merged=False).card
    assert card.name == case.name
    network = load_network(state.tensors, card, merged=False)
    assert list(network.state_dict()) == list(case.about["state_dict"])
    assert sum(parameter.numel() for parameter in network.parameters()) == case.about["parameters"]
    network.double()
    merged = merge_branches(network)
    x = torch.from_numpy(case.input()).double()
    for form in (network, merged, fold_affine(merged)):
        assert_matches_golden(form(x).numpy(), case.output(), atol=1e-10)


def test_a_layer_that_is_missing_in_between_counts() -> None:
    shapes = {f"stages.0.{key}": (1,) for key in ("0.repconv3.bn.bias", "0.repconv1.conv.weight", "2.fc.bias")}
    assert [count_layers(shapes, prefix) for prefix in ("stages.", "stages.0.", "stages.1.")] == [1, 3, 0]
    assert branch_kernels(shapes, "stages.0.0.") == (1, 3)
    found = _shapes(PureMLP(PURE))
    moved = {key.replace("stages.0.1.", "stages.0.5."): shape for key, shape in found.items()}
    assert FAMILIES["pure-mlp"].infer(moved, PURE.input_size).depths[0] == 6  # whose weights are then named as missing


@pytest.mark.parametrize(("family", "spec"), SPECS)
def test_the_architecture_is_inferred_from_shapes(family: str, spec: BaseModel) -> None:
    """With the input's size where maps are not square; merged, all but the kernels of the branches."""
    trained = FAMILIES[family].build(spec)
    size = None if spec is SQUARE else spec.input_size
    assert FAMILIES[family].infer(_shapes(trained), size) == spec
    merged = FAMILIES[family].infer(_shapes(FAMILIES[family].build(spec, deploy=True)), size)
    assert merged == spec.model_copy(update={"kernels": ()})


@pytest.mark.parametrize(("family", "spec"), SPECS)
def test_merged_networks_load_where_deploy_mode_ones_were_built(family: str, spec: BaseModel) -> None:
    torch.manual_seed(0)
    trained = randomize(FAMILIES[family].build(spec)).double()
    merged = merge_branches(trained)
    deployed = FAMILIES[family].build(spec, deploy=True).eval().double()
    deployed.load_state_dict(merged.state_dict(), strict=True)
    in_place = FAMILIES[family].build(spec).eval().double()
    in_place.load_state_dict(trained.state_dict())
    in_place.switch_to_deploy()
    x = torch.randn(2, 3, *spec.input_size, dtype=torch.float64)
    expected = trained(x)
    for form in (merged, deployed, in_place, fold_affine(merged)):
        torch.testing.assert_close(form(x), expected, rtol=1e-12, atol=1e-12)
    assert not [m for m in fold_affine(merged).modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def test_shapes_that_are_no_squares_ask_for_the_input_size() -> None:
    with pytest.raises(ValueError, match="pass --input-size"):
        FAMILIES["repmlp-resnet"].infer(_shapes(RepMLPResNet(LIGHT)), None)
    with pytest.raises(ValueError, match="give a card"):
        FAMILIES["repmlp-resnet"].infer(_shapes(RepMLPResNet(LIGHT)), (96, 96))


def test_a_resnet_without_repmlp_blocks_is_no_network_of_ours() -> None:
    spec = LIGHT.model_copy(update={"depths": (2, 1, 1, 2)})
    with pytest.raises(KeyError, match="repmlp"):
        FAMILIES["repmlp-resnet"].infer(_shapes(RepMLPResNet(spec)), None)


@pytest.mark.parametrize("build", [lambda: RepMLPResNet(LIGHT), lambda: PureMLP(PURE)])
def test_another_input_size_is_refused(build) -> None:
    with pytest.raises(ValueError, match="this network takes"):
        build().eval()(torch.zeros(1, 3, 128, 128))


def test_input_sizes_that_the_stages_cannot_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        RepMLPResNet(LIGHT.model_copy(update={"input_size": (36, 48)}))


@pytest.mark.parametrize("name", ["repmlp-res50-light-224", "repmlp-res50-bottleneck-224", "pure-mlp-cifar10"])
def test_cards_describe_networks_that_can_be_built(name: str) -> None:
    card = load_card(name)
    with torch.device("meta"):
        FAMILIES[card.family].build(card_spec(card))
