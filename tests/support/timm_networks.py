"""timm beside any build of PyTorch: a stand-in for torchvision is importable while timm is imported, and gone after."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from repmlp_deploy.convert.proof.algebra import redraw_statistics
from support.networks import randomize

STANDIN = Path(__file__).with_name("torchvision_standin")


def _import_timm() -> None:
    if "timm" in sys.modules:
        return
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
    sys.path.insert(0, str(STANDIN))
    try:
        import timm  # noqa: F401
    finally:
        sys.path.remove(str(STANDIN))
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(before)


_import_timm()


def trained_timm(name: str, **arguments: object) -> nn.Module:
    """Return a network of timm in evaluation mode, with BatchNorms far from the identity."""
    import timm

    torch.manual_seed(0)
    return randomize(timm.create_model(name, pretrained=False, **arguments))


def redrawn_timm(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Return a network in float64 with every BatchNorm redrawn around what reaches it, and two square inputs."""
    import timm

    torch.manual_seed(0)
    given = {"img_size": size} if name.startswith(("levit", "efficientvit_m")) else {}
    network = timm.create_model(name, pretrained=False, exportable=True, **given)
    network = network.eval().double().requires_grad_(requires_grad=False)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    redraw_statistics(network, [x[:1].numpy()])
    return network, x
