"""Bundles with an OpenVINO artifact, made of a bundle's own ONNX graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import ArtifactEntry, FileEntry
from repmlp_deploy.convert.formats.openvino import IR, build_ir
from repmlp_deploy.convert.proof.probe import probe_inputs

DIGIT = (3, 32, 32)


def calibration(samples: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"images": x[None]} for x in probe_inputs(DIGIT, samples, seed=3)]


def digits_ir(bundle: Bundle, precision: str, **options: object) -> IR:
    graph = bundle.read(bundle.artifact("onnx"))
    feeds = calibration() if precision == "int8" else None
    return build_ir(
        graph,
        precision=precision,
        batch=bundle.manifest.batch,
        inputs={"images": DIGIT},
        **{"calibration": feeds, **options},
    )


def with_openvino(bundle: Bundle, out: Path, precision: str = "fp32", *, only: bool = False) -> Bundle:
    """`bundle` with an OpenVINO artifact beside the ONNX one, or instead of it, saved to `out`."""
    ir = digits_ir(bundle, precision)
    contents = {"model.xml": ir.xml, "model.bin": ir.weights}
    files = {
        name: FileEntry(path=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        for name, data in contents.items()
    }
    entry = ArtifactEntry(
        **files["model.xml"].model_dump(), precision=precision, companions=(files["model.bin"],), **ir.details
    )
    onnx = bundle.artifact("onnx")
    artifacts = {"openvino": entry} if only else {"onnx": onnx, "openvino": entry}
    kept = [bundle.manifest.probe] if only else [bundle.manifest.probe, onnx]
    contents |= {file.path: bundle.read(file) for file in kept}
    return Bundle(bundle.manifest.model_copy(update={"artifacts": artifacts}), contents=contents).save(out)
