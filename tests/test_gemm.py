"""Products of matrices: as accurate as PyTorch at the same flags, on every form of tile and store."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import gradients, tensors, tf32_allowed, unaligned, without_paths, worst_relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def products_of_matrices():
    with without_paths("_sweep"):    # which has groups of few channels before
        yield


TF32 = [
    # input, output channels, kernel and stride
    ((2, 64, 8, 32, 32), 32, 2), ((2, 320, 8, 8, 8), 256, 2), ((1, 20, 9, 31, 33), 36, 2), ((2, 64, 10, 20, 22), 64, 1), ((1, 128, 5, 12, 16), 72, 1), ((3, 32, 16, 40, 50), 16, 2),
]
FLOAT32 = [    # where cuDNN's forward is float32-accurate, or is on some sizes; with groups
    ((2, 64, 6, 20, 20), 64, (1, 2, 2), 1), ((1, 640, 4, 9, 12), 40, (2, 1, 2), 1), ((2, 64, 8, 9, 16), 32, 4, 1), ((2, 30, 5, 8, 13), 33, 3, 1), ((2, 32, 16, 16, 16), 5, 2, 1),
    ((2, 64, 8, 9, 31), 32, 2, 4), ((1, 17, 4, 3, 5), 11, (3, 2, 1), 1), ((2, 16, 3, 20, 24), 16, (7, 4, 5), 1), ((1, 32, 6, 7, 64), 64, (2, 2, 1), 2),
]


SEVERAL_TAPS = [
    # input, output channels, kernel, stride, padding, output_padding, dilation, groups; relative error
    ((2, 320, 4, 4, 4), 320, 3, 2, 1, 1, 1, 1, 3.1e-4), ((1, 512, 4, 4, 4), 512, 3, 1, 1, 0, 1, 1, 3.1e-4), ((2, 64, 5, 6, 7), 40, 4, 2, 1, 0, 1, 1, 3.1e-4), ((1, 36, 9, 11, 13), 20, 3, 1, 1, 0, 1, 1, 3.1e-4),
    ((2, 64, 6, 7, 8), 64, (1, 3, 5), 1, (0, 1, 2), 0, 1, 1, 3.1e-4), ((2, 64, 4, 4, 8), 64, 2, 2, 1, 1, 1, 1, 3.1e-4), ((1, 80, 5, 5, 5), 80, 3, 1, (1, 2, 4), 0, (1, 2, 4), 1, 3.1e-4),
    ((2, 64, 5, 6, 8), 32, (3, 4, 5), (1, 3, 2), 1, 0, 1, 1, 2.5e-7), ((1, 96, 6, 8, 8), 96, 3, 1, 1, 0, 1, 4, 2.5e-7), ((2, 32, 4, 6, 7), 32, 2, 2, 1, 0, 2, 1, 2.5e-7), ((1, 20, 4, 5, 6), 16, 5, 4, 0, 3, 1, 1, 2.5e-7),
    ((2, 16, 4, 4, 5), 24, (2, 1, 9), (5, 2, 7), 0, (4, 0, 3), 1, 2, 2.5e-7), ((2, 12, 6, 6, 6), 4, 3, 1, 1, 0, 1, 1, 2.5e-7),
    ((2, 32, 4, 5, 6), 32, 3, 3, 1, 2, 1, 1, 2.5e-7), ((2, 32, 4, 5, 6), 32, 2, 2, 1, 1, 2, 1, 2.5e-7),    # as many outputs as products, but others
]


def run(*arguments, **keywords):
    with model_new.record_launches() as launched:
        output = model_new.conv_transpose3d(*arguments, **keywords)
    assert launched == ["conv_transpose3d_forward_gemm"]
    return output


def samples_error(y, truth):
    """The largest of the samples' relative errors."""
    return worst_relative_error(y, truth, (1, 2, 3, 4))


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


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding, dilation, groups, limit", SEVERAL_TAPS)
def test_several_taps(shape, channels, kernel, stride, padding, output_padding, dilation, groups, limit):
    x, w, bias = tensors(shape, channels, kernel, groups)
    sizes = (stride, padding, output_padding, groups, dilation)
    y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
    assert samples_error(y, truth) <= limit
    assert torch.equal(y, run(x, w, bias, *sizes)) and torch.equal(y, run(unaligned(x), unaligned(w), bias, *sizes))


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding, dilation, groups",
                         [case[:-1] for case in SEVERAL_TAPS[:9]] + [(shape, channels, kernel, kernel, 0, 0, 1, groups) for shape, channels, kernel, groups in
                          [((2, 320, 4, 4, 4), 320, 2, 1), ((2, 320, 4, 5, 5), 96, (1, 2, 2), 1), ((2, 30, 5, 8, 13), 33, 3, 1), ((1, 96, 6, 7, 16), 64, (2, 2, 1), 2), ((2, 128, 8, 10, 12), 128, 1, 1), ((2, 16, 8, 9, 10), 16, 2, 1)]])
def test_gradients(shape, channels, kernel, stride, padding, output_padding, dilation, groups):
    x, w, _ = tensors(shape, channels, kernel, groups)
    sizes = (stride, padding, output_padding, groups, dilation)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))
    with model_new.record_launches() as launched:
        ours = gradients(model_new.conv_transpose3d, x, w, grad, sizes)
    assert launched[-1] == "conv_transpose3d_gradients_gemm"
    again = gradients(model_new.conv_transpose3d, unaligned(x), unaligned(w), unaligned(grad), sizes)
    for result, other, exact in zip(ours, again, gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)):
        assert relative_error(result, exact) <= 3.2e-4 and torch.equal(result, other)


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_only_what_is_wanted(wanted):
    x, w, _ = tensors((2, 64, 4, 6, 8), 64, 3)
    t = {"x": x, "w": w}
    t[wanted].requires_grad_()
    y = model_new.conv_transpose3d(x, w, padding=1)
    grad = torch.randn_like(y)
    result, = torch.autograd.grad(y, t[wanted], grad)
    both = gradients(model_new.conv_transpose3d, x, w, grad, (1, 1))
    assert torch.equal(result, both["xw".index(wanted)])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_among_several_taps(stride, value):
    x, w, bias = tensors((2, 32, 4, 6, 8), 32, 3)
    sizes = (stride, 1)
    x[1, 3, 2, 5, 0] = value
    y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double().cpu(), w.double().cpu(), bias.double().cpu(), *sizes).cuda()
    assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isfinite(), truth.isfinite())
    grad = torch.randn_like(y)
    grad[0, 5, 1, 2, 3] = value
    x[1, 3, 2, 5, 0] = 0
    dx, exact = (gradients(f, *(t.to(kind) for t in (x, w, grad)), sizes)[0] for f, kind in ((model_new.conv_transpose3d, "cuda"), (F.conv_transpose3d, "cpu")))
    assert torch.equal(dx.isnan().cpu(), exact.isnan()) and torch.equal(dx.isfinite().cpu(), exact.isfinite())


@pytest.mark.parametrize("shape, channels, kernel, stride, padding", [((2, 320, 4, 4, 4), 320, 3, 2, 1), ((2, 64, 6, 8, 8), 64, 2, 2, 0), ((3, 64, 4, 6, 7), 64, 3, 1, 1)])
def test_model(shape, channels, kernel, stride, padding):
    x, w, _ = tensors(shape, channels, kernel)
    bias = 50.0 * torch.randn(channels, device="cuda").sign()    # hardly any z is nearly zero, where ReLU's mask would be a matter of rounding
    leaves = [x, w, bias, torch.randn(channels, device="cuda"), torch.randn(channels, device="cuda")]
    sizes = (stride, padding)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))

    def differentiate(function, kind):
        t = [leaf.to(kind).requires_grad_() for leaf in leaves]
        y = function(*t)
        return y.detach(), *torch.autograd.grad(y, t, grad.to(kind))

    def reference(x, w, bias, gamma, beta):
        return F.group_norm(F.conv_transpose3d(x, w, bias, *sizes).relu(), 8, gamma, beta)

    with model_new.record_launches() as launched:
        ours = differentiate(lambda *t: model_new.conv_transpose3d_relu_group_norm(*t, 8, 1e-5, *sizes), torch.float32)
    assert launched[0] == "conv_transpose3d_forward_gemm" and "conv_transpose3d_gradients_gemm" in launched
    for result, exact in zip(ours, differentiate(reference, torch.float64)):
        assert relative_error(result, exact) <= 4e-4


@pytest.mark.parametrize("reason, shape, kernel, arguments", [
    ("float16 with several taps", (2, 32, 8, 8, 8), 3, {}), ("TF32 disallowed", (2, 32, 8, 8, 8), 2, dict(stride=2)), ("few positions", (2, 32, 3, 3, 3), 2, dict(stride=2)), ("few channels", (2, 4, 8, 8, 8), 2, dict(stride=2)),
    ("many products", (2, 32, 40, 40, 40), 3, {})])
def test_others_are_not_this_path(reason, shape, kernel, arguments):
    x, w, _ = tensors(shape, 16, kernel, 1, torch.float16 if "float16" in reason else torch.float32)
    with tf32_allowed(reason != "TF32 disallowed"), model_new.record_launches() as launched:
        model_new.conv_transpose3d(x, w, **arguments)
    assert not launched[0].endswith("gemm")
