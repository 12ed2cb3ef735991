"""`Predictor` in an event loop: calls share batches, and answers are those of the ordinary calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.card import data_root
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.runtime.predictor import Predictor


@pytest.fixture
def predictor(bundle: Bundle) -> Iterator[Predictor]:
    with Predictor(bundle, format="onnx") as made:
        yield made


@pytest.fixture
def sizes(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that the network ran."""
    runner, ran = predictor._served.runner, []
    right = runner.run_all

    def run_all(*inputs: np.ndarray) -> list[Any]:
        ran.append(len(inputs[0]))
        return right(*inputs)

    monkeypatch.setattr(runner, "run_all", run_all)
    return ran


def test_images_are_answered_in_batches(predictor: Predictor, sizes: list[int]) -> None:
    files = sorted((data_root() / "samples" / "digits").glob("*.png")) * 10

    async def ask() -> list[Any]:
        return await asyncio.gather(*(predictor.predict_async(path) for path in files))

    answers = asyncio.run(ask())
    assert sum(sizes) == len(files)
    assert len(sizes) < len(files)
    expected = predictor(list(files))
    assert [a.pred_label for a in answers] == [e.pred_label for e in expected]
    np.testing.assert_allclose([a.pred_score for a in answers], [e.pred_score for e in expected], rtol=1e-5)


def test_batches_keep_their_rows(predictor: Predictor) -> None:
    batches = [np.random.default_rng(i).normal(size=(1 + i % 3, 3, 32, 32)).astype(np.float32) for i in range(40)]

    async def ask() -> list[np.ndarray]:
        return await asyncio.gather(*(predictor.logits_async(batch) for batch in batches))

    for batch, logits in zip(batches, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(logits, predictor.logits(batch), atol=1e-5)
        assert logits.base is None


def test_wrong_calls_and_closed_predictors_say_so(predictor: Predictor) -> None:
    with pytest.raises(ImageError):
        asyncio.run(predictor.predict_async(b"no image"))
    with pytest.raises(InputError, match="takes"):
        asyncio.run(predictor.logits_async(np.zeros((1, 3, 8, 8), np.float32)))
    asyncio.run(predictor.logits_async(np.zeros((1, 3, 32, 32), np.float32)))
    predictor.close()
    with pytest.raises(InputError, match="is closed"):
        asyncio.run(predictor.logits_async(np.zeros((1, 3, 32, 32), np.float32)))
    with pytest.raises(InputError, match="is closed"):
        predictor.warm_up()


def test_reloading_meanwhile_loses_nothing(predictor: Predictor, bundle_folder: Path) -> None:
    batch = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    expected = predictor.logits(batch)

    async def ask() -> list[np.ndarray]:
        async def many() -> list[np.ndarray]:
            return [await predictor.logits_async(batch) for _ in range(50)]

        found = await asyncio.gather(*(many() for _ in range(4)), asyncio.to_thread(predictor.reload, bundle_folder))
        return [logits for rows in found[:4] for logits in rows]

    for logits in asyncio.run(ask()):
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_warming_up_runs_every_size_that_needs_memory(
    predictor: Predictor, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.warm_up()
    assert sizes == [1, 4]
    monkeypatch.setattr(predictor._served.runner, "device", "cuda")
    predictor.warm_up()
    assert sizes == [1, 4, 1, 4, 16]
