"""What TensorRT says: one logger a library and process, because it keeps the first it is given and ignores others.

Builders, runtimes and refitters of one module all get `shared_logger(module)`; to know what was logged while it
worked opens a `recording`.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Recording", "recording", "shared_logger"]

_LEVELS = {"INTERNAL_ERROR": 0, "ERROR": 0, "WARNING": 1, "INFO": 2, "VERBOSE": 3}
_WORDS = {"error": 0, "warning": 1, "info": 2, "verbose": 3}
_BYTES = re.compile(r"^(?:Total |Max )?(Weights|Scratch|Activation) Memory: (\d+) bytes")

_making, _recording = threading.Lock(), threading.Lock()
_loggers: dict[str, Any] = {}


@dataclass
class Recording:
    """Messages of one piece of work.

    Attributes:
        verbosity: `error`, `warning`, `info` or `verbose`: errors apart, which are raised, what also goes to stderr.
        warnings: as they were said, each once.
        errors: as they were said.
        memory: `weights`, `scratch` and `activation` to bytes, as far as the builder told; the largest of them.
    """

    verbosity: str = "error"
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def take(self, severity: str, message: str) -> None:
        """Keep a message."""
        level = _LEVELS.get(severity, 0)
        if level == _LEVELS["ERROR"]:
            self.errors.append(message)
        elif severity == "WARNING" and message not in self.warnings:
            self.warnings.append(message)
        elif severity == "INFO" and (match := _BYTES.match(message)):
            key, size = match[1].lower(), int(match[2])
            self.memory[key] = max(size, self.memory.get(key, 0))
        if 0 < level <= _WORDS[self.verbosity]:
            sys.stderr.write(f"{severity.lower()}: {message}\n")


def shared_logger(trt: Any) -> Any:
    """Return the one logger of a module; outside a recording only errors are printed. `last_error` is the last one."""
    with _making:
        if trt.__name__ not in _loggers:
            _loggers[trt.__name__] = _make_logger(trt)
        return _loggers[trt.__name__]


@contextmanager
def recording(trt: Any, verbosity: str = "error") -> Iterator[Recording]:
    """Record what a module logs inside; one recording at a time, others wait."""
    with _recording:
        logger, record = shared_logger(trt), Recording(verbosity)
        logger.record = record
        try:
            yield record
        finally:
            logger.record = None


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.record: Recording | None = None
            self.last_error = "no message"

        def log(self, severity: Any, message: str) -> None:
            if _LEVELS.get(severity.name, 0) == _LEVELS["ERROR"]:
                self.last_error = message.splitlines()[0] if message else self.last_error
            if self.record is not None:
                self.record.take(severity.name, message)
            elif _LEVELS.get(severity.name, 0) == 0:
                sys.stderr.write(f"{trt.__name__}: {message}\n")

    return Logger()
