"""Blaming for merged regions: the first region that computes something else, and the branch of it that is wrong.

The network before the step is traced again. Each region of the merged graph is given exactly what its sources are
there, so errors cannot propagate. Of the first region that differs, each branch is run alone: the one whose share is
missing, doubled or most like the error is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.reparam.regions import Region, report_of
from repmlp_deploy.convert.reparam.regions.checking import branches_of, share_of_error
from repmlp_deploy.convert.reparam.regions.merge import prepare
from repmlp_deploy.convert.reparam.regions.tracing import Values, trace
from repmlp_deploy.numerics import allowed_error, noise_floor

__all__ = ["blame_regions"]


@torch.no_grad()
def blame_regions(
    before: nn.Module, merged: nn.Module, examples: Sequence[Tensor], inputs: Sequence[NDArray[Any]]
) -> Blame | None:
    """Return the first region of `merged` that differs from `before`; None if no single one does.

    Args:
        before: the network whose regions were merged.
        merged: what `merge_regions` made of it.
        examples: what it was traced with.
        inputs: of the network, (n, …) each; the first two samples are run.
    """
    report = report_of(merged)
    if report is None or not isinstance(merged, fx.GraphModule):
        return None
    graph = trace(before, examples)
    choice, values = prepare(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    made = {node.name: node for node in merged.graph.nodes}
    known = _values(graph, values, inputs)
    after = Values(merged)
    for region in report.regions:
        value, expected = nodes[region.value], known[nodes[region.value]]
        given = {made[now]: known[nodes[source]] for source, now in region.sources}
        got = after.run(made[region.made], given)
        floor = noise_floor(_rounded(expected), expected.numpy())
        error = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        if error <= allowed_error("fp32", floor):
            continue
        covers = choice.forms[value].covers
        branches = branches_of(value, choice.readings, covers)
        part, fault = "", "computes something else"
        if len(branches) > 1 and np.isfinite(error):
            index, fault = share_of_error(got - expected, [known[branch] for branch in branches])
            part = f"branch {index + 1} of {len(branches)}"
        return Blame(_place(region), part, fault, error, floor)
    return None


def _place(region: Region) -> str:
    return region.module or "the network"


def _rounded(value: Tensor) -> NDArray[Any]:
    """Return a value with an error like that of a few float32 operations."""
    result: NDArray[Any] = value.float().numpy() * np.float32(1 + 2.0**-22)
    return result


def _values(graph: fx.GraphModule, values: Values, inputs: Sequence[NDArray[Any]]) -> Mapping[fx.Node, Any]:
    """Return the value of every node in float64, for the first two samples."""
    known: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            x = torch.from_numpy(np.ascontiguousarray(next(given)[:2]))
            known[node] = x.double() if x.is_floating_point() else x
        elif node.op != "output":
            known[node] = values.run(node, known)
    return known
