"""Kernels as large as their strides, as a product of matrices: as accurate as PyTorch at the same flags, on every form of tile and store."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TF32 = [
    # input, output channels, kernel and stride
    ((2, 64, 8, 32, 32), 32, 2), ((2, 320, 8, 8, 8), 256, 2), ((1, 20, 9, 31, 33), 36, 2), ((2, 64, 10, 20, 22), 64, 1), ((1, 128, 5, 12, 16), 72, 1), ((3, 32, 16, 40, 50), 16, 2),
]
FLOAT32 = [    # where cuDNN's forward is float32-accurate, or is on some sizes; with groups
    ((2, 64, 6, 20, 20), 64, (1, 2, 2), 1), ((1, 640, 4, 9, 12), 40, (2, 1, 2), 1), ((2, 64, 8, 9, 16), 32, 4, 1), ((2, 30, 5, 8, 13), 33, 3, 1), ((2, 32, 16, 16, 16), 5, 2, 1),
    ((2, 64, 8, 9, 31), 32, 2, 4), ((1, 17, 4, 3, 5), 11, (3, 2, 1), 1), ((2, 16, 3, 20, 24), 16, (7, 4, 5), 1), ((1, 32, 6, 7, 64), 64, (2, 2, 1), 2),
]


def tensors(shape, channels, kernel, groups=1, dtype=torch.float32):
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    return torch.randn(shape, device="cuda").to(dtype), (0.1 * torch.randn(shape[1], channels // groups, *kernel, device="cuda")).to(dtype), torch.randn(channels, device="cuda").to(dtype)


def run(*arguments, **keywords):
    with model_new.record_launches() as launched:
        output = model_new.conv_transpose3d(*arguments, **keywords)
    assert launched == ["conv_transpose3d_forward_gemm"]
    return output


def samples_error(y, truth):
    """The largest of the samples' relative errors."""
    return max(relative_error(*pair) for pair in zip(y, truth))


def unaligned(t):
    """A copy that begins in the middle of a vector."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t)


@pytest.mark.parametrize("shape, channels, kernel", TF32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_plain(shape, channels, kernel, dtype, biased):
    x, w, bias = tensors(shape, channels, kernel, 1, dtype)
    bias = bias if biased else None
    y, truth = run(x, w, bias, kernel), F.conv_transpose3d(x.double(), w.double(), bias.double() if biased else None, kernel)
    assert relative_error(y, truth) <= max(1.05 * relative_error(F.conv_transpose3d(x, w, bias, kernel), truth), 3.1e-4 if dtype == torch.float32 else 0)
    assert torch.equal(y, run(x, w, bias, kernel)) and torch.equal(y, run(unaligned(x), unaligned(w), bias, kernel))


@pytest.mark.parametrize("shape, channels, kernel, groups", FLOAT32)
def test_float32_accurate(shape, channels, kernel, groups):
    x, w, bias = tensors(shape, channels, kernel, groups)
    x *= torch.logspace(-20, 20, shape[0], device="cuda").view(-1, 1, 1, 1, 1)
    y, truth = run(x, w, None, kernel, groups=groups), F.conv_transpose3d(x.double(), w.double(), None, kernel, groups=groups)
    assert samples_error(y, truth) <= 2.5e-7
    assert torch.equal(y, run(unaligned(x), unaligned(w), None, kernel, groups=groups))
    assert samples_error(run(x, w, bias, kernel, groups=groups), truth + bias.view(-1, 1, 1, 1)) <= 2.5e-7


@pytest.mark.parametrize("kernel, limit", [(2, 3.1e-4), ((1, 2, 2), 2.5e-7)])
@pytest.mark.parametrize("spread", ["x", "w"])
def test_fifty_decades(kernel, limit, spread):
    """Nothing is scaled, so that small values count as much as large ones: positions of x, and output channels."""
    x, w, _ = tensors((2, 64, 6, 8, 16), 32, kernel)
    size = 10.0 ** torch.linspace(-25, 25, 16 if spread == "x" else 32, device="cuda", dtype=torch.float64)
    sizes = size.float()
    scaled = (x * sizes, w) if spread == "x" else (x, w * sizes.view(-1, 1, 1, 1))
    y, truth = run(*scaled, stride=kernel).double(), F.conv_transpose3d(*(t.double() for t in scaled), stride=kernel)
    back = 1 / (size.repeat_interleave(2) if spread == "x" else size.view(-1, 1, 1, 1))
    assert relative_error(y * back, truth * back) <= limit


@pytest.mark.parametrize("kernel, where, value", list(itertools.product([2, (1, 2, 2), 4, 1], ["x", "w"], [float("nan"), float("inf"), -float("inf"), "all ones"])))
def test_non_finite_values_stay_where_they_are(kernel, where, value):
    x, w, bias = tensors((2, 32, 5, 6, 16), 64, kernel)
    at = x[1, 3, 4, 5, 6:7] if where == "x" else w[3, 5, 0, 0, 0:1]
    at.copy_(torch.tensor([-1], dtype=torch.int32).view(torch.float32) if value == "all ones" else torch.tensor([value]))    # a NaN whose bits are all ones
    y, truth = run(x, w, bias, kernel), F.conv_transpose3d(x.double().cpu(), w.double().cpu(), bias.double().cpu(), kernel).cuda()
    assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y == float("inf"), truth == float("inf")) and torch.equal(y == -float("inf"), truth == -float("inf"))


def test_the_largest_numbers_have_parts_too():
    x, w, _ = tensors((1, 16, 4, 8, 8), 16, (1, 2, 2))
    x[0, 3, 1, 2, 3] = torch.finfo(torch.float32).max    # which rounds to infinity in TF32
    w[3] *= 1e-3
    y, truth = run(x, w, stride=(1, 2, 2)), F.conv_transpose3d(x.double(), w.double(), stride=(1, 2, 2))
    assert torch.allclose(y.double(), truth, rtol=1e-5, atol=1e-5)


def test_relu_and_group_norm_behind_it():
    x, w, bias = tensors((2, 32, 8, 16, 16), 8, 2)
    with model_new.record_launches() as launched:
        y = model_new.conv_transpose3d_relu_group_norm(x, w, bias, None, None, 4, stride=2)
    assert launched == ["conv_transpose3d_forward_gemm", "group_norm_forward_generic"]
    assert relative_error(y, F.group_norm(F.conv_transpose3d(x.double(), w.double(), bias.double(), 2).relu(), 4)) <= 1e-6


@pytest.mark.parametrize("reason, arguments", [
    ("padding", dict(stride=2, padding=1)), ("output_padding", dict(stride=(2, 2, 3), output_padding=(0, 0, 1))), ("overlap", dict(stride=1)), ("TF32 disallowed", dict(stride=2))])
def test_others_are_not_this_path(reason, arguments):
    x, w, _ = tensors((2, 32, 8, 8, 8), 16, 2)
    allowed = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = reason != "TF32 disallowed"
        with model_new.record_launches() as launched:
            model_new.conv_transpose3d(x, w, **arguments)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    assert not launched[0].endswith("gemm")
