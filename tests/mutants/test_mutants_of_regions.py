"""Faults planted in region merging: each is caught, and blamed on the right module and branch.

Every mutant replaces a function of the pass by one with a mistake. The control is the same network without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from repmlp_deploy import export
from repmlp_deploy.convert.reparam.regions import choosing, forms, maps, merge, merge_regions, reading, writing
from repmlp_deploy.convert.reparam.regions.maps import Map
from repmlp_deploy.convert.reparam.regions.tracing import module_path, trace
from repmlp_deploy.errors import VerificationError
from support.networks import randomize
from support.region_cases import CASES, Parallel, conv_norm

Plant = Callable[[pytest.MonkeyPatch], None]


def _network() -> nn.Module:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(6))
    fewer = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # at the border it divides by less, which no kernel does
    return randomize(
        nn.Sequential(
            Parallel(dense=conv_norm(4, 4), point=conv_norm(4, 4, 1), skip=nn.BatchNorm2d(4)),
            Parallel(dense=conv_norm(4, 4), point=conv_norm(4, 4, 1), skip=nn.BatchNorm2d(4)),
            CASES["residual"].make(),
            Parallel(
                large=conv_norm(4, 4, 7, groups=4),
                far=conv_norm(4, 4, 3, groups=4, dilation=3),
                near=conv_norm(4, 4, 5, groups=4),
            ),
            Parallel(dense=conv_norm(4, 6, stride=2), point=conv_norm(4, 6, 1, stride=2)),
            Parallel(dense=conv_norm(6, 6), two=conv_norm(6, 6, groups=2), three=conv_norm(6, 6, groups=3)),
            Parallel(dense=conv_norm(6, 6), pooled=pooled),
            nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
            Parallel(
                dense=conv_norm(6, 6), pooled=nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), fewer, nn.BatchNorm2d(6))
            ),
        )
    )


X = torch.randn(1, 4, 17, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def traced() -> fx.GraphModule:
    return trace(_network().double(), (X.double(),))


def _merged(network: nn.Module, traced: fx.GraphModule, patch: pytest.MonkeyPatch) -> nn.Module:
    """Merge the regions of a network whose trace is known: tracing is most of the work, and no mutant touches it."""
    patch.setattr(merge, "trace", lambda *_: copy.deepcopy(traced))
    return merge_regions(network, (X.double(),)).value


def _misread(target: Any, module: str, change: Callable[[Any, fx.Node], Any]) -> Plant:
    """Change what is read of the node of one module."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = choosing.read_node

        def wrong(node: fx.Node, values: Any) -> Any:
            found = right(node, values)
            here = node.args[0] if "getitem" in str(node.target) else node
            if found is None or module_path([node]) != module or here.target is not target:
                return found
            return change(found, here)

        patch.setattr(choosing, "read_node", wrong)

    return plant


def _norm(module: str, change: Callable[[Tensor, ...], tuple[Tensor, Tensor]]) -> Plant:
    """Compute scale and shift of one BatchNorm from (γ, β, μ, σ²) as `change` does."""

    def changed(found: Any, _node: fx.Node) -> Any:
        network = _network().double()
        bn = network.get_submodule(module)
        factors, shift = change(bn.weight, bn.bias, bn.running_mean, bn.running_var)
        return replace(found, map=maps.scale(factors), bias=shift)

    return _misread(torch.ops.aten._native_batch_norm_legit_no_training.default, module, changed)


def _conv(module: str, **changes: Any) -> Plant:
    return _misread(
        torch.ops.aten.conv2d.default, module, lambda found, _node: replace(found, map=replace(found.map, **changes))
    )


def _in(module: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    return lambda patch: patch.setattr(module, name, make(getattr(module, name)))


def _added(change: Callable[..., Any]) -> Plant:
    """Change the sums of block 1."""

    def make(right: Any) -> Any:
        def wrong(node: fx.Node, found: Any, first: Any, second: Any) -> Any:
            both = right(node, found, first, second)
            return both if module_path([node]) != "1" else change(both, first, second)

        return wrong

    return _in(choosing, "added_form", make)


def _without_skip(both: Any, first: Any, second: Any) -> Any:
    skips = second.is_per_channel and not second.trivial and second.maps.keys() == first.maps.keys()
    return replace(first, covers=both.covers) if skips else both


def _skip_twice(both: Any, _first: Any, second: Any) -> Any:
    if not second.is_per_channel or second.trivial or both.maps.keys() != second.maps.keys():
        return both
    (source,) = both.maps
    added = maps.summed(both.maps[source], second.maps[source])
    return replace(both, maps={source: added}, bias=both.bias + second.bias)


def _with_the_border(patch: pytest.MonkeyPatch) -> None:
    """Read every average pool as if it counted what lies outside the image."""
    right = reading._READERS[POOL]

    def wrong(node: fx.Node, values: Any) -> Any:
        given = node.args
        node.args = (*given[:4], False, True)
        found = right(node, values)
        node.args = given
        return found

    patch.setitem(reading._READERS, POOL, wrong)


def _at_the_corner(right: Any) -> Any:
    def wrong(first: Map, second: Map) -> Any:
        if first.taps == (3, 3) and second.taps == (1, 1) and not second.is_scale:
            second = replace(second, lead=first.lead)
        return right(first, second)

    return wrong


def _blocks_mixed_up(right: Any) -> Any:
    def wrong(part: Map, groups: int) -> Tensor:
        kernel = right(part, groups)
        return kernel.roll(kernel.shape[1] // 2, 1) if part.groups == 2 else kernel

    return wrong


def _turned(right: Any) -> Any:
    def wrong(outer: Map, inner: Map) -> Map:
        made = right(outer, inner)
        return replace(made, kernel=made.kernel.flip(3)) if outer.is_scale and made.taps == (7, 7) else made

    return wrong


def _everywhere(_right: Any) -> Any:
    return lambda outer, bias, _grid, _inner: maps.shifted_bias(outer, bias)


def _without_bias(right: Any) -> Any:
    def wrong(self: Any, holder: nn.Module, name: str, key: str, value: Tensor) -> Any:
        return right(self, holder, name, key, torch.zeros_like(value) if (name, key) == ("1.merged", "bias") else value)

    return wrong


E = 1e-5
POOL = torch.ops.aten.avg_pool2d.default
SCALE = torch.ops.aten.mul.Tensor
MUTANTS: dict[str, tuple[Plant, str]] = {
    "another eps": (
        _norm("1.point.1", lambda g, b, m, v: (g / (v + 1e-3).sqrt(), b - m * g / (v + 1e-3).sqrt())),
        "first at 1.point.1 · branch 2 of 3",
    ),
    "variance used as deviation": (
        _norm("1.dense.1", lambda g, b, m, v: (g / (v + E), b - m * g / (v + E))),
        "first at 1.dense.1 · branch 1 of 3",
    ),
    "mean forgotten": (
        _norm("1.skip", lambda g, b, _m, v: (g / (v + E).sqrt(), b)),
        "first at 1.skip · branch 3 of 3",
    ),
    "bias forgotten": (
        _norm("3.near.1", lambda g, _b, m, v: (g / (v + E).sqrt(), -m * g / (v + E).sqrt())),
        "first at 3.near.1 · branch 3 of 3",
    ),
    "weight forgotten": (
        _norm("0.point.1", lambda _g, b, m, v: (1 / (v + E).sqrt(), b - m / (v + E).sqrt())),
        "first at 0.point.1 · branch 2 of 3",
    ),
    "BatchNorm of another branch": (
        _norm("1.point.1", lambda *_: _of_another("1.dense.1")),
        "first at 1.point.1 · branch 2 of 3",
    ),
    "BatchNorm skipped": (
        _norm("4.dense.1", lambda g, b, _m, _v: (torch.ones_like(g), torch.zeros_like(b))),
        "first at 4.dense.1 · branch 1 of 2",
    ),
    "dilation ignored": (_conv("3.far.0", dilation=(1, 1)), "first at 3.far.0 · branch 2 of 3"),
    "stride of one branch ignored": (
        _conv("4.point.0", stride=(1, 1)),
        "first at 4.point.0: conv2d of 4.point.0",
    ),
    "padding ignored": (_conv("1.dense.0", lead=(0, 0)), "first at 1.dense.0 · branch 1 of 3"),
    "kernel transposed": (
        _misread(
            torch.ops.aten.conv2d.default,
            "1.dense.0",
            lambda found, _node: replace(found, map=replace(found.map, kernel=found.map.kernel.transpose(2, 3))),
        ),
        "first at 1.dense.0 · branch 1 of 3",
    ),
    "average over the wrong count": (
        _misread(
            POOL,
            "6.pooled.1",
            lambda found, _node: replace(found, map=replace(found.map, kernel=found.map.kernel * 9 / 4)),
        ),
        "first at 6.pooled.1 · branch 2 of 2",
    ),
    "count_include_pad ignored": (_with_the_border, "first at 8.pooled.1 · branch 2 of 2"),
    "a scale left out": (
        _misread(SCALE, "2", lambda found, _node: replace(found, map=maps.identity(4))),
        "first at 2 · branch 2 of 2",
    ),
    "difference taken for a sum": (
        _misread(torch.ops.aten.sub.Tensor, "2", lambda found, _node: replace(found, sign=1)),
        "first at 2 · branch 2 of 2",
    ),
    "branch dropped": (_added(_without_skip), "first at 1.skip · branch 3 of 3: this branch is left out"),
    "identity counted twice": (_added(_skip_twice), "first at 1.skip · branch 3 of 3: this branch is counted twice"),
    "kernel not centred": (
        _in(forms, "summed", _at_the_corner),
        "first at 0.point.1 · branch 2 of 3: this branch is added up wrongly",
    ),
    "groups mixed up": (
        _in(maps, "_regrouped", _blocks_mixed_up),
        "first at 5.two.1 · branch 2 of 3: this branch is added up wrongly",
    ),
    "kernel flipped by a BatchNorm": (_in(forms, "composed", _turned), "first at 3.large.1 · branch 1 of 3: composing"),
    "bias through padding": (_in(forms, "moved_bias", _everywhere), "first at 7.1: composing conv2d of 7.1"),
    "bias not written": (_in(writing.Writer, "parameter", _without_bias), "merging 1 changes what it computes"),
}


def _of_another(module: str) -> tuple[Tensor, Tensor]:
    bn = _network().double().get_submodule(module)
    factors = bn.weight / (bn.running_var + bn.eps).sqrt()
    return factors, bn.bias - bn.running_mean * factors


def test_the_control_merges(traced: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network().double()
    merged = _merged(network, traced, monkeypatch)
    torch.testing.assert_close(merged(X.double()), network(X.double()), rtol=0, atol=1e-12)
    assert len(MUTANTS) > 15


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught_and_blamed(name: str, traced: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, said = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises(VerificationError) as caught:
        _merged(_network().double(), traced, monkeypatch)
    assert said in str(caught.value)


def test_an_export_with_a_fault_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    MUTANTS["branch dropped"][0](monkeypatch)
    with pytest.raises(VerificationError, match="branch 3 of 3: this branch is left out"):
        export(_network(), example_input=X, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_norm_in_training_mode_is_refused() -> None:
    network = _network()
    network[1].skip.train()
    with pytest.raises(ValueError, match=r"1\.skip is in training mode"):
        merge_regions(network, (X,))
