"""`repmlp-map BUNDLE --data IMAGES --out FILE.parquet`: predictions for any number of images."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.console import INTERRUPTED, print_json, print_line, print_warnings, run_command, typer
from repmlp_deploy.cli.shared.progress import counting
from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.evaluation.mapping import Engine, map_images
from repmlp_deploy.evaluation.sources import open_source
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.text import printable

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(map_command)


def map_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    data: Annotated[str, typer.Option(help="A folder, a glob, a list of paths, a tar, parquet or Arrow file.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write.")],
    column: Annotated[
        str | None, typer.Option(help="Column of a table with images or paths; default: image, bytes or path.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a batch; default: the bundle's best.")] = None,
    top: Annotated[int, typer.Option(help="Classes that a row names.")] = 5,
    engine: Annotated[str, typer.Option(help="local: this process; ray: actors, on RAY_ADDRESS or here.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Actors of Ray; default: what its CPUs or GPUs allow.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again, whatever an earlier run has done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """Write predictions for any number of images to a parquet file; a stopped run goes on."""
    for option, value in (("--batch", batch), ("--top", top), ("--workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}; it must be at least 1")
    made = _engine(engine, workers, device, threads)
    loaded = Bundle.load(bundle)
    print_warnings(loaded.manifest.warnings)
    source = open_source(data, column)
    started = time.monotonic()
    try:
        with (
            Predictor(loaded, format=format_, device=device, threads=threads, check=True) as predictor,
            counting() as count,
            redirect_stdout(sys.stderr),  # Ray prints what its processes suffer
        ):

            def show(done: int, total: int, errors: int) -> None:
                count(done, total, f"{errors} errors")

            found = map_images(predictor, source, out, top=top, batch=batch, fresh=fresh, progress=show, engine=made)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same command again to go on\n")
        raise typer.Exit(INTERRUPTED) from None
    seconds = round(time.monotonic() - started, 3)
    if json:
        counts = {"count": found.count, "resumed": found.resumed, "errors": found.errors, "seconds": seconds}
        print_json({"bundle": str(bundle), "data": data, "out": str(out), **counts})
        return
    print_line(f"{out}: {found.count} images, {found.resumed} of them from an earlier run, {seconds:.1f} s")
    if found.errors:
        print_line(f"note: {found.errors} have no prediction; the column error says why")


def _engine(name: str, workers: int | None, device: str | None, threads: int | None) -> Engine | None:
    """Return the engine of this name; None is this process.

    Raises:
        InputError: there is none, or it has no workers.
        MissingDependency: it is `ray`, which is not installed.
    """
    if name == "ray":
        with optional_imports():
            from repmlp_deploy.evaluation.ray_engine import Actors  # noqa: PLC0415 - needs the extra `ray`
        gpus = 0 if device in {None, "cpu"} else 1
        return Actors(device=device, threads=threads or 1, gpus=gpus, count=workers)
    if name != "local":
        raise InputError(f"--engine is {printable(name)}; expected local or ray")
    if workers is not None:
        raise InputError("--workers is for --engine ray; the local engine is one process: leave it out")
    return None
