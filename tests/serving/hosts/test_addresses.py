"""An address that is taken is one line, and port 0 is any that is free."""

from __future__ import annotations

import pytest

from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.hosts.addresses import bound_socket, naming_address


def test_a_taken_port_is_named_and_zero_is_a_free_one() -> None:
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert port > 0
        said = rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"
        with pytest.raises(InputError, match=said), naming_address("127.0.0.1", port):
            bound_socket("127.0.0.1", port)
