"""dweight of small grids and many channels, one element of the kernel at a time (kernels/dweight_taps_sm90.cuh), on Hopper."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import gradients, gradients_by

PATH = torch.cuda.is_available() and model_new._tensor_core_path(model_new._capability(0))
pytestmark = pytest.mark.skipif(PATH != "sm90", reason="needs a Hopper GPU")

LAYERS = [
    # input, output channels, kernel, stride, padding, output_padding
    ((2, 320, 8, 8, 8), 256, 3, 2, 1, 1),
    ((16, 512, 4, 4, 4), 512, 3, 1, 1, 0),              # many samples
    ((3, 100, 5, 7, 9), 130, 4, 2, 1, 0),               # channels that fill no block, boxes that fill no steps
    ((2, 256, 10, 10, 10), 70, (1, 3, 2), (1, 2, 3), (0, 1, 0), 0),
    ((2, 512, 6, 6, 6), 320, 3, 2, 1, 1),
]


def tensors(shape, channels, kernel, *sizes):
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    x, w = torch.randn(shape, device="cuda"), torch.randn(shape[1], channels, *kernel, device="cuda")
    return x, w, torch.randn_like(F.conv_transpose3d(x, w, None, *sizes)), (*sizes, 1, 1)


def run(x, w, grad, sizes):
    return gradients_by("dweight_taps_kernel", x, w, grad, sizes)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients(layer):
    x, w, grad, sizes = tensors(*layer)
    dx, dw = run(x, w, grad, sizes)
    truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)
    assert relative_error(dx, truth[0]) <= 3.1e-4 and relative_error(dw, truth[1]) <= 3.1e-4
    assert torch.equal(dw, gradients(model_new.conv_transpose3d, x, w, grad, sizes)[1])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("range", [3, 30])
def test_samples_of_other_sizes(layer, range):
    """Scales that change a little, by which sums are scaled again, and much, for which they are added to scratch memory."""
    x, w, grad, sizes = tensors(*layer)
    size = torch.logspace(-range, range, len(x), base=2, device="cuda").view(-1, 1, 1, 1, 1)
    x, grad = x / size, grad * size * (1 + (size > 1))    # every sample counts in dweight
    assert relative_error(run(x, w, grad, sizes)[1], gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)[1]) <= 3.3e-4
    grad = grad / size**2    # one sample counts, the first one
    assert relative_error(run(x, w, grad, sizes)[1], gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)[1]) <= 3.3e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    x, w, grad, sizes = tensors(*LAYERS[2])
    x, w, grad = x.to(dtype), w.to(dtype), grad.to(dtype)
    truth = gradients(F.conv_transpose3d, x.double(), w.double(), grad.double(), sizes)[1]
    assert relative_error(run(x, w, grad, sizes)[1], truth) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_stay_in_their_channel(value):
    x, w, grad, sizes = tensors(*LAYERS[0])
    clean = run(x, w, grad, sizes)[1]
    grad[1, 3, 4, 5, 6] = value
    dw = run(x, w, grad, sizes)[1]
    others = [c for c in range(dw.shape[1]) if c != 3]
    assert torch.equal(dw[:, others], clean[:, others])
    assert torch.equal(dw[:, 3].isfinite(), gradients(F.conv_transpose3d, x, w, grad, sizes)[1][:, 3].isfinite())
