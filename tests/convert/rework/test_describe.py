"""repmlp-inspect on checkpoints of other families: by their names alone, and with their networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from repmlp_deploy.cli import inspect as inspect_cli
from repmlp_deploy.convert.rework.describe import describe_names, describe_trained
from repmlp_deploy.convert.source.trained import SourceRequest, load_own
from support.commands import ends_with
from support.standins import STANDINS
from support.timm_networks import trained_timm


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"state_dict": STANDINS["repvgg"]().state_dict()}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_a_file_alone_tells_the_family_and_how_to_export_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(inspect_cli.inspect_command, saved, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "RepVGG, official, 5 blocks with branches"
    assert found["container"] == "state_dict"
    assert found["BatchNorms"] == 13
    assert "pass --module PACKAGE.MODULE:FACTORY" in found["notes"][0]
    assert describe_names(saved)["state"] == "trained"


def test_a_file_of_no_family_is_refused_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "x.pth")
    assert describe_names(tmp_path / "x.pth") is None
    assert ends_with(inspect_cli.inspect_command, tmp_path / "x.pth") == 2
    assert "--model timm:NAME" in capsys.readouterr().err


def test_a_network_tells_what_could_be_merged(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = "support.standins.repvgg:make"
    assert ends_with(inspect_cli.inspect_command, saved, "--module", factory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hooks"] == ["switch_to_deploy of 5 modules"]
    assert found["RepMLP blocks"] == 0
    assert "BatchNorms 13 -> 0" in found["could be merged"]
    assert len(found["regions"]) >= 5
    assert ends_with(inspect_cli.inspect_command, saved, "--module", factory) == 0
    shown = capsys.readouterr().out
    assert "could be merged" in shown
    assert "multiply-adds" not in shown  # a line per region is for JSON


def test_a_network_of_timm_says_its_name(tmp_path: Path) -> None:
    torch.save(trained_timm("test_byobnet").state_dict(), tmp_path / "x.pth")
    found = describe_trained(
        load_own(tmp_path / "x.pth", SourceRequest(model="timm:test_byobnet", input_size=(32, 32)))
    )
    assert found["family"] == "none that is known by its names"
    assert found["model"] == "timm:test_byobnet"
    assert found["hooks"] == []
    assert found["could be merged"].startswith("regions: ")
