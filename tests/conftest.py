"""Fixtures: the digits network, its bundles, and small networks with BatchNorms far from the identity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from repmlp_deploy import Bundle, export
from repmlp_deploy.card import data_root
from repmlp_deploy.convert.formats.tensorrt.driver import find_gpus
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec
from support.networks import randomize


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a GPU skips with the reason where there is none."""
    if find_gpus():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture
def small_network() -> RepMLPNet:
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
    out = tmp_path_factory.mktemp("exported") / "digits"
    export(digits_checkpoint, formats="onnx,torch,checkpoint,trt-rtx", batch="1:4:16", out=out)
    return out


@pytest.fixture
def bundle_folder(_exported: Path, tmp_path: Path) -> Path:
    """A bundle of the digits network in every format, for this test alone."""
    return Path(shutil.copytree(_exported, tmp_path / "bundle"))


@pytest.fixture
def bundle(_exported: Path) -> Bundle:
    """The same bundle, shared: not to be changed."""
    return Bundle.load(_exported)
