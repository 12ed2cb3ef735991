from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from repmlp_deploy.convert.source.containers import select_weights
from repmlp_deploy.errors import CheckpointError, InputError

STATE = {"conv.weight": torch.ones(2), "conv.bias": torch.ones(1)}
AVERAGED = {key: value + 1 for key, value in STATE.items()}
BEST = torch.tensor([76.1])


@pytest.mark.parametrize(
    ("content", "path", "others"),
    [
        ({"epoch": 3, "arch": "x", "state_dict": STATE, "best_acc1": BEST, "optimizer": {}}, "state_dict", ()),
        ({"state_dict": {"conv.weight": BEST}, "best_acc1": BEST}, "state_dict", ("its top level",)),
        ({"checkpoint": {"step": BEST, "net": STATE}}, "checkpoint.net", ()),
        ({"best_acc1": BEST, "student": STATE}, "student", ()),
        ({**STATE, "conv._extra_state": {"scale": BEST}}, "", ("conv._extra_state",)),
        ({**STATE, "ema": AVERAGED}, "", ("ema",)),
    ],
)
def test_tensors_beside_a_state_dict_are_none(content: dict[str, Any], path: str, others: tuple[str, ...]) -> None:
    selected = select_weights(content, None, "x.pth")
    assert (selected.path, selected.others) == (path, others)
    assert select_weights(content, None, "x.pth", path).found is selected.found


def test_averaged_weights_lie_beside_the_others() -> None:
    assert select_weights({**STATE, "ema": AVERAGED}, "ema", "x.pth").found is AVERAGED
    assert select_weights({"best": BEST, "model": STATE, "ema": AVERAGED}, "ema", "x.pth").found is AVERAGED


@pytest.mark.parametrize("nest", [False, True])
def test_an_averaged_model_beside_a_network_hides_none_of_its_weights(nest: bool) -> None:
    """An AveragedModel has one tensor more than its network, the count of averages."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    averaged = AveragedModel(network).state_dict()
    assert len(averaged) > len(network.state_dict())
    content: dict[str, Any] = {**network.state_dict(), "ema": averaged}
    path, around = ("", "") if not nest else ("checkpoint", "checkpoint.")
    content = {"checkpoint": content, "step": torch.tensor(3)} if nest else content
    selected = select_weights(content, None, "x.pth")
    assert (selected.path, selected.others, selected.notes) == (path, (f"{around}ema",), ())
    assert select_weights(content, "ema", "x.pth").found is averaged


def test_numbers_are_no_weights_if_there_are_others() -> None:
    numbers = {"best": torch.tensor(76.1), "decay": torch.tensor([0.9])}
    assert select_weights({"metrics": numbers, "student": STATE}, None, "x.pth").path == "student"
    assert select_weights({"metrics": numbers, "ema": AVERAGED}, None, "x.pth").path == "ema"
    assert select_weights({"metrics": numbers, "ema": AVERAGED}, None, "x.pth", "metrics").found is numbers
    assert select_weights({"net": {"scale": torch.tensor(2.0)}}, None, "x.pth").path == "net"


def test_averaged_weights_that_are_the_only_ones_are_used_with_a_note() -> None:
    content = {"epoch": 3, "model_ema": AVERAGED}
    said = "x.pth holds no other weights than the averaged (EMA) ones under model_ema: these are used"
    assert select_weights(content, None, "x.pth").notes == (said,)
    assert select_weights(content, "ema", "x.pth").notes == ()


def test_mmengine_without_the_weights_of_its_state_dict_gives_the_others() -> None:
    content = {"meta": {"mmengine_version": "0.10"}, "state_dict": {}, "ema_state_dict": STATE}
    assert select_weights(content, None, "x.pth").path == "ema_state_dict"


def test_a_path_that_is_none_is_refused_with_those_there_are() -> None:
    content = {"state_dict": STATE, "best_acc1": BEST}
    with pytest.raises(CheckpointError, match=r"no state dict under model; it has: state_dict$"):
        select_weights(content, None, "x.pth", "model")


def test_weights_are_named_in_one_way() -> None:
    content = {"model": STATE, "ema": AVERAGED}
    with pytest.raises(InputError, match="--weights ema and --state-key model both say which weights to read: drop"):
        select_weights(content, "ema", "x.pth", "model")


def test_a_choice_between_two_of_the_same_weights_is_left_to_the_user() -> None:
    content = {"teacher": STATE, "student": dict(STATE), "ema_student": AVERAGED}
    with pytest.raises(CheckpointError, match="under teacher and student: say which with --state-key"):
        select_weights(content, None, "x.pth")
    assert select_weights(content, None, "x.pth", "student").path == "student"
    assert select_weights(content, "ema", "x.pth").path == "ema_student"
    assert select_weights({"best": STATE, "state_dict": STATE}, None, "x.pth").path == "state_dict"
    assert select_weights({"best": STATE, "other": {"w": torch.ones(9)}}, None, "x.pth").path == "best"


@pytest.mark.parametrize("path", ["student", "student.model"])
def test_wrappers_and_names_inside_do_not_decide_between_two(path: str) -> None:
    inner = {"student": {f"module.{key}": value for key, value in STATE.items()}, "teacher": STATE}
    content = {name: {"model": state} if "." in path else state for name, state in inner.items()}
    with pytest.raises(CheckpointError, match=f"under {path} and .*: say which with --state-key"):
        select_weights(content, None, "x.pth")
    assert select_weights(content, None, "x.pth", path).found is inner["student"]
