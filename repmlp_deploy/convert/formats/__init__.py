"""The artifact formats: one table, and one file per format.

To add a format, write a module with two functions and give it an entry in `FORMATS`:

    check(name, request)          raise before any work if this machine or this request cannot make it
    build(name, job, source)      return a `Step` with the `Artifact`; `source` is what the entry says it needs

The module is imported when its format is asked for, so it may import its heavy package at the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from repmlp_deploy.convert.engine_options import FLAGS, EngineOptions
from repmlp_deploy.convert.options import require_choice
from repmlp_deploy.errors import InputError

if TYPE_CHECKING:
    from repmlp_deploy.convert.formats.candidate import Candidates
    from repmlp_deploy.convert.graph.calibrate import Calibration
    from repmlp_deploy.convert.job import Artifact, Job
    from repmlp_deploy.convert.request import Request
    from repmlp_deploy.convert.step import Step

__all__ = ["FORMATS", "Format", "check_formats", "formats_that_need", "parse_formats", "require_engine"]

Need = Literal["form", "trace", "fp32", "lowered"]


@dataclass(frozen=True)
class Format:
    """One artifact format.

    Attributes:
        module: with `check` and `build`.
        needs: what `build` gets: the transformed networks, the traced one, the float32 graph, or the lowered graph.
        title: what the help text calls it.
        aliases: other words for it on the command line.
        float32_only: whether it takes no other precision.
        engine: whether it is a TensorRT engine, built from the verified ONNX graph.
        copies_weights: whether its builder copies all weights, so that memory is freed before.
        meets_accuracy: whether the module also has `candidates(job, graph, samples)`, so that accuracy can decide what
            stays in float32; see `candidate`.
    """

    module: str
    needs: Need
    title: str
    aliases: tuple[str, ...] = ()
    float32_only: bool = False
    engine: bool = False
    copies_weights: bool = False
    meets_accuracy: bool = False

    def check(self, name: str, request: Request) -> None:
        """Raise if the format cannot be made here as requested."""
        if self.float32_only and request.precision != "fp32":
            raise InputError(f"--format {name} is float32, not {request.precision}: drop one of them")
        if request.input != "float32" and self.needs == "form":
            raise InputError(f"--format {name} holds weights alone, for float32: drop it, or --input {request.input}")
        if request.low.max_drop is not None and not self.meets_accuracy:
            able = " and ".join(other for other, entry in FORMATS.items() if entry.meets_accuracy)
            raise InputError(f"--max-drop is for {able}, which run on a CPU: drop --format {name}")
        import_module(self.module).check(name, request)

    def build(self, name: str, job: Job, source: Any) -> Step[Artifact]:
        """Return the artifact, with the rows that prove it."""
        made: Step[Artifact] = import_module(self.module).build(name, job, source)
        return made

    def candidates(self, job: Job, graph: bytes, samples: Calibration) -> Candidates:
        """Return what builds the artifact of a float32 graph with any nodes in float32."""
        found: Candidates = import_module(self.module).candidates(job, graph, samples)
        return found


_HERE = "repmlp_deploy.convert.formats"

FORMATS: dict[str, Format] = {
    "onnx": Format(f"{_HERE}.onnx", "lowered", "ONNX graph", meets_accuracy=True),
    "openvino": Format(f"{_HERE}.openvino_artifact", "fp32", "OpenVINO IR", copies_weights=True, meets_accuracy=True),
    "trt": Format(
        f"{_HERE}.tensorrt.artifact",
        "lowered",
        "TensorRT engine",
        aliases=("tensorrt", "engine"),
        engine=True,
        copies_weights=True,
    ),
    "trt-rtx": Format(f"{_HERE}.tensorrt.artifact", "lowered", "TensorRT-RTX engine", engine=True, copies_weights=True),
    "torch": Format(f"{_HERE}.torch_program", "trace", "torch.export program", float32_only=True),
    "checkpoint": Format(f"{_HERE}.checkpoint", "form", "merged checkpoint", float32_only=True),
}
"""Name to format, in the order in which help texts list them."""


def parse_formats(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Return format names without aliases and repetition, in the order given.

    Raises:
        InputError: one of them is unknown; the nearest is suggested.
    """
    aliases = {alias: name for name, entry in FORMATS.items() for alias in entry.aliases}
    words = formats.split(",") if isinstance(formats, str) else list(formats)
    names = [aliases.get(word.strip().lower(), word.strip().lower()) for word in words]
    for name in names:
        require_choice("--format", name, tuple(FORMATS), tuple(aliases))
    return tuple(dict.fromkeys(names))


def check_formats(request: Request) -> None:
    """Raise, before minutes are spent, if a format cannot be made here as requested.

    Raises:
        InputError: the request does not suit the format.
        MissingDependency, MissingDevice, BuildError: this machine does not have what the format needs.
    """
    for name in request.formats:
        FORMATS[name].check(name, request)


def formats_that_need(request: Request, *needs: Need) -> tuple[str, ...]:
    """Return the requested formats that are built from one of these."""
    return tuple(name for name in request.formats if FORMATS[name].needs in needs)


def require_engine(options: EngineOptions, formats: Sequence[str]) -> None:
    """Raise InputError if an option is about engines, and none of the formats is one."""
    asked, engines = options.asked(), tuple(name for name, entry in FORMATS.items() if entry.engine)
    if asked and not set(formats) & set(engines):
        raise InputError(f"{FLAGS[asked[0]]} is about engines; add --format {' or '.join(engines)}")
