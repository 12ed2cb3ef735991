"""From the trained network to the one that is traced, each step proved equal to the trained network.

    trained -> merged (branches and their BatchNorms) -> folded (every other BatchNorm)

This is the only module that knows this order. Export, refit, the check against a checkpoint, the search for a fault and
the benchmark's PyTorch rows all use it, so that no one of them can skip a proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from repmlp_deploy.bundle import Hop
from repmlp_deploy.convert.diagnosis.blame import blame_network, blamed
from repmlp_deploy.convert.proof.algebra import Transformation, prove_algebra
from repmlp_deploy.convert.proof.certificate import Certifier
from repmlp_deploy.convert.proof.probe import run_network
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.convert.source.trained import Trained
from repmlp_deploy.convert.step import Clock, Step, untimed
from repmlp_deploy.errors import InputError

__all__ = ["Form", "Stage", "stages_of", "transform_and_prove"]


@dataclass(frozen=True)
class Form:
    """What becomes of a trained network.

    Attributes:
        merged: with every block merged.
        network: the one that is traced: folded, or merged in upstream's own form.
    """

    merged: nn.Module
    network: nn.Module


@dataclass(frozen=True)
class Stage:
    """One step of the order above.

    Attributes:
        name: of its result, and of its rows in the certificate.
        verb: what the progress display calls it.
        transform: a module to a new one, in any dtype; with `use_up` it may free the module it gets.
    """

    name: str
    verb: str
    transform: Callable[..., nn.Module]


def stages_of(trained: Trained, graph: str) -> tuple[Stage, ...]:
    """Return the steps from a trained network to the graph that is asked for."""
    merging = () if trained.merged else (Stage("merged", "merge", merge_branches),)
    folding = Stage("folded", "fold", partial(fold_affine, keep_unknown=trained.interface is not None))
    return merging if graph == "merged" else (*merging, folding)


def transform_and_prove(
    trained: Trained, graph: str, certifier: Certifier | None = None, clock: Clock = untimed
) -> Step[Form]:
    """Return the merged network and the one to trace, with the rows that prove both.

    Args:
        trained: unchanged.
        graph: of `GRAPHS`.
        certifier: compares every step with the trained network; None proves nothing, for callers that judge the result
            themselves.
        clock: around every part.

    Raises:
        InputError: a block cannot be merged.
        VerificationError: a step differs from the trained network; the message names the stage, block and branch.
    """
    hops: list[Hop] = []
    done: list[Transformation] = []
    form, merged = trained.network, trained.network
    for stage in stages_of(trained, graph):
        with clock(stage.verb):
            form = _applied(stage, form)
        merged = form if stage.name == "merged" else merged
        if certifier is not None:
            hops += _compared(stage.name, trained, form, certifier, clock)
            done.append(Transformation(stage.name, partial(stage.transform, use_up=True), form))
    if certifier is not None and trained.merged:
        hops = [*_compared("merged", trained, merged, certifier, clock), *hops]
    if certifier is not None:
        with clock("verify algebra"), blamed(partial(blame_network, trained.network, form, certifier.inputs)):
            hops += prove_algebra(trained.network, done, certifier)
    network = upstream_form(form) if graph == "merged" else form
    return Step(Form(merged, network), tuple(hops))


def _applied(stage: Stage, network: nn.Module) -> nn.Module:
    try:
        return stage.transform(network)
    except ValueError as error:  # of a network of the user's own: ours always merge
        raise InputError(str(error)) from None


def _compared(name: str, trained: Trained, form: nn.Module, certifier: Certifier, clock: Clock) -> list[Hop]:
    find = partial(blame_network, trained.network, form, certifier.inputs)
    with clock(f"verify {name}"), blamed(find):
        return certifier.require(name, partial(run_network, form))
