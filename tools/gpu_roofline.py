"""The computed table of docs/tensorrt.md: the least time that B224 can take on a GPU, from the GPU's published peaks.

    .venv/bin/python tools/gpu_roofline.py           # write it into the file
    .venv/bin/python tools/gpu_roofline.py --check   # exit 1 if the file has another one

A batch of N takes at least

    t = max(2 · macs · N / peak, width · (weights + N · activations) / bandwidth).

*At best* no activation but the network's input and output leaves the chip; *unfused*, every operation reads its inputs
from memory and writes its outputs there. An engine lies between the two, and above both by what its kernels miss.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "docs" / "tensorrt.md"
BEGIN = "<!-- roofline: begin; made by tools/gpu_roofline.py -->"
END = "<!-- roofline: end -->"

# repmlpnet-b224, folded, as repmlp-bench counts it: an image's, but weights
MACS = 6_656_905_728
WEIGHTS = 70_057_214
ACTIVATIONS = 65_919_016
BORDER = 151_528

WIDTHS = {"fp32": 4, "tf32": 4, "fp16": 2, "int8": 1}
BATCHES = (1, 8, 64)

HEAD = (
    "| GPU | precision | "
    + " | ".join(f"batch {n}: at best – unfused, ms" for n in BATCHES)
    + " | images/s, batch 64 |",
    "|---|---|" + "--:|" * (len(BATCHES) + 1),
)


@dataclass(frozen=True)
class Card:
    """A GPU's published peaks: 10¹² operations a second, dense, with float32 accumulation; 10⁹ bytes a second."""

    name: str
    tera_ops: dict[str, float]
    bandwidth: float


CARDS = (
    Card("L4", {"fp32": 30.3, "tf32": 60, "fp16": 121, "int8": 242}, 300),
    Card("A100 80 GB SXM", {"fp32": 19.5, "tf32": 156, "fp16": 312, "int8": 624}, 2039),
    Card("H100 SXM", {"fp32": 67, "tf32": 494, "fp16": 989, "int8": 1979}, 3350),
    Card("RTX 3090", {"fp32": 35.6, "fp16": 71, "int8": 284}, 936),
    Card("RTX 4090", {"fp32": 82.6, "fp16": 165, "int8": 661}, 1008),
    Card("RTX 5090", {"fp32": 104.8, "fp16": 209.5, "int8": 838}, 1792),
)


def least_ms(card: Card, precision: str, batch: int, activations: int) -> float:
    """Milliseconds that a batch takes at least, `activations` elements an image going through memory."""
    compute = 2 * MACS * batch / (card.tera_ops[precision] * 1e12)
    memory = WIDTHS[precision] * (WEIGHTS + batch * activations) / (card.bandwidth * 1e9)
    return 1e3 * max(compute, memory)


def table() -> str:
    """Return the table as Markdown."""
    return "\n".join([*HEAD, *(_row(card, precision) for card in CARDS for precision in card.tera_ops)])


def _row(card: Card, precision: str) -> str:
    bounds = [[least_ms(card, precision, n, elements) for elements in (BORDER, ACTIVATIONS)] for n in BATCHES]
    cells = [f"{best:.3g} – {unfused:.3g}" for best, unfused in bounds]
    best, unfused = (BATCHES[-1] / ms * 1e3 for ms in bounds[-1])
    return f"| {card.name} | {precision} | {' | '.join(cells)} | {_round(unfused)} – {_round(best)} |"


def _round(value: float) -> str:
    """Two figures: peaks are not known to more."""
    return f"{float(f'{value:.2g}'):,.0f}"


def main() -> int:
    """Write or check the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the table is another")
    check = parser.parse_args().check
    text = FILE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if check and made != text:
        sys.stderr.write(f"{FILE.name} has another table: run tools/gpu_roofline.py\n")
        return 1
    if not check:
        FILE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
