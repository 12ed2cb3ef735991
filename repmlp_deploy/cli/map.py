"""`repmlp-map BUNDLE --data IMAGES --out FILE.parquet`: predictions for any number of images."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.console import print_json, print_line, print_warnings, run_command, typer
from repmlp_deploy.cli.shared.progress import counting
from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.evaluation.mapping import Engine, map_images
from repmlp_deploy.evaluation.process_engine import Processes
from repmlp_deploy.evaluation.sources import open_source
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.text import printable

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(map_command)


def map_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    data: Annotated[str, typer.Option(help="A folder, glob, list of paths, tar, parquet or Arrow file; or a URI.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write.")],
    column: Annotated[
        str | None, typer.Option(help="Column of a table with images or paths; default: image, bytes or path.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per batch; default: the bundle's best.")] = None,
    top: Annotated[int, typer.Option(help="Number of classes in a row.")] = 5,
    engine: Annotated[
        str, typer.Option(help="local: processes on this machine; ray: actors, on RAY_ADDRESS or here.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Number of processes or actors; default: one per CPU, or per GPU of Ray.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; discard what an earlier run has done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write predictions for any number of images to a parquet file; the same command continues a stopped run."""
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
                count(done, total, f"{errors} new errors")

            found = map_images(predictor, source, out, top=top, batch=batch, fresh=fresh, progress=show, engine=made)
    except KeyboardInterrupt:
        sys.stderr.write("note: run the same command again to go on\n")
        raise
    seconds = round(time.monotonic() - started, 3)
    if json:
        about = {"bundle": str(bundle), "data": data, "out": str(out)}
        print_json({**about, **asdict(found), "seconds": seconds})
        return
    print_line(f"{out}: {found.count} images, {found.resumed} of them from an earlier run, {seconds:.1f} s")
    if found.errors:
        new = "" if found.new_errors == found.errors else f", {found.new_errors} of them new"
        print_line(f"note: {found.errors} without a prediction{new}; the column error says why")


def _engine(name: str, workers: int | None, device: str | None, threads: int | None) -> Engine | None:
    """Return the engine of this name; None is this process alone.

    Raises:
        InputError: there is none.
        MissingDependency: it is `ray`, which is not installed.
    """
    on_cpu = device in {None, "cpu"}
    if name == "ray":
        with optional_imports():
            from repmlp_deploy.evaluation.ray_engine import Actors  # noqa: PLC0415 - needs the extra `ray`
        return Actors(device=device, threads=threads or 1, gpus=0 if on_cpu else 1, count=workers)
    if name != "local":
        raise InputError(f"--engine is {printable(name)}; expected local or ray")
    return Processes(device=device, threads=threads or 1, count=workers) if on_cpu or workers is not None else None
