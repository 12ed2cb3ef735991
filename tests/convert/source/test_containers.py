from typing import Any

import pytest
import torch

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


def test_a_path_that_is_none_is_refused_with_those_there_are() -> None:
    content = {"state_dict": STATE, "best_acc1": BEST}
    with pytest.raises(CheckpointError, match=r"no state dict under model; it has: state_dict$"):
        select_weights(content, None, "x.pth", "model")


def test_weights_are_named_in_one_way() -> None:
    content = {"model": STATE, "ema": AVERAGED}
    with pytest.raises(InputError, match="--weights ema and --state-key model both say which weights to read: drop"):
        select_weights(content, "ema", "x.pth", "model")
