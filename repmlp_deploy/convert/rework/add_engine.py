"""Engines for a bundle that holds a verified ONNX graph: needs the builder, and neither torch nor ONNX Runtime.

A build server takes the bundle that was proved elsewhere, checks that the graph is byte for byte the one that was
compared with the trained network, and adds engines. The certificate carries over; the bundle is replaced whole.
"""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import repmlp_deploy
from repmlp_deploy.bundle import ArtifactEntry, Bundle, GraphRecord, check_output_folder, describe_file
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt.build import NOT_RUN, Engine, GraphSpec, build_engine
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS, check_options
from repmlp_deploy.convert.options import require_choice
from repmlp_deploy.errors import BundleError

__all__ = ["add_engines", "engine_entry", "graph_spec", "read_contents", "verified_graph"]


def add_engines(
    folder: str | Path,
    formats: Sequence[str],
    options: EngineOptions | None = None,
    *,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Build engines from a bundle's ONNX graph and return the bundle with them; those of the same formats are replaced.

    Args:
        folder: the bundle.
        formats: entries of `FLAVOURS`.
        options: how to build.
        out: another folder for the result; by default it takes the place of `folder`.
        progress: called with every step as it begins.

    Raises:
        BundleError: it is no bundle, holds no ONNX graph that was verified, or a file is not what was certified.
        InputError, MissingDependency, MissingDevice, BuildError, VerificationError: as `build_engine`.
        OutputError: it could not be written; the earlier bundle is untouched.
    """
    options, show = options or EngineOptions(), progress or (lambda _step: None)
    for name in formats:
        require_choice("--format", name, tuple(FLAVOURS))
        check_options(name, options)
    target = Path(folder if out is None else out)
    bundle = Bundle.load(folder)
    check_output_folder(target)
    show("check files")
    graph, contents = verified_graph(bundle), read_contents(bundle)
    entries, about = dict(bundle.manifest.artifacts), dict(bundle.manifest.provenance.get("engines", {}))
    for name in formats:
        show(name)
        engine = build_engine(name, graph, graph_spec(bundle), options)
        if name in entries:
            contents.pop(entries[name].path)
        entry = engine_entry(name, engine, bundle.artifact("onnx").precision)
        entries[name], contents[entry.path] = entry, engine.plan
        about[name] = _provenance()
    show("save")
    manifest = bundle.manifest.model_copy(
        update={
            "artifacts": entries,
            "provenance": {**bundle.manifest.provenance, "engines": about},
            "notes": tuple(dict.fromkeys((*bundle.manifest.notes, *(NOT_RUN.format(name) for name in formats)))),
        }
    )
    return Bundle(manifest, contents=contents).save(target)


def verified_graph(bundle: Bundle) -> bytes:
    """Return the ONNX graph of a bundle, if it is the one that its certificate is about.

    Raises:
        BundleError: it has none, or another one, or the certificate does not cover it.
    """
    entry = bundle.artifact("onnx")
    compared = any(
        (hop.kind, hop.artifact) == ("output", "onnx") and hop.precision in (entry.precision, "")
        for hop in bundle.manifest.certificate
    )
    if not compared or not bundle.manifest.verdict.passed:
        raise BundleError(f"{bundle.folder}: its ONNX graph was not verified; export the checkpoint again")
    return bundle.read(entry)


def read_contents(bundle: Bundle) -> dict[str, bytes]:
    """Return every file but the manifest, each checked, by name.

    Raises:
        BundleError: a file is not what was certified.
    """
    return {entry.path: bundle.read(entry) for entry in bundle.files()}


def graph_spec(bundle: Bundle) -> GraphSpec:
    """Return what the manifest says of the ONNX graph."""
    manifest, entry = bundle.manifest, bundle.artifact("onnx")
    inputs: dict[str, tuple[int, ...]] = {}
    for spec in manifest.inputs:
        inputs[spec.name] = tuple(int(size) for size in spec.shape[1:] if size is not None)
    return GraphSpec(inputs, manifest.batch, entry.precision, entry.record(GraphRecord).kept_products())


def engine_entry(name: str, engine: Engine, precision: str) -> ArtifactEntry:
    """Return an engine as the manifest describes it."""
    file = describe_file(f"model.{name}.engine", engine.plan)
    return ArtifactEntry.model_validate({**file.model_dump(), "precision": precision, **engine.details})


def _provenance() -> dict[str, Any]:
    return {
        "versions": {"repmlp-deploy": repmlp_deploy.__version__, "python": platform.python_version()},
        "platform": platform.platform(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
