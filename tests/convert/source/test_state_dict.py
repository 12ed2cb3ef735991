from typing import Any

import pytest
import torch

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.convert.source import state_dict
from repmlp_deploy.convert.source.loading import infer_card, load_network
from repmlp_deploy.convert.source.state_dict import StateDict, find_state_dict, own_state_dict, to_layout
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.layouts import LAYOUTS, Layout
from support.golden_cases import GoldenCase

State = dict[str, torch.Tensor]


def wrapped(state: State) -> dict[str, Any]:
    """Every way in which checkpoints hold a state dict."""
    return {
        "raw": state,
        "state_dict": {"meta": {"epoch": 3}, "state_dict": state},
        "model": {"model": state, "optimizer": {"state": {}}, "epoch": 299, "lr_scheduler": {"last": 1}},
        "ema": {"ema": state},
        "model_ema": {"model_ema": {f"module.{key}": value for key, value in state.items()}},
        "state_dict_ema": {"state_dict_ema": state},
        "module": {f"module.{key}": value for key, value in state.items()},
        "compiled": {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
        "averaged": {"model": {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in state.items()}}},
        "nested": {"model": {"state_dict": state}},
    }


KINDS = sorted(wrapped({"x": torch.ones(1)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_found_in_every_layout(kind: str, digits_state: State) -> None:
    found = find_state_dict(wrapped(digits_state)[kind])
    assert found.layout.name == "official"
    assert not found.merged
    assert list(found.tensors) == list(digits_state)
    assert all(torch.equal(found.tensors[key], digits_state[key]) for key in digits_state)


def test_the_layout_says_what_only_merged_networks_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family need not have an FC3."""
    layout = Layout("own", "toy", "stem.weight", merged="point.bias", trained="point_bn.weight")
    monkeypatch.setattr(state_dict, "LAYOUTS", (*LAYOUTS, layout))

    def found(*keys: str) -> StateDict:
        return find_state_dict({key: torch.ones(2) for key in ("stem.weight", *keys)})

    assert found("blocks.0.point.weight", "blocks.0.point.bias").merged
    assert not found("blocks.0.point.weight", "blocks.0.point_bn.weight", "fc3.bias").merged
    with pytest.raises(CheckpointError, match=r"half merged: it has blocks.1.point.bias and blocks.0.point_bn.weight"):
        found("blocks.0.point_bn.weight", "blocks.1.point.bias")


def test_mmpretrain_names_become_ours_and_theirs_again() -> None:
    keys = GoldenCase("mmpretrain-repmlp-base-224").about["state_dict"]
    official = set(GoldenCase("repmlpnet-b224").about["state_dict"])
    layout = next(layout for layout in LAYOUTS if layout.name == "mmpretrain")
    assert {layout.ours(key) for key in keys} == official
    assert [layout.theirs(layout.ours(key)) for key in keys] == list(keys)


@pytest.mark.parametrize("kind", ["raw", "state_dict", "compiled", "nested"])
def test_weights_go_back_under_the_names_they_came_in(kind: str, digits_state: State) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "mmpretrain")
    for state in (digits_state, {layout.theirs(key): value for key, value in digits_state.items()}):
        content = wrapped(state)[kind]
        origin = find_state_dict(content)
        back = to_layout(origin.tensors, origin)
        again = find_state_dict(back)
        assert (again.container, again.prefix, again.layout) == (origin.container, origin.prefix, origin.layout)
        assert list(again.tensors) == list(digits_state)


def test_model_and_ema_in_one_file(digits_state: State) -> None:
    other = {key: value + 1 if value.is_floating_point() else value for key, value in digits_state.items()}
    content = {"model": digits_state, "ema": other}
    key = "head.bias"
    assert torch.equal(find_state_dict(content).tensors[key], digits_state[key])
    assert find_state_dict(content).others == ("ema",)
    assert torch.equal(find_state_dict(content, weights="ema").tensors[key], other[key])
    with pytest.raises(CheckpointError, match="holds no ema weights, only model"):
        find_state_dict({"model": digits_state}, weights="ema")


def test_half_precision_weights_are_widened(digits_state: State) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in digits_state.items()}
    assert find_state_dict(half).tensors["head.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "its keys are nothing"),
        ({"epoch": 3}, "its keys are epoch"),
        ({"layer1.weight": torch.ones(2)}, "is no RepMLP"),
        ({"net.fc3.weight": torch.ones(2)}, "no known network's frame"),
        ({1: torch.ones(2)}, "has the key 1"),
    ],
)
def test_what_is_no_repmlp_checkpoint(content: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_state_dict(content)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("head.bias", lambda t: t * float("nan"), "10 values that are NaN"),
        ("head.bias", lambda t: t / 0.0, "values that are NaN or infinite"),
        ("head_norm.running_var", lambda t: -t, "variances cannot be negative"),
        ("head.bias", lambda t: t.to(torch.int32), "expected floating-point"),
        ("head.bias", lambda t: t.to(torch.complex64), "not a dense tensor of real numbers"),
        ("head.weight", lambda t: t.to_sparse(), "not a dense tensor"),
        ("head.bias", lambda t: t.to("meta"), "not a dense tensor"),
        ("head.weight", lambda t: t[:1, :1].clone().expand(t.shape), "more than the file stores"),
        ("head.bias", lambda _: "text", "is a str; expected a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensors_that_cannot_be_weights_are_named(digits_state: State, key: str, change: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        find_state_dict({**digits_state, key: change(digits_state[key])})
    assert key in str(caught.value)


def test_a_half_merged_checkpoint(digits_state: State) -> None:
    with pytest.raises(CheckpointError, match="is half merged"):
        find_state_dict({**digits_state, "stages.0.0.repmlp_block.fc3.bias": torch.zeros(64)})


def test_loading_is_strict(digits_state: State) -> None:
    card = load_card("repmlp-digits")
    missing = {key: value for key, value in digits_state.items() if not key.startswith("stages.1.0.prebn1.w")}
    with pytest.raises(CheckpointError, match=r"stages.1.0.prebn1.weight is missing"):
        load_network(missing, card, merged=False)
    with pytest.raises(CheckpointError, match="extra is unexpected"):
        load_network({**digits_state, "extra": torch.ones(1)}, card, merged=False)
    with pytest.raises(CheckpointError, match=r"head.bias has shape \(3,\); expected \(10,\)"):
        load_network({**digits_state, "head.bias": torch.ones(3)}, card, merged=False)
    with pytest.raises(CheckpointError, match="and 3 more are unexpected"):
        load_network({**digits_state, **{f"e{i}": torch.ones(1) for i in range(6)}}, card, merged=False)
    with pytest.raises(CheckpointError, match="does not fit repmlpnet-t224"):
        load_network(digits_state, load_card("repmlpnet-t224"), merged=False)


def test_counters_may_be_absent(digits_state: State) -> None:
    bare = {key: value for key, value in digits_state.items() if "num_batches" not in key}
    load_network(bare, load_card("repmlp-digits"), merged=False)


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_a_card_is_found_by_architecture_and_layout(digits_state: State) -> None:
    about = {"family": "repmlpnet", "merged": False}
    found = infer_card(shapes(digits_state), layout="official", **about)
    assert (found.card.name, found.remark) == ("repmlp-digits", "recognised as repmlp-digits by its architecture")
    b224 = {k: tuple(v) for k, v in GoldenCase("repmlpnet-b224").about["state_dict"].items()}
    assert infer_card(b224, layout="official", **about).card.name == "repmlpnet-b224"
    assert infer_card(b224, layout="mmpretrain", **about).card.name == "repmlp-base_3rdparty_8xb64_in1k"


def test_a_fine_tuned_network_keeps_the_preprocessing_and_loses_the_labels(digits_state: State) -> None:
    tuned = shapes(digits_state) | {"head.weight": (3, 96), "head.bias": (3,)}
    found = infer_card(tuned, family="repmlpnet", layout="official", merged=False, name="my run 7")
    assert found.card.name == "my-run-7"
    assert found.card.preprocessing == load_card("repmlp-digits").preprocessing
    assert found.card.labels is None
    assert found.assumed == "repmlp-digits"
    assert "with other classes" in found.remark


def test_only_the_file_that_a_card_names_has_its_labels(digits_state: State) -> None:
    """Another file of that architecture may have been trained on anything."""
    about = {"family": "repmlpnet", "layout": "official", "merged": False}
    shipped = hash_file(data_root() / "weights" / "repmlp-digits.safetensors")
    own = infer_card(shapes(digits_state), sha256=shipped, **about)
    assert (own.assumed, own.card.labels) == ("", load_card("repmlp-digits").labels)
    other = infer_card(shapes(digits_state), sha256="0" * 64, **about)
    assert (other.assumed, other.card.labels) == ("repmlp-digits", None)


def test_a_key_that_every_network_has_is_named_when_it_lacks(digits_state: State) -> None:
    lacking = {key: value for key, value in shapes(digits_state).items() if key != "stages.1.0.repmlp_block.fc3.weight"}
    with pytest.raises(CheckpointError, match=r"has no key stages.1.0.repmlp_block.fc3.weight"):
        infer_card(lacking, family="repmlpnet", layout="official", merged=False)


def test_a_variance_of_zero_is_a_dead_channel(digits_state: State) -> None:
    """The trained network is finite: BatchNorm adds its eps."""
    dead = {**digits_state, "head_norm.running_var": digits_state["head_norm.running_var"] * 0}
    assert float(find_state_dict(dead).tensors["head_norm.running_var"].max()) == 0


def met_in_the_wild(state: State) -> dict[str, Any]:
    """Files of Lightning, mmengine, mmcv, timm, profilers and hand-written loops."""

    def under(prefix: str) -> State:
        return {prefix + key: value for key, value in state.items()}

    def wrapped_parts() -> State:
        return {key.replace("stages.0.0.", "stages.0.0._orig_mod."): value for key, value in state.items()}

    def averaged_by_mmcv() -> State:
        munged = {"ema_backbone_" + key.replace(".", "_"): value for key, value in state.items()}
        return {**state, **munged}

    return {
        "lightning": {"state_dict": {**under("model."), "criterion.weight": torch.ones(3)}, "epoch": 3},
        "lightning net": {"state_dict": under("net.module.")},
        "model_state_dict": {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
        "net": {"net": state, "acc": 93.1},
        "model_state": {"model_state": state},
        "weights": {"weights": state},
        "two levels": {"checkpoint": {"model": state}},
        "unknown name": {"student": state},
        "ema_model": {"ema_model": under("module.")},
        "compiled part": wrapped_parts(),
        "mmcv ema": {"state_dict": averaged_by_mmcv()},
        "profiled": {**state, "total_ops": torch.zeros(1), "stages.0.0.total_params": torch.zeros(1)},
    }


@pytest.mark.parametrize("kind", sorted(met_in_the_wild({"stages.0.0.x": torch.ones(1)})))
def test_a_state_dict_is_found_in_files_met_in_the_wild(kind: str, digits_state: State) -> None:
    found = find_state_dict(met_in_the_wild(digits_state)[kind])
    assert list(found.tensors) == list(digits_state)
    assert all(torch.equal(found.tensors[key], digits_state[key]) for key in digits_state)
    back = to_layout(found.tensors, found)
    again = find_state_dict(back)
    assert list(again.tensors) == list(digits_state)
    assert again.keys == found.keys


def test_what_is_left_out_is_said(digits_state: State) -> None:
    found = find_state_dict(met_in_the_wild(digits_state)["lightning"])
    assert found.notes == ("left out 1 keys that belong to no part of the network: criterion.weight",)


def test_weights_that_mmengine_averaged_are_used_and_named(digits_state: State) -> None:
    other = {"steps": torch.tensor(5)} | {f"module.{key}": value + 1 for key, value in digits_state.items()}
    content = {"meta": {"mmengine_version": "0.10.0"}, "state_dict": digits_state, "ema_state_dict": other}
    found = find_state_dict(content)
    assert found.container == "state_dict"
    assert "averaged" in found.notes[0]
    raw = find_state_dict(content, weights="model")
    assert raw.container == "ema_state_dict"
    assert torch.equal(raw.tensors["head.bias"], digits_state["head.bias"] + 1)
    assert raw.tensors.keys() == own_state_dict(content, digits_state.keys(), weights="model").tensors.keys()
    assert raw.tensors.keys() == digits_state.keys()
    counted = {"steps": torch.tensor(5), "module.w": torch.ones(1)}
    assert own_state_dict(counted, counted.keys()).tensors.keys() == counted.keys()


def test_the_state_dict_can_be_named(digits_state: State) -> None:
    other = {key: value + 1 for key, value in digits_state.items()}
    content = {"teacher": digits_state, "student": {"net": other}}
    found = find_state_dict(content, state_key="student.net")
    assert torch.equal(found.tensors["head.bias"], other["head.bias"])
    with pytest.raises(CheckpointError, match=r"no state dict under student; it has: student\.net, teacher"):
        find_state_dict(content, state_key="student")


def test_keys_can_be_ignored(digits_state: State) -> None:
    content = {**digits_state, "aux.weight": torch.ones(1), "aux.bias": torch.ones(1)}
    assert list(find_state_dict(content, ignore=["aux.*"]).tensors) == list(digits_state)
    with pytest.raises(InputError, match="--ignore nothing matches no key"):
        find_state_dict(content, ignore=["nothing"])


def test_two_keys_for_one_weight_are_refused(digits_state: State) -> None:
    with pytest.raises(CheckpointError, match=r"two keys for one weight: head\.bias and module\.head\.bias"):
        find_state_dict({**digits_state, "module.head.bias": digits_state["head.bias"]})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("model.", ""), ("net.model.", ""), ("", "backbone."), ("module.", ""), ("_orig_mod.module.", "")],
)
def test_one_prefix_makes_the_keys_of_an_own_network_fit(theirs: str, ours: str) -> None:
    keys = ["conv.weight", "bn.running_mean", "bn.num_batches_tracked"]
    content = {theirs + key: torch.ones(1) for key in keys}
    found = own_state_dict(content, {ours + key for key in keys})
    assert list(found.tensors) == [ours + key for key in keys]
    assert to_layout(found.tensors, found).keys() == content.keys()


def test_a_prefix_is_found_without_the_longest_key() -> None:
    expected = {"bn.weight", "bn.running_mean", "bn.num_batches_tracked", "conv.weight"}
    content = {f"backbone.{key}": torch.ones(1) for key in expected if "tracked" not in key}
    content |= {"head.conv.weight": torch.ones(1)}
    found = own_state_dict(content, expected)
    assert found.prefix == "backbone."
    assert found.tensors.keys() == expected - {"bn.num_batches_tracked"}
    assert found.notes == ("left out 1 keys that belong to no part of the network: head.conv.weight",)
    bare = {key.removeprefix("backbone."): value for key, value in content.items() if key.startswith("backbone.")}
    longer = {f"net.{key}" for key in expected}
    assert own_state_dict(bare, longer).tensors.keys() == longer - {"net.bn.num_batches_tracked"}


def _beside(state: State, first: str, second: str) -> dict[str, State]:
    """Return a file with the weights under one prefix, and others under another one."""
    others = {second + key: value + 1 for key, value in state.items()}
    return {"state_dict": {first + key: value for key, value in state.items()} | others}


@pytest.mark.parametrize("averaged", ["ema.", "ema_model.module.", "swa._orig_mod."])
@pytest.mark.parametrize("own", [False, True], ids=["family", "own"])
def test_averaged_weights_under_another_prefix_are_left_out(own: bool, averaged: str, digits_state: State) -> None:
    content = _beside(digits_state, "network.", averaged)
    found = own_state_dict(content, digits_state.keys()) if own else find_state_dict(content)
    assert found.prefix == "network."
    assert all(torch.equal(found.tensors[key], value) for key, value in digits_state.items())
    assert averaged.split(".", maxsplit=1)[0] in found.notes[0]


@pytest.mark.parametrize("own", [False, True], ids=["family", "own"])
@pytest.mark.parametrize(("student", "teacher"), [("student.", "teacher."), ("module.b.q.", "module.b._orig_mod.t.")])
def test_a_choice_between_two_prefixes_is_left_to_the_user(
    own: bool, student: str, teacher: str, digits_state: State
) -> None:
    content = _beside(digits_state, student, teacher)
    given = (content, digits_state.keys()) if own else (content,)
    read = own_state_dict if own else find_state_dict
    with pytest.raises(CheckpointError, match=r"has keys of 2 such networks, .* such as --ignore '") as refused:
        read(*given)
    pattern = str(refused.value).split("'")[1]
    assert pattern == f"{teacher}*"
    assert read(*given, ignore=[pattern]).keys["head.bias"] == f"{student}head.bias"


def test_an_own_part_called_module_keeps_its_name() -> None:
    content = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert own_state_dict(content, content.keys()).tensors.keys() == content.keys()


def test_a_mask_of_an_own_network_may_be_infinite_and_weights_may_not() -> None:
    content = {"mask": torch.tensor([0.0, -torch.inf]), "head.weight": torch.ones(1)}
    assert torch.equal(own_state_dict(content, content.keys()).tensors["mask"], content["mask"])
    for key, value in (("mask", torch.nan), ("head.weight", torch.inf)):
        with pytest.raises(CheckpointError, match=f"{key} has 1 values that are NaN or infinite"):
            own_state_dict(content | {key: torch.tensor([value])}, content.keys())


def test_weights_beside_those_of_a_network_are_left_out_by_their_key(digits_state: State) -> None:
    content = {**digits_state, "ema": {key: value + 1 for key, value in digits_state.items()}}
    for read in (own_state_dict, find_state_dict):
        given = (content, digits_state.keys()) if read is own_state_dict else (content,)
        assert torch.equal(read(*given, ignore=["ema"]).tensors["head.bias"], digits_state["head.bias"])
    with pytest.raises(CheckpointError, match="ema is a dict; expected a tensor: leave it out with --ignore ema"):
        own_state_dict(content, digits_state.keys())
