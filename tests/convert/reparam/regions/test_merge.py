"""Region merging on small networks: what is left, and that it computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from repmlp_deploy.convert.reparam.regions.merge import merge_regions, report_of
from support.networks import randomize
from support.region_cases import CASES, Case, Parallel, conv_norm


def _distance(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regions_merge_exactly_at_every_batch_size(case: Case) -> None:
    network, x = case.network(), case.inputs()
    before = copy.deepcopy(network.state_dict())
    merged = merge_regions(network, (x,))
    for samples in (x, x[:1], torch.cat([x, x, x[:1]])):
        assert _distance(merged.value(samples), network(samples)) <= 1e-14
    report = merged.report
    assert (report.before["products"], report.after["products"]) == case.products
    assert (report.before["additions"], report.after["additions"]) == case.additions
    assert report.after["BatchNorms"] == 0
    assert report_of(copy.deepcopy(merged.value)) == report
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_record_says_what_a_region_was_and_is() -> None:
    network = nn.Sequential(CASES["repvgg"].network(), nn.Conv2d(4, 4, 1).double()).eval()
    report = merge_regions(network, (CASES["repvgg"].inputs(),)).report
    (region,) = report.regions
    assert region.module == "0"
    assert region.modules == ("0.dense.0", "0.dense.1", "0.point.0", "0.point.1", "0", "0.skip")
    assert region.branches == 3
    assert region.kernels_before == ((4, 4, 3, 3), (4, 4, 1, 1))
    assert region.kernels_after == ((4, 4, 3, 3),)
    assert region.macs_before == 9 * 8 * (4 * 4 * 10 + 3 * 4)
    assert region.macs_after == 9 * 8 * 4 * 4 * 9
    assert region.weights == ("0.merged.weight", "0.merged.bias")
    assert str(region).startswith("0: 4×4×3×3 + 4×4×1×1 -> 4×4×3×3, 12,384 -> 10,368")
    assert report.summary() == "regions: 1 merged; products 3 -> 2, BatchNorms 3 -> 0, additions 2 -> 0"


def test_weights_are_computed_in_float64_and_rounded_once() -> None:
    network, x = CASES["repvgg"].network(), CASES["repvgg"].inputs()
    single = copy.deepcopy(network).float()
    twin = dict(merge_regions(copy.deepcopy(single).double(), (x,)).value.state_dict())
    stored = merge_regions(single, (x.float(),)).value.state_dict()
    assert stored.keys() == twin.keys()
    assert all(torch.equal(value, twin[key].float()) for key, value in stored.items())


def test_a_dense_kernel_is_not_made_of_a_grouped_one_where_that_costs_more() -> None:
    network = Parallel(one=conv_norm(6, 6, groups=2), two=conv_norm(6, 6, groups=3)).double().eval()
    report = merge_regions(network, (torch.randn(1, 6, 9, 8),)).report
    assert report.after["products"] == 2
    assert sum(region.macs_after for region in report.regions) <= sum(region.macs_before for region in report.regions)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3}, {"kernel_size": 4}, {"kernel_size": (3, 2), "dilation": (2, 1)}],
    ids=["odd", "even", "dilated"],
)
def test_padding_by_name_is_merged(options: dict[str, Any]) -> None:
    """An even kernel has more padding after the map than before it."""

    def branch(padding: str, **options: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, padding=padding, bias=False, **options), nn.BatchNorm2d(4))

    network = randomize(Parallel(one=branch("same", **options), two=branch("valid", kernel_size=1))).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    merged = merge_regions(network, (x,))
    assert merged.report.after == {"products": 1, "BatchNorms": 0, "additions": 0}
    assert _distance(merged.value(x), network(x)) <= 1e-14


class Scaled(nn.Module):
    """A convolution of an image that is normalised by numbers that float32 does not hold, beside a tenth of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv((x - 0.485) / 0.229 + 0.1)
        return x + 0.1 * self.conv(x)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_numbers_that_float32_does_not_hold_are_merged(kind: torch.dtype) -> None:
    network, x = Scaled().eval().to(kind), torch.randn(2, 4, 5, 5, dtype=kind)
    torch.testing.assert_close(merge_regions(network, [x]).value(x), network(x))


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), (2, 4, 9)),
        (nn.Conv1d(4, 4, 3, padding="same"), nn.BatchNorm1d(4), (2, 4, 9)),
        (nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), (2, 4, 5, 4, 3)),
        (nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), (2, 4, 9, 8)),
    ],
)
def test_a_norm_is_left_to_the_exporter_after_a_convolution_that_is_not_read(
    convolution: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    """As a product and a sum of its own it could not be folded; and the rest of the network is merged."""
    branch = nn.Sequential(convolution, norm)
    network = randomize(Parallel(one=branch, two=nn.Identity())).double()
    x = torch.randn(shape, dtype=torch.float64)
    merged = merge_regions(network, (x,))
    assert merged.report.after == merged.report.before
    assert _distance(merged.value(x), network(x)) <= 1e-14


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (CASES["repvgg"].make().train(), "is in training mode"),
        (
            nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
            "0 .BatchNorm2d. keeps no running statistics",
        ),
    ],
    ids=["training", "no statistics"],
)
def test_what_has_no_fixed_map_is_refused(network: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merge_regions(network, (torch.zeros(1, 4, 9, 8),))


def test_control_flow_that_depends_on_data_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ValueError, match=r"cannot trace the network: .*--merge PACKAGE:FUNCTION --format checkpoint"):
        merge_regions(Branching().eval(), (torch.zeros(1, 4, 9, 8),))
