"""dout's packed copy where the kernel of dweight makes it: layers with enough to do for that, on Hopper."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import gradients, gradients_by, worst_relative_error

PATH = torch.cuda.is_available() and model_new._tensor_core_path(model_new._capability(0))
pytestmark = pytest.mark.skipif(PATH != "sm90", reason="needs a Hopper GPU")

LAYERS = [
    # input, output channels, kernel, stride, padding, output_padding
    ((2, 32, 32, 48, 64), 32, 3, 2, 1, 0),
    ((3, 20, 40, 45, 51), 24, 3, 2, 1, 1),              # channels and rows that do not fill their units
    ((2, 64, 36, 64, 64), 32, 2, 2, 0, 0),
    ((2, 32, 40, 48, 96), 64, (1, 3, 3), (1, 2, 2), (0, 1, 1), 0),
    ((2, 64, 40, 48, 48), 64, 2, 2, 0, 0),
]


def tensors(shape, channels, kernel, *sizes):
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    x, w = torch.randn(shape, device="cuda"), torch.randn(shape[1], channels, *kernel, device="cuda")
    return x, w, torch.randn_like(F.conv_transpose3d(x, w, None, *sizes)), (*sizes, 1, 1)


def packs(x, w, grad, sizes):
    """The gradients, when the kernel that packs dout has run."""
    return gradients_by("packing_dweight_kernel", x, w, grad, sizes)


def check(x, w, grad, sizes, limit):
    """The gradients are those of float64 but for the limit, and the same twice."""
    truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    for result, again, exact in zip(packs(x, w, grad, sizes), gradients(model_new.conv_transpose3d, x, w, grad, sizes), truth):
        assert relative_error(result, exact) <= limit
        assert torch.equal(result, again)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients(layer):
    check(*tensors(*layer), 3.1e-4)


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_only_what_is_wanted(layer):
    x, w, grad, sizes = tensors(*layer)
    dx, dw = gradients(model_new.conv_transpose3d, x, w, grad, sizes)
    alone = w.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(model_new.conv_transpose3d(x, alone, None, *sizes), alone, grad)[0], dw)
    alone = x.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(model_new.conv_transpose3d(alone, w, None, *sizes), alone, grad)[0], dx)    # of a copy that was made as ever


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_scales_that_do_not_hold(layer):
    """A sample whose largest elements, a row, were not looked at; one of which only zeros were; one of zeros; and where there is another, one as ever."""
    x, w, grad, sizes = tensors(*layer)
    grad[0, 5, 3, 4] *= 1e8
    grad[1] = 0
    if len(grad) > 2:
        grad[1, 5, 3, 4] = 1e-3
        grad[2] *= 1e-6
    check(x, w, grad, sizes, 3.6e-4)    # mostly that of one row's products: it differs by a tenth from one draw to the next


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_weights_of_other_sizes(layer):
    """The weight's copy for dx, made beside the kernel that packs dout, has the scales of its own call."""
    x, w, grad, sizes = tensors(*layer)
    dx = packs(x, w, grad, sizes)[0]
    for size in (2.0**30, 2.0**-30, 1.0):
        assert torch.equal(gradients(model_new.conv_transpose3d, x, w * size, grad, sizes)[0], dx * size)


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_samples_of_other_sizes(layer):
    x, w, grad, sizes = tensors(*layer)
    size = torch.logspace(-6, 6, len(x), device="cuda").view(-1, 1, 1, 1, 1)
    x, grad = x / size, grad * size    # every sample counts in dweight
    truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    dx, dw = packs(x, w, grad, sizes)
    assert worst_relative_error(dx, truth[0], (1, 2, 3, 4)) <= 3.3e-4 and relative_error(dw, truth[1]) <= 3.3e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_stay_where_they_are(value):
    x, w, grad, sizes = tensors(*LAYERS[0])
    grad[1, 3, 4, 5, 6] = value
    dx, dw = packs(x, w, grad, sizes)
    clean = grad.clone()
    clean[1, 3, 4, 5, 6] = 0
    dx_clean, dw_clean = gradients(model_new.conv_transpose3d, x, w, clean, sizes)
    reached = torch.zeros_like(grad[:, :1])
    reached[1, 0, 4, 5, 6] = 1
    reached = F.conv3d(reached, torch.ones(1, 1, 3, 3, 3, device="cuda"), stride=2, padding=1).expand_as(dx) > 0
    assert torch.equal(dx.isfinite(), ~reached) and relative_error(dx[~reached], dx_clean[~reached].double()) <= 1e-5
    taps = torch.zeros(3, 3, 3, dtype=torch.bool, device="cuda")
    taps[1, 0::2, 1] = True    # those that connect that element with one of the input
    assert torch.equal(dw[:, 3].isfinite(), ~taps.expand_as(dw[:, 3])) and torch.equal(dw[:, [c for c in range(32) if c != 3]], dw_clean[:, [c for c in range(32) if c != 3]])


@pytest.mark.parametrize("layout", ["channels_last_3d", "shifted"])
def test_gradients_of_other_strides_and_addresses(layout):
    x, w, grad, sizes = tensors(*LAYERS[0])
    if layout == "shifted":    # four bytes off
        given = torch.empty(grad.numel() + 1, device="cuda")[1:].view_as(grad).copy_(grad)
    else:
        given = grad.to(memory_format=torch.channels_last_3d)
    for result, expected in zip(gradients(model_new.conv_transpose3d, x, w, given, sizes), packs(x, w, grad, sizes)):
        assert torch.equal(result, expected)
