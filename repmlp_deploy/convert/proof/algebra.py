"""The algebra apart from rounding: merging and folding once more, in float64, where nothing else is left to err.

Three things are compared, with inputs x and the trained network f, all in float64 unless said otherwise:

- **outputs:** merge(f)(x) and fold(merge(f))(x) with f(x). What is between them is float64's own rounding, or a bug.
- **redrawn statistics:** the same for f with every BatchNorm's mean, variance, weight and bias drawn anew, far from the
  identity. A checkpoint whose statistics are nearly trivial cannot hide a formula that forgets one of them. Means and
  variances are drawn around those of the map that reaches the BatchNorm, so that no gate or activation saturates, which
  would hide what comes after it.
- **weights:** every weight of the float32 forms that go on from here with its float64 twin. An error too small to show
  in the outputs, a thousandth on one weight of ten million, is ten thousand roundings here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Hop
from repmlp_deploy.errors import MissingDependency, VerificationError
from repmlp_deploy.numerics import allowed_error, compare, margin_of

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    raise MissingDependency("torch", "export") from None

from repmlp_deploy.convert.proof.certificate import Certifier
from repmlp_deploy.convert.proof.probe import SEED, run_network
from repmlp_deploy.nets.blocks.algebra import CHUNK, BatchNorm
from repmlp_deploy.nets.surgery import in_double

__all__ = ["Transformation", "compare_weights", "prove_algebra", "redraw_statistics"]

_ROUNDING = 2.0**-24  # relative error of one rounding to float32
_SMALL_ROW = 2.0**-10  # of the tensor's largest weight: sums that cancel down to less round like this


@dataclass(frozen=True)
class Transformation:
    """A step of the re-parameterization, and what it made.

    Attributes:
        name: of its result.
        transform: the step: a module to a new module, in any dtype; it may use up the module it gets.
        stored: what it made of the float32 network.
    """

    name: str
    transform: Callable[[nn.Module], nn.Module]
    stored: nn.Module


def prove_algebra(
    trained: nn.Module, steps: Sequence[Transformation], certifier: Certifier, *, seed: int = SEED
) -> list[Hop]:
    """Return the rows of every step in float64, with the checkpoint's statistics and with redrawn ones.

    Args:
        trained: in evaluation mode, float32; left alone.
        steps: each applied to the result of the one before.
        certifier: compares, and holds the inputs.
        seed: of the statistics.

    Raises:
        VerificationError: more than rounding is left.
    """
    inputs, references = certifier.first_sample()

    def redrawn() -> tuple[nn.Module, Sequence[NDArray[Any]]]:
        network = in_double(trained)
        return network, redraw_statistics(network, inputs, seed)

    hops = _walk(lambda: (in_double(trained), references), steps, certifier, inputs, "float64", weights=True)
    return hops + _walk(redrawn, steps, certifier, inputs, "redrawn", weights=False)


def _walk(  # noqa: PLR0913 - the values that meet here
    make: Callable[[], tuple[nn.Module, Sequence[NDArray[np.float64]]]],
    steps: Sequence[Transformation],
    certifier: Certifier,
    inputs: Sequence[NDArray[Any]],
    how: str,
    *,
    weights: bool,
) -> list[Hop]:
    hops: list[Hop] = []
    form, references = make()  # made here, so that nobody else holds it
    for step in steps:
        form = step.transform(form)
        hops += certifier.require_outputs(f"{step.name}, {how}", run_network(form, *inputs), references)
        if weights:
            hops += certifier.require_passed([compare_weights(f"{step.name} weights", step.stored, form)])
    return hops


@torch.no_grad()
def redraw_statistics(network: nn.Module, inputs: Sequence[NDArray[Any]], seed: int = SEED) -> tuple[NDArray[Any], ...]:
    """Draw the statistics of every BatchNorm anew, in place, and run: the outputs.

    With m and s the mean and deviation of the map that reaches it, a BatchNorm gets μ ~ m + s·N(0, 1/4),
    σ² ~ s²·U(1/2, 2), γ ~ ±U(1/2, 3/2) and β ~ N(0, 1/4). Every tensor is drawn once, even if BatchNorms share it: the
    first has computed with it. Tensors that other modules use keep their values.

    Args:
        network: in evaluation mode, float64.
        inputs: by position, (n, …).
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    others = (module for module in network.modules() if not isinstance(module, BatchNorm))
    drawn = {id(x) for m in others for x in (*m.parameters(recurse=False), *m.buffers(recurse=False))}

    def is_new(what: Tensor | BatchNorm) -> bool:
        seen = id(what) in drawn
        drawn.add(id(what))
        return not seen

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    def draw(bn: BatchNorm, arguments: tuple[Tensor, ...]) -> None:
        if not arguments or bn.running_mean is None or bn.running_var is None or not is_new(bn):
            return
        mean, deviation = arguments[0].mean(), arguments[0].std(correction=0)
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        if is_new(bn.running_mean):
            normal = torch.empty_like(bn.running_mean).normal_(0, 0.5, generator=generator)
            bn.running_mean.copy_(mean + deviation * normal)
        if is_new(bn.running_var):
            bn.running_var.copy_(deviation**2 * uniform(bn.running_var, 0.5, 2.0))
        if bn.weight is not None and is_new(bn.weight):
            sign = uniform(bn.weight, -1.0, 1.0).sign()
            bn.weight.copy_(sign * uniform(bn.weight, 0.5, 1.5))
        if bn.bias is not None and is_new(bn.bias):
            bn.bias.normal_(0, 0.5, generator=generator)

    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    handles = [bn.register_forward_pre_hook(draw) for bn in norms]
    try:
        return run_network(network, *inputs)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compare_weights(name: str, stored: nn.Module, precise: nn.Module) -> Hop:
    """Return the row of the float32 weight that is farthest from its float64 twin, in roundings to float32.

    A row, along the last axis that is longer than 1, rounds like its largest weight. What is infinite in both, as in a
    mask of attention, is equal and has no size.

    Raises:
        VerificationError: the two have other weights, or one is not finite.
    """
    weights, twins = _floats(stored), _floats(precise)
    if weights.keys() != twins.keys():
        odd = min(weights.keys() ^ twins.keys())
        raise VerificationError(f"{name}: {odd} is a weight of the float32 network or of its float64 twin, not of both")
    lines = [_largest_error(key, weight, twins[key]) for key, weight in weights.items() if weight.numel()]
    if not lines:
        return _no_weights(name)
    worst = max(lines, key=lambda line: line[0])
    _, key, row, floor = worst
    rows = _both_finite(*(_rows(of[key])[row : row + 1] for of in (weights, twins)))
    if not all(values.isfinite().all() for values in rows):
        raise VerificationError(f"{name}: {key} has values that are not finite, or its float64 twin has them")
    result = compare(*(values.numpy() for values in rows), classes=False)
    allowed = allowed_error("weights", floor)
    return Hop(
        name=name,
        kind="weights",
        precision="fp32",
        batch=None,
        **result.as_dict(),
        floor=floor,
        allowed=allowed,
        passed=result.max_abs <= allowed,
        ratio=result.max_abs / floor if floor > 0 else None,
        margin=margin_of(result, floor=floor, precision="weights"),
        note=f"farthest: {key}, row {row}",
    )


def _no_weights(name: str) -> Hop:
    """Return the row of a network without any weight."""
    return Hop(
        name=name,
        kind="weights",
        precision="fp32",
        batch=None,
        max_abs=0.0,
        mean_abs=0.0,
        max_rel=0.0,
        between=None,
        cosine=1.0,
        top1=None,
        floor=0.0,
        allowed=0.0,
        passed=True,
        note="there are no weights",
    )


def _floats(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in network.state_dict().items() if value.is_floating_point()}


def _both_finite(stored: Tensor, precise: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, with zeros where they are infinite and equal."""
    stored, infinite = stored.double(), precise.isinf()
    if not infinite.any():
        return stored, precise
    same = infinite & (stored == precise)
    return stored.masked_fill(same, 0.0), precise.masked_fill(same, 0.0)


def _rows(weight: Tensor) -> Tensor:
    """Return (rows, n): the last axis is the last that is longer than 1."""
    shape = list(weight.shape) or [1]
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return weight.reshape(-1, shape[-1])


def _largest_error(key: str, weight: Tensor, twin: Tensor) -> tuple[float, str, int, float]:
    """Return (error in floors, key, row, floor) of the worst row of a weight.

    A floor is what one rounding to float32 costs the largest weight of the row.

    Raises:
        VerificationError: the shapes differ.
    """
    if weight.shape != twin.shape:
        raise VerificationError(f"{key} has shape {tuple(weight.shape)}; in float64 {tuple(twin.shape)}")
    stored, precise = _rows(weight), _rows(twin)
    step = max(1, CHUNK // stored.shape[1])
    errors, sizes = torch.empty(len(stored), dtype=torch.float64), torch.empty(len(stored), dtype=torch.float64)
    for start in range(0, len(stored), step):  # by chunks: float64 copies of all weights would not fit a cache
        rows = slice(start, start + step)
        known, exact = _both_finite(stored[rows], precise[rows])
        errors[rows] = (known - exact).abs_().amax(dim=1)
        sizes[rows] = torch.maximum(exact.amax(dim=1), -exact.amin(dim=1))
    floors = _ROUNDING * torch.maximum(sizes, _SMALL_ROW * sizes.max())
    ratios = torch.where(errors == 0, 0.0, errors / floors).nan_to_num(nan=torch.inf)
    row = int(ratios.argmax())
    return float(ratios[row]), key, row, float(floors[row])
