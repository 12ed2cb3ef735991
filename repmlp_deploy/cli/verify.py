"""`repmlp-verify BUNDLE`: the certificate, and the same comparisons made again on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

from repmlp_deploy.bundle import Bundle, Hop
from repmlp_deploy.cli.shared.bundle_report import print_hops, print_verdict
from repmlp_deploy.cli.shared.console import print_json, print_line, run_command, typer
from repmlp_deploy.cli.shared.progress import progress
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.errors import InputError, MissingDevice, OutputError, VerificationError
from repmlp_deploy.files import write_named
from repmlp_deploy.reading import require_file
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
    card: Annotated[str | None, typer.Option(help="Its card, if models/ has none of the bundle's name.")] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Function that returns the network, if it is your own."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Name the first place where an artifact differs from --ckpt; for an engine, add --format."
        ),
    ] = False,
    engine_report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a script that compares every layer of an engine on its GPU, and stop."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check every file of a bundle, and compare its artifacts with the trained network's outputs again."""
    about = {"--ckpt": ckpt, "--card": card, "--module": module, "--device": device, "--threads": threads}
    _require_used({name for name, value in about.items() if value is not None}, engine_report, bisect=bisect)
    loaded = Bundle.load(bundle)
    if engine_report is not None:
        _write_engine_report(loaded, engine_report, artifact, as_json=json)
        return
    if bisect:
        _bisect(loaded, ckpt, card, module, artifact, as_json=json)
        return
    if ckpt is not None:
        require_file(ckpt, f"--ckpt {ckpt}")  # before anything is run, not after it
    hops, notes = recertify(loaded, artifact, RunnerOptions(device, threads))
    derived: list[Hop] = []
    if ckpt is not None:
        with progress(quiet=json) as show:
            show("loading PyTorch")
            from repmlp_deploy.convert.rework.derive import derive_again  # noqa: PLC0415 - torch, which the rest does without

            derived, remarks = derive_again(loaded, ckpt, card, module, show)
            notes += remarks
    verdicts = [hop.passed for hop in hops if hop.passed is not None]
    if json:
        lines = [[hop.model_dump(mode="json") for hop in part] for part in (hops, derived)]
        passed = all(verdicts) if verdicts else None
        print_json({"bundle": str(bundle), "passed": passed, "hops": lines[0], "derived": lines[1], "notes": notes})
    else:
        print_hops(f"{loaded.manifest.name}: certified on {loaded.manifest.origin.date}", loaded.manifest.certificate)
        print_verdict(loaded.manifest.verdict)
        print_hops("run again on this machine", hops)
        if ckpt is not None:
            print_hops(f"derived again from {ckpt}", derived)
        for note in notes:
            print_line(f"note: {note}")
    _require_verified(bundle, hops, notes)


def _require_used(given: set[str], engine_report: Path | None, *, bisect: bool) -> None:
    """Raise InputError where an option would say nothing."""
    if engine_report is not None and (given or bisect):
        unused = ", ".join(sorted(given | {"--bisect"} if bisect else given))
        raise InputError(f"--engine-report only writes a script: leave {unused} out")
    if bisect and given & {"--device", "--threads"}:
        raise InputError("--bisect knows where to run what: leave --device and --threads out")
    alone = sorted(given & {"--card", "--module"}) if "--ckpt" not in given else []
    if alone:
        raise InputError(f"{alone[0]} is about the checkpoint, and there is none: pass --ckpt FILE")


def _require_verified(bundle: Path, hops: Sequence[Hop], notes: Sequence[str]) -> None:
    """Raise unless an artifact ran and every row passed."""
    judged = [hop for hop in hops if hop.passed is not None]
    failed = next((hop for hop in judged if not hop.passed), None)
    if failed is not None:
        raise VerificationError(
            f"{failed.name} at batch {failed.batch} differs from the trained network by {failed.max_abs:.2e}; "
            f"{failed.allowed:.2e} is allowed: do not use this bundle on this machine"
        )
    if not judged:
        why = "; ".join(notes) or "it has none"
        raise MissingDevice(f"nothing is verified: no artifact of {bundle} ran on this machine ({why})")


def _write_engine_report(bundle: Bundle, path: Path, artifact: str | None, *, as_json: bool) -> None:
    """Write the script that compares an engine's layers, and print how to run it."""
    from repmlp_deploy.convert.rework.engine_report import engine_report  # noqa: PLC0415 - onnx, for this alone

    text = engine_report(bundle, artifact)
    try:
        write_named(path, text.encode())
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}") from None
    if as_json:
        print_json({"bundle": str(bundle.folder), "script": str(path)})
    else:
        how = f"python {quote(str(path))} {quote(str(bundle.folder))}"
        print_line(f"{path}: run `{how}` where the engine's GPU is; its first lines say what it needs")


def _bisect(  # noqa: PLR0913 - what to compare with what
    bundle: Bundle,
    checkpoint: Path | None,
    card: str | None,
    module: str | None,
    artifact: str | None,
    *,
    as_json: bool,
) -> None:
    """Report the first place where an artifact differs from the checkpoint."""
    if checkpoint is None:
        raise InputError("--bisect compares with the checkpoint: pass --ckpt FILE")
    from repmlp_deploy.convert.rework.locate import blame_bundle  # noqa: PLC0415 - torch, which verifying alone needs not

    found = blame_bundle(bundle, checkpoint, card, module, None if artifact is None else [artifact])
    blame, compared = found.blame, found.compared
    if as_json:
        told = None if blame is None else asdict(blame) | {"place": blame.place}
        about = {"bundle": str(bundle.folder), "passed": blame is None, "compared": compared, "blame": told}
        print_json(about | {"notes": found.notes})
    if blame is not None:
        where = f" in its {compared[-1]} artifact" if compared else ""
        raise VerificationError(f"{bundle.folder} differs from {checkpoint}{where}, {blame}")
    if not as_json:
        for name in compared:
            print_line(f"{bundle.folder}: the {name} artifact computes what {checkpoint} does, value by value")
        for note in found.notes:
            print_line(f"note: {note}")
