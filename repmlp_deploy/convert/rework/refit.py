"""Refitting: a bundle with the weights of another checkpoint of the same architecture, without a new build.

    checkpoint → trained → probe → merged → folded → named weights → graph → engines → bundle

The graph keeps its nodes and takes new initializers; like every step of an export it is compared with the network that
was trained, here the new one. Engines take the same weights by the same names. A graph that takes uint8 images gets the
normalisation folded into the new weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from repmlp_deploy.bundle import (
    PROBE,
    ArtifactEntry,
    Bundle,
    EngineReport,
    Hop,
    Probe,
    check_output_folder,
    describe_file,
)
from repmlp_deploy.bundle.records import CheckpointOrigin
from repmlp_deploy.card import load_labels
from repmlp_deploy.convert.formats.tensorrt.build import NOT_RUN
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS
from repmlp_deploy.convert.formats.tensorrt.refit import check_refit, refit_engine
from repmlp_deploy.convert.graph.headroom import find_headroom, widened_graph
from repmlp_deploy.convert.graph.level_input import level_weights
from repmlp_deploy.convert.graph.run import onnx_run, ways_to_run
from repmlp_deploy.convert.graphs import require_headroom
from repmlp_deploy.convert.job import of_whole_levels
from repmlp_deploy.convert.proof.certificate import Certifier, batch_sizes
from repmlp_deploy.convert.proof.probe import probe_like, record_probe
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.provenance import describe_provenance
from repmlp_deploy.convert.rework.add_engine import verified_graph
from repmlp_deploy.convert.rework.locate import merge_of
from repmlp_deploy.convert.rework.named_weights import named_weights, with_named_weights
from repmlp_deploy.convert.source.trained import Trained, find_interface, load_trained
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.families import FAMILIES
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.images import levels_of
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["refit_bundle"]


def refit_bundle(
    folder: str | Path,
    checkpoint: str | Path,
    *,
    weights: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Return a bundle like `folder` with the weights of `checkpoint`, verified against the network in it.

    Args:
        folder: a bundle with an ONNX graph in fp32, fp16 or bf16 and, if any, refittable engines.
        checkpoint: a training-time checkpoint of the same architecture.
        weights: `model` or `ema`, where the file holds both.
        out: another folder for the result; by default it takes the place of `folder`.
        progress: called with every step as it begins.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another architecture.
        InputError: the bundle holds what cannot be refitted (BundleError among them).
        MissingDependency, MissingDevice: it holds an engine, and this machine has not what it takes to refit it.
        VerificationError: the refitted graph differs from the trained network, or its type has no room for a value;
            nothing is written.
        OutputError: it could not be written; the earlier bundle is untouched.
    """
    show, started = progress or (lambda _step: None), time.perf_counter()
    bundle, target = Bundle.load(folder), Path(folder if out is None else out)
    engines = _check(bundle)
    check_output_folder(target)
    graph = onnx.load_from_string(verified_graph(bundle))
    show("load")
    trained = _trained(bundle, checkpoint, weights)
    show("merge and fold")
    interface = find_interface(trained)
    how = bundle.manifest.preprocessing
    inputs = [probe_like(x.numpy()) for x in interface.examples]
    if how.input == "uint8":
        inputs = [of_whole_levels(values, how) for values in inputs]
    probe = record_probe(trained.network, *inputs)
    certifier = _certifier(bundle, trained, probe)
    transformed = transform_and_prove(trained, bundle.manifest.graph, certifier, merge=merge_of(bundle))
    show("refit the graph")
    network = transformed.value.network
    state = {key: x.detach().numpy() for key, x in network.state_dict().items() if x.is_floating_point()}
    served = certifier  # of what the graph takes
    if how.input == "uint8":
        probe = replace(probe, inputs=levels_of(probe.inputs, how))
        served = _certifier(bundle, trained, probe)
        state = level_weights(state, graph, how)
        network = _holding(network, state)
    data = with_named_weights(graph, named_weights(state, graph, name=Path(checkpoint).name))
    about = _headroom(data, bundle.artifact("onnx").precision, served)
    refitted = _compared(data, network, bundle.artifact("onnx").precision, served)
    contents = {PROBE: probe.to_bytes(), bundle.artifact("onnx").path: data}
    named = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}
    for name in engines:
        show(f"refit {name}")
        contents[bundle.artifact(name).path] = _refitted(bundle, name, named)
    show("save")
    seconds = {"refit": round(time.perf_counter() - started, 3)}
    hops = [*certifier.floor_rows(), *transformed.hops, *refitted]
    return _renewed(bundle, trained, hops, contents, seconds, about).save(target)


def _certifier(bundle: Bundle, trained: Trained, probe: Probe) -> Certifier:
    """Return what compares with the new network's outputs for the probe."""
    return Certifier(
        probe,
        batch_sizes(bundle.manifest.batch),
        class_axes=find_task(trained.card.task).class_axes,
        outputs=[spec.name for spec in bundle.manifest.outputs],
    )


def _holding(network: nn.Module, state: Mapping[str, NDArray[Any]]) -> nn.Module:
    """Return the network with the weights of these names; it then is what a graph's weights are compared with."""
    held = copy.deepcopy(network)
    for key, tensor in held.state_dict().items():
        if key in state:
            tensor.copy_(torch.from_numpy(state[key]))
    return held


def _check(bundle: Bundle) -> list[str]:
    """Return the engines to refit, if everything in the bundle can be refitted."""
    manifest = bundle.manifest
    if manifest.family not in FAMILIES:
        raise InputError(f"{manifest.name} is no family's network, whose checkpoints could be told apart: export it")
    if manifest.graph != "folded":
        raise InputError(f"the graph is {manifest.graph}: only folded ones keep the names of all weights; export anew")
    other = [name for name in manifest.artifacts if name != "onnx" and name not in FLAVOURS]
    if other:
        raise InputError(f"{manifest.name} also holds {', '.join(other)}, which cannot be refitted: export anew")
    if PRECISIONS[bundle.artifact("onnx").precision].lowering == "quantize":
        raise InputError("8-bit graphs hold scales that were measured with one checkpoint: export the new one instead")
    engines = [name for name in manifest.artifacts if name in FLAVOURS]
    for name in engines:
        options = bundle.artifact(name).record(EngineReport).options
        if not (options.refittable or options.strip_weights):
            raise InputError(f"the {name} engine was not built with --refittable: build it so, or export anew")
        check_refit(name)
    return engines


def _trained(bundle: Bundle, checkpoint: str | Path, weights: str | None) -> Trained:
    """Load the new network, of the bundle's family and input size."""
    manifest = bundle.manifest
    height, width = manifest.image_size
    if height is None or width is None:
        raise InputError(f"{manifest.name} has no fixed input size")
    try:
        trained = load_trained(checkpoint, weights=weights, input_size=(height, width), size_is_sure=True)
    except InputError:  # damaged, or a network whose maps are of another size: then it can be read without one
        trained = load_trained(checkpoint, weights=weights)
    theirs, ours = (trained.card.family, trained.card.input_size), (manifest.family, (height, width))
    if theirs != ours:
        raise CheckpointError(
            f"{Path(checkpoint).name} is of another architecture: {_named(*theirs)}, not {_named(*ours)}"
        )
    labels = manifest.labels
    if trained.card.labels is not None and labels is not None and load_labels(trained.card) != labels:
        raise CheckpointError(f"{Path(checkpoint).name} is for other classes than the bundle's: export it instead")
    return trained


def _named(family: str, size: tuple[int, int]) -> str:
    """Return `repmlpnet of 224x224`."""
    return f"{family} of {size[0]}x{size[1]}"


def _headroom(data: bytes, precision: str, certifier: Certifier) -> dict[str, Any]:
    """Return what the manifest says of the refitted graph's largest value in a type of limited range."""
    entry = PRECISIONS[precision]
    if not entry.is_limited:
        return {}
    wide, kept = widened_graph(onnx.load_from_string(data), entry)
    found = find_headroom(wide, entry, kept, certifier.covering())
    require_headroom(found, entry, "export this checkpoint with")
    return {"headroom": found.describe()}


def _compared(data: bytes, network: nn.Module, precision: str, certifier: Certifier) -> list[Hop]:
    """Return the rows of the refitted graph, run in every way its precision can be on a CPU."""
    model = onnx.load_from_string(data)
    weights = [match_weights("refitted ONNX weights", model, network)] if precision == "fp32" else []
    hops = certifier.require_passed(weights)
    for name, runnable in ways_to_run(model, data, precision):
        step = "refitted ONNX" if precision == "fp32" else f"refitted {name}"
        hops += certifier.require(step, onnx_run(runnable), precision, "onnx")
    return hops


def _refitted(bundle: Bundle, name: str, named: dict[str, NDArray[Any]]) -> bytes:
    return refit_engine(name, bundle.read(bundle.artifact(name)), named)


def _renewed(  # noqa: PLR0913 - what a refit renews
    bundle: Bundle,
    trained: Trained,
    hops: list[Hop],
    contents: dict[str, bytes],
    seconds: dict[str, float],
    about: dict[str, Any],
) -> Bundle:
    """Return the bundle with new contents and a manifest that describes them; `about` is of the ONNX graph."""
    entries = {}
    for name, entry in bundle.manifest.artifacts.items():
        described = entry.model_dump() | describe_file(entry.path, contents[entry.path]).model_dump()
        if name == "onnx":
            described |= about
        if name in FLAVOURS:  # it holds now whatever was left out
            described["options"] = {**described["options"], "refittable": True, "strip_weights": False}
        entries[name] = ArtifactEntry.model_validate(described)
    engines = [NOT_RUN.format(name) for name in entries if name in FLAVOURS]
    notes = (*trained.notes, f"refitted from a bundle of {_origin(bundle)}", *engines)
    provenance = describe_provenance(trained, seconds) | {"merge": bundle.manifest.origin.merge}
    kept = {"engines": bundle.manifest.provenance["engines"]} if "engines" in bundle.manifest.provenance else {}
    update = {
        "artifacts": entries,
        "probe": describe_file(PROBE, contents[PROBE]),
        "certificate": tuple(hops),
        "provenance": provenance | kept,
        "notes": notes,
    }
    return Bundle(bundle.manifest.model_copy(update=update), contents=contents)


def _origin(bundle: Bundle) -> str:
    source = bundle.manifest.origin.checkpoint or CheckpointOrigin()
    return source.file
