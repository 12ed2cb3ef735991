"""`--format checkpoint`: the merged state dict comes back as merged, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import BaseModel

from repmlp_deploy import Predictor, export
from repmlp_deploy.convert.options import find_named
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.families import FAMILIES
from repmlp_deploy.nets.networks.pure_mlp import PureMLPSpec
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNetSpec
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNetSpec
from support.golden_cases import GoldenCase, assert_matches_golden
from support.networks import randomize
from support.standins import STANDINS

RESNET: dict[str, Any] = {"input_size": (32, 32), "depths": (1, 2, 2, 1), "channels": (8, 32, 64, 16), "stem": 8}
SPECS: list[tuple[str, BaseModel]] = [
    ("repmlpnet", RepMLPNetSpec(input_size=(16, 16), channels=(8, 16), depths=(1, 1), sharesets=(2, 4), classes=5)),
    ("repmlp-resnet", RepMLPResNetSpec(block="light", partition=(2, 2), groups=2, classes=5, **RESNET)),
    ("repmlp-resnet", RepMLPResNetSpec(block="bottleneck", partition=(2, 2), groups=2, classes=5, **RESNET)),
    ("pure-mlp", PureMLPSpec(channels=(4, 8), depths=(1, 1), partitions=((8, 8), (8, 8)), groups=(2, 4), classes=5)),
]


@pytest.mark.parametrize(
    ("family", "spec", "container"), [(*pair, ("", "model")[i % 2]) for i, pair in enumerate(SPECS)]
)
def test_a_merged_checkpoint_is_recognised_and_computes_the_same(
    family: str, spec: BaseModel, container: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = randomize(FAMILIES[family].build(spec))
    state = {f"module.{key}": value for key, value in trained.state_dict().items()}
    torch.save({container: state} if container else state, tmp_path / "trained.pth")
    bundle = export(tmp_path / "trained.pth", formats="checkpoint", batch=2, out=tmp_path / "out")

    with pytest.raises(CheckpointError, match="merged already"):
        load_trained(bundle.folder / "model.pth")
    again = load_trained(bundle.folder / "model.pth", allow_merged=True)
    assert again.merged
    assert (again.state.container, again.state.prefix) == (container, "module.")
    x = torch.randn(3, 3, *spec.input_size)
    torch.testing.assert_close(again.network(x), trained(x), rtol=1e-4, atol=1e-5)

    deployed = FAMILIES[family].build(spec, deploy=True)
    saved = torch.load(bundle.folder / "model.pth", weights_only=True)
    saved = saved[container] if container else saved
    deployed.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()}, strict=True)


def test_merged_weights_of_another_network_would_be_noticed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, spec = SPECS[-1]
    trained = randomize(FAMILIES[family].build(spec))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    bundle = export(tmp_path / "trained.pth", formats="checkpoint", batch=2, out=tmp_path / "out")
    saved = torch.load(bundle.folder / "model.pth", weights_only=True)
    saved["stages.0.0.repmlp.fc3.bias"] += 1e-2
    torch.save(saved, tmp_path / "changed.pth")
    x = torch.randn(3, 3, 32, 32)
    again = load_trained(tmp_path / "changed.pth", allow_merged=True).network
    with pytest.raises(AssertionError):
        torch.testing.assert_close(again(x), trained(x), rtol=1e-4, atol=1e-5)


TIED = """
import torch
from torch import nn
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.BatchNorm2d(4))
        self.block = RepMLPBlock(4, 4, 4, sharesets=2, hidden=2)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.example_input = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.block(self.stem(x)).mean((2, 3)))))
"""


def test_tied_weights_are_stored_as_safetensors_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the report says that the weights have only blocks merged."""
    (tmp_path / "tied_for_tests.py").write_text(TIED)
    monkeypatch.chdir(tmp_path)
    network = randomize(find_named("--module", "tied_for_tests:Tied")())
    state = {key: value.clone() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "trained.safetensors")
    path, factory = tmp_path / "trained.safetensors", "tied_for_tests:Tied"
    bundle = export(path, module=factory, formats="checkpoint", batch=2, out=tmp_path / "out")
    saved = safetensors.torch.load_file(bundle.folder / "model.safetensors")
    assert torch.equal(saved["first.weight"], network.first.weight)
    assert torch.equal(saved["second.weight"], network.first.weight)
    said = "model.safetensors has RepMLP's blocks merged; the regions (1) are merged in graphs alone"
    assert said in bundle.manifest.notes


@pytest.mark.parametrize("merge", ["auto", "regions"])
@pytest.mark.parametrize(("option", "value"), [("formats", "onnx,checkpoint"), ("graph", "merged")])
def test_weights_are_refused_where_only_the_graph_is_merged(
    option: str, value: str, merge: str, tmp_path: Path
) -> None:
    network = STANDINS["repvgg"]()
    asked = "--graph merged" if option == "graph" else "--format checkpoint"
    with pytest.raises(InputError, match=f"{asked} needs merged modules. .*: pass --merge hooks .*, or drop {asked}"):
        export(network, example_input=network.example_input, merge=merge, out=tmp_path / "out", **{option: value})


@pytest.mark.parametrize(("option", "value"), [("formats", "onnx,checkpoint"), ("graph", "merged")])
def test_weights_of_blocks_that_stay_as_they_are_are_refused(option: str, value: str, tmp_path: Path) -> None:
    """`--merge regions` leaves a family's blocks to the traced graph."""
    spec = RepMLPNetSpec(input_size=(16, 24), channels=(8, 16), depths=(1, 1), sharesets=(2, 4), classes=7)
    torch.save(randomize(FAMILIES["repmlpnet"].build(spec)).state_dict(), tmp_path / "trained.pth")
    asked = "--graph merged" if option == "graph" else "--format checkpoint"
    said = f"{asked} needs merged modules, and --merge regions merges only the traced graph: drop one of them, or pass "
    with pytest.raises(InputError, match=said):
        export(tmp_path / "trained.pth", input_size=(16, 24), merge="regions", out=tmp_path / "out", **{option: value})


@pytest.mark.slow
def test_an_official_res50_exports_to_an_onnx_graph_equal_to_its_release(tmp_path: Path) -> None:
    """The light one; what its trained and merged networks compute is compared for both in tests/nets."""
    name = "repmlp-res50-light-224"
    case = GoldenCase(name)
    torch.save({"state_dict": case.weights()}, tmp_path / "trained.pth")
    bundle = export(tmp_path / "trained.pth", formats="onnx", out=tmp_path / "out")
    with Predictor(bundle) as predictor:
        assert_matches_golden(predictor.logits(case.input()), case.output(), atol=1e-5)
    assert bundle.manifest.name == name
