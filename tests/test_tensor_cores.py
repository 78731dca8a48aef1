"""The Hopper path: as accurate as PyTorch at the same flags, on shapes that reach every branch of its tiling."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")

PLAIN = [
    # input, output channels, kernel, stride, padding, output_padding, dilation
    ((2, 64, 8, 32, 32), 128, 3, 1, 0, 0, 1),
    ((2, 64, 8, 32, 32), 128, 3, 1, 1, 0, 1),
    ((1, 16, 16, 32, 32), 64, 3, 1, 1, 0, 1),
    ((2, 20, 9, 31, 33), 36, 3, 1, 1, 0, 1),
    ((2, 36, 9, 31, 33), 20, 5, 1, 2, 0, 1),
    ((1, 320, 5, 12, 14), 320, 3, 1, 1, 0, 1),
    ((2, 64, 7, 12, 14), 64, (3, 5, 7), 1, (1, 2, 3), 0, 1),
    ((1, 64, 6, 20, 600), 64, 3, 1, 1, 0, 1),           # strips
    ((2, 64, 10, 20, 22), 64, 3, 1, 0, 0, 8),           # a box for each tap
    ((2, 64, 10, 20, 22), 64, 7, 1, 0, 0, 1),
    ((2, 64, 10, 20, 22), 64, 1, 1, 0, 0, 1),
    ((2, 32, 16, 16, 16), 32, 2, 2, 0, 0, 1),
    ((2, 32, 16, 16, 16), 40, (2, 4, 2), 2, (0, 1, 0), 0, 1),
    ((1, 128, 6, 9, 31), 64, 4, 2, 1, 0, 1),
    ((2, 64, 7, 19, 11), 40, 4, 2, 1, 1, 1),            # phases of the same grid with other numbers of outputs
    ((1, 64, 3, 12, 300), 64, 4, 2, 1, 0, 1),
]


def worst_relative_error(y, truth, dims):
    """The largest of the relative errors over ``dims``."""
    return ((y.double() - truth).norm(dim=dims) / truth.norm(dim=dims)).max().item()


def tensors(shape, channels, kernel, dtype=torch.float32):
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    return torch.randn(shape, device="cuda").to(dtype), (0.1 * torch.randn(shape[1], channels, *kernel, device="cuda")).to(dtype)


def run(function, *arguments, **keywords):
    with model_new.record_launches() as launched:
        output = function(*arguments, **keywords)
    assert launched and all(name.endswith("_sm90") for name in launched), launched
    return output


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding, dilation", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain(shape, channels, kernel, stride, padding, output_padding, dilation, dtype):
    x, w = tensors(shape, channels, kernel, dtype)
    bias = torch.randn(channels, device="cuda").to(dtype)
    sizes = (stride, padding, output_padding, 1, dilation)
    truth = F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
    y = run(model_new.conv_transpose3d, x, w, bias, *sizes)
    assert relative_error(y, truth) <= 1.05 * relative_error(F.conv_transpose3d(x, w, bias, *sizes), truth)
    assert torch.equal(y, model_new.conv_transpose3d(x, w, bias, *sizes))


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding, dilation", PLAIN)
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused(shape, channels, kernel, stride, padding, output_padding, dilation, num_groups, dtype):
    x, w = tensors(shape, channels, kernel, dtype)
    bias, gamma, beta = (torch.randn(channels, device="cuda").to(dtype) for _ in range(3))
    sizes = (stride, padding, output_padding, 1, dilation)

    def reference(*t):
        return F.group_norm(F.conv_transpose3d(*t[:3], *sizes).relu(), num_groups, *t[3:])

    truth = reference(*(t.double() for t in (x, w, bias, gamma, beta)))
    y = run(model_new.conv_transpose3d_relu_group_norm, x, w, bias, gamma, beta, num_groups, 1e-5, *sizes)
    assert relative_error(y, truth) <= 1.05 * relative_error(reference(x, w, bias, gamma, beta), truth)
    assert torch.equal(y, model_new.conv_transpose3d_relu_group_norm(x, w, bias, gamma, beta, num_groups, 1e-5, *sizes))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spread", ["channel", "sample", "space", "weight"])
def test_twelve_decades(spread, stride):
    x, w = tensors((4, 32, 10, 12, 16), 64, 3 if stride == 1 else 4)
    decades = {"channel": (1, 32, 1, 1, 1), "sample": (4, 1, 1, 1, 1), "space": (1, 1, 1, 1, 16), "weight": (1, 64, 1, 1, 1)}[spread]
    size = 10.0 ** torch.linspace(-6, 6, max(decades), device="cuda").view(decades)
    x, w = (x, w * size) if spread == "weight" else (x * size, w)
    truth = F.conv_transpose3d(x.double(), w.double(), stride=stride, padding=1)
    y, reference = run(model_new.conv_transpose3d, x, w, stride=stride, padding=1), F.conv_transpose3d(x, w, stride=stride, padding=1)
    dims = (0, 2, 3, 4) if spread == "weight" else (1, 2, 3, 4)
    assert worst_relative_error(y, truth, dims) <= 1.1 * worst_relative_error(reference, truth, dims)


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 2), (2, 4)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_where_they_are(value, stride, kernel):
    x, w = tensors((2, 32, 10, 12, 16), 64, kernel)
    x[1, 3, 4, 5, 6] = value
    padding = (kernel - stride) // 2
    y, reference = run(model_new.conv_transpose3d, x, w, stride=stride, padding=padding), F.conv_transpose3d(x, w, stride=stride, padding=padding)
    assert torch.equal(y.isfinite(), reference.isfinite()) and torch.equal(y.isnan(), reference.isnan())


def test_large_mean():
    x, w = tensors((2, 32, 10, 12, 16), 64, 3)
    bias, ones = torch.full((64,), 1e4, device="cuda"), torch.ones(64, device="cuda")

    def reference(x, w, bias, ones):
        return F.group_norm(F.conv_transpose3d(x, w, bias, padding=1).relu(), 8, ones)

    truth = reference(x.double(), w.double(), bias.double(), ones.double())
    y = run(model_new.conv_transpose3d_relu_group_norm, x, w, bias, ones, None, 8, padding=1)
    assert relative_error(y, truth) <= 1.05 * relative_error(reference(x, w, bias, ones), truth)


def test_tf32_disallowed_is_not_this_path():
    x, w = tensors((2, 32, 10, 12, 16), 64, 3)
    allowed = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        with model_new.record_launches() as launched:
            model_new.conv_transpose3d(x, w)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    assert launched == ["conv_transpose3d_forward_generic"]
