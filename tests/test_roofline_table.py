"""The computed table of the TensorRT guide follows from its formula, its figures and nothing else."""

from __future__ import annotations

import pytest

import gpu_roofline
from gpu_roofline import ACTIVATIONS, BORDER, CARDS, MACS, WEIGHTS, least_ms


def test_the_guide_has_the_table_that_the_tool_makes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_roofline.py", "--check"])
    assert gpu_roofline.main() == 0
    monkeypatch.setattr(gpu_roofline, "MACS", MACS + MACS // 10)
    assert gpu_roofline.main() == 1
    assert "has another table" in capsys.readouterr().err


def test_the_bound_is_arithmetic_or_memory_whichever_takes_longer() -> None:
    l4 = next(card for card in CARDS if card.name == "L4")
    assert least_ms(l4, "fp16", 1, BORDER) == pytest.approx(2 * (WEIGHTS + BORDER) / 300e9 * 1e3)
    assert least_ms(l4, "fp16", 64, BORDER) == pytest.approx(2 * MACS * 64 / 121e12 * 1e3)
    assert least_ms(l4, "fp16", 64, ACTIVATIONS) > least_ms(l4, "fp16", 64, BORDER)
