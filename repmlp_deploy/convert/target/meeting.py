"""Build one format so that it loses at most so many points of top-1: blocks return to float32 until that holds.

    all lowered → rank blocks → keep the worst → give blocks back → rank their products → keep the worst → give back

Every format has a kept set of its own. Their quantizers differ, OpenVINO's also rounds sums and gates, so that a set
which both need would cost each of them what only the other one needs.

Blocks and products are ranked by the error of lowering each alone, on some of the labelled images, against the trained
network in float32. A candidate holds if its certificate does and its accuracy on all the images does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repmlp_deploy.bundle import Hop
from repmlp_deploy.bundle.records import KeptAccuracy
from repmlp_deploy.convert.formats import FORMATS
from repmlp_deploy.convert.formats.candidate import Candidate, Candidates
from repmlp_deploy.convert.graph.lowering.lower import PRODUCTS, blocks_of
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.step import Step
from repmlp_deploy.convert.target.accuracy import Labelled, Outputs, Score, served_run
from repmlp_deploy.convert.target.search import fewest_kept
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.precision import PRECISIONS

__all__ = ["Goal", "artifact_within", "set_goal"]

RANKED = 64
"""Labelled images that blocks are ranked on."""

_BLOCKS_BACK, _PRODUCTS_BACK = 4, 8  # single ones that are tried: a build and an evaluation each


@dataclass(frozen=True)
class Goal:
    """What every format has to reach.

    Attributes:
        points: percentage points of top-1 that may be lost.
        images: labelled.
        trained: the trained network's score on them, in float32.
        samples: the inputs that blocks are ranked on.
        reference: the trained network's outputs for them.
    """

    points: float
    images: Labelled
    trained: Score
    samples: NDArray[Any]
    reference: NDArray[Any]

    def allows(self, score: Score) -> bool:
        """Return whether a score is near enough to the trained network's."""
        return score.drop_from(self.trained) <= self.points + 1e-9  # points: 0.4 is no sum of powers of two


def set_goal(points: float, images: Labelled, trained: Outputs, job: Job) -> Goal:
    """Return the goal, with the trained network's accuracy measured."""
    with job.clock("score trained") as tell:
        score = Score(images.right(trained, tell), images.count)
        samples = images.inputs(RANKED)
        return Goal(points, images, score, samples, trained(samples))


def artifact_within(name: str, job: Job, source: Graphs, goal: Goal) -> Step[Artifact]:
    """Return the artifact of a format that reaches the goal, with as few products in float32 as were found.

    Raises:
        VerificationError: it does not even with every block but one in float32.
    """
    if job.samples is None:
        raise AssertionError("Request.check asks for samples")
    graph = source.need_fp32()
    candidates = FORMATS[name].candidates(job, graph, job.samples)
    return _Meeting(name, job, candidates, goal, onnx.load_from_string(graph)).step()


@dataclass(frozen=True)
class _Trial:
    """A candidate that was built, and how it did.

    Attributes:
        candidate: what was built.
        hops: its rows.
        score: on the labelled images; None where its certificate failed already.
        holds: whether it reaches the goal.
    """

    candidate: Candidate
    hops: tuple[Hop, ...]
    score: Score | None
    holds: bool


class _Meeting:
    """The search for one format."""

    def __init__(self, name: str, job: Job, candidates: Candidates, goal: Goal, model: onnx.ModelProto) -> None:
        self._name, self._job, self._goal = name, job, goal
        self._candidates = candidates
        self._products = [node.name for node in model.graph.node if node.op_type in PRODUCTS]
        self._blocks: Mapping[str, Sequence[str]] = blocks_of(model)
        self._holds: dict[frozenset[str], bool] = {}
        self._best: _Trial | None = None

    def step(self) -> Step[Artifact]:
        plain = self._tried((), "everything lowered", scored=True)
        own = plain.candidate.in_float32
        self._blocks = {  # without those that --keep-fp32 keeps
            block: names for block, names in self._blocks.items() if {*names} & {*self._products} - own
        }
        about: dict[str, Any] = {}
        if not plain.holds or self._job.request.low.sensitivity:
            about["sensitivity"] = self._ranked()
        if not plain.holds:
            self._search([line["block"] for line in about["sensitivity"]], own)
        best = self._best
        if best is None:
            raise AssertionError("a search ends with what holds, or raises")
        found = self._described(plain, best)
        about["accuracy"] = found.model_dump(mode="json")
        return Step(best.candidate.artifact(about), best.hops, (f"{self._name}: {found.summary()}",))

    def _search(self, ranked: Sequence[str], own: Collection[str]) -> None:
        """Find blocks, then products in them, that suffice."""
        most = ranked[:-1]
        if not most or not self._block_holds(most):
            raise VerificationError(self._out_of_reach(ranked))
        kept = fewest_kept(most, self._block_holds, gives_back=_BLOCKS_BACK)
        nodes = [name for block in kept for name in self._blocks[block]]
        inside = [name for name in nodes if name in self._products and name not in own]
        others = [name for name in nodes if name not in inside]
        errors = self._errors("rank products", {name: {*nodes} - {name} for name in inside})
        worst_first = sorted(inside, key=lambda name: -errors[name][0])

        def holds(products: Sequence[str]) -> bool:
            said = f"{len(products)} of {len(inside)} products in float32"
            return self._set_holds([*others, *products], said)

        fewest_kept(worst_first, holds, gives_back=_PRODUCTS_BACK, empty_fails=not self._candidates.relevant(others))

    def _block_holds(self, blocks: Sequence[str]) -> bool:
        said = f"{len(blocks)} of {len(self._blocks)} blocks in float32"
        return self._set_holds([name for block in blocks for name in self._blocks[block]], said)

    def _set_holds(self, nodes: Sequence[str], said: str) -> bool:
        key = self._candidates.relevant(nodes)
        if key not in self._holds:
            self._tried(nodes, said)
        return self._holds[key]

    def _tried(self, nodes: Sequence[str], said: str, *, scored: bool = False) -> _Trial:
        """Build and judge a candidate; if it holds with fewer products in float32 than any before, remember it."""
        key = self._candidates.relevant(nodes)
        with self._job.clock(f"try {self._name}, {said}") as tell:
            candidate = self._candidates.build(nodes)
            hops = self._rows(candidate)
            passed = bool(hops) and all(hop.passed for hop in hops)
            score = None
            if passed or scored:
                images = self._goal.images
                run = served_run(candidate.run, self._job.request.batch)
                score = Score(images.right(run, tell), images.count)
        holds = passed and score is not None and self._goal.allows(score)
        trial = _Trial(candidate, hops, score, holds)
        self._holds[key] = holds
        before = None if self._best is None else len(self._best.candidate.in_float32)
        if holds and (before is None or len(candidate.in_float32) <= before):
            self._best = trial
        return trial

    def _rows(self, candidate: Candidate) -> tuple[Hop, ...]:
        """Return the rows of a candidate; none if its outputs cannot be compared at all."""
        try:
            return tuple(
                self._job.certifier.measure(
                    self._candidates.step, candidate.run, self._job.request.precision, self._name
                )
            )
        except VerificationError:
            return ()

    def _ranked(self) -> list[dict[str, Any]]:
        """Return the error of lowering each block alone, the worst first."""
        every = {name for names in self._blocks.values() for name in names}
        errors = self._errors("rank blocks", {block: every.difference(names) for block, names in self._blocks.items()})
        lines = [
            {"block": block, "max_abs": largest, "rms": square**0.5} for block, (square, largest) in errors.items()
        ]
        return sorted(lines, key=lambda line: -float(line["rms"]))

    def _errors(self, what: str, kept: Mapping[str, Collection[str]]) -> dict[str, tuple[float, float]]:
        """Return the error of every candidate, given what each keeps in float32."""
        found = {}
        with self._job.clock(f"{what} of {self._name}") as tell:
            for name, nodes in kept.items():
                found[name] = self._error_of(nodes)
                tell(len(found), len(kept))
        return found

    def _error_of(self, kept: Collection[str]) -> tuple[float, float]:
        """Return the mean square and the largest error against the trained network with these nodes in float32."""
        run = served_run(self._candidates.build(kept).run, self._job.request.batch)
        size = self._job.request.batch.opt
        parts = [self._goal.samples[i : i + size] for i in range(0, len(self._goal.samples), size)]
        errors = np.concatenate([run(part) for part in parts]).astype(np.float64) - self._goal.reference
        return (float(np.mean(errors**2)), float(np.abs(errors).max()))

    def _out_of_reach(self, ranked: Sequence[str]) -> str:
        precision, images = self._job.request.precision, self._goal.images
        instead = f"give better calibration images, or use {PRECISIONS[precision].wider}"
        return (
            f"{self._name} in {precision} cannot keep top-1 within {self._goal.points:g} points of the trained "
            f"network's {100 * self._goal.trained.top1:.2f} % on {images.count} images, not even with every block but "
            f"{ranked[-1]} in float32: nothing was written; {instead}"
        )

    def _described(self, plain: _Trial, best: _Trial) -> KeptAccuracy:
        """Return what the manifest says of the search."""
        goal, score = self._goal, best.score
        if score is None or plain.score is None:
            raise AssertionError("both were scored")
        returned = best.candidate.in_float32 - plain.candidate.in_float32
        return KeptAccuracy(
            max_drop=goal.points,
            drop=round(score.drop_from(goal.trained), 6),
            images=goal.images.count,
            source=goal.images.source,
            trained_top1=goal.trained.top1,
            lowered_top1=plain.score.top1,
            top1=score.top1,
            kept=tuple(block for block, names in self._blocks.items() if returned.intersection(names)),
            products=len(returned),
            builds=len(self._holds),
        )
