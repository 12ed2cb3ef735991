"""TensorRT's messages: one logger a module, and recordings of what is said while something works."""

from __future__ import annotations

import threading

import pytest
import tensorrt_rtx as trt

from repmlp_deploy.runtime.tensorrt.log import recording, shared_logger

LOGGER = trt.ILogger


def say(severity: object, message: str) -> None:
    shared_logger(trt).log(severity, message)


def test_a_module_has_one_logger_and_it_is_the_builders() -> None:
    assert shared_logger(trt) is shared_logger(trt)
    assert trt.Builder(shared_logger(trt)).logger is shared_logger(trt)


def test_a_recording_keeps_errors_warnings_once_and_memory() -> None:
    with recording(trt) as said:
        say(LOGGER.WARNING, "odd")
        say(LOGGER.WARNING, "odd")
        say(LOGGER.ERROR, "bad")
        say(LOGGER.INTERNAL_ERROR, "worse")
        say(LOGGER.INFO, "Total Weights Memory: 100 bytes")
        say(LOGGER.INFO, "Max Scratch Memory: 30 bytes")
        say(LOGGER.INFO, "Max Scratch Memory: 20 bytes")
        say(LOGGER.VERBOSE, "Max Scratch Memory: 999 bytes")
    assert (said.warnings, said.errors) == (["odd"], ["bad", "worse"])
    assert said.memory == {"weights": 100, "scratch": 30}


@pytest.mark.parametrize(
    ("verbosity", "told"),
    [("error", ""), ("warning", "warning: w\n"), ("info", "warning: w\ninfo: i\n")],
)
def test_verbosity_is_what_goes_to_stderr(capsys: pytest.CaptureFixture[str], verbosity: str, told: str) -> None:
    with recording(trt, verbosity):
        say(LOGGER.ERROR, "is raised, and not told")
        say(LOGGER.WARNING, "w")
        say(LOGGER.INFO, "i")
        say(LOGGER.VERBOSE, "v")
    assert capsys.readouterr().err == told


def test_outside_a_recording_errors_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with recording(trt) as said:
        pass
    say(LOGGER.ERROR, "late")
    say(LOGGER.WARNING, "nothing to anybody")
    assert said.errors == []
    assert capsys.readouterr().err == "tensorrt_rtx: late\n"


def test_recordings_do_not_mix() -> None:
    """The second waits until the first has ended."""
    first, order = threading.Event(), []

    def other() -> None:
        first.wait()
        with recording(trt):
            order.append("second")

    thread = threading.Thread(target=other)
    thread.start()
    with recording(trt):
        first.set()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
