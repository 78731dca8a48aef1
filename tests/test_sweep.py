"""Strided layers of few channels, whose kernels read the tensors as they lie (kernels/sweep.cuh, kernels/sweep_sm90.cuh), against float64."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from layers import assert_as_accurate_as_torch, assert_finite_where_torch_is, tensors, with_paths_first

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GROUPED = [
    # input, output channels, groups, kernel, stride, padding, output_padding
    ((2, 32, 8, 16, 16), 32, 4, 3, 2, 1, 0), ((2, 32, 7, 15, 33), 32, 4, 3, 2, 1, 1), ((1, 16, 5, 40, 128), 32, 2, 3, 2, 1, 0), ((1, 16, 4, 9, 100), 16, 2, 3, 2, 0, 1),
    ((2, 24, 6, 11, 20), 48, 3, 4, 2, 1, 0), ((1, 16, 6, 30, 70), 16, 2, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1)), ((1, 16, 5, 12, 31), 16, 2, 3, 2, 2, 1),
    ((1, 32, 5, 10, 40), 48, 2, 3, 2, 1, 0), ((1, 48, 4, 9, 30), 16, 2, 2, 2, 0, 0), ((1, 32, 3, 9, 128), 32, 2, 3, 2, 1, 0),    # groups of 16 and 24 channels; the last one has room for one stage
]
DENSE = [
    ((1, 32, 5, 9, 100), 32, 1, 3, 2, 1, 0), ((2, 32, 4, 40, 128), 40, 1, 3, 2, 1, 1), ((1, 16, 5, 12, 31), 64, 1, 3, 2, 2, 1), ((1, 16, 6, 11, 70), 24, 1, 4, 2, 1, 0),
    ((1, 32, 6, 30, 70), 16, 1, (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1)), ((2, 32, 3, 9, 66), 32, 1, 2, 2, 0, 0), ((1, 32, 9, 7, 16), 8, 1, 3, 2, 0, 1), ((4, 16, 40, 3, 127), 32, 1, 2, 2, 0, 1),
]
LAYERS = GROUPED + DENSE
MOST = {"sweep": 4.5e-7, "sweep_sm90": 3.1e-4}    # relative error: groups are as accurate as float32, one group as TF32


@pytest.fixture(autouse=True)
def sweeps_first():
    with with_paths_first(("sweep", model_new._sweep), ("sweep_sm90", model_new._sweep_sm90)):
        yield


def path_of(groups):
    if groups == 1 and not model_new._is_hopper(torch.device("cuda", 0)):
        pytest.skip("one group sweeps on Hopper")
    return "sweep" if groups > 1 else "sweep_sm90"


def run(x, w, bias, stride, padding, output_padding, groups):
    with model_new.record_launches() as names:
        y = model_new.conv_transpose3d(x, w, bias, stride, padding, output_padding, groups)
    assert names == [f"conv_transpose3d_forward_{path_of(groups)}"]
    return y


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding", LAYERS)
def test_as_accurate_as_torch(shape, channels, groups, kernel, stride, padding, output_padding):
    path = path_of(groups)
    assert_as_accurate_as_torch(run, *tensors(shape, channels, kernel, groups), (stride, padding, output_padding, groups), MOST[path], torch_has_tf32=path == "sweep_sm90")


@pytest.mark.parametrize("shape, channels, groups, kernel, stride, padding, output_padding", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(shape, channels, groups, kernel, stride, padding, output_padding, value):
    path = path_of(groups)
    for which in range(2):
        x, w, bias = tensors(shape, channels, kernel, groups)
        (x, w)[which].view(-1)[(x, w)[which].numel() // 3] = value
        assert_finite_where_torch_is(run, x, w, bias, (stride, padding, output_padding, groups), MOST[path])


@pytest.mark.parametrize("layer, decades, most", [(GROUPED[2], 9, 1e-6), (DENSE[1], 2, 4e-4)])
def test_rows_of_other_magnitudes(layer, decades, most):
    """Scales follow the rows of the input: each row has its own, or those that an output reads have one, so that neighbours may differ by what a half has room for."""
    shape, channels, groups, kernel, *sizes = layer
    path_of(groups)
    x, w, bias = tensors(shape, channels, kernel, groups)
    for magnitudes in (torch.logspace(-30, 30, 40), torch.logspace(30, -30, 40), torch.logspace(-decades, decades, 40)[torch.randperm(40)]):
        scaled = x * magnitudes.to(x).view(1, 1, 1, -1, 1)
        y, truth = run(scaled, w, None, *sizes, groups), F.conv_transpose3d(scaled.double(), w.double(), None, *sizes, groups)
        rows = truth.square().sum((0, 1, 2, 4)).sqrt()
        assert ((y - truth).square().sum((0, 1, 2, 4)).sqrt() / rows).max() < most
    zeros = run(x * 0, w, bias, *sizes, groups)
    assert torch.equal(zeros, bias.view(1, -1, 1, 1, 1).expand_as(zeros))
