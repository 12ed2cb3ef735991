import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, scale_rows, set_convolution, sum_kernels


def toeplitz(kernel: torch.Tensor, h: int, w: int) -> torch.Tensor:
    matrix = torch.zeros(*kernel.shape[:-2], h, w, h, w, dtype=torch.float64)
    scale = torch.ones(*kernel.shape[:-2], h, w, dtype=torch.float64)
    set_convolution(matrix, matrix.clone(), scale, kernel)
    return matrix


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    k_h=st.sampled_from([1, 3, 5, 7]),
    k_w=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 2**16),
)
def test_the_toeplitz_matrix_is_the_convolution(h: int, w: int, k_h: int, k_w: int, seed: int) -> None:
    """Any map, h ≠ w and kernels larger than the map included."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(3, k_h, k_w, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 3, h, w, dtype=torch.float64, generator=generator)
    expected = F.conv2d(x, kernel[:, None], padding=(k_h // 2, k_w // 2), groups=3)
    product = torch.einsum("syxuv,nsuv->nsyx", toeplitz(kernel, h, w), x)
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)
    if h > 1 and w > 1 and h != w:
        assert not torch.allclose(torch.einsum("suvyx,nsuv->nsyx", toeplitz(kernel + 1.0, h, w), x), expected)


def test_only_the_diagonals_of_the_kernel_are_set() -> None:
    """Entries that no tap reaches are the scaled matrix's business."""
    matrix = toeplitz(torch.ones(1, 3, 3, dtype=torch.float64), 5, 4)
    assert int((matrix != 0).sum()) == sum((5 - abs(dy)) * (4 - abs(dx)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


def test_scaling_leaves_its_input_alone_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        matrix = torch.randn(5, 7).to(dtype)
        before = matrix.clone()
        scale = torch.arange(1, 6, dtype=torch.float64)
        scaled = scale_rows(matrix, scale)
        assert torch.equal(matrix, before)
        assert scaled.dtype == dtype
        torch.testing.assert_close(scaled.double(), (matrix.double() * scale[:, None]).to(dtype).double())


def test_setting_a_convolution_leaves_its_input_alone() -> None:
    matrix = torch.randn(1, 3, 3, 3, 3, dtype=torch.float64)
    before = matrix.clone()
    set_convolution(
        torch.zeros_like(matrix), matrix, torch.full((1, 3, 3), 2.0, dtype=torch.float64), torch.ones(1, 3, 3).double()
    )
    assert torch.equal(matrix, before)


def test_kernels_of_all_sizes_sum_in_the_largest() -> None:
    one, five = torch.full((2, 1, 1), 2.0), torch.ones(2, 5, 5)
    total = sum_kernels([one, five])
    assert total is not None
    assert total.shape == (2, 5, 5)
    assert total[0, 2, 2] == 3
    assert total.sum() == 2 * 27
    assert sum_kernels([]) is None


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="2x2; only odd kernels"):
        sum_kernels([torch.ones(1, 2, 2)])


def test_the_affine_form_of_a_batch_norm() -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(5, eps=1e-3).double().eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.01, 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    a, b = affine_of_batch_norm(bn)
    torch.testing.assert_close(x * a[:, None, None] + b[:, None, None], bn(x), rtol=0, atol=1e-12)


def test_a_batch_norm_without_weights_or_statistics() -> None:
    bn = nn.BatchNorm2d(3, affine=False)
    a, b = affine_of_batch_norm(bn)
    assert a.tolist() == pytest.approx([(1 + 1e-5) ** -0.5] * 3)
    assert b.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="running statistics"):
        affine_of_batch_norm(nn.BatchNorm2d(3, track_running_stats=False))
