"""Train a network that ships as `models/weights/<card>.safetensors`, on scikit-learn's digits.

    .venv/bin/python tools/train_digits.py
    OMP_NUM_THREADS=1 .venv/bin/python tools/train_digits.py --card pure-mlp-digits

Everything is seeded: split, weights, order and augmentation. The held-out quarter is never trained on, and nothing is
chosen by it: the last epoch is what ships. Takes two to five minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.nets.families import build_network
from repmlp_deploy.runtime.images import preprocess

SEED = 0
EPOCHS = 60
BATCH = 64
SAMPLES_A_DIGIT = 1


def digit_images() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Scikit-learn's 1797 scans as 8×8 grey images, and their labels."""
    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in levels], digits.target.astype(np.int64)


def split_indices(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices of the training three quarters and of the held-out quarter, stratified, fixed by the seed."""
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=SEED, stratify=labels)
    return train, held_out


def augmented(batch: Tensor, background: float) -> Tensor:
    """Every image shifted by up to 3 pixels each way and scaled in contrast by up to a fifth."""
    padded = F.pad(batch, (3, 3, 3, 3), value=background)
    shifts = torch.randint(0, 7, (len(batch), 2)).tolist()
    shifted = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, shifts, strict=True)])
    contrast = 0.8 + 0.4 * torch.rand(len(batch), 1, 1, 1)
    return (shifted - background) * contrast + background


def train(network: nn.Module, inputs: Tensor, labels: Tensor, background: float) -> None:
    """Train in place: AdamW, one cycle of the learning rate, label smoothing."""
    steps = EPOCHS * -(-len(inputs) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            logits = network(augmented(inputs[chosen], background))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(inputs):.4f}", end="\r")
    print()
    network.eval()


def save_samples(images: list[Image.Image], labels: NDArray[np.int64], held_out: NDArray[np.int64], out: Path) -> None:
    """One held-out scan of every digit as a PNG, the first of each: `<digit>-<index>.png`."""
    out.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        for index in [i for i in sorted(held_out) if labels[i] == digit][:SAMPLES_A_DIGIT]:
            images[index].save(out / f"{digit}-{index:04d}.png", optimize=True)


def main() -> None:
    """Train, report the held-out accuracy, write weights and samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="repmlp-digits")
    parser.add_argument("--out", type=Path, help="default: models/weights/<card>.safetensors")
    parser.add_argument("--samples", type=Path, default=data_root() / "samples" / "digits")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    card = load_card(arguments.card)
    images, labels = digit_images()
    inputs = torch.from_numpy(np.stack([preprocess(image.convert("RGB"), card.preprocessing) for image in images]))
    targets = torch.from_numpy(labels)
    training, held_out = split_indices(labels)

    network = build_network(card)
    background = -card.preprocessing.mean[0] / card.preprocessing.std[0]
    train(network, inputs[training], targets[training], background)
    with torch.no_grad():
        right = network(inputs[held_out]).argmax(1) == targets[held_out]
    print(f"held out: {right.sum().item()} of {len(held_out)} right, {100 * right.float().mean().item():.2f} %")

    out = arguments.out or data_root() / "weights" / f"{card.name}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: value.contiguous() for key, value in network.state_dict().items()}, out)
    save_samples(images, labels, held_out, arguments.samples)


if __name__ == "__main__":
    main()
