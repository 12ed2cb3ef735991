"""Write a script that compares every layer of an engine with ONNX Runtime on a machine with a GPU.

The script is `engine_script.py` with a table filled in: the files of the bundle with their hashes, and every value of
the graph that ends a module or follows a weight, with block and part. It runs without this package and without torch.

A value may differ by `relative` times its largest entry: twice what the precision allows over a noise floor, since both
sides round. The floor is that of the network's output, the deepest value, in proportion to its size.
"""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any

import numpy as np

from repmlp_deploy.bundle import Bundle, FileEntry
from repmlp_deploy.convert.diagnosis.places import describe_place, place_of
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS
from repmlp_deploy.convert.graph.nodes import module_of, modules_around
from repmlp_deploy.convert.options import require_choice
from repmlp_deploy.errors import InputError, MissingDependency
from repmlp_deploy.numerics import TOLERANCES, noise_floor
from repmlp_deploy.precision import PRECISIONS

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "rtx") from None

__all__ = ["compared_values", "engine_report"]

_BLANK = "ABOUT: dict[str, Any] = {}  # filled in where this script is written\n"
_LARGEST_BATCH = 8
_PACKAGES = {"trt": "tensorrt", "trt-rtx": "tensorrt-rtx-cu12"}
_NOT_COMPARED = ("Cast", "DequantizeLinear", "QuantizeLinear", "Identity", "Shape", "Constant")


def engine_report(bundle: Bundle, artifact_format: str | None = None) -> str:
    """Return the text of the script.

    Args:
        bundle: on disk; holds the graph, and the engine if it was built.
        artifact_format: an entry of `FLAVOURS`; by default that of the bundle's engine.

    Raises:
        BundleError: it has no ONNX graph, or the file is not what was certified.
        InputError: it has no engine and no format is named, or ONNX Runtime cannot run the precision on a CPU.
    """
    made = [name for name in FLAVOURS if name in bundle.manifest.artifacts]
    if artifact_format is None and not made:
        raise InputError(
            f"{bundle.folder} has no engine: name the builder to compare, --format {' or '.join(FLAVOURS)}"
        )
    name = artifact_format or made[0]
    require_choice("--format", name, tuple(FLAVOURS))
    entry = bundle.artifact("onnx")
    if not PRECISIONS[entry.precision].runs_on_cpu:
        raise InputError(
            f"ONNX Runtime runs no {entry.precision} graph on a CPU, so there is nothing to compare with: use "
            f"repmlp-verify {bundle.folder} --ckpt FILE --bisect --format {name} on the target"
        )
    manifest = bundle.manifest
    about = {
        "name": manifest.name,
        "format": name,
        "package": _PACKAGES[name],
        "precision": entry.precision,
        "batch": max(manifest.batch.min, min(manifest.batch.max, _LARGEST_BATCH)),
        "relative": _relative_tolerance(bundle, entry.precision),
        "graph": _file(entry),
        "engine": _file(bundle.artifact(name)) if name in made else None,
        "probe": _file(manifest.probe),
        "inputs": {spec.name: tuple(spec.shape[1:]) for spec in manifest.inputs},
        "values": compared_values(bundle.read(entry)),
    }
    source = Path(__file__).with_name("engine_script.py").read_text(encoding="utf-8")
    before, blank, after = source.partition(_BLANK)
    if not blank:
        raise AssertionError("engine_script.py has no place for its table")
    table = pprint.pformat(about, width=118, sort_dicts=False)
    return f"#!/usr/bin/env python3\n{before}ABOUT: dict[str, Any] = {table}\n{after}"


def compared_values(graph: bytes) -> list[dict[str, str]]:
    """Return the values to compare, in the graph's order: the last of every module, and each that reads a weight.

    Args:
        graph: serialized.

    Returns:
        For each its name, its place (block and part), and its node.
    """
    model = onnx.load_model_from_string(graph)
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type != onnx.TensorProto.INT64}
    found: dict[str, dict[str, str]] = {}
    ends: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _NOT_COMPARED:
            continue
        module = module_of(node)
        for around in modules_around(node):
            ends[around] = node.output[0]
        if module and any(name in weights for name in node.input[1:]):
            ends[f"{module} {node.name}"] = node.output[0]
        place = describe_place(*place_of(module))
        found[node.output[0]] = {"value": node.output[0], "place": place, "node": f"{node.op_type} {node.name}"}
    last = set(ends.values())
    return [about for value, about in found.items() if value in last]


def _relative_tolerance(bundle: Bundle, precision: str) -> float:
    """Return what a value may differ by, in proportion to its largest entry."""
    floors = []
    for reference, float32 in bundle.probe().outputs():
        largest = float(np.abs(reference).max())
        floors.append(noise_floor(float32, reference) / (largest or 1.0))
    return 2 * TOLERANCES[precision].floor_ratio * max(floors)


def _file(entry: FileEntry) -> dict[str, Any]:
    return {"path": entry.path, "sha256": entry.sha256}
