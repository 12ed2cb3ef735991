"""What an accuracy is made of, and which networks can have one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.target.accuracy import Score, require_one_class_per_image, served_run
from repmlp_deploy.errors import InputError


@pytest.fixture(scope="module")
def bundle(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that is made quickly: only its manifest counts here."""
    return export(digits_checkpoint, formats="checkpoint", out=tmp_path_factory.mktemp("made") / "out")


def test_a_drop_is_in_points_of_the_images() -> None:
    trained = Score(449, 450)
    assert Score(440, 450).drop_from(trained) == 2.0
    assert Score(450, 450).drop_from(trained) < 0


def test_a_batch_below_the_smallest_is_filled_and_its_answers_are_cut() -> None:
    sizes = []

    def run(batch: np.ndarray) -> list[np.ndarray]:
        sizes.append(len(batch))
        return [batch * 2, batch]

    outputs = served_run(run, BatchRange(min=4, opt=4, max=8))
    values = np.arange(3.0)[:, None]
    assert np.array_equal(outputs(values), values * 2)
    assert np.array_equal(outputs(np.ones((6, 1))), np.full((6, 1), 2.0))
    assert sizes == [4, 6]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "segment"}, "--max-drop measures the top-1 of networks that classify; .* has task segment"),
        ({"scores": "multi-label"}, "--max-drop measures one label per image; .* gives several"),
        ({"inputs": 2}, "--max-drop is for networks with one input; .* takes images, images"),
    ],
)
def test_other_networks_are_refused(bundle: Bundle, changed: dict[str, object], message: str) -> None:
    manifest = bundle.manifest
    require_one_class_per_image(manifest)
    if "inputs" in changed:
        changed = {"inputs": manifest.inputs * 2}
    with pytest.raises(InputError, match=message):
        require_one_class_per_image(manifest.model_copy(update=changed))
