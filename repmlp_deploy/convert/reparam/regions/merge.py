"""The pass: trace, find regions, choose, write, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from repmlp_deploy.convert.reparam.regions.checking import branches_of, check_region
from repmlp_deploy.convert.reparam.regions.choosing import Choice, choose, form_macs, node_macs
from repmlp_deploy.convert.reparam.regions.commuting import move_norms
from repmlp_deploy.convert.reparam.regions.forms import Form
from repmlp_deploy.convert.reparam.regions.reading import Affine, Same, scale_shift
from repmlp_deploy.convert.reparam.regions.tracing import BATCH, Values, module_path, trace
from repmlp_deploy.convert.reparam.regions.writing import Writer, Written
from repmlp_deploy.nets.blocks.algebra import BatchNorm

__all__ = ["Merged", "Region", "Report", "merge_regions", "prepare", "report_of"]

_NOTE = "repmlp_deploy.regions"
_KINDS = {
    "products": ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "mm", "addmm", "bmm"),
    "BatchNorms": ("_native_batch_norm_legit_no_training",),
    "additions": ("add", "sub"),
}


@dataclass(frozen=True)
class Region:
    """What became of one region.

    Attributes:
        module: path of the innermost module that holds it; empty for the network itself.
        modules: paths of the modules of the nodes it replaces.
        inputs: names of the values it reads, by the modules that compute them.
        branches: how many parallel branches it had.
        kernels_before: (O, C/groups, kh, kw) of every map that it replaces.
        kernels_after: the same of what was written.
        macs_before: multiply-adds per sample of the traced batch.
        macs_after: the same of what was written.
        weights: names of the parameters that were made.
        value: name of the node of the traced graph whose value the region computes.
        made: name of the node of the merged graph that computes it.
        sources: names of the region's sources in the traced graph, and in the merged one.
    """

    module: str
    modules: tuple[str, ...]
    inputs: tuple[str, ...]
    branches: int
    kernels_before: tuple[tuple[int, ...], ...]
    kernels_after: tuple[tuple[int, ...], ...]
    macs_before: int
    macs_after: int
    weights: tuple[str, ...]
    value: str
    made: str
    sources: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        before, after = (
            " + ".join("×".join(map(str, k)) for k in kernels) or "nothing"
            for kernels in (self.kernels_before, self.kernels_after)
        )
        return (
            f"{self.module or 'the network'}: {before} -> {after}, "
            f"{self.macs_before:,} -> {self.macs_after:,} multiply-adds"
        )


@dataclass(frozen=True)
class Report:
    """What merging did to a network.

    Attributes:
        regions: one record per region.
        before: kind of node, such as `BatchNorms`, to their number in the trained graph.
        after: the same of the merged one.
    """

    regions: tuple[Region, ...]
    before: Mapping[str, int]
    after: Mapping[str, int]

    def summary(self) -> str:
        """Return what was merged in one line."""
        if not self.regions:
            return "regions: nothing to merge"
        counts = ", ".join(f"{kind} {self.before[kind]} -> {self.after[kind]}" for kind in self.before)
        return f"regions: {len(self.regions)} merged; {counts}"


@dataclass(frozen=True)
class Merged:
    """A network with its regions merged.

    Attributes:
        value: computes what the trained network does.
        report: what was done.
    """

    value: nn.Module
    report: Report


@torch.no_grad()
def merge_regions(network: nn.Module, example_inputs: Sequence[Tensor]) -> Merged:
    """Return a network that computes the same with every region of `network` merged; `network` is unchanged.

    Args:
        network: any module in evaluation mode, in float32 or float64.
        example_inputs: a tensor (n, …) for every input, by position.

    Raises:
        ValueError: a module is in training mode, or a BatchNorm has no running statistics.
        InputError: the network cannot be traced.
        VerificationError: a region that was written does not compute what was there.
    """
    _require_evaluated(network)
    graph = trace(network, example_inputs)
    counts = _counted(graph)
    choice, values = prepare(graph)
    writer, trained = Writer(graph), dict[fx.Node, fx.Node]()
    fx.Graph().graph_copy(graph.graph, trained)  # checks run the nodes as they were
    regions = []
    for node, form in choice.forms.items():
        if _stays(node, form, choice):
            continue
        written = writer.write(node, form)
        check_region(written, form, choice, partial(_run, values, writer, trained))
        writer.replace(written)
        regions.append(_record(written, form, choice))
    made = writer.finish(next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32))
    report = Report(tuple(regions), counts, _counted(made))
    made.meta[_NOTE] = report
    return Merged(made, report)


def prepare(graph: fx.GraphModule) -> tuple[Choice, Values]:
    """Move BatchNorms in a traced graph, in place, and choose its regions."""
    move_norms(graph)
    values = Values(graph)
    return choose(graph.graph, values), values


def report_of(network: nn.Module) -> Report | None:
    """Return the report on a network that `merge_regions` made, or a copy of one; None for any other."""
    found: Report | None = network.meta.get(_NOTE) if isinstance(network, fx.GraphModule) else None
    return found


def _run(
    values: Values,
    writer: Writer,
    trained: Mapping[fx.Node, fx.Node],
    value: fx.Node,
    given: Mapping[fx.Node, Tensor],
) -> Tensor:
    """Compute a value from values of the trained graph: as it was, or by the nodes that were written since."""
    if value in trained:
        known = {trained[node]: x for node, x in given.items()}
    else:
        known = {writer.current.get(node, node): x for node, x in given.items()}
    result: Tensor = values.run(trained.get(value, value), known)
    return result


def _require_evaluated(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the module'} is in training mode: call .eval() before merging")
        if isinstance(module, BatchNorm) and (module.running_mean is None or module.running_var is None):
            raise ValueError(
                f"{name or 'the module'} ({type(module).__name__}) keeps no running statistics, so what it computes "
                "depends on the batch: build it with track_running_stats=True"
            )


def _stays(node: fx.Node, form: Form, choice: Choice) -> bool:
    """Return whether a node is left as it is: nothing is absorbed into it, and it is no BatchNorm."""
    work = [covered for covered in form.covers if not isinstance(choice.readings[covered], Same)]
    return not work or (work == [node] and not _is_norm(node))


def _is_norm(node: fx.Node) -> bool:
    return node.target is scale_shift or getattr(node.target, "__name__", "") == "getitem"


def _record(written: Written, form: Form, choice: Choice) -> Region:
    covered = sorted(form.covers)
    before = [(node, choice.readings[node]) for node in covered]
    kernels = [tuple(r.map.kernel.shape) for _, r in before if isinstance(r, Affine) and not r.map.is_scale]
    after = [m for m in form.maps.values() if m is not None and not m.is_scale]
    return Region(
        module=written.path,
        modules=tuple(dict.fromkeys(module_path([node]) for node in covered)),
        inputs=tuple(module_path([source]) or source.name for source in form.maps),
        branches=len(branches_of(written.value, choice.readings, form.covers)),
        kernels_before=tuple(kernels),
        kernels_after=tuple(tuple(m.kernel.shape) for m in after),
        macs_before=sum(node_macs(node, reading) for node, reading in before) // BATCH,
        macs_after=form_macs(written.value, form) // BATCH,
        weights=written.weights,
        value=written.value.name,
        made=written.made.name,
        sources=tuple((source.name, now.name) for source, now in written.sources.items()),
    )


def _counted(graph: fx.GraphModule) -> Mapping[str, int]:
    """Return how many nodes of each kind a graph has, by the names of `_KINDS`."""
    values = Values(graph)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not values.is_constant(n)]
    names = [str(getattr(node.target, "__name__", node.target)).partition(".")[0] for node in nodes]
    return {kind: sum(name in members for name in names) for kind, members in _KINDS.items()}
