"""The official networks, full size: float64, architecture from the bare state dict, and the exported graph."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils._python_dispatch import TorchDispatchMode

from repmlp_deploy import Predictor, get_model, inference_model
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.card import load_card
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.proof.probe import run_network
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.loading import infer_card, load_network
from repmlp_deploy.convert.source.state_dict import find_state_dict
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions
from support.golden_cases import GoldenCase, assert_matches_golden, names

pytestmark = pytest.mark.slow

CARDS = {
    "mmpretrain-repmlp-base-224": "repmlp-base_3rdparty_8xb64_in1k",
    "mmpretrain-repmlp-base-256": "repmlp-base_3rdparty_8xb64_in1k-256px",
}
EXPORTED = {"repmlpnet-t224"}
"""The smallest; a larger one is exported with all its proofs below."""
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


@pytest.mark.parametrize("name", [*names("repmlpnet-"), *CARDS])
def test_golden_networks(name: str) -> None:
    case = GoldenCase(name)
    state = find_state_dict(case.weights())
    card = infer_card(state.shapes(), family=state.layout.family, layout=state.layout.name, merged=False).card
    assert card.name == CARDS.get(name, name)
    trained = load_network(state.tensors, card, merged=False)
    assert sum(p.numel() for p in trained.parameters()) == case.about["parameters"]
    x, golden = case.input(), case.output()
    double = copy.deepcopy(trained).double()
    assert_matches_golden(run_network(double, x.astype(np.float64))[0], golden, atol=1e-10)
    del double
    if name not in EXPORTED:
        return
    folded = fold_affine(merge_branches(trained))
    del trained, state
    graph = export_graph(
        trace_network(folded, [torch.from_numpy(x)], BatchRange(min=1, opt=4, max=8)),
        input_names=["images"],
        output_names=["y"],
    )
    del folded
    session, _ = open_session(serialize_model(graph), RunnerOptions(device="cpu"))
    assert_matches_golden(session.run(None, {"images": x})[0], golden, atol=1e-5)


def test_the_golden_tolerance_notices_an_output_that_ignores_its_input() -> None:
    """The twin of the test above: the mean over the samples is within 1e-1 of every sample."""
    golden = GoldenCase("repmlpnet-t224").output()
    ignorant = np.repeat(golden.mean(axis=0, keepdims=True), len(golden), axis=0)
    assert np.abs(ignorant - golden).max() < 1e-1
    with pytest.raises(AssertionError):
        assert_matches_golden(ignorant, golden, atol=1e-1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        Image.fromarray(load_sample_image(name)).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in PHOTOGRAPHS]


@pytest.mark.parametrize("name", sorted(CARDS))
def test_mmpretrains_own_predictions_are_reproduced(name: str, photographs: list[Path], tmp_path: Path) -> None:
    """Preprocessing to the last level included: rounding of the resized size and of the crop's offset."""
    case = GoldenCase(name)
    checkpoint = tmp_path / "base.pth"
    torch.save({"meta": {}, "state_dict": case.weights()}, checkpoint)
    model = get_model(CARDS[name], pretrained=checkpoint)
    for path, photograph in zip(photographs, PHOTOGRAPHS, strict=True):
        said = case.about["sample_image_predictions"][photograph]
        ours = inference_model(model, path)
        assert (ours["pred_label"], ours["pred_class"]) == (said["pred_label"], said["pred_class"])
        for label, score in said["top5"]:
            assert ours["pred_scores"][label] == pytest.approx(score, abs=5e-8)


class Operations(TorchDispatchMode):
    """What PyTorch runs: the operations, and how many numbers they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.made += result.numel()
        return result


def test_merging_multiplies_no_matrices_and_copies_little() -> None:
    """B224: matrices are written by strided assignment, where convolving an identity takes seconds."""
    state = find_state_dict(GoldenCase("repmlpnet-b224").weights())
    trained = load_network(state.tensors, load_card("repmlpnet-b224"), merged=False)
    with Operations() as seen:
        merged = merge_branches(trained)
    assert not seen.names & {"convolution", "mm", "bmm", "addmm", "einsum", "matmul"}
    assert seen.made < 8 * sum(weight.numel() for weight in merged.state_dict().values())


MEASURED = """
import json, pathlib, sys
from repmlp_deploy.cli.export import main
sys.argv = ["export.py", *sys.argv[1:]]
try:
    main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(peak), file=sys.stderr)
"""


def test_a_full_size_export_is_small_and_predicts_what_mmpretrain_does(photographs: list[Path], tmp_path: Path) -> None:
    """B224 to ONNX and an RTX engine from mmpretrain's file: memory is part of what is promised."""
    name = "mmpretrain-repmlp-base-224"
    case = GoldenCase(name)
    torch.save({"meta": {}, "state_dict": case.weights()}, tmp_path / "b224.pth")
    options = ["--ckpt", "b224.pth", "--card", CARDS[name], "--format", "onnx,trt-rtx", "--out", "out", "--json"]
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    report = json.loads(child.stdout)
    peak = json.loads(child.stderr.splitlines()[-1])
    assert report["name"] == CARDS[name]
    assert peak < 4e9
    assert report["artifacts"]["trt-rtx"]["bytes"] > 270e6
    with Predictor(tmp_path / "out") as predictor:
        for path, photograph in zip(photographs, PHOTOGRAPHS, strict=True):
            said = case.about["sample_image_predictions"][photograph]
            answer = predictor(path)
            assert answer.pred_class == said["pred_class"]
            for label, score in said["top5"]:
                assert answer.pred_scores[label] == pytest.approx(score, abs=5e-8)
