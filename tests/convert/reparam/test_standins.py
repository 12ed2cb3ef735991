"""The stand-ins for other families are right themselves: their own hooks leave what they compute."""

from __future__ import annotations

import copy

import pytest
import torch

from support.standins import STANDINS

HOOKS = ("switch_to_deploy", "merge_kernel", "merge_dilated_branches", "fuse_repvgg_block")


@pytest.mark.parametrize("family", STANDINS)
def test_the_families_own_hook_leaves_what_a_network_computes(family):
    network = STANDINS[family]().double()
    merged, called = copy.deepcopy(network), 0
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for module in list(merged.modules()):
            hook = next((hook for hook in (getattr(module, name, None) for name in HOOKS) if hook is not None), None)
            if hook is not None:
                hook()
                called += 1
    finally:
        torch.set_default_dtype(dtype)
    x = torch.randn(2, *network.example_input.shape[1:], dtype=torch.float64)
    assert called == network.blocks
    torch.testing.assert_close(merged(x), network(x), rtol=1e-12, atol=1e-12)
