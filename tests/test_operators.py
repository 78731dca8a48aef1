"""The registered operators: torch.compile, export, opcheck, gradcheck, transforms, a notebook cell run twice."""

from pathlib import Path

import pytest
import torch

import model_new

SIZES = dict(stride=[2, 1, 1], padding=[1, 0, 1], output_padding=[1, 0, 0], groups=1, dilation=[1, 2, 1])


def double(device, *shape):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


def test_opcheck(device):
    x, w, b = double(device, 2, 4, 3, 4, 3), double(device, 4, 6, 3, 2, 2), double(device, 6)
    operators = model_new._operators
    torch.library.opcheck(operators["conv_transpose3d"].registered, (x, w, b), SIZES)
    torch.library.opcheck(operators["conv_transpose3d_relu_group_norm"].registered, (x, w, b, b, b, 3, 1e-5), {**SIZES, "float32_output": False, "save": True})


def test_gradcheck(device):
    x, w, b = double(device, 2, 4, 2, 2, 3), double(device, 4, 2, 3, 2, 2), double(device, 4)
    assert torch.autograd.gradcheck(lambda *t: model_new.conv_transpose3d(*t, stride=2, padding=1, output_padding=1, groups=2), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w, *p: model_new.conv_transpose3d_relu_group_norm(x, w, *p, num_groups=2, groups=2), (x, w, b, b, b))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    model = model_new.ModelNew(4, 8, 3, 2, bias=True, stride=2, padding=1, output_padding=1).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 4, 3, 4, 5, device=device, requires_grad=True)
        grads = []
        for f in (model, compiled):
            y = f(x)
            grads.append((y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))
        for a, b in zip(*grads):
            assert torch.equal(a, b)


def test_export(device):
    model, x = model_new.ConvTranspose3dNew(4, 6, 3, stride=2).to(device), torch.randn(2, 4, 3, 3, 3, device=device)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_second_order_is_refused(device):
    x, w = double(device, 1, 2, 2, 2, 2), double(device, 2, 2, 2, 2, 2)
    gradient, = torch.autograd.grad(model_new.conv_transpose3d(x, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not implemented"):
        gradient.sum().backward()


def test_functional_transforms_are_refused(device):
    x, w = double(device, 1, 2, 2, 2, 2).detach(), double(device, 2, 2, 2, 2, 2).detach()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda w: model_new.conv_transpose3d(x, w).square().sum())(w)


def test_a_cell_executed_twice():
    source = Path(model_new.__file__).read_text()
    cell = {}
    exec(source, cell)
    model, x = cell["ModelNew"](2, 4, 3, 2), torch.randn(1, 2, 2, 2, 2)
    before = model(x)
    exec(source, cell)
    assert torch.equal(model(x), before)
    again = cell["ModelNew"](2, 4, 3, 2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), before)
