"""What torch refuses is refused, with a message that names the argument, the rule and the value; by the fake tensors too."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model_new

X, W = (2, 4, 3, 3, 3), (4, 6, 3, 3, 3)

BAD_CONVOLUTIONS = {
    # name: (input shape, weight shape, keywords, what the message says)
    "dimensions": ((4, 3, 3), W, {}, "input: expected 5 dimensions"),
    "weight_dimensions": (X, (4, 6, 3, 3), {}, "weight: expected 5 dimensions"),
    "channels": ((2, 5, 3, 3, 3), W, {}, "input: expected 4 channels"),
    "groups_0": (X, W, dict(groups=0), "groups: expected a positive number, got 0"),
    "groups_negative": (X, W, dict(groups=-1), "groups: expected a positive number, got -1"),
    "groups_3": (X, W, dict(groups=3), "groups: expected a divisor of the 4 input channels, got 3"),
    "stride_0": (X, W, dict(stride=0), "stride: expected a positive depth, got 0"),
    "stride_triple": (X, W, dict(stride=(2, 2)), "stride: expected an int or 3"),
    "padding_negative": (X, W, dict(padding=(0, -1, 0)), "padding: expected a non-negative height, got -1"),
    "output_padding_negative": (X, W, dict(output_padding=-1), "output_padding: expected a non-negative depth"),
    "output_padding_large": (X, W, dict(stride=2, output_padding=2), "output_padding: expected less than stride 2 or dilation 1 along the depth, got 2"),
    "dilation_0": (X, W, dict(dilation=0), "dilation: expected a positive depth, got 0"),
    "empty_output": (X, W, dict(padding=3), "padding: 3 leaves an output depth of -1"),
    "zero_depth": ((2, 4, 0, 3, 3), W, {}, "input: expected a non-zero depth"),
    "kernel_0": (X, (4, 6, 0, 3, 3), {}, "weight: expected a positive kernel depth"),
    "no_channels": ((2, 0, 3, 3, 3), (0, 6, 3, 3, 3), {}, "weight: expected at least one channel"),
    "bias_size": (X, W, dict(bias=(5,)), r"bias: expected the shape \[6\], got \[5\]"),
    "bias_dimensions": (X, W, dict(bias=(6, 1)), r"bias: expected the shape \[6\], got \[6, 1\]"),
}


def arguments(input_shape, weight_shape, keywords):
    keywords = dict(keywords)
    if "bias" in keywords:
        keywords["bias"] = torch.randn(keywords["bias"])
    return (torch.randn(input_shape), torch.randn(weight_shape)), keywords


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_convolutions(case):
    *shapes, keywords, message = BAD_CONVOLUTIONS[case]
    tensors, keywords = arguments(*shapes, keywords)
    with pytest.raises((RuntimeError, ValueError)):
        F.conv_transpose3d(*tensors, **keywords)    # torch refuses it too
    with pytest.raises(RuntimeError, match=message):
        model_new.conv_transpose3d(*tensors, **keywords)
    with FakeTensorMode() as mode:
        fakes, fake_keywords = [mode.from_tensor(t) for t in tensors], {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        with pytest.raises(RuntimeError, match=message):
            model_new.conv_transpose3d(*fakes, **fake_keywords)


@pytest.mark.parametrize("keywords, error, message", [
    (dict(num_groups=0), RuntimeError, "num_groups: expected a positive number, got 0"),
    (dict(num_groups=4), RuntimeError, "num_groups: expected a divisor of the 6 output channels, got 4"),
    (dict(gn_weight=torch.randn(5)), RuntimeError, r"gn_weight: expected the shape \[6\], got \[5\]"),
    (dict(gn_bias=torch.randn(6, 1)), RuntimeError, r"gn_bias: expected the shape \[6\], got \[6, 1\]"),
    (dict(gn_weight=torch.randn(6).double()), RuntimeError, "gn_weight: expected the dtype torch.float32"),
])
def test_bad_norms(keywords, error, message):
    values = {"gn_weight": None, "gn_bias": None, "num_groups": 3, **keywords}
    with pytest.raises(error, match=message):
        model_new.conv_transpose3d_relu_group_norm(torch.randn(X), torch.randn(W), None, **values)


def test_one_value_per_group():
    with pytest.raises(ValueError, match="more than 1 value per group"):
        model_new.conv_transpose3d_relu_group_norm(torch.randn(1, 4, 1, 1, 1), torch.randn(4, 6, 1, 1, 1), None, None, None, 6)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32, torch.float32), (torch.float32, torch.float32, torch.float64), (torch.float16, torch.float32, torch.float16)])
def test_mixed_dtypes(dtypes):
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip((X, W, (6,)), dtypes)]
    with pytest.raises(RuntimeError, match="expected input's dtype and device"):
        model_new.conv_transpose3d(*tensors)


def test_integers_and_wrong_types():
    with pytest.raises(RuntimeError, match="input: expected float32"):
        model_new.conv_transpose3d(torch.ones(X, dtype=torch.int32), torch.ones(W, dtype=torch.int32))
    with pytest.raises(TypeError, match="stride: expected an int or 3"):
        model_new.conv_transpose3d(torch.randn(X), torch.randn(W), stride=2.0)


def test_what_would_overflow_an_axis():
    with pytest.raises(RuntimeError, match="below 2\\*\\*30"):
        model_new.conv_transpose3d(torch.randn(1, 1, 2, 1, 1), torch.randn(1, 1, 1, 1, 1), stride=2**30)


def test_what_would_overflow_a_kernel():
    with pytest.raises(RuntimeError, match=f"weight: expected a kernel of less than 2\\*\\*30 elements, got {2**31}"):
        model_new.conv_transpose3d(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1).expand(1, 1, 2048, 1024, 1024))


@pytest.mark.parametrize("build", [lambda: model_new.ConvTranspose3dNew(4, 6, 3, groups=3), lambda: model_new.ModelNew(4, 6, 3, 4)])
def test_constructors_refuse_what_torch_refuses(build):
    with pytest.raises(ValueError):
        build()
