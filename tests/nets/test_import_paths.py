"""Import paths of public classes that users subclass keep working after their modules moved."""

from __future__ import annotations

import importlib

import pytest
from torch import nn


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("repmlp_deploy.nets.repmlp", "RepMLP"),
        ("repmlp_deploy.nets.repmlpnet", "RepMLPNet"),
        ("repmlp_deploy.nets.repmlpnet", "RepMLPBackbone"),
        ("repmlp_deploy.nets.repmlp_resnet", "RepMLPResNet"),
        ("repmlp_deploy.nets.pure_mlp", "PureMLP"),
        ("repmlp_deploy.nets.pspnet", "PSPNet"),
        ("repmlp_deploy.nets.mobilefacenet", "MobileFaceNet"),
        *[
            ("repmlp_deploy.nets.blocks", name)
            for name in ("ConvBN", "FFN", "GlobalPerceptron", "MergeableConvBN", "RepMLP", "RepMLPBlock", "RepMLPUnit")
        ],
    ],
)
def test_an_earlier_import_path_gives_the_class_itself(path: str, name: str) -> None:
    found = getattr(importlib.import_module(path), name)
    assert issubclass(found, nn.Module)
    assert getattr(importlib.import_module(found.__module__), name) is found
