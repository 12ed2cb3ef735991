"""Networks of timm by name: built, described, filled from a file, exported, and found again from the bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from repmlp_deploy import export
from repmlp_deploy.convert.options import parse_model
from repmlp_deploy.convert.reparam.hooks import find_hook
from repmlp_deploy.convert.rework.derive import derive_again
from repmlp_deploy.convert.source.other_families import recognise_family
from repmlp_deploy.convert.source.trained import SourceRequest, load_own, load_trained
from repmlp_deploy.errors import CheckpointError, InputError, MissingDependency
from support.standins import STANDINS
from support.timm_networks import STANDIN, trained_timm

from repmlp_deploy.convert.source.timm_network import make_timm_network  # isort: skip - after timm is importable

TINY = "test_byobnet"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "tiny.pth"
    torch.save({"state_dict": trained_timm(TINY).state_dict(), "arch": TINY, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:repvgg_a0", ("repvgg_a0", {})),
        ("timm:repvgg_a0.rvgg_in1k", ("repvgg_a0.rvgg_in1k", {})),
        (
            "timm:x,num_classes=10,drop_rate=0.5,img_size=64x32,global_pool=avg,bias=true",
            (
                "x",
                {"num_classes": 10, "drop_rate": 0.5, "img_size": (64, 32), "global_pool": "avg", "bias": True},
            ),
        ),
    ],
)
def test_name_and_arguments_are_read(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert parse_model(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repvgg_a0", "expected timm:NAME"),
        ("hub:repvgg_a0", "expected timm:NAME"),
        ("timm:", "expected timm:NAME"),
        ("timm:hf-hub:some/one", "expected timm:NAME"),
        ("timm:../x", "expected timm:NAME"),
        ("timm:" + "x" * 300, "expected timm:NAME"),
        ("timm:x,10", "'10' is no key=value"),
        ("timm:x,pretrained=true", "weights, which come from --ckpt alone"),
        ("timm:x,checkpoint_path=a.pth", "weights, which come from --ckpt alone"),
        ("timm:x,pretrained_cfg=hub", "weights, which come from --ckpt alone"),
        ("timm:x,act=os.system(1)", "is no number, size or word"),
        ("timm:x,embed_dim=1e12", "larger than 65536"),
        ("timm:x,embed_dim=nan", "larger than 65536"),
    ],
)
def test_anything_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        parse_model(text)


def test_the_name_of_a_card_is_refused_before_timm_is_asked_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "repmlp_deploy.convert.source.timm_network", None)
    with pytest.raises(InputError, match="the name of a card goes to --card"):
        load_own(checkpoint, SourceRequest(model="repmlpnet-b224"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm:repvgg_a9", "did you mean repvgg_a"),
        ("timm:repvgg_a0.other", "timm cannot build it: RuntimeError: Invalid pretrained tag"),
        ("timm:repvgg_a0,no_such=1", "timm cannot build it: TypeError"),
    ],
)
def test_a_network_that_timm_does_not_have_is_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_timm_network(text)


def test_preprocessing_and_labels_are_those_of_pretrained_cfg() -> None:
    made = make_timm_network("timm:mobileone_s0")
    how = made.preprocessing
    assert how is not None
    assert (how.resize.mode, how.resize.size, how.crop) == ("short-edge", (256, 256), (224, 224))
    assert how.mean == pytest.approx((123.675, 116.28, 103.53))
    assert how.std == pytest.approx((58.395, 57.12, 57.375))
    assert how.interpolation == "bilinear"
    assert made.labels == "imagenet-1k"
    assert not made.network.training


def test_labels_are_left_out_where_classes_are_others() -> None:
    assert make_timm_network("timm:mobileone_s0,num_classes=7").labels is None


def test_other_sizes_and_channels_are_kept_to() -> None:
    made = make_timm_network(f"timm:{TINY},in_chans=1", (96, 96))
    assert made.input_size == (96, 96)
    assert made.preprocessing is not None
    assert made.preprocessing.crop == (96, 96)
    assert made.channels == 1
    assert make_timm_network("timm:test_vit,img_size=64").input_size == (64, 64)


@pytest.mark.parametrize("mode", ["border", "center-of-a-rectangle"])
def test_a_transform_that_no_card_has_is_not_made_up(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = None
    if mode == "border":
        import timm

        kind = type(trained_timm(TINY))
        monkeypatch.setattr(kind, "pretrained_cfg", {"mean": (0.5,), "std": (0.5,), "crop_mode": mode}, raising=False)
        made = timm.create_model(TINY)
        made.pretrained_cfg = {**made.pretrained_cfg, "crop_mode": mode}
        monkeypatch.setattr(timm, "create_model", lambda *_a, **_k: made)
    else:
        size = (96, 64)
    assert make_timm_network(f"timm:{TINY}", size).preprocessing is None
    assert mode == "border" or make_timm_network(f"timm:{TINY},in_chans=1", size).channels == 1


def loaded(path: Path, model: str = f"timm:{TINY}", **said: Any) -> Any:
    return load_own(path, SourceRequest(model=model, **said))


def test_a_file_is_loaded_into_a_network_of_timm(checkpoint: Path) -> None:
    trained = loaded(checkpoint)
    assert trained.card.name == TINY
    assert trained.card.task == "classify"
    assert trained.card.labels == "imagenet-1k"
    assert trained.model == f"timm:{TINY}"
    assert trained.state.container == "state_dict"
    assert any(f"assumed to be those of timm's own weights of {TINY}" in said for said in trained.warnings)
    assert any("class names: those of timm's own weights" in said for said in trained.notes)
    torch.testing.assert_close(trained.network.state_dict(), trained_timm(TINY).state_dict())


def test_wrappers_prefixes_and_averages_are_found(tmp_path: Path) -> None:
    weights, average = trained_timm(TINY).state_dict(), {}
    for key, value in weights.items():
        average[f"module.{key}"] = value + 1 if value.is_floating_point() else value
    wrapped = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": wrapped, "state_dict_ema": average, "args": {"lr": 0.1}}, tmp_path / "x.pth")
    plain = loaded(tmp_path / "x.pth")
    torch.testing.assert_close(plain.network.state_dict(), weights)
    ema = loaded(tmp_path / "x.pth", weights="ema")
    key = next(key for key in weights if key.endswith("conv.weight"))
    torch.testing.assert_close(ema.network.state_dict()[key], weights[key] + 1)


def test_names_in_the_file_are_preferred_to_timms(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    torch.save({"state_dict": trained_timm(TINY).state_dict(), "meta": {"CLASSES": names}}, tmp_path / "x.pth")
    assert loaded(tmp_path / "x.pth").card.labels == tuple(names)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "classes", "nan", "variance"])
def test_a_file_that_does_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    weights = trained_timm(TINY).state_dict()
    key = next(key for key in weights if key.endswith("running_var"))
    expected = {
        "missing": f"has no {key}",
        "unexpected": "has another.weight, which ByobNet has not: --ignore leaves keys out",
        "shape": rf"{key} has shape \(3,\); ByobNet expects \(24,\)$",
        "classes": r"head.fc.weight has shape \(10, .*: build it with num_classes=10$",
        "nan": f"{key} has 1 values that are NaN",
        "variance": f"{key} has a variance of -1",
    }
    if change == "missing":
        del weights[key]
    elif change == "unexpected":
        weights["another.weight"] = torch.zeros(1)
    elif change == "shape":
        weights[key] = torch.ones(3)
    elif change == "classes":
        weights["head.fc.weight"] = weights["head.fc.weight"][:10]
    else:
        weights[key] = weights[key].clone()
        weights[key][0] = torch.nan if change == "nan" else -1
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=expected[change]):
        loaded(tmp_path / "x.pth")


def test_a_refusal_says_which_weights_of_several_do_not_fit(tmp_path: Path) -> None:
    content = {"discriminator": {"conv.weight": torch.zeros(3)}, "generator": trained_timm(TINY).state_dict()}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth \(discriminator; --state-key names others\)"):
        loaded(tmp_path / "x.pth")


def test_two_makers_of_one_network_are_one_too_many(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="both make the network: drop one"):
        loaded(checkpoint, module="own:network")
    with pytest.raises(InputError, match="model=timm:test_byobnet makes a network, and a ByobNet was given"):
        export(trained_timm(TINY), model=f"timm:{TINY}")


@pytest.mark.slow
def test_a_network_of_timm_is_exported_and_derived_again_from_what_the_bundle_says(
    checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export(checkpoint, model=f"timm:{TINY}", input_size=(64, 64), batch="1:2:2", out=tmp_path / "bundle")
    assert bundle.manifest.verdict.passed
    assert bundle.manifest.name == TINY
    assert bundle.manifest.origin.model == f"timm:{TINY}"
    assert bundle.manifest.labels is not None
    assert bundle.manifest.preprocessing.crop == (64, 64)
    hops, _ = derive_again(bundle, checkpoint)
    assert {hop.name for hop in hops} >= {"recorded reference", "onnx weights"}
    assert all(hop.passed is not False for hop in hops)


@pytest.mark.slow
def test_a_real_network_is_merged_by_timms_own_hooks(tmp_path: Path) -> None:
    model = "timm:repvgg_a0,num_classes=10"
    torch.save(trained_timm("repvgg_a0", num_classes=10).state_dict(), tmp_path / "x.pth")
    bundle = export(
        tmp_path / "x.pth", model=model, merge="hooks", input_size=(32, 32), batch="2", out=tmp_path / "bundle"
    )
    assert bundle.manifest.verdict.passed
    assert "merged by the network's own hooks: BatchNorms 61 -> 0, convolutions 44 -> 22" in bundle.manifest.notes


@pytest.mark.parametrize("broken", ["missing", "of another PyTorch"])
def test_without_torchvision_the_remedy_is_named(broken: str, tmp_path: Path, checkpoint: Path) -> None:
    fault = (
        "raise ImportError" if broken == "missing" else "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    folder = tmp_path / "site"
    (folder / "torchvision").mkdir(parents=True)
    (folder / "torchvision" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"
        if broken == "missing"
        else fault
    )
    command = [sys.executable, "-m", "repmlp_deploy", "export", "--ckpt", str(checkpoint), "--model", f"timm:{TINY}"]
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[3])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == MissingDependency.exit_code
    assert "torchvision" in done.stderr
    remedy = (
        "[timm]" if broken == "missing" else f"belongs to PyTorch {torch.__version__}, from the same place as PyTorch"
    )
    assert remedy in done.stderr
    *progress, said = done.stderr.strip().splitlines()
    assert said.startswith("error: torchvision ")
    assert all(line.startswith("...") for line in progress)


def test_the_stand_in_for_torchvision_stays_out_of_the_way() -> None:
    assert STANDIN.is_dir()
    assert str(STANDIN) not in sys.path


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
    again = SourceRequest(module="test_timm_network:make_merged", example_input=x, allow_merged=True)
    monkeypatch.setitem(sys.modules, "test_timm_network", SimpleNamespace(make_merged=lambda: network))
    assert load_own(tmp_path / "x.pth", again).state.merged


def test_a_block_with_other_branches_beside_its_merged_convolution_is_not_merged() -> None:
    names = ("rbr_reparam.bias", "branch_3x3.conv.weight", "branch_3x3.bn.running_mean")
    assert recognise_family(f"stage1.0.{name}" for name in names) is None
    assert recognise_family(["rbr_reparam.bias", "norm.running_mean"]) is None
    assert recognise_family(["conv1.weight", "fc.bias"]) is None


@pytest.mark.parametrize(("beside", "said"), [("b.norm.weight", "None"), ("c.weight", "ACNet, 1 merged blocks")])
def test_a_convolution_that_fuses_maps_is_no_merged_block(beside: str, said: str) -> None:
    assert str(recognise_family(["a.b.fused_conv.weight", "a.b.fused_conv.bias", f"a.{beside}"])) == said


def test_a_file_of_another_family_is_refused_with_the_way_in(tmp_path: Path) -> None:
    torch.save(STANDINS["replknet"]().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"looks like RepLKNet, 3 blocks with branches: pass --module"):
        load_trained(tmp_path / "x.pth")
