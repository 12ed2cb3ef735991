"""The weights that ship were measured: on scans that their training never saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repmlp_deploy import get_model
from repmlp_deploy.runtime.images import preprocess
from train_digits import digit_images, split_indices


@pytest.mark.parametrize(("name", "right"), [("pure-mlp-digits", 446)])
def test_the_held_out_accuracy_is_what_the_card_says(name: str, right: int) -> None:
    network = get_model(name, pretrained=True)
    images, labels = digit_images()
    _, held_out = split_indices(labels)
    batch = np.stack([preprocess(images[i].convert("RGB"), network.card.preprocessing) for i in held_out])
    with torch.no_grad():
        found = network(torch.from_numpy(batch)).argmax(1).numpy()
    assert len(held_out) == 450
    assert (found == labels[held_out]).sum() == right
    assert f"{right} of 450" in network.card.description
    network.switch_to_deploy()
    with torch.no_grad():
        assert (network(torch.from_numpy(batch)).argmax(1).numpy() == found).all()
