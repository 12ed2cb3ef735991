"""Weights of other implementations fill timm's networks, and compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from repmlp_deploy.convert.source.other_families.naming import NAMINGS, rename_weights
from support.implementations import MM_MOBILEONE, MM_REPVGG, MOBILEONE, REPVGG, make_mobileone, make_repvgg
from support.timm_networks import trained_timm

import timm  # isort: skip - after what makes it importable
from timm.models.fastvit import checkpoint_filter_fn  # isort: skip


def timm_keys(name: str) -> set[str]:
    with torch.device("meta"):
        return set(timm.create_model(name).state_dict())


@pytest.mark.parametrize(
    ("make", "name", "whose"),
    [
        (lambda: make_repvgg(REPVGG), "repvgg_a0", "the official RepVGG"),
        (lambda: make_repvgg(MM_REPVGG), "repvgg_a0", "mmpretrain's RepVGG"),
        (lambda: make_mobileone(MOBILEONE), "mobileone_s0", "the official MobileOne"),
        (lambda: make_mobileone(MM_MOBILEONE), "mobileone_s0", "mmpretrain's MobileOne"),
    ],
)
def test_timms_network_computes_the_same_with_the_weights(make: Callable[[], nn.Module], name: str, whose: str) -> None:
    theirs = make().double()
    state = theirs.state_dict()
    renamed = rename_weights(state)
    assert renamed is not None
    assert renamed.whose == whose
    ours = timm.create_model(name).double().eval()
    ours.load_state_dict({renamed.names[key]: value for key, value in state.items()}, strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = theirs(x), ours(x)
    assert expected.std() > 1e-3
    assert float((expected - got).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("names", [REPVGG, MM_REPVGG])
def test_squeeze_and_excitation_of_repvgg(names: object) -> None:
    theirs = make_repvgg(names, (8, 14, 24, 1), (16, 16, 16, 16), excited=True)
    assert set(rename_weights(theirs.state_dict()).names.values()) == timm_keys("repvgg_d2se")


@pytest.mark.parametrize("names", [MOBILEONE, MM_MOBILEONE])
def test_squeeze_and_excitation_of_mobileone(names: object) -> None:
    theirs = make_mobileone(names, (80, 96, 112, 128), dense=1, excited={2: 5, 3: 1})
    assert set(rename_weights(theirs.state_dict()).names.values()) == timm_keys("mobileone_s4")


def official_fastvit(name: str) -> list[str]:
    """Return the keys of the official network: timm's, with its names undone and the layers numbered through."""
    network = trained_timm(name)
    begins, n = [], 0
    for stage in network.stages:
        begins.append(n)
        n += len(_layers(stage))
    return [_official(key, network, begins) for key in network.state_dict()]


def _official(key: str, network: nn.Module, begins: list[int]) -> str:
    found = re.match(r"stages\.(\d)\.(downsample\.proj|pos_emb\.pos_enc|blocks)\.", key)
    if found:
        stage = int(found[1])
        part = found[2].partition(".")[0]
        inner = {"downsample": "proj.", "pos_emb": "pe.", "blocks": ""}[part]
        key = f"network.{begins[stage] + _layers(network.stages[stage]).index(part)}.{inner}{key[found.end() :]}"
    undone = {
        "stem.": "patch_embed.",
        "final_conv.": "conv_exp.",
        "head.fc.": "head.",
        "conv_kxk": "rbr_conv",
        "conv_scale": "rbr_scale",
        "identity": "rbr_skip",
        "large_conv": "lkb_origin",
        ".mlp.": ".convffn.",
        "se.fc1": "se.reduce",
        "se.fc2": "se.expand",
        ".gamma": "",
    }
    for ours, theirs in undone.items():
        key = key.replace(ours, theirs)
    return key


def _layers(stage: nn.Module) -> list[str]:
    parts = ("downsample", "pos_emb", "blocks")
    return [part for part in parts if not isinstance(getattr(stage, part), nn.Identity)]


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12", "fastvit_ma36"])
def test_fastvit_gets_the_names_that_timms_own_conversion_gives(name: str) -> None:
    keys = official_fastvit(name)
    by_timm = {theirs: ours for ours, theirs in checkpoint_filter_fn({key: key for key in keys}, None).items()}
    renamed = rename_weights(keys)
    assert renamed.whose == "the official FastViT"
    assert dict(renamed.names) == by_timm
    assert set(renamed.names.values()) == timm_keys(name)


def test_what_stands_before_the_names_and_other_parts_of_a_file_stay() -> None:
    keys = [f"{start}stage{n}.rbr_dense.conv.weight" for start in ("", "ema.net.") for n in ("0", "1.0")]
    renamed = rename_weights([*keys, "loss.stage1.weight"])
    assert dict(renamed.names) == {
        "stage0.rbr_dense.conv.weight": "stem.conv_kxk.conv.weight",
        "stage1.0.rbr_dense.conv.weight": "stages.0.0.conv_kxk.conv.weight",
        "ema.net.stage0.rbr_dense.conv.weight": "ema.net.stem.conv_kxk.conv.weight",
        "ema.net.stage1.0.rbr_dense.conv.weight": "ema.net.stages.0.0.conv_kxk.conv.weight",
        "loss.stage1.weight": "loss.stage1.weight",
    }


def test_names_of_timm_and_of_nothing_known_are_left_alone() -> None:
    assert rename_weights(timm_keys("repvgg_a0")) is None
    assert rename_weights(["stage1.rbr_dense.conv.weight", "linear.weight"]) is None


def test_a_file_of_many_copies_takes_no_time() -> None:
    keys = [f"{i}.{NAMINGS[0].anchor}" for i in range(20_000)]
    assert len(rename_weights(keys).names) == 4
