"""One of the processes that `process_engine` starts: `python -m repmlp_deploy.evaluation.process_worker`.

It reads pickles from its first process: a task, then chunks of parts; and says after every part that it is written.
Whatever libraries print goes to stderr. It ends as soon as there is nobody left to read from.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from repmlp_deploy.errors import (
    BundleError,
    DeviceError,
    InputError,
    MissingDevice,
    OutputError,
    RepMLPError,
    VerificationError,
)
from repmlp_deploy.evaluation.filling import Parts, fill_parts
from repmlp_deploy.evaluation.sources import Source
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.text import kind_and_line

__all__ = ["Task", "main"]

_SENT = (BundleError, DeviceError, InputError, MissingDevice, OutputError, VerificationError)
"""Errors that arrive as they are, and what derives from them: all of these can be pickled."""


@dataclass(frozen=True)
class Task:
    """What a process has to do.

    Attributes:
        bundle: folder.
        how: keywords of `Predictor`.
        source: the images.
        parts: of the job.
    """

    bundle: str
    how: Mapping[str, Any]
    source: Source
    parts: Parts


def main() -> None:
    """Do what the first process says, until it closes the pipe or dies."""
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    told: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_listen, args=(sys.stdin.buffer, told), daemon=True).start()
    try:
        task: Task = told.get()
        with Predictor(task.bundle, check=True, **task.how) as predictor:
            while True:
                readers = task.how["threads"]
                for written in fill_parts(predictor, task.source, task.parts, told.get(), readers=readers):
                    _say(said, written)
    except BrokenPipeError:
        os._exit(1)
    except RepMLPError as error:
        _say(said, error if isinstance(error, _SENT) else DeviceError(str(error)))
    except Exception as error:  # noqa: BLE001 - it must reach the first process
        _say(said, InputError(f"a process failed: {kind_and_line(error)}"))


def _listen(pipe: IO[bytes], told: SimpleQueue[Any]) -> None:
    """Hand on what arrives; end this process in the moment in which the first one dies, whatever it is doing."""
    try:
        while True:
            told.put(pickle.load(pipe))  # noqa: S301 - from the process that started this one
    except (EOFError, OSError):
        os._exit(1)


def _say(pipe: IO[bytes], message: Any) -> None:
    pickle.dump(message, pipe)
    pipe.flush()


if __name__ == "__main__":
    main()
