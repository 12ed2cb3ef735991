"""What KServe needs: a Triton repository in a storage that the cluster reads, and an InferenceService that names it.

Source: KServe's documentation, "Triton Inference Server"; names follow RFC 1123, as Kubernetes asks for.
"""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.repository import triton
from repmlp_deploy.serving.repository.choice import Choice, Packed

__all__ = ["pack"]

_SCHEMES = ("pvc", "s3", "gs", "https", "http", "hdfs", "hf", "oci")
_LONGEST = 63


def pack(choice: Choice) -> Packed:
    """Return a Triton repository and `inferenceservice.yaml`, which lies beside the model.

    Raises:
        InputError: the storage is no address that KServe reads.
        BundleError: there is no artifact that Triton runs, or a file was changed.
    """
    if choice.storage is None:
        raise InputError("--layout kserve needs --storage URI, where the cluster finds the repository, as pvc://models")
    parts = urlsplit(choice.storage)
    plain = choice.storage.isascii() and choice.storage.isprintable() and " " not in choice.storage
    if parts.scheme not in _SCHEMES or not parts.netloc or not plain:
        raise InputError(f"--storage is {choice.storage[:60]!r}; expected an address of {', '.join(_SCHEMES)}")
    packed = triton.pack(choice)
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": _service_name(choice.model)},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": choice.storage,
                }
            }
        },
    }
    manifest = (json.dumps(service, indent=2) + "\n").encode()  # JSON is YAML
    unchecked = (*packed.unchecked, f"that {choice.storage} will hold this repository")
    return Packed({**packed.files, "inferenceservice.yaml": manifest}, packed.model, packed.version, unchecked)


def _service_name(model: str) -> str:
    """Return a name that Kubernetes takes: small letters, digits and dashes, at most 63."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:_LONGEST].strip("-")
    if not name or not name[0].isalpha():
        raise InputError(f"--name {model} has no letter to begin a Kubernetes name with; give another")
    return name
