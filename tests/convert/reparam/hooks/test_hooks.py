"""Merging by a package's own hooks: right ones are used, wrong ones are refused with the module named."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import Tensor, nn

from repmlp_deploy.convert.reparam.hooks.comparing import first_fault, is_same
from repmlp_deploy.convert.reparam.hooks.merge import describe_hooks, merge_by_function, merge_by_hooks
from repmlp_deploy.convert.reparam.hooks.table import find_hook, hooks_in
from repmlp_deploy.errors import InputError, VerificationError
from support.networks import randomize
from support.standins import STANDINS
from support.standins.arithmetic import conv_bn, convolution, fused
from support.standins.repconv import Detector, RepConv
from support.standins.repvgg import RepVGG, RepVGGBlock


def merged_by_hooks(network: nn.Module) -> nn.Module:
    return merge_by_hooks(network, [network.example_input])


@pytest.mark.parametrize("family", STANDINS)
def test_every_familys_hooks_are_called_and_leave_what_the_network_computes(family: str) -> None:
    network = STANDINS[family]()
    before = copy.deepcopy(network.state_dict())
    merged = merged_by_hooks(network)
    assert sum(hooks_in(network).values()) == network.blocks
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    x = torch.randn(2, *network.example_input.shape[1:])
    torch.testing.assert_close(merged(x), network(x), rtol=1e-4, atol=1e-5)
    assert next(merged.parameters()).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_copy_is_the_same_and_has_no_fault() -> None:
    network = STANDINS["acnet"]().double()
    twin = copy.deepcopy(network)
    assert is_same(network, twin)
    assert first_fault(network, twin, []) is None
    twin.head.bias += 1e-12
    assert not is_same(network, twin)


def test_what_hooks_left_is_said_in_one_line() -> None:
    network = STANDINS["repvgg"]()
    said = describe_hooks(network, merged_by_hooks(network))
    assert said == "merged by the network's own hooks: BatchNorms 13 -> 0, convolutions 10 -> 5"


def test_a_network_in_float64_is_merged_to_its_last_digit() -> None:
    network = STANDINS["dbb"]().double()
    merged = merged_by_hooks(network)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert float((merged(x) - network(x)).abs().max()) < 1e-14 * float(network(x).abs().max()) * 100


class Replacing(nn.Module):
    """A convolution and BatchNorm whose `fuse` returns what takes its place."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        self.body = conv_bn(c, o, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def fuse(self) -> nn.Module:
        return convolution(*fused(*self.body), self.body.conv)


def test_a_hook_may_return_what_takes_its_modules_place() -> None:
    block = Replacing(3, 3)
    network = randomize(nn.Sequential(block, nn.ReLU(), block, Replacing(3, 4)))
    merged = merge_by_hooks(network, [torch.zeros(1, 3, 8, 8)])
    assert type(merged[0]) is type(merged[3]) is nn.Conv2d
    assert merged[0] is merged[2]  # a module used twice stays one


def test_the_network_itself_may_have_the_hook() -> None:
    merged = merge_by_hooks(randomize(Replacing(3, 4)), [torch.zeros(1, 3, 8, 8)])
    assert type(merged) is nn.Conv2d


class Outer(nn.Module):
    """A module whose hook calls those inside, which have nothing left to do then."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = RepVGGBlock(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def fuse(self) -> None:
        self.inner.switch_to_deploy()
        self.inner.__class__ = AlreadyMerged


class AlreadyMerged(RepVGGBlock):
    def switch_to_deploy(self) -> None:
        """Do nothing."""


def test_hooks_inside_what_an_outer_hook_merged_may_do_nothing() -> None:
    merged = merge_by_hooks(randomize(nn.Sequential(Outer(), nn.ReLU())), [torch.zeros(1, 3, 8, 8)])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())


def test_a_child_called_fuse_and_a_method_with_arguments_are_no_hooks() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(3, 3, 1)

        def reparameterize(self, how: str) -> None:
            raise AssertionError(how)

    assert find_hook(Named()) is None


def test_a_module_that_never_runs_keeps_its_branches() -> None:
    network = STANDINS["repvgg"]()
    network.auxiliary = randomize(RepVGGBlock(12, 12))
    merged = merged_by_hooks(network)
    assert isinstance(merged.auxiliary.rbr_identity, nn.BatchNorm2d)


def test_a_network_without_hooks_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"Sequential has no module with fuse, .* --merge auto"):
        merge_by_hooks(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), [torch.zeros(1, 3, 4, 4)])


def with_hook(name: str, hook: object) -> nn.Module:
    """Return the small detector whose second block of the coarse scale has another hook."""
    network = STANDINS["repconv"]()
    block = network.coarse[1]
    block.__class__ = type("RepConv", (RepConv,), {name: hook})
    return network


def off_centre(block: RepConv) -> None:
    """Pad the 1×1 kernel to 3×3 at a corner, as a wrong order of pads does."""
    kernel, bias = fused(*block.rbr_dense)
    small, more = fused(*block.rbr_1x1)
    block.rbr_identity = None
    merged = kernel + nn.functional.pad(small, (0, 2, 0, 2))
    block.rbr_reparam = convolution(merged, bias + more, block.rbr_dense.conv)


def without_identity(block: RepConv) -> None:
    """Forget the identity branch, as the public merge of YOLOv7 did for some layers."""
    block.rbr_identity = None
    block.rbr_reparam = convolution(*block.merged_kernel(), block.rbr_dense.conv)


def with_wrong_eps(block: RepConv) -> None:
    block.rbr_dense.bn.eps = 1e-3
    block.rbr_reparam = convolution(*block.merged_kernel(), block.rbr_dense.conv)


def in_float32(block: RepConv) -> None:
    kernel, bias = block.merged_kernel()
    block.rbr_reparam = convolution(kernel.float(), bias.float(), block.rbr_dense.conv)


def nothing(block: RepConv) -> None:
    del block


def failing(block: RepConv) -> None:
    raise RuntimeError(f"{type(block).__name__} cannot be merged here\nwith more to say")


def a_number(block: RepConv) -> int:
    del block
    return 3


def losing_a_child(block: RepConv) -> None:
    block.nonlinearity = None


def dropping_a_norm(block: RepConv) -> None:
    block.rbr_identity = nn.Identity()


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (off_centre, "computes something else: off by"),
        (without_identity, "computes something else: off by"),
        (with_wrong_eps, "computes something else: off by"),
        (in_float32, "computes something else: off by"),
        (nothing, "does nothing: the module has the same parts and numbers as before, BatchNorms among them"),
        (failing, "fails: RuntimeError: RepConv cannot be merged here: repair"),
        (a_number, "returns a int; expected a module, or nothing"),
        (losing_a_child, "'NoneType' object is not callable; its child nonlinearity is None now"),
        (dropping_a_norm, "its BatchNorm rbr_identity became an Identity"),
    ],
)
def test_a_wrong_hook_is_refused_with_its_module_and_the_error(hook: object, said: str) -> None:
    with pytest.raises(VerificationError) as caught:
        merged_by_hooks(with_hook("fuse_repvgg_block", hook))
    text = str(caught.value)
    assert text.startswith("fuse_repvgg_block() of coarse.1 (RepConv) ")
    assert said in text
    assert "\n" not in text
    assert text.endswith("--merge auto")


class Delegating(nn.Module):
    """A block whose hook merges branches that this one does not have; the block inside has a hook, too."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.shortcut = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + self.shortcut(x)

    def reparameterize(self) -> None:
        pass


def test_a_hook_may_leave_everything_to_the_hooks_inside() -> None:
    network = randomize(Delegating(RepVGGBlock(8, 8)))
    merged = merge_by_hooks(network, [torch.zeros(1, 8, 6, 6)])
    assert describe_hooks(network, merged) == (
        "merged by the network's own hooks: BatchNorms 4 -> 1, convolutions 2 -> 1"
    )
    with pytest.raises(VerificationError, match=r"reparameterize\(\) of the network \(Delegating\) does nothing"):
        merge_by_hooks(randomize(Delegating(nn.Identity())), [torch.zeros(1, 8, 6, 6)])


class Optional(nn.Module):
    """A block whose hook merges its branches, if it has any."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.inside = conv_bn(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def reparameterize(self) -> None:
        if self.branches:
            self.inside = convolution(*fused(*self.inside), self.inside.conv)


def test_a_hook_may_do_nothing_where_a_block_of_its_class_has_nothing_to_merge() -> None:
    network, x = randomize(nn.Sequential(Optional(branches=False), Optional(branches=True))), torch.zeros(1, 8, 6, 6)
    assert "BatchNorms 2 -> 1" in describe_hooks(network, merge_by_hooks(network, [x]))
    with pytest.raises(VerificationError, match=r"reparameterize\(\) of 0 \(Optional\) does nothing"):
        merge_by_hooks(network[:1], [x])


def replace_batchnorm(network: nn.Module) -> None:
    """Fuse what has a hook, and drop every other BatchNorm: the fault of a merge in public use."""
    for name, child in network.named_children():
        if hasattr(child, "fuse_repvgg_block"):
            child.fuse_repvgg_block()
        elif isinstance(child, nn.BatchNorm2d):
            setattr(network, name, nn.Identity())
        else:
            replace_batchnorm(child)


def fuse_all(network: Detector) -> Detector:
    for module in list(network.modules()):
        if isinstance(module, RepConv):
            module.fuse_repvgg_block()
    return network


def test_a_function_that_merges_right_is_used() -> None:
    network = STANDINS["repconv"]()
    merged = merge_by_function(network, fuse_all, [network.example_input], called="detector:fuse_all")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(merged(x), network(x), rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.route, "rbr_dense")


def test_a_function_that_drops_batchnorms_it_does_not_know_is_refused_with_the_first_named() -> None:
    network = STANDINS["repconv"]()
    with pytest.raises(
        VerificationError, match=r"first at stem\.0\.bn \(BatchNorm2d\), .* became an Identity"
    ) as caught:
        merge_by_function(network, replace_batchnorm, [network.example_input], called="detector:replace_batchnorm")
    assert str(caught.value).startswith("detector:replace_batchnorm is wrong first at")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda network: network, "does nothing"),
        (lambda _network: 3, "returns a int"),
        (lambda network: network.missing, "fails: AttributeError"),
        (lambda network: setattr(network, "route", None), "its child route is None now"),
        (
            lambda network: setattr(network.fine[0].rbr_1x1.bn, "eps", 0.1) or setattr(network, "x", nn.ReLU()),
            "fine.0.rbr_1x1",
        ),
    ],
)
def test_a_wrong_function_is_refused_by_name(function: object, said: str) -> None:
    network = STANDINS["repconv"]()
    with pytest.raises(VerificationError, match=re.escape(said)) as caught:
        merge_by_function(network, function, [network.example_input], called="own:merge")
    assert str(caught.value).startswith("own:merge ")


def test_what_hooks_print_stays_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def talking(block: RepVGGBlock) -> None:
        sys.stdout.write("RepConv.fuse_repvgg_block")
        RepVGGBlock.switch_to_deploy(block)

    network = RepVGG()
    network.stages[0].__class__ = type("Talking", (RepVGGBlock,), {"switch_to_deploy": talking})
    merged_by_hooks(randomize(network))
    assert capsys.readouterr() == ("", "")
