"""What other implementations call the weights of networks that timm has, too.

The weights are the same, so a checkpoint of such an implementation fills timm's network. Sources: the repositories of
RepVGG (DingXiaoH), MobileOne and FastViT (Apple), and mmpretrain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["NAMINGS", "Naming", "Renamed", "rename_weights"]


@dataclass(frozen=True)
class Naming:
    """The names in the state dicts of one implementation.

    Attributes:
        whose: the implementation, for people.
        anchor: a key that every network with branches has there.
        renames: (regular expression, timm's name for it), applied in order to the whole key.
        stages: whether stages are numbered through, with the layers between them, as in FastViT.
    """

    whose: str
    anchor: str
    renames: tuple[tuple[str, str], ...]
    stages: bool = False


@dataclass(frozen=True)
class Renamed:
    """Keys under timm's names.

    Attributes:
        whose: the implementation that the names were of.
        names: key to timm's name.
    """

    whose: str
    names: Mapping[str, str]


_MOST_COPIES = 4  # the weights, averaged ones, a teacher's: a file with more is no checkpoint
_DOWN = re.compile(r"network\.([0-9]{1,3})\.proj\.")
_LAYER = re.compile(r"network\.([0-9]{1,3})\.(proj\.|pe\.)?")

_STAGES = tuple((rf"^stage_?{n}\.", f"stages.{n - 1}.") for n in range(1, 5))
_OF_MOBILEONE = ((r"\brbr_conv\.", "conv_kxk."), (r"\brbr_scale\.", "conv_scale."), (r"\brbr_skip\.", "identity."))
_OF_AUTHORS = (
    (r"^stage0\.", "stem."),
    *_STAGES,
    (r"\brbr_dense\.", "conv_kxk."),
    (r"\brbr_1x1\.", "conv_1x1."),
    (r"\brbr_identity\.", "identity."),
    *_OF_MOBILEONE,
    (r"\bse\.(down|reduce)\.", "attn.fc1."),
    (r"\bse\.(up|expand)\.", "attn.fc2."),
    (r"^linear\.", "head.fc."),
)
_OF_MMPRETRAIN = (
    (r"^backbone\.", ""),
    (r"^(stem|stage0)\.", "stem."),
    *_STAGES,
    (r"\bbranch_3x3\.", "conv_kxk."),
    (r"\bbranch_1x1\.", "conv_1x1."),
    (r"\bbranch_conv_list\.", "conv_kxk."),
    (r"\bbranch_scale\.", "conv_scale."),
    (r"\bbranch_norm\.", "identity."),
    (r"\.norm\.", ".bn."),
    (r"\b(se|se_layer)\.conv([12])\.conv\.", r"attn.fc\2."),
)

NAMINGS = (
    Naming("the official RepVGG", "stage0.rbr_dense.conv.weight", _OF_AUTHORS),
    Naming("the official MobileOne", "stage0.rbr_conv.0.conv.weight", _OF_AUTHORS),
    Naming(
        "the official FastViT",
        "patch_embed.0.rbr_conv.0.conv.weight",
        (
            (r"^patch_embed\.", "stem."),
            *_OF_MOBILEONE,
            (r"^conv_exp\.", "final_conv."),
            (r"\blkb_origin\.", "large_conv."),
            (r"\bconvffn\.", "mlp."),
            (r"\bse\.reduce\.", "se.fc1."),
            (r"\bse\.expand\.", "se.fc2."),
            (r"\b(layer_scale(_[12])?)$", r"\1.gamma"),
            (r"^head\.", "head.fc."),
        ),
        stages=True,
    ),
    Naming("mmpretrain's RepVGG", "backbone.stem.branch_3x3.conv.weight", _OF_MMPRETRAIN),
    Naming("mmpretrain's MobileOne", "backbone.stage0.branch_conv_list.0.conv.weight", _OF_MMPRETRAIN),
)


def rename_weights(keys: Collection[str]) -> Renamed | None:
    """Return keys under timm's names, what stands before them unchanged; None if they are of no other implementation.

    Args:
        keys: of a state dict, without the parts of wrappers. Keys of other parts of the file keep their names.
    """
    for naming in NAMINGS:
        ends = (key for key in keys if key == naming.anchor or key.endswith(f".{naming.anchor}"))
        starts = sorted((key[: len(key) - len(naming.anchor)] for key in ends), key=len)[:_MOST_COPIES]
        if starts:
            return Renamed(naming.whose, _names(naming, keys, starts[::-1]))
    return None


def _names(naming: Naming, keys: Collection[str], starts: Sequence[str]) -> dict[str, str]:
    """Return key to timm's name, for what begins with one of the starts; the longest start comes first."""
    names: dict[str, str] = {}
    for start in starts:
        within = [key[len(start) :] for key in keys if key.startswith(start) and key not in names]
        downs = {int(found[1]) for key in within if (found := _DOWN.match(key))} if naming.stages else set()
        for key in within:
            names[start + key] = start + _renamed(key, naming, downs)
    return names


def _renamed(key: str, naming: Naming, downs: Collection[int]) -> str:
    """Return timm's name of a key; `downs` are the numbers of the layers that begin a stage with a smaller map."""
    for pattern, name in naming.renames:
        key = re.sub(pattern, name, key)
    layer = _LAYER.match(key) if naming.stages else None
    if layer is None:
        return key
    stage = sum(down <= int(layer[1]) for down in downs)
    part = {"proj.": "downsample.proj.", "pe.": "pos_emb.pos_enc."}.get(layer[2], "blocks.")
    return f"stages.{stage}.{part}{key[layer.end() :]}"
