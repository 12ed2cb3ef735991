"""Large batches on a CPU are run by slices, and nobody can tell from the answers."""

from __future__ import annotations

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.runtime.choice import open_runner
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.slices import run_by_slices, slice_sizes


@pytest.mark.parametrize(
    ("samples", "batch", "sizes"),
    [
        (5, (1, 8, 64), (5,)),
        (8, (1, 8, 64), (8,)),
        (64, (1, 8, 64), (8,) * 8),
        (19, (1, 8, 64), (8, 8, 3)),
        (19, (4, 8, 64), (8, 11)),
        (19, (4, 8, 10), (19,)),
        (3, (3, 3, 3), (3,)),
    ],
)
def test_the_best_size_is_run_as_often_as_it_fits(
    samples: int, batch: tuple[int, int, int], sizes: tuple[int, ...]
) -> None:
    found = slice_sizes(samples, BatchRange(min=batch[0], opt=batch[1], max=batch[2]))
    assert found == sizes
    assert sum(found) == samples


@pytest.mark.parametrize("opt", range(1, 8))
@pytest.mark.parametrize("least", [1, 2, 5])
def test_no_slice_is_smaller_or_larger_than_what_is_served(opt: int, least: int) -> None:
    batch = BatchRange(min=min(least, opt), opt=opt, max=16)
    for samples in range(batch.min, 17):
        sizes = slice_sizes(samples, batch)
        assert sum(sizes) == samples
        assert all(batch.min <= size <= batch.max for size in sizes)


def test_every_input_is_cut_and_every_output_put_together() -> None:
    seen = []

    def run(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        seen.append(len(x))
        return [x + y, 2 * y]

    x, y = np.arange(10.0).reshape(5, 2), np.ones((5, 2))
    outputs = run_by_slices(run, [x, y], BatchRange(min=1, opt=2, max=8))
    assert seen == [2, 2, 1]
    np.testing.assert_array_equal(outputs[0], x + 1)
    np.testing.assert_array_equal(outputs[1], 2 * y)


def test_a_runner_says_how_many_images_it_runs_at_once_and_answers_the_same(bundle: Bundle) -> None:
    runner = open_runner(bundle, "onnx", RunnerOptions(device="cpu", threads=1))
    best = bundle.manifest.batch.opt
    assert runner.details["images_at_once"] == best == 4
    batch = np.random.default_rng(0).standard_normal((2 * best + 3, 3, 32, 32)).astype(np.float32)
    whole = runner.run(batch)
    parts = [runner.run(batch[i : i + best]) for i in range(0, len(batch), best)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
