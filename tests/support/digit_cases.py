"""Scikit-learn's digits as networks take them, and exports calibrated with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from repmlp_deploy import Bundle, export
from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.images import preprocess
from train_digits import digit_images, split_indices


def scans(card: str, count: int | None = None, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, 3, 32, 32) and labels of scikit-learn's digits, of the training part or of the rest."""
    images, labels = digit_images()
    chosen = split_indices(labels)[held_out][:count]
    how = load_card(card).preprocessing
    return np.stack([preprocess(images[i].convert("RGB"), how) for i in chosen]), labels[chosen]


def exported(card: str, out: Path, precision: str, **options: object) -> Bundle:
    if PRECISIONS[precision].needs_calibration:
        options.setdefault("calibration", {"images": scans(card, 128, held_out=False)[0]})
    checkpoint = data_root() / "weights" / f"{card}.safetensors"
    return export(checkpoint, precision=precision, out=out, **options)
