"""A model repository of OpenVINO Model Server: `NAME/VERSION/…` and the server's `config.json`.

Source: OpenVINO Model Server's documentation, "Preparing a Model Repository". The configuration names the range of
batch sizes, without which the server fixes the batch to what the first request had.
"""

from __future__ import annotations

import json

from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.repository.choice import Choice, Packed, computes_in

__all__ = ["pack"]

SERVER = "OpenVINO Model Server"
_RUNS = ("openvino", "onnx")
_MOUNTED = "/models"  # where the server's documentation mounts a repository


def pack(choice: Choice) -> Packed:
    """Return the repository of one model.

    Raises:
        InputError: the choice has preprocessing, for which this server needs a pipeline of its own.
        BundleError: there is no artifact that the server runs, or a file was changed.
    """
    choice.check()
    if choice.images is not None:
        raise InputError("--preprocess packs an ensemble of Triton: leave it out, or give --layout triton or kserve")
    name, entry = choice.artifact(_RUNS, SERVER)
    bundle, batch = choice.bundle, choice.bundle.manifest.batch
    files = {f"{choice.model}/{choice.version}/{file.path}": bundle.read(file) for file in (entry, *entry.companions)}
    size = str(batch.min) if batch.min == batch.max else f"{batch.min}:{batch.max}"
    config = {
        "name": choice.model,
        "base_path": f"{_MOUNTED}/{choice.model}",
        "batch_size": size,
        "plugin_config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": computes_in(entry.precision)},
    }
    listed = {"model_config_list": [{"config": config}]}
    files["config.json"] = (json.dumps(listed, indent=2) + "\n").encode()
    unchecked = (f"that the repository is mounted at {_MOUNTED}", f"that this server reads {name} models")
    return Packed(files, choice.model, str(choice.version), unchecked)
