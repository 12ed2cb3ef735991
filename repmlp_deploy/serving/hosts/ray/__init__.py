"""Ray Serve: the same application and the same gRPC service in replicas, on one machine or many.

`settings.py` says what a replica serves, `replica.py` is one, `services.py` what Ray's proxies must know, and
`process.py` runs all of it for `repmlp-serve --host-engine ray`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repmlp_deploy.serving.hosts.ray.settings import Settings

__all__ = ["app"]


def app(args: Mapping[str, Any]) -> Any:
    """Return the application of Ray Serve. `import_path` in a file for `serve deploy` names this function.

    Args:
        args: the file's `args`: the fields of `Settings`.

    Raises:
        ValidationError: one is unknown or missing, or has a value that it cannot have.
    """
    from repmlp_deploy.serving.hosts.ray.replica import deployment  # noqa: PLC0415 - Ray's proxies need no replicas

    settings = Settings.model_validate(args)
    return deployment(settings).bind(settings.model_dump(mode="json"))
