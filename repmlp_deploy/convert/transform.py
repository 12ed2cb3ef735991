"""From the trained network to the one that is traced, each step proved equal to the trained network.

    trained -> merged (branches and their BatchNorms) -> folded (every other BatchNorm) -> regions

Regions are what is left to merge in the traced graph, around the blocks or without any. Only networks of the user's own
have them: those of a family are merged completely by their own rules.

This is the only module that knows this order. Export, refit, the check against a checkpoint, the search for a fault and
the benchmark's PyTorch rows all use it, so that no one of them can skip a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from repmlp_deploy.bundle import Hop
from repmlp_deploy.convert.diagnosis.blame import Blame, blame_network, blamed
from repmlp_deploy.convert.diagnosis.blame_regions import blame_regions
from repmlp_deploy.convert.options import find_named, is_by_package
from repmlp_deploy.convert.proof.algebra import Transformation, prove_algebra
from repmlp_deploy.convert.proof.certificate import Certifier
from repmlp_deploy.convert.proof.probe import run_network
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.hooks import describe_hooks, merge_by_function, merge_by_hooks
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.convert.reparam.regions import merge_regions, report_of
from repmlp_deploy.convert.source.trained import Trained, find_interface
from repmlp_deploy.convert.step import Clock, Step, untimed
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.foreign import holds_blocks

__all__ = ["Form", "Stage", "require_merged_modules", "stages_of", "transform_and_prove"]


@dataclass(frozen=True)
class Form:
    """What becomes of a trained network.

    Attributes:
        merged: with every block merged; the trained network itself where it has no block.
        network: the one that is traced: folded and its regions merged, or merged in upstream's own form.
    """

    merged: nn.Module
    network: nn.Module


@dataclass(frozen=True)
class Stage:
    """One step of the order above.

    Attributes:
        name: of its result, and of its rows in the certificate.
        verb: what the progress display calls it.
        transform: a module to a new one, in any dtype.
        frees: whether `transform` takes `use_up=True`, to free the module it gets.
    """

    name: str
    verb: str
    transform: Callable[..., nn.Module]
    frees: bool = False


def stages_of(trained: Trained, graph: str, merge: str = "auto") -> tuple[Stage, ...]:
    """Return the steps from a trained network to the graph that is asked for.

    Args:
        trained: the network.
        graph: of `GRAPHS`.
        merge: `blocks` for RepMLP's blocks alone, `regions` for regions alone, `auto` for both, `hooks` for what the
            network's own package brings, or `PACKAGE:FUNCTION`.
    """
    interface, by_package = trained.interface, is_by_package(merge)
    folding = Stage("folded", "fold", partial(fold_affine, keep_unknown=interface is not None), frees=True)
    merging: tuple[Stage, ...] = ()
    if by_package:
        merging = (Stage("merged", "merge", _hooks(trained, merge)), folding)
    elif _merges_modules(trained, merge):
        merging = (folding,) if trained.merged else (Stage("merged", "merge", merge_branches, frees=True), folding)
    if graph == "merged":
        return merging[:-1]
    if by_package or merge == "blocks" or (merge == "auto" and interface is None):
        return merging
    examples = find_interface(trained).examples
    return (*merging, Stage("regions", "merge regions", partial(_with_regions_merged, examples=examples)))


def require_merged_modules(trained: Trained, graph: str, formats: Collection[str], merge: str) -> None:
    """Raise InputError if merged modules are asked for, and nothing but regions of the traced graph would merge."""
    asked = "--graph merged" if graph == "merged" else "--format checkpoint" if "checkpoint" in formats else ""
    if not asked or _merges_modules(trained, merge):
        return
    if holds_blocks(trained.network):
        raise InputError(
            f"{asked} needs merged modules, and --merge {merge} merges only the traced graph: drop one of them, or "
            "pass --merge blocks"
        )
    raise InputError(
        f"{asked} needs merged modules. This network has no RepMLP block, and --merge {merge} merges only its traced "
        f"graph: pass --merge hooks or --merge PACKAGE:FUNCTION, or drop {asked}"
    )


def _merges_modules(trained: Trained, merge: str) -> bool:
    """Return whether modules of the network are merged, and not its traced graph alone."""
    if merge == "auto":
        return trained.interface is None or holds_blocks(trained.network)
    return merge == "blocks" or is_by_package(merge)


def _with_regions_merged(network: nn.Module, examples: Sequence[Tensor]) -> nn.Module:
    return merge_regions(network, examples).value


def _hooks(trained: Trained, merge: str) -> Callable[..., nn.Module]:
    """Return what merges a network as its own package does."""
    examples = find_interface(trained).examples
    if merge == "hooks":
        return partial(merge_by_hooks, examples=examples)
    return partial(merge_by_function, function=find_named("--merge", merge), examples=examples, called=merge)


def transform_and_prove(
    trained: Trained,
    graph: str,
    certifier: Certifier | None = None,
    clock: Clock = untimed,
    merge: str = "auto",
) -> Step[Form]:
    """Return the merged network and the one to trace, with the rows that prove both.

    Args:
        trained: unchanged.
        graph: of `GRAPHS`.
        certifier: compares every step with the trained network; None proves nothing, for callers that judge the result
            themselves.
        clock: around every part.
        merge: see `stages_of`.

    Raises:
        InputError: a block cannot be merged.
        VerificationError: a step differs from the trained network; the message names the stage, block and branch.
    """
    hops: list[Hop] = []
    done: list[Transformation] = []
    form = before = merged = trained.network
    for stage in stages_of(trained, graph, merge):
        before = form
        with clock(stage.verb):
            form = _applied(stage, form)
        merged = form if stage.name == "merged" else merged
        if certifier is not None:
            hops += _compared(stage.name, trained, before, form, certifier, clock)
            spent = partial(stage.transform, use_up=True) if stage.frees else stage.transform
            done.append(Transformation(stage.name, spent, form))
    if certifier is not None and trained.merged:
        hops = [*_compared("merged", trained, trained.network, merged, certifier, clock), *hops]
    if certifier is not None:
        with clock("verify algebra"), blamed(_finder(trained, before, form, certifier)):
            hops += prove_algebra(trained.network, done, certifier)
    network = upstream_form(form) if graph == "merged" else form
    return Step(Form(merged, network), tuple(hops), _notes(trained, merged, form, merge))


def _notes(trained: Trained, merged: nn.Module, form: nn.Module, merge: str) -> tuple[str, ...]:
    """Say what regions or hooks made of the network."""
    report = report_of(form)
    said = (describe_hooks(trained.network, merged),) if is_by_package(merge) else ()
    return said if report is None else (*said, report.summary())


def _applied(stage: Stage, network: nn.Module) -> nn.Module:
    try:
        return stage.transform(network)
    except ValueError as error:  # of a network of the user's own: ours always merge
        raise InputError(str(error)) from None


def _compared(  # noqa: PLR0913 - what a row is about
    name: str, trained: Trained, before: nn.Module, form: nn.Module, certifier: Certifier, clock: Clock
) -> list[Hop]:
    with clock(f"verify {name}"), blamed(_finder(trained, before, form, certifier)):
        return certifier.require(name, partial(run_network, form))


def _finder(trained: Trained, before: nn.Module, form: nn.Module, certifier: Certifier) -> Callable[[], Blame | None]:
    """Return what finds the first place where a form is wrong, given the form before it."""
    if report_of(form) is not None and trained.interface is not None:
        return partial(blame_regions, before, form, trained.interface.examples, certifier.inputs)
    return partial(blame_network, trained.network, form, certifier.inputs)
