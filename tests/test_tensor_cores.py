"""The tensor cores' paths: as accurate as PyTorch at the same flags, on shapes that reach every branch of its tiling."""

import functools

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import gradients, tf32_allowed, without_paths, worst_relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PATH = torch.cuda.is_available() and model_new._tensor_core_path(model_new._capability(0))
FORCED = model_new._forced_capability()
SHARED_BYTES = torch.cuda.is_available() and (model_new._SHARED_BYTES[FORCED] if FORCED else torch.cuda.get_device_properties(0).shared_memory_per_block_optin)


@pytest.fixture(scope="module", autouse=True)
def packed_copies():
    """These are the paths of packed copies; tests/test_gemm.py, tests/test_sweep.py and tests/test_polyphase.py have the others."""
    with without_paths("_gemm", "_sweep", "_polyphase"):
        yield


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
    ((2, 64, 12, 20, 31), 64, (1, 2, 2), 1, 2, 0, 1),     # padding that cuts off more than the kernel adds
    ((2, 32, 16, 16, 16), 32, 2, 2, 0, 0, 1),
    ((2, 32, 16, 16, 16), 40, (2, 4, 2), 2, (0, 1, 0), 0, 1),
    ((1, 128, 6, 9, 31), 64, 4, 2, 1, 0, 1),
    ((2, 64, 7, 19, 11), 40, 4, 2, 1, 1, 1),            # phases of the same grid with other numbers of outputs
    ((1, 64, 3, 12, 300), 64, 4, 2, 1, 0, 1),
    ((2, 32, 8, 16, 16), 32, 3, 2, 1, 0, 1),
    ((2, 64, 7, 9, 11), 40, 3, 2, 1, 1, 1),
    ((1, 20, 6, 12, 130), 36, (1, 3, 5), 2, 0, 1, 1),
    ((2, 64, 12, 16, 16), 32, 4, 2, 1, 0, 1),           # three consumers, the last one with a single row
    ((1, 32, 4, 20, 128), 32, 3, 2, 1, 0, 1),           # sectors of memory that two runs share
    ((2, 64, 8, 32, 32), 32, 2, 2, 0, 0, 1),            # phases staged as vectors
    ((2, 32, 8, 16, 16), 16, 3, 2, 1, 1, 1),            # dx: a stage of two phases, at taps of either; sizes that are doubled
    ((2, 320, 7, 8, 8), 96, 3, 1, 1, 0, 1),             # tiles of several planes, GEMM_K in parts
    ((1, 200, 5, 9, 9), 40, 3, 1, 1, 0, 1),             # GEMM_K in parts
    ((2, 320, 8, 8, 8), 256, 2, 2, 0, 0, 1),            # tiles of several planes
    ((2, 64, 8, 20, 24), 32, (3, 4, 4), (1, 2, 2), 1, 0, 1),    # axes of both strides
    ((1, 128, 5, 17, 19), 64, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1), 1),
    ((1, 128, 5, 17, 19), 64, (4, 4, 3), (2, 2, 1), 1, 0, 1),
    ((1, 32, 7, 16, 18), 40, (4, 3, 3), (2, 1, 1), 1, 0, 1),
]
FLOAT32 = [    # as PLAIN: strides where cuDNN's forward is float32-accurate, its gradients are not
    ((2, 64, 6, 20, 20), 64, (1, 2, 2), (1, 2, 2), 0, 0, 1), ((2, 320, 4, 10, 12), 320, (1, 2, 2), (1, 2, 2), 0, 0, 1), ((1, 640, 4, 9, 11), 40, (2, 1, 2), (2, 1, 2), 0, 0, 1),
    ((1, 32, 7, 9, 11), 48, 5, 3, 2, 1, 1), ((1, 200, 5, 6, 7), 24, 4, 4, 0, 0, 1), ((1, 12, 9, 14, 31), 36, (3, 4, 5), (1, 3, 2), 1, 0, 1), ((2, 32, 8, 9, 10), 32, 2, 2, 1, 0, 2),
    ((1, 32, 5, 9, 14), 12, 4, 4, 0, 0, 1),             # dx: a stage of four phases
]
GROUPED = [((2, 32, 8, 16, 16), 32, 4, 3, 2, 1, 0, 1), ((2, 64, 8, 16, 18), 32, 2, 3, 1, 1, 0, 1), ((1, 48, 9, 14, 18), 96, 4, (3, 2, 5), 2, 1, 1, 1)]


def tensors(shape, channels, kernel, dtype=torch.float32):
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    return torch.randn(shape, device="cuda").to(dtype), (0.1 * torch.randn(shape[1], channels, *kernel, device="cuda")).to(dtype)


def run(function, *arguments, **keywords):
    with model_new.record_launches() as launched:
        output = function(*arguments, **keywords)
    assert launched and all(name.endswith(PATH) for name in launched), launched
    return output


def run_if_tiled(stride, function, /, *arguments, **keywords):
    """As ``run``, but for a stride of 3 along W, whose phases do not fill the row tiles of mma.sync."""
    return (function if PATH == "sm80" and stride in (3, (3, 3, 3)) else functools.partial(run, function))(*arguments, **keywords)


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


@pytest.mark.parametrize("shape, channels, kernel, stride, padding", [((18, 64, 16, 16, 16), 128, 3, 1, 1), ((18, 64, 14, 17, 18), 128, 3, 1, 0), ((18, 128, 8, 16, 20), 128, 4, 2, 1)])
@pytest.mark.parametrize("num_groups", [1, 8, 128])
@pytest.mark.parametrize("saved", [True, False])
def test_samples_normalized_while_others_are_multiplied(shape, channels, kernel, stride, padding, num_groups, saved):
    x, w = tensors(shape, channels, kernel)
    x *= torch.logspace(-3, 3, shape[0], device="cuda").view(-1, 1, 1, 1, 1)
    x[1, 2, 3, 4, 5] = float("nan")
    gamma, beta = (torch.randn(channels, device="cuda") for _ in range(2))
    w.requires_grad_(saved)    # then relu(z) is kept

    def reference(*t):
        return F.group_norm(F.conv_transpose3d(*t[:2], stride=stride, padding=padding).relu(), num_groups, *t[2:], eps=0.0).detach()

    def ours():
        return model_new.conv_transpose3d_relu_group_norm(x, w, None, gamma, beta, num_groups, 0.0, stride, padding).detach()

    truth, y = reference(*(t.double() for t in (x, w, gamma, beta))), run(ours)
    assert torch.equal(y.isnan(), truth.isnan())
    finite = [n for n in range(shape[0]) if n != 1]
    assert worst_relative_error(y[finite], truth[finite], (1, 2, 3, 4)) <= 1.05 * worst_relative_error(reference(x, w, gamma, beta)[finite], truth[finite], (1, 2, 3, 4))
    for _ in range(3):
        assert torch.equal(y.nan_to_num(0.0), ours().nan_to_num(0.0))


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding, dilation", [
    ((2, 32, 8, 16, 32), 32, 4, 3, 2, 1, 0, 1), ((1, 64, 7, 9, 31), 32, 4, 2, 2, 0, 0, 1), ((2, 16, 9, 31, 33), 32, 2, (3, 2, 4), 2, 1, 1, 1), ((1, 64, 16, 40, 50), 128, 2, 1, 1, 0, 0, 1),
    ((2, 64, 6, 9, 10), 64, 4, 3, 3, 0, 1, 1),
    *((shape, channels, 1, *others) for shape, channels, *others in FLOAT32)])
@pytest.mark.parametrize("fused", [False, True])
def test_float32_accurate(shape, channels, groups, kernel, stride, padding, output_padding, dilation, fused):
    x, w = tensors(shape, channels // groups, kernel)
    x[0] *= 1e-6
    sizes = (stride, padding, output_padding, groups, dilation)
    if fused:
        y = run_if_tiled(stride, model_new.conv_transpose3d_relu_group_norm, x, w, None, None, None, 4, 0.0, *sizes)
        truth = F.group_norm(F.conv_transpose3d(x.double(), w.double(), None, *sizes).relu(), 4, eps=0.0)
    else:
        y, truth = run_if_tiled(stride, model_new.conv_transpose3d, x, w, None, *sizes), F.conv_transpose3d(x.double(), w.double(), None, *sizes)
    assert worst_relative_error(y, truth, (1, 2, 3, 4)) <= 1e-6


@pytest.mark.parametrize("shape, channels, groups, kernel", [((2, 64, 16, 16, 16), 64, 2, 3), ((1, 128, 9, 14, 15), 192, 4, (3, 1, 5))])
@pytest.mark.parametrize("fused", [False, True])
def test_groups_of_many_channels(shape, channels, groups, kernel, fused):
    x, w = tensors(shape, channels // groups, kernel)

    def reference(x, w):
        y = F.conv_transpose3d(x, w, groups=groups)
        return F.group_norm(y.relu(), 8) if fused else y

    if fused:
        y = model_new.conv_transpose3d_relu_group_norm(x, w, None, None, None, 8, groups=groups)
    else:
        y = run(model_new.conv_transpose3d, x, w, groups=groups)
    truth = reference(x.double(), w.double())
    assert worst_relative_error(y, truth, (1, 2, 3, 4)) <= 1.05 * worst_relative_error(reference(x, w), truth, (1, 2, 3, 4))


@pytest.mark.parametrize("channels, groups, stride", [(32, 4, 2), (64, 2, 1), (32, 1, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_group(value, channels, groups, stride):
    x, w = tensors((2, channels, 10, 12, 16), channels // groups, 3)
    x[1, 3, 4, 5, 6] = value
    y, truth = run_if_tiled(stride, model_new.conv_transpose3d, x, w, stride=stride, padding=1, groups=groups), F.conv_transpose3d(x.double().cpu(), w.double().cpu(), stride=stride, padding=1, groups=groups).cuda()
    assert torch.equal(y.isfinite(), truth.isfinite()) and torch.equal(y.isnan(), truth.isnan())


def check_gradients(shape, channels, groups, kernel, stride, padding, output_padding, dilation, dtype):
    x, w = tensors(shape, channels // groups, kernel, dtype)
    sizes = (stride, padding, output_padding, groups, dilation)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))
    truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    with model_new.record_launches() as launched:
        ours = gradients(model_new.conv_transpose3d, x, w, grad, sizes)
    fits = dilation < 8 or SHARED_BYTES > 99 * 1024    # dweight's boxes of x and its halo
    assert launched[-1] == (f"conv_transpose3d_gradients_{PATH}" if fits else "conv_transpose3d_dweight_generic")
    for result, again, exact in zip(ours, gradients(model_new.conv_transpose3d, x, w, grad, sizes), truth):
        # PyTorch's own gradients are sometimes those of TF32 truncated (8e-4), sometimes those of float32.
        assert relative_error(result, exact) <= {torch.float32: 3.1e-4, torch.float16: 4.5e-4, torch.bfloat16: 3.5e-3}[dtype]
        assert torch.equal(result, again)


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding, dilation", PLAIN + FLOAT32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients(shape, channels, kernel, stride, padding, output_padding, dilation, dtype):
    check_gradients(shape, channels, 1, kernel, stride, padding, output_padding, dilation, dtype)


@pytest.mark.parametrize("arguments", GROUPED)
def test_gradients_of_groups(arguments):
    check_gradients(*arguments, torch.float32)


@pytest.mark.parametrize("arguments", [((2, 64, 8, 32, 32), 128, 3, 1, 0, 0, 1), ((2, 20, 9, 31, 33), 36, 3, 1, 1, 0, 1), ((2, 64, 7, 9, 11), 40, 3, 2, 1, 1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_gradients(arguments, biased):
    shape, channels, kernel, *sizes = arguments
    sizes.insert(3, 1)
    x, w = tensors(shape, channels, kernel)
    leaves = [x, w, *(torch.randn(channels, device="cuda") for _ in range(3))]
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))

    def differentiate(function, dtype):
        t = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        wanted = t if biased else t[:2] + t[3:]
        return torch.autograd.grad(function(t[0], t[1], t[2] if biased else None, *t[3:]), wanted, grad.to(dtype))

    def reference(x, w, bias, gamma, beta):
        return F.group_norm(F.conv_transpose3d(x, w, bias, *sizes).relu(), 4, gamma, beta)

    truth = differentiate(reference, torch.float64)
    with model_new.record_launches() as launched:
        ours = differentiate(lambda x, w, bias, gamma, beta: model_new.conv_transpose3d_relu_group_norm(x, w, bias, gamma, beta, 4, 1e-5, *sizes), torch.float32)
    assert launched[1].endswith(f"relu_group_norm_gradients_{PATH}")
    for result, theirs, exact in zip(ours, differentiate(reference, torch.float32), truth):
        # The mask of ReLU flips where z is nearly zero, in other places for each of the two.
        assert relative_error(result, exact) <= 1.3 * relative_error(theirs, exact) + 1e-5


@pytest.mark.parametrize("spread", ["channel", "sample", "space", "opposite"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_over_twelve_decades(spread, stride):
    x, w = tensors((4, 32, 10, 12, 16), 64, 3)
    sizes = (stride, 1, 0, 1, 1)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))
    decades = {"channel": (1, 64, 1, 1, 1), "sample": (4, 1, 1, 1, 1), "space": (1, 1, 1, 1, grad.shape[4]), "opposite": (4, 1, 1, 1, 1)}[spread]
    size = 10.0 ** torch.linspace(-6, 6, max(decades), device="cuda").view(decades)
    grad, x = grad * size, x / size if spread == "opposite" else x    # opposite: every sample counts in dweight
    dx, dw = gradients(model_new.conv_transpose3d, x, w, grad, sizes)
    dx_truth, dw_truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    limit = 4e-4 if spread == "space" else 3.3e-4    # few terms count there
    assert worst_relative_error(dx, dx_truth, (1, 2, 3, 4)) <= limit
    # A channel 2^-29 of the largest loses bits in its dweight, and what is left counts for nothing beside the others (README, limits).
    # Operands rounded as TF32 rounds them, and nothing else, have 3.1e-4 to 3.4e-4 in the worst of 64 channels.
    dims, limit = ((0, 1, 2, 3, 4), limit) if spread == "channel" else ((0, 2, 3, 4), max(limit, 3.6e-4))
    assert worst_relative_error(dw, dw_truth, dims) <= limit


@pytest.mark.parametrize("channels, groups, stride, output_padding", [(64, 1, 1, 0), (64, 1, 2, 0), (64, 4, 2, 0), (64, 1, 2, 1), (16, 1, 2, 0), (16, 1, 2, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_stay_where_they_are(value, channels, groups, stride, output_padding):
    x, w = tensors((2, 32, 10, 12, 16), channels // groups, 3)
    sizes = (stride, 1, output_padding, groups, 1)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))
    grad[1, 3, 4, 5, 6] = value
    dx = gradients(model_new.conv_transpose3d, x, w, grad, sizes)[0]
    truth = gradients(F.conv_transpose3d, x.double().cpu(), w.double().cpu(), grad.double().cpu(), sizes)[0].cuda()
    assert torch.equal(dx.isfinite(), truth.isfinite()) and torch.equal(dx.isnan(), truth.isnan())


def test_zero_gradients():
    x, w = tensors((2, 32, 10, 12, 16), 64, 3)
    for result in gradients(model_new.conv_transpose3d, x, w, torch.zeros_like(F.conv_transpose3d(x, w)), (1, 0, 0, 1, 1)):
        assert (result == 0).all()


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


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 2), (2, 3), (2, 4), (2, 5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_where_they_are(value, stride, kernel):
    x, w = tensors((2, 32, 10, 12, 16), 64, kernel)
    x[1, 3, 4, 5, 6] = value
    padding = (kernel - 1) // 2
    y, reference = run(model_new.conv_transpose3d, x, w, stride=stride, padding=padding), F.conv_transpose3d(x.double().cpu(), w.double().cpu(), stride=stride, padding=padding).cuda()
    assert torch.equal(y.isfinite(), reference.isfinite()) and torch.equal(y.isnan(), reference.isnan())


def test_large_mean():
    x, w = tensors((2, 32, 10, 12, 16), 64, 3)
    bias, ones = torch.full((64,), 1e4, device="cuda"), torch.ones(64, device="cuda")

    def reference(x, w, bias, ones):
        return F.group_norm(F.conv_transpose3d(x, w, bias, padding=1).relu(), 8, ones)

    truth = reference(x.double(), w.double(), bias.double(), ones.double())
    y = run(model_new.conv_transpose3d_relu_group_norm, x, w, bias, ones, None, 8, padding=1)
    assert relative_error(y, truth) <= 1.05 * relative_error(reference(x, w, bias, ones), truth)


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, forward, dinput", [
    # where the forward and dx are to be float32-accurate, as cuDNN's are
    ((2, 32, 12, 20, 31), 1, 3, 1, 1, True, True), ((2, 64, 9, 20, 31), 3, 3, 1, 1, True, True), ((2, 40, 9, 20, 31), 8, 5, 1, 2, True, False), ((2, 8, 9, 20, 31), 3, 3, 1, 1, True, True),
    ((2, 64, 9, 20, 31), 4, 2, 2, 0, True, False), ((2, 64, 9, 20, 31), 2, 4, 2, 1, False, True), ((2, 3, 20, 32, 31), 32, 3, 1, 1, True, False),
    ((2, 20, 5, 13, 37), 2, (2, 3, 5), 1, (0, 1, 2), True, True), ((1, 16, 9, 20, 31), 1, 5, 1, 3, True, True), ((2, 12, 7, 9, 31), 4, (5, 5, 1), 1, 0, True, False),
])
def test_few_channels(shape, channels, kernel, stride, padding, forward, dinput):
    x, w = tensors(shape, channels, kernel)
    sizes = (stride, padding, 0, 1, 1)
    grad = torch.randn_like(F.conv_transpose3d(x, w, None, *sizes))
    truth = F.conv_transpose3d(x.double(), w.double(), None, *sizes), *gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    ours = model_new.conv_transpose3d(x, w, None, *sizes), *gradients(model_new.conv_transpose3d, x, w, grad, sizes)
    for y, expected, limit in zip(ours, truth, (1e-6 if forward else 4e-4, 1e-6 if dinput else 4e-4, 4e-4)):
        assert relative_error(y, expected) <= limit


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_few_channels_multiply_nothing_outside(channels):
    x, w = tensors((2, 16, 5, 11, 13), channels, 3)
    bias = torch.randn(channels, device="cuda")
    w[3, 0, 0, 2, 1], x[1, 2, 3, 4, 5] = float("inf"), float("nan")
    y, truth = (f(*(t.to(kind) for t in (x, w, bias)), padding=1) for f, kind in ((model_new.conv_transpose3d, "cuda"), (F.conv_transpose3d, "cpu")))
    assert torch.equal(y.isnan().cpu(), truth.isnan()) and torch.equal(y.isinf().cpu(), truth.isinf())
    assert torch.allclose(y.cpu(), truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_tf32_disallowed_is_not_this_path():
    x, w = tensors((2, 32, 10, 12, 16), 64, 3)
    with tf32_allowed(False), model_new.record_launches() as launched:
        model_new.conv_transpose3d(x, w)
    assert launched == ["conv_transpose3d_forward_generic"]
