"""Copies in float64, and modules that are used up while they are replaced."""

import copy

import pytest
import torch
from torch import nn

from repmlp_deploy import get_model
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.nets.surgery import in_double, weights_freed
from support.networks import randomize


def test_a_copy_in_double_has_the_values_and_memory_of_its_own(small_network: nn.Module) -> None:
    twin, expected = in_double(small_network), copy.deepcopy(small_network).double()
    assert {key: value.dtype for key, value in twin.state_dict().items()} == {
        key: value.dtype for key, value in expected.state_dict().items()
    }
    torch.testing.assert_close(twin.state_dict(), expected.state_dict(), rtol=0, atol=0)
    before = {key: value.clone() for key, value in small_network.state_dict().items()}
    for value in twin.state_dict().values():
        value.zero_()
    torch.testing.assert_close(small_network.state_dict(), before, rtol=0, atol=0)


def test_a_parameter_that_two_modules_share_is_shared_in_the_copy() -> None:
    layer = nn.Linear(2, 2)
    twin = in_double(nn.Sequential(layer, nn.ReLU(), layer))
    assert twin[0] is twin[2]
    assert twin[0].weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["repmlp-digits", "pure-mlp-digits"])
def test_a_network_that_is_used_up_merges_and_folds_to_the_same(name: str) -> None:
    trained = randomize(get_model(name), 3)
    merged = merge_branches(trained)
    folded = fold_affine(merged)
    spent = copy.deepcopy(trained)
    own_merged = merge_branches(spent, use_up=True)
    torch.testing.assert_close(own_merged.state_dict(), merged.state_dict(), rtol=0, atol=0)
    own_folded = fold_affine(own_merged, use_up=True)
    torch.testing.assert_close(own_folded.state_dict(), folded.state_dict(), rtol=0, atol=0)
    assert _numbers(spent) < _numbers(trained), "merged blocks must have given their weights back"
    assert _numbers(own_merged) < _numbers(merged), "folded parts must have given their weights back"


def _numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_what_another_module_uses_or_the_replacement_took_over_is_not_freed() -> None:
    first, second, third = (nn.Linear(2, 2, bias=False) for _ in range(3))
    second.weight = first.weight
    new = nn.Linear(2, 2, bias=False)
    new.weight = third.weight
    free = weights_freed(nn.Sequential(first, second, third))
    free(first, new)
    free(third, new)
    assert [module.weight.numel() for module in (first, second, third)] == [4, 4, 4]
    lonely = nn.Linear(2, 2, bias=False)
    weights_freed(nn.Sequential(lonely))(lonely, new)
    assert lonely.weight.numel() == 0
