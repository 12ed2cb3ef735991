"""Networks of every family pass every tolerance with room to spare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from repmlp_deploy import export, get_model
from repmlp_deploy.nets.families import FAMILIES
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNet, RepMLPResNetSpec
from repmlp_deploy.precision import PRECISIONS, Tolerance
from support.networks import randomize
from support.own_networks import Segmenter
from support.task_cases import filled, small_card, small_network

pytestmark = pytest.mark.slow  # many exports, seconds each

LEAST = 3.0


def resnet(block: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 2, 1), "channels": (32, 64, 64, 64), "stem": 8, "squeeze": (2, 2)}
    return randomize(
        RepMLPResNet(RepMLPResNetSpec(input_size=(64, 64), block=block, partition=(4, 4), groups=2, classes=5, **sizes))
    )


def task(family: str) -> nn.Module:
    network = small_network(family)
    network.card = small_card(family)
    return network


CASES = {
    "repmlpnet": lambda: task("repmlpnet"),
    "repmlpnet-backbone": lambda: task("repmlpnet-backbone"),
    "pspnet": lambda: task("pspnet"),
    "mobilefacenet": lambda: task("mobilefacenet"),
    "repmlp-resnet": lambda: resnet("light"),
    "repmlp-resnet, bottleneck": lambda: resnet("bottleneck"),
    "pure-mlp": lambda: get_model("pure-mlp-digits", pretrained=True),
    "trained": lambda: get_model("repmlp-digits", pretrained=True),
}


def test_no_family_is_left_out() -> None:
    assert {name.partition(",")[0] for name in CASES} - {"trained"} == set(FAMILIES)


@pytest.mark.parametrize("name", list(CASES))
def test_every_step_of_every_family_has_a_margin_of_three(name: str, tmp_path: Path) -> None:
    network = CASES[name]()
    given = {} if hasattr(network, "card") else {"example_input": torch.zeros(1, 3, 64, 64)}
    bundle = export(network, batch="1:4:8", out=tmp_path / "out", **given)
    margins = {hop.name: hop.margin for hop in bundle.manifest.certificate if hop.margin is not None}
    assert min(margins.values()) >= LEAST, min(margins.items(), key=lambda line: line[1])
    names = {hop.name.partition(":")[0] for hop in bundle.manifest.certificate if hop.passed}
    assert names >= {"merged", "folded, float64", "folded, redrawn", "folded weights", "simplified ONNX"}
    assert names >= {"exported ONNX weights", "simplified ONNX weights"}


def test_a_network_of_ones_own_has_it_too(tmp_path: Path) -> None:
    """BatchNorms of its own that no rule folds, several inputs and outputs."""
    torch.manual_seed(0)
    example = {"images": torch.randn(1, 3, 32, 32), "weight": torch.rand(1, 5)}
    bundle = export(randomize(Segmenter()), example_input=example, batch="1:2:5", out=tmp_path / "out")
    assert bundle.manifest.verdict is not None
    assert bundle.manifest.verdict.margin is not None
    assert bundle.manifest.verdict.margin >= LEAST
    weights = next(hop for hop in bundle.manifest.certificate if hop.name == "exported ONNX weights")
    assert weights.note.endswith("are equal"), "regions leave nothing that an exporter would change"


def test_a_small_margin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: were the tolerance nearer, the margin would say so."""
    entry = PRECISIONS["fp32"]
    near = Tolerance(floor_ratio=1.3, reason=entry.tolerance.reason)
    monkeypatch.setitem(PRECISIONS, "fp32", replace(entry, tolerance=near))
    network = filled(get_model("repmlp-digits", pretrained=True))
    bundle = export(network, formats="checkpoint", out=tmp_path / "out")
    assert bundle.manifest.verdict is not None
    assert bundle.manifest.verdict.margin is not None
    assert bundle.manifest.verdict.margin < LEAST
