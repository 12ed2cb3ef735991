"""Provenance: what a bundle was made from, with what, where and how long it took."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch

import repmlp_deploy
from repmlp_deploy.convert.memory import peak_bytes
from repmlp_deploy.convert.proof.probe import KINDS, SEED
from repmlp_deploy.convert.source.trained import Trained
from repmlp_deploy.runtime.cpus import cpu_name

__all__ = ["describe_provenance"]

PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "numpy",
    "timm",
)


def describe_provenance(trained: Trained, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return checkpoint, probe, versions, machine, seconds of every step and peak memory, for the manifest."""
    source: dict[str, Any] = {"checkpoint": None}
    if trained.checkpoint is not None and trained.state is not None:
        source["checkpoint"] = {
            "file": trained.checkpoint.path.name,
            "sha256": trained.checkpoint.sha256,
            "layout": trained.state.layout.name,
            "container": trained.state.container,
            "ignored": list(trained.state.ignored),
            "prefix": trained.state.prefix,
            "merged": trained.merged or trained.state.merged,
        }
    if trained.model is not None:
        source["model"] = trained.model
    if trained.interface is not None:
        source["by_name"] = trained.interface.by_name
    return {
        **source,
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "probe": {"seed": SEED, "samples": list(KINDS), "statistics_seed": SEED},
        "versions": {"repmlp-deploy": repmlp_deploy.__version__, "python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seconds": dict(seconds),
        "peak_bytes": peak_bytes(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
