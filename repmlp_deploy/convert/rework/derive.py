"""Origins: a bundle's certificate derived once more from the checkpoint that the bundle was made from.

A bundle is verified without torch against the outputs in its own probe. To check these too, go back to the checkpoint:
its hash must be the manifest's, the trained network must give the probe's outputs, merging and folding must leave no
more than rounding, and the artifacts must hold the weights that follow.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from repmlp_deploy.bundle import Bundle, Hop
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.graph.level_input import level_weights
from repmlp_deploy.convert.proof.algebra import compare_weights
from repmlp_deploy.convert.proof.certificate import Certifier, batch_sizes
from repmlp_deploy.convert.proof.probe import record_probe
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.rework.locate import float_probe, load_origin, merge_of
from repmlp_deploy.convert.source.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.source.own_network import fill_own_network
from repmlp_deploy.convert.source.state_dict import own_state_dict
from repmlp_deploy.convert.source.trained import Trained, load_trained
from repmlp_deploy.convert.step import Clock, Tell, tell_nobody
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import InputError, MissingDependency, VerificationError
from repmlp_deploy.runtime.tasks import find_task

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["derive_again"]


def derive_again(
    bundle: Bundle,
    checkpoint: str | Path,
    card: str | Path | ModelCard | None = None,
    module: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Hop], list[str]]:
    """Return the rows of every step from the checkpoint to the bundle's weights, and what could not be compared.

    Args:
        bundle: on disk.
        checkpoint: the file it was made of.
        card: see `load_origin`.
        module: see `load_origin`.
        progress: called with the name of every step as it begins.

    Raises:
        InputError: the bundle was made from no file, or of a network of the user's own without a `module`.
        BundleError: a file is not what was certified.
        VerificationError: the checkpoint is another one, or a step or a file is not what comes of it.
    """

    @contextlib.contextmanager
    def step(name: str) -> Iterator[Tell]:
        if progress is not None:
            progress(name)
        yield tell_nobody

    manifest = bundle.manifest
    trained = load_origin(bundle, _read_same_file(bundle, Path(checkpoint)), card, module)
    certifier, recorded = _certifier(bundle, trained, step)
    transformed = transform_and_prove(trained, manifest.graph, certifier, step, merge_of(bundle))
    hops, notes = [*certifier.floor_rows(), *recorded, *transformed.hops], []
    for name, entry in manifest.artifacts.items():
        if name == "onnx" and entry.precision == "fp32":
            hops += certifier.require_passed([_onnx_weights(bundle, trained, transformed.value.network)])
        elif name == "checkpoint" and bundle.folder is not None:
            bundle.read(entry)
            again = _read_again(bundle.folder / entry.path, trained, transformed.value.merged)
            rows = [compare_weights("checkpoint weights", again, transformed.value.merged)]
            hops += certifier.require_passed(rows)
        else:
            why = "nothing here reads them" if entry.precision == "fp32" else f"they are {entry.precision}, not float32"
            notes.append(f"the weights of {name} were not compared: {why}")
    return hops, notes


def _onnx_weights(bundle: Bundle, trained: Trained, network: nn.Module) -> Hop:
    """Return the row that compares the weights of the bundle's float32 graph with the network's."""
    graph, how = onnx.load_from_string(bundle.read(bundle.artifact("onnx"))), bundle.manifest.preprocessing
    of_levels = partial(level_weights, graph=graph, how=how) if how.input == "uint8" else None
    own = trained.interface is not None
    return match_weights("onnx weights", graph, network, own=own, exact=False, as_stored=of_levels)


def _read_again(path: Path, trained: Trained, merged: nn.Module) -> nn.Module:
    """Return the merged network with the weights of the bundle's checkpoint."""
    if trained.interface is None:
        return load_trained(path, trained.card, allow_merged=True).network
    network = copy.deepcopy(merged)
    state = own_state_dict(read_checkpoint(path).content, network.state_dict().keys(), name=str(path))
    fill_own_network(network, state.tensors, str(path))
    return network


def _read_same_file(bundle: Bundle, path: Path) -> Checkpoint:
    """Return the content of a file; raise unless the bundle was made from this very file."""
    name, source = bundle.manifest.name, bundle.manifest.origin.checkpoint
    if source is None:
        raise InputError(f"{name} was exported from a network in memory: there is no checkpoint to go back to")
    if not path.is_file():
        raise InputError(f"{path}: no such file")

    def check(digest: str) -> None:
        if digest != source.sha256:
            raise VerificationError(
                f"{path} has sha256 {digest[:16]}…; the bundle was made from {source.file} with "
                f"{source.sha256[:16]}…: give that file"
            )

    return read_checkpoint(path, check)


def _certifier(bundle: Bundle, trained: Trained, step: Clock) -> tuple[Certifier, list[Hop]]:
    """Return a certifier with the network's own outputs for the bundle's inputs, and the rows of the recorded ones.

    Raises:
        VerificationError: the outputs in the bundle differ from the network's.
    """
    manifest, recorded = bundle.manifest, float_probe(bundle)
    with step("probe"):
        again = record_probe(trained.network, recorded.inputs, *recorded.further_inputs)
    certifier = Certifier(
        again,
        batch_sizes(manifest.batch),
        class_axes=find_task(manifest.task).class_axes,
        outputs=[spec.name for spec in manifest.outputs],
        consequence="do not use this bundle",
    )
    references = [reference for reference, _ in again.outputs()]
    with step("verify probe"):
        if len(recorded.outputs()) != len(references):
            raise VerificationError(f"the probe has {len(recorded.outputs())} outputs; the network {len(references)}")
        known = [reference for reference, _ in recorded.outputs()]
        rounded = [float32 for _, float32 in recorded.outputs()]
        hops = certifier.require_outputs("recorded reference", known, references)
        hops += certifier.require_outputs("recorded float32", rounded, references)
    return certifier, hops
