"""Values and gradients against PyTorch in float64: shapes, layouts, ranges, what needs no gradient."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model_new
from harness import verify
from reference import SMALL_PROBLEMS, ConvTranspose3dModel, Model

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SMALL_PROBLEMS, ids=lambda p: p.name)
def test_small_problems(problem, dtype, device):
    candidate = model_new.ModelNew if problem.model == "fused" else model_new.ConvTranspose3dNew
    for result in verify.verify(problem, candidate, device, dtype, seed=torch.seed() % 2**31):
        assert result.right, (result.name, result.why)


def small_input(device, *shape, dtype=torch.float64):
    return torch.randn(*(shape or (2, 4, 3, 4, 5)), dtype=dtype, device=device)


@pytest.mark.parametrize("change", [
    lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    lambda x: x.to(memory_format=torch.channels_last_3d),
    lambda x: x[:, :, ::1, :, :].expand(2, 4, 3, 4, 5),
    lambda x: x[:1].expand(2, -1, -1, -1, -1),
    lambda x: torch.cat([x.flatten(), x.new_zeros(3)])[3:].view_as(x),    # an odd storage offset
    lambda x: x.flip(4)[..., ::1],
], ids=["transposed", "channels_last", "expanded_view", "expanded_batch", "offset", "flipped"])
def test_layouts(change, device):
    x = change(small_input(device))
    weight = small_input(device, 4, 6, 3, 3, 3).transpose(3, 4)
    expected = F.conv_transpose3d(x, weight, stride=2)
    result = model_new.conv_transpose3d(x, weight, stride=2)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous()


def test_gradients_in_other_layouts(device):
    x, weight = small_input(device).requires_grad_(), small_input(device, 4, 6, 3, 3, 3).requires_grad_()
    for make in (lambda y: torch.randn_like(y).to(memory_format=torch.channels_last_3d), lambda y: y.new_ones(()).expand_as(y)):
        expected = F.conv_transpose3d(x, weight)
        grad = make(expected)
        ours = torch.autograd.grad(model_new.conv_transpose3d(x, weight), (x, weight), grad)
        for a, b in zip(ours, torch.autograd.grad(expected, (x, weight), grad)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_frozen_in_every_combination(needs, device):
    tensors = [small_input(device), small_input(device, 4, 6, 2, 2, 2), small_input(device, 6), small_input(device, 6), small_input(device, 6)]
    for tensor, need in zip(tensors, needs):
        tensor.requires_grad_(need)
    x, w, b, gamma, beta = tensors
    ours = model_new.conv_transpose3d_relu_group_norm(x, w, b, gamma, beta, 3, stride=2)
    expected = F.group_norm(F.conv_transpose3d(x, w, b, stride=2).relu(), 3, gamma, beta)
    assert ours.requires_grad == any(needs)
    if any(needs):
        grad, wanted = torch.randn_like(ours), [t for t, need in zip(tensors, needs) if need]
        for a, e in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(expected, wanted, grad)):
            torch.testing.assert_close(a, e)


def test_only_what_is_needed_runs(device):
    x, w = small_input(device), small_input(device, 4, 6, 2, 2, 2).requires_grad_()
    y = model_new.conv_transpose3d(x, w)
    with model_new.record_launches() as launches:
        y.sum().backward()
    assert [name.rsplit("_", 1)[0] for name in launches] == ["conv_transpose3d_dweight"]


def test_no_norm_parameters(device):
    x, w = small_input(device).requires_grad_(), small_input(device, 4, 6, 2, 2, 2)
    ours = model_new.conv_transpose3d_relu_group_norm(x, w, None, None, None, 2)
    expected = F.group_norm(F.conv_transpose3d(x, w).relu(), 2)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, expected)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_the_input(value, device):
    x, w = small_input(device, dtype=torch.float32), small_input(device, 4, 6, 3, 3, 3, dtype=torch.float32)
    x[1, 2, 1, 2, 3] = value
    ours, expected = model_new.conv_transpose3d(x, w, stride=2), F.conv_transpose3d(x.cpu().double(), w.cpu().double(), stride=2).to(device)
    torch.testing.assert_close(ours.double(), expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    ours = model_new.conv_transpose3d_relu_group_norm(x, w, None, None, None, 3)
    expected = F.group_norm(F.conv_transpose3d(x.cpu().double(), w.cpu().double()).relu(), 3)
    # A group with a NaN or Inf normalizes to NaN; -Inf is cut off by ReLU.
    assert torch.equal(ours.isnan().cpu(), expected.isnan())


def test_large_mean_does_not_cancel(device):
    x, w = small_input(device, dtype=torch.float32), small_input(device, 4, 6, 3, 3, 3, dtype=torch.float32)
    b = torch.full((6,), 1e4, device=device)
    truth = F.group_norm(F.conv_transpose3d(x.double(), w.double(), b.double()).relu(), 2)
    ours = model_new.conv_transpose3d_relu_group_norm(x, w, b, None, None, 2)
    assert verify.relative_error(ours, truth) < 5e-4    # what storing values of 1e4 in float32 leaves


def test_tiny_and_huge_values(device):
    for scale in (1e-15, 1e15):
        x, w = small_input(device, dtype=torch.float32) * scale, small_input(device, 4, 6, 3, 3, 3, dtype=torch.float32)
        truth = F.group_norm(F.conv_transpose3d(x.double(), w.double()).relu(), 2, eps=0.0)
        assert verify.relative_error(model_new.conv_transpose3d_relu_group_norm(x, w, None, None, None, 2, eps=0.0), truth) < 1e-5


def test_relu_gradient_at_zero_and_nan(device):
    x = torch.zeros(1, 1, 2, 2, 2, device=device, requires_grad=True)
    w, b = torch.ones(1, 1, 1, 1, 1, device=device), torch.zeros(1, device=device)
    model_new.conv_transpose3d_relu_group_norm(x, w, b, None, None, 1).backward(torch.randn(1, 1, 2, 2, 2, device=device))
    assert (x.grad == 0).all()


@pytest.mark.parametrize("output_size", [(6, 8, 10), (7, 9, 11), (2, 6, 7, 9, 10), [6, 9, 10]])
def test_output_size(output_size, device):
    ours = model_new.ConvTranspose3dNew(4, 6, 3, stride=2, padding=1, output_padding=0).to(device)
    reference = ConvTranspose3dModel(4, 6, 3, stride=2, padding=1).to(device)
    reference.load_state_dict(ours.state_dict())
    x = small_input(device, 2, 4, 3, 4, 5, dtype=torch.float32)
    try:
        expected = reference(x, output_size)
    except ValueError:
        with pytest.raises(ValueError):
            ours(x, output_size)
    else:
        torch.testing.assert_close(ours(x, output_size), expected, rtol=1e-3, atol=1e-3)


def test_same_seed_same_parameters_and_strict_state_dicts():
    for ours_class, reference_class, arguments in ((model_new.ModelNew, Model, (4, 8, 3, 2, True)), (model_new.ConvTranspose3dNew, ConvTranspose3dModel, (4, 8, 3))):
        torch.manual_seed(3)
        ours = ours_class(*arguments)
        torch.manual_seed(3)
        reference = reference_class(*arguments)
        for (name, a), (other, b) in zip(ours.state_dict().items(), reference.state_dict().items()):
            assert name == other and torch.equal(a, b)
        ours.load_state_dict(reference.state_dict(), strict=True)
        reference.load_state_dict(ours.state_dict(), strict=True)


def test_copies_and_pickles(device):
    model = model_new.ModelNew(4, 8, 3, 2).to(device)
    x = small_input(device, dtype=torch.float32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_an_updated_weight_is_seen(device):
    model = model_new.ConvTranspose3dNew(4, 6, 3).to(device)
    x = small_input(device, dtype=torch.float32)
    before = model(x)
    with torch.no_grad():
        model.weight.mul_(2)
    torch.testing.assert_close(model(x), 2 * before)


def test_saved_tensors_are_version_checked(device):
    x, w = small_input(device), small_input(device, 4, 6, 3, 3, 3).requires_grad_()
    y = model_new.conv_transpose3d(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast(device):
    x, model = small_input(device, dtype=torch.float32), model_new.ModelNew(4, 8, 3, 2).to(device)
    reference = Model(4, 8, 3, 2).to(device)
    reference.load_state_dict(model.state_dict())
    plain = model_new.ConvTranspose3dNew(4, 6, 3).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, expected = model(x), reference(x)
        assert plain(x).dtype == torch.bfloat16
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=5e-2, atol=1e-1)
    ours.sum().backward()
    assert model.conv_transpose.weight.grad.dtype == torch.float32


def test_bitwise_repeatable_under_deterministic_algorithms(device):
    model, x = model_new.ModelNew(8, 16, 3, 4).to(device), small_input(device, 3, 8, 9, 10, 11, dtype=torch.float32)
    grad = torch.randn_like(model(x))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = verify.run(model, x, grad), verify.run(model, x, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules_are_nn_modules():
    assert isinstance(model_new.ConvTranspose3dNew(2, 3, 1), nn.ConvTranspose3d)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestCuda:
    def test_another_stream(self):
        model, x = model_new.ModelNew(4, 8, 3, 2).cuda(), torch.randn(2, 4, 8, 8, 8, device="cuda")
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = model(x)
        stream.synchronize()
        assert torch.equal(result, expected)

    def test_graph_capture(self):
        model, x = model_new.ModelNew(4, 8, 3, 2).cuda(), torch.randn(2, 4, 8, 8, 8, device="cuda")
        with torch.no_grad():
            model(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = model(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(result, model(x))

    def test_more_than_2_31_elements(self):
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("needs 40 GiB")
        x = torch.randn(1, 1, 130, 256, 256, device="cuda", dtype=torch.float16)
        model = model_new.ConvTranspose3dNew(1, 260, 1).cuda().half()
        y = model(x)
        assert y.numel() > 2**31
        expected = x[0, 0].float() * model.weight[0, -1].float().item()
        torch.testing.assert_close(y[0, -1].float(), expected, rtol=2e-3, atol=1e-4)
