"""Strided layers of many channels by the phases of their outputs (kernels/polyphase_sm90.cuh), against float64."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import assert_as_accurate_as_torch, assert_finite_where_torch_is, gradients, tensors, with_paths_first, worst_relative_error

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and model_new._is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
LAYERS = [
    # input, output channels, kernel, stride, padding, output_padding
    ((2, 128, 8, 32, 32), 64, 3, 2, 1, 1), ((2, 256, 16, 16, 16), 128, 3, 2, 1, 1),    # rows of the same plane
    ((2, 320, 8, 8, 8), 256, 3, 2, 1, 1), ((1, 512, 7, 4, 4), 100, 4, 2, 1, 0),        # planes, one and several
    ((1, 64, 5, 40, 80), 32, 3, 2, 1, 1), ((1, 80, 3, 4, 150), 64, 3, 2, 1, 0),        # strips; half of the output channels
    ((2, 128, 9, 20, 31), 64, 4, 2, 1, 0), ((1, 100, 7, 33, 45), 70, 3, 2, 1, 0),      # rows that are no vectors; of odd length
    ((1, 64, 11, 13, 90), 130, 2, 2, 0, 0), ((2, 96, 9, 21, 40), 72, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1)),
    ((1, 64, 12, 30, 14), 64, (3, 2, 4), (2, 1, 2), (1, 0, 2), (1, 0, 1)), ((2, 64, 5, 6, 7), 96, (4, 5, 3), 2, (2, 0, 1), (1, 0, 1)), ((3, 40, 4, 5, 6), 24, 2, 2, 0, 1),
]
MOST = 3.1e-4    # relative error, as TF32


@pytest.fixture(autouse=True)
def polyphase_first():
    with with_paths_first(("polyphase_sm90", model_new._polyphase_sm90), operations=("conv_transpose3d_forward", "conv_transpose3d_relu_group_norm_forward")):
        yield


def run(x, w, bias, stride, padding, output_padding):
    with model_new.record_launches() as names:
        y = model_new.conv_transpose3d(x, w, bias, stride, padding, output_padding)
    assert names == ["conv_transpose3d_forward_polyphase_sm90"]
    return y


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding", LAYERS)
def test_as_accurate_as_torch(shape, channels, kernel, stride, padding, output_padding):
    assert_as_accurate_as_torch(run, *tensors(shape, channels, kernel), (stride, padding, output_padding), MOST, torch_has_tf32=True)


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(shape, channels, kernel, stride, padding, output_padding, value):
    x, w, bias = tensors(shape, channels, kernel)
    x.view(-1)[x.numel() // 3] = value
    assert_finite_where_torch_is(run, x, w, bias, (stride, padding, output_padding), MOST)


def test_samples_and_channels_of_other_magnitudes():
    """Each sample has a scale, and each output channel: also where scaling back takes more than one normal number."""
    shape, channels, kernel, *sizes = LAYERS[0]
    x, w, _ = tensors((4, *shape[1:]), channels, kernel)
    x *= torch.tensor([1e-30, 1, 1e15, 1e-8], device="cuda").view(-1, 1, 1, 1, 1)
    w *= torch.logspace(-25, 15, channels, device="cuda").view(1, -1, 1, 1, 1)
    y, truth = run(x, w, None, *sizes), F.conv_transpose3d(x.double(), w.double(), None, *sizes)
    normal = truth.abs().amax((2, 3, 4)) > 1e-30
    assert worst_relative_error(y[normal], truth[normal], (1, 2, 3)) < 4e-4
    bias = torch.randn(channels, device="cuda")
    zeros = run(x * 0, w, bias, *sizes)
    assert torch.equal(zeros, bias.view(1, -1, 1, 1, 1).expand_as(zeros))


def test_gradients_read_its_copy_of_the_input():
    shape, channels, kernel, *sizes = LAYERS[0]
    x, w, _ = tensors(shape, channels, kernel)
    layer = model_new.ConvTranspose3dNew(shape[1], channels, kernel, *sizes).cuda()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert any(t.dtype == torch.uint8 for t in saved) and not any(t.data_ptr() == x.data_ptr() for t in saved)
    grad = torch.randn_like(y)
    truth = gradients(F.conv_transpose3d, x.double(), layer.weight.double(), grad.double(), sizes)[1]
    assert relative_error(torch.autograd.grad(y, layer.weight, grad)[0], truth) < 4e-4


@pytest.mark.parametrize("shape, channels, kernel, stride, padding, output_padding", LAYERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_behind_it(shape, channels, kernel, stride, padding, output_padding, groups):
    """The moments that the kernels leave: also of channels whose mean is large."""
    x, w, bias = tensors(shape, channels, kernel)
    layer = model_new.ModelNew(shape[1], channels, kernel, groups, bias=True, stride=stride, padding=padding, output_padding=output_padding).cuda()
    conv, norm = layer.conv_transpose, layer.group_norm
    with torch.no_grad():
        conv.weight.copy_(w), conv.bias.copy_(bias * 100), norm.weight.copy_(bias), norm.bias.copy_(bias.flip(0))
        with model_new.record_launches() as names:
            y = layer(x)
    assert names == ["conv_transpose3d_relu_group_norm_forward_polyphase_sm90"]

    def reference(x, w, conv_bias, gamma, beta):
        return F.group_norm(F.conv_transpose3d(x, w, conv_bias, stride, padding, output_padding).relu(), groups, gamma, beta)

    truth = reference(*(t.detach().double() for t in (x, w, conv.bias, norm.weight, norm.bias)))
    assert relative_error(y, truth) < max(1.05 * relative_error(reference(x, w, conv.bias, norm.weight, norm.bias), truth), 1e-5)


def test_relu_behind_it():
    shape, channels, kernel, *sizes = LAYERS[0]
    x, w, bias = tensors(shape, channels, kernel)
    geometry, out_shape = model_new._geometry(x.shape, w.shape, (2, 2, 2), (1, 1, 1), (1, 1, 1), 1, (1, 1, 1))
    out = x.new_empty(out_shape)
    model_new._launch_forward(geometry, x, w, bias, True, out, None)
    assert torch.equal(out, run(x, w, bias, *sizes).relu())
