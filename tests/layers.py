"""What the tests of several paths do with a layer."""

import contextlib

import torch
import torch.nn.functional as F

import model_new
from harness.verify import relative_error


def tensors(shape, channels, kernel, groups=1, dtype=torch.float32):
    """Input, weight and bias, drawn in this order."""
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    return torch.randn(shape, device="cuda").to(dtype), (0.1 * torch.randn(shape[1], channels // groups, *kernel, device="cuda")).to(dtype), torch.randn(channels, device="cuda").to(dtype)


def unaligned(t):
    """A copy that begins in the middle of a vector."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t)


def worst_relative_error(y, truth, dims):
    """The largest of the relative errors over ``dims``."""
    return ((y.double() - truth).square().sum(dims) / truth.square().sum(dims)).sqrt().max().item()


def gradients(function, x, w, grad, sizes):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(function(x, w, None, *sizes), (x, w), grad)


def gradients_by(kernel, x, w, grad, sizes):
    """The gradients, when a kernel of this name has run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = gradients(model_new.conv_transpose3d, x, w, grad, sizes)
        torch.cuda.synchronize()
    assert any(kernel in event.name for event in profile.events())
    return result


@contextlib.contextmanager
def tf32_allowed(allowed):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def _other_rows(rows_of):
    """With another table of paths: ``rows_of(operation, rows)`` in place of an operation's ``rows``."""
    table = dict(model_new._PATHS)
    try:
        model_new._PATHS.update({operation: rows_of(operation, rows) for operation, rows in table.items()})
        forget_paths()
        yield
    finally:
        model_new._PATHS.update(table)
        forget_paths()


def without_paths(*conditions):
    """Without the rows of the table of paths whose conditions have names that begin like this."""
    return _other_rows(lambda operation, rows: tuple(row for row in rows if not row[1].__name__.startswith(conditions)))


def with_paths_first(*first, operations=("conv_transpose3d_forward",)):
    """With rows of the table of paths before all others of ``operations``."""
    return _other_rows(lambda operation, rows: first + rows if operation in operations else rows)


def assert_as_accurate_as_torch(run, x, w, bias, sizes, most, torch_has_tf32):
    """``run`` is within ``most`` of float64, within 5% of torch's error where torch is to have TF32 and does, and gives the same bits again, unaligned, and from an input in another order."""
    y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
    assert relative_error(y, truth) < most
    torchs = relative_error(F.conv_transpose3d(x, w, bias, *sizes), truth)
    if torch_has_tf32 and torchs > 1e-5:    # on some small grids cuDNN is float32-accurate
        assert relative_error(y, truth) < 1.05 * torchs
    assert torch.equal(y, run(x, w, bias, *sizes))
    assert torch.equal(y, run(unaligned(x), unaligned(w), bias, *sizes)) and torch.equal(y, run(x.transpose(0, 1).contiguous().transpose(0, 1), w, bias, *sizes))


def assert_finite_where_torch_is(run, x, w, bias, sizes, most):
    """What is not finite comes out where float64 has it, and the others are within ``most``."""
    y, truth = run(x, w, bias, *sizes), F.conv_transpose3d(x.double(), w.double(), bias.double(), *sizes)
    finite = truth.isfinite()
    assert torch.equal(y.isfinite(), finite) and torch.equal(y.isnan(), truth.isnan())
    assert relative_error(y[finite], truth[finite]) < most


def forget_paths():
    """To be called where the table of paths, or what it is asked about, was changed."""
    for choice in (model_new._select, model_new._resolve, model_new._shared_packed_bytes):
        choice.cache_clear()
