"""A new block type costs one class and one entry of the table: it is then merged, folded, proved and blamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repmlp_deploy import VerificationError, export
from repmlp_deploy.nets.block_types import BLOCKS
from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.blocks.terms import MergedSum, Term
from support.networks import randomize


class TwinLinear(Reparameterizable):
    """BN(W x) + BN(V x) over features: (N, C) -> (N, O)."""

    branched = mergeable = exported_whole = True

    def __init__(self, inputs: int, outputs: int, *, merged: nn.Linear | None = None) -> None:
        super().__init__()
        self.main = nn.Linear(inputs, outputs, bias=False) if merged is None else merged
        self.side = nn.Linear(inputs, outputs, bias=False) if merged is None else None
        self.main_bn = nn.BatchNorm1d(outputs) if merged is None else None
        self.side_bn = nn.BatchNorm1d(outputs) if merged is None else None

    @property
    def deploy(self) -> bool:
        return self.side is None

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) if self.deploy else self.main_bn(self.main(x)) + self.side_bn(self.side(x))

    def branches(self) -> list[tuple[nn.Linear, nn.BatchNorm1d]]:
        return [(self.main, self.main_bn), (self.side, self.side_bn)]

    def merged(self) -> TwinLinear:
        linear = nn.Linear(self.main.in_features, self.main.out_features)
        weight = bias = 0
        for branch, bn in self.branches():
            a, b = affine_of_batch_norm(bn)
            weight, bias = weight + a[:, None] * branch.weight.detach().double(), bias + b
        dtype = self.main.weight.dtype
        linear.weight, linear.bias = constant(weight.to(dtype)), constant(bias.to(dtype))
        return TwinLinear(self.main.in_features, self.main.out_features, merged=linear)

    def terms(self, group: int, columns: Tensor | None = None) -> list[Term]:
        assert group == 0
        channels = torch.arange(self.main.out_features)
        columns = torch.arange(self.main.in_features) if columns is None else columns
        return [
            Term(f"linear · branch {name}", bn, channels, branch.weight.detach().double()[:, columns])
            for name, (branch, bn) in zip(("main", "side"), self.branches(), strict=True)
        ]

    def merged_sum(self, made: nn.Module) -> MergedSum | None:
        linear = made.main
        return MergedSum(linear.weight.detach()[None], linear.bias.detach()[None], part="linear", name="main")


class Scorer(nn.Module):
    """A user's own network around two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = TwinLinear(6, 8), TwinLinear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture
def listed() -> Iterator[None]:
    """Put the toy into the table for one test."""
    BLOCKS["twin-linear"] = TwinLinear
    yield
    del BLOCKS["twin-linear"]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Scorer())


@pytest.mark.usefixtures("listed")
def test_a_listed_block_is_merged_folded_and_proved(tmp_path: Path) -> None:
    bundle = export(_network(), example_input=torch.zeros(2, 6), formats="onnx", batch="1:2:4", out=tmp_path / "toy")
    hops = {hop.name: hop for hop in bundle.manifest.certificate}
    assert all(hop.passed is not False for hop in hops.values())
    assert any("weights" in name for name in hops)
    assert "BatchNormalization" not in (tmp_path / "toy" / "model.onnx").read_bytes().decode("latin-1")


@pytest.mark.usefixtures("listed")
def test_a_fault_in_its_merge_is_blamed_on_the_block_and_the_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TwinLinear.branches

    def merged(self: TwinLinear) -> TwinLinear:
        with pytest.MonkeyPatch.context() as patch:
            if self.main.in_features == 8:
                patch.setattr(TwinLinear, "branches", lambda block: right(block)[:1])
            return whole(self)

    whole = TwinLinear.merged
    monkeypatch.setattr(TwinLinear, "merged", merged)
    with pytest.raises(VerificationError, match=r"first at second · linear · branch side: dropped"):
        export(_network(), example_input=torch.zeros(2, 6), formats="onnx", batch="2", out=tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_block_outside_the_table_never_merges_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(_: TwinLinear) -> TwinLinear:
        pytest.fail("a block that no table lists was asked to merge itself")

    assert TwinLinear not in BLOCKS.values()
    monkeypatch.setattr(TwinLinear, "merged", merged)
    bundle = export(_network(), example_input=torch.zeros(2, 6), formats="onnx", batch="2", out=tmp_path / "toy")
    assert bundle.manifest.verdict.passed
