"""New weights for a built engine, by the names its graph gave them. Needs the GPU that the engine is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS, check_flavour
from repmlp_deploy.convert.formats.tensorrt.versions import DIFFERENCES, has_name
from repmlp_deploy.errors import BuildError, MissingDevice
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from repmlp_deploy.runtime.tensorrt.log import Recording, recording, shared_logger

__all__ = ["check_refit", "refit_engine"]

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}


def check_refit(name: str) -> Any:
    """Import the flavour's module, if engines can be refitted here.

    Raises:
        BuildError: the installed version leaves an engine that could not be refitted again.
        MissingDependency: its package is not installed.
        MissingDevice: there is no GPU.
    """
    if not find_gpus():
        raise MissingDevice(
            f"refitting the {name} engine needs the GPU it is for, and this machine has no NVIDIA driver with one: run "
            "on the target, or refit the bundle without the engine"
        )
    trt = check_flavour(name)
    flag = "SerializationFlag.INCLUDE_REFIT"
    if not has_name(trt, flag):
        flavour = FLAVOURS[name]
        raise BuildError(
            f"{flavour.module} {trt.__version__} has no {flag}, so a refitted engine could not be refitted again; "
            f"{flavour.module} {DIFFERENCES[flag].since} has it: "
            f'pip install --upgrade "repmlp-deploy[{flavour.extra}]"'
        )
    return trt


def refit_engine(name: str, plan: bytes, weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the plan with these weights in it, still refittable.

    Args:
        name: an entry of `FLAVOURS`.
        plan: built with `refittable` or `strip_weights`; its sha256 has been checked.
        weights: every initializer of the graph, in the graph's types; what the engine does not hold is left over.

    Raises:
        BuildError: the engine cannot be read here, or is not refittable, or does not have or refuses a weight.
        MissingDependency, MissingDevice: as `check_refit`.
    """
    trt = check_refit(name)
    with recording(trt) as said:
        runtime = trt.Runtime(shared_logger(trt))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildError(f"{FLAVOURS[name].module} {trt.__version__} cannot read the engine: {_last(said)}")
        if not engine.refittable:
            raise BuildError(f"the {name} engine is not refittable: build it again with --refittable")
        refitter = trt.Refitter(engine, shared_logger(trt))
        kept = [_set(trt, refitter, key, weights, name) for key in refitter.get_all_weights()]
        if not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()) or _last(said)
            raise BuildError(f"the {name} engine could not be refitted: {missing}")
        del kept  # the refitter reads the arrays' own memory until here
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        return bytes(engine.serialize_with_config(config))


def _set(trt: Any, refitter: Any, key: str, weights: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """Give the refitter one weight; the array must outlive the refit."""
    if key not in weights:
        raise BuildError(f"the {name} engine holds the weight {key}, which its graph does not: build it again")
    array = np.ascontiguousarray(weights[key])
    given = trt.Weights(getattr(trt.DataType, _TYPES[array.dtype.name]), array.ctypes.data, array.size)
    if not refitter.set_named_weights(key, given):
        raise BuildError(f"the {name} engine refuses the weight {key}, {array.dtype.name} {array.shape}")
    return array


def _last(said: Recording) -> str:
    return said.errors[-1] if said.errors else "no message"
