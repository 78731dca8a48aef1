"""What the tests of several paths do with a layer."""

import torch


def worst_relative_error(y, truth, dims):
    """The largest of the relative errors over ``dims``."""
    return ((y.double() - truth).square().sum(dims) / truth.square().sum(dims)).sqrt().max().item()


def gradients(function, x, w, grad, sizes):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(function(x, w, None, *sizes), (x, w), grad)
