"""Profiles: a runtime's times of single nodes, gathered by stage of the network and kind of operation.

Runtimes fuse and rename nodes. A node's stage is that of the graph's node whose name it carries, or the longest name
it contains; one that carries none ran between two that do, and takes the stage of the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx

from repmlp_deploy.bench.counting.counts import stage_of
from repmlp_deploy.bench.measure.results import ProfileLine

__all__ = ["gather_times", "node_stages", "profile_lines"]


def node_stages(model_file: Path) -> dict[str, str]:
    """Name of every node and of its outputs to the stage it belongs to."""
    graph = onnx.load(model_file).graph
    weights = {tensor.name for tensor in graph.initializer}
    stages: dict[str, str] = {}
    stage = "input"
    for node in graph.node:
        found = [known for name in node.input if name in weights and (known := stage_of(name))]
        stage = found[0] if found else stage
        stages |= dict.fromkeys((node.name, *node.output), stage)
    return stages


def gather_times(
    nodes: Iterable[tuple[str, str, float]], stages: dict[str, str], calls: int
) -> list[tuple[str, str, float]]:
    """Sum the times of single nodes to (stage, operation, milliseconds per call), in their order.

    Args:
        nodes: `names` is what the runtime calls the node: a name, or several it was fused from.
        stages: see `node_stages`.
        calls: how many calls the times are of.
    """
    sums: dict[tuple[str, str], float] = {}
    stage = "input"
    for names, op, ms in nodes:
        stage = _stage_of_node(names, stages) or stage
        sums[stage, op] = sums.get((stage, op), 0.0) + ms / calls
    return [(where, op, ms) for (where, op), ms in sums.items()]


def _stage_of_node(names: str, stages: dict[str, str]) -> str | None:
    for name in [names, *re.split(r"[,\s]+", names)]:
        if name in stages:
            return stages[name]
    contained: Sequence[str] = [
        name for name in stages if name and re.search(rf"(?<!\w){re.escape(name)}(?!\d)", names)
    ]
    return stages[max(contained, key=len)] if contained else None


def profile_lines(times: Iterable[tuple[str, str, float]], format_name: str, precision: str) -> list[ProfileLine]:
    """Return the lines of one subject; the caller fills in model and batch."""
    return [
        ProfileLine(model="", format=format_name, precision=precision, batch=0, stage=stage, op=op, ms=ms)
        for stage, op, ms in times
    ]
