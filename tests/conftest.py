"""Fixtures: the digits network, its bundles, and small networks with BatchNorms far from the identity."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.card import data_root
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from support.exporter import keep_functions
from support.extras import is_missing, reason_to_skip
from support.warm_process import WarmProcess

if TYPE_CHECKING:  # an environment may have neither PyTorch nor ONNX: the fixtures import what they need
    import torch

    from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that imports an extra skips with the reason where this is not installed."""
    report = yield
    call: pytest.CallInfo[object] | None = getattr(report, "call", None)
    reason = reason_to_skip(call.excinfo.value) if report.failed and call and call.excinfo else None
    if reason is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that needs an extra skips with the reason where this is not installed."""
    report = yield
    reason = reason_to_skip(call.excinfo.value) if report.failed and call.excinfo else None
    if reason is not None:
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that two processes end together; without a GPU its tests skip."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if find_gpus():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def pytest_runtest_setup() -> None:
    """From the first test after an export, exports are cheaper."""
    keep_functions()


@pytest.fixture
def small_network() -> RepMLPNet:
    import torch

    from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec
    from support.networks import randomize

    torch.manual_seed(0)
    spec = RepMLPNetSpec(input_size=(16, 24), channels=(8, 16), depths=(1, 2), sharesets=(2, 4), classes=7)
    return randomize(RepMLPNet(spec))


@pytest.fixture(scope="session")
def digits_checkpoint() -> Path:
    return data_root() / "weights" / "repmlp-digits.safetensors"


@pytest.fixture(scope="session")
def digits_state(digits_checkpoint: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(digits_checkpoint)


@pytest.fixture(scope="session")
def _exported(tmp_path_factory: pytest.TempPathFactory, digits_checkpoint: Path) -> Path:
    from repmlp_deploy import export

    out = tmp_path_factory.mktemp("exported") / "digits"
    formats = ["onnx", "torch", "checkpoint", *([] if is_missing("tensorrt_rtx") else ["trt-rtx"])]
    export(digits_checkpoint, formats=formats, batch="1:4:16", out=out)
    return out


@pytest.fixture
def bundle_folder(_exported: Path, tmp_path: Path) -> Path:
    """A bundle of the digits network in every format, for this test alone."""
    return Path(shutil.copytree(_exported, tmp_path / "bundle"))


@pytest.fixture
def bundle(_exported: Path) -> Bundle:
    """The same bundle, shared: not to be changed."""
    return Bundle.load(_exported)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """What runs commands in a fraction of the time, in a home folder that was empty when it started."""
    with WarmProcess(tmp_path_factory.mktemp("home")) as process:
        yield process
