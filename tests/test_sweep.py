"""Strided groups of few channels on a kernel of their own (kernels/sweep.cuh), against float64."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import forget_paths, tensors, unaligned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS = [
    # input, output channels, groups, kernel, stride, padding, output_padding
    ((2, 32, 8, 16, 16), 32, 4, 3, 2, 1, 0), ((2, 32, 7, 15, 33), 32, 4, 3, 2, 1, 1), ((1, 16, 5, 40, 128), 32, 2, 3, 2, 1, 0), ((1, 16, 4, 9, 100), 16, 2, 3, 2, 0, 1),
    ((2, 24, 6, 11, 20), 48, 3, 4, 2, 1, 0), ((1, 16, 6, 30, 70), 16, 2, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1)), ((1, 16, 5, 12, 31), 16, 2, 3, 2, 2, 1),
    ((1, 32, 5, 10, 40), 48, 2, 3, 2, 1, 0), ((1, 48, 4, 9, 30), 16, 2, 2, 2, 0, 0), ((1, 32, 3, 9, 128), 32, 2, 3, 2, 1, 0),    # groups of 16 and 24 channels; the last one has room for one stage
]


@pytest.fixture(autouse=True)
def sweeps_first(monkeypatch):
    monkeypatch.setitem(model_new._PATHS, "conv_transpose3d_forward", (("sweep", model_new._sweep), *model_new._PATHS["conv_transpose3d_forward"]))
    forget_paths()
    yield
    monkeypatch.undo()
    forget_paths()


def run(x, w, bias, stride, padding, output_padding, groups):
    with model_new.record_launches() as names:
        y = model_new.conv_transpose3d(x, w, bias, stride, padding, output_padding, groups)
    assert names == ["conv_transpose3d_forward_sweep"]
    return y


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding", LAYERS)
def test_float32_accurate(shape, channels, groups, kernel, stride, padding, output_padding):
    x, w, bias = tensors(shape, channels, kernel, groups)
    sizes = (stride, padding, output_padding, groups)
    y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
    assert relative_error(y, truth) < 4.5e-7
    assert torch.equal(y, run(x, w, bias, *sizes))
    assert torch.equal(y, run(unaligned(x), unaligned(w), bias, *sizes)) and torch.equal(y, run(x.transpose(0, 1).contiguous().transpose(0, 1), w, bias, *sizes))


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(shape, channels, groups, kernel, stride, padding, output_padding, value):
    sizes = (stride, padding, output_padding, groups)
    for which in range(2):
        x, w, bias = tensors(shape, channels, kernel, groups)
        (x, w)[which].view(-1)[(x, w)[which].numel() // 3] = value
        y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
        finite = truth.isfinite()
        assert torch.equal(y.isfinite(), finite) and torch.equal(y.isnan(), truth.isnan())
        assert relative_error(y[finite], truth[finite]) < 4.5e-7


def test_rows_of_other_magnitudes():
    """Each row of the input has its own scale, from one to the next within what a sum can be scaled by."""
    shape, channels, groups, kernel, *_ = LAYERS[2]
    x, w, bias = tensors(shape, channels, kernel, groups)
    for magnitudes in (torch.logspace(-30, 30, 40), torch.logspace(30, -30, 40), torch.logspace(-9, 9, 40)[torch.randperm(40)]):
        scaled = x * magnitudes.to(x).view(1, 1, 1, -1, 1)
        y, truth = run(scaled, w, None, *LAYERS[2][4:], 2), F.conv_transpose3d(scaled.double(), w.double(), None, *LAYERS[2][4:], 2)
        rows = truth.square().sum((0, 1, 2, 4)).sqrt()
        assert ((y - truth).square().sum((0, 1, 2, 4)).sqrt() / rows).max() < 1e-6
    zeros = x * 0
    assert torch.equal(run(zeros, w, bias, *LAYERS[2][4:], 2), bias.view(1, -1, 1, 1, 1).expand(1, 32, 9, 79, 255))
