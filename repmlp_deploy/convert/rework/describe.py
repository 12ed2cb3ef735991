"""Describe a checkpoint: its architecture, or what its names say and what could be merged in its network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repmlp_deploy.convert.reparam.hooks import hooks_in
from repmlp_deploy.convert.reparam.regions import merge_regions
from repmlp_deploy.convert.source.checkpoint import read_checkpoint
from repmlp_deploy.convert.source.containers import select_weights
from repmlp_deploy.convert.source.other_families import recognise_family
from repmlp_deploy.convert.source.trained import Trained, find_interface
from repmlp_deploy.errors import RepMLPError
from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.families import card_spec
from repmlp_deploy.nets.foreign import adopt_blocks

__all__ = ["describe_names", "describe_trained"]

_UNKNOWN = "none that is known by its names"


def describe_trained(trained: Trained) -> dict[str, Any]:
    """Describe a network and its weights file for people."""
    return _describe_family(trained) if trained.interface is None else _describe_network(trained)


def _describe_family(trained: Trained) -> dict[str, Any]:
    """Describe a network of a family: file, layout, architecture, parameters."""
    if trained.checkpoint is None or trained.state is None:
        raise AssertionError("a file that was loaded has both")
    return {
        "kind": "checkpoint",
        "sha256": trained.checkpoint.sha256,
        "layout": trained.state.layout.name,
        "container": trained.state.container,
        "prefix": trained.state.prefix,
        "also holds": list(trained.state.others),
        "state": "merged" if trained.merged else "trained",
        "card": trained.card.name,
        "family": trained.card.family,
        **card_spec(trained.card).model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "warnings": list(trained.warnings),
        "notes": list(trained.notes),
    }


def _describe_network(trained: Trained) -> dict[str, Any]:
    """Describe a network of no family: its recognised family, its hooks, and what merging by structure would do."""
    network, state, checkpoint = trained.network, trained.state, trained.checkpoint
    blocks = adopt_blocks(network, confirm=False)
    try:
        report = merge_regions(network, find_interface(trained).examples).report
        merged, regions = report.summary(), [str(region) for region in report.regions]
    except (RepMLPError, ValueError) as error:
        merged, regions = f"not known: {error}", []
    return {
        "kind": "checkpoint",
        "sha256": "" if checkpoint is None else checkpoint.sha256,
        "container": "" if state is None else state.container,
        "prefix": "" if state is None else state.prefix,
        "also holds": [] if state is None else list(state.others),
        "card": trained.card.name,
        "model": trained.model or "",
        "family": str(recognise_family(network.state_dict()) or _UNKNOWN),
        "task": trained.card.task,
        "input_size": list(trained.card.input_size),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "BatchNorms": sum(isinstance(module, BatchNorm) for module in network.modules()),
        "RepMLP blocks": len(blocks),
        "hooks": [f"{name} of {count} modules" for name, count in hooks_in(network).items()],
        "could be merged": merged,
        "regions": regions,
        "warnings": list(trained.warnings),
        "notes": list(trained.notes),
    }


def describe_names(path: Path, weights: str | None = None, state_key: str | None = None) -> dict[str, Any] | None:
    """Describe a checkpoint of another family by its keys alone; None if they are of no family that is known.

    Raises:
        CheckpointError: the file is damaged or unsafe, or holds no state dict.
    """
    checkpoint = read_checkpoint(path)
    selected = select_weights(checkpoint.content, weights, str(path), state_key)
    found = recognise_family(selected.found)
    if found is None:
        return None
    notes: Sequence[str] = (
        f"to export it: {found.remedy}",
        "what can be merged is found in the network itself: name it here as well to see that",
    )
    return {
        "kind": "checkpoint",
        "sha256": checkpoint.sha256,
        "container": selected.path,
        "also holds": list(selected.others),
        "family": str(found),
        "state": "trained" if found.blocks else "merged",
        "BatchNorms": sum(key.endswith("running_mean") for key in selected.found),
        "warnings": [],
        "notes": list(notes if found.blocks else notes[:1]),
    }
