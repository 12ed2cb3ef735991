"""The user's own network: how it is called, told by an example, and its checkpoint under its own names."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.flat import Flat, flatten_outputs

__all__ = ["FAMILY", "Interface", "default_card", "describe_interface", "fill_own_network", "make_own_network"]

FAMILY = "custom"

_IMAGE_AXES = 4  # (N, C, H, W)


@dataclass(frozen=True)
class Interface:
    """How a network is called.

    Attributes:
        inputs: names, in the order they are passed.
        examples: a tensor for each, (n, …).
        outputs: names, in the order they come back.
    """

    inputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    outputs: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every input to its shape without the batch."""
        return {name: tuple(x.shape[1:]) for name, x in zip(self.inputs, self.examples, strict=True)}


def make_own_network(factory: str) -> nn.Module:
    """Call `package.module:factory` and return its network in evaluation mode; modules in the working folder are found.

    Raises:
        InputError: there is no such factory, or it returns no module.
    """
    module_name, _, name = factory.partition(":")
    if not module_name or not name.isidentifier():
        raise InputError(f"--module is {factory[:200]!r}; expected package.module:factory")
    if module_name.partition(".")[0] in (*sys.stdlib_module_names, ""):
        raise InputError(
            f"--module {factory}: {module_name or 'a relative module'} holds no network; name your package"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise InputError(f"--module {factory}: {error}") from None
    except AttributeError:
        raise InputError(f"--module {factory}: {module_name} has no {name}") from None
    finally:
        sys.path.pop(0)
    try:
        network = make()
    except SystemExit:
        raise InputError(f"--module {factory} ends the process instead of returning a network") from None
    except TypeError as error:
        raise InputError(f"--module {factory}: {_first_line(error)}; it is called without arguments") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"--module {factory} returns a {type(network).__name__}; expected a torch.nn.Module")
    return network.eval()


def fill_own_network(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load `tensors` into `network`, strictly.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; the first is named.
    """
    expected = network.state_dict()
    for key, tensor in tensors.items():
        if key not in expected:
            raise CheckpointError(f"{name} has {key}, which {type(network).__name__} has not")
        if tensor.shape != expected[key].shape:
            got, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            raise CheckpointError(f"{name}: {key} has shape {got}; {type(network).__name__} expects {wanted}")
    for key in expected:
        if key not in tensors and not key.endswith("num_batches_tracked"):
            raise CheckpointError(f"{name} has no {key}, which {type(network).__name__} needs")
    network.load_state_dict(tensors, strict=False)


@torch.no_grad()
def describe_interface(network: nn.Module, example_input: Any) -> tuple[nn.Module, Interface]:
    """Return `network` as a function from tensors by position to tensors, and how it is called.

    Args:
        network: in evaluation mode, float32, on the CPU.
        example_input: a tensor, a sequence of them by position, or a mapping of them by name; the first axis is the
            batch, the other sizes are part of the exported network.

    Raises:
        InputError: the network is not as above, does not run on the example, or its outputs have no batch.
    """
    called = type(network).__name__
    _require_plain(network)
    keywords = tuple(example_input) if isinstance(example_input, Mapping) else ()
    examples = _tensors(example_input)
    try:
        answer = network(**dict(zip(keywords, examples, strict=True))) if keywords else network(*examples)
        outputs = flatten_outputs(answer)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{called} does not run on example_input: {_first_line(error)}") from None
    if not outputs:
        raise InputError(f"{called} returns no tensor")
    batch = len(examples[0])
    for name, value in outputs.items():
        if not value.ndim or len(value) != batch:
            raise InputError(
                f"{called}: {name} has shape {tuple(value.shape)}; its first axis must be the batch {batch}"
            )
        if value.dtype != torch.float32:
            raise InputError(f"{called}: {name} is {value.dtype}; only float32 outputs can be proved: return scores")
    inputs = keywords or _parameter_names(network, len(examples))
    names = tuple(f"{name}_out" if name in inputs else name for name in outputs)
    plain = isinstance(answer, Tensor) and not keywords and len(examples) == 1
    return (network if plain else Flat(network, keywords).eval()), Interface(inputs, examples, names)


def default_card(network: nn.Module, interface: Interface) -> ModelCard:
    """Return the card of a network that came without one; it says nothing about outputs or images."""
    sizes = [(x.shape[2], x.shape[3]) for x in interface.examples if x.ndim == _IMAGE_AXES]
    return ModelCard(
        name=re.sub(r"[^A-Za-z0-9_]", "-", type(network).__name__).strip("_-") or FAMILY,
        family=FAMILY,
        task="custom",
        input_size=sizes[0] if sizes else (1, 1),  # read by nothing where the task is custom
        network={},
        preprocessing=Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    )


def _tensors(example_input: Any) -> tuple[Tensor, ...]:
    if isinstance(example_input, Tensor):
        given: Sequence[Any] = (example_input,)
    elif isinstance(example_input, Mapping):
        given = tuple(example_input.values())
    else:
        given = tuple(example_input) if isinstance(example_input, Sequence) else ()
    if not given or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in given):
        raise InputError(
            f"example_input is a {type(example_input).__name__}; "
            "expected a tensor (n, …), or a sequence or mapping of them, each with at least one sample"
        )
    if len({len(x) for x in given}) != 1:
        raise InputError(f"example_input has batches of {', '.join(str(len(x)) for x in given)}; they must be equal")
    return tuple(x.detach() for x in given)


def _require_plain(network: nn.Module) -> None:
    """Raise unless the network can be proved here: evaluation mode, float32, CPU."""
    called = type(network).__name__
    training = next((name for name, module in network.named_modules() if module.training), None)
    if training is not None:
        raise InputError(f"{training or called} is in training mode: call .eval() first")
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.device.type != "cpu":
            raise InputError(f"{called}: {name} is on {value.device}: call .cpu() first")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f"{called}: {name} is {value.dtype}: call .float() first")


def _parameter_names(network: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of `forward`'s first parameters, or numbered names if it has none."""
    parameters = inspect.signature(network.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[:count]) if len(names) >= count else tuple(f"input_{i}" for i in range(count))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
