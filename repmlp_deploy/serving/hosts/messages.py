"""The protocol's gRPC messages, in a pool of their own.

Every package that speaks the protocol registers the same names with protobuf, which refuses the second. A pool of our
own collides with none of them, so that a client library can live in the same process.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from repmlp_deploy.errors import optional_imports

with optional_imports():
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass
    from grpc_health.v1 import health_pb2

__all__ = ["POOL", "SERVICE", "message", "service"]

SERVICE = "inference.GRPCInferenceService"


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    described = FileDescriptorSet.FromString(files(__package__).joinpath("inference.binpb").read_bytes())
    for file in described.file:
        pool.Add(file)
    pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)  # for reflection
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """Return the class of one of the protocol's messages."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def service() -> Any:
    """Return the description of the inference service."""
    return POOL.FindServiceByName(SERVICE)
