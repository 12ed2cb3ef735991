"""Families are recognised by the keys of their checkpoints; merged ones are told from trained ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from repmlp_deploy.convert.reparam.hooks import find_hook
from repmlp_deploy.convert.source.other_families import recognise_family
from repmlp_deploy.convert.source.trained import SourceRequest, load_own
from repmlp_deploy.errors import InputError
from support.standins import STANDINS
from support.timm_networks import trained_timm


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("repvgg_a0", "RepVGG of timm, 22 blocks with branches"),
        ("mobileone_s0", "MobileOne of timm, 43 blocks with branches"),
        ("fastvit_t8", "FastViT of timm, 10 blocks with branches"),
    ],
)
def test_families_of_timm_are_recognised_by_their_keys(name: str, said: str) -> None:
    assert str(recognise_family(trained_timm(name).state_dict())) == said


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("repvgg", "RepVGG, official, 5 blocks with branches"),
        ("dbb", "diverse branch blocks (DBB), 4 blocks with branches"),
        ("replknet", "RepLKNet, 3 blocks with branches"),
        ("unireplknet", "UniRepLKNet, 3 blocks with branches"),
    ],
)
def test_families_without_timm_are_recognised_by_their_keys(family: str, said: str) -> None:
    assert str(recognise_family(STANDINS[family]().state_dict())) == said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("token_mixer.mixer.rbr_conv.0.conv.weight", "proj.0.lkb_origin.conv.weight"), "FastViT, official, 1 blocks"),
        (("features.1.token_mixer.0.conv.c.weight",), "RepViT, official, 1 blocks with branches"),
        (("backbone.stem.branch_3x3.norm.weight",), "RepVGG of mmpretrain, 1 blocks with branches"),
        (("backbone.stage0.branch_conv_list.0.norm.weight",), "MobileOne of mmpretrain, 1 blocks with branches"),
        (("stem.branch_reparam.bias",), "MobileOne or RepVGG of mmpretrain, 1 merged blocks"),
        (("s.lk_origin.weight", "s.lk_origin.bias"), "UniRepLKNet, 1 merged blocks"),
        (("stage1.0.rbr_reparam.weight", "stage1.0.rbr_reparam.bias"), "RepVGG or RepConv, 1 merged blocks"),
        (("stem.reparam_conv.bias", "s.token_mixer.reparam_conv.bias"), "FastViT, 1 merged blocks"),
        (("stem.reparam_conv.bias", "s.0.reparam_conv.bias"), "MobileOne or RepVGG, 2 merged blocks"),
    ],
)
def test_families_that_share_names_are_told_apart(keys: tuple[str, ...], said: str) -> None:
    assert str(recognise_family(keys)).startswith(said)


@pytest.mark.parametrize("family", ["repvgg", "replknet", "unireplknet", "dbb"])
def test_a_merged_checkpoint_is_told_from_a_trained_one(family: str) -> None:
    network = STANDINS[family]()
    for module in list(network.modules()):
        hook = find_hook(module)
        if hook is not None:
            hook[1]()
    found = recognise_family(network.state_dict())
    assert (found.blocks, found.merged > 1) == (0, True)
    assert "training-time checkpoint" in found.remedy


def test_a_network_that_is_merged_already_is_refused_unless_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = STANDINS["repvgg"](), torch.zeros(1, 3, 16, 16)
    for module in list(network.modules()):
        hook = find_hook(module)
        if hook is not None:
            hook[1]()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    of_file = SourceRequest(module="support.standins.repvgg:make", example_input=x)
    for source, said in ((network, SourceRequest(example_input=x)), (tmp_path / "x.pth", of_file)):
        with pytest.raises(InputError, match=r"is merged already \(RepVGG or RepConv, 5 merged .* --allow-merged"):
            load_own(source, said)
    allowed = load_own(network, SourceRequest(example_input=x, allow_merged=True))
    assert "the reference is the merged network" in allowed.notes[0]
    again = SourceRequest(module="made_here:make_merged", example_input=x, allow_merged=True)
    monkeypatch.setitem(sys.modules, "made_here", SimpleNamespace(make_merged=lambda: network))
    assert load_own(tmp_path / "x.pth", again).state.merged


def test_a_block_with_other_branches_beside_its_merged_convolution_is_not_merged() -> None:
    names = ("rbr_reparam.bias", "branch_3x3.conv.weight", "branch_3x3.bn.running_mean")
    assert recognise_family(f"stage1.0.{name}" for name in names) is None
    assert recognise_family(["rbr_reparam.bias", "norm.running_mean"]) is None
    assert recognise_family(["conv1.weight", "fc.bias"]) is None


@pytest.mark.parametrize(("beside", "said"), [("b.norm.weight", "None"), ("c.weight", "ACNet, 1 merged blocks")])
def test_a_convolution_that_fuses_maps_is_no_merged_block(beside: str, said: str) -> None:
    assert str(recognise_family(["a.b.fused_conv.weight", "a.b.fused_conv.bias", f"a.{beside}"])) == said
