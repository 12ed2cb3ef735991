import pytest
import torch

from repmlp_deploy.card import list_cards, load_card
from repmlp_deploy.errors import CardError
from repmlp_deploy.nets.families import build_network, card_spec
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec, infer_repmlpnet


def shapes_of(spec: RepMLPNetSpec, *, deploy: bool = False) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in RepMLPNet(spec, deploy=deploy).state_dict().items()}


@pytest.mark.parametrize("name", [name for name in list_cards() if load_card(name).family == "repmlpnet"])
def test_every_card_describes_the_network_that_is_inferred_from_its_weights(name: str) -> None:
    spec = card_spec(load_card(name))
    assert infer_repmlpnet(shapes_of(spec), None) == spec
    merged = infer_repmlpnet(shapes_of(spec, deploy=True), None)
    assert merged == spec.model_copy(update={"kernels": ()})


def test_a_rectangular_input_is_inferred_with_its_size_and_asked_for_without() -> None:
    spec = RepMLPNetSpec(input_size=(16, 24), channels=(8, 16), depths=(1, 2), sharesets=(2, 4), classes=7)
    shapes = shapes_of(spec)
    assert infer_repmlpnet(shapes, (16, 24)) == spec
    with pytest.raises(ValueError, match="pass --input-size HxW"):
        infer_repmlpnet(shapes, None)
    with pytest.raises(ValueError, match="does not divide"):
        infer_repmlpnet(shapes, (32, 32))


def test_square_partitions_are_inferred_from_the_input_size() -> None:
    spec = RepMLPNetSpec(
        input_size=(32, 64), channels=(4, 8), depths=(1, 1), sharesets=(1, 2), partitions=((4, 4), (2, 2)), classes=3
    )
    assert infer_repmlpnet(shapes_of(spec), (32, 64)) == spec


def test_every_hyper_parameter_is_inferred() -> None:
    spec = RepMLPNetSpec(
        input_size=(32, 32), channels=(12, 24), depths=(2, 1), sharesets=(3, 6), kernels=(3, 5), reduction=3,
        expansion=2, patch=8, in_channels=1, classes=5,
    )  # fmt: skip
    assert infer_repmlpnet(shapes_of(spec), None) == spec


def test_another_input_size_is_refused(small_network: RepMLPNet) -> None:
    with pytest.raises(ValueError, match=r"input is \(1, 3, 32, 48\); this network takes \(N, 3, 16, 24\)"):
        small_network(torch.zeros(1, 3, 32, 48))


def test_switch_to_deploy_keeps_the_output_and_returns_nothing(small_network: RepMLPNet) -> None:
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    network = small_network.double()
    before = network(x)
    assert network.backbone.switch_to_deploy() is None
    torch.testing.assert_close(network(x), before, rtol=0, atol=1e-12)
    assert not any("repconv" in name for name, _ in network.named_modules())


def test_a_card_with_an_unknown_family_or_hyper_parameter_is_refused() -> None:
    card = load_card("repmlpnet-t224")
    with pytest.raises(CardError, match="did you mean repmlpnet"):
        build_network(card.model_copy(update={"family": "repmlpnte"}))
    with pytest.raises(CardError, match=r"network\.depth"):
        build_network(card.model_copy(update={"network": {**card.network, "depth": 3}}))
    with pytest.raises(CardError, match="must divide"):
        build_network(card.model_copy(update={"network": {**card.network, "sharesets": [1, 4, 16, 100]}}))


def test_patches_that_are_no_squares_are_built_and_inferred() -> None:
    spec = RepMLPNetSpec(
        input_size=(64, 96), channels=(8, 16), depths=(1, 1), sharesets=(2, 4), patch=(4, 8), classes=3
    )
    assert spec.maps() == [(16, 12), (8, 6)]
    assert infer_repmlpnet(shapes_of(spec), (64, 96)) == spec
    network = RepMLPNet(spec).eval()
    assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 3)


def test_gate_widths_that_are_rounded_are_inferred_stage_by_stage() -> None:
    """mmpretrain rounds C / reduction up to a multiple of 8."""
    spec = RepMLPNetSpec(
        input_size=(32, 32), channels=(20, 40), depths=(1, 1), sharesets=(1, 4), gate_widths=(8, 16), classes=3
    )
    found = infer_repmlpnet(shapes_of(spec), None)
    assert [found.gate_width(i) for i in range(2)] == [8, 16]
    assert shapes_of(found) == shapes_of(spec)


@pytest.mark.parametrize(("given", "named"), [((32, 32), "16x24"), ((17, 24), "16x24"), (None, "16x24 or 24x16")])
def test_a_size_that_does_not_fit_is_told_one_that_does(given: tuple[int, int] | None, named: str) -> None:
    spec = RepMLPNetSpec(input_size=(16, 24), channels=(8, 16), depths=(1, 2), sharesets=(2, 4), classes=7)
    with pytest.raises(ValueError, match=f"such as .*{named}"):
        infer_repmlpnet(shapes_of(spec), given)
