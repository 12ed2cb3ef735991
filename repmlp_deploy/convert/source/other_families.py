"""Other re-parameterizable families, recognised by the names in their checkpoints.

Names only suggest a family: they say what to build the network with. What can be merged is found in the traced graph of
the network itself, whatever its parts are called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["OtherFamily", "recognise_family"]


@dataclass(frozen=True)
class OtherFamily:
    """A family of networks that merge.

    Attributes:
        name: for people.
        blocks: how many blocks with branches the checkpoint has; 0 if it is merged already.
        merged: how many blocks are merged already.
        remedy: what to pass to export it.
    """

    name: str
    blocks: int
    merged: int
    remedy: str

    def __str__(self) -> str:
        found = f"{self.blocks} blocks with branches" if self.blocks else f"{self.merged} merged blocks"
        return f"{self.name}, {found}"


_TIMM = "pass --model timm:NAME"
_MODULE = "pass --module PACKAGE.MODULE:FACTORY"
_FAMILIES = (
    ("UniRepLKNet", r"lk_origin\.weight", r"$.", _MODULE),
    ("RepLKNet", r"lkb_origin\.conv\.weight", r"lkb_reparam\.weight", _MODULE),
    ("diverse branch blocks (DBB)", r"dbb_origin\.conv\.weight", r"dbb_reparam\.weight", _MODULE),
    ("ACNet", r"square_conv\.weight", r"fused_conv\.weight", _MODULE),
    ("RepConv of YOLO", r"rbr_dense\.0\.weight", r"rbr_reparam\.weight", _MODULE),
    ("MobileOne, official", r"rbr_conv\.0\.conv\.weight", r"reparam_conv\.weight", _MODULE),
    ("RepVGG, official", r"rbr_dense\.conv\.weight", r"rbr_reparam\.weight", _MODULE),
    ("FastViT of timm", r"token_mixer\.mixer\.conv_kxk\.0\.conv\.weight", r"token_mixer\.reparam_conv\.weight", _TIMM),
    ("GhostNetV3 of timm", r"primary_rpr_conv\.0\.\w+\.weight", r"$.", _TIMM),
    ("RepGhostNet of timm", r"ghost1\.fusion_bn\.0\.weight", r"$.", _TIMM),
    ("MobileOne of timm", r"conv_kxk\.0\.conv\.weight", r"reparam_conv\.weight", _TIMM),
    ("RepViT of timm", r"token_mixer\.conv\.c\.weight", r"$.", _TIMM),
    ("RepVGG of timm", r"conv_kxk\.conv\.weight", r"reparam_conv\.weight", _TIMM),
)
"""Name, the end of a key that every block with branches has, that of a merged one, remedy; the special ones first."""


def recognise_family(keys: Iterable[str]) -> OtherFamily | None:
    """Return the family whose names are among the keys of a state dict; None if there is none."""
    given = list(keys)
    for name, branched, merged, remedy in _FAMILIES:
        blocks = _count(given, branched)
        if blocks:
            return OtherFamily(name, blocks, _count(given, merged), remedy)
    for name, _, merged, _ in _FAMILIES:
        blocks = _count(given, merged)
        if blocks:
            remedy = "its branches are gone: give the training-time checkpoint"
            return OtherFamily(name.partition(",")[0], 0, blocks, remedy)
    return None


def _count(keys: list[str], end: str) -> int:
    pattern = re.compile(rf"(^|\.){end}$")
    return sum(bool(pattern.search(key)) for key in keys)
