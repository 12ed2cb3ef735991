"""The README is short, and its figures are those of the run that it names."""

from __future__ import annotations

import re
from pathlib import Path

import badges

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    "PyTorch, as trained": "torch-trained fp32",
    "ONNX Runtime, merged only": "onnx-merged fp32",
    "ONNX Runtime, float32": "onnx fp32",
    "ONNX Runtime, int8": "onnx int8",
    "OpenVINO, float32": "openvino fp32",
    "OpenVINO, bfloat16": "openvino bf16",
    "OpenVINO, int8": "openvino int8",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_it_has_at_most_700_words() -> None:
    assert len(README.split()) <= 700


def test_its_sentences_are_short() -> None:
    prose = re.sub(r"```.*?```|^\|.*?$|<!--.*?-->|^#.*?$|!\[.*?\)", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.:])\s+", prose)]
    assert len(sentences) > 20
    assert not [" ".join(words) for words in sentences if len(words) > 25]


def test_its_figures_are_those_of_the_run_that_it_names() -> None:
    (named,) = re.findall(r"\[one run\]\(([^)]+)\)", README)
    report = (ROOT / named).read_text(encoding="utf-8")
    part = report[report.index("## repmlpnet-b224, batch 8") : report.index("## repmlpnet-b224, batch 64")]
    measured = {cells(line)[0]: cells(line) for line in part.splitlines() if line.startswith("| ")}
    rows = {cells(line)[0]: cells(line)[1:] for line in README.splitlines() if line.startswith("| ")}
    for ours, theirs in ROWS.items():
        images, ratio, error = rows[ours]
        assert (images, error) == (measured[theirs][9], measured[theirs][11])
        said = measured[theirs][10]
        assert ratio == ("1×" if said == "base" else said.split()[0])


def test_it_has_five_links_to_read_on() -> None:
    links = re.findall(r"^- \[.*?\]\((.*?)\)", README[README.index("## Read on") :], flags=re.MULTILINE)
    assert len(links) == 5
    assert all((ROOT / link).is_file() for link in links)


def test_its_badges_are_what_the_project_says() -> None:
    shown = re.findall(r"!\[[^\]]*\]\(docs/images/(badge-\S+)\)", README)
    assert sorted(shown) == sorted(badges.badges())
    for name, text in badges.badges().items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == text
    assert "3.11 | 3.12 | 3.13" in badges.badges()["badge-python.svg"]
