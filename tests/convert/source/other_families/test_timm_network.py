"""Networks of timm by name: built, described, filled from a file, exported, and found again from the bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from repmlp_deploy import export
from repmlp_deploy.convert.options import parse_model
from repmlp_deploy.convert.rework.derive import derive_again
from repmlp_deploy.convert.source.trained import SourceRequest, load_own
from repmlp_deploy.errors import CheckpointError, InputError, MissingDependency
from support.timm_networks import STANDIN, trained_timm

import timm  # isort: skip - after what makes it importable
from repmlp_deploy.convert.source.other_families.timm_network import fitting_models, make_timm_network  # isort: skip

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
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[4])])
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


def shapes_of(name: str, **arguments: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = timm.create_model(name, **arguments)
    return {key: tuple(x.shape) for key, x in network.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "pattern", "arguments", "found"),
    [
        ("repvgg_a1", "repvgg_*", {}, "timm:repvgg_a1"),
        ("repvgg_b1g4", "repvgg_*", {"num_classes": 7}, "timm:repvgg_b1g4,num_classes=7"),
        ("mobileone_s2", "mobileone_*", {"in_chans": 1}, "timm:mobileone_s2,in_chans=1"),
        ("fastvit_sa12", "fastvit_*", {"num_classes": 10}, "timm:fastvit_sa12,num_classes=10"),
        ("repvit_m1_1", "repvit_*", {"num_classes": 10}, "timm:repvit_m1_1,num_classes=10"),
        ("repghostnet_058", "repghostnet_*", {}, "timm:repghostnet_058"),
        ("ghostnetv3_050", "ghostnetv3_*", {"num_classes": 0}, "timm:ghostnetv3_050,num_classes=0"),
    ],
)
def test_names_and_shapes_tell_the_network(name: str, pattern: str, arguments: dict[str, Any], found: str) -> None:
    assert fitting_models(shapes_of(name, **arguments), pattern) == [found]


def test_what_keys_begin_with_and_counters_tell_nothing() -> None:
    shapes = {f"model.{key}": shape for key, shape in shapes_of("repvgg_a0").items() if not key.endswith("tracked")}
    assert fitting_models(shapes | {"loss.weight": (3,)}, "repvgg_a*") == ["timm:repvgg_a0"]


def test_another_shape_or_another_weight_is_another_network() -> None:
    shapes = shapes_of("repvgg_a0")
    assert fitting_models(shapes | {"stages.3.0.conv_1x1.bn.bias": (1281,)}, "repvgg_a*") == []
    assert fitting_models(shapes | {"stages.3.0.more.bias": (1280,)}, "repvgg_a*") == []
    assert fitting_models({key: x for key, x in shapes.items() if "stages.3.0.conv_1x1" not in key}, "repvgg_a*") == []


@pytest.mark.parametrize("odd", [(0, 1280), (1 << 62, 1280), (7, 0)])
def test_odd_shapes_fit_nothing(odd: tuple[int, int]) -> None:
    shapes = shapes_of("repvgg_a0")
    assert fitting_models(shapes | {"head.fc.weight": odd}, "repvgg_a*") == []
    assert fitting_models(shapes | {"stem.conv_kxk.conv.weight": (48, *odd, 3)}, "repvgg_a*") == []
