"""The options of `repmlp-export`, each with its help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from repmlp_deploy.cli.shared.console import typer
from repmlp_deploy.convert.formats import FORMATS
from repmlp_deploy.convert.options import CALIBRATION_METHODS, DEFAULT_METHOD, DEFAULT_OPSET, ENOUGH_SAMPLES, OPSETS
from repmlp_deploy.precision import PRECISIONS

Checkpoint = Annotated[Path, typer.Option(help="Training-time checkpoint: .pth, .pt or .safetensors.")]
Module = Annotated[
    str | None,
    typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Function that returns the network, if it is your own."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="timm:NAME[,KEY=VALUE…]",
        help="The network of timm that the weights are for, if names and shapes do not tell it.",
    ),
]
Card = Annotated[str | None, typer.Option(help="Card in models/ or path of one; default: inferred.")]
InputSize = Annotated[str | None, typer.Option(metavar="HxW", help="Input size, if keys and shapes do not tell it.")]
Formats = Annotated[str, typer.Option("--format", help=f"Comma-separated: {', '.join(FORMATS)}.")]
Graph = Annotated[str, typer.Option(help="folded, or merged: the same as upstream's own merge.")]
Merge = Annotated[
    str,
    typer.Option(
        metavar="auto|blocks|regions|hooks|PACKAGE:FUNCTION",
        help="auto: all; blocks: RepMLP's alone; regions: the rest alone; hooks: as its package does.",
    ),
]
Input = Annotated[
    str, typer.Option("--input", help="float32: normalised; uint8: (N, H, W, C) levels, which the graph normalises.")
]
Precision = Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]
Batch = Annotated[
    str, typer.Option(metavar="MIN:OPT:MAX[,…]", help="Batch sizes to serve, or one; several: engine profiles.")
]
Opset = Annotated[
    int | None,
    typer.Option(
        help=f"ONNX opset, {OPSETS[0]} to {OPSETS[-1]}; default {DEFAULT_OPSET}, or what the precision needs."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="DIR|FILE.npz", help=f"Images or arrays for int8, fp8, fp16; {ENOUGH_SAMPLES} or more."),
]
CalibrationMethod = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(CALIBRATION_METHODS)}; default {DEFAULT_METHOD}.")
]
KeepFp32 = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Modules that stay in fp32, such as stages.0.*; repeatable.")
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Also measure the error of lowering each block alone; slow.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(metavar="POINTS", help="Points of top-1 on --eval that int8 may lose; blocks return to fp32 for it."),
]
Eval = Annotated[
    Path | None, typer.Option("--eval", metavar="FOLDER", help="Labelled images for --max-drop, as repmlp-eval reads.")
]
Weights = Annotated[str | None, typer.Option(help="model or ema, if the file has both.")]
StateKey = Annotated[
    str | None, typer.Option(metavar="PATH", help="Where the weights are in the file, such as ema.state_dict.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Keys to leave out, such as head.*; repeatable.")
]
Out = Annotated[Path | None, typer.Option(help="The bundle; default artifacts/<name>-<precision>.")]
AllowMerged = Annotated[bool, typer.Option("--allow-merged", help="Accept a merged checkpoint; proof starts there.")]
Details = Annotated[bool, typer.Option("--details", help="Print every comparison, and all the notes.")]
Json = Annotated[bool, typer.Option("--json", help="The report as one JSON object on stdout.")]
