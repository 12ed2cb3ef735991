"""Keep Ray Serve of this machine alone to its loopback address.

Ray 2.60 takes an address for HTTP only. Its gRPC proxy, and a port of every replica for calls between deployments,
listen on all interfaces. `repmlp-serve` promises to listen where `--host` says, so both are told here, in the processes
of Ray that open them. This changes two functions of Ray that are not public: a release without them fails to start,
and a test looks at what is listened on.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["CALLBACK", "LOOPBACK", "keep_proxy", "keep_replica"]

LOOPBACK = "REPMLP_RAY_LOOPBACK"
"""Variable of the environment: the address; empty or missing where Ray's own choice is right."""

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray's variable for a function that every proxy calls first."""


def keep_proxy() -> list[Any]:
    """Make this proxy's gRPC listen on the address. Return no middlewares, which is what Ray asks for."""
    from ray.serve._private import default_impl  # noqa: PLC0415 - exists in Ray's processes

    _require(default_impl, "add_grpc_address")
    address = os.environ[LOOPBACK]

    def add(server: Any, given: str) -> None:
        server.add_insecure_port(_moved(given, address))

    default_impl.add_grpc_address = add
    return []


def keep_replica() -> None:
    """Make this replica's own port listen on the address; called before Ray opens it."""
    address = os.environ.get(LOOPBACK)
    if not address:
        return
    from ray.serve._private import replica  # noqa: PLC0415 - exists in Ray's processes

    _require(replica, "add_port_to_grpc_server")
    original = replica.add_port_to_grpc_server
    if getattr(original, "moved", False):
        return

    def add(server: Any, given: str) -> int:
        return int(original(server, _moved(given, address)))

    add.moved = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add


def _moved(given: str, address: str) -> str:
    return f"{address}:{given.rpartition(':')[2]}"


def _require(module: Any, name: str) -> None:
    if not hasattr(module, name):
        said = f"{module.__name__} has no {name}: this release of Ray cannot be kept to loopback; use ray 2.60"
        raise RuntimeError(said)
