"""The table of precisions: everything that depends on a precision stands in its entry here.

An entry holds numbers and names only, so importing this module needs no framework. Emulators and lowerings are named
and imported where they are used. To add a precision, add an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

__all__ = ["PRECISIONS", "OpenVinoNames", "Precision", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """The error that an arithmetic may have.

    Attributes:
        floor_ratio: allowed absolute error over the noise floor.
        reason: why exactly this much.
        between: allowed error of the differences between samples, see `numerics.Comparison.between`. None if the noise
            floor alone is strict enough. An output that ignores its input scores 1.
    """

    floor_ratio: float
    reason: str
    between: float | None = None


@dataclass(frozen=True)
class OpenVinoNames:
    """The names that OpenVINO uses for a precision.

    Attributes:
        stored: the `ov.Type` that products' weights are cast to; None if they are not cast.
        computes: the inference precision that the runner requests. For int8 it applies to what is not quantized.
        capability: the optimization capability that the device must report.
    """

    stored: str | None
    computes: str = "f32"
    capability: str = "FP32"


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: the value of `--precision`.
        element: the element type of weights, as NumPy or the standard spells it.
        rounding: largest relative error of storing one float32 weight; None if every tensor has a scale of its own.
        largest: the largest finite value; None if every tensor has a scale of its own.
        bytes_per_weight: size of one stored weight.
        tolerance: the error that verification allows.
        lowering: how a float32 graph gets the precision: not at all, by casts, or by quantization.
        onnx_type: the name of the element type in `TensorProto.DataType`.
        tensorrt_type: the lower-case name in `tensorrt.DataType`; None if TensorRT has no such precision.
        openvino: OpenVINO's names; None if OpenVINO has no such precision.
        emulator: "module:function" of a function (graph, precision) -> graph that rounds as a GPU does; empty if
            ONNX Runtime's CPU provider already does.
        runs_on_cpu: whether ONNX Runtime's CPU provider runs the graph unchanged.
        needs_calibration: whether lowering needs measured ranges.
        keeps_graph: whether what a runtime compiles or optimises is worth caching.
        min_opset: the first ONNX opset whose operators accept the element type; 0 for any.
        sensitive: operators that stay in float32, each with the reason.
        wider: the precision to try if this one is too coarse; empty if there is none.
    """

    name: str
    element: str
    rounding: float | None
    largest: float | None
    bytes_per_weight: int
    tolerance: Tolerance
    lowering: Literal["none", "cast", "quantize"]
    onnx_type: str
    tensorrt_type: str | None = None
    openvino: OpenVinoNames | None = None
    emulator: str = ""
    runs_on_cpu: bool = True
    needs_calibration: bool = False
    keeps_graph: bool = False
    min_opset: int = 0
    sensitive: Mapping[str, str] = field(default_factory=dict)
    wider: str = ""

    @property
    def remedy(self) -> str:
        """Return what a user can do if verification fails."""
        if not self.wider:
            return "please report this checkpoint"
        if self.needs_calibration:
            return "give more or better calibration images, or keep the worst blocks in float32, --keep-fp32 PATTERN"
        return f"keep the worst blocks in float32, --keep-fp32 PATTERN, or use {self.wider}"

    @property
    def is_limited(self) -> bool:
        """Return whether values of a network may be beyond the type's range; bfloat16 has that of float32."""
        return self.lowering == "cast" and self.largest is not None and self.largest < _END_OF_FLOAT32

    def load_emulator(self) -> Callable[[Any, Precision], Any] | None:
        """Import the emulator; return None if the precision has none."""
        if not self.emulator:
            return None
        module, _, name = self.emulator.partition(":")
        emulator: Callable[[Any, Precision], Any] = getattr(import_module(module), name)
        return emulator


_END_OF_FLOAT32 = 1e38  # types that reach so far are not limited
_CASTS = "repmlp_deploy.convert.graph.emulate:emulate_casts"

_ENTRIES = (
    Precision(
        name="fp32",
        element="float32",
        rounding=0.0,
        largest=3.4028234663852886e38,
        bytes_per_weight=4,
        tolerance=Tolerance(
            floor_ratio=8.0,
            reason="the same arithmetic in another order: every step of every measured network stays below 2.5 floors, "
            "while one FC3 scaled by a thousandth is beyond 40 and a forgotten branch or bias beyond 10,000",
        ),
        lowering="none",
        onnx_type="FLOAT",
        tensorrt_type="float",
        openvino=OpenVinoNames(stored=None),
    ),
    Precision(
        name="fp16",
        element="float16",
        rounding=2.0**-11,
        largest=65504.0,
        bytes_per_weight=2,
        tolerance=Tolerance(
            floor_ratio=2.0**15,
            between=0.05,
            reason="the unit roundoff is 2^-11 and not 2^-24, each rounding 2^13 times larger; four times that, "
            "because a sample's floor is one run's luck: measured networks stay below a sixth of it, rounded as a GPU "
            "does",
        ),
        lowering="cast",
        onnx_type="FLOAT16",
        tensorrt_type="half",
        openvino=OpenVinoNames(stored="f16"),
        emulator=_CASTS,
        sensitive={"ReduceMean": "a sum over a whole map may leave float16's range"},
        wider="bf16",
    ),
    Precision(
        name="bf16",
        element="bfloat16",
        rounding=2.0**-8,
        largest=3.3895313892515355e38,
        bytes_per_weight=2,
        tolerance=Tolerance(
            floor_ratio=2.0**18,
            between=0.5,
            reason="the unit roundoff is 2^-8, each rounding 2^16 times float32's; four times that for the same "
            "reason: measured networks stay below a third of it, in OpenVINO as well as emulated",
        ),
        lowering="cast",
        onnx_type="BFLOAT16",
        tensorrt_type="bf16",
        openvino=OpenVinoNames(stored="bf16", computes="bf16", capability="BF16"),
        emulator=_CASTS,
        runs_on_cpu=False,  # ONNX Runtime's CPU provider has no bf16 convolution
        min_opset=22,  # the first with bf16 convolutions
        wider="fp32",
    ),
    Precision(
        name="int8",
        element="int8",
        rounding=None,
        largest=None,
        bytes_per_weight=1,
        tolerance=Tolerance(
            floor_ratio=2.0**19,
            between=0.75,
            reason="a step is 1/127 of a tensor's largest value, 2^-7 of it even where values are small, which costs "
            "several times what 2^-8 of each value would; measured networks stay below a third",
        ),
        lowering="quantize",
        onnx_type="INT8",
        tensorrt_type="int8",
        openvino=OpenVinoNames(stored=None),
        needs_calibration=True,
        keeps_graph=True,
        wider="fp16",
    ),
    Precision(
        name="fp8",
        element="float8_e4m3fn",
        rounding=None,
        largest=None,
        bytes_per_weight=1,
        tolerance=Tolerance(
            floor_ratio=2.0**21,
            between=0.75,
            reason="three bits of mantissa: a value is rounded by up to 2^-4 of itself; four times int8's row, since "
            "errors up to four times int8's were seen; RepMLPNet-B224 stays below a twentieth. Its samples must differ "
            "by more than the errors: with the golden cases' weights they hardly do, and `between` refuses it",
        ),
        lowering="quantize",
        onnx_type="FLOAT8E4M3FN",
        tensorrt_type="fp8",
        needs_calibration=True,
        min_opset=19,  # the first whose QuantizeLinear has 8-bit floats
        wider="fp16",
    ),
)

PRECISIONS: dict[str, Precision] = {entry.name: entry for entry in _ENTRIES}
"""Name to entry, from the widest to the narrowest."""
