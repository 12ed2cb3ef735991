"""The pipeline: the only place that knows the order of the steps. Files are written once, at the end.

    checkpoint → trained → probe → merged → folded → traced → graph → simplified → engine → bundle

Every value is compared with the probe, that is with the trained network, before the next step uses it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import io
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from torch import nn

import repmlp_deploy
from repmlp_deploy.bundle import (
    PROBE,
    ArtifactEntry,
    BatchRange,
    Bundle,
    FileEntry,
    Manifest,
    Probe,
    TensorSpec,
    check_output_folder,
)
from repmlp_deploy.card import ModelCard, load_card, load_labels
from repmlp_deploy.convert.certifying import Certifier, Run, batch_sizes
from repmlp_deploy.convert.checkpoint import Checkpoint, read_checkpoint
from repmlp_deploy.convert.engine import FLAVOURS, build_engine, check_flavour
from repmlp_deploy.convert.folding import fold_affine
from repmlp_deploy.convert.layouts import StateDict, find_state_dict, own_state_dict, to_layout
from repmlp_deploy.convert.loading import infer_card, load_network
from repmlp_deploy.convert.merging import has_branches, merge_branches, upstream_form
from repmlp_deploy.convert.onnx_export import Traced, export_graph, trace_network, with_metadata
from repmlp_deploy.convert.onnx_proto import serialize_model
from repmlp_deploy.convert.options import GRAPHS, parse_batch, parse_formats, require_choice
from repmlp_deploy.convert.own_network import (
    Interface,
    default_card,
    describe_interface,
    fill_own_network,
    make_own_network,
)
from repmlp_deploy.convert.probing import SAMPLES, SEED, probe_like, record_probe, run_network
from repmlp_deploy.convert.simplifying import SimplificationFailed, simplify_graph
from repmlp_deploy.errors import CheckpointError, InputError, VerificationError
from repmlp_deploy.nets.families import FAMILIES, card_spec
from repmlp_deploy.nets.flat import Flat
from repmlp_deploy.numerics import TOLERANCES
from repmlp_deploy.runtime.onnx_runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Trained", "describe_checkpoint", "export", "load_trained"]

INPUT = "images"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A network with its weights, and where they came from.

    Attributes:
        network: evaluation mode, float32.
        card: what it is.
        checkpoint: the file; None for a network that was handed over in memory.
        state: the file's state dict and its layout; None likewise.
        merged: whether its branches are merged already.
        notes: what a reader of the report should know.
        interface: how it is called, for a network that no family describes.
    """

    network: nn.Module
    card: ModelCard
    checkpoint: Checkpoint | None = None
    state: StateDict | None = None
    merged: bool = False
    notes: tuple[str, ...] = ()
    interface: Interface | None = None


def load_trained(
    path: str | Path,
    card: str | Path | ModelCard | None = None,
    *,
    weights: str | None = None,
    input_size: tuple[int, int] | None = None,
    allow_merged: bool = False,
) -> Trained:
    """The trained network in a checkpoint of any layout.

    Args:
        path: `.pth`, `.pt` or `.safetensors`.
        card: a card, or the name or path of one; by default it is inferred from keys and shapes.
        weights: `model` or `ema`, where a file holds both; by default `model`.
        input_size: (H, W), where keys and shapes cannot tell it.
        allow_merged: accept a checkpoint whose branches are merged already. Nothing can be proved about the trained
            network then; the merged one takes its place.

    Raises:
        CheckpointError: the file is damaged, unsafe, of no network we know, or does not fit the card.
        CardError: the card is wrong.
    """
    given = card if card is None or isinstance(card, ModelCard) else load_card(card)
    checkpoint = read_checkpoint(path)
    name = str(path)
    state = find_state_dict(checkpoint.content, weights=weights, name=name)
    notes = []
    if state.merged:
        if not allow_merged:
            raise CheckpointError(
                f"{name} is merged already, so its equality with the trained network cannot be proved: give the "
                "training-time checkpoint, or pass --allow-merged to prove equality with the merged one"
            )
        notes.append("the checkpoint is merged already: the reference is the merged network, not the trained one")
    if given is None:
        given, remark = infer_card(
            state.shapes(),
            family=state.layout.family,
            layout=state.layout.name,
            merged=state.merged,
            input_size=input_size,
            name=Path(path).stem,
        )
        notes.append(remark)
    elif given.family != state.layout.family:
        raise CheckpointError(f"{name} is a {state.layout.family}; the card {given.name} describes a {given.family}")
    if input_size is not None and input_size != given.input_size:
        raise InputError(
            f"--input-size {input_size[0]}x{input_size[1]} contradicts {given.name}, "
            f"which takes {given.input_size[0]}x{given.input_size[1]}"
        )
    if state.others:
        notes.append(f"the file also holds {', '.join(state.others)}; used: {state.container or 'its top level'}")
    network = load_network(state.tensors, given, merged=state.merged, name=name)
    return Trained(network, given, checkpoint, state, state.merged, tuple(notes))


def export(  # noqa: PLR0913 - one a command-line option
    model_or_checkpoint: nn.Module | str | Path,
    *,
    module: str | None = None,
    example_input: Any = None,
    card: str | Path | ModelCard | None = None,
    formats: str | Sequence[str] = ("onnx",),
    graph: str = "folded",
    precision: str = "fp32",
    batch: str | int | BatchRange = "1:8:64",
    weights: str | None = None,
    input_size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    allow_merged: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Merge, prove, export: a bundle on disk whose every artifact was compared with the trained network.

    Args:
        model_or_checkpoint: a weights file; a network of `get_model`; or, with `example_input`, any module that
            contains RepMLP blocks, ours, official or mmpretrain's. Its other parts, inputs and outputs are its own.
        module: `package.module:factory` of the network that the weights file is for, where that is no family's.
        example_input: a tensor, a sequence of them by position or a mapping of them by name, whose first axis is the
            batch; by default the network's own attribute `example_input`, or images of `input_size`.
        card: see `load_trained`; for a network that is no family's, only what it says of images, labels and the name.
        formats: of `FORMATS`, as a sequence or comma-separated.
        graph: `folded`, or `merged` for what upstream's own merge leaves.
        precision: of the graph; a row of `numerics.TOLERANCES`.
        batch: sizes to serve, `MIN:OPT:MAX`, or one that is fixed.
        weights: see `load_trained`.
        input_size: see `load_trained`.
        out: the bundle's folder, default `artifacts/<name>-<precision>`.
        allow_merged: see `load_trained`.
        progress: called with the name of every step as it begins.

    Returns:
        The bundle in `out`.

    Raises:
        InputError: unusable arguments or input (CheckpointError, CardError among them).
        VerificationError: a step strays from the trained network; nothing is written.
        MissingDependency, MissingDevice, BuildError: a format cannot be made here.
        OutputError: `out` could not be written; an earlier bundle is untouched.
    """
    request = _Request(
        formats=parse_formats(formats),
        graph=graph,
        precision=precision,
        batch=batch if isinstance(batch, BatchRange) else parse_batch(batch),
    )
    request.check()
    if out is not None:
        check_output_folder(Path(out))
    clock = _Clock(progress)
    with clock.step("load"):
        if module is not None or example_input is not None:
            own = _OwnRequest(module, example_input, card, weights, input_size, allow_merged)
            trained = _own_trained(model_or_checkpoint, own)
        else:
            trained = _trained(model_or_checkpoint, card, weights, input_size, allow_merged=allow_merged)
    out = Path("artifacts", f"{trained.card.name}-{precision}") if out is None else Path(out)
    check_output_folder(out)

    interface = _interface(trained)
    with clock.step("probe"):
        probe = record_probe(trained.network, *(probe_like(example.numpy()) for example in interface.examples))
    certifier = Certifier(
        probe,
        batch_sizes(request.batch),
        class_axes=find_task(trained.card.task).class_axes,
        outputs=interface.outputs,
    )
    merged, network = _reparameterize(trained, request, certifier, clock)
    made = _Artifacts(request.precision, notes=list(trained.notes))
    if "checkpoint" in request.formats:
        with clock.step("checkpoint"):
            made.add("checkpoint", *_checkpoint_file(trained, merged))
    if request.needs_trace:
        with clock.step("trace"):
            traced = trace_network(network, interface.examples, request.batch)
        if "torch" in request.formats:
            with clock.step("torch program"):
                certifier.require("torch.export program", partial(run_network, traced.program.module()))
                made.add("torch", "model.pt2", _program_file(traced))
        if request.needs_onnx:
            _make_onnx(traced, trained, request, certifier, made, clock)
    made.add_file(PROBE, probe.to_bytes())
    manifest = _manifest(trained, request, probe, certifier, made, clock)
    with clock.step("save"):
        return Bundle(manifest, contents=made.contents).save(out)


def describe_checkpoint(
    path: str | Path, *, weights: str | None = None, input_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What a checkpoint is, for people: file, layout, architecture, parameters.

    Raises:
        CheckpointError: it cannot be read, or is of no network we know.
    """
    trained = load_trained(path, weights=weights, input_size=input_size, allow_merged=True)
    if trained.checkpoint is None or trained.state is None:
        raise AssertionError("a file that was loaded has both")
    return {
        "kind": "checkpoint",
        "sha256": trained.checkpoint.sha256,
        "layout": trained.state.layout.name,
        "container": trained.state.container,
        "prefix": trained.state.prefix,
        "also holds": list(trained.state.others),
        "state": "merged" if trained.merged else "trained",
        "card": trained.card.name,
        "family": trained.card.family,
        **card_spec(trained.card).model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "notes": list(trained.notes),
    }


@dataclass(frozen=True)
class _Request:
    """What was asked for, in the pipeline's own types."""

    formats: tuple[str, ...]
    graph: str
    precision: str
    batch: BatchRange

    @property
    def needs_trace(self) -> bool:
        return bool(set(self.formats) - {"checkpoint"})

    @property
    def needs_onnx(self) -> bool:
        return bool(set(self.formats) & {"onnx", *FLAVOURS})

    def check(self) -> None:
        """Raise, before minutes are spent, if it cannot be had here."""
        require_choice("--graph", self.graph, GRAPHS)
        require_choice("--precision", self.precision, tuple(TOLERANCES))
        for name in self.formats:
            if name in FLAVOURS:
                check_flavour(name)


def _reparameterize(
    trained: Trained, request: _Request, certifier: Certifier, clock: _Clock
) -> tuple[nn.Module, nn.Module]:
    """The merged network, and the one to be traced; both verified."""
    with clock.step("merge"):
        merged = trained.network if trained.merged else _merged(trained)
    with clock.step("verify merged"):
        certifier.require("merged", partial(run_network, merged))
    if request.graph == "merged":
        return merged, upstream_form(merged)
    with clock.step("fold"):
        folded = fold_affine(merged, keep_unknown=trained.interface is not None)
    with clock.step("verify folded"):
        certifier.require("folded", partial(run_network, folded))
    return merged, folded


def _make_onnx(  # noqa: PLR0913 - the values that meet here
    traced: Traced, trained: Trained, request: _Request, certifier: Certifier, made: _Artifacts, clock: _Clock
) -> None:
    """The ONNX graph, verified, simplified, verified again; and the engines built from it."""
    with clock.step("export"):
        interface = _interface(trained)
        model = export_graph(traced, input_names=interface.inputs, output_names=interface.outputs)
        model = with_metadata(model, _metadata(trained, request.batch))
        data = serialize_model(model)
    with clock.step("verify exported"):
        certifier.require("exported ONNX", _onnx_run(data), request.precision)
    with clock.step("simplify"):
        try:
            model, data = _simplified(model, certifier, request.precision)
        except SimplificationFailed as error:
            made.notes.append(f"not simplified: {error}")
    about = {"opset": model.opset_import[0].version, "nodes": len(model.graph.node)}
    del model
    if "onnx" in request.formats:
        made.add("onnx", "model.onnx", data, about)
    for name in (name for name in request.formats if name in FLAVOURS):
        with clock.step(name):
            shapes = {key: x.shape[1:] for key, x in zip(interface.inputs, interface.examples, strict=True)}
            engine = build_engine(name, data, inputs=shapes, batch=request.batch)
        made.add(name, f"model.{name}.engine", engine.plan, engine.details)
        made.notes.append(f"the {name} engine was built from the verified graph and has not run here")


def _manifest(  # noqa: PLR0913 - the values that meet here
    trained: Trained, request: _Request, probe: Probe, certifier: Certifier, made: _Artifacts, clock: _Clock
) -> Manifest:
    n = request.batch.min if request.batch.min == request.batch.max else None
    interface = _interface(trained)
    inputs = tuple(
        TensorSpec(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=(n, *x.shape[1:]))
        for name, x in zip(interface.inputs, interface.examples, strict=True)
    )
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=(n, *reference.shape[1:]))
        for name, (reference, _) in zip(interface.outputs, probe.answers(), strict=True)
    )
    return Manifest(
        name=trained.card.name,
        family=trained.card.family,
        task=trained.card.task,
        graph=request.graph,
        input=inputs[0],
        output=outputs[0],
        inputs=inputs if len(inputs) > 1 else (),
        outputs=outputs if len(outputs) > 1 else (),
        preprocessing=trained.card.preprocessing,
        labels=load_labels(trained.card),
        batch=request.batch,
        artifacts=made.entries,
        probe=made.files[PROBE],
        certificate=tuple(certifier.hops),
        provenance=_provenance(trained, clock.seconds),
        notes=tuple(made.notes),
    )


def _interface(trained: Trained) -> Interface:
    """How the network is called; images to what its task's output is called, where its card says so."""
    if trained.interface is not None:
        return trained.interface
    spec, family = card_spec(trained.card), FAMILIES[trained.card.family]
    images = torch.zeros(1, spec.in_channels, *trained.card.input_size)
    names = (find_task(trained.card.task).output,) if family.outputs is None else family.outputs(spec)
    return Interface((INPUT,), (images,), names)


def _merged(trained: Trained) -> nn.Module:
    try:
        return merge_branches(trained.network)
    except ValueError as error:  # of a network of the user's own: ours always merge
        raise InputError(str(error)) from None


def _trained(
    source: nn.Module | str | Path,
    card: str | Path | ModelCard | None,
    weights: str | None,
    input_size: tuple[int, int] | None,
    *,
    allow_merged: bool,
) -> Trained:
    if not isinstance(source, nn.Module):
        return load_trained(source, card, weights=weights, input_size=input_size, allow_merged=allow_merged)
    own = card if card is not None else getattr(source, "card", None)
    if own is None:
        raise InputError(
            f"{type(source).__name__} carries no card: pass example_input=, a tensor such as it takes, "
            "or card=, a name in models/ or a ModelCard, if it is a network of repmlp_deploy"
        )
    if source.training:
        raise InputError(f"{type(source).__name__} is in training mode: call .eval() first")
    found = own if isinstance(own, ModelCard) else load_card(own)
    return Trained(source, found, merged=_is_merged(source, allow_merged=allow_merged))


def _is_merged(network: nn.Module, *, allow_merged: bool) -> bool:
    """Whether no block has branches; InputError where that is not allowed."""
    try:
        if has_branches(network):
            return False
    except ValueError as error:  # the parts of a block, but not all of them
        raise InputError(str(error)) from None
    if not allow_merged:
        raise InputError(
            f"{type(network).__name__} has no RepMLP block with branches; if it is merged already, nothing can be "
            "proved about the trained network: export it before switch_to_deploy(), or pass allow_merged=True"
        )
    return True


@dataclass(frozen=True)
class _OwnRequest:
    """What was said about a network that no family describes."""

    module: str | None
    example_input: Any
    card: str | Path | ModelCard | None
    weights: str | None
    input_size: tuple[int, int] | None
    allow_merged: bool


def _own_trained(source: nn.Module | str | Path, own: _OwnRequest) -> Trained:
    """A user's own network: handed over, or made by its factory and filled from a weights file."""
    checkpoint = state = None
    if isinstance(source, nn.Module):
        if own.module is not None:
            raise InputError(f"module={own.module} makes a network, and a {type(source).__name__} was given: drop one")
        network = source
    elif own.module is None:
        raise InputError(f"{source} is a weights file: example_input= needs module=, the network it is for")
    else:
        network = make_own_network(own.module)
        checkpoint = read_checkpoint(source)
        expected = network.state_dict()
        state = own_state_dict(checkpoint.content, expected.keys(), weights=own.weights, name=str(source))
        fill_own_network(network, state.tensors, str(source))
    called, interface = describe_interface(network, _example(network, own))
    card = own.card if own.card is not None else getattr(network, "card", None)
    if card is None:
        card = default_card(network, interface)
    elif not isinstance(card, ModelCard):
        card = load_card(card)
    merged = _is_merged(network, allow_merged=own.allow_merged)
    return Trained(called, card, checkpoint, state, merged, interface=interface)


def _example(network: nn.Module, own: _OwnRequest) -> Any:
    """What was given, or what the network says, or an image of the size that was given."""
    example = own.example_input if own.example_input is not None else getattr(network, "example_input", None)
    if example is None and own.input_size is not None:
        return torch.zeros(1, 3, *own.input_size)
    if example is None:
        raise InputError(
            f"{type(network).__name__} does not say what it takes: pass --input-size HxW for RGB images, "
            "or give it an attribute example_input"
        )
    return example


class _Clock:
    """Seconds of every step, told to a progress display as it begins."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


@dataclass
class _Artifacts:
    """Files for the bundle, collected in memory."""

    precision: str
    notes: list[str] = field(default_factory=list)
    entries: dict[str, ArtifactEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    def add_file(self, name: str, data: bytes) -> None:
        self.contents[name] = data
        self.files[name] = FileEntry(path=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    def add(self, artifact_format: str, name: str, data: bytes, details: Mapping[str, Any] | None = None) -> None:
        self.add_file(name, data)
        described = {**self.files[name].model_dump(), "precision": self.precision, **(details or {})}
        self.entries[artifact_format] = ArtifactEntry.model_validate(described)


def _onnx_run(data: bytes) -> Run:
    session, _ = open_session(data, RunnerOptions(device="cpu"))
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _simplified(graph: onnx.ModelProto, certifier: Certifier, precision: str) -> tuple[onnx.ModelProto, bytes]:
    """The simplified graph, verified, and its bytes.

    Raises:
        SimplificationFailed: onnxsim failed, or changed the output.
    """
    simplified = simplify_graph(graph)
    data = serialize_model(simplified)
    try:
        hops = certifier.measure("simplified ONNX", _onnx_run(data), precision)
    except (VerificationError, InputError) as error:
        raise SimplificationFailed(str(error)) from error
    failed = [hop for hop in hops if not hop.passed]
    if failed:
        raise SimplificationFailed(f"onnxsim changed the output by {failed[0].max_abs:.2e}")
    certifier.hops += hops
    return simplified, data


def _checkpoint_file(trained: Trained, merged: nn.Module) -> tuple[str, bytes]:
    """The merged state dict in the layout it came in."""
    network = merged.module if isinstance(merged, Flat) else merged
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    suffix = ".pth" if trained.checkpoint is None else trained.checkpoint.path.suffix
    named = state if trained.state is None else to_layout(state, trained.state)
    if suffix == ".safetensors":
        return "model.safetensors", safetensors.torch.save(named)
    buffer = io.BytesIO()
    torch.save(named, buffer)
    return "model.pth", buffer.getvalue()


def _program_file(traced: Traced) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced.program, buffer)
    return buffer.getvalue()


def _metadata(trained: Trained, batch: BatchRange) -> dict[str, object]:
    """What the graph says of itself, for tools that see it alone."""
    labels = load_labels(trained.card)
    return {
        "name": trained.card.name,
        "family": trained.card.family,
        "task": trained.card.task,
        "preprocessing": trained.card.preprocessing.model_dump(mode="json"),
        "labels": list(labels) if labels is not None else [],
        "batch": batch.model_dump(),
        "checkpoint_sha256": trained.checkpoint.sha256 if trained.checkpoint is not None else "",
        "repmlp_deploy": repmlp_deploy.__version__,
    }


def _provenance(trained: Trained, seconds: Mapping[str, float]) -> dict[str, Any]:
    source: dict[str, Any] = {"checkpoint": None}
    if trained.checkpoint is not None and trained.state is not None:
        source["checkpoint"] = {
            "file": trained.checkpoint.path.name,
            "sha256": trained.checkpoint.sha256,
            "layout": trained.state.layout.name,
            "container": trained.state.container,
            "prefix": trained.state.prefix,
            "merged": trained.state.merged,
        }
    packages = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy")
    return {
        **source,
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "probe": {"seed": SEED, "samples": SAMPLES},
        "versions": {"repmlp-deploy": repmlp_deploy.__version__, "python": platform.python_version()}
        | {name: version for name in packages if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seconds": dict(seconds),
        "peak_bytes": _peak_bytes(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _peak_bytes() -> int | None:
    """The largest resident size this process has had; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage also counts what it was started from
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
