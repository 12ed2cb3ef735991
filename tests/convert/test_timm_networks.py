"""Networks of timm all the way: one that was really trained in int8, and one merged by its own hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.convert.rework.derive import derive_again
from repmlp_deploy.convert.rework.refit import refit_bundle
from repmlp_deploy.errors import InputError, VerificationError
from support.timm_networks import trained_timm

TRAINED = "test_byobnet"
HOOKED = "timm:repvgg_a0,num_classes=10"


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (N, 3, 32, 32) in the range of normalised photographs, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return nn.functional.interpolate(images, (32, 32)).expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


@pytest.fixture(scope="module")
def network(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network after eight epochs on 1,500 digits."""
    import timm

    images, classes = digits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slower on a busy machine
    torch.manual_seed(0)
    made = timm.create_model(TRAINED, num_classes=10)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=240)
    for _ in range(8):
        for rows in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(images[rows]), classes[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return made.eval()


def _accuracy(folder: Path, images: Tensor, classes: Tensor, **options: object) -> float:
    with Predictor(folder, **options) as predictor:
        predicted = predictor.logits(images.numpy()).argmax(axis=1)
    return float((predicted == classes.numpy()).mean())


@pytest.mark.slow
def test_int8_of_a_trained_network_is_certified_and_predicts(
    digits: tuple[Tensor, Tensor], network: nn.Module, tmp_path: Path
) -> None:
    images, classes = digits
    with torch.no_grad():
        trained = float((network(images[1500:]).argmax(1) == classes[1500:]).float().mean())
    assert trained > 0.9
    torch.save({"state_dict": network.state_dict(), "arch": TRAINED}, tmp_path / "x.pth")
    bundle = export(
        tmp_path / "x.pth",
        model=f"timm:{TRAINED},num_classes=10",
        input_size=(32, 32),
        batch="1:16:16",
        formats="onnx,openvino",
        precision="int8",
        calibration={"x": images[:64].numpy()},
        out=tmp_path / "int8",
    )
    assert bundle.manifest.verdict.passed
    for name in ("onnx", "openvino"):
        assert bundle.artifact(name).precision == "int8"
        assert _accuracy(tmp_path / "int8", images[1500:], classes[1500:], format=name) > trained - 0.03


@pytest.mark.slow
def test_a_network_merged_by_its_own_hooks_is_built_predicted_and_derived_again(tmp_path: Path) -> None:
    network, checkpoint = trained_timm("repvgg_a0", num_classes=10), tmp_path / "x.pth"
    torch.save(network.state_dict(), checkpoint)
    folder = tmp_path / "bundle"
    bundle = export(
        checkpoint, model=HOOKED, merge="hooks", input_size=(32, 32), batch="1:2:8", formats="onnx,trt-rtx", out=folder
    )
    assert len(bundle.read(bundle.artifact("trt-rtx"))) > 1_000_000
    hops, _ = derive_again(Bundle.load(folder), checkpoint)
    assert "onnx weights" in {hop.name for hop in hops}
    assert all(hop.passed is not False for hop in hops)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Predictor(folder, format="onnx", check=True) as predictor, torch.no_grad():
        logits = network(images).numpy()
        np.testing.assert_allclose(predictor.logits(images.numpy()), logits, atol=1e-4 * np.abs(logits).max())
    with pytest.raises(InputError, match="no family's network, whose checkpoints could be told apart: export it"):
        refit_bundle(folder, checkpoint)
    torch.save(trained_timm("repvgg_a0", num_classes=10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(VerificationError, match="give that file"):
        derive_again(Bundle.load(folder), tmp_path / "other.pth")
