"""Networks that cannot be exported are refused in one line, with the module and the remedy; odd ones that can, are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repmlp_deploy import export
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.flat import Flat, failing_module
from support.networks import randomize
from support.standins.arithmetic import conv_bn
from support.standins.repvgg import RepVGGBlock

X = torch.zeros(1, 3, 8, 8)


class Branching(nn.Module):
    """Take one way or the other, as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Numpy(nn.Module):
    """Leave PyTorch in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


def network(*parts: nn.Module) -> nn.Module:
    return randomize(nn.Sequential(RepVGGBlock(3, 3), nn.Sequential(nn.ReLU(), *parts), nn.Flatten()))


@pytest.mark.parametrize("merge", ["auto", "regions", "hooks"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Branching, r"torch\.export cannot trace 1\.1 \(Branching\): Could not guard on data-dependent expression"),
        (Numpy, r"torch\.export cannot trace 1\.1 \(Numpy\): "),
    ],
)
def test_what_cannot_be_traced_is_named_with_the_reason(
    part: type[nn.Module], said: str, merge: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        export(network(part()), example_input=X, merge=merge, out=tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert ("--merge hooks --format checkpoint" in str(caught.value)) == (merge != "hooks")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "bundle").exists()


class RowByRow(nn.Module):
    """Go through a batch in Python, so that every size has a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.flatten() * 2 for row in x])


class Mixed(nn.Module):
    """Give two rows whatever the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :5]


def test_the_ways_out_that_are_named_work(tmp_path: Path) -> None:
    bundle = export(
        network(Branching()), example_input=X, merge="hooks", formats="checkpoint", batch="2", out=tmp_path / "weights"
    )
    assert list(bundle.manifest.artifacts) == ["checkpoint"]
    by_rows = randomize(nn.Sequential(RepVGGBlock(3, 3), RowByRow()))
    with pytest.raises(InputError, match="for a single batch size it can: --merge hooks --batch 2"):
        export(by_rows, example_input=X, batch="2", out=tmp_path / "no")
    bundle = export(by_rows, example_input=X, merge="hooks", formats="onnx", batch="2", out=tmp_path / "one")
    assert bundle.manifest.verdict.passed


def test_hooks_are_no_way_out_for_a_network_without_any(tmp_path: Path) -> None:
    for part, said in [
        (Branching(), "--merge PACKAGE:FUNCTION --format checkpoint"),
        (RowByRow(), "for a single batch size it can: --merge PACKAGE:FUNCTION --batch 2"),
    ]:
        with pytest.raises(InputError, match=said):
            export(nn.Sequential(nn.Conv2d(3, 3, 1), part).eval(), example_input=X, out=tmp_path / "no")


class Fails(nn.Module):
    """Raise what a user's code may raise, on every batch or on those above one."""

    def __init__(self, error: BaseException, *, always: bool) -> None:
        super().__init__()
        self.error, self.always = error, always

    def forward(self, x: Tensor) -> Tensor:
        if self.always or len(x) > 1:
            raise self.error
        return x.flatten(1)


@pytest.mark.parametrize("error", [AssertionError("of mine"), IndexError("of mine"), KeyError("of mine")], ids=repr)
@pytest.mark.parametrize("always", [True, False], ids=["always", "on a batch"])
def test_whatever_a_network_raises_is_one_line(error: Exception, always: bool, tmp_path: Path) -> None:
    said = "on example_input" if always else r"in float64 on \d+ samples"
    with pytest.raises(InputError, match=f"does not run {said}.*: {type(error).__name__}: '?of mine"):
        export(Fails(error, always=always).eval(), example_input=X, out=tmp_path / "no")


class Noisy(nn.Module):
    """Drop values in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.flatten(1), training=True)


class Counting(nn.Module):
    """Answer by what was asked before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) + self.calls


class Remembering(nn.Module):
    """Answer with more values at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.flatten(1))
        return torch.cat(self.seen, 1)


@pytest.mark.parametrize("part", [Noisy, Counting, Remembering])
def test_a_network_that_answers_the_same_inputs_otherwise_is_refused(part: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{part.__name__}: output differs between two calls with the same inputs"):
        export(part().eval(), example_input=torch.ones(1, 3, 8, 8), out=tmp_path / "no")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda network: torch.jit.trace(network, X)])
def test_torchscript_is_refused_with_the_remedy(make: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    whole = make(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval())
    for network, said in [(whole, ""), (nn.Sequential(whole, nn.Flatten()).eval(), "0 ")]:
        with pytest.raises(InputError, match=f"^{said}.*is TorchScript.*: pass the network that it was made of"):
            export(network, example_input=X, out=tmp_path / "no")


@pytest.mark.parametrize("source", [{}, None, nn.ReLU], ids=["a state dict", "nothing", "a class"])
@pytest.mark.parametrize("example", [None, X], ids=["alone", "with an example"])
def test_what_is_no_network_is_named(source: object, example: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"got a {type(source).__name__}; expected a network, a torch.nn.Module, or"):
        export(source, example_input=example, out=tmp_path / "no")  # type: ignore[arg-type]


def test_a_network_that_mixes_samples_is_refused(tmp_path: Path) -> None:
    mixed = randomize(nn.Sequential(RepVGGBlock(3, 3), Mixed()))
    with pytest.raises(InputError, match="must not depend on the others"):
        export(mixed, example_input=X.expand(2, -1, -1, -1), merge="hooks", batch="2", out=tmp_path / "no")


@pytest.mark.parametrize("merge", ["auto", "hooks"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda net: net[1].train(), r"1 is in training mode: call \.eval\(\) first"),
        (lambda net: net.half(), r"is torch\.float16: call \.float\(\) first"),
        (lambda net: net.bfloat16(), r"is torch\.bfloat16: call \.float\(\) first"),
        (
            lambda net: net.append(nn.BatchNorm1d(192, track_running_stats=False).eval()),
            r"3 \(BatchNorm1d\) keeps no running statistics, so its output depends on the batch",
        ),
    ],
)
def test_what_cannot_be_proved_is_refused_however_it_is_merged(
    spoil: object, said: str, merge: str, tmp_path: Path
) -> None:
    spoiled = network()
    spoil(spoiled)
    with pytest.raises(InputError, match=said) as caught:
        export(spoiled, example_input=X, merge=merge, out=tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["auto", "hooks"])
def test_a_block_that_is_used_twice_is_merged_and_proved(merge: str, tmp_path: Path) -> None:
    block = RepVGGBlock(3, 3)
    shared = randomize(nn.Sequential(block, nn.Sequential(block, nn.ReLU()), nn.Flatten()))
    bundle = export(shared, example_input=X, merge=merge, batch="2", out=tmp_path / "bundle")
    assert bundle.manifest.verdict.passed
    assert any("BatchNorms" in note and "-> 0" in note for note in bundle.manifest.notes)


@pytest.mark.slow
def test_a_network_without_anything_to_merge_is_exported_and_says_so(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.ReLU(), nn.Flatten()).eval()
    bundle = export(plain, example_input=X, batch="2", out=tmp_path / "bundle")
    assert bundle.manifest.verdict.passed
    assert "regions: nothing to merge" in bundle.manifest.notes


def test_the_failing_module_is_the_innermost_one() -> None:
    inner = nn.Sequential(conv_bn(3, 4, 3), nn.Linear(5, 5)).eval()
    outer = Flat(nn.Sequential(nn.ReLU(), inner)).eval()
    assert failing_module(outer, lambda: outer(X)) == "1.1 (Linear)"
    assert failing_module(outer, lambda: outer(X, X)) == "the network"
    assert failing_module(outer, lambda: None) == "the network"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in outer.modules())


class Attribute(nn.Module):
    """Multiply by a tensor that nobody else knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones(3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def test_a_tensor_that_stays_float32_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not run in float64 on . samples.*\(register_buffer\)"):
        export(network(Attribute()), example_input=X, out=tmp_path / "out")


class Frames(nn.Module):
    """Choose frames by indices that float32 and float64 round differently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, torch.linspace(0, 159, 40).long()])


def test_indices_are_those_of_the_trained_network(tmp_path: Path) -> None:
    """A reference that chose other frames would take their difference for the noise of float32, and pass anything."""
    assert (torch.linspace(0, 159, 40).long() != torch.linspace(0, 159, 40, dtype=torch.float64).long()).any()
    bundle = export(Frames().eval(), example_input=torch.randn(4, 160), out=tmp_path / "out")
    rows = [hop for hop in bundle.manifest.certificate if hop.kind == "output"]
    assert max(hop.max_rel for hop in rows) < 1e-4
