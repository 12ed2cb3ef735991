"""The RepMLP block of 2021 against the official implementation, and what merging makes of it."""

from __future__ import annotations

import pytest
import torch

from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from support.golden_cases import GoldenCase, assert_matches_golden, names
from support.networks import randomize

CASES = [GoldenCase(name) for name in names("block-v1-")]


def _block(case: GoldenCase) -> RepMLP:
    given = case.config
    block = RepMLP(
        given["in_channels"],
        given["out_channels"],
        (given["H"], given["W"]),
        (given["h"], given["w"]),
        groups=given["fc3_groups"],
        kernels=given["reparam_conv_k"],
        reduction=given["fc1_fc2_reduction"],
    )
    block.load_state_dict(case.weights(), strict=True)
    return block.eval().double().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_form_of_the_block_gives_the_official_output(case: GoldenCase) -> None:
    """Trained, merged, merged in place, in upstream's form and folded."""
    block, x = _block(case), torch.from_numpy(case.input()).double()
    merged = merge_branches(block)
    forms = [block, merged, upstream_form(merged), fold_affine(merged)]
    in_place = _block(case)
    in_place.switch_to_deploy()
    for form in (*forms, in_place):
        assert_matches_golden(form(x).numpy(), case.output(), atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_state_dict_has_the_official_keys_and_order(case: GoldenCase) -> None:
    found = {key: list(value.shape) for key, value in _block(case).state_dict().items()}
    assert list(found.items()) == list(case.about["state_dict"].items())


def test_the_merged_state_dict_is_that_of_upstreams_deploy_mode() -> None:
    merged = merge_branches(_block(GoldenCase("block-v1-rectangle")))
    perceptron = [f"fc1_fc2.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert list(merged.state_dict()) == [*perceptron, "fc3.weight", "fc3.bias"]


@pytest.mark.parametrize("forgotten", ["avg.bn", "fc3_bn", "repconv1.bn", "repconv3.bn"])
def test_a_merge_that_forgot_a_batch_norm_would_be_noticed(forgotten: str) -> None:
    case = GoldenCase("block-v1-global")
    block = _block(case)
    bn = block.get_submodule(forgotten)
    bn.running_mean.zero_()
    bn.running_var.fill_(1)
    bn.weight.fill_(1)
    bn.bias.zero_()
    output = merge_branches(block)(torch.from_numpy(case.input()).double())
    with pytest.raises(AssertionError):
        assert_matches_golden(output.numpy(), case.output(), atol=1e-3)


def test_merging_twice_in_place_changes_nothing() -> None:
    block = randomize(RepMLP(4, 6, (4, 6), (2, 3), groups=2))
    block.switch_to_deploy()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    block.switch_to_deploy()
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    with pytest.raises(ValueError, match="merged already"):
        block.merged_fc3()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((4, 4, (5, 4), (2, 2)), "map is 5x4; it must divide into 2x2"),
        ((4, 6, (4, 4), (2, 2), 4), "4 to 6 channels cannot have 4 groups"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments: tuple, said: str) -> None:
    *sizes, groups = arguments if len(arguments) == 5 else (*arguments, 1)
    with pytest.raises(ValueError, match=said):
        RepMLP(*sizes, groups=groups)


def test_a_map_of_another_size_is_refused() -> None:
    block = randomize(RepMLP(4, 4, (4, 4), (2, 2)))
    with pytest.raises(ValueError, match=r"takes \(N, 4, 4, 4\)"):
        block(torch.zeros(1, 4, 8, 8))
