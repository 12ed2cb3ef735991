"""Addresses to listen on: one that is taken, or is none, is an error of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from repmlp_deploy.errors import InputError
from repmlp_deploy.text import printable

__all__ = ["bound_socket", "naming_address"]


@contextmanager
def naming_address(host: str, port: int) -> Iterator[None]:
    """Turn the error of an address that cannot be listened on into `InputError`."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # a name may be none
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {printable(host, 100)}:{port}: {said}") from None


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has the address; 0 is any free port.

    Raises:
        OSError: the address is taken, or is none; for use inside `naming_address`.
        UnicodeError: the name of the host can be none.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound
