"""Groups of few channels on kernels of their own (kernels/depthwise.cuh), against float64."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from layers import worst_relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# input shape, output channels, groups, kernel, stride, padding, output_padding, dilation
LAYERS = [
    ((2, 8, 9, 17, 33), 8, 8, 3, 1, 1, 0, 1), ((2, 8, 9, 16, 32), 16, 8, 3, 2, 1, 1, 1), ((2, 6, 9, 16, 32), 6, 6, 2, 2, 0, 0, 1),
    ((1, 8, 5, 20, 40), 4, 4, 5, 2, 2, 1, 1), ((1, 4, 8, 11, 70), 4, 2, 4, 2, 1, 0, 1), ((1, 3, 8, 11, 20), 12, 3, 5, 1, 2, 0, 1),
    ((2, 4, 6, 9, 33), 4, 4, 3, 2, 1, 0, 1), ((2, 4, 6, 9, 33), 4, 4, 3, 2, 0, 0, 1),    # odd rows; a padding that the square kernels do not know
    ((2, 8, 9, 10, 35), 8, 8, (3, 4, 5), (1, 2, 3), (0, 1, 2), (0, 1, 2), 1), ((1, 12, 7, 8, 9), 12, 4, 3, 2, 1, 0, 2), ((1, 4, 20, 20, 130), 4, 4, 7, 1, 3, 0, 1),
    ((1, 6, 4, 8, 16), 6, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1), 1), ((3, 6, 5, 5, 5), 6, 6, 2, 2, 0, 0, 1), ((1, 4, 6, 6, 6), 4, 2, 4, 4, 0, 0, 1), ((1, 2, 1, 1, 1), 2, 2, 3, 1, 0, 0, 1), ((2, 3, 9, 16, 32), 4, 1, 4, 2, 1, 0, 1), ((2, 1, 9, 16, 32), 1, 1, 3, 1, 1, 0, 1),
]
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def tensors(shape, channels, groups, kernel, dtype=torch.float32):
    torch.manual_seed(0)
    size = (kernel,) * 3 if isinstance(kernel, int) else kernel
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in (shape, (shape[1], channels // groups, *size), (channels,))]


def run(x, w, b, *sizes, grad=None):
    """(output, its gradient, gradients) on this path."""
    with model_new.record_launches() as names:
        y = model_new.conv_transpose3d(x, w, b, *sizes)
        grad = torch.randn_like(y) if grad is None else grad
        grads = torch.autograd.grad(y, (x, w, b), grad)
    assert names == [f"conv_transpose3d_{name}" for name in ("forward_depthwise", "dinput_depthwise", "dweight_depthwise", "dbias_generic")]
    return y, grad, grads


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding, dilation", LAYERS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_outputs_and_gradients(shape, channels, groups, kernel, stride, padding, output_padding, dilation, dtype):
    sizes = (stride, padding, output_padding, groups, dilation)
    inputs = tensors(shape, channels, groups, kernel, dtype)
    y, grad, grads = run(*inputs, *sizes)
    high = [t.detach().double().requires_grad_() for t in inputs]
    truth = F.conv_transpose3d(*high, *sizes)
    for ours, exact in zip((y, *grads), (truth, *torch.autograd.grad(truth, high, grad.double()))):
        assert worst_relative_error(ours, exact, tuple(range(ours.dim()))) < LIMITS[dtype]
    y_again, _, grads_again = run(*inputs, *sizes, grad=grad)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), (y_again, *grads_again)))


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("layout", ["shifted", "channels_last_3d", "every second column"])
def test_layouts(offset, layout):
    x, w, b = tensors((2, 8, 6, 12, 16), 8, 8, 3)
    memory = torch.zeros(x.numel() * 2 + offset, device="cuda")
    given = {"shifted": memory[offset:offset + x.numel()].view_as(x), "channels_last_3d": x.detach().contiguous(memory_format=torch.channels_last_3d), "every second column": memory[offset:].view(*x.shape[:4], 32)[..., ::2]}[layout]
    given.copy_(x.detach())
    sizes = (2, 1, 1, 8, 1)
    assert torch.equal(model_new.conv_transpose3d(given, w, b, *sizes), model_new.conv_transpose3d(x, w, b, *sizes))


@pytest.mark.parametrize("arguments", [((2, 8, 6, 9, 20), 8, 8, 3, 2, 1, 1, 1), ((2, 8, 6, 9, 20), 8, 4, 3, 2, 0, 0, 2), ((2, 4, 6, 9, 33), 4, 4, 5, 1, 2, 0, 1)])
@pytest.mark.parametrize("where", ["x", "w", "dout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_where_they_are(arguments, where, value):
    """Nothing outside of the tensors is multiplied with them."""
    shape, channels, groups, kernel, *sizes = arguments
    sizes.insert(3, groups)
    x, w, b = tensors(shape, channels, groups, kernel)
    {"x": lambda: x.data[0, 1, 0, -1, -1].fill_(value), "w": lambda: w.data[2, 0, 0, 1, -1].fill_(value), "dout": lambda: None}[where]()
    y = model_new.conv_transpose3d(x, w, b, *sizes)
    grad = torch.randn_like(y)
    if where == "dout":
        grad[0, 1, -1, -1, 0] = value
    grads = torch.autograd.grad(y, (x, w), grad)
    generic = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = model_new.conv_transpose3d(*generic, *sizes)    # float64: another path
    for ours, exact in zip((y, *grads), (truth, *torch.autograd.grad(truth, generic[:2], grad.double()))):
        assert torch.equal(ours.isfinite(), exact.isfinite()) and torch.equal(ours.isnan(), exact.isnan())


def test_wide_ranges():
    x, w, b = tensors((2, 8, 8, 16, 32), 8, 8, 3)
    scale = torch.logspace(-18, 18, 8, device="cuda").view(1, 8, 1, 1, 1)
    y, _, _ = run((x * scale).detach().requires_grad_(), w, b, 2, 1, 1, 8, 1)
    truth = F.conv_transpose3d((x * scale).detach().double(), w.double(), b.double(), 2, 1, 1, 8, 1)
    assert worst_relative_error(y, truth, (0, 2, 3, 4)) < 1e-6


@pytest.mark.parametrize("needs", ["x", "w"])
def test_only_what_is_needed_runs(needs):
    x, w, b = (t.detach() for t in tensors((2, 8, 6, 12, 16), 8, 8, 3))
    wanted = {"x": x, "w": w}[needs].requires_grad_()
    y = model_new.conv_transpose3d(x, w, b, 2, 1, 1, 8, 1)
    with model_new.record_launches() as names:
        torch.autograd.grad(y.sum(), wanted)
    assert names == ["conv_transpose3d_dinput_depthwise" if needs == "x" else "conv_transpose3d_dweight_depthwise"]


def test_relu_and_group_norm_behind_it():
    x, w, b = tensors((2, 16, 8, 12, 16), 16, 16, 3)
    with model_new.record_launches() as names:
        y = model_new.conv_transpose3d_relu_group_norm(x, w, b, None, None, 4, 1e-5, 2, 1, 1, 16)
    assert names == ["conv_transpose3d_forward_depthwise", "group_norm_forward_generic"]
    truth = F.group_norm(F.conv_transpose3d(x.double(), w.double(), b.double(), 2, 1, 1, 16).relu(), 4)
    assert worst_relative_error(y, truth, (0, 1, 2, 3, 4)) < 1e-6


@pytest.mark.parametrize("reason, channels, groups, dtype", [("many channels in one group", 16, 1, torch.float32), ("many channels", 16, 2, torch.float32), ("float64", 8, 8, torch.float64)])
def test_others_are_not_this_path(reason, channels, groups, dtype):
    x, w, b = tensors((1, channels, 6, 8, 8), channels, groups, 3, dtype)
    with model_new.record_launches() as names:
        model_new.conv_transpose3d(x, w, b, 1, 0, 0, groups, 1)
    assert "conv_transpose3d_forward_depthwise" not in names
