"""`repmlp-doctor`: what this machine can run and build, with versions and remedies."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy import __version__
from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.capabilities import describe_cpu, find_capabilities, find_extras
from repmlp_deploy.cli.shared.console import print_json, print_line, print_table, run_command, typer
from repmlp_deploy.cli.shared.progress import progress
from repmlp_deploy.errors import installation_of
from repmlp_deploy.runtime.choice import CHOICES, measure_artifacts
from repmlp_deploy.runtime.predictor import Predictor

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(doctor_command)


def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(help="Also measure its artifacts, and say which of them runs here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List what this machine can run and build: runtimes, devices, instruction sets, GPUs, versions, remedies."""
    with progress(quiet=json) as show:
        show("importing every runtime")
        found = find_capabilities()
        if bundle is not None:
            show("measuring the artifacts")
        speeds = {} if bundle is None else _speeds(Bundle.load(bundle))
    cpu = describe_cpu()
    about = {"repmlp-deploy": __version__, "python": platform.python_version(), "platform": platform.platform(), **cpu}
    if json:
        listed = {"capabilities": [asdict(one) for one in found], "extras": [asdict(one) for one in find_extras()]}
        print_json({**about, **listed, **({} if bundle is None else {"bundle": speeds})})
        return
    print_line(f"repmlp-deploy {__version__}, Python {about['python']}, {about['platform']}")
    quota = "" if cpu["cpu_quota"] is None else f", a quota of {cpu['cpu_quota']:g} processors"
    print_line(f"{cpu['cpu']}: {cpu['cores_allowed']} of {cpu['cores']} cores allowed{quota}")
    print_line(f"instruction sets: {', '.join(cpu['instructions']) or 'none that the runtimes look for'}")
    rows = [("yes" if one.works else "no", one.name, one.details) for one in found]
    print_table("this machine can", ("", "do", "with, or what is missing"), rows, left=3)
    _print_extras()
    if bundle is not None:
        _print_speeds(speeds)


def _speeds(bundle: Bundle) -> dict[str, Any]:
    """Return milliseconds of the artifacts, and what `Predictor` opens, in its two modes."""
    artifacts = {name: speed.model_dump(mode="json") for name, speed in measure_artifacts(bundle).items()}
    said: dict[str, Any] = {"name": bundle.manifest.name, "artifacts": artifacts}
    with Predictor(bundle, streams="throughput") as predictor:
        said |= {"format": predictor.format, "device": predictor.device}
        return said | {key: predictor.details[key] for key in CHOICES if key in predictor.details}


def _print_speeds(speeds: dict[str, Any]) -> None:
    sizes = sorted({int(size) for speed in speeds["artifacts"].values() for size in speed["batch_ms"]})
    columns = ("artifact", "with", *(f"batch {size}" for size in sizes))
    rows = [
        (name, speed["runtime"], *(f"{ms:.3g} ms" for _, ms in sorted(speed["batch_ms"].items(), key=_by_size)))
        for name, speed in speeds["artifacts"].items()
    ]
    print_table(f"{speeds['name']} here", columns, rows, left=2)
    print_line(f"artifact: {speeds.get('chosen', speeds['format'])}")
    print_line(f"for throughput, inferences at a time: {speeds.get('streams_chosen', '1')}")


def _by_size(item: tuple[Any, float]) -> int:
    return int(item[0])


def _print_extras() -> None:
    rows = [
        ("no" if one.missing else "yes", one.name, one.purpose, ", ".join(one.missing) or "nothing")
        for one in find_extras()
    ]
    print_table("extras", ("", "extra", "for", "missing here"), rows, left=4)
    print_line(f"to add one, here timm: {installation_of('timm')}")
