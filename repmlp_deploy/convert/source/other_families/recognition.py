"""Other re-parameterizable families, recognised by the names in their checkpoints.

Names only suggest a family: they say what to build the network with. What can be merged is found in the traced graph of
the network itself, whatever its parts are called.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repmlp_deploy.errors import InputError

__all__ = ["OtherFamily", "notes_on_merged", "recognise_family"]


@dataclass(frozen=True)
class OtherFamily:
    """A family of networks that merge.

    Attributes:
        name: for people.
        blocks: how many blocks with branches the checkpoint has; 0 if it is merged already.
        merged: how many blocks are merged already.
        timm: the pattern, as in a shell, of the names that timm gives to networks of this family; empty if it has none.
    """

    name: str
    blocks: int
    merged: int
    timm: str = ""

    @property
    def remedy(self) -> str:
        """What to pass to export it."""
        if not self.blocks:
            return "its branches are gone: give the training-time checkpoint"
        return f"{_MODULE}, or --model timm:NAME for a network of timm" if self.timm else _MODULE

    def __str__(self) -> str:
        found = f"{self.blocks} blocks with branches" if self.blocks else f"{self.merged} merged blocks"
        return f"{self.name}, {found}"


_MODULE = "pass --module PACKAGE.MODULE:FACTORY"
_BRANCHED = (
    ("UniRepLKNet", r"origin_bn\.weight", ""),
    ("FastViT, official", r"token_mixer\.mixer\.rbr_conv\.0\.conv\.weight", "fastvit_*"),
    ("RepLKNet", r"lkb_origin\.conv\.weight", ""),
    ("diverse branch blocks (DBB)", r"dbb_origin\.conv\.weight", ""),
    ("ACNet", r"square_conv\.weight", ""),
    ("RepConv of YOLO", r"rbr_dense\.0\.weight", ""),
    ("MobileOne, official", r"rbr_conv\.0\.conv\.weight", "mobileone_*"),
    ("RepVGG, official", r"rbr_dense\.conv\.weight", "repvgg_*"),
    ("MobileOne of mmpretrain", r"branch_conv_list\.0\.norm\.weight", "mobileone_*"),
    ("RepVGG of mmpretrain", r"branch_3x3\.norm\.weight", "repvgg_*"),
    ("RepViT, official", r"token_mixer\.0\.conv\.c\.weight", ""),
    ("FastViT of timm", r"token_mixer\.mixer\.conv_kxk\.0\.conv\.weight", "fastvit_*"),
    ("GhostNetV3 of timm", r"primary_rpr_conv\.0\.\w+\.weight", "ghostnetv3_*"),
    ("RepGhostNet of timm", r"ghost1\.fusion_bn\.0\.weight", "repghostnet_*"),
    ("MobileOne of timm", r"conv_kxk\.0\.conv\.weight", "mobileone_*"),
    ("RepViT of timm", r"token_mixer\.conv\.c\.weight", "repvit_*"),
    ("RepVGG of timm", r"conv_kxk\.conv\.weight", "repvgg_*"),
)
"""Name, the end of a key that every block with branches has, timm's names of such networks; the special ones first."""
_FUSED = r"fused_conv\.bias"
_MERGED = (
    ("UniRepLKNet", r"lk_origin\.bias"),
    ("FastViT", r"token_mixer\.reparam_conv\.bias"),
    ("RepLKNet", r"lkb_reparam\.bias"),
    ("diverse branch blocks (DBB)", r"dbb_reparam\.bias"),
    ("ACNet", _FUSED),
    ("RepVGG or RepConv", r"rbr_reparam\.bias"),
    ("MobileOne or RepVGG of mmpretrain", r"branch_reparam\.bias"),
    ("MobileOne or RepVGG", r"reparam_conv\.bias"),
)
"""Name, the end of a key that every merged block has: of its convolution, whose bias the BatchNorms became."""


def recognise_family(keys: Iterable[str]) -> OtherFamily | None:
    """Return the family whose names are among the keys of a state dict; None if there is none."""
    given = list(keys)
    for name, end, timm in _BRANCHED:
        branched = len(_blocks(given, end))
        if branched:
            return OtherFamily(name, branched, 0, timm)
    normed = sorted(key for key in given if key.endswith(".running_mean"))
    fuller = sorted(key for key in given if ".fused_conv." not in f".{key}")
    for name, end in _MERGED:
        blocks = _blocks(given, end)
        # Beside a BatchNorm, a block has branches of names unknown here; and many networks have a fused_conv.
        merged = sum(not (_has(block, normed) or (end == _FUSED and _has(block, fuller))) for block in blocks)
        if merged:
            return OtherFamily(name, 0, merged)
    return None


def notes_on_merged(keys: Iterable[str], name: str, *, allow_merged: bool) -> tuple[str, ...]:
    """Return what to say of a network if its blocks are merged already.

    Args:
        keys: of its state dict.
        name: what messages call it.
        allow_merged: the merged network may take the trained one's place.

    Raises:
        InputError: it is merged, and that is not allowed.
    """
    family = recognise_family(keys)
    if family is None or family.blocks:
        return ()
    if not allow_merged:
        raise InputError(
            f"{name} is merged already ({family}), so its equality with the trained network cannot be proved: give the "
            "training-time checkpoint and network, or pass --allow-merged to prove equality with the merged one"
        )
    return (f"the branches are merged already ({family}): the reference is the merged network, not the trained one",)


def _blocks(keys: Iterable[str], end: str) -> set[str]:
    """Return the names of the modules with a key of this end."""
    pattern = re.compile(rf"(?:(.*)\.)?{end}")
    return {match[1] or "" for match in map(pattern.fullmatch, keys) if match}


def _has(block: str, ordered: Sequence[str]) -> bool:
    """Return whether a module has one of the keys, which are sorted; the network itself is the empty name."""
    start = f"{block}." if block else ""
    place = bisect_left(ordered, start)
    return place < len(ordered) and ordered[place].startswith(start)
