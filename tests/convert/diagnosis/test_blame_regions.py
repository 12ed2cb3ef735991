"""The first merged region that is wrong is found, and the branch that is missing from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repmlp_deploy.convert.diagnosis.blame_regions import blame_regions
from repmlp_deploy.convert.reparam.regions import merge_regions
from support.region_cases import CASES


def _network() -> tuple[nn.Module, tuple[Tensor, ...], nn.Module]:
    network = nn.Sequential(*(CASES["repvgg"].network() for _ in range(3))).float().eval()
    examples = (CASES["repvgg"].inputs().float(),)
    return network, examples, merge_regions(network, examples).value


def test_nothing_is_blamed_where_nothing_is_wrong() -> None:
    network, examples, merged = _network()
    assert blame_regions(network, merged, examples, [x.numpy() for x in examples]) is None
    assert blame_regions(network, network, examples, [x.numpy() for x in examples]) is None


def test_a_weight_that_was_changed_is_blamed_on_its_region() -> None:
    network, examples, merged = _network()
    merged.get_parameter("1.merged.weight")[2, 1, 0, 0] += 0.01
    blame = blame_regions(network, merged, examples, [x.numpy() for x in examples])
    assert blame is not None
    assert blame.place == "1 · branch 1 of 3"
    assert blame.fault == "added up wrongly"


def test_a_branch_that_was_left_out_is_named() -> None:
    network, examples, merged = _network()
    norm = network[2].skip
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    merged.get_parameter("2.merged.weight")[range(4), range(4), 1, 1] -= scale
    merged.get_parameter("2.merged.bias")[:] -= norm.bias - norm.running_mean * scale
    blame = blame_regions(network, merged, examples, [x.numpy() for x in examples])
    assert blame is not None
    assert str(blame).startswith("first at 2 · branch 3 of 3: left out; off by")
