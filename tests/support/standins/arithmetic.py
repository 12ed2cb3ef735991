"""What every family's own merge is made of: a convolution with its BatchNorm, and kernels of several sizes added."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(c: int, o: int, k: int | tuple[int, int], **choices: object) -> nn.Sequential:
    """Return a convolution without bias and its BatchNorm; padding keeps the map's size at stride 1."""
    sizes, dilation = (k, k) if isinstance(k, int) else k, int(choices.get("dilation", 1))
    padding = tuple(dilation * (size // 2) for size in sizes)
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(c, o, sizes, **{"padding": padding, "bias": False} | choices))
    layers.add_module("bn", nn.BatchNorm2d(o))
    return layers


def scaled(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (a, b) of the BatchNorm as a·x + b."""
    a = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return a, bn.bias - a * bn.running_mean


def fused(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of bn(conv(x))."""
    a, b = scaled(bn)
    bias = b if conv.bias is None else b + a * conv.bias
    return conv.weight * a[:, None, None, None], bias


def centred(kernel: Tensor, like: tuple[int, ...]) -> Tensor:
    """Return the kernel in the middle of zeros of the size (…, kh, kw)."""
    tall, wide = like[-2] - kernel.shape[-2], like[-1] - kernel.shape[-1]
    return F.pad(kernel, (wide // 2, wide // 2, tall // 2, tall // 2))


def dilated(kernel: Tensor, rate: int) -> Tensor:
    """Return the kernel with rate - 1 zeros between its taps."""
    o, c, h, w = kernel.shape
    spread = kernel.new_zeros(o, c, (h - 1) * rate + 1, (w - 1) * rate + 1)
    spread[:, :, ::rate, ::rate] = kernel
    return spread


def unit_kernel(channels: int, groups: int, size: int, like: Tensor) -> Tensor:
    """Return the kernel (C, C/groups, size, size) that leaves a map as it is."""
    kernel = like.new_zeros(channels, channels // groups, size, size)
    kernel[torch.arange(channels), torch.arange(channels) % (channels // groups), size // 2, size // 2] = 1
    return kernel


def convolution(kernel: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution with this kernel, of the stride and groups of another one, in the default dtype."""
    o, c, h, w = kernel.shape
    made = nn.Conv2d(c * like.groups, o, (h, w), like.stride, (h // 2, w // 2), groups=like.groups)
    made.weight.data, made.bias.data = kernel.to(made.weight.dtype), bias.to(made.bias.dtype)
    return made.eval().requires_grad_(requires_grad=False)
