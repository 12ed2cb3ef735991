"""The clients that people have get what `Predictor` gives."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy.runtime.predictor import Predictor
from support.clients.environment import environment_python
from support.serving import Server

SCRIPTS = Path(__file__).parents[1] / "support" / "clients"


@pytest.mark.slow
@pytest.mark.parametrize("client", ["triton", "kserve"])
def test_clients_get_what_the_predictor_gives(
    client: str, server: Server, predictor: Predictor, digit_files: list[Path], tmp_path: Path
) -> None:
    batch = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "batch.npz", batch=batch)
    script, out = SCRIPTS / f"ask_{client}.py", tmp_path / "out.npz"
    command = [environment_python(), script, server.http, server.grpc, tmp_path / "batch.npz", out, *digit_files]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    predictions = [predictor(path) for path in digit_files]
    found = np.load(out)
    ways = {name.partition(".")[0] for name in found}
    assert len(ways) == 3
    for name, values in found.items():
        if name.endswith(".logits"):
            assert (values == predictor.logits(batch)).all(), name
        elif name.endswith(".index"):
            assert values.tolist() == [prediction.pred_label for prediction in predictions], name
        else:
            assert values.tolist() == [prediction.pred_class for prediction in predictions], name
