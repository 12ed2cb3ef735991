"""The benchmark of a network of timm: trained, merged by timm itself, and merged by structure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repmlp_deploy.bench import session
from repmlp_deploy.bench.session import run_benchmark
from repmlp_deploy.bench.settings import Settings, read_settings
from repmlp_deploy.bench.subjects.pytorch import FORMS, upstream_merge
from repmlp_deploy.convert.source.trained import SourceRequest, load_own
from repmlp_deploy.errors import InputError
from support.standins import STANDINS
from support.timm_networks import STANDIN, trained_timm

MODEL = "timm:repvgg_a0,num_classes=10"


def test_a_model_needs_its_checkpoint() -> None:
    with pytest.raises(InputError, match="--model says what the checkpoint of --ckpt is for"):
        read_settings(None, {"model": MODEL})


def test_only_the_merged_graph_of_another_package_is_merged_by_it() -> None:
    assert upstream_merge(None, "merged") == "auto"
    assert upstream_merge(MODEL, "merged") == "hooks"
    assert upstream_merge(MODEL, "folded") == "auto"


def test_rows_of_pytorch_are_trained_and_merged_by_the_package_itself() -> None:
    network = STANDINS["repvgg"]()
    loaded = load_own(network, SourceRequest(example_input=network.example_input))
    trained = replace(loaded, model="timm:a_network_with_hooks")
    for name, norms in (("torch-trained", 13), ("torch-merged", 0)):
        modules = FORMS[name](trained).modules()
        assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in modules) == norms


@pytest.mark.slow
def test_rows_are_proved_and_measured_or_say_that_timm_has_no_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session._Session, "_measure_peaks", lambda _self: None)
    monkeypatch.setenv("PYTHONPATH", str(STANDIN), prepend=":")  # children load timm too
    torch.save(trained_timm("test_byobnet").state_dict(), tmp_path / "x.pth")
    rows = ("torch-trained", "torch-merged", "onnx")
    settings = Settings(
        ckpt=tmp_path / "x.pth",
        model="timm:test_byobnet",
        formats=rows,
        precision=("fp32",),
        baseline="onnx",
        seconds=0.1,
        threads=1,
    )
    trained, merged, ours = run_benchmark(settings, lambda _step: None).rows
    for row in (trained, ours):
        assert row.status == "measured", row.reason
        assert row.error.max_abs <= row.error.allowed
    assert merged.status != "measured"
    assert "has no module with fuse" in merged.reason
