"""PyTorch: the trained, merged and folded network, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.bench.subjects.table import Job
from repmlp_deploy.convert.reparam.merge import upstream_form
from repmlp_deploy.convert.source.trained import Trained, load_trained
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import InputError

__all__ = ["NetworkSubject", "open_network"]

FORMS: dict[str, Callable[[Trained], nn.Module]] = {
    "torch-trained": lambda trained: upstream_form(trained.network),
    "torch-merged": lambda trained: transform_and_prove(trained, "merged").value.network,
    "torch-compile": lambda trained: transform_and_prove(trained, "merged").value.network,
    "torch-folded": lambda trained: transform_and_prove(trained, "folded").value.network,
}
"""Format to what makes its network from the trained one; every row is compared with the probe before it is timed."""


def open_network(job: Job) -> NetworkSubject:
    """Load the job's network from its checkpoint and transform it."""
    if job.checkpoint is None:
        raise InputError(f"{job.format} needs a checkpoint")
    torch.set_num_threads(job.threads)
    trained = load_trained(job.checkpoint, job.card, allow_merged=True)
    return NetworkSubject(FORMS[job.format](trained), compiled=job.format == "torch-compile")


class NetworkSubject:
    """A PyTorch network on the CPU."""

    def __init__(self, network: nn.Module, *, compiled: bool) -> None:
        parameter = next(network.parameters())
        self._network = torch.compile(network) if compiled else network
        self.proof: dict[str, Any] = {
            "runtime": f"torch {torch.__version__}, {'compiled by inductor' if compiled else 'eager'}",
            "device": str(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32."""
        with torch.inference_mode():
            output: NDArray[np.float32] = self._network(torch.from_numpy(batch)).numpy()
        return output

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return nothing: PyTorch rows are not profiled."""
        del batch, calls
        return []
