"""Rederiving: the way from a checkpoint to a bundle's artifacts gone again, to find where the two part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bundle import Bundle, Probe
from repmlp_deploy.card import ModelCard, list_cards
from repmlp_deploy.convert.diagnosis.bisect import GraphValues
from repmlp_deploy.convert.diagnosis.blame import Blame, blame_network
from repmlp_deploy.convert.diagnosis.level_values import LevelValues
from repmlp_deploy.convert.diagnosis.values import Values, first_difference
from repmlp_deploy.convert.graph.emulate import emulate
from repmlp_deploy.convert.graph.export import TRACED, trace_network
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.options import MERGES, require_choice
from repmlp_deploy.convert.proof.certificate import batch_sizes
from repmlp_deploy.convert.proof.probe import record_probe
from repmlp_deploy.convert.rework.marked_engine import compute_in_engine
from repmlp_deploy.convert.source.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.source.own_network import FAMILY, inputs_as_passed
from repmlp_deploy.convert.source.trained import SourceRequest, Trained, find_interface, load_own, load_trained
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import BundleError, InputError, MissingDependency, VerificationError
from repmlp_deploy.numerics import allowed_error, compare, noise_floor
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.images import normalised
from repmlp_deploy.text import printable

__all__ = ["BISECTED", "Bisection", "blame_bundle", "float_probe", "load_origin", "merge_of"]

Open = Callable[[Bundle], Values]


@dataclass(frozen=True)
class Bisection:
    """What bisecting a bundle found.

    Attributes:
        blame: the first place that differs; None if there is none.
        compared: the artifacts that were compared value by value, the one that differs last.
        notes: what was not compared, and why.
    """

    blame: Blame | None
    compared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def blame_bundle(
    bundle: Bundle,
    checkpoint: str | Path,
    card: str | Path | ModelCard | None = None,
    module: str | None = None,
    artifacts: Sequence[str] | None = None,
) -> Bisection:
    """Find the first place where a bundle differs from a checkpoint.

    The network is merged, folded and traced again, each step judged by itself; then every artifact is compared with
    the trace value by value, and at last the probe with the trained network. A weight that is wrong in an artifact is
    put into the network that was made again, which tells the branch of a block that its values miss.

    Args:
        bundle: on disk.
        checkpoint: what it was made from.
        card: see `load_origin`.
        module: see `load_origin`.
        artifacts: which to compare, of `BISECTED`; by default the bundle's that need no GPU and no package that is
            missing here.

    Raises:
        InputError: the network is the user's own, and `module` does not say how it is built.
        CheckpointError: the checkpoint is none of this network.
        BundleError: a file is not what was certified, or there is no such artifact.
        MissingDependency: the runtime of an artifact is not installed.
        MissingDevice: an engine is to be bisected, and there is no GPU.
    """
    opened, notes = _opened(bundle, artifacts)
    probe, how = float_probe(bundle), bundle.manifest.preprocessing
    trained = load_origin(bundle, checkpoint, card, module)
    inputs = [probe.inputs, *probe.further_inputs]
    form = transform_and_prove(trained, bundle.manifest.graph, merge=merge_of(bundle)).value
    for made in [form.merged] if bundle.manifest.graph == "merged" else [form.merged, form.network]:
        blame = None if trained.merged else blame_network(trained.network, made, inputs)
        if blame is not None:
            return Bisection(blame, notes=notes)
    served = bundle.manifest.batch
    traced = trace_network(
        form.network, find_interface(trained).examples, served if served.min == served.max else TRACED
    )
    further = set() if served.min == served.max else {TRACED.opt}
    batches = [probe.batches(size)[0] for size in sorted({*batch_sizes(served), *further})]
    compared: tuple[str, ...] = ()
    for name, values in opened.items():
        compared += (name,)
        values = LevelValues(values, how, traced.program) if how.input == "uint8" else values  # noqa: PLW2901 - the same values
        blame = first_difference(values, traced.program, batches)
        if blame is not None:
            known = None if trained.merged else _with_branch(blame, values, trained.network, form.network, inputs)
            return Bisection(known or blame, compared, notes)
    return Bisection(next(_wrong_references(bundle, trained), None), compared, notes)


def _open_graph(bundle: Bundle) -> Values:
    entry = bundle.artifact("onnx")
    data = bundle.read(entry)
    if not PRECISIONS[entry.precision].runs_on_cpu:
        data = serialize_model(emulate(onnx.load_model_from_string(data), entry.precision))
    return GraphValues(data, entry.precision)


def _open_ir(bundle: Bundle) -> Values:
    from repmlp_deploy.convert.diagnosis.bisect_ir import ModelValues  # noqa: PLC0415 - openvino, for its artifacts alone

    entry = bundle.artifact("openvino")
    if len(entry.companions) != 1:
        raise BundleError(f"{entry.path} comes with {len(entry.companions)} files; expected one, of weights")
    return ModelValues((bundle.read(entry), bundle.read(entry.companions[0])), entry.precision)


def _open_engine(name: str, bundle: Bundle) -> Values:
    entry = bundle.artifact("onnx")
    bundle.artifact(name)
    return GraphValues(bundle.read(entry), entry.precision, compute_in_engine(name, bundle))


BISECTED: dict[str, Open] = {
    "onnx": _open_graph,
    "openvino": _open_ir,
    "trt": partial(_open_engine, "trt"),
    "trt-rtx": partial(_open_engine, "trt-rtx"),
}
"""Format to how the values of a bundle's artifact are read."""

_WITHOUT_GPU = ("onnx", "openvino")


def _opened(bundle: Bundle, artifacts: Sequence[str] | None) -> tuple[dict[str, Values], tuple[str, ...]]:
    """Open the artifacts to compare; return them, and why others are not."""
    for name in artifacts or ():
        require_choice("--format", name, tuple(BISECTED))
    if artifacts is not None:
        return {name: BISECTED[name](bundle) for name in artifacts}, ()
    opened, missing = {}, []
    for name in [name for name in _WITHOUT_GPU if name in bundle.manifest.artifacts]:
        try:
            opened[name] = BISECTED[name](bundle)
        except MissingDependency as error:
            missing.append(error)
    if missing and not opened:
        raise missing[0]
    if not opened:
        has = ", ".join(bundle.manifest.artifacts)
        raise BundleError(f"{bundle.folder} has no {' or '.join(_WITHOUT_GPU)} artifact to bisect; it has {has}")
    return opened, tuple(f"not compared: {error}" for error in missing)


@torch.no_grad()
def _with_branch(
    blame: Blame, values: Values, trained: nn.Module, network: nn.Module, inputs: Sequence[NDArray[Any]]
) -> Blame | None:
    """Return the blame with the branch that a wrong weight is about; None if it cannot be told."""
    stored = None if blame.element is None else values.stored(blame.element.name)
    if blame.element is None or stored is None:
        return None
    patched = copy.deepcopy(network)
    weight = dict(patched.state_dict())[blame.element.name]
    weight.copy_(torch.from_numpy(stored.copy()).reshape(weight.shape))
    found = blame_network(trained, patched, inputs)
    if found is None or found.block != blame.block or not found.fault:
        return None
    return replace(blame, part=found.part, fault=found.fault)


def load_origin(
    bundle: Bundle,
    checkpoint: str | Path | Checkpoint,
    card: str | Path | ModelCard | None = None,
    module: str | None = None,
) -> Trained:
    """Load the trained network of a bundle from the checkpoint.

    Args:
        bundle: says the network's name and input size, and which weights of the file it was made of.
        checkpoint: the file, or what was read from it. In any other than the bundle's own, the usual weights are taken.
        card: by default the one in `models/` of the bundle's name; where there is none, it is inferred.
        module: `package.module:factory` of the network, if it is the user's own.

    Raises:
        InputError: the network is the user's own, and `module` does not say how it is built.
        CheckpointError: the checkpoint is none of this network.
    """
    manifest = bundle.manifest
    own = manifest.family == FAMILY or module is not None
    if own and module is None and not manifest.origin.model:
        raise InputError(
            f"{manifest.name} is a network of your own, and a checkpoint alone does not say how it is built: "
            "pass --module PACKAGE.MODULE:FACTORY"
        )
    read = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    if own:
        return _load_own_origin(bundle, read, module)
    if card is None and manifest.name in list_cards():
        card = manifest.name
    height, width = manifest.image_size
    size = None if card is not None or height is None or width is None else (height, width)
    state_key, ignore = _as_exported(bundle, read)
    return load_trained(
        read, card, state_key=state_key, ignore=ignore, input_size=size, size_is_sure=True, allow_merged=True
    )


def _as_exported(bundle: Bundle, checkpoint: Checkpoint) -> tuple[str | None, tuple[str, ...]]:
    """Return which weights of a file were exported, and the keys that were left out, if the bundle is made of it."""
    source = bundle.manifest.origin.checkpoint
    if source is None or checkpoint.sha256 != source.sha256:
        return None, ()
    return source.container, source.ignored


def _load_own_origin(bundle: Bundle, checkpoint: Checkpoint, module: str | None) -> Trained:
    """Load a user's own network, called as the bundle's inputs are."""
    manifest = bundle.manifest
    model = manifest.origin.model or None
    probe = float_probe(bundle)
    inputs = [torch.from_numpy(values[:1].copy()) for values in (probe.inputs, *probe.further_inputs)]
    named = dict(zip([spec.name for spec in manifest.inputs], inputs, strict=True))
    state_key, ignore = _as_exported(bundle, checkpoint)
    request = SourceRequest(
        module=module,
        model=model if module is None else None,
        example_for=partial(inputs_as_passed, inputs=named, by_name=manifest.origin.by_name),
        state_key=state_key,
        ignore=ignore,
        allow_merged=True,
    )
    return load_own(checkpoint, request)


def float_probe(bundle: Bundle) -> Probe:
    """Return a bundle's probe with the inputs that the trained network takes."""
    probe, how = bundle.probe(), bundle.manifest.preprocessing
    return replace(probe, inputs=normalised(probe.inputs, how)) if how.input == "uint8" else probe


def merge_of(bundle: Bundle) -> str:
    """Return how a bundle's network was merged.

    Raises:
        InputError: by a function that the manifest names. A file must not choose code that runs here.
    """
    merge = bundle.manifest.origin.merge
    if merge not in MERGES:
        raise InputError(
            f"{bundle.manifest.name} was merged by {printable(merge)}, which a bundle cannot make run here: "
            "export the checkpoint again and compare the results"
        )
    return merge


def _wrong_references(bundle: Bundle, trained: Trained) -> Iterator[Blame]:
    """Yield one blame for every reference of the probe that the trained network does not give."""
    probe = float_probe(bundle)
    again = record_probe(trained.network, probe.inputs, *probe.further_inputs)
    for (reference, _), (expected, float32) in zip(probe.outputs(), again.outputs(), strict=True):
        floor = noise_floor(float32, expected)
        try:
            error = compare(reference, expected, classes=False).max_abs
        except VerificationError as failure:
            yield Blame("probe", "", str(failure))
            continue
        if not error <= allowed_error("fp32", floor):
            worst = np.unravel_index(np.abs(reference - expected).argmax(), expected.shape)
            where = ", ".join(str(int(i)) for i in worst)
            fault = (
                f"its reference is not the checkpoint's: [{where}] is {reference[worst]:.6g}, not {expected[worst]:.6g}"
            )
            yield Blame("probe", "", fault, error, floor)
