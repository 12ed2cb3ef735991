"""Rederiving: the way from a checkpoint to a bundle's ONNX artifact gone again, to find where the two part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.card import ModelCard, list_cards
from repmlp_deploy.convert.diagnosis.bisect import blame_graph
from repmlp_deploy.convert.diagnosis.blame import Blame, blame_network
from repmlp_deploy.convert.graph.export import TRACED, trace_network
from repmlp_deploy.convert.proof.certificate import batch_sizes
from repmlp_deploy.convert.proof.probe import record_probe
from repmlp_deploy.convert.source.own_network import FAMILY
from repmlp_deploy.convert.source.trained import Trained, find_interface, load_trained
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.numerics import allowed_error, compare, noise_floor

__all__ = ["blame_bundle", "load_origin"]

ARTIFACT = "onnx"


def blame_bundle(bundle: Bundle, checkpoint: str | Path, card: str | Path | ModelCard | None = None) -> Blame | None:
    """Return the first place where a bundle differs from a checkpoint; None if it does not.

    The network is merged, folded and traced again, each step judged by itself; then the artifact is compared with the
    trace value by value, and at last the probe with the trained network.

    Args:
        bundle: on disk, with an ONNX artifact.
        checkpoint: what it was made from.
        card: see `load_origin`.

    Raises:
        InputError: the network is the user's own, which a checkpoint alone does not tell.
        CheckpointError: the checkpoint is none of this network.
        BundleError: a file is not what was certified, or there is no ONNX artifact.
    """
    entry = bundle.artifact(ARTIFACT)
    data = bundle.read(entry)
    probe = bundle.probe()
    trained = load_origin(bundle, checkpoint, card)
    inputs = [probe.inputs, *probe.further_inputs]
    form = transform_and_prove(trained, bundle.manifest.graph).value
    for made in [form.merged] if bundle.manifest.graph == "merged" else [form.merged, form.network]:
        blame = None if trained.merged else blame_network(trained.network, made, inputs)
        if blame is not None:
            return blame
    served = bundle.manifest.batch
    traced = trace_network(
        form.network, find_interface(trained).examples, served if served.min == served.max else TRACED
    )
    further = set() if served.min == served.max else {TRACED.opt}
    batches = [probe.batches(size)[0] for size in sorted({*batch_sizes(served), *further})]
    blame = blame_graph(traced.program, data, batches, entry.precision)
    return blame or next(_wrong_references(bundle, trained), None)


def load_origin(bundle: Bundle, checkpoint: str | Path, card: str | Path | ModelCard | None = None) -> Trained:
    """Load the trained network of a bundle from the checkpoint.

    Args:
        bundle: says the network's name, input size and which of several weights.
        checkpoint: the file.
        card: by default the one in `models/` of the bundle's name; where there is none, it is inferred.

    Raises:
        InputError: the network is the user's own.
        CheckpointError: the checkpoint is none of this network.
    """
    manifest = bundle.manifest
    if manifest.family == FAMILY:
        raise InputError(f"{manifest.name} is a network of your own: a checkpoint alone does not say how it is built")
    source = manifest.origin.checkpoint
    weights = "ema" if source is not None and "ema" in source.container else None
    if card is None and manifest.name in list_cards():
        card = manifest.name
    height, width = manifest.input.shape[2:]
    size = None if card is not None or height is None or width is None else (height, width)
    return load_trained(checkpoint, card, weights=weights, input_size=size, allow_merged=True)


def _wrong_references(bundle: Bundle, trained: Trained) -> Iterator[Blame]:
    """Yield one blame for every reference of the probe that the trained network does not give."""
    probe = bundle.probe()
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
