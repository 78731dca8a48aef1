"""Where the forward leaves a copy of its input for the tensor cores, the backward reads that and not the input."""

import pytest
import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error
from layers import forget_paths, gradients, tf32_allowed, without_paths

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def packed_copies():
    with without_paths("_sweep"):    # which packs nothing
        yield


PLAIN = model_new.ConvTranspose3dNew(64, 32, 3, stride=2, padding=1, output_padding=1, bias=True)
FUSED = model_new.ModelNew(64, 128, 3, 8, padding=1)
GROUPED = model_new.ConvTranspose3dNew(64, 32, 3, stride=2, padding=1, groups=4)    # a forward with split operands, which leaves another copy
THIRDS = model_new.ConvTranspose3dNew(64, 64, (1, 4, 4), stride=(1, 4, 2))          # likewise, of one group


def run(layer, dtype=torch.float32):
    """(layer, input, output, gradient)."""
    torch.manual_seed(0)
    layer = layer.to("cuda", dtype)
    x = torch.randn(2, 64, 20, 24, 28, device="cuda", dtype=dtype)
    y = layer(x)
    return layer, x, y, torch.randn_like(y)


def saved_by(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer.to(x.device)(x)
    return saved


def weight_of(layer):
    return layer.conv_transpose.weight if isinstance(layer, model_new.ModelNew) else layer.weight


def weight_gradient(layer, y, grad, *others):
    """The first of the gradients of the weight and of ``others``."""
    return torch.autograd.grad(y, (weight_of(layer), *others), grad, retain_graph=True)[0]


def sizes_of(layer):
    return layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation


def true_weight_gradient(layer, x, grad):
    """In float64."""
    return gradients(F.conv_transpose3d, x.double(), layer.weight.double(), grad.double(), sizes_of(layer))[1]


def holds(saved, tensor):
    return any(t.data_ptr() == tensor.data_ptr() for t in saved)


@needs_gpu
@pytest.mark.parametrize("layer, dtype", [(PLAIN, torch.float32), (PLAIN, torch.float16), (PLAIN, torch.bfloat16), (FUSED, torch.float32), (GROUPED, torch.float32), (THIRDS, torch.float32)])
def test_the_input_is_not_kept_and_the_gradient_is_the_same(layer, dtype):
    layer, x, y, grad = run(layer, dtype)
    saved = saved_by(layer, x)
    packed = [t for t in saved if t.dtype == torch.uint8]
    assert len(packed) == 1 and not holds(saved, x)
    assert packed[0].nbytes <= x.numel() * 2 + 1024
    together = layer(x.requires_grad_())    # with the gradient of x in the same launch
    assert torch.equal(weight_gradient(layer, y, grad), weight_gradient(layer, together, grad, x))


@needs_gpu
@pytest.mark.parametrize("layer", [PLAIN, GROUPED, THIRDS])
def test_it_is_as_accurate_as_with_the_input(layer):
    layer, x, y, grad = run(layer)
    of_copy = weight_gradient(layer, y, grad)
    _, of_input, _ = model_new._backward(grad, x, None, layer.weight.detach(), x.shape, layer.weight.shape, *sizes_of(layer), [False, True, False])
    assert torch.equal(of_copy, of_input)
    assert relative_error(of_copy, true_weight_gradient(layer, x, grad)) < 4e-4


@needs_gpu
@pytest.mark.parametrize("layer", [GROUPED, THIRDS])
def test_leaving_another_copy_does_not_change_the_output(layer):
    layer, x, y, _ = run(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@needs_gpu
@pytest.mark.parametrize("layer", [PLAIN, FUSED, GROUPED])
def test_changing_the_input_behind_the_forward_does_not_matter(layer):
    layer, x, y, grad = run(layer)
    expected = weight_gradient(layer, y, grad)
    x.fill_(float("nan"))
    assert torch.equal(weight_gradient(layer, y, grad), expected)


@needs_gpu
@pytest.mark.parametrize("layer", [PLAIN, FUSED])
def test_flags_of_the_forward_hold_for_the_backward(layer):
    layer, x, y, grad = run(layer)
    expected = weight_gradient(layer, y, grad)
    with tf32_allowed(False):
        assert torch.equal(weight_gradient(layer, y, grad), expected)


@needs_gpu
@pytest.mark.parametrize("layer", [PLAIN, FUSED])
def test_without_tf32_the_input_is_kept(layer):
    with tf32_allowed(False):
        layer, x, y, grad = run(layer)
        saved = saved_by(layer, x)
        assert holds(saved, x) and all(t.dtype != torch.uint8 for t in saved)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)


@needs_gpu
def test_a_frozen_weight_keeps_nothing_of_the_input():
    layer = model_new.ConvTranspose3dNew(64, 32, 3, stride=2, padding=1, output_padding=1)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 64, 20, 24, 28, device="cuda", requires_grad=True)
    saved = saved_by(layer, x)
    assert not holds(saved, x) and all(t.dtype != torch.uint8 for t in saved)


@needs_gpu
def test_a_copy_larger_than_the_input_is_not_kept():
    x = torch.randn(2, 6, 20, 24, 28, device="cuda")    # 16 channels of the copy
    assert holds(saved_by(model_new.ConvTranspose3dNew(6, 64, 3, padding=1), x), x)


@needs_gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_extreme_inputs(value):
    """Infinite and large values, of which the first look at the input does not see all, and samples of zeros."""
    layer = PLAIN.to("cuda", torch.float32)
    x = torch.randn(3, 64, 20, 24, 28, device="cuda")
    x[1] = 0
    x[2, 5, 7, 3, 9] = value if value else 1e20
    y = layer(x)
    grad = torch.randn_like(y)
    result, truth = weight_gradient(layer, y, grad), true_weight_gradient(layer, x, grad)
    finite = truth.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert relative_error(result[finite], truth[finite]) < 4e-4


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("layer", [model_new.ConvTranspose3dNew(4, 6, 3, stride=2, bias=True), model_new.ModelNew(4, 6, 3, 2, stride=2)])
def test_who_gets_it(monkeypatch, layer, needs_dx):
    """On the CPU: a forward that leaves a copy, and gradients that read it."""
    launch, select_path = model_new._launch, model_new.select_path

    def packed_input(operation, geometry, input, kept):
        if kept is not None:
            kept.append(input.detach().clone().view(-1).view(torch.uint8))
        return kept and kept[0]

    def launch_or_differentiate(operation, shape, dtypes, device, inputs, outputs, packed=None):
        if operation != "conv_transpose3d_gradients":
            return launch(operation, shape, dtypes, device, inputs, outputs)
        grad, input, weight = inputs
        assert input is None and (weight is not None) == needs_dx
        copy, w = packed.view(torch.float32).view(x.shape).requires_grad_(), weight_copy.requires_grad_()
        with torch.enable_grad():
            y = F.conv_transpose3d(copy, w, stride=2)
        for output, gradient in zip(outputs, torch.autograd.grad(y, (copy, w), grad)):
            if output is not None:
                output.copy_(gradient)

    def select(operation, *arguments):
        return "sm90" if operation == "conv_transpose3d_gradients" else select_path(operation, *arguments)

    x, weight = torch.randn(2, 4, 5, 6, 7, requires_grad=needs_dx), weight_of(layer)
    weight_copy = weight.detach().clone()
    parameters = [weight] + [x] * needs_dx
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    monkeypatch.setattr(model_new, "_packed_input", packed_input)
    monkeypatch.setattr(model_new, "_launch", launch_or_differentiate)
    monkeypatch.setattr(model_new, "select_path", select)
    assert not holds(saved_by(layer, x), x)
    for gradient, truth in zip(torch.autograd.grad(layer(x).square().sum(), parameters), expected):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert layer(x).grad_fn is None


@pytest.mark.parametrize("in_channels, out_channels, size, kernel, tf32, forward, gradients, kept", [
    (32, 32, 32, 3, True, "polyphase_sm90", "sm90", True),    # which packs as the other does
    (32, 32, 32, 3, False, "generic", "composed", False),
    (320, 320, 4, 2, True, "gemm", "gemm", False),      # reads the input as it lies in memory
    (64, 3, 32, 2, True, "generic", "sm90", False),     # a forward in float32
])
def test_it_is_kept_where_forward_and_gradients_take_the_same_path(monkeypatch, in_channels, out_channels, size, kernel, tf32, forward, gradients, kept):
    """On any machine: the table's choice for a Hopper GPU, with a library that supports everything."""
    class Library:
        def __getattr__(self, name):
            if name.endswith("_depthwise"):
                return lambda *arguments: 0
            if not name.removesuffix("_packed").endswith("_sm90"):
                raise AttributeError(name)
            return lambda *arguments: 1000 if name.endswith("_packed") else 1

    monkeypatch.setattr(model_new, "_library", lambda backend: Library())
    monkeypatch.setattr(model_new, "_capability", lambda device: (9, 0))
    forget_paths()
    geometry, _ = model_new._geometry((2, in_channels, size, size, size), (in_channels, out_channels, kernel, kernel, kernel), (2, 2, 2), (0, 0, 0), (0, 0, 0), 1, (1, 1, 1))
    arguments = geometry, torch.float32, torch.device("cuda", 0), tf32
    try:
        assert model_new._select("conv_transpose3d_forward", *arguments) == forward
        assert model_new._select("conv_transpose3d_gradients", *arguments) == gradients
        for operation in ("conv_transpose3d_forward", "conv_transpose3d_relu_group_norm_forward"):
            path = model_new._select(operation, *arguments)
            assert model_new._shared_packed_bytes(operation, *arguments) == (1000 if kept and path in ("sm90", "polyphase_sm90") else 0)
    finally:
        forget_paths()
