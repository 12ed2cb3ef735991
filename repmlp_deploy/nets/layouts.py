"""Map the key names of other implementations to ours.

A layout is a list of (theirs, ours) pieces of keys. It works in both directions, so merged weights can be written back
under the names they came in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LAYOUTS", "OWN", "Layout", "odd_layer_number"]

_LAYER_NUMBER = re.compile("[0-9]{1,3}")


@dataclass(frozen=True)
class Layout:
    """The names that one implementation gives to a family's weights.

    Attributes:
        name: `official`, `mmpretrain`, or `own` for a network of this project.
        family: an entry of `nets.families.FAMILIES`.
        anchor: a key that every state dict of this layout has.
        renames: (theirs, ours), applied in order; reversed, they give back the file's names.
        without: no key begins with this; it tells apart two layouts with the same anchor.
        merged: the end of our key that only merged networks have.
        trained: the end of our key that only networks with branches have.
    """

    name: str
    family: str
    anchor: str
    renames: tuple[tuple[str, str], ...] = ()
    without: str = ""
    merged: str = "fc3.bias"
    trained: str = "fc3_bn.weight"

    def ours(self, key: str) -> str:
        """Return what our network calls `key`."""
        for theirs, ours in self.renames:
            key = key.replace(theirs, ours) if theirs.startswith(".") else _swap_start(key, theirs, ours)
        return key

    def theirs(self, key: str) -> str:
        """Return what this layout calls our `key`."""
        for theirs, ours in reversed(self.renames):
            key = key.replace(ours, theirs) if theirs.startswith(".") else _swap_start(key, ours, theirs)
        return key


_MMPRETRAIN_TRUNK = (
    ("patch_embed.projection.", "conv_embedding.conv."),
    ("patch_embed.norm.", "conv_embedding.bn."),
    ("stages.", "stages."),
    ("downsample_layers.", "embeds."),
    ("final_norm.", "head_norm."),
)
_MMPRETRAIN_UNIT = (
    (".gp.conv1.conv.", ".gp.fc1."),
    (".gp.conv2.conv.", ".gp.fc2."),
    (".norm1.", ".prebn1."),
    (".norm2.", ".prebn2."),
)

LAYOUTS = (
    Layout("official", "repmlpnet-backbone", "conv_embedding.conv.weight", without="head."),
    Layout("official", "repmlpnet", "conv_embedding.conv.weight"),
    Layout("official", "repmlp-resnet", "stage0.0.conv.weight"),
    Layout("own", "pure-mlp", "stages.0.0.repmlp.fc3.weight"),
    Layout(
        "mmpretrain",
        "repmlpnet",
        "backbone.patch_embed.projection.weight",
        (
            *((f"backbone.{theirs}", ours) for theirs, ours in _MMPRETRAIN_TRUNK),
            ("head.fc.", "head."),
            *_MMPRETRAIN_UNIT,
        ),
    ),
    Layout(
        "mmpretrain",
        "repmlpnet-backbone",
        "patch_embed.projection.weight",
        (*_MMPRETRAIN_TRUNK, *_MMPRETRAIN_UNIT),
    ),
    Layout("own", "pspnet", "backbone.conv_embedding.conv.weight"),
    Layout("own", "mobilefacenet", "gdc.conv.weight"),
)

OWN = Layout("own", "custom", "")
"""A user's network: its names are its own."""


def odd_layer_number(key: str) -> str | None:
    """Return the part of a key that is a number and of no layer: families count stages and units from such parts."""
    numbers = (part for part in key.split(".") if part.isnumeric() or part.startswith("-"))
    return next((part for part in numbers if not _LAYER_NUMBER.fullmatch(part)), None)


def _swap_start(key: str, start: str, replacement: str) -> str:
    return replacement + key.removeprefix(start) if key.startswith(start) else key
