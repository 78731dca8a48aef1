"""3-D transposed convolution in CUDA: ConvTranspose3d -> ReLU -> GroupNorm fused, and ConvTranspose3d alone.

    from model_new import ModelNew, ConvTranspose3dNew
    layer = ModelNew(64, 128, kernel_size=3, groups=8).cuda()      # ConvTranspose3d -> ReLU -> GroupNorm(8, 128)
    y = layer(torch.rand(16, 64, 32, 32, 32, device="cuda"))       # (16, 128, 34, 34, 34)

The same weights, initial values and gradients as torch.nn's modules. This file is complete: copy it anywhere. It compiles
its kernels when it is imported (once; they are cached) and needs torch >= 2.8, ninja, nvcc and g++.

Limits: first-order gradients only, none of torch.func's transforms; contiguous (N, C, D, H, W) outputs; NVIDIA GPUs of compute capability 8.0 and up, or
the CPU (slow: for tests). Every size, stride, padding and dilation of one axis is below 2**30.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import types

import torch
from torch import nn

__all__ = ["ModelNew", "ConvTranspose3dNew", "conv_transpose3d", "conv_transpose3d_relu_group_norm"]


# ============================================================================================================= Modules


class ModelNew(nn.Module):
    """ConvTranspose3d -> ReLU -> GroupNorm, fused.

    Args:
        in_channels, out_channels, kernel_size, bias, stride, padding, output_padding, dilation: as nn.ConvTranspose3d's;
            every size is an int or a (depth, height, width) triple.
        groups: the number of groups of the GroupNorm (its num_groups).
        eps: as nn.GroupNorm's.

    Input (N, in_channels, D, H, W) or unbatched; output (N, out_channels, D_out, H_out, W_out), contiguous. The parameters
    live in the submodules ``conv_transpose`` and ``group_norm``, so state dicts are interchangeable with the reference's.
    """

    def __init__(self, in_channels, out_channels, kernel_size, groups, bias=False, *, stride=1, padding=0, output_padding=0, dilation=1, eps=1e-5):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose3d(in_channels, out_channels, kernel_size, stride=stride, padding=padding,
                                                 output_padding=output_padding, bias=bias, dilation=dilation)
        self.group_norm = nn.GroupNorm(groups, out_channels, eps=eps)

    def forward(self, x):
        conv, norm = self.conv_transpose, self.group_norm
        return conv_transpose3d_relu_group_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.num_groups, norm.eps,
                                                conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)


class ConvTranspose3dNew(nn.ConvTranspose3d):
    """nn.ConvTranspose3d (padding_mode "zeros"); parameters ``weight`` (in, out / groups, K_d, K_h, K_w) and ``bias`` (out)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, bias=False, dilation=1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, output_padding=output_padding,
                         groups=groups, bias=bias, dilation=dilation)

    def forward(self, input, output_size=None):
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = tuple(self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation))
        return conv_transpose3d(input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


# =========================================================================================================== Functions


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Transposed convolution; equivalent to torch.nn.functional.conv_transpose3d.

    Args:
        input: (N, C_in, D, H, W), or unbatched (C_in, D, H, W); float32, float64, float16 or bfloat16.
        weight: (C_in, C_out / groups, K_d, K_h, K_w), of input's dtype.
        bias: (C_out), of input's dtype, or None.
        stride, padding, output_padding, dilation: an int, or one per axis.
    Returns:
        (N, C_out, D_out, H_out, W_out) with out = (in - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1,
        contiguous, of input's dtype (the autocast dtype under autocast); low precision is accumulated in float32.
    Raises:
        RuntimeError: a shape, size or dtype that torch refuses too.
    """
    input, weight, bias = _autocast(input, weight, bias)
    sizes = (_triple("stride", stride), _triple("padding", padding), _triple("output_padding", output_padding))
    output = _call("conv_transpose3d", _batched(input), weight, bias, *sizes, groups, _triple("dilation", dilation))
    return output.squeeze(0) if input.dim() == 4 else output


def conv_transpose3d_relu_group_norm(input, weight, bias, gn_weight, gn_bias, num_groups, eps=1e-5,
                                     stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """group_norm(relu(conv_transpose3d(input, weight, bias, ...)), num_groups, gn_weight, gn_bias, eps), fused.

    Args:
        input, weight, bias, stride, padding, output_padding, groups, dilation: as conv_transpose3d's.
        gn_weight, gn_bias: (C_out), of input's dtype (or float32 beside a low-precision input), or None.
        num_groups, eps: as torch.nn.functional.group_norm's.
    Returns:
        (N, C_out, D_out, H_out, W_out), contiguous, of input's dtype; float32 under CUDA's autocast, as torch's group_norm.
    Raises:
        RuntimeError, ValueError: what torch refuses too.
    """
    # On CUDA, autocast runs group_norm in float32; on the CPU it leaves group_norm alone.
    float32_output = input.device.type == "cuda" and input.dtype != torch.float64 and torch.is_autocast_enabled("cuda")
    input, weight, bias = _autocast(input, weight, bias)
    tensors = (input, weight, bias, gn_weight, gn_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    sizes = (_triple("stride", stride), _triple("padding", padding), _triple("output_padding", output_padding))
    output = _call("conv_transpose3d_relu_group_norm", _batched(input), weight, bias, gn_weight, gn_bias, num_groups, eps, *sizes, groups,
                   _triple("dilation", dilation), float32_output, save)[0]
    return output.squeeze(0) if input.dim() == 4 else output


def _batched(input):
    if input.dim() not in (4, 5):
        raise RuntimeError(f"input: expected 5 dimensions (N, C, D, H, W) or 4 (unbatched), got the shape {list(input.shape)}")
    return input.unsqueeze(0) if input.dim() == 4 else input


def _autocast(*tensors):
    """Autocast's cast of a convolution's arguments: every floating-point tensor but float64."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _triple(name, value):
    if isinstance(value, tuple) and len(value) == 3:
        return value
    if isinstance(value, (int, torch.SymInt)):
        return (value,) * 3
    if isinstance(value, (tuple, list)) and len(value) in (1, 3):
        return tuple(value) * (3 // len(value))
    if isinstance(value, (tuple, list)):
        raise RuntimeError(f"{name}: expected an int or 3 of them (depth, height, width), got {len(value)}: {value}")
    raise TypeError(f"{name}: expected an int or 3 of them (depth, height, width), got {type(value).__name__}: {value}")


# ========================================================================================================== Validation


class _Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("in_size", "out_size", "kernel", "stride", "padding", "dilation")]


class _Geometry(ctypes.Structure):
    """`Geometry` of kernels/geometry.h."""
    _fields_ = [(name, ctypes.c_int64) for name in ("N", "C_in", "C_out", "groups")] + [("axis", _Axis * 3)]
    __hash__ = object.__hash__


class _NormShape(ctypes.Structure):
    """`RgnShape` of kernels/relu_group_norm_generic.cu."""
    _fields_ = [(name, ctypes.c_int64) for name in ("N", "C", "S", "num_groups")]
    __hash__ = object.__hash__


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_AXES = ("depth", "height", "width")
_MAX_AXIS = 2**30


def _check(rule, message):
    if not rule:
        raise RuntimeError(message)


def _check_tensors(input, weight, bias):
    """Checked at every call, so no message is made unless it is needed."""
    dtype, device = input.dtype, input.device
    if dtype not in _DTYPES:
        raise RuntimeError(f"input: expected float32, float64, float16 or bfloat16, got {dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise RuntimeError(f"{name}: expected input's dtype and device, {dtype} on {device}, got {tensor.dtype} on {tensor.device}")


def _check_group_norm_tensors(input, gn_weight, gn_bias, channels):
    dtypes = (input.dtype,) if input.dtype == torch.float64 else (input.dtype, torch.float32)
    for name, tensor in (("gn_weight", gn_weight), ("gn_bias", gn_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise RuntimeError(f"{name}: expected the shape [{channels}], got {list(tensor.shape)}")
        if tensor is not None and (tensor.dtype not in dtypes or tensor.device != input.device):
            raise RuntimeError(f"{name}: expected the dtype {' or '.join(map(str, dtypes))} on {input.device}, got {tensor.dtype} on {tensor.device}")


def _check_bias(bias, channels):
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(f"bias: expected the shape [{channels}], got {list(bias.shape)}")


def _check_num_groups(shape, num_groups):
    """What group_norm refuses of an output's shape (N, C, D, H, W). Takes symbolic sizes too."""
    _check(num_groups > 0, f"num_groups: expected a positive number, got {num_groups}")
    _check(shape[1] % num_groups == 0, f"num_groups: expected a divisor of the {shape[1]} output channels, got {num_groups}")
    if shape[0] * shape[1] // num_groups * shape[2] * shape[3] * shape[4] == 1:
        raise ValueError(f"input: expected more than 1 value per group to normalize, got an output of shape {list(shape)} with num_groups {num_groups}")


def _output_shape(input_shape, weight_shape, stride, padding, output_padding, groups, dilation):
    """The output's shape; raises RuntimeError for whatever torch refuses. Takes symbolic sizes too."""
    _check(len(weight_shape) == 5, f"weight: expected 5 dimensions (C_in, C_out / groups, K_d, K_h, K_w), got the shape {list(weight_shape)}")
    c_in, c_out = weight_shape[0], weight_shape[1] * groups
    _check(groups > 0, f"groups: expected a positive number, got {groups}")
    _check(c_in > 0 and c_out > 0, f"weight: expected at least one channel on either side, got the shape {list(weight_shape)}")
    _check(c_in % groups == 0, f"groups: expected a divisor of the {c_in} input channels, got {groups}")
    _check(input_shape[1] == c_in, f"input: expected {c_in} channels for a weight of shape {list(weight_shape)}, got the shape {list(input_shape)}")
    out = []
    for a, axis in enumerate(_AXES):
        size, kernel, s, p, op, d = input_shape[2 + a], weight_shape[2 + a], stride[a], padding[a], output_padding[a], dilation[a]
        _check(size > 0 or input_shape[0] == 0, f"input: expected a non-zero {axis}, got the shape {list(input_shape)}")
        _check(kernel > 0, f"weight: expected a positive kernel {axis}, got the shape {list(weight_shape)}")
        _check(s > 0, f"stride: expected a positive {axis}, got {s}")
        _check(p >= 0, f"padding: expected a non-negative {axis}, got {p}")
        _check(op >= 0, f"output_padding: expected a non-negative {axis}, got {op}")
        _check(d > 0, f"dilation: expected a positive {axis}, got {d}")
        _check(op < s or op < d, f"output_padding: expected less than stride {s} or dilation {d} along the {axis}, got {op}")
        out_size = (size - 1) * s - 2 * p + d * (kernel - 1) + op + 1
        _check(out_size > 0, f"padding: {p} leaves an output {axis} of {out_size} (input {size}, kernel {kernel}, stride {s}, dilation {d}, output_padding {op})")
        _check(max(size * s, out_size, d * kernel, p) < _MAX_AXIS, f"input: expected sizes below 2**30 along the {axis}, got an output of {out_size}, padding {p}")
        out.append(out_size)
    return (input_shape[0], c_out, *out)


@functools.lru_cache(maxsize=4096)
def _geometry(input_shape, weight_shape, stride, padding, output_padding, groups, dilation):
    """(_Geometry, output shape) of a call, validated once per combination of sizes."""
    shape = _output_shape(input_shape, weight_shape, stride, padding, output_padding, groups, dilation)
    axes = (_Axis(input_shape[2 + a], shape[2 + a], weight_shape[2 + a], stride[a], padding[a], dilation[a]) for a in range(3))
    return _Geometry(input_shape[0], input_shape[1], shape[1], groups, (_Axis * 3)(*axes)), shape


@functools.lru_cache(maxsize=4096)
def _norm_shape(shape, num_groups):
    """_NormShape of an output's shape (N, C, D, H, W), validated once."""
    _check_num_groups(shape, num_groups)
    return _NormShape(shape[0], shape[1], shape[2] * shape[3] * shape[4], num_groups)


# ============================================================================================================ Dispatch
#
# Every operation is a C function `<operation>_<path>`; its path is the first row of its table whose condition holds.


def _always(geometry, dtype, capability):
    return True


_PATHS = {
    # operation                 ((path, condition(geometry or norm shape, dtype, compute capability)), ...)
    "conv_transpose3d_forward": (("generic", _always),),
    "conv_transpose3d_dinput": (("generic", _always),),
    "conv_transpose3d_dweight": (("generic", _always),),
    "conv_transpose3d_dbias": (("generic", _always),),
    "group_norm_forward": (("generic", _always),),
    "relu_group_norm_backward": (("generic", _always),),
}

# What follows an operation's common arguments: p a pointer, i an int, d a double.
_SIGNATURES = {
    "conv_transpose3d_forward": "pppip",            # x, weight, bias, relu; out
    "conv_transpose3d_dinput": "ppp",               # dout, weight; dx
    "conv_transpose3d_dweight": "ppp",              # x, dout; dweight
    "conv_transpose3d_dbias": "pp",                 # dout; dbias
    "group_norm_forward": "pppdpp",                 # r, gamma, beta, eps; y, statistics
    "relu_group_norm_backward": "ppppppp",          # dy, r, statistics, gamma; dz, dgamma, dbeta
}
_NORM_OPERATIONS = ("group_norm_forward", "relu_group_norm_backward")


def select_path(operation, shape, dtype, device):
    """The name of the path that runs ``operation`` (a key of the table above) on ``device``."""
    if device.type == "cpu":
        return "cpu"
    capability = _capability(device.index)
    return next(path for path, condition in _PATHS[operation] if condition(shape, dtype, capability))


@functools.lru_cache(maxsize=None)
def _capability(device_index):
    return torch.cuda.get_device_capability(device_index)


class record_launches:
    """``with record_launches() as names:`` collects the names of the C functions that run in the block: the paths taken."""

    def __enter__(self):
        self.names = []
        _recorders.append(self.names)
        return self.names

    def __exit__(self, *exception):
        _recorders.remove(self.names)


_recorders = []


@functools.lru_cache(maxsize=4096)
def _resolve(operation, shape, dtypes, device):
    """(C function, its name, its first arguments, bytes of workspace); the shape structs are compared by identity, being cached themselves."""
    name = f"{operation}_{select_path(operation, shape, dtypes[0], device)}"
    library = _library(device.type)
    if device.type == "cpu":
        return getattr(library, name), name, (ctypes.addressof(shape),), 0
    codes = [_DTYPES[dtype] for dtype in dtypes]
    return getattr(library, name), name, (ctypes.addressof(shape), *codes, device.index), getattr(library, f"{name}_workspace")(ctypes.addressof(shape), codes[0])


def _launch(operation, shape, dtypes, device, inputs, outputs):
    """Runs ``operation`` on ``device``'s current stream: contiguous ``inputs`` (tensors, numbers or None) into ``outputs``."""
    function, name, first, workspace_bytes = _resolve(operation, shape, dtypes, device)
    for names in _recorders:
        names.append(name)
    if device.type == "cpu":
        return _launch_cpu(function, first, inputs, outputs)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    error = function(*first, torch._C._cuda_getCurrentRawStream(device.index), workspace.data_ptr(), *_pointers(inputs), *_pointers(outputs))
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}, {_library('cuda').cuda_error_string(error).decode()}")


def _pointers(arguments):
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def _launch_cpu(function, first, inputs, outputs):
    """As _launch; the C++ code knows float32 and float64, so low precision is computed in float32."""
    def upcast(argument):
        return argument.float() if isinstance(argument, torch.Tensor) and argument.dtype in (torch.float16, torch.bfloat16) else argument

    high_inputs, high_outputs = [upcast(t) for t in inputs], [upcast(t) for t in outputs]
    dtype = next(t.dtype for t in high_outputs if t is not None)
    error = function(*first, _DTYPES[dtype], torch.get_num_threads(), *_pointers(high_inputs), *_pointers(high_outputs))
    if error:
        raise RuntimeError(f"{function.__name__}: unknown dtype {dtype}")
    for low, high in zip(outputs, high_outputs):
        if low is not high:
            low.copy_(high)


# ========================================================================================================== Operations
#
# Implementations of the registered operators, for CUDA and the CPU alike, and what torch.compile and autograd need of them.


def _forward(input, weight, bias, stride, padding, output_padding, groups, dilation):
    geometry, output = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if output.numel():
        _launch_forward(geometry, input, weight, bias, False, output)
    return output


def _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation):
    _check_tensors(input, weight, bias)
    geometry, shape = _geometry(tuple(input.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    _check_bias(bias, shape[1])
    return geometry, input.new_empty(shape)


def _launch_forward(geometry, input, weight, bias, relu, output):
    _launch("conv_transpose3d_forward", geometry, (input.dtype,), input.device,
            (input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), int(relu)), (output,))


def _forward_fake(input, weight, bias, stride, padding, output_padding, groups, dilation):
    _check_tensors(input, weight, bias)
    shape = _output_shape(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    _check_bias(bias, shape[1])
    return input.new_empty(shape)


def _backward(grad, input, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs):
    """Gradients of input, weight and bias; an empty tensor where ``needs`` says that one is not wanted."""
    geometry, _ = _geometry(tuple(input_shape), tuple(weight_shape), tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    dx, dweight, dbias = _backward_fake(grad, input, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs)
    if grad.numel() == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    grad, dtypes, device = grad.contiguous(), (grad.dtype,), grad.device
    if needs[0]:
        _launch("conv_transpose3d_dinput", geometry, dtypes, device, (grad, weight.contiguous()), (dx,))
    if needs[1]:
        _launch("conv_transpose3d_dweight", geometry, dtypes, device, (input.contiguous(), grad), (dweight,))
    if needs[2]:
        _launch("conv_transpose3d_dbias", geometry, dtypes, device, (grad,), (dbias,))
    return dx, dweight, dbias


def _backward_fake(grad, input, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs):
    shapes = (input_shape, weight_shape, (grad.shape[1],))
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs))


def _fused_forward(input, weight, bias, gn_weight, gn_bias, num_groups, eps, stride, padding, output_padding, groups, dilation, float32_output, save):
    """(output, activation, statistics): activation = relu(conv_transpose3d(...)) and statistics (2, N, num_groups), the mean
    and reciprocal standard deviation in float64, are what backward needs; activation is empty where it need not be saved."""
    geometry, activation = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    _check_group_norm_tensors(input, gn_weight, gn_bias, activation.shape[1])
    norm_shape = _norm_shape(tuple(activation.shape), num_groups)
    output_dtype = torch.float32 if float32_output else input.dtype
    in_place = not save and output_dtype == input.dtype
    output = activation if in_place else torch.empty_like(activation, dtype=output_dtype)
    statistics = input.new_empty((2, activation.shape[0], num_groups), dtype=torch.float64)
    if output.numel():
        _launch_forward(geometry, input, weight, bias, True, activation)
        _launch("group_norm_forward", norm_shape, (input.dtype, output_dtype), input.device,
                (activation, _parameter(gn_weight, input), _parameter(gn_bias, input), eps), (output, statistics))
    return output, activation if save else input.new_empty(0), statistics


def _fused_forward_fake(input, weight, bias, gn_weight, gn_bias, num_groups, eps, stride, padding, output_padding, groups, dilation, float32_output, save):
    activation = _forward_fake(input, weight, bias, stride, padding, output_padding, groups, dilation)
    _check_group_norm_tensors(input, gn_weight, gn_bias, activation.shape[1])
    _check_num_groups(activation.shape, num_groups)
    output = torch.empty_like(activation, dtype=torch.float32 if float32_output else input.dtype)
    statistics = input.new_empty((2, activation.shape[0], num_groups), dtype=torch.float64)
    return output, activation if save else input.new_empty(0), statistics


def _parameter(tensor, input):
    """A parameter of the norm in the type that the norm computes in."""
    return None if tensor is None else tensor.to(torch.float64 if input.dtype == torch.float64 else torch.float32).contiguous()


def _fused_backward(grad, activation, statistics, input, weight, gn_weight, input_shape, weight_shape, num_groups,
                    stride, padding, output_padding, groups, dilation, needs):
    """Gradients of input, weight, bias, gn_weight and gn_bias; empty where not needed."""
    conv_needs, (need_gamma, need_beta) = needs[:3], needs[3:]
    outputs = _fused_backward_fake(grad, activation, statistics, input, weight, gn_weight, input_shape, weight_shape, num_groups,
                                   stride, padding, output_padding, groups, dilation, needs)
    if grad.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    dz = torch.empty_like(activation) if any(conv_needs) else None
    dgamma, dbeta = outputs[3:]
    _launch("relu_group_norm_backward", _norm_shape(tuple(activation.shape), num_groups), (activation.dtype, grad.dtype), grad.device,
            (grad.contiguous(), activation, statistics, _parameter(gn_weight, activation)), (dz, dgamma if need_gamma else None, dbeta if need_beta else None))
    if dz is None:
        return outputs
    conv_outputs = _backward(dz, input, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, conv_needs)
    return *conv_outputs, dgamma, dbeta


def _fused_backward_fake(grad, activation, statistics, input, weight, gn_weight, input_shape, weight_shape, num_groups,
                         stride, padding, output_padding, groups, dilation, needs):
    channels = activation.shape[1]
    shapes = (input_shape, weight_shape, (channels,), (channels,), (channels,))
    norm_dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    dtypes = (activation.dtype,) * 3 + (norm_dtype,) * 2
    return tuple(activation.new_empty(shape if need else 0, dtype=dtype) for shape, need, dtype in zip(shapes, needs, dtypes))


# ------------------------------------------------------------------------------------------------------------ Autograd


def _save_for_backward(ctx, inputs, output):
    input, weight, bias, *ctx.sizes = inputs
    ctx.shapes = tuple(input.shape), tuple(weight.shape)
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None)


def _autograd(ctx, grad):
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _call("conv_transpose3d_backward", grad, input, weight, *ctx.shapes, *ctx.sizes, list(needs))
    return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 5


def _save_for_fused_backward(ctx, inputs, output):
    input, weight, bias, gn_weight, gn_bias, ctx.num_groups, _, *sizes, _, _ = inputs
    ctx.sizes, ctx.shapes = sizes, (tuple(input.shape), tuple(weight.shape))
    ctx.gn_dtypes = gn_weight is not None and gn_weight.dtype, gn_bias is not None and gn_bias.dtype
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(*output[1:], input if need_weight else None, weight if need_input else None, gn_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _fused_autograd(ctx, grad, *_):
    needs = ctx.needs_input_grad[:5]
    if grad is None:
        return (None,) * 14
    grads = _call("conv_transpose3d_relu_group_norm_backward", grad, *ctx.saved_tensors, *ctx.shapes, ctx.num_groups, *ctx.sizes, list(needs))
    dtypes = (None,) * 3 + ctx.gn_dtypes
    return *((g.to(dtype) if dtype else g) if need else None for g, need, dtype in zip(grads, needs, dtypes)), *(None,) * 9


def _no_second_order(ctx, *grads):
    raise RuntimeError("create_graph: second-order gradients are not implemented by model_new.py; use torch.nn's modules for them")


_SIZES = "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, int groups, SymInt[] dilation"
_OPERATORS = (
    # schema, implementation, fake, autograd's setup and backward
    (f"conv_transpose3d(Tensor input, Tensor weight, Tensor? bias, {_SIZES}) -> Tensor", _forward, _forward_fake, _save_for_backward, _autograd),
    (f"conv_transpose3d_backward(Tensor grad, Tensor? input, Tensor? weight, SymInt[] input_shape, SymInt[] weight_shape, {_SIZES}, bool[] needs)"
     " -> (Tensor, Tensor, Tensor)", _backward, _backward_fake, None, _no_second_order),
    ("conv_transpose3d_relu_group_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? gn_weight, Tensor? gn_bias, int num_groups, float eps,"
     f" {_SIZES}, bool float32_output, bool save) -> (Tensor, Tensor, Tensor)",
     _fused_forward, _fused_forward_fake, _save_for_fused_backward, _fused_autograd),
    ("conv_transpose3d_relu_group_norm_backward(Tensor grad, Tensor activation, Tensor statistics, Tensor? input, Tensor? weight, Tensor? gn_weight,"
     f" SymInt[] input_shape, SymInt[] weight_shape, int num_groups, {_SIZES}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
     _fused_backward, _fused_backward_fake, None, _no_second_order),
)


class _Operator:
    """A registered operator, and the shorter way to it."""

    def __init__(self, registered, implementation, setup, backward):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                output = implementation(*arguments)
                if setup:
                    setup(ctx, arguments, output)
                return output

        Function.backward = staticmethod(backward)
        self.registered, self.implementation, self.apply = registered, implementation, Function.apply


def _call(name, *arguments):
    """Calls an operator: through torch's dispatcher when something there listens (a compiler, a mode, a transform, a tensor
    subclass), else directly, which saves some 30 microseconds a call."""
    operator = _operators[name]
    plain = (type(arguments[0]) in _PLAIN_TENSORS and not torch.compiler.is_compiling()
             and torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None)
    if not plain:
        return operator.registered(*arguments)
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.requires_grad:
                return operator.apply(*arguments)
    return operator.implementation(*arguments)


_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def _register_operators():
    """Registers the operators; {name: _Operator}.

    Their namespace holds the digest of the sources; a file executed again (a notebook's cell) gets a namespace of its own,
    since modules made by the first execution go on using theirs, and since an operator cannot be defined twice.
    """
    registry = sys.modules.setdefault("_conv_transpose3d_new_libraries", types.ModuleType("_conv_transpose3d_new_libraries"))
    namespace = f"conv_transpose3d_new_{_digest(*_SOURCES.values())}"
    executions = sum(name.startswith(namespace) for name in vars(registry))
    if executions:
        namespace += f"_{executions}"
    library = torch.library.Library(namespace, "FRAGMENT")
    setattr(registry, namespace, library)    # an operator lives as long as its library
    operators = {}
    for schema, implementation, fake, setup, backward in _OPERATORS:
        name = schema[: schema.index("(")]
        library.define(schema)
        library.impl(name, implementation, "CPU")
        library.impl(name, implementation, "CUDA")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)
        operators[name] = _Operator(getattr(getattr(torch.ops, namespace), name).default, implementation, setup, backward)
    return operators


# =============================================================================================================== Build
#
# load_inline compiles the sources, which include no torch header (that takes a minute), into a plain shared library.


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _expand(name, included):
    """The text of a source with its own headers in place of their #include lines, each once."""
    included.add(name)

    def include(match):
        header = match.group(1)
        return _expand(header, included) + f'#line {text[: match.end()].count(chr(10)) + 2} "kernels/{name}"' if header not in included else ""

    text = _SOURCES[name]
    return f'#line 0 "kernels/{name}"' + re.sub(r'^#include "(.+)"$', include, text, flags=re.M).replace("#pragma once\n", "\n")


def _source(suffix):
    included = set()
    return "".join(_expand(name, included) for name in _SOURCES if name.endswith(suffix))


def _architectures():
    """nvcc's names of the visible GPUs' architectures, for instance ["90a"] (wgmma needs the a) or ["80", "86"]."""
    capabilities = {_capability(i) for i in range(torch.cuda.device_count())}
    for major, minor in capabilities:
        _check(major >= 8, f"GPU: expected compute capability 8.0 or higher, got {major}.{minor}")
    return sorted(f"{major}{minor}" + ("a" if major == 9 else "") for major, minor in capabilities)


def _flags(backend):
    if backend == "cpu":
        return ["-O3", "-std=c++17", "-fopenmp"]
    return ["-O3", "-std=c++17", "--split-compile=0"] + [f"-gencode=arch=compute_{a},code=sm_{a}" for a in _architectures()]


def _cuda_root():
    """The CUDA toolkit: CUDA_HOME, nvcc on PATH, the usual place, or pip's CUDA wheels. None where there is none."""
    on_path = shutil.which("nvcc")
    version = torch.version.cuda or ""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path and os.path.realpath(on_path) + "/../..", f"/usr/local/cuda-{version}", "/usr/local/cuda",
                  f"{sysconfig.get_paths()['purelib']}/nvidia/cu{version.split('.')[0]}"]
    # A wrapper script named nvcc says nothing of where the toolkit is: the headers do.
    roots = (os.path.abspath(root) for root in candidates if root)
    return next((root for root in roots if os.path.isfile(f"{root}/bin/nvcc") and os.path.isfile(f"{root}/include/cuda_runtime.h")), None)


def toolchain(backend):
    """What a build for ``backend`` ("cuda" or "cpu") needs: {tool: (path found or None, the command that mends its absence)}."""
    ninja = importlib.util.find_spec("ninja")
    tools = {
        "ninja": (shutil.which("ninja") or (ninja and ninja.origin), "pip install ninja"),
        "g++": (shutil.which(os.environ.get("CXX", "g++")), "apt-get install g++ (or set CXX)"),
    }
    if backend == "cuda":
        version = torch.version.cuda
        tools["nvcc"] = (_cuda_root(), f"pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={version}.*' (or install CUDA {version} and set CUDA_HOME)")
    return tools


def _cache_folder():
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions")
    return pathlib.Path(root).absolute() / "conv_transpose3d_new"


@functools.lru_cache(maxsize=None)
def _library(backend):
    """The compiled library of ``backend``, loaded; built first where the cache has none for these sources, flags and versions."""
    source = _source(".cpp" if backend == "cpu" else ".cu")
    flags = _flags(backend)
    name = f"{backend}_{_digest(source, *flags, torch.__version__, str(torch.version.cuda), os.environ.get('CXX', ''))}"
    path = _cache_folder() / f"{name}.so"
    if not path.exists():
        _build(backend, name, source, flags, path)
    return _declare(ctypes.CDLL(str(path)), backend)


def _declare(library, backend):
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int, "d": ctypes.c_double}
    shape = ctypes.c_void_p
    for operation, signature in _SIGNATURES.items():
        arguments = [kinds[kind] for kind in signature]
        if backend == "cpu":
            getattr(library, f"{operation}_cpu").argtypes = [shape, ctypes.c_int, ctypes.c_int, *arguments]
            continue
        dtypes = [ctypes.c_int] * (2 if operation in _NORM_OPERATIONS else 1)
        for path, _ in _PATHS[operation]:
            getattr(library, f"{operation}_{path}").argtypes = [shape, *dtypes, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *arguments]
            workspace = getattr(library, f"{operation}_{path}_workspace")
            workspace.argtypes, workspace.restype = [shape, ctypes.c_int], ctypes.c_int64
    if backend == "cuda":
        library.cuda_error_string.restype = ctypes.c_char_p
    return library


def _build(backend, name, source, flags, path):
    """Compiles ``source`` to ``path``: in a folder of its own, then moved into place whole, one process at a time."""
    import fcntl

    missing = [f"{tool} was not found: {remedy}" for tool, (found, remedy) in toolchain(backend).items() if not found]
    if missing:
        raise ImportError(f"model_new.py cannot compile its {backend} kernels. " + "; ".join(missing))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".building"), "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)    # the kernel lets go of it when a process dies, so a killed build leaves nothing behind
        if path.exists():
            return
        print(f"model_new.py: compiling its {backend} kernels once, about {20 if backend == 'cuda' else 5} s, cached at {path}", file=sys.stderr, flush=True)
        folder = path.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        built = _load_inline(backend, name, source, flags, folder)
        os.replace(built, path)
        shutil.rmtree(folder, ignore_errors=True)


def _load_inline(backend, name, source, flags, folder):
    if not shutil.which("ninja"):    # an environment that is not activated, a Jupyter kernel
        import ninja
        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
    if backend == "cuda":
        os.environ["CUDA_HOME"] = _cuda_root()
    from torch.utils import cpp_extension
    if backend == "cpu":
        return cpp_extension.load_inline(name, cpp_sources=source, extra_cflags=flags, extra_ldflags=["-fopenmp"], build_directory=str(folder),
                                         no_implicit_headers=True, is_python_module=False)
    cpp_extension.CUDA_HOME = root = _cuda_root()
    libraries = [f"-L{folder}"]
    for runtime in pathlib.Path(root).glob("lib/libcudart.so.*"):    # pip's wheel has no libcudart.so, which the linker wants
        link = folder / "libcudart.so"
        link.exists() or link.symlink_to(runtime)
    return cpp_extension.load_inline(name, cpp_sources="", cuda_sources=source, extra_cuda_cflags=flags, extra_ldflags=libraries, build_directory=str(folder),
                                     no_implicit_headers=True, is_python_module=False, with_cuda=True)


# ==================================================================================================== Embedded sources

_SOURCES = {}    # name of a file in kernels/ -> its text

# ---- begin of the embedded copy of kernels/ (written by: python -m kernels; do not edit here)

_SOURCES['geometry.h'] = r'''
// The index arithmetic of a transposed convolution, for host and device. Every kernel and the CPU backend use it.
//
// Tap k of input position i lands on output position o = i * stride - padding + k * dilation (per axis).
// Read backwards, output o gathers i = (o + padding - k * dilation) / stride, only where that divides exactly.
// The outputs o that share o mod stride (a phase) share their taps, and then nothing needs a divisibility test:
// source positions, taps and destinations are all arithmetic progressions. `Phase` holds them.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// ---------------------------------------------------------------------------------------------------- Geometry

struct Axis {
    int64_t in;       // positions of the input
    int64_t out;      // (in - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    int64_t kernel, stride, padding, dilation;
};

// Mirrored field by field by `Geometry` in model_new.py, which sees to it that what belongs to one axis is below 2^30;
// products of axes need 64 bits.
struct Geometry {
    int64_t N, C_in, C_out, groups;
    Axis axis[3];     // D, H, W
};

HOST_DEVICE int64_t in_volume(const Geometry& g) { return g.axis[0].in * g.axis[1].in * g.axis[2].in; }
HOST_DEVICE int64_t out_volume(const Geometry& g) { return g.axis[0].out * g.axis[1].out * g.axis[2].out; }
HOST_DEVICE int64_t kernel_volume(const Geometry& g) { return g.axis[0].kernel * g.axis[1].kernel * g.axis[2].kernel; }

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------------ Phases

enum class Direction {
    kForward,    // gather x into out
    kDInput,     // gather dout into dx
};

// One residue class of the destination positions along an axis. For 0 <= q < count and 0 <= j < taps:
// destination dst + q * dst_step gathers tap k + j * k_step from source src + q * src_step + j * src_tap_step,
// and there is nothing to gather where that source is outside [0, src_size).
struct Phase {
    int dst, dst_step, count;
    int k, k_step, taps;
    int src, src_step, src_tap_step, src_size;
};

HOST_DEVICE int64_t gcd(int64_t a, int64_t b) {
    while (b) { int64_t r = a % b; a = b; b = r; }
    return a;
}

HOST_DEVICE int64_t num_phases(Direction direction, const Axis& a) { return direction == Direction::kForward ? a.stride : 1; }

HOST_DEVICE Phase make_phase(Direction direction, const Axis& a, int64_t phase) {
    if (direction == Direction::kDInput)
        return {0, 1, int(a.in), 0, 1, int(a.kernel), int(-a.padding), int(a.stride), int(a.dilation), int(a.out)};
    // Taps of the outputs o = phase + q * stride are those with (phase + padding - k * dilation) mod stride == 0.
    int64_t period = a.stride / gcd(a.stride, a.dilation);
    int64_t k = 0;
    while (k < period && (phase + a.padding - k * a.dilation) % a.stride != 0) k++;
    int64_t taps = k < period && k < a.kernel ? ceil_div(a.kernel - k, period) : 0;
    int64_t count = a.out > phase ? ceil_div(a.out - phase, a.stride) : 0;
    return {int(phase), int(a.stride), int(count), int(k), int(period), int(taps),
            int((phase + a.padding - k * a.dilation) / a.stride), 1, int(-(period * a.dilation / a.stride)), int(a.in)};
}

// The half-open range of q whose source for tap j lies inside the source: [begin, end).
struct Range { int64_t begin, end; };

HOST_DEVICE Range valid_range(const Phase& p, int64_t j) {
    int64_t src = p.src + j * p.src_tap_step;    // the source of q = 0
    int64_t begin = src < 0 ? ceil_div(-src, p.src_step) : 0;
    int64_t end = src < p.src_size ? ceil_div(p.src_size - src, p.src_step) : 0;
    end = end < p.count ? end : p.count;
    return {begin, end > begin ? end : begin};
}
'''

_SOURCES['launch.cuh'] = r'''
// What every launcher shares: element types, the device guard, the launch check.
//
// A launcher is `extern "C"`, takes raw pointers, sizes, a device and a stream, and returns a cudaError_t as int
// (0 = success). It never synchronises and never allocates: scratch memory comes from the caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "geometry.h"

// ----------------------------------------------------------------------------------------------- Element types

// Mirrored by `_DTYPES` in model_new.py.
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using Acc = typename AccOf<T>::type;    // the type a T is accumulated in

// Explicit conversions: torch's build flags switch the implicit ones off.
template <typename T> __device__ __forceinline__ Acc<T> to_acc(T v) { return v; }
template <> __device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
template <> __device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T> __device__ __forceinline__ T from_acc(Acc<T> v) { return v; }
template <> __device__ __forceinline__ __half from_acc(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_acc(float v) { return __float2bfloat16_rn(v); }

// Calls `f` with a value of the C++ type behind `dtype`.
template <typename F> int with_dtype(int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(float{});
        case kFloat64: return f(double{});
        case kFloat16: return f(__half{});
        case kBFloat16: return f(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

inline int64_t acc_bytes(int dtype) { return dtype == kFloat64 ? 8 : 4; }

// torch's relu: NaN stays NaN.
template <typename A> __device__ __forceinline__ A relu(A v) { return v < A(0) ? A(0) : v; }

// ---------------------------------------------------------------------------------------------------- Launching

// Makes `device` current for the launcher's duration.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        cudaGetDevice(&previous_);
        if (previous_ != device) cudaSetDevice(device);
        else previous_ = -1;
    }
    ~DeviceGuard() { if (previous_ >= 0) cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
private:
    int previous_ = -1;
};

constexpr int64_t kMaxGrid = 0x7fffffff;    // blocks of a one-dimensional grid

#define RETURN_IF_ERROR(expression)          \
    do {                                     \
        const int error_ = (expression);     \
        if (error_ != 0) return error_;      \
    } while (0)

// Launches kernel<<<blocks, threads, 0, stream>>>(args...); an empty grid is a success.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
    return cudaGetLastError();
}
'''

_SOURCES['conv_transpose3d_generic.cu'] = r'''
// Transposed convolution for any parameters and dtype: forward and dx by direct convolution.
//
//   forward  out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// Both gather a source tensor into a destination along the phases of geometry.h, so they are one kernel: a thread owns
// kPositions destinations of one phase (neighbouring lanes, neighbouring sources) times kChannels channels in registers,
// and reads the weights, packed to (groups, taps, source channel, destination channel), at warp-uniform addresses.
// Formula: torch.nn.ConvTranspose3d.

#include "launch.cuh"

namespace direct_generic {

constexpr int kThreads = 128;
constexpr int kChannels = 8;         // destination channels of a thread
constexpr int kMinBlocksPerSM = 3;   // caps the registers
constexpr int kChain = 16;           // source channels summed before the sum joins the total: keeps fp32 chains short

// Destinations of a thread, kThreads apart: as many as the registers hold.
template <typename T> constexpr int kPositionsOf = sizeof(Acc<T>) == 8 ? 2 : 4;

// Channels of one group on either side of the gather.
struct Channels {
    int64_t src, dst, dst_padded;    // per group; dst_padded is a multiple of kChannels
};

HOST_DEVICE Channels channels_of(Direction direction, const Geometry& g) {
    const bool forward = direction == Direction::kForward;
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    const int64_t dst = forward ? out : in;
    return {forward ? in : out, dst, ceil_div(dst, kChannels) * kChannels};
}

// ----------------------------------------------------------------------------------------------------- Packing

// packed (groups, taps, src channels, dst channels padded with zeros)
template <typename T, Direction kDirection>
__global__ void pack_weight_kernel(Geometry g, const T* __restrict__ w, Acc<T>* __restrict__ packed) {
    const Channels channels = channels_of(kDirection, g);
    const int64_t taps = kernel_volume(g);
    const int64_t idx = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (idx >= g.groups * taps * channels.src * channels.dst_padded) return;
    const int64_t dst = idx % channels.dst_padded;
    const int64_t src = idx / channels.dst_padded % channels.src;
    const int64_t tap = idx / channels.dst_padded / channels.src % taps;
    const int64_t group = idx / channels.dst_padded / channels.src / taps;
    const int64_t ci = kDirection == Direction::kForward ? src : dst;
    const int64_t co = kDirection == Direction::kForward ? dst : src;
    const int64_t c_in = g.C_in / g.groups, c_out = g.C_out / g.groups;
    packed[idx] = dst < channels.dst ? to_acc(w[((group * c_in + ci) * c_out + co) * taps + tap]) : Acc<T>(0);
}

// ------------------------------------------------------------------------------------------- Direct convolution

// dst = epilogue(gather of src); bias may be null. Grid: see num_blocks.
template <typename T, Direction kDirection>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSM)
direct_kernel(Geometry g, const T* __restrict__ src, const Acc<T>* __restrict__ packed, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    using A = Acc<T>;
    constexpr int kPositions = kPositionsOf<T>;
    const Channels channels = channels_of(kDirection, g);

    // Prologue: the block's tile. Phases along W come fastest, so that the blocks which share memory sectors run together.
    __shared__ Phase phases[3];      // shared, not registers: the loops need those
    int64_t block = blockIdx.x;
    auto take = [&block](int64_t count) { const int64_t digit = block % count; block /= count; return digit; };
    const int64_t phase_w = take(num_phases(kDirection, g.axis[2]));
    const int64_t channel = take(channels.dst_padded / kChannels) * kChannels;
    const int64_t phase_h = take(num_phases(kDirection, g.axis[1]));
    const int64_t phase_d = take(num_phases(kDirection, g.axis[0]));
    const int64_t group = take(g.groups);
    const int64_t n = take(g.N);
    if (threadIdx.x < 3) {
        const int axis = threadIdx.x;
        phases[axis] = make_phase(kDirection, g.axis[axis], axis == 0 ? phase_d : axis == 1 ? phase_h : phase_w);
    }
    __syncthreads();
    const Phase &pd = phases[0], &ph = phases[1], &pw = phases[2];
    const int64_t first = block * (kThreads * kPositions) + threadIdx.x;
    const int64_t volume = int64_t(pd.count) * ph.count * pw.count;
    if (first - threadIdx.x >= volume) return;

    // The thread's positions: source coordinates of tap 0, and the offset written in the end (shared: not needed until then).
    __shared__ int64_t dst_offset[kPositions][kThreads];
    const bool forward = kDirection == Direction::kForward;
    const int64_t dst_h = forward ? g.axis[1].out : g.axis[1].in, dst_w = forward ? g.axis[2].out : g.axis[2].in;
    int src_d[kPositions], src_h[kPositions], src_w[kPositions];
#pragma unroll
    for (int p = 0; p < kPositions; p++) {
        const int64_t q = first + p * kThreads;
        const int d = q / (int64_t(ph.count) * pw.count), h = q / pw.count % ph.count, w = q % pw.count;
        src_d[p] = q < volume ? pd.src + d * pd.src_step : -(1 << 30);    // outside for every tap
        src_h[p] = ph.src + h * ph.src_step;
        src_w[p] = pw.src + w * pw.src_step;
        dst_offset[p][threadIdx.x] = ((pd.dst + d * pd.dst_step) * dst_h + ph.dst + h * ph.dst_step) * dst_w + pw.dst + w * pw.dst_step;
    }

    // Main loop: chains of kChain source channels over all taps.
    const int64_t src_volume = int64_t(pd.src_size) * ph.src_size * pw.src_size;
    const T* src_group = src + (n * g.groups + group) * channels.src * src_volume;
    const A* packed_group = packed + group * kernel_volume(g) * channels.src * channels.dst_padded + channel;
    A total[kPositions][kChannels] = {};
#pragma unroll 1
    for (int64_t c0 = 0; c0 < channels.src; c0 += kChain) {
        const int chain = channels.src - c0 < kChain ? channels.src - c0 : kChain;
        A sum[kPositions][kChannels] = {};
#pragma unroll 1
        for (int jd = 0; jd < pd.taps; jd++)
#pragma unroll 1
        for (int jh = 0; jh < ph.taps; jh++)
#pragma unroll 1
        for (int jw = 0; jw < pw.taps; jw++) {
            bool inside[kPositions];
            const T* s[kPositions];
            bool any = false;
#pragma unroll
            for (int p = 0; p < kPositions; p++) {
                const int d = src_d[p] + jd * pd.src_tap_step, h = src_h[p] + jh * ph.src_tap_step, w = src_w[p] + jw * pw.src_tap_step;
                inside[p] = unsigned(d) < unsigned(pd.src_size) && unsigned(h) < unsigned(ph.src_size) && unsigned(w) < unsigned(pw.src_size);
                s[p] = src_group + c0 * src_volume + ((int64_t(d) * ph.src_size + h) * pw.src_size + w);
                any |= inside[p];
            }
            if (!any) continue;
            const int64_t tap = ((pd.k + jd * pd.k_step) * g.axis[1].kernel + ph.k + jh * ph.k_step) * g.axis[2].kernel + pw.k + jw * pw.k_step;
            const A* weight = packed_group + (tap * channels.src + c0) * channels.dst_padded;
#pragma unroll 2
            for (int c = 0; c < chain; c++) {
                A v[kPositions], wt[kChannels];
#pragma unroll
                for (int p = 0; p < kPositions; p++) v[p] = inside[p] ? to_acc(s[p][c * src_volume]) : A(0);
#pragma unroll
                for (int m = 0; m < kChannels; m++) wt[m] = weight[c * channels.dst_padded + m];
#pragma unroll
                for (int p = 0; p < kPositions; p++)
                    if (inside[p])    // not a product with zero: the weight may be Inf
#pragma unroll
                        for (int m = 0; m < kChannels; m++) sum[p][m] += v[p] * wt[m];
            }
        }
#pragma unroll
        for (int p = 0; p < kPositions; p++)
#pragma unroll
            for (int m = 0; m < kChannels; m++) total[p][m] += sum[p][m];
    }

    // Epilogue.
    const int64_t dst_volume = forward ? out_volume(g) : in_volume(g);
    T* dst_tile = dst + ((n * g.groups + group) * channels.dst + channel) * dst_volume;
#pragma unroll
    for (int p = 0; p < kPositions; p++) {
        if (first + p * kThreads >= volume) break;
#pragma unroll
        for (int m = 0; m < kChannels; m++) {
            if (channel + m >= channels.dst) break;
            A v = total[p][m];
            if (bias) v += to_acc(bias[group * channels.dst + channel + m]);
            if (apply_relu) v = relu(v);
            dst_tile[m * dst_volume + dst_offset[p][threadIdx.x]] = from_acc<T>(v);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launchers

template <typename T, Direction kDirection> int64_t num_blocks(const Geometry& g) {
    int64_t volume = 1, phases = 1;
    for (const Axis& a : g.axis) {
        volume *= make_phase(kDirection, a, 0).count;    // phase 0 is the longest
        phases *= num_phases(kDirection, a);
    }
    return ceil_div(volume, kThreads * kPositionsOf<T>) * phases * (channels_of(kDirection, g).dst_padded / kChannels) * g.groups * g.N;
}

template <Direction kDirection> int64_t packed_count(const Geometry& g) {
    const Channels channels = channels_of(kDirection, g);
    return g.groups * kernel_volume(g) * channels.src * channels.dst_padded;
}

template <Direction kDirection>
int direct(const Geometry& g, int dtype, void* stream, const void* src, const void* w, const void* bias, bool apply_relu, void* dst, void* workspace) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        auto* packed = static_cast<Acc<T>*>(workspace);
        RETURN_IF_ERROR(launch(pack_weight_kernel<T, kDirection>, ceil_div(packed_count<kDirection>(g), 256), 256, stream, g, static_cast<const T*>(w), packed));
        return launch(direct_kernel<T, kDirection>, num_blocks<T, kDirection>(g), kThreads, stream,
                      g, static_cast<const T*>(src), static_cast<const Acc<T>*>(packed), static_cast<const T*>(bias), apply_relu, static_cast<T*>(dst));
    });
}

}  // namespace direct_generic

extern "C" int64_t conv_transpose3d_forward_generic_workspace(const Geometry* g, int dtype) {
    return direct_generic::packed_count<Direction::kForward>(*g) * acc_bytes(dtype);
}

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return direct_generic::direct<Direction::kForward>(*g, dtype, stream, x, w, bias, apply_relu != 0, out, workspace);
}

extern "C" int64_t conv_transpose3d_dinput_generic_workspace(const Geometry* g, int dtype) {
    return direct_generic::packed_count<Direction::kDInput>(*g) * acc_bytes(dtype);
}

extern "C" int conv_transpose3d_dinput_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                               const void* dout, const void* w, void* dx) {
    DeviceGuard guard(device);
    return direct_generic::direct<Direction::kDInput>(*g, dtype, stream, dout, w, nullptr, false, dx, workspace);
}
'''

_SOURCES['conv_transpose3d_dweight_generic.cu'] = r'''
// Gradients of a transposed convolution's parameters, for any parameters and dtype.
//
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]
//   dbias[co]          = sum over n, o of dout[n, co, o]
//
// dweight is, per group, a matrix product with GEMM_M = input channels, GEMM_N = (output channel, tap) in the order of the
// weight's own memory, GEMM_K = (n, input position). GEMM_K is split over blocks; the partial sums are added in a fixed
// order, so two runs agree bitwise.

#include "launch.cuh"

namespace parameter_gradients_generic {

constexpr int kBlockK = 16;          // positions of a stage
constexpr int kThreadTile = 4;       // a thread owns kThreadTile x kThreadTile of the block's tile
constexpr int kChainStages = 16;     // stages summed before the sum joins the total: keeps fp32 chains short
constexpr int64_t kTargetBlocks = 1024;
constexpr int64_t kMinSplitPositions = 1024;

struct Sizes {
    int64_t gemm_m, gemm_n, gemm_k;
    int64_t splits, split_positions;
};

template <int kBlockM, int kBlockN> struct Tile {
    static constexpr int kThreads = kBlockM * kBlockN / (kThreadTile * kThreadTile);
    static constexpr int kPadM = kBlockM + 4, kPadN = kBlockN + 4;    // 16-byte rows, two-way bank conflicts at most
    static_assert(kThreads % kBlockK == 0, "a thread loads the same position of every stage");
};

HOST_DEVICE int64_t num_tiles(const Geometry& g, int block_m, int block_n) {
    return g.groups * ceil_div(g.C_in / g.groups, block_m) * ceil_div(g.C_out / g.groups * kernel_volume(g), block_n);
}

HOST_DEVICE Sizes sizes_of(const Geometry& g, int64_t tiles) {
    const int64_t gemm_k = g.N * in_volume(g);
    int64_t splits = kTargetBlocks / tiles;
    const int64_t most = ceil_div(gemm_k, kMinSplitPositions);
    splits = splits < most ? splits : most;
    splits = splits > 1 ? splits : 1;
    const int64_t split_positions = ceil_div(ceil_div(gemm_k, splits), kBlockK) * kBlockK;
    return {g.C_in / g.groups, g.C_out / g.groups * kernel_volume(g), gemm_k, splits, split_positions};
}

// A column of GEMM_N: where output channel and tap read dout.
struct Column { int64_t channel; int offset_d, offset_h, offset_w; };

// ------------------------------------------------------------------------------------------------------ dweight

// partial (splits, groups, gemm_m, gemm_n)
template <typename T, int kBlockM, int kBlockN>
__global__ void __launch_bounds__(Tile<kBlockM, kBlockN>::kThreads)
dweight_kernel(Geometry g, Sizes sizes, const T* __restrict__ x, const T* __restrict__ dout, Acc<T>* __restrict__ partial) {
    using A = Acc<T>;
    using Shape = Tile<kBlockM, kBlockN>;
    __shared__ A a_stage[kBlockK][Shape::kPadM];
    __shared__ A b_stage[kBlockK][Shape::kPadN];
    __shared__ Column columns[kBlockN];

    // Prologue: the block's tile and its columns.
    int64_t block = blockIdx.x;
    auto take = [&block](int64_t count) { const int64_t digit = block % count; block /= count; return digit; };
    const int64_t n0 = take(ceil_div(sizes.gemm_n, kBlockN)) * kBlockN;
    const int64_t m0 = take(ceil_div(sizes.gemm_m, kBlockM)) * kBlockM;
    const int64_t group = take(g.groups);
    const int64_t split = block;
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t taps = kernel_volume(g), src_volume = in_volume(g), dst_volume = out_volume(g);
    for (int j = threadIdx.x; j < kBlockN; j += Shape::kThreads) {
        const int64_t tap = (n0 + j) % taps;
        columns[j] = {group * (g.C_out / g.groups) + (n0 + j) / taps, int(tap / (ah.kernel * aw.kernel) * ad.dilation - ad.padding),
                      int(tap / aw.kernel % ah.kernel * ah.dilation - ah.padding), int(tap % aw.kernel * aw.dilation - aw.padding)};
    }
    __syncthreads();

    // Main loop over stages of kBlockK positions.
    const int lane_k = threadIdx.x % kBlockK, row0 = threadIdx.x / kBlockK;
    constexpr int kRowStep = Shape::kThreads / kBlockK;
    const int tile_n = threadIdx.x % (kBlockN / kThreadTile) * kThreadTile, tile_m = threadIdx.x / (kBlockN / kThreadTile) * kThreadTile;
    A total[kThreadTile][kThreadTile] = {}, sum[kThreadTile][kThreadTile] = {};
    const int64_t begin = split * sizes.split_positions;
    const int64_t end = begin + sizes.split_positions < sizes.gemm_k ? begin + sizes.split_positions : sizes.gemm_k;
    int stage = 0;
    for (int64_t k0 = begin; k0 < end; k0 += kBlockK) {
        const int64_t position = k0 + lane_k, n = position / src_volume, i = position % src_volume;
        const int64_t d = i / (ah.in * aw.in) * ad.stride, h = i / aw.in % ah.in * ah.stride, w = i % aw.in * aw.stride;
        const bool live = position < end;
#pragma unroll
        for (int r = row0; r < kBlockM; r += kRowStep) {
            const bool inside = live && m0 + r < sizes.gemm_m;
            a_stage[lane_k][r] = inside ? to_acc(x[(n * g.C_in + group * sizes.gemm_m + m0 + r) * src_volume + i]) : A(0);
        }
#pragma unroll 4
        for (int r = row0; r < kBlockN; r += kRowStep) {
            const Column c = columns[r];
            const int64_t od = d + c.offset_d, oh = h + c.offset_h, ow = w + c.offset_w;
            const bool inside = live && n0 + r < sizes.gemm_n && od >= 0 && od < ad.out && oh >= 0 && oh < ah.out && ow >= 0 && ow < aw.out;
            // Outside, dout counts as zero (an Inf of x there makes NaN, as in torch).
            b_stage[lane_k][r] = inside ? to_acc(dout[(n * g.C_out + c.channel) * dst_volume + (od * ah.out + oh) * aw.out + ow]) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kBlockK; k++) {
            A a[kThreadTile], b[kThreadTile];
#pragma unroll
            for (int m = 0; m < kThreadTile; m++) a[m] = a_stage[k][tile_m + m];
#pragma unroll
            for (int c = 0; c < kThreadTile; c++) b[c] = b_stage[k][tile_n + c];
#pragma unroll
            for (int m = 0; m < kThreadTile; m++)
#pragma unroll
                for (int c = 0; c < kThreadTile; c++) sum[m][c] += a[m] * b[c];
        }
        __syncthreads();
        if (++stage % kChainStages == 0)
#pragma unroll
            for (int m = 0; m < kThreadTile; m++)
#pragma unroll
                for (int c = 0; c < kThreadTile; c++) total[m][c] += sum[m][c], sum[m][c] = A(0);
    }

    // Epilogue.
#pragma unroll
    for (int m = 0; m < kThreadTile; m++)
#pragma unroll
        for (int c = 0; c < kThreadTile; c++)
            if (m0 + tile_m + m < sizes.gemm_m && n0 + tile_n + c < sizes.gemm_n)
                partial[((split * g.groups + group) * sizes.gemm_m + m0 + tile_m + m) * sizes.gemm_n + n0 + tile_n + c] = total[m][c] + sum[m][c];
}

// out[i] = sum over s of partial[s, i], in order; partial (splits, count)
template <typename T, typename P>
__global__ void sum_partials_kernel(const P* __restrict__ partial, int64_t splits, int64_t count, T* __restrict__ out) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    double sum = 0;
    for (int64_t s = 0; s < splits; s++) sum += partial[s * count + i];
    out[i] = from_acc<T>(Acc<T>(sum));
}

template <typename T, int kBlockM, int kBlockN>
int dweight_tiled(const Geometry& g, void* stream, const void* x, const void* dout, void* dweight, void* workspace) {
    const int64_t tiles = num_tiles(g, kBlockM, kBlockN);
    const Sizes sizes = sizes_of(g, tiles);
    auto* partial = static_cast<Acc<T>*>(workspace);
    RETURN_IF_ERROR(launch(dweight_kernel<T, kBlockM, kBlockN>, tiles * sizes.splits, Tile<kBlockM, kBlockN>::kThreads, stream,
                           g, sizes, static_cast<const T*>(x), static_cast<const T*>(dout), partial));
    const int64_t count = g.groups * sizes.gemm_m * sizes.gemm_n;
    return launch(sum_partials_kernel<T, Acc<T>>, ceil_div(count, 256), 256, stream, static_cast<const Acc<T>*>(partial), sizes.splits, count, static_cast<T*>(dweight));
}

// Few input channels in a group leave a square tile mostly empty.
inline bool narrow(const Geometry& g) { return g.C_in / g.groups <= 8; }
constexpr int kSquare = 64, kNarrowM = 8, kNarrowN = 256;

// -------------------------------------------------------------------------------------------------------- dbias

constexpr int kBiasThreads = 256;

// partial (N, C_out)
template <typename T>
__global__ void __launch_bounds__(kBiasThreads) dbias_kernel(int64_t volume, const T* __restrict__ dout, double* __restrict__ partial) {
    __shared__ double sums[kBiasThreads];
    const T* row = dout + blockIdx.x * volume;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < volume; i += kBiasThreads) sum += to_acc(row[i]);
    sums[threadIdx.x] = sum;
    for (int half = kBiasThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

}  // namespace parameter_gradients_generic

// ---------------------------------------------------------------------------------------------------- Launchers

extern "C" int64_t conv_transpose3d_dweight_generic_workspace(const Geometry* g, int dtype) {
    using namespace parameter_gradients_generic;
    const int64_t tiles = narrow(*g) ? num_tiles(*g, kNarrowM, kNarrowN) : num_tiles(*g, kSquare, kSquare);
    const Sizes sizes = sizes_of(*g, tiles);
    return sizes.splits * g->groups * sizes.gemm_m * sizes.gemm_n * acc_bytes(dtype);
}

extern "C" int conv_transpose3d_dweight_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* dout, void* dweight) {
    using namespace parameter_gradients_generic;
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        return narrow(*g) ? dweight_tiled<T, kNarrowM, kNarrowN>(*g, stream, x, dout, dweight, workspace)
                          : dweight_tiled<T, kSquare, kSquare>(*g, stream, x, dout, dweight, workspace);
    });
}

extern "C" int64_t conv_transpose3d_dbias_generic_workspace(const Geometry* g, int) { return g->N * g->C_out * int64_t(sizeof(double)); }

extern "C" int conv_transpose3d_dbias_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* dout, void* dbias) {
    using namespace parameter_gradients_generic;
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        auto* partial = static_cast<double*>(workspace);
        RETURN_IF_ERROR(launch(dbias_kernel<T>, g->N * g->C_out, kBiasThreads, stream, out_volume(*g), static_cast<const T*>(dout), partial));
        return launch(sum_partials_kernel<T, double>, ceil_div(g->C_out, 256), 256, stream, static_cast<const double*>(partial), g->N, g->C_out, static_cast<T*>(dbias));
    });
}
'''

_SOURCES['relu_group_norm_generic.cu'] = r'''
// GroupNorm of an activation r = relu(z), and the backward of both, for any shape and dtype.
//
//   forward   y = (r - mean) * rstd * gamma + beta, mean and variance (biased) over each (n, group)
//   backward  dr = rstd * (gamma * dy - m1 - xhat * m2), xhat = (r - mean) * rstd,
//             m1, m2 = mean over the group of gamma * dy and of gamma * dy * xhat;   dz = dr where r > 0 (or NaN), else 0
//             dgamma[c] = sum over n, s of dy * xhat,   dbeta[c] = sum over n, s of dy
//
//   r, dz (N, C, S) of type T   y, dy (N, C, S) of type Y   statistics (2, N, num_groups) float64: mean, rstd   gamma, beta, dgamma, dbeta (C) Acc<T>
//
// Sums are taken in float64, of values shifted by the group's first element, so neither a large mean nor a large range
// cancels; they are added in a fixed order. Formula: torch.nn.GroupNorm.

#include "launch.cuh"

namespace relu_group_norm_generic {

constexpr int kThreads = 256;
constexpr int64_t kSplitElements = 16384;    // of one block of a reduction
constexpr int kApplyElements = 8;            // of one thread of an elementwise kernel

struct Shape {
    int64_t N, C, S, num_groups;
    HOST_DEVICE int64_t group_channels() const { return C / num_groups; }
    HOST_DEVICE int64_t group_count() const { return group_channels() * S; }
};

struct Pair { double a, b; };

// The sum over the block, in a fixed order, in every thread.
__device__ __forceinline__ Pair block_sum(Pair v) {
    __shared__ Pair sums[kThreads];
    __syncthreads();
    sums[threadIdx.x] = v;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x].a += sums[threadIdx.x + half].a;
            sums[threadIdx.x].b += sums[threadIdx.x + half].b;
        }
    }
    __syncthreads();
    return sums[0];
}

// r - mean without losing the mean's low bits: the mean is kept as a sum of two numbers of the accumulation type.
template <typename A> struct Mean {
    A high, low;
    __device__ explicit Mean(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
    __device__ __forceinline__ A center(A r) const { return (r - high) - low; }
};

// ------------------------------------------------------------------------------------------------------ Forward

// partial (N * num_groups, splits): sum and sum of squares of r - r[first of the group]
template <typename T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Shape s, int64_t splits, const T* __restrict__ r, Pair* __restrict__ partial) {
    const T* group = r + blockIdx.x / splits * s.group_count();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.group_count() ? begin + kSplitElements : s.group_count();
    const double shift = to_acc(group[0]);
    Pair sum = {0, 0};
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const double v = to_acc(group[i]) - shift;
        sum.a += v;
        sum.b += v * v;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
finish_statistics_kernel(Shape s, int64_t splits, double eps, const T* __restrict__ r, const Pair* __restrict__ partial, double* __restrict__ mean, double* __restrict__ rstd) {
    Pair sum = {0, 0};
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) {
        sum.a += partial[blockIdx.x * splits + i].a;
        sum.b += partial[blockIdx.x * splits + i].b;
    }
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const double count = s.group_count(), shifted_mean = sum.a / count;
    const double variance = sum.b / count - shifted_mean * shifted_mean;
    mean[blockIdx.x] = to_acc(r[blockIdx.x * s.group_count()]) + shifted_mean;
    rstd[blockIdx.x] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
}

// gamma, beta may be null (1, 0). y may be r. Grid: (n, c, tile).
template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
normalize_kernel(Shape s, int64_t tiles, const T* r, const double* __restrict__ mean, const double* __restrict__ rstd,
                 const Acc<T>* __restrict__ gamma, const Acc<T>* __restrict__ beta, Y* y) {
    using A = Acc<T>;
    const int64_t row = blockIdx.x / tiles, c = row % s.C, group = row / s.group_channels();
    const Mean<A> m(mean[group]);
    const A scale = A(rstd[group]) * (gamma ? gamma[c] : A(1)), offset = beta ? beta[c] : A(0);
    const int64_t begin = blockIdx.x % tiles * (kThreads * kApplyElements) + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kApplyElements; e++) {
        const int64_t i = begin + e * kThreads;
        if (i < s.S) y[row * s.S + i] = from_acc<Y>(m.center(to_acc(r[row * s.S + i])) * scale + offset);
    }
}

// ----------------------------------------------------------------------------------------------------- Backward

// partial (N * C, splits): sums of dy and of dy * xhat
template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
gradient_sums_kernel(Shape s, int64_t splits, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd, Pair* __restrict__ partial) {
    using A = Acc<T>;
    const int64_t row = blockIdx.x / splits, group = row / s.group_channels();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.S ? begin + kSplitElements : s.S;
    const Mean<A> m(mean[group]);
    Pair sum = {0, 0};
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const double d = to_acc(dy[row * s.S + i]);
        sum.a += d;
        sum.b += d * m.center(to_acc(r[row * s.S + i]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = {sum.a, sum.b * rstd[group]};
}

// One block per (n, group): channel_sums (N, C) of the partials, and group_means (N, num_groups) weighted by gamma.
template <typename A>
__global__ void __launch_bounds__(kThreads)
finish_gradient_sums_kernel(Shape s, int64_t splits, const A* __restrict__ gamma, const Pair* __restrict__ partial, Pair* __restrict__ channel_sums, Pair* __restrict__ group_means) {
    Pair weighted = {0, 0};
    for (int64_t k = threadIdx.x; k < s.group_channels(); k += kThreads) {
        const int64_t row = blockIdx.x * s.group_channels() + k;
        Pair sum = {0, 0};
        for (int64_t i = 0; i < splits; i++) {
            sum.a += partial[row * splits + i].a;
            sum.b += partial[row * splits + i].b;
        }
        channel_sums[row] = sum;
        const double weight = gamma ? gamma[row % s.C] : A(1);
        weighted.a += weight * sum.a;
        weighted.b += weight * sum.b;
    }
    weighted = block_sum(weighted);
    if (threadIdx.x == 0) group_means[blockIdx.x] = {weighted.a / s.group_count(), weighted.b / s.group_count()};
}

// dgamma, dbeta (C): channel_sums (N, C) over n
template <typename A>
__global__ void parameter_gradients_kernel(Shape s, const Pair* __restrict__ channel_sums, A* __restrict__ dgamma, A* __restrict__ dbeta) {
    const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= s.C) return;
    Pair sum = {0, 0};
    for (int64_t n = 0; n < s.N; n++) {
        sum.a += channel_sums[n * s.C + c].a;
        sum.b += channel_sums[n * s.C + c].b;
    }
    if (dbeta) dbeta[c] = A(sum.a);
    if (dgamma) dgamma[c] = A(sum.b);
}

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
dz_kernel(Shape s, int64_t tiles, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd,
          const Acc<T>* __restrict__ gamma, const Pair* __restrict__ group_means, T* __restrict__ dz) {
    using A = Acc<T>;
    const int64_t row = blockIdx.x / tiles, c = row % s.C, group = row / s.group_channels();
    const Mean<A> m(mean[group]);
    const A inv = rstd[group], weight = gamma ? gamma[c] : A(1), mean1 = group_means[group].a, mean2 = group_means[group].b;
    const int64_t begin = blockIdx.x % tiles * (kThreads * kApplyElements) + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kApplyElements; e++) {
        const int64_t i = begin + e * kThreads;
        if (i >= s.S) break;
        const A v = to_acc(r[row * s.S + i]);
        const A dr = inv * (weight * to_acc(dy[row * s.S + i]) - mean1 - m.center(v) * inv * mean2);
        dz[row * s.S + i] = from_acc<T>(v <= A(0) ? A(0) : dr);    // NaN keeps its gradient, as in torch
    }
}

// Calls f with the types of r and of y: y is of r's type, or float32 after a low-precision r (autocast).
template <typename F> int with_dtypes(int r_dtype, int y_dtype, F f) {
    return with_dtype(r_dtype, [&](auto r) {
        if (y_dtype == r_dtype) return f(r, r);
        if (y_dtype == kFloat32 && acc_bytes(r_dtype) == 4) return f(r, float{});
        return int(cudaErrorInvalidValue);
    });
}

inline int64_t tiles_of(const Shape& s) { return ceil_div(s.S, kThreads * kApplyElements); }

}  // namespace relu_group_norm_generic

// ---------------------------------------------------------------------------------------------------- Launchers

using RgnShape = relu_group_norm_generic::Shape;    // mirrored by `NormShape` in model_new.py

extern "C" int64_t group_norm_forward_generic_workspace(const RgnShape* s, int) {
    using namespace relu_group_norm_generic;
    return s->N * s->num_groups * ceil_div(s->group_count(), kSplitElements) * int64_t(sizeof(Pair));
}

// y may be r (in place) where the types agree.
extern "C" int group_norm_forward_generic(const RgnShape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                          const void* r, const void* gamma, const void* beta, double eps, void* y, double* statistics) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        const int64_t splits = ceil_div(s.group_count(), kSplitElements);
        double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        auto* partial = static_cast<Pair*>(workspace);
        RETURN_IF_ERROR(launch(statistics_kernel<T>, s.N * s.num_groups * splits, kThreads, stream, s, splits, static_cast<const T*>(r), partial));
        RETURN_IF_ERROR(launch(finish_statistics_kernel<T>, s.N * s.num_groups, kThreads, stream, s, splits, eps, static_cast<const T*>(r), static_cast<const Pair*>(partial), mean, rstd));
        return launch(normalize_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const T*>(r), static_cast<const double*>(mean),
                      static_cast<const double*>(rstd), static_cast<const Acc<T>*>(gamma), static_cast<const Acc<T>*>(beta), static_cast<Y*>(y));
    });
}

extern "C" int64_t relu_group_norm_backward_generic_workspace(const RgnShape* s, int) {
    using namespace relu_group_norm_generic;
    return (s->N * s->C * (ceil_div(s->S, kSplitElements) + 1) + s->N * s->num_groups) * int64_t(sizeof(Pair));
}

// dz, or dgamma and dbeta, may be null: not wanted.
extern "C" int relu_group_norm_backward_generic(const RgnShape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                                const void* dy, const void* r, const double* statistics, const void* gamma, void* dz, void* dgamma, void* dbeta) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        using A = Acc<T>;
        const int64_t splits = ceil_div(s.S, kSplitElements);
        const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        Pair* partial = static_cast<Pair*>(workspace);                      // (N * C, splits)
        Pair* channel_sums = partial + s.N * s.C * splits;                  // (N, C)
        Pair* group_means = channel_sums + s.N * s.C;                       // (N, num_groups)
        RETURN_IF_ERROR(launch(gradient_sums_kernel<T, Y>, s.N * s.C * splits, kThreads, stream, s, splits, static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd, partial));
        RETURN_IF_ERROR(launch(finish_gradient_sums_kernel<A>, s.N * s.num_groups, kThreads, stream, s, splits, static_cast<const A*>(gamma), static_cast<const Pair*>(partial), channel_sums, group_means));
        if (dgamma || dbeta)
            RETURN_IF_ERROR(launch(parameter_gradients_kernel<A>, ceil_div(s.C, 256), 256, stream, s, static_cast<const Pair*>(channel_sums), static_cast<A*>(dgamma), static_cast<A*>(dbeta)));
        if (!dz) return int(cudaSuccess);
        return launch(dz_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd,
                      static_cast<const A*>(gamma), static_cast<const Pair*>(group_means), static_cast<T*>(dz));
    });
}

extern "C" const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
'''

_SOURCES['cpu_backend.cpp'] = r'''
// The CPU backend: the same operations as the CUDA kernels, over the same phases (geometry.h), compiled by the host
// compiler. float32 and float64; sums are taken in float64 and do not depend on the number of threads.
// Signatures as the CUDA launchers', with a number of threads for device and stream, and no workspace.

#include <math.h>

#include <algorithm>
#include <vector>

#include "geometry.h"

namespace cpu_backend {

constexpr int kChannels = 4;    // destination channels that share a row of the source

// --------------------------------------------------------------------------------------------- Gather (out, dx)

// One row (n, c0 .. c0 + channels, d, h, :) of the destination: dst = epilogue(gather of src), phase by phase along W.
template <typename T>
void gather_row(Direction direction, const Geometry& g, const Phase& pd, int64_t qd, const Phase& ph, int64_t qh, int64_t group, int64_t c0, int channels,
                const T* src, const T* w, const T* bias, bool apply_relu, T* dst, double* sums) {
    const bool forward = direction == Direction::kForward;
    const Axis& aw = g.axis[2];
    const int64_t c_in = g.C_in / g.groups, c_out = g.C_out / g.groups, taps = kernel_volume(g);
    const int64_t src_channels = forward ? c_in : c_out;
    const int64_t src_volume = int64_t(pd.src_size) * ph.src_size * (forward ? aw.in : aw.out);
    const int64_t dst_volume = forward ? out_volume(g) : in_volume(g);
    for (int64_t phase = 0; phase < num_phases(direction, aw); phase++) {
        const Phase pw = make_phase(direction, aw, phase);
        std::fill(sums, sums + kChannels * pw.count, 0.0);
        for (int jd = 0; jd < pd.taps; jd++)
        for (int jh = 0; jh < ph.taps; jh++) {
            const int64_t sd = pd.src + qd * pd.src_step + int64_t(jd) * pd.src_tap_step, sh = ph.src + qh * ph.src_step + int64_t(jh) * ph.src_tap_step;
            if (sd < 0 || sd >= pd.src_size || sh < 0 || sh >= ph.src_size) continue;
            for (int jw = 0; jw < pw.taps; jw++) {
                const int64_t tap = ((pd.k + jd * pd.k_step) * g.axis[1].kernel + ph.k + jh * ph.k_step) * aw.kernel + pw.k + jw * pw.k_step;
                const Range range = valid_range(pw, jw);
                for (int64_t c = 0; c < src_channels; c++) {
                    const T* row = src + c * src_volume + (sd * ph.src_size + sh) * pw.src_size + pw.src + int64_t(jw) * pw.src_tap_step;
                    double weight[kChannels] = {};
                    for (int m = 0; m < channels; m++) {
                        const int64_t ci = forward ? c : c0 + m, co = forward ? c0 + m : c;
                        weight[m] = w[((group * c_in + ci) * c_out + co) * taps + tap];
                    }
                    double *s0 = sums, *s1 = s0 + pw.count, *s2 = s1 + pw.count, *s3 = s2 + pw.count;
#pragma omp simd
                    for (int64_t q = range.begin; q < range.end; q++) {
                        const double v = row[q * pw.src_step];
                        s0[q] += v * weight[0], s1[q] += v * weight[1], s2[q] += v * weight[2], s3[q] += v * weight[3];
                    }
                }
            }
        }
        for (int m = 0; m < channels; m++)
            for (int64_t q = 0; q < pw.count; q++) {
                double v = sums[m * pw.count + q] + (bias ? double(bias[c0 + m]) : 0.0);
                if (apply_relu && v < 0) v = 0;
                dst[m * dst_volume + pw.dst + q * pw.dst_step] = T(v);
            }
    }
}

template <typename T>
int gather(Direction direction, const Geometry& g, int threads, const T* src, const T* w, const T* bias, bool apply_relu, T* dst) {
    static_assert(kChannels == 4, "gather_row names four rows of sums");
    const bool forward = direction == Direction::kForward;
    const int64_t src_channels = (forward ? g.C_in : g.C_out) / g.groups, dst_channels = (forward ? g.C_out : g.C_in) / g.groups;
    const int64_t src_volume = forward ? in_volume(g) : out_volume(g), dst_volume = forward ? out_volume(g) : in_volume(g);
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t dst_d = forward ? ad.out : ad.in, dst_h = forward ? ah.out : ah.in, dst_w = forward ? aw.out : aw.in;
    const int64_t tiles = ceil_div(dst_channels, kChannels);
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> sums(kChannels * dst_w);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t outer = 0; outer < g.N * g.groups * tiles; outer++)
        for (int64_t d = 0; d < dst_d; d++) {
            const int64_t tile = outer % tiles, group = outer / tiles % g.groups, n = outer / tiles / g.groups;
            const int64_t c0 = tile * kChannels;
            const Phase pd = make_phase(direction, ad, d % num_phases(direction, ad));
            for (int64_t h = 0; h < dst_h; h++) {
                const Phase ph = make_phase(direction, ah, h % num_phases(direction, ah));
                gather_row(direction, g, pd, d / num_phases(direction, ad), ph, h / num_phases(direction, ah), group, c0, int(std::min<int64_t>(kChannels, dst_channels - c0)),
                           src + (n * g.groups + group) * src_channels * src_volume, w, bias ? bias + group * dst_channels : nullptr, apply_relu,
                           dst + ((n * g.groups + group) * dst_channels + c0) * dst_volume + (d * dst_h + h) * dst_w, sums.data());
            }
        }
    }
    return 0;
}

// ---------------------------------------------------------------------------------------- Parameters' gradients

template <typename T>
int dweight(const Geometry& g, int threads, const T* x, const T* dout, T* out) {
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t c_out = g.C_out / g.groups, c_in = g.C_in / g.groups, taps = kernel_volume(g);
    const int64_t src_volume = in_volume(g), dst_volume = out_volume(g);
    // Along an axis, tap k of input i lands on i * stride + (k * dilation - padding): dx's phase, read the other way.
    const Phase pd = make_phase(Direction::kDInput, ad, 0), ph = make_phase(Direction::kDInput, ah, 0), pw = make_phase(Direction::kDInput, aw, 0);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t ci = 0; ci < g.C_in; ci++)
    for (int64_t co = 0; co < c_out; co++) {
        std::vector<double> sums(taps, 0.0);
        for (int64_t n = 0; n < g.N; n++) {
            const T* x_volume = x + (n * g.C_in + ci) * src_volume;
            const T* dout_volume = dout + (n * g.C_out + ci / c_in * c_out + co) * dst_volume;
            for (int kd = 0; kd < pd.taps; kd++)
            for (int kh = 0; kh < ph.taps; kh++) {
                const Range rd = valid_range(pd, kd), rh = valid_range(ph, kh);
                for (int64_t d = rd.begin; d < rd.end; d++)
                for (int64_t h = rh.begin; h < rh.end; h++) {
                    const T* x_row = x_volume + (d * ah.in + h) * aw.in;
                    const T* dout_row = dout_volume + ((pd.src + d * pd.src_step + int64_t(kd) * pd.src_tap_step) * ah.out + ph.src + h * ph.src_step + int64_t(kh) * ph.src_tap_step) * aw.out;
                    for (int kw = 0; kw < pw.taps; kw++) {
                        const Range rw = valid_range(pw, kw);
                        const T* source = dout_row + pw.src + int64_t(kw) * pw.src_tap_step;
                        double sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t q = rw.begin; q < rw.end; q++) sum += double(x_row[q]) * double(source[q * pw.src_step]);
                        sums[(kd * ah.kernel + kh) * aw.kernel + kw] += sum;
                    }
                }
            }
        }
        for (int64_t k = 0; k < taps; k++) out[(ci * c_out + co) * taps + k] = T(sums[k]);
    }
    return 0;
}

template <typename T>
int dbias(const Geometry& g, int threads, const T* dout, T* out) {
    const int64_t volume = out_volume(g);
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < g.C_out; c++) {
        double sum = 0;
        for (int64_t n = 0; n < g.N; n++)
            for (int64_t i = 0; i < volume; i++) sum += dout[(n * g.C_out + c) * volume + i];
        out[c] = T(sum);
    }
    return 0;
}

// ----------------------------------------------------------------------------------------------- ReLU, GroupNorm

struct NormShape { int64_t N, C, S, num_groups; };    // as in relu_group_norm_generic.cu

template <typename T>
int group_norm_forward(const NormShape& s, int threads, const T* r, const T* gamma, const T* beta, double eps, T* y, double* statistics) {
    const int64_t channels = s.C / s.num_groups, count = channels * s.S;
    double *mean = statistics, *rstd = statistics + s.N * s.num_groups;    // (2, N, num_groups)
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < s.N * s.num_groups; group++) {
        const T* values = r + group * count;
        const double shift = values[0];    // sums of shifted values do not cancel
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < count; i++) {
            const double v = values[i] - shift;
            sum += v;
            squares += v * v;
        }
        const double variance = squares / count - sum / count * (sum / count);
        mean[group] = shift + sum / count;
        rstd[group] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
        for (int64_t i = 0; i < count; i++) {
            const int64_t c = (group * channels + i / s.S) % s.C;
            y[group * count + i] = T((values[i] - mean[group]) * rstd[group] * (gamma ? gamma[c] : T(1)) + (beta ? beta[c] : T(0)));
        }
    }
    return 0;
}

template <typename T>
int relu_group_norm_backward(const NormShape& s, int threads, const T* dy, const T* r, const double* statistics, const T* gamma, T* dz, T* dgamma, T* dbeta) {
    const int64_t channels = s.C / s.num_groups, count = channels * s.S;
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    std::vector<double> sums(s.N * s.C), products(s.N * s.C);    // per (n, c): sums of dy and of dy * xhat
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < s.N * s.C; row++) {
        const int64_t group = row / channels;
        for (int64_t i = row * s.S; i < (row + 1) * s.S; i++) {
            sums[row] += dy[i];
            products[row] += dy[i] * ((r[i] - mean[group]) * rstd[group]);
        }
    }
    for (int64_t c = 0; c < s.C; c++) {
        double sum = 0, product = 0;
        for (int64_t n = 0; n < s.N; n++) sum += sums[n * s.C + c], product += products[n * s.C + c];
        if (dbeta) dbeta[c] = T(sum);
        if (dgamma) dgamma[c] = T(product);
    }
    if (!dz) return 0;
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < s.N * s.num_groups; group++) {
        double mean1 = 0, mean2 = 0;
        for (int64_t row = group * channels; row < (group + 1) * channels; row++) {
            const double weight = gamma ? gamma[row % s.C] : T(1);
            mean1 += weight * sums[row] / count;
            mean2 += weight * products[row] / count;
        }
        for (int64_t i = group * count; i < (group + 1) * count; i++) {
            const double weight = gamma ? gamma[i / s.S % s.C] : T(1);
            const double dr = rstd[group] * (weight * dy[i] - mean1 - (r[i] - mean[group]) * rstd[group] * mean2);
            dz[i] = r[i] <= 0 ? T(0) : T(dr);    // NaN keeps its gradient, as in torch
        }
    }
    return 0;
}

template <typename F> int with_dtype(int dtype, F f) {
    if (dtype == 0) return f(float{});
    if (dtype == 1) return f(double{});
    return 1;
}

}  // namespace cpu_backend

// --------------------------------------------------------------------------------------------------- Entry points

using cpu_backend::with_dtype;

extern "C" int conv_transpose3d_forward_cpu(const Geometry* g, int dtype, int threads, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::gather<T>(Direction::kForward, *g, threads, (const T*)x, (const T*)w, (const T*)bias, apply_relu != 0, (T*)out);
    });
}

extern "C" int conv_transpose3d_dinput_cpu(const Geometry* g, int dtype, int threads, const void* dout, const void* w, void* dx) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::gather<T>(Direction::kDInput, *g, threads, (const T*)dout, (const T*)w, nullptr, false, (T*)dx);
    });
}

extern "C" int conv_transpose3d_dweight_cpu(const Geometry* g, int dtype, int threads, const void* x, const void* dout, void* dweight) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::dweight<T>(*g, threads, (const T*)x, (const T*)dout, (T*)dweight);
    });
}

extern "C" int conv_transpose3d_dbias_cpu(const Geometry* g, int dtype, int threads, const void* dout, void* dbias) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::dbias<T>(*g, threads, (const T*)dout, (T*)dbias);
    });
}

extern "C" int group_norm_forward_cpu(const cpu_backend::NormShape* s, int dtype, int threads, const void* r, const void* gamma, const void* beta, double eps, void* y, double* statistics) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::group_norm_forward<T>(*s, threads, (const T*)r, (const T*)gamma, (const T*)beta, eps, (T*)y, statistics);
    });
}

extern "C" int relu_group_norm_backward_cpu(const cpu_backend::NormShape* s, int dtype, int threads, const void* dy, const void* r, const double* statistics,
                                            const void* gamma, void* dz, void* dgamma, void* dbeta) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::relu_group_norm_backward<T>(*s, threads, (const T*)dy, (const T*)r, statistics, (const T*)gamma, (T*)dz, (T*)dgamma, (T*)dbeta);
    });
}
'''

# ---- end of the embedded copy of kernels/

_operators = _register_operators()
if "CONV_TRANSPOSE3D_NO_BUILD" not in os.environ:    # compile now, not at the first call (check.py --doctor only looks)
    _library("cuda" if torch.cuda.is_available() else "cpu")
