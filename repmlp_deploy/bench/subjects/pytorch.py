"""PyTorch: the trained, merged and folded network, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.bench.subjects.cuda import CudaNetwork
from repmlp_deploy.bench.subjects.table import Job, OpenedSubject
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.reparam.merge import upstream_form
from repmlp_deploy.convert.source.opening import open_source
from repmlp_deploy.convert.source.trained import SourceRequest, Trained
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import InputError

__all__ = ["NetworkSubject", "open_network", "open_trained", "upstream_merge"]


def upstream_merge(model: str | None, graph: str) -> str:
    """Return what merges a row's network: its own package for the merged graph of a network of timm."""
    return "hooks" if model is not None and graph == "merged" else "auto"


def upstream_network(trained: Trained) -> nn.Module:
    """Return the network as its own package merges it."""
    merge = upstream_merge(trained.model, "merged")
    return transform_and_prove(trained, "merged", merge=merge).value.network


FORMS: dict[str, Callable[[Trained], nn.Module]] = {
    "torch-trained": lambda trained: upstream_form(trained.network),
    "torch-merged": upstream_network,
    "torch-compile": upstream_network,
    "torch-folded": lambda trained: transform_and_prove(trained, "folded").value.network,
}
"""Format to what makes its network from the trained one; every row is compared with the probe before it is timed."""


def open_trained(
    checkpoint: str | Path, card: ModelCard | None, model: str | None = None, *, allow_merged: bool = False
) -> Trained:
    """Load the trained network of a family, or of timm.

    Args:
        checkpoint: the file.
        card: what the network is.
        model: `timm:NAME[,…]`, for a network of timm; by default names and shapes tell the network.
        allow_merged: see `load_trained`.
    """
    size = None if card is None else card.input_size
    return open_source(checkpoint, SourceRequest(card=card, input_size=size, model=model, allow_merged=allow_merged))


def open_network(job: Job) -> OpenedSubject:
    """Load the job's network from its checkpoint and transform it."""
    if job.checkpoint is None:
        raise InputError(f"{job.format} needs a checkpoint")
    torch.set_num_threads(job.threads)
    trained = open_trained(job.checkpoint, job.card, job.model, allow_merged=True)
    network, compiled = FORMS[job.format](trained), job.format == "torch-compile"
    if job.device == "cuda":
        return CudaNetwork(network, job.precision, compiled=compiled)
    return NetworkSubject(network, compiled=compiled)


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

    def device_ms(self, batch: NDArray[np.float32], calls: int) -> None:
        """Return nothing: a CPU has no clock of its own."""
        del batch, calls

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return nothing: PyTorch rows are not profiled."""
        del batch, calls
        return []
