"""Capture of what libraries print, warn and log while a step runs, so that the terminal shows only our own report."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["captured_output"]


@contextlib.contextmanager
def captured_output(*packages: str) -> Iterator[io.StringIO]:
    """Collect what Python code prints and logs in the block, and silence its warnings.

    Args:
        packages: whose loggers to capture besides the root logger. A logger with handlers of its own would write to
            the terminal in spite of a redirected stdout.
    """
    text = io.StringIO()
    names = [None, *(n for n in logging.root.manager.loggerDict if n.split(".")[0] in packages)]
    loggers = [logger for logger in map(logging.getLogger, names) if logger.handlers or logger is logging.root]
    before = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.StreamHandler(text)]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield text
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
