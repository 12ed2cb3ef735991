"""Fixtures: the good files that hostile ones are made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hostile.case import Kit
from repmlp_deploy.card import data_root
from support.warm_process import WarmProcess


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    checkpoint = data_root() / "weights" / "repmlp-digits.safetensors"
    done = warm.run(
        *("export", "--ckpt", checkpoint, "--format", "onnx,openvino", "--batch", "1:4:16", "--out", folder / "digits"),
        folder=folder,
    )
    assert done.code == 0, done.err
    image = next((data_root() / "samples" / "digits").glob("3-*.png"))
    return Kit(checkpoint, folder / "digits", image)


@pytest.fixture(scope="session")
def earlier(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that stands where results would go."""
    return Path(shutil.copytree(kit.bundle, tmp_path_factory.mktemp("earlier") / "bundle"))
