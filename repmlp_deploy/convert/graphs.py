"""From the network to the ONNX graphs that artifacts are made of: exported, simplified, in its precision.

Each graph is compared with the trained network before the next one is made of it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import onnx
from torch import nn

import repmlp_deploy
from repmlp_deploy.bundle import Hop
from repmlp_deploy.card import Preprocessing, load_labels
from repmlp_deploy.convert.diagnosis.bisect import blame_graph
from repmlp_deploy.convert.diagnosis.blame import Blame, blamed, describe_blame
from repmlp_deploy.convert.diagnosis.places import describe_place, place_of
from repmlp_deploy.convert.graph.calibrate import measure_ranges
from repmlp_deploy.convert.graph.export import (
    TRACED,
    Traced,
    export_graph,
    trace_network,
    with_metadata,
    with_symbolic_batch,
)
from repmlp_deploy.convert.graph.headroom import MARGIN, Headroom, find_headroom
from repmlp_deploy.convert.graph.level_input import with_level_input
from repmlp_deploy.convert.graph.lowering.lower import Lowered, blocks_of, product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.run import onnx_run, ways_to_run
from repmlp_deploy.convert.graph.simplify import SimplificationFailed, Simplifier, simplifier_started, simplify_graph
from repmlp_deploy.convert.job import Graphs, Job
from repmlp_deploy.convert.step import Step
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.precision import PRECISIONS, Precision

__all__ = ["may_trace_fixed", "require_headroom", "trace_for", "verified_graphs"]

Find = Callable[..., Blame | None]
"""Bytes of a graph, and its precision if that is not fp32, to the first place where it differs from the trace."""


@dataclass(frozen=True)
class _Exported:
    """A graph as it was exported, in a temporary file to save memory.

    Attributes:
        file: its bytes.
        sha256: of them.
        find: names the first fault in a graph made of it.
    """

    file: BinaryIO
    sha256: str
    find: Find

    def content(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


def may_trace_fixed(job: Job, *, program_is_kept: bool) -> bool:
    """Return whether to trace a fixed batch first, which takes half the time, although several sizes are served.

    Args:
        job: of the export. Upstream's own form names its batch, so it is excluded.
        program_is_kept: whether the traced program is an artifact itself.
    """
    return job.request.fixed_batch is None and job.request.graph == "folded" and not program_is_kept


def trace_for(job: Job, network: nn.Module, *, fixed: bool) -> Traced:
    """Return the traced network, for a fixed batch or for all that are served."""
    with job.clock("trace"):
        return trace_network(network, job.interface.examples, TRACED if fixed else job.request.batch)


def verified_graphs(  # noqa: PLR0913 - what is exported, and in which forms
    job: Job, network: nn.Module, traced: Traced, *, fixed: bool, needs: Collection[str], served: Job
) -> Step[Graphs]:
    """Return the graphs that formats need, verified.

    Args:
        job: of the export.
        network: float32, for the comparison of weights.
        traced: of `network`.
        fixed: whether it was traced for a fixed batch.
        served: the job with the inputs that the artifacts take, which may be uint8 images; else `job` itself.
        needs: `fp32` if a format needs the float32 graph, `lowered` if one needs the precision that was asked for.

    Raises:
        VerificationError: a graph differs from the trained network.
    """
    precision = job.request.precision
    with simplifier_started() as simplifier, tempfile.TemporaryFile(prefix="repmlp-exported-") as file:
        exported = _exported_in_some_way(job, network, traced, file, fixed=fixed)
        simplified = _simplified(job, network, exported.value, simplifier)
        data = simplified.value if simplified.value is not None else exported.value.content()
    digests = {"exported": exported.value.sha256}
    if simplified.value is not None:
        digests["simplified"] = hashlib.sha256(data).hexdigest()
    hops, notes, find = (*exported.hops, *simplified.hops), simplified.notes, exported.value.find
    if served is not job:
        levels = _with_levels(served, data)
        data, find = levels.value, _find_nothing  # the trace takes other inputs
        digests["uint8 input"] = hashlib.sha256(data).hexdigest()
        hops, notes = (*hops, *levels.hops), (*notes, *levels.notes)
    about: dict[str, Any] = {"opset": job.request.opset}
    if precision == "fp32":
        return Step(Graphs(data, data, about, digests), hops, notes)
    if "lowered" not in needs:
        return Step(Graphs(data, None, about, digests), hops, notes)
    low = _lowered(served, data, find)
    content, more = low.value
    return Step(Graphs(data if "fp32" in needs else None, content, about | more, digests), (*hops, *low.hops), notes)


def _with_levels(job: Job, data: bytes) -> Step[bytes]:
    """Return the graph that takes uint8 images and normalises them, serialized."""
    with job.clock("uint8 input"):
        model, how = with_level_input(onnx.load_from_string(data), job.preprocessing)
        levels = serialize_model(with_metadata(model, _metadata(job, job.preprocessing)))
        del model
    with job.clock("verify uint8 input"):
        hops = job.certifier.require("uint8 input, ONNX", onnx_run(levels), artifact="onnx")
    return Step(levels, tuple(hops), (how,))


def _find_nothing(*_: Any, **__: Any) -> Blame | None:
    return None


def _exported_in_some_way(
    job: Job, network: nn.Module, traced: Traced, file: BinaryIO, *, fixed: bool
) -> Step[_Exported]:
    """Return the exported graph; trace again with a symbolic batch if a fixed one stayed in the graph."""
    if not fixed:
        return _exported(job, network, traced, file)
    try:
        return _exported(job, network, traced, file, fixed=True)
    except VerificationError:  # the network's own code names the batch it was traced with
        with job.clock("trace again"):
            traced = trace_network(network, job.interface.examples, job.request.batch)
    return _exported(job, network, traced, file)


def _exported(job: Job, network: nn.Module, traced: Traced, file: BinaryIO, *, fixed: bool = False) -> Step[_Exported]:
    interface, certifier = job.interface, job.certifier
    with job.clock("export"):
        model = export_graph(
            traced,
            input_names=interface.inputs,
            output_names=interface.outputs,
            optimize=not fixed or traced.needs_folding,
            opset=job.request.opset,
        )
        model = with_symbolic_batch(model) if job.request.fixed_batch is None else model
        model = with_metadata(model, _metadata(job, job.trained.card.preprocessing))
        data = serialize_model(model)
        del model  # before a runtime takes its own copies
    find = partial(blame_graph, traced.program, batches=certifier.batches(*([TRACED.opt] if fixed else [])))
    with job.clock("verify exported"), nullcontext() if fixed else blamed(partial(find, data)):
        hops = certifier.require("exported ONNX", onnx_run(data), artifact="onnx")
    with job.clock("verify weights"), blamed(partial(find, data)):
        weights = job.match_weights("exported ONNX weights", onnx.load_from_string(data), network)
        hops += certifier.require_passed([weights])
    file.write(data)
    return Step(_Exported(file, hashlib.sha256(data).hexdigest(), find), tuple(hops))


def _simplified(job: Job, network: nn.Module, exported: _Exported, simplifier: Simplifier) -> Step[bytes | None]:
    """Return the simplified graph, serialized; None, with a note, if onnxsim failed or changed the output."""
    with job.clock("simplify"):
        try:
            simplified = simplify_graph(onnx.load_from_string(exported.content()), simplifier)
        except SimplificationFailed as error:
            return Step(None, notes=(f"not simplified: {error}",))
        data = serialize_model(simplified)
        try:
            weights = job.match_weights("simplified ONNX weights", simplified, network)
            del simplified  # before a runtime takes its own copies
            hops = [*job.certifier.measure("simplified ONNX", onnx_run(data), "fp32", "onnx"), weights]
        except (VerificationError, InputError) as error:
            said = str(error)
        else:
            failed = next((hop for hop in hops if not hop.passed), None)
            if failed is None:
                return Step(data, tuple(hops))
            said = _what_changed(failed)
        return Step(None, notes=(f"not simplified: {said}; {describe_blame(partial(exported.find, data))}",))


def _what_changed(failed: Hop) -> str:
    what = "the output" if failed.kind == "output" else f"a weight ({failed.note})"
    return f"onnxsim changed {what} by {failed.max_abs:.2e}"


def _lowered(job: Job, data: bytes, find: Find) -> Step[tuple[bytes, dict[str, Any]]]:
    """Return the graph in the precision that was asked for, serialized, and what the manifest says of it."""
    request, precision = job.request, job.request.precision
    model = onnx.load_from_string(data)
    ranges = None
    about: dict[str, Any] = {}
    if job.samples is not None and PRECISIONS[precision].needs_calibration:
        with job.clock("calibrate") as tell:
            tensors, fixed = product_tensors(model), request.fixed_batch or 1
            ranges = measure_ranges(data, job.samples, tensors, request.low.method, tell, batch=fixed)
        about = {"calibration": {"method": request.low.method, "samples": len(job.samples)}}
    with job.clock(precision):
        lowered = set_precision(model, precision, ranges=ranges, keep_fp32=request.low.keep_fp32)
        data = serialize_model(lowered.model)
    about |= _headroom(job, model, lowered)
    hops: list[Hop] = []
    with job.clock(f"verify {precision}"):
        for name, runnable in ways_to_run(lowered.model, data, precision):
            with blamed(partial(find, runnable, precision=precision)):
                hops += job.certifier.require(name, onnx_run(runnable), precision, "onnx")
    if request.low.sensitivity:
        with job.clock("sensitivity"):
            about["sensitivity"] = _sensitivity(job, model, ranges)
    about |= {"opset": lowered.model.opset_import[0].version} | lowered.describe()
    return Step((data, about), tuple(hops))


def _headroom(job: Job, model: onnx.ModelProto, lowered: Lowered) -> dict[str, Any]:
    """Return what the manifest says of the largest value in a type of limited range; nothing for other types.

    Raises:
        VerificationError: a value is beyond the range, or so near that another input may be.
    """
    entry = PRECISIONS[job.request.precision]
    if not entry.is_limited:
        return {}
    batches = job.certifier.covering()
    with job.clock("headroom"):
        if job.samples is not None:
            size = len(batches[0][0])
            batches += job.samples.batches(size)
        found = find_headroom(model, entry, {kept.node for kept in lowered.kept}, batches)
    require_headroom(found, entry)
    return {"headroom": found.describe()}


def require_headroom(found: Headroom, entry: Precision, remedy: str = "pass") -> None:
    """Return if the largest value has room in its type.

    Args:
        found: the largest value, or the first without room.
        entry: the precision of the type.
        remedy: how the option that keeps a block in float32 is given, before its name.

    Raises:
        VerificationError: it has not.
    """
    if found.is_enough:
        return
    block, part = place_of(found.module)
    instead = f", or use {entry.wider}" if entry.wider else ""
    raise VerificationError(
        f"{entry.name} has no room for this network: first at {describe_place(block, part)}: {found.node} reaches "
        f"{found.largest:.3g}; {entry.element} ends at {found.end:g}, and a margin of {MARGIN:g} is kept for unseen "
        f"inputs: nothing was written; {remedy} --keep-fp32 '{block or found.module}*'{instead}"
    )


def _sensitivity(job: Job, model: onnx.ModelProto, ranges: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """Return the error of lowering only one block, for every block, the worst first."""
    precision = job.request.precision
    blocks = blocks_of(model)
    found = []
    for block in blocks:
        others = [name for other, names in blocks.items() if other != block for name in names]
        alone = set_precision(model, precision, ranges=ranges, keep_fp32=others).model
        *_, (_, runnable) = ways_to_run(alone, serialize_model(alone), precision)
        hops = job.certifier.measure(block, onnx_run(runnable), precision)
        worst = max(hops, key=lambda hop: hop.max_abs)
        found.append({"block": block, "max_abs": worst.max_abs, "between": worst.between})
    return sorted(found, key=lambda line: -line["max_abs"])


def _metadata(job: Job, preprocessing: Preprocessing) -> dict[str, object]:
    """Return what the graph says of itself, for tools that see it alone."""
    trained = job.trained
    labels = load_labels(trained.card)
    return {
        "name": trained.card.name,
        "family": trained.card.family,
        "task": trained.card.task,
        "preprocessing": preprocessing.model_dump(mode="json"),
        "labels": list(labels) if labels is not None else [],
        **({} if trained.card.scores is None else {"scores": trained.card.scores}),
        "batch": job.request.batch.model_dump(),
        "checkpoint_sha256": trained.checkpoint.sha256 if trained.checkpoint is not None else "",
        "repmlp_deploy": repmlp_deploy.__version__,
    }
