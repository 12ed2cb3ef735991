"""A file alone is enough where names and shapes tell the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from repmlp_deploy import export
from repmlp_deploy.bench.subjects.pytorch import open_trained
from repmlp_deploy.cli import inspect as inspect_cli
from repmlp_deploy.convert.source.opening import open_source
from repmlp_deploy.convert.source.trained import SourceRequest
from repmlp_deploy.errors import CheckpointError, InputError, MissingDependency
from support.commands import ends_with
from support.implementations import MM_MOBILEONE, make_mobileone, make_repvgg
from support.standins import STANDINS
from support.timm_networks import trained_timm

from repmlp_deploy.convert.source.other_families import timm_network  # isort: skip - after timm is importable


class _WithoutTimm(ModuleType):
    """The module that imports timm, where timm is not installed."""

    def __getattr__(self, name: str) -> object:
        raise MissingDependency("timm", "timm")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RepVGG-A0 for ten classes as its repository saves it, from a training on several GPUs."""
    state = make_repvgg(classes=10).state_dict()
    path = tmp_path_factory.mktemp("official") / "a0.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 119}, path)
    return path


def test_an_official_repvgg_is_exported_by_its_file_alone(official: Path, tmp_path: Path) -> None:
    bundle = export(official, input_size=(64, 64), out=tmp_path / "out")
    assert bundle.manifest.origin.model == "timm:repvgg_a0,num_classes=10"
    assert bundle.manifest.name == "repvgg_a0"
    notes = " | ".join(bundle.manifest.notes)
    assert "recognised as timm:repvgg_a0,num_classes=10 by names and shapes" in notes
    assert "the weights have the names of the official RepVGG; timm's take their place" in notes
    inputs, reference = bundle.probe().batch(4)
    with torch.inference_mode():
        expected = make_repvgg(classes=10).double()(torch.from_numpy(inputs).double()).numpy()
    assert abs(expected - reference).max() < 1e-12 * abs(expected).max()


def test_the_name_of_the_network_may_be_given(official: Path) -> None:
    trained = open_source(official, SourceRequest(model="timm:repvgg_a0,num_classes=10", input_size=(32, 32)))
    assert not any(note.startswith("recognised") for note in trained.notes)
    assert "stem.conv_kxk.conv.weight" in trained.state.keys


def test_weights_of_mmpretrain_and_of_timm_need_no_name_either(tmp_path: Path) -> None:
    torch.save({"meta": {}, "state_dict": make_mobileone(MM_MOBILEONE).state_dict()}, tmp_path / "mm.pth")
    torch.save(trained_timm("mobileone_s0").state_dict(), tmp_path / "timm.pth")
    for name in ("mm", "timm"):
        assert open_source(tmp_path / f"{name}.pth", SourceRequest()).model == "timm:mobileone_s0"
    assert open_trained(tmp_path / "mm.pth", None).model == "timm:mobileone_s0"


def test_repmlp_comes_first(digits_checkpoint: Path) -> None:
    trained = open_source(digits_checkpoint, SourceRequest())
    assert (trained.model, trained.card.name) == (None, "repmlp-digits")


def test_what_no_network_of_timm_has_is_refused_with_the_way_in(tmp_path: Path) -> None:
    torch.save(STANDINS["repvgg"]().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"looks like RepVGG, official, 5 .* fits no repvgg_\* of timm: pass"):
        open_source(tmp_path / "x.pth", SourceRequest())


def test_a_family_without_timm_is_refused_with_the_way_in(tmp_path: Path) -> None:
    torch.save(STANDINS["replknet"]().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"looks like RepLKNet, 3 blocks with branches: pass --module"):
        open_source(tmp_path / "x.pth", SourceRequest())


def test_a_card_of_another_family_is_refused(official: Path) -> None:
    with pytest.raises(InputError, match=r"is a network of timm; the card repmlpnet-t224 describes a repmlpnet"):
        open_source(official, SourceRequest(card="repmlpnet-t224"))


def test_of_several_that_fit_the_user_says_which(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_network, "fitting_models", lambda *_: ["timm:a", "timm:b"])
    with pytest.raises(CheckpointError, match=r"fits timm:a and timm:b: say which with --model"):
        open_source(official, SourceRequest())


def test_inspect_names_the_network(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(inspect_cli.inspect_command, official, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["model"] == "timm:repvgg_a0,num_classes=10"
    assert "BatchNorms 61 -> 0" in found["could be merged"]


def test_inspect_tells_the_family_where_timm_is_missing(
    official: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, timm_network.__name__, _WithoutTimm(timm_network.__name__))
    assert ends_with(inspect_cli.inspect_command, official, "--json") == 0
    assert json.loads(capsys.readouterr().out)["family"] == "RepVGG, official, 22 blocks with branches"
    with pytest.raises(MissingDependency, match=r"a0.pth looks like RepVGG, .*, and timm has the network: timm is not"):
        open_source(official, SourceRequest())
