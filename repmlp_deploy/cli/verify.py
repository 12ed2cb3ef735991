"""`repmlp-verify BUNDLE`: the certificate, and the same comparisons made again on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from repmlp_deploy.bundle import Bundle, Hop
from repmlp_deploy.cli.export import print_hops, print_verdict
from repmlp_deploy.cli.shared.console import print_json, print_line, progress, run_command, typer
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(verify_command)


def verify_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    artifact: Annotated[str | None, typer.Option("--format", help="One artifact; default: all that run here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    ckpt: Annotated[Path | None, typer.Option(help="The checkpoint that the bundle was made from.")] = None,
    card: Annotated[str | None, typer.Option(help="Its card, where the bundle's name is none in models/.")] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Name the first place that differs from --ckpt.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """Check every file of a bundle, and compare its artifacts with the trained network's outputs again."""
    loaded = Bundle.load(bundle)
    if bisect:
        _bisect(loaded, ckpt, card, as_json=json)
        return
    hops, notes = recertify(loaded, artifact, RunnerOptions(device, threads))
    derived: list[Hop] = []
    if ckpt is not None:
        with progress(quiet=json) as show:
            show("loading PyTorch")
            from repmlp_deploy.convert.rework.derive import derive_again  # noqa: PLC0415 - torch, which the rest does without

            derived, remarks = derive_again(loaded, ckpt, card, show)
            notes += remarks
    failed = [hop for hop in hops if hop.passed is False]
    if json:
        lines = [[hop.model_dump(mode="json") for hop in part] for part in (hops, derived)]
        print_json({"bundle": str(bundle), "passed": not failed, "hops": lines[0], "derived": lines[1], "notes": notes})
    else:
        print_hops(f"{loaded.manifest.name}: certified on {loaded.manifest.origin.date}", loaded.manifest.certificate)
        print_verdict(loaded.manifest.verdict)
        print_hops("run again on this machine", hops)
        if ckpt is not None:
            print_hops(f"derived again from {ckpt}", derived)
        for note in notes:
            print_line(f"note: {note}")
    if failed:
        raise VerificationError(
            f"{failed[0].name} at batch {failed[0].batch} differs from the trained network by {failed[0].max_abs:.2e}; "
            f"{failed[0].allowed:.2e} is allowed: do not use this bundle on this machine"
        )


def _bisect(bundle: Bundle, checkpoint: Path | None, card: str | None, *, as_json: bool) -> None:
    """Report the first place where the ONNX artifact differs from the checkpoint."""
    if checkpoint is None:
        raise InputError("--bisect compares with the checkpoint: pass --ckpt FILE")
    from repmlp_deploy.convert.rework.locate import blame_bundle  # noqa: PLC0415 - torch, which verifying alone needs not

    blame = blame_bundle(bundle, checkpoint, card)
    if as_json:
        found = None if blame is None else asdict(blame) | {"place": blame.place}
        print_json({"bundle": str(bundle.folder), "passed": blame is None, "blame": found})
    if blame is not None:
        raise VerificationError(f"{bundle.folder} differs from {checkpoint}, {blame}")
    if not as_json:
        print_line(f"{bundle.folder} computes what {checkpoint} does, value by value")
