"""What Ray Serve's gRPC proxies must know: the services' names. The proxies import this module, which needs no model.

A proxy passes the bytes of a call on to a replica and knows no message. It answers reflection itself.
"""

from __future__ import annotations

from typing import Any

from repmlp_deploy.errors import optional_imports
from repmlp_deploy.serving.hosts.messages import POOL, SERVICE, service

with optional_imports():
    import grpc
    from grpc_health.v1 import health
    from grpc_reflection.v1alpha import reflection

__all__ = ["HEALTH_METHODS", "METHODS", "add_health", "add_inference", "add_reflection"]

METHODS = tuple(method.name for method in service().methods)
"""Of the inference service."""

HEALTH_METHODS = ("Check", "Watch")


def add_inference(servicer: Any, server: Any) -> None:
    """Add the inference service to a proxy's server."""
    _add(server, SERVICE, {name: grpc.unary_unary_rpc_method_handler(servicer) for name in METHODS})


def add_health(servicer: Any, server: Any) -> None:
    """Add the health checking protocol to a proxy's server."""
    check, watch = HEALTH_METHODS
    methods = {check: grpc.unary_unary_rpc_method_handler(servicer)}
    methods[watch] = grpc.unary_stream_rpc_method_handler(servicer)
    _add(server, health.SERVICE_NAME, methods)


def add_reflection(_servicer: Any, server: Any) -> None:
    """Add reflection, from our own pool of messages; Ray would look for them in protobuf's."""
    server.add_passthrough_service(reflection.SERVICE_NAME)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server, pool=POOL)


def _add(server: Any, name: str, methods: dict[str, grpc.RpcMethodHandler]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
