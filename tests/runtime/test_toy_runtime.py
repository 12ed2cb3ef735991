"""A new runtime costs a module and an entry: it is then found, named, run and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.runner import RUNNERS, Entry


@pytest.fixture
def listed() -> Iterator[None]:
    RUNNERS["checkpoint"] = Entry("support.toy_runtime:ToyRunner", ("table",))
    yield
    del RUNNERS["checkpoint"]


@pytest.mark.usefixtures("listed")
def test_a_listed_runtime_runs_and_is_checked(bundle_folder: Path) -> None:
    probe = Bundle.load(bundle_folder).probe()
    with Predictor(bundle_folder, format="checkpoint") as predictor:
        assert (predictor.format, predictor.device) == ("checkpoint", "table")
        assert np.array_equal(predictor.logits(probe.inputs), probe.float32)
        predictor.self_check()
    hops, _ = recertify(Bundle.load(bundle_folder), "checkpoint")
    assert [hop.passed for hop in hops if hop.name == "checkpoint on table"] == [True] * 3


@pytest.mark.usefixtures("listed")
def test_its_devices_are_known(bundle_folder: Path) -> None:
    with Predictor(bundle_folder, device="table") as predictor:
        assert predictor.format == "checkpoint"


def test_without_the_entry_the_format_cannot_be_run(bundle_folder: Path) -> None:
    with pytest.raises(InputError, match="cannot run checkpoint"):
        Predictor(bundle_folder, format="checkpoint")
