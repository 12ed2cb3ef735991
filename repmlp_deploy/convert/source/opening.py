"""The way in: which network the weights are for, where nothing was said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from repmlp_deploy.card import load_card
from repmlp_deploy.convert.source.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.source.state_dict import find_other_family
from repmlp_deploy.convert.source.trained import SourceRequest, Trained, load_own, take_trained
from repmlp_deploy.errors import CheckpointError, MissingDependency

__all__ = ["open_source"]


def open_source(source: nn.Module | str | Path | Checkpoint, said: SourceRequest) -> Trained:
    """Take the trained network: of a family, of timm, or of the user's own.

    A file alone is enough if names and shapes tell the network: one of RepMLP, or one of the other families in timm.

    Args:
        source: a network, a weights file, or what was read from it.
        said: what was said of it.

    Raises:
        InputError: see `take_trained` and `load_own`.
        CheckpointError: likewise; or the family is one of timm's, and no network of timm has these shapes.
        MissingDependency: the family is one of timm's, and timm or what it needs is not installed.
    """
    if said.module is not None or said.model is not None or said.example_input is not None:
        return load_own(source, said)
    if isinstance(source, nn.Module):
        return take_trained(source, said)
    if isinstance(said.card, str | Path):
        said = replace(said, card=load_card(said.card))  # before the file, which may be large
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    model = _model_of_timm(checkpoint, said)
    if model is None:
        return take_trained(checkpoint, said)
    trained = load_own(checkpoint, replace(said, model=model))
    return replace(trained, notes=(f"recognised as {model} by names and shapes", *trained.notes))


def _model_of_timm(checkpoint: Checkpoint, said: SourceRequest) -> str | None:
    """Return `timm:NAME[,key=value…]` of the network that the weights fit; None if they are of no family of timm's.

    Raises:
        CheckpointError: they fit none, or several.
        MissingDependency: timm or what it needs is not installed.
    """
    name = str(checkpoint.path)
    found = find_other_family(
        checkpoint.content, weights=said.weights, state_key=said.state_key, ignore=said.ignore, name=name
    )
    if found is None or not found[0].timm:
        return None
    family, shapes = found
    try:
        from repmlp_deploy.convert.source.other_families.timm_network import fitting_models  # noqa: PLC0415 - timm
    except MissingDependency as error:
        raise error.needed_by(f"{name} looks like {family}, and timm has the network") from None
    fitting = fitting_models(shapes, family.timm)
    if not fitting:
        raise CheckpointError(f"{name} looks like {family}, and fits no {family.timm} of timm: {family.remedy}")
    if len(fitting) > 1:
        raise CheckpointError(f"{name} fits {' and '.join(fitting)}: say which with --model")
    return fitting[0]
