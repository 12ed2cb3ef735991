"""The table of models in docs/reference/models.md and models/README.md, made from the cards.

.venv/bin/python tools/models_table.py           # write it into both files
.venv/bin/python tools/models_table.py --check   # exit 1 if either file has another one
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repmlp_deploy.card import ModelCard, list_cards, load_card

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "docs" / "reference" / "models.md", ROOT / "models" / "README.md")
BEGIN = "<!-- models table: begin; made by tools/models_table.py -->"
END = "<!-- models table: end -->"

HEAD = (
    "| card | family | task | input | parameters (M) | multiply-adds (G) | top-1 (%) | top-5 (%) | weights |",
    "|---|---|---|---|--:|--:|--:|--:|---|",
)


def row(card: ModelCard) -> str:
    """One card as a line of the table; figures are the published ones."""
    published = card.published
    figures = ("", "", "", "")
    if published is not None:
        figures = (
            _figure(published.parameters, 1e6),
            _figure(published.macs, 1e9),
            _figure(published.top1, 1),
            _figure(published.top5, 1),
        )
    weights = "" if card.weights is None else "ship" if card.weights.file is not None else "download"
    cells = (
        f"`{card.name}`", card.family, card.task, f"{card.input_size[0]}x{card.input_size[1]}", *figures, weights
    )  # fmt: skip
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def table() -> str:
    """Return the whole table, between its markers."""
    return "\n".join([BEGIN, *HEAD, *(row(load_card(name)) for name in list_cards()), END])


def with_table(text: str) -> str:
    """`text` with this table in the place of the one it has."""
    before, rest = text.split(BEGIN)
    return before + table() + rest.split(END)[1]


def main() -> int:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    stale = [path for path in FILES if path.read_text() != with_table(path.read_text())]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)}: the table of models is out of date: run tools/models_table.py")
        else:
            path.write_text(with_table(path.read_text()))
    return 1 if check and stale else 0


def _figure(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:g}"


if __name__ == "__main__":
    sys.exit(main())
