"""The server's log: one line per event on stderr, for people or as JSON."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

from repmlp_deploy.text import printable

__all__ = ["configure_logging"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": printable(record.getMessage()),
            **_extras(record),
        }
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: _plain(value) for key, value in data.items()}, default=str)


class _TextLines(logging.Formatter):
    """One line for people."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = " ".join(f"{key}={printable(value)}" for key, value in _extras(record).items())
        said = f"{clock} {record.levelname.lower():7} {printable(record.getMessage())} {extras}".rstrip()
        return f"{said}\n{self.formatException(record.exc_info)}" if record.exc_info else said


def _plain(value: object) -> object:
    """Return null for what JSON has no number for: an infinite margin, where there is no error at all."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the caller added; names with an underscore are other libraries' own."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and key[0] != "_"}


def configure_logging(*, as_json: bool) -> None:
    """Log to stderr: the server's own events, and what uvicorn and gRPC warn of."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if as_json else _TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("repmlp").setLevel(logging.INFO)
