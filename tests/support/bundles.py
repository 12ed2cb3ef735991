"""Bundles whose files were exchanged on purpose, and bundles of graphs that no network was trained for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import parser

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import MANIFEST, ArtifactEntry, BatchRange, Manifest, TensorSpec, hash_file
from repmlp_deploy.bundle.probe import Probe
from repmlp_deploy.bundle.storage import describe_file
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.graph.run import onnx_run

__all__ = ["FACES", "PARTS", "as_int8", "bundle_of_graph", "certify_again"]

PARTS = """<ir_version: 8, opset_import: ["" : 18]>
parts (float[N, 3, 32, 32] images) => (float[N, 2, 32, 32] logits)
<float[2, 3, 1, 1] weight = {1, -0.5, 0.25, -0.3, 0.8, 0.2}> { logits = Conv (images, weight) }"""

FACES = """<ir_version: 8, opset_import: ["" : 18]>
faces (uint8[N, 32, 32, 3] images) => (float[N, 6] embedding)
<int64[2] rows = {2, 5}, int64[1] middle = {2}, int64[2] shape = {0, 6}> {
  levels = Cast <to = 1> (images)
  picked = Gather <axis = 1> (levels, rows)
  means = ReduceMean <keepdims = 0> (picked, middle)
  embedding = Reshape (means, shape)
}"""


def as_int8(bundle: Bundle, name: str, **update: object) -> Bundle:
    """`bundle` with one artifact alone, said to be int8: one whose compiled or optimised form is kept in a cache."""
    entry = bundle.artifact(name).model_copy(update={"precision": "int8", **update})
    return Bundle(bundle.manifest.model_copy(update={"artifacts": {name: entry}}), bundle.folder)


def certify_again(folder: Path) -> Bundle:
    """Write the hashes of what lies there now into the manifest, as whoever exchanges a file on purpose would."""
    data = json.loads((folder / MANIFEST).read_text())
    for entry in [*data["artifacts"].values(), data["probe"]]:
        for file in [entry, *entry.get("companions", ())]:
            path = folder / file["path"]
            file |= {"sha256": hash_file(path), "bytes": path.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(data))
    return Bundle.load(folder)


def bundle_of_graph(text: str, out: Path, *, task: str, how: Preprocessing) -> Bundle:
    """Write a bundle of a graph in ONNX's text form, with one input and one output and without a trained network.

    The probe holds what ONNX Runtime gives, so the self-check tells whether the graph is still this one.
    """
    model = parser.parse_model(text)
    graph = model.SerializeToString()
    spec, output = (_spec(values[0]) for values in (model.graph.input, model.graph.output))
    rng = np.random.default_rng(0)
    shape = (4, *(edge or 0 for edge in spec.shape[1:]))
    inputs = (
        rng.integers(0, 256, shape, np.uint8) if spec.dtype == "uint8" else rng.normal(size=shape).astype(np.float32)
    )
    (float32,) = onnx_run(graph)(inputs)
    probe = Probe(inputs, float32.astype(np.float64), float32).to_bytes()
    artifact = ArtifactEntry(**describe_file("model.onnx", graph).model_dump(), precision="fp32")
    manifest = Manifest(
        name="graph",
        family="graph",
        task=task,
        graph="folded",
        inputs=(spec,),
        outputs=(output,),
        preprocessing=how,
        labels=None,
        batch=BatchRange(min=1, opt=2, max=4),
        artifacts={"onnx": artifact},
        probe=describe_file("probe.npz", probe),
        certificate=(),
        provenance={},
    )
    return Bundle(manifest, contents={"model.onnx": graph, "probe.npz": probe}).save(out)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = "uint8" if kind.elem_type == onnx.TensorProto.UINT8 else "float32"
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(edge.dim_value or None for edge in kind.shape.dim))
