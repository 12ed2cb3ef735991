"""What `repmlp-map` writes for tasks that do not name a class, and for bundles that take levels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.errors import InputError
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.sources import open_source
from support.bundles import FACES, PARTS, bundle_of_graph

SIZES = ((90, 70), (32, 32), (41, 97))
HOW = Preprocessing(resize=Resize(mode="exact", size=(32, 32)), mean=(120, 115, 100), std=(60, 57, 55))
LEVELS = HOW.model_copy(update={"input": "uint8"})

# (N, 32, 32, 3) levels -> the means of red and blue
COLOURS = FACES.replace("faces (", "colours (").replace("embedding", "logits")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three pictures, and a file that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


def mapped(bundle: Bundle, images: Path, out: Path) -> tuple[list[dict[str, object]], list[object]]:
    """Return the rows of all pictures, and what `Predictor` returns for them."""
    with Predictor(bundle, format="onnx") as predictor:
        found = map_images(predictor, open_source(str(images)), out)
        expected = predictor(sorted(images.iterdir())[: len(SIZES)])
    assert (found.count, found.errors) == (len(SIZES) + 1, 1)
    *rows, broken = pq.read_table(out).to_pylist()
    assert "not a readable image" in broken["error"]
    assert all(broken[name] is None for name in broken if name not in {"row", "key", "bundle", "error"})
    return rows, expected


def decoded(png: object) -> NDArray[np.uint8]:
    assert isinstance(png, bytes)
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_segmenter_writes_masks_of_the_size_of_the_images(images: Path, tmp_path: Path):
    bundle = bundle_of_graph(PARTS, tmp_path / "parts", task="segment", how=HOW)
    rows, expected = mapped(bundle, images, tmp_path / "out.parquet")
    for row, answer, size in zip(rows, expected, SIZES, strict=True):
        mask = decoded(row["mask"])
        assert mask.shape == size
        assert np.array_equal(mask, answer.mask)
        assert len(np.unique(mask)) == 2


def test_an_embedder_of_levels_writes_vectors_of_length_1(images: Path, tmp_path: Path):
    bundle = bundle_of_graph(FACES, tmp_path / "faces", task="embed", how=LEVELS)
    rows, expected = mapped(bundle, images, tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").field("embedding").type == pa.list_(pa.float32())
    for row, answer in zip(rows, expected, strict=True):
        assert np.linalg.norm(row["embedding"]) == pytest.approx(1, rel=1e-6)
        np.testing.assert_array_equal(np.float32(row["embedding"]), answer.vector)


def test_a_classifier_of_levels_names_the_classes_of_predictor(images: Path, tmp_path: Path):
    bundle = bundle_of_graph(COLOURS, tmp_path / "colours", task="classify", how=LEVELS)
    rows, expected = mapped(bundle, images, tmp_path / "out.parquet")
    for row, answer in zip(rows, expected, strict=True):
        assert (row["index"], row["label"]) == (answer.pred_label, None)
        assert row["score"] == pytest.approx(answer.pred_score, rel=1e-6)


def test_a_task_without_answers_is_refused(images: Path, tmp_path: Path):
    bundle = bundle_of_graph(PARTS, tmp_path / "maps", task="features", how=HOW)
    with (
        Predictor(bundle, format="onnx") as predictor,
        pytest.raises(InputError, match="repmlp-map knows classify, segment, embed"),
    ):
        map_images(predictor, open_source(str(images)), tmp_path / "out.parquet")
