"""`repmlp-doctor`: what this machine can run and build, with versions and remedies."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Annotated

from repmlp_deploy import __version__
from repmlp_deploy.cli.shared.capabilities import describe_cpu, find_capabilities
from repmlp_deploy.cli.shared.console import print_json, print_line, print_table, run_command, typer
from repmlp_deploy.cli.shared.progress import progress

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(doctor_command)


def doctor_command(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """List what this machine can run and build: runtimes, devices, instruction sets, GPUs, versions, remedies."""
    with progress(quiet=json) as show:
        show("importing every runtime")
        found = find_capabilities()
    cpu = describe_cpu()
    about = {"repmlp-deploy": __version__, "python": platform.python_version(), "platform": platform.platform(), **cpu}
    if json:
        print_json({**about, "capabilities": [asdict(capability) for capability in found]})
        return
    print_line(f"repmlp-deploy {__version__}, Python {about['python']}, {about['platform']}")
    quota = "" if cpu["cpu_quota"] is None else f", a quota of {cpu['cpu_quota']:g} processors"
    print_line(f"{cpu['cpu']}: {cpu['cores_allowed']} of {cpu['cores']} cores allowed{quota}")
    print_line(f"instruction sets: {', '.join(cpu['instructions']) or 'none that the runtimes look for'}")
    rows = [("yes" if one.works else "no", one.name, one.details) for one in found]
    print_table("this machine can", ("", "do", "with, or what is missing"), rows, left=3)
