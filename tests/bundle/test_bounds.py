"""A bundle's manifest and probe are checked completely, not when something fails on them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import MANIFEST, PROBE, describe_file
from repmlp_deploy.errors import BundleError

MANIFESTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "an unknown precision": (("artifacts", "onnx", "precision"), "fp3"),
    "batches that fall": (("batch",), {"min": 64, "opt": 8, "max": 1}),
    "a batch beyond any": (("batch",), {"min": 1, "opt": 8, "max": 10**9}),
    "an input of text": (("input", "dtype"), "str"),
    "an input beyond any": (("input", "shape"), [None, 3, 10**9, 10**9]),
    "a million axes": (("input", "shape"), [1] * 1_000_000),
    "classes below nothing": (("output", "shape"), [None, -7]),
    "nine labels": (("labels",), [str(i) for i in range(9)]),
    "a million labels": (("labels",), ["x"] * 1_000_000),
    "a label of a megabyte": (("labels",), ["x" * (1 << 20)] * 10),
    "infinite std": (("preprocessing", "std"), [float("inf"), 1.0, 1.0]),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_no_export_writes(name: str, bundle_folder: Path) -> None:
    path = bundle_folder / MANIFEST
    data = place = json.loads(path.read_text(encoding="utf-8"))
    keys, value = MANIFESTS[name]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Bundle.load(bundle_folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


Change = Callable[[np.ndarray], np.ndarray]
PROBES: dict[str, tuple[str, Change | None, str]] = {
    "no inputs": ("inputs", None, "inputs"),
    "no references": ("reference", None, "reference"),
    "inputs that are no number": ("inputs", lambda x: x * np.float32("nan"), "not finite"),
    "references that are no number": ("reference", lambda x: x * float("nan"), "not finite"),
    "references that are infinite": ("reference", lambda x: x + float("inf"), "not finite"),
    "inputs of another size": ("inputs", lambda x: x[:, :, :5], "the manifest states"),
    "inputs of one axis": ("inputs", lambda x: x.ravel(), "numbers of samples"),
    "inputs of float64": ("inputs", lambda x: x.astype(np.float64), "is float64"),
    "inputs of text": ("inputs", lambda _: np.array(["a", "b"]), "no numbers"),
    "references of text": ("reference", lambda _: np.array(["a", "b"]), "no numbers"),
    "references of another number": ("reference", lambda x: x[:2], "numbers of samples"),
    "references of other classes": ("reference", lambda x: x[:, :3], "have shapes"),
    "dates": ("inputs", lambda _: np.array(["2020-01-01"], dtype="datetime64[D]"), "no numbers"),
    "structures": ("inputs", lambda _: np.zeros(3, dtype=[("a", "f4")]), "no numbers"),
    "objects": ("inputs", lambda _: np.array([{}], dtype=object), "not a probe"),
    "no axis": ("inputs", lambda _: np.float32(1), "numbers of samples"),
}


def with_probe(folder: Path, data: bytes) -> Bundle:
    """Replace the probe, and its digest in the manifest."""
    (folder / PROBE).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["probe"] = describe_file(PROBE, data).model_dump()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle.load(folder)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_no_export_writes(name: str, bundle_folder: Path) -> None:
    array, change, said = PROBES[name]
    with np.load(bundle_folder / PROBE) as arrays:
        content = dict(arrays)
    old = content.pop(array)
    if change is not None:
        content[array] = change(old)
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    with pytest.raises(BundleError, match=said):
        with_probe(bundle_folder, buffer.getvalue()).probe()


def test_a_probe_without_a_sample(bundle_folder: Path) -> None:
    with np.load(bundle_folder / PROBE) as arrays:
        content = {name: array[:0] for name, array in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    with pytest.raises(BundleError, match="or none"):
        with_probe(bundle_folder, buffer.getvalue()).probe()


def test_a_probe_that_unpacks_to_gigabytes(bundle_folder: Path) -> None:
    buffer, array = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(5_000_000, np.float32))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("inputs", "reference", "float32"):
            archive.writestr(f"{name}.npy", array.getvalue())
    with pytest.raises(BundleError, match="would unpack to"):
        with_probe(bundle_folder, buffer.getvalue()).probe()


@pytest.mark.parametrize("data", [b"", bytes(range(256)) * 10, b"PK\x03\x04 and nothing"])
def test_bytes_that_are_no_probe(data: bytes, bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="is not a probe"):
        with_probe(bundle_folder, data).probe()
