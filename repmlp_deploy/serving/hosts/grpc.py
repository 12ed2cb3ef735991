"""The protocol over gRPC: the inference service, the health checking protocol, and reflection."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.serving.codec import MAX_TENSORS, timeout_of
from repmlp_deploy.serving.hosts.health import Health
from repmlp_deploy.serving.hosts.messages import POOL, SERVICE, message, service
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.protocol import (
    DATATYPES,
    BadRequest,
    Failed,
    InferRequest,
    InferResponse,
    RequestedOutput,
    ServingError,
    Tensor,
    UnknownModel,
    byte_array,
    check_bytes_count,
    check_shape,
    is_within,
    tensor_from_raw,
    tensor_to_raw,
)
from repmlp_deploy.serving.watch import Library, check_parameters, require_control
from repmlp_deploy.text import printable

with optional_imports():
    import grpc
    from google.protobuf.json_format import ParseDict
    from google.protobuf.message import DecodeError
    from grpc_health.v1 import health
    from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
    from grpc_reflection.v1alpha import reflection

__all__ = ["GrpcOptions", "GrpcServer", "Servicer"]

_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_METHODS: Mapping[str, str] = {
    "ServerLive": "server_live",
    "ServerReady": "server_ready",
    "ModelReady": "model_ready",
    "ServerMetadata": "server_metadata",
    "ModelMetadata": "model_metadata",
    "ModelInfer": "model_infer",
    "ModelConfig": "model_config",
    "ModelStatistics": "model_statistics",
    "RepositoryIndex": "repository_index",
    "RepositoryModelLoad": "repository_model_load",
    "RepositoryModelUnload": "repository_model_unload",
}
_log = logging.getLogger("repmlp.serve.grpc")


@dataclass(frozen=True)
class GrpcOptions:
    """Limits and address of the gRPC host.

    Attributes:
        host: address to listen on.
        port: 0 for any free one.
        body_limit: bytes of a message at most.
        control: whether clients may load and unload models.
        log_requests: whether every call is logged.
        certificate: PEM file of the TLS certificate chain; None for no TLS.
        key: PEM file of its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    body_limit: int = 64 << 20
    control: bool = False
    log_requests: bool = False
    certificate: Path | None = None
    key: Path | None = None


class GrpcServer:
    """The server of gRPC, in the event loop that starts it."""

    def __init__(self, inference: Inference, library: Library, options: GrpcOptions) -> None:
        self._options = options
        self._health = Health(inference)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.body_limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ]
        )
        servicer = Servicer(inference, library, control=options.control, log_requests=options.log_requests)
        self._server.add_generic_rpc_handlers((servicer.handlers(),))
        add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server, pool=POOL
        )

    async def start(self) -> str:
        """Listen, and return the address.

        Raises:
            InputError: the address is taken or is none.
        """
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        address = f"{host}:{self._options.port}"
        try:
            if self._options.certificate is None or self._options.key is None:
                port = self._server.add_insecure_port(address)
            else:
                pair = (self._options.key.read_bytes(), self._options.certificate.read_bytes())
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError):
            raise InputError(f"cannot listen on {printable(address, 100)} for gRPC: it is taken, or is none") from None
        await self._server.start()
        await self.tell_health()
        return f"{host}:{port}"

    async def tell_health(self) -> None:
        """Let the health service say which models answer; called whenever one changed."""
        await self._health.tell()

    async def stop(self, seconds: float) -> None:
        """Take no more calls, and finish those under way within `seconds`."""
        await self.tell_health()
        await self._server.stop(seconds)


class Servicer:
    """The inference service. Its methods take and give the protocol's messages; a host adds the transport."""

    def __init__(self, inference: Inference, library: Library, *, control: bool, log_requests: bool = False) -> None:
        self._inference, self._library, self._control = inference, library, control
        self._log_requests = log_requests

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return a handler for every method of the service."""
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._handler(method.name), response_serializer=message(method.output_type.name).SerializeToString
            )
            for method in service().methods
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _handler(self, name: str) -> Callable[[bytes, Any], Awaitable[Any]]:
        async def call(data: bytes, context: Any) -> Any:
            try:
                return await self.answer(name, data, context.time_remaining())
            except ServingError as error:
                await context.abort(getattr(grpc.StatusCode, error.code), printable(error))

        return call

    async def answer(self, name: str, data: bytes, remaining: float | None = None) -> Any:
        """Return the message that answers a call.

        Args:
            name: of the method, such as `ModelInfer`.
            data: the request's message, as it was sent.
            remaining: seconds that the caller still waits; None for no limit.

        Raises:
            ServingError: there is no answer; `code` is gRPC's name for the reason.
        """
        method, start, code = service().methods_by_name[name], time.monotonic(), "OK"
        try:
            request = _parsed(message(method.input_type.name), data)
            return await getattr(self, _METHODS[name])(request, remaining)
        except ServingError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:  # noqa: BLE001 - the log tells, the caller learns nothing of our insides
            code = Failed.code
            _log.exception("defect")
            raise Failed("internal error; the server's log says more") from None
        finally:
            if self._log_requests:
                _log.info(
                    "request", extra={"method": name, "status": code, "seconds": round(time.monotonic() - start, 6)}
                )

    async def server_live(self, _request: Any, _remaining: float | None) -> Any:
        """Say that the process answers."""
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, _request: Any, _remaining: float | None) -> Any:
        """Say whether every model has passed its check."""
        return message("ServerReadyResponse")(ready=self._inference.models.ready)

    async def model_ready(self, request: Any, _remaining: float | None) -> Any:
        """Say whether a model answers; one that nobody knows does not."""
        try:
            ready = self._inference.model_ready(request.name, request.version)
        except UnknownModel:
            ready = False
        return message("ModelReadyResponse")(ready=ready)

    async def server_metadata(self, _request: Any, _remaining: float | None) -> Any:
        """Say what the server is."""
        return message("ServerMetadataResponse")(**self._inference.server())

    async def model_metadata(self, request: Any, _remaining: float | None) -> Any:
        """Say what a model takes and gives."""
        metadata = self._inference.metadata(request.name, request.version)
        return ParseDict(metadata.as_json(), message("ModelMetadataResponse")())

    async def model_infer(self, request: Any, remaining: float | None) -> Any:
        """Answer an inference request."""
        with self._inference.counted(request.model_name):
            plain = all(given.datatype != "BYTES" and not given.HasField("contents") for given in request.inputs)
            asked = _decoded(request) if plain else await asyncio.to_thread(_decoded, request)  # value by value
            name, version = request.model_name, request.model_version
            return _encoded(await self._inference.infer(name, version, asked, remaining=remaining))

    async def model_config(self, request: Any, _remaining: float | None) -> Any:
        """Say a model's configuration."""
        config = self._inference.config(request.name, request.version)
        return ParseDict({"config": config}, message("ModelConfigResponse")())

    async def model_statistics(self, request: Any, _remaining: float | None) -> Any:
        """Say what a model, or every model, has done so far."""
        return ParseDict(
            self._inference.statistics(request.name, request.version), message("ModelStatisticsResponse")()
        )

    async def repository_index(self, request: Any, _remaining: float | None) -> Any:
        """List the models and their states."""
        entries = [entry for entry in self._library.index() if not request.ready or entry["state"] == "READY"]
        return ParseDict({"models": entries}, message("RepositoryIndexResponse")())

    async def repository_model_load(self, request: Any, _remaining: float | None) -> Any:
        """Load a model, or its bundle's new version."""
        self._require_control(request)
        await asyncio.wrap_future(self._library.begin_load(request.model_name))
        return message("RepositoryModelLoadResponse")()

    async def repository_model_unload(self, request: Any, _remaining: float | None) -> Any:
        """Unload a model."""
        self._require_control(request)
        await asyncio.wrap_future(self._library.begin_unload(request.model_name))
        return message("RepositoryModelUnloadResponse")()

    def _require_control(self, request: Any) -> None:
        require_control(allowed=self._control)
        check_parameters(request.parameters)


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadRequest(f"the body is no {kind.DESCRIPTOR.name}") from None


def _decoded(request: Any) -> InferRequest:
    """Return the request in a message.

    Raises:
        BadRequest: it is no request.
    """
    if not request.inputs:
        raise BadRequest("the request has no inputs")
    if max(len(request.inputs), len(request.outputs)) > MAX_TENSORS:
        raise BadRequest(f"a request has at most {MAX_TENSORS} inputs and outputs")
    raws: Sequence[bytes] = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise BadRequest(f"{len(raws)} raw_input_contents for {len(request.inputs)} inputs")
    inputs = [
        _from_contents(given) if not raws else _from_raw(given, raws[i]) for i, given in enumerate(request.inputs)
    ]
    outputs = [RequestedOutput(_require_plain(output)) for output in request.outputs]
    parameters = {key: getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
                  for key, value in request.parameters.items()}  # fmt: skip
    return InferRequest(inputs, outputs, binary=True, id=request.id, timeout=timeout_of(parameters))


def _require_plain(tensor: Any) -> str:
    """Return the tensor's name; raise BadRequest for what is not offered."""
    for key in ("classification", "shared_memory_region"):
        if key in tensor.parameters:
            raise BadRequest(f"{printable(tensor.name, 100)}: {key} is not offered")
    return str(tensor.name)


def _from_raw(given: Any, raw: bytes) -> Tensor:
    name = _require_plain(given)
    if given.HasField("contents"):
        raise BadRequest(f"{printable(name, 100)}: contents and raw_input_contents exclude each other")
    return tensor_from_raw(name, given.datatype, check_shape(name, list(given.shape)), raw)


def _from_contents(given: Any) -> Tensor:
    """Return the tensor whose values are in the message."""
    name, datatype = _require_plain(given), given.datatype
    field = _CONTENTS.get(datatype)
    if field is None:
        known = ", ".join(_CONTENTS)
        raise BadRequest(f"{printable(name, 100)}: contents carry {known}, not {printable(datatype, 40)!r}")
    shape, values = check_shape(name, list(given.shape)), getattr(given.contents, field)
    count = math.prod(shape)
    if len(values) != count:
        raise BadRequest(f"{printable(name, 100)}: {len(values)} values; shape {list(shape)} has {count}")
    if datatype == "BYTES":
        check_bytes_count(name, count)
        return Tensor(name, datatype, byte_array(list(values)).reshape(shape), encoded=True)
    wanted, wide = np.dtype(DATATYPES[datatype]), np.array(values)  # the message's types are wider
    if wanted.kind in "iu" and not is_within(wide, wanted):
        raise BadRequest(f"{printable(name, 100)}: a value is outside the range of {datatype}")
    return Tensor(name, datatype, wide.astype(wanted).reshape(shape))


def _encoded(answer: InferResponse) -> Any:
    """Return the message of an answer; its values are raw, as clients expect them."""
    response = message("ModelInferResponse")(model_name=answer.model, model_version=answer.version, id=answer.id)
    for tensor in answer.outputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape)
        response.raw_output_contents.append(tensor_to_raw(tensor))
    return response
