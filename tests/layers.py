"""What the tests of several paths do with a layer."""

import contextlib

import torch

import model_new


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


@contextlib.contextmanager
def tf32_allowed(allowed):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def without_paths(*conditions):
    """Without the rows of the table of paths whose conditions have names that begin like this."""
    table = dict(model_new._PATHS)
    try:
        model_new._PATHS.update({operation: tuple(row for row in rows if not row[1].__name__.startswith(conditions)) for operation, rows in table.items()})
        forget_paths()
        yield
    finally:
        model_new._PATHS.update(table)
        forget_paths()


def forget_paths():
    """To be called where the table of paths, or what it is asked about, was changed."""
    for choice in (model_new._select, model_new._resolve, model_new._shared_packed_bytes):
        choice.cache_clear()
