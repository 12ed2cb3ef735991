"""ONNX Runtime: one session, safe to share between threads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import BundleError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.onnx_providers import PROVIDERS, open_provider_session
from repmlp_deploy.runtime.runner import RunnerOptions

try:
    import onnxruntime as ort
except ImportError:
    raise MissingDependency("onnxruntime", "cpu") from None

__all__ = ["OnnxRunner", "open_session"]


def open_session(model: bytes, options: RunnerOptions) -> tuple[ort.InferenceSession, str]:
    """A session on a serialized model, and the device it really runs on.

    A device that was asked for is had or refused: ONNX Runtime itself falls back to the CPU and only logs it.

    Raises:
        InputError: there is no such device name.
        MissingDependency: the device's plugin is not installed.
        MissingDevice: the device is not there.
        BundleError: ONNX Runtime refuses the model.
    """
    if options.device is not None and options.device not in PROVIDERS:
        raise InputError(f"device is {options.device!r}; expected one of {', '.join(PROVIDERS)}")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; it must be at least 1")
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # errors are raised too; what matters of the rest is checked below
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    available = ort.get_available_providers()
    wanted = options.device or ("cuda" if PROVIDERS["cuda"].name in available else "cpu")
    name = PROVIDERS[wanted].name
    try:
        session = open_provider_session(model, settings, wanted, options.cache)
    except (MissingDevice, MissingDependency):
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
        if "NOT_IMPLEMENTED" in str(error):  # bf16 on the CPU
            raise MissingDevice(
                f"ONNX Runtime's {name} cannot compute this graph ({str(error).rpartition(' : ')[2]}): "
                "run it on a GPU, or export --format openvino or another --precision"
            ) from None
        raise BundleError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from None
    device = wanted if session.get_providers()[0] == name else "cpu"
    if options.device is not None and device != options.device:
        raise MissingDevice(
            f"ONNX Runtime could not start {name}, only {', '.join(session.get_providers())}: "
            "the driver, CUDA or cuDNN it needs is missing or of another version"
        )
    session.disable_fallback()  # or a failure on the device would end on the CPU, unseen
    return session, device


class OnnxRunner:
    """The bundle's ONNX artifact in ONNX Runtime."""

    format = "onnx"

    def __init__(self, bundle: Bundle, options: RunnerOptions) -> None:
        model = bundle.read(bundle.artifact(self.format))
        self._session, self.device = open_session(model, options)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self.details: dict[str, Any] = {
            "runtime": f"onnxruntime {ort.__version__}",
            "providers": self._session.get_providers(),
            "threads": options.threads,
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, H, W) float32 -> (N, …) float32."""
        output: NDArray[np.float32] = self._session.run(None, {self._inputs[0]: batch})[0]
        return output

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Every output for every input, both in the graph's order."""
        outputs: list[NDArray[Any]] = self._session.run(None, dict(zip(self._inputs, inputs, strict=True)))
        return outputs

    def close(self) -> None:
        """Give back the session's memory."""
        del self._session
