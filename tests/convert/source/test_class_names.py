"""Class names are found where training code leaves them, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from repmlp_deploy.convert.source.checkpoint import Placeholder
from repmlp_deploy.convert.source.class_names import find_class_names

NAMES = ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}, "meta": {"dataset_meta": {"classes": NAMES, "palette": [[1, 2, 3]]}}},
        {"state_dict": {}, "meta": {"CLASSES": list(NAMES)}},
        {"model": {}, "classes": list(NAMES)},
        {"model": {}, "args": Placeholder("argparse.Namespace", {"class_names": list(NAMES), "lr": 0.1})},
        {"model": {}, "class_to_idx": {"owl": 2, "cat": 0, "dog": 1}},
        {"model": {}, "config": {"id2label": {"0": "cat", "1": "dog", "2": "owl"}}},
        {"model": {}, "idx_to_class": {0: "cat", 1: "dog", 2: "owl"}},
    ],
)
def test_names_are_found(content: Any) -> None:
    assert find_class_names(content) == NAMES


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"classes": 3},
        {"classes": ["cat", 1]},
        {"classes": []},
        {"class_to_idx": {"cat": 0, "dog": 2}},
        {"class_to_idx": {"cat": 0, "dog": 0}},
        {"class_to_idx": {"cat": True, "dog": 0}},
        {"classes": ["x" * 1000]},
        {"labels": {"9" * 5000: "cat"}},
    ],
)
def test_other_things_of_such_a_name_are_not(content: Any) -> None:
    assert find_class_names(content) is None
