"""Random graphs of maps, sums, shared values and borders: whatever is merged computes the same."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy.convert.reparam.regions import merge_regions
from support.networks import randomize

C = 4
STEPS = ("conv", "norm", "relu", "scale", "pool", "pad", "cut", "add", "sub", "double")


class RandomGraph(nn.Module):
    """Values made from earlier values, as `plan` says; the output is the last one and the sum of all others."""

    def __init__(self, plan: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.parts = nn.ModuleList(_part(kind, size, seed) for kind, _, size, seed in plan)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for (kind, source, size, _), part in zip(self.plan, self.parts, strict=True):
            of = values[source % len(values)]
            if kind in ("add", "sub"):
                other = next((v for v in values[::-1] if v.shape == of.shape and v is not of), of)
                values.append(of + other if kind == "add" else of - other)
            elif kind == "double":
                values.append(of * 2)
            elif kind == "pad":
                values.append(F.pad(of, (size, 0, 1, size)))
            elif kind == "cut" and min(of.shape[2:]) > 3:
                values.append(F.pad(of, (-1, 0, 0, 1)))
            else:
                values.append(part(of))
        return values[-1], torch.stack([F.relu(value).mean((2, 3)) for value in values]).sum(0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(-1, 2, C)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.factors * x


def _part(kind: str, size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "conv":
        k = (1, 3, 5)[seed % 3]
        dilation = 1 + size % 2
        padding = dilation * (k // 2)
        return nn.Conv2d(C, C, k, padding=padding, dilation=dilation, groups=(1, 2, 4)[size % 3], bias=seed % 2 == 0)
    if kind == "pool":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=seed % 2 == 0)
    parts = {"norm": lambda: nn.BatchNorm2d(C), "relu": nn.ReLU, "scale": Scaled}
    return parts.get(kind, nn.Identity)()


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 2), st.integers(0, 5)),
        min_size=2,
        max_size=9,
    )
)
def test_random_graphs_keep_what_they_compute(plan: list[tuple[str, int, int, int]]) -> None:
    network = randomize(RandomGraph(plan)).double()
    x = torch.randn(2, C, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = merge_regions(network, (x,))
    for got, expected in zip(merged.value(x[:1]), network(x[:1]), strict=True):
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))
    assert merged.report.after["BatchNorms"] == 0
    assert merged.report.after["products"] <= merged.report.before["products"]
    assert all(region.macs_after <= region.macs_before for region in merged.report.regions)
