"""`repmlp-pack BUNDLE --layout triton|ovms|kserve --out DIR`: a model repository for another server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from repmlp_deploy.bundle import Bundle, Manifest
from repmlp_deploy.cli.shared.console import print_json, print_line, print_warnings, run_command, typer
from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.repository import LAYOUTS, Choice, ImageStep, find_layout, write_packed

__all__ = ["main"]

_TAKEN_BY = {"--max-delay-ms": ("triton", "kserve"), "--storage": ("kserve",)}
_DELAY_MS = 2.0


def main() -> None:
    """Run the command of this process."""
    run_command(pack_command)


def pack_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    layout: Annotated[str, typer.Option(help=f"The server: {', '.join(LAYOUTS)}.")],
    out: Annotated[Path, typer.Option(help="The repository; other models in it stay as they are.")],
    artifact: Annotated[str | None, typer.Option("--format", help="Artifact; default: the server's first.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the bundle's.")] = None,
    model_version: Annotated[int, typer.Option(help="Version of the model, a positive number.")] = 1,
    max_delay_ms: Annotated[
        float | None, typer.Option(help="Triton, KServe: how long a request may wait to fill a batch; default 2.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URI", help="KServe: where the cluster finds the repository, such as pvc://models."),
    ] = None,
    preprocess: Annotated[
        bool,
        typer.Option(
            "--preprocess",
            help="Triton, KServe: also write an ensemble that takes decoded images; needs the extra export.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Pack a bundle's verified artifact for Triton, OpenVINO Model Server or KServe."""
    found = find_layout(layout)
    for option, value in (("--max-delay-ms", max_delay_ms), ("--storage", storage)):
        if value is not None and layout not in _TAKEN_BY[option]:
            raise InputError(
                f"{option} says nothing to {found.server}: it is for --layout {' or '.join(_TAKEN_BY[option])}"
            )
    delay = _DELAY_MS if max_delay_ms is None else max_delay_ms
    loaded = Bundle.load(bundle)
    print_warnings(loaded.manifest.warnings)
    images = _image_step(loaded.manifest) if preprocess else None
    packed = found.pack(Choice(loaded, artifact, name, model_version, delay, storage, images))
    write_packed(packed, out)
    if json:
        about = {"out": str(out), "layout": layout, "model": packed.model, "version": packed.version}
        print_json({**about, "files": sorted(packed.files), "unchecked": list(packed.unchecked)})
        return
    for path in sorted(packed.files):
        print_line(f"{out / path}: {len(packed.files[path]) / 1e3:,.1f} kB")
    for what in packed.unchecked:
        print_line(f"not checked here: {what}")
    print_line(f"{out}: version {packed.version} of {packed.model} for {found.server}")


def _image_step(manifest: Manifest) -> ImageStep:
    """Return the bundle's preprocessing as a graph.

    Raises:
        InputError: it has none for images, or none that a graph can be.
    """
    from repmlp_deploy.convert.graph.image_input import preprocessing_graph  # noqa: PLC0415 - onnx, for this alone

    if len(manifest.inputs) > 1:
        raise InputError(f"{manifest.name} takes {len(manifest.inputs)} tensors: --preprocess is for one image")
    graph, image, tensor = preprocessing_graph(manifest.preprocessing, manifest.input)
    return ImageStep(graph.SerializeToString(), image, tensor)
