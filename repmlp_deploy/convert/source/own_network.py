"""The user's own network: how it is called, told by an example, and its checkpoint under its own names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.convert.options import find_named
from repmlp_deploy.convert.source.description import usual_preprocessing
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.flat import Flat, flatten_outputs
from repmlp_deploy.text import first_line, kind_and_line

__all__ = [
    "FAMILY",
    "Interface",
    "default_card",
    "describe_interface",
    "fill_own_network",
    "inputs_as_passed",
    "make_own_network",
    "unwrapped",
]

FAMILY = "custom"

_IMAGE_AXES = 4  # (N, C, H, W)
_COLOURS = 3
_REPEATED = 1e-3  # of the largest output: more than sums in another order make


@dataclass(frozen=True)
class Interface:
    """How a network is called.

    Attributes:
        inputs: names, in the order they are passed.
        examples: a tensor for each, (n, …).
        outputs: names, in the order they come back.
        classes: channels of a single output (n, classes, …); None for several outputs, or one without classes.
        by_name: whether the inputs are passed by name.
    """

    inputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    classes: int | None = None
    by_name: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every input to its shape without the batch."""
        return {name: tuple(x.shape[1:]) for name, x in zip(self.inputs, self.examples, strict=True)}


def make_own_network(factory: str) -> nn.Module:
    """Call `package.module:factory` and return its network in evaluation mode; modules in the working folder are found.

    Raises:
        InputError: there is no such factory, or it returns no module.
    """
    make = find_named("--module", factory)
    try:
        network = make()
    except SystemExit:
        raise InputError(f"--module {factory} ends the process instead of returning a network") from None
    except TypeError as error:
        raise InputError(f"--module {factory}: {first_line(error)}; it is called without arguments") from None
    except Exception as error:  # noqa: BLE001 - a user's code raises anything
        raise InputError(f"--module {factory} fails: {kind_and_line(error)}") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"--module {factory} returns a {type(network).__name__}; expected a torch.nn.Module")
    return unwrapped(network).eval()


def fill_own_network(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load `tensors` into `network`, strictly; of tied weights, one is enough.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape, or tied weights differ; the first is named.
    """
    expected = network.state_dict()
    for key, tensor in tensors.items():
        if key not in expected:
            raise CheckpointError(f"{name} has {key}, which {type(network).__name__} has not: --ignore leaves keys out")
        if tensor.shape != expected[key].shape:
            got, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            of_classes = wanted[:1] == (getattr(network, "num_classes", None),) and got[1:] == wanted[1:]
            remedy = f": build it with num_classes={got[0]}" if of_classes and got else ""
            raise CheckpointError(f"{name}: {key} has shape {got}; {type(network).__name__} expects {wanted}{remedy}")
    ties = _ties(expected)
    for key in expected:
        given = next((other for other in ties[key] if other in tensors), None)
        if given is None and not key.endswith("num_batches_tracked"):
            raise CheckpointError(f"{name} has no {key}, which {type(network).__name__} needs")
        if given is not None and key in tensors and not torch.equal(tensors[given], tensors[key]):
            raise CheckpointError(
                f"{name}: {given} and {key} differ, and {type(network).__name__} has one weight for both"
            )
    network.load_state_dict(tensors, strict=False)


def _ties(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the keys that share every key's memory, itself among them: `save_model` of safetensors writes only one."""
    places: dict[Any, list[str]] = {}
    found = {}
    for key, value in state.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.data_ptr() else key
        found[key] = places.setdefault(place, [])
        found[key].append(key)
    return found


@torch.inference_mode(mode=False)  # in it, tensors do not count the writes
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
    passed = tuple(x.clone() for x in examples)
    versions = [x._version for x in passed]  # noqa: SLF001 - of PyTorch: it counts the writes, also those of equal values
    answer, outputs = _answers(network, keywords, passed)
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
    _require_same(called, outputs, _answers(network, keywords, tuple(x.clone() for x in examples))[1])
    inputs = keywords or _parameter_names(network, len(examples))
    names = _output_names(tuple(outputs), inputs)
    writes = versions != [x._version for x in passed]  # noqa: SLF001 - as above
    plain = isinstance(answer, Tensor) and not (keywords or writes) and len(examples) == 1 and _names_its_input(network)
    shapes = [value.shape for value in outputs.values()]
    classes = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) > 1 else None
    interface = Interface(inputs, examples, names, classes, by_name=bool(keywords))
    return (network if plain else Flat(network, keywords, copies=writes).eval()), interface


def _answers(network: nn.Module, keywords: Sequence[str], inputs: Sequence[Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return what the network answers, as it is and by name."""
    try:
        answer = network(**dict(zip(keywords, inputs, strict=True))) if keywords else network(*inputs)
        return answer, flatten_outputs(answer)
    except Exception as error:  # noqa: BLE001 - a user's code raises anything
        raise InputError(f"{type(network).__name__} does not run on example_input: {kind_and_line(error)}") from None


def _require_same(called: str, outputs: Mapping[str, Tensor], repeated: Mapping[str, Tensor]) -> None:
    """Raise if the same inputs got other outputs the second time."""
    for name, value in outputs.items():
        again = repeated.get(name)
        if again is None or again.shape != value.shape or not _is_close(value, again):
            raise InputError(
                f"{called}: {name} differs between two calls with the same inputs: switch off dropout, noise and state "
                "kept between calls in forward, where .eval() does not do it"
            )


def _is_close(value: Tensor, again: Tensor) -> bool:
    noise = _REPEATED * float(value.abs().nan_to_num().max()) if value.numel() else 0.0
    return torch.allclose(value, again, rtol=0, atol=noise, equal_nan=True)


def inputs_as_passed(network: nn.Module, inputs: Mapping[str, Tensor], *, by_name: bool | None) -> Any:
    """Return the inputs of a bundle as its network takes them.

    Args:
        network: gives the way where the bundle does not: that of its own `example_input`.
        inputs: by the bundle's names, in order.
        by_name: what the bundle says; None if it says nothing.
    """
    if by_name is None:
        own = getattr(network, "example_input", None)
        by_name = len(inputs) > 1 if own is None else isinstance(own, Mapping)
    return dict(inputs) if by_name else tuple(inputs.values())


def default_card(network: nn.Module, interface: Interface, *, with_images: bool = False) -> ModelCard:
    """Return the card of a network that came without one.

    Args:
        network: gives the name.
        interface: gives the size.
        with_images: the user says how images become inputs, so the network classifies them. Otherwise the card says
            nothing about outputs or images.

    Raises:
        InputError: with images, the network does not take one image and return one vector of logits.
    """
    sizes = [(x.shape[2], x.shape[3]) for x in interface.examples if x.ndim == _IMAGE_AXES]
    classifies = len(interface.examples) == len(sizes) == 1 and interface.classes is not None
    if with_images and not classifies:
        raise InputError(
            f"{type(network).__name__} does not turn one image into logits of classes: say what it takes with --card"
        )
    size = sizes[0] if sizes else (1, 1)  # read by nothing where the task is custom
    channels = interface.examples[0].shape[1] if with_images else _COLOURS
    return ModelCard(
        name=re.sub(r"[^A-Za-z0-9_]", "-", type(network).__name__).strip("_-") or FAMILY,
        family=FAMILY,
        task="classify" if with_images else "custom",
        input_size=size,
        network={},
        preprocessing=usual_preprocessing(size, channels)
        if with_images
        else Preprocessing(mean=(0.0,) * _COLOURS, std=(1.0,) * _COLOURS),
    )


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        parallel = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inside = network.module if parallel else getattr(network, "_orig_mod", None)  # torch.compile's name for it
        if not isinstance(inside, nn.Module):
            return network
        network = inside


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
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm) and (module.running_mean is None or module.running_var is None):
            raise InputError(
                f"{name or called} ({type(module).__name__}) keeps no running statistics, so its output depends on the "
                "batch: train it with track_running_stats=True"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or called} is TorchScript, which cannot be traced again: pass the network that it was made of"
            )
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.device.type != "cpu":
            raise InputError(f"{called}: {name} is on {value.device}: call .cpu() first")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f"{called}: {name} is {value.dtype}: call .float() first")


def _output_names(outputs: Sequence[str], inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs' names; one that an input has gets `_out` behind it until nothing else has it."""
    taken, names = {*inputs, *outputs}, []
    for output in outputs:
        name = output
        while name in taken and (name != output or name in inputs):
            name = f"{name}_out"
        taken.add(name)
        names.append(name)
    return tuple(names)


def _names_its_input(network: nn.Module) -> bool:
    """Return whether `forward` has a parameter for its input; `*args`, as of a wrapper, is none to torch.export."""
    first = next(iter(inspect.signature(network.forward).parameters.values()), None)
    return first is not None and first.kind is not first.VAR_POSITIONAL


def _parameter_names(network: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of `forward`'s first parameters, or numbered names if it has none."""
    parameters = inspect.signature(network.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[:count]) if len(names) >= count else tuple(f"input_{i}" for i in range(count))
