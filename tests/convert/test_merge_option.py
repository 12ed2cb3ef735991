"""The option --merge, from what is asked for to the bundle and back to the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from repmlp_deploy import Bundle, export
from repmlp_deploy.convert.options import check_merge, find_named
from repmlp_deploy.convert.rework.locate import merge_of
from repmlp_deploy.errors import InputError, VerificationError
from support.standins import STANDINS

MODULE = """
def merge(network):
    for module in list(network.modules()):
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()


def merge_nothing(network):
    pass
"""


def exported(family: str, out: Path, **options: object) -> Bundle:
    network = STANDINS[family]()
    return export(network, example_input=network.example_input, batch="1:2:2", out=out, **options)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_merges.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_merges", None)
    sys.modules.pop("own_merges")
    return "own_merges"


@pytest.mark.parametrize("text", ["auto", "blocks", "hooks", "package.module:function"])
def test_what_merges_is_a_word_or_a_function(text: str) -> None:
    check_merge(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hook", "did you mean hooks"),
        ("package", "expected one of auto"),
        (":function", "expected package.module:function"),
        ("package:", "expected package.module:function"),
        ("package:" + "f" * 300, "expected package.module:function"),
        ("os:remove", "os is a module of Python and merges no network; name or rename your own"),
    ],
)
def test_anything_else_is_refused_before_any_work(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_merge(text)
    with pytest.raises(InputError, match=said):
        export("missing.pth", merge=text)


def test_a_function_that_is_not_there_is_named(own_package: str) -> None:
    with pytest.raises(InputError, match="own_merges has no absent"):
        find_named("--merge", f"{own_package}:absent")
    with pytest.raises(InputError, match="No module named 'own_absent'"):
        find_named("--merge", "own_absent:merge")


def test_a_network_is_merged_by_its_own_hooks_and_the_bundle_says_so(tmp_path: Path) -> None:
    bundle = exported("repvgg", tmp_path / "bundle", merge="hooks")
    assert bundle.manifest.verdict.passed
    assert Bundle.load(tmp_path / "bundle").manifest.origin.merge == "hooks"
    assert "merged by the network's own hooks: BatchNorms 13 -> 0, convolutions 10 -> 5" in bundle.manifest.notes
    names = [hop.name for hop in bundle.manifest.certificate]
    assert {"merged", "merged, float64", "merged, redrawn", "merged weights"} <= set(names)


def test_a_wrong_hook_writes_nothing(tmp_path: Path) -> None:
    network = STANDINS["repvgg"]()
    kind = type(network.stages[1])
    network.stages[1].__class__ = type(
        "Wrong", (kind,), {"switch_to_deploy": lambda block: setattr(block, "nonlinearity", nn.Identity())}
    )
    with pytest.raises(VerificationError, match=r"switch_to_deploy\(\) of stages\.1 \(Wrong\) computes something else"):
        export(network, example_input=network.example_input, merge="hooks", out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_network_is_merged_by_a_function_of_its_package(own_package: str, tmp_path: Path) -> None:
    bundle = exported("acnet", tmp_path / "bundle", merge=f"{own_package}:merge")
    assert bundle.manifest.verdict.passed
    assert bundle.manifest.origin.merge == "own_merges:merge"
    with pytest.raises(InputError, match="merged by own_merges:merge, which a bundle cannot make run here"):
        merge_of(bundle)


def test_a_function_that_does_nothing_is_refused(own_package: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="own_merges:merge_nothing does nothing"):
        exported("acnet", tmp_path / "bundle", merge=f"{own_package}:merge_nothing")


def test_blocks_alone_are_for_networks_that_have_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no RepMLP block"):
        exported("acnet", tmp_path / "bundle", merge="blocks")


def test_a_bundle_that_does_not_say_how_was_merged_by_blocks(tmp_path: Path) -> None:
    bundle = exported("acnet", tmp_path / "bundle")
    provenance = {key: value for key, value in bundle.manifest.provenance.items() if key != "merge"}
    assert bundle.manifest.origin.merge == "auto"
    older = Bundle(bundle.manifest.model_copy(update={"provenance": provenance}), folder=bundle.folder)
    assert merge_of(older) == "blocks"
    assert torch.get_default_dtype() == torch.float32
