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
    """`Shape` of kernels/group_norm.cuh."""
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
# Every operation is a C function `<operation>_<path>`; its path is the first row of its table whose condition holds. A
# condition is a function of the geometry, the dtype, whether TF32 is allowed for float32, and the device.


def _always(geometry, dtype, tf32, device):
    return True


def _sm90_stride_1(geometry, dtype, tf32, device):
    """Hopper, stride 1, one group, kernels up to 7, TF32-equivalent arithmetic allowed, and enough work to fill tiles."""
    return (_capability(device.index) == (9, 0) and geometry.groups == 1 and (tf32 if dtype == torch.float32 else dtype != torch.float64)
            and all(axis.stride == 1 and axis.kernel <= 7 for axis in geometry.axis)
            and _multiply_adds(geometry) >= 2**24 and bool(_library("cuda").conv_transpose3d_sm90_supports(ctypes.addressof(geometry), device.index)))


def _multiply_adds(geometry):
    count = geometry.N * geometry.C_in * geometry.C_out // geometry.groups
    for axis in geometry.axis:
        count *= axis.out_size * axis.kernel
    return count


_PATHS = {
    # operation: ((path, condition), ...)
    "conv_transpose3d_forward": (("sm90", _sm90_stride_1), ("generic", _always)),
    "conv_transpose3d_relu_group_norm_forward": (("sm90", _sm90_stride_1), ("composed", _always)),    # composed of the operations above and below
    "conv_transpose3d_dinput": (("generic", _always),),
    "conv_transpose3d_dweight": (("generic", _always),),
    "conv_transpose3d_dbias": (("generic", _always),),
    "group_norm_forward": (("generic", _always),),
    "relu_group_norm_backward": (("generic", _always),),
}

# What follows an operation's common arguments: p a pointer, i an int, d a double.
_SIGNATURES = {
    "conv_transpose3d_forward": "pppip",            # x, weight, bias, relu; out
    "conv_transpose3d_relu_group_norm_forward": "pppppidppp",    # x, weight, bias, gamma, beta, num_groups, eps; activation, y, statistics
    "conv_transpose3d_dinput": "ppp",               # dout, weight; dx
    "conv_transpose3d_dweight": "ppp",              # x, dout; dweight
    "conv_transpose3d_dbias": "pp",                 # dout; dbias
    "group_norm_forward": "pppdpp",                 # r, gamma, beta, eps; y, statistics
    "relu_group_norm_backward": "ppppppp",          # dy, r, statistics, gamma; dz, dgamma, dbeta
}
_TWO_DTYPES = ("conv_transpose3d_relu_group_norm_forward", "group_norm_forward", "relu_group_norm_backward")    # the activation's and the output's


def select_path(operation, geometry, dtype, device):
    """The name of the path that runs ``operation`` (a key of the table above) on ``device`` at the flags in force."""
    return _select(operation, geometry, dtype, device, _tf32_allowed(dtype))


@functools.lru_cache(maxsize=4096)
def _select(operation, geometry, dtype, device, tf32):
    if device.type == "cpu":
        return "composed" if _PATHS[operation][-1][0] == "composed" else "cpu"
    return next(path for path, condition in _PATHS[operation] if condition(geometry, dtype, tf32, device))


def _tf32_allowed(dtype):
    """Whether torch lets cuDNN's convolutions round float32 to TF32."""
    if dtype != torch.float32:
        return False
    if hasattr(torch._C, "_get_fp32_precision_getter"):    # torch 2.9 and later, where the older flag cannot always be read
        return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"
    return torch.backends.cudnn.allow_tf32


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
def _resolve(operation, shape, dtypes, device, tf32):
    """(C function, its name, its first arguments, bytes of workspace); the shape structs are compared by identity, being cached themselves."""
    name = f"{operation}_{_select(operation, shape, dtypes[0], device, tf32)}"
    library = _library(device.type)
    if device.type == "cpu":
        return getattr(library, name), name, (ctypes.addressof(shape),), 0
    codes = [_DTYPES[dtype] for dtype in dtypes]
    workspace_bytes = getattr(library, f"{name}_workspace")(ctypes.addressof(shape), codes[0], device.index)
    return getattr(library, name), name, (ctypes.addressof(shape), *codes, device.index), workspace_bytes


def _launch(operation, shape, dtypes, device, inputs, outputs):
    """Runs ``operation`` on ``device``'s current stream: contiguous ``inputs`` (tensors, numbers or None) into ``outputs``."""
    function, name, first, workspace_bytes = _resolve(operation, shape, dtypes, device, _tf32_allowed(dtypes[0]))
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
    dtypes, gamma, beta = (input.dtype, output_dtype), _parameter(gn_weight, input), _parameter(gn_bias, input)
    if output.numel() and select_path("conv_transpose3d_relu_group_norm_forward", geometry, input.dtype, input.device) == "composed":
        _launch_forward(geometry, input, weight, bias, True, activation)
        _launch("group_norm_forward", norm_shape, dtypes, input.device, (activation, gamma, beta, eps), (output, statistics))
    elif output.numel():
        _launch("conv_transpose3d_relu_group_norm_forward", geometry, dtypes, input.device,
                (input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), gamma, beta, num_groups, eps), (activation, output, statistics))
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
    """Gives the C functions their argument types; the first is the address of the shape."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    kinds = {"p": pointer, "i": integer, "d": ctypes.c_double}
    for operation, signature in _SIGNATURES.items():
        arguments = [kinds[kind] for kind in signature]
        dtypes = [integer] * (2 if operation in _TWO_DTYPES else 1)
        for path in ("cpu",) if backend == "cpu" else [path for path, _ in _PATHS[operation]]:
            function = getattr(library, f"{operation}_{path}", None)
            if path == "cpu" and function:
                function.argtypes = [pointer, integer, integer, *arguments]    # shape, dtype, threads
            elif function:
                function.argtypes = [pointer, *dtypes, integer, pointer, pointer, *arguments]    # shape, dtypes, device, stream, workspace
                workspace = getattr(library, f"{operation}_{path}_workspace")
                workspace.argtypes, workspace.restype = [pointer, integer, integer], ctypes.c_int64
    if backend == "cuda":
        library.cuda_error_string.restype = ctypes.c_char_p
        library.conv_transpose3d_sm90_supports.argtypes = [pointer, integer]
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

extern "C" int64_t conv_transpose3d_forward_generic_workspace(const Geometry* g, int dtype, int) {
    return direct_generic::packed_count<Direction::kForward>(*g) * acc_bytes(dtype);
}

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return direct_generic::direct<Direction::kForward>(*g, dtype, stream, x, w, bias, apply_relu != 0, out, workspace);
}

extern "C" int64_t conv_transpose3d_dinput_generic_workspace(const Geometry* g, int dtype, int) {
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

extern "C" int64_t conv_transpose3d_dweight_generic_workspace(const Geometry* g, int dtype, int) {
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

extern "C" int64_t conv_transpose3d_dbias_generic_workspace(const Geometry* g, int, int) { return g->N * g->C_out * int64_t(sizeof(double)); }

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

_SOURCES['group_norm.cuh'] = r'''
// GroupNorm's elementwise half, which every path shares: y = (r - mean) * rstd * gamma + beta.
#pragma once

#include "launch.cuh"

namespace group_norm {

constexpr int kThreads = 256;
constexpr int kApplyElements = 8;            // of one thread of an elementwise kernel

// Mirrored by `_NormShape` in model_new.py.
struct Shape {
    int64_t N, C, S, num_groups;
    HOST_DEVICE int64_t group_channels() const { return C / num_groups; }
    HOST_DEVICE int64_t group_count() const { return group_channels() * S; }
};

// r - mean without losing the mean's low bits: the mean is kept as a sum of two numbers of the accumulation type.
template <typename A> struct Mean {
    A high, low;
    __device__ explicit Mean(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
    __device__ __forceinline__ A center(A r) const { return (r - high) - low; }
};

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

// Calls f with the types of r and of y: y is of r's type, or float32 after a low-precision r (autocast).
template <typename F> int with_dtypes(int r_dtype, int y_dtype, F f) {
    return with_dtype(r_dtype, [&](auto r) {
        if (y_dtype == r_dtype) return f(r, r);
        if (y_dtype == kFloat32 && acc_bytes(r_dtype) == 4) return f(r, float{});
        return int(cudaErrorInvalidValue);
    });
}

inline int64_t tiles_of(const Shape& s) { return ceil_div(s.S, kThreads * kApplyElements); }

template <typename T, typename Y>
int normalize(const Shape& s, void* stream, const void* r, const double* mean, const double* rstd, const void* gamma, const void* beta, void* y) {
    return launch(normalize_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const T*>(r), mean, rstd,
                  static_cast<const Acc<T>*>(gamma), static_cast<const Acc<T>*>(beta), static_cast<Y*>(y));
}

}  // namespace group_norm
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

#include "group_norm.cuh"

namespace relu_group_norm_generic {

using namespace group_norm;

constexpr int64_t kSplitElements = 16384;    // of one block of a reduction

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

}  // namespace relu_group_norm_generic

// ---------------------------------------------------------------------------------------------------- Launchers

using group_norm::Shape;

extern "C" int64_t group_norm_forward_generic_workspace(const Shape* s, int, int) {
    using namespace relu_group_norm_generic;
    return s->N * s->num_groups * ceil_div(s->group_count(), kSplitElements) * int64_t(sizeof(Pair));
}

// y may be r (in place) where the types agree.
extern "C" int group_norm_forward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
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
        return normalize<T, Y>(s, stream, r, mean, rstd, gamma, beta, y);
    });
}

extern "C" int64_t relu_group_norm_backward_generic_workspace(const Shape* s, int, int) {
    using namespace relu_group_norm_generic;
    return (s->N * s->C * (ceil_div(s->S, kSplitElements) + 1) + s->N * s->num_groups) * int64_t(sizeof(Pair));
}

// dz, or dgamma and dbeta, may be null: not wanted.
extern "C" int relu_group_norm_backward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
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

_SOURCES['ptx_sm90.cuh'] = r'''
// PTX instructions of sm_90a, one per wrapper, named after it. Reference: the PTX ISA's chapters "Asynchronous warpgroup
// level matrix instructions", "mbarrier" and "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include "launch.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_SM90A 1
#endif

// -------------------------------------------------------------------------------------------------- Shared memory

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Orders this thread's ordinary shared-memory writes before later accesses by the copy engine and the tensor cores.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for memory of any space, the global one included.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// barrier.sync among `threads` threads of the block
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ------------------------------------------------------------------------------------------------------- mbarrier

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// max that keeps NaN
__device__ __forceinline__ float max_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// A ring of stages: the position of one of its users.
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// ----------------------------------------------------------------------------------------------- Global memory flags

__device__ __forceinline__ unsigned ld_acquire_gpu(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// ------------------------------------------------------------------------------------- Tensor memory access (copy engine)

__device__ __forceinline__ void tma_load_3d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load_5d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// 16-byte aligned runs of bytes, without a tensor map
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* destination, const void* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(shared_address(source)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but kPending of this thread's groups have read their source.
template <int kPending> __device__ __forceinline__ void bulk_wait_group_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory"); }

// Waits until all of this thread's groups have written their destination.
__device__ __forceinline__ void bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// cuTensorMapEncodeTiled, looked up at run time so that nothing links libcuda.
using TensorMapEncode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                     CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline TensorMapEncode tensor_map_encode() {
    static const TensorMapEncode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<TensorMapEncode>(function);
    }();
    return encode;
}

// The swizzle whose span is one row of a tile: 128, 64 or 32 bytes.
inline CUtensorMapSwizzle swizzle_of(int row_bytes) {
    return row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// A map of a dense tensor; dims and box fastest first, rows of the box swizzled, zeros outside the tensor.
template <int kRank> int make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, const void* base, const int64_t (&dims)[kRank], const int (&box)[kRank]) {
    cuuint64_t sizes[kRank], strides[kRank];
    cuuint32_t boxes[kRank], steps[kRank];
    cuuint64_t stride = element_bytes;
    for (int i = 0; i < kRank; i++) {
        sizes[i] = dims[i], boxes[i] = box[i], steps[i] = 1;
        stride *= dims[i];
        strides[i] = stride;
    }
    if (!tensor_map_encode()) return cudaErrorNotSupported;
    const CUresult result = tensor_map_encode()(map, type, kRank, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                swizzle_of(box[0] * element_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// --------------------------------------------------------------------------------------------------------- wgmma

#ifdef HAS_SM90A

template <int kRegisters> __device__ __forceinline__ void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// A K-major operand of rows of 128, 64 or 32 bytes, swizzled over the row: everything of its descriptor but the address.
// The hardware swizzles absolute addresses, so the address may be any row of a tile, not only a multiple of eight.
__device__ __forceinline__ uint64_t wgmma_descriptor_base(int row_bytes) {
    const uint64_t layout = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return layout << 62 | uint64_t(8 * row_bytes / 16) << 32 | uint64_t(1) << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(uint64_t base, uint32_t address) { return base | (address & 0x3ffff) >> 4; }

// d (64, kN) += a (64, 16) * b (kN, 16) transposed; fp16 operands in shared memory, fp32 sums in registers:
// element i of lane l in warp w is row 16 * w + l / 4 + (i / 2 % 2) * 8, column i / 4 * 8 + l % 4 * 2 + i % 2.
template <int kN> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[kN / 2], uint64_t a, uint64_t b);

#define REGS10(t) "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define ACC10(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9])

template <> __device__ __forceinline__ void wgmma_m64k16_f16<64>(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " "%30, %31" "}, %32, %33, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<128>(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " "%60, %61, %62, %63" "}, %64, %65, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<160>(float (&d)[80], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") "}, %80, %81, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<192>(float (&d)[96], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " "%90, %91, %92, %93, %94, %95" "}, %96, %97, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<216>(float (&d)[108], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n216k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " "%100, %101, %102, %103, %104, %105, %106, %107" "}, %108, %109, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<232>(float (&d)[116], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n232k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " "%110, %111, %112, %113, %114, %115" "}, %116, %117, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]) : "l"(a), "l"(b));
}
template <> __device__ __forceinline__ void wgmma_m64k16_f16<256>(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " REGS10("11") ", " "%120, %121, %122, %123, %124, %125, %126, %127" "}, %128, %129, 1, 1, 1, 0, 0;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), ACC10(110), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) : "l"(a), "l"(b));
}

#undef REGS10
#undef ACC10

#endif  // HAS_SM90A
'''

_SOURCES['scaled_half.cuh'] = r'''
// The operands of the fp16 tensor-core paths: channels-last fp16 copies, scaled by powers of two.
//
// fp16 keeps as many mantissa bits as TF32 (10). Where a tensor's largest finite magnitude is scaled to 2^m <= 2^15, every
// element within 2^(m + 14) of it rounds exactly as TF32 rounds it, to nearest, and a smaller one is off by at most 2^-(m + 25)
// of the maximum. NaN and Inf stay what they are. Products of two such numbers are exact in float32.
//
// Weights have one scale per row (destination channel), from its maximum, with m = 15. Activations have one scale per sample,
// so that they are read once: the maximum of a part of the sample is scaled to [2^8, 2^9), the copy finds the true maximum on
// its way, and a sample that turns out to hold something 2^6 times larger is copied again, its maximum scaled to [2^14, 2^15).
// The maxima live in device memory: nothing synchronises with the host.
#pragma once

#include "launch.cuh"

namespace scaled_half {

constexpr int kThreads = 256;
constexpr int kMaxShift = 120;             // keeps the scale and its inverse normal float32 numbers

__device__ __forceinline__ int clamp_shift(int shift) { return shift < kMaxShift ? shift : kMaxShift; }
__device__ __forceinline__ int exponent_of(unsigned magnitude_bits) { return int(magnitude_bits >> 23) - 127; }

// scale = 2^shift, from the bits of the largest finite magnitude
__device__ __forceinline__ int shift_of(unsigned max_bits) { return max_bits == 0 ? 0 : clamp_shift(14 - exponent_of(max_bits)); }

// The bits of the largest finite magnitude of a sample: of the part that was looked at first, and of all.
struct SampleMax { unsigned part, all; };

__device__ __forceinline__ int first_shift_of(SampleMax m) { return m.part == 0 ? 0 : clamp_shift(8 - exponent_of(m.part)); }
// Whether the first copy holds: nothing overflowed, and there was something to look at.
__device__ __forceinline__ bool first_copy_holds(SampleMax m) { return m.part != 0 ? exponent_of(m.all) + first_shift_of(m) <= 14 : m.all == 0; }
__device__ __forceinline__ int shift_of(SampleMax m) { return first_copy_holds(m) ? first_shift_of(m) : shift_of(m.all); }

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ unsigned finite_magnitude(float v) {
    const unsigned bits = __float_as_uint(v) & 0x7fffffff;
    return bits < 0x7f800000 ? bits : 0;
}

// ---------------------------------------------------------------------------------------------------- Parameters

// x (N, C, S) of the input's dtype -> activation (N, S, C_pad) fp16, zeros in the added channels.
// w (rows x columns channels, taps) -> weight (taps, M_pad, C_pad) fp16, zeros in the added rows and columns.
struct Pack {
    int64_t N, C, S, C_pad;
    int64_t rows, M_pad, taps;                     // rows: destination channels; its columns are the C source channels
    int64_t row_stride, column_stride;             // of w, in elements; taps are contiguous
    bool flip;                                     // take tap taps - 1 - k in place of k
    const void *x, *w;
    __half *activation, *weight;
    SampleMax* activation_max;                     // (N), starts at zero
    unsigned* weight_max;                          // (M_pad)
};

constexpr int kLookElements = 4096;                // of one block's look at a part of a sample
constexpr int kLookShare = 16;                     // a sixteenth of a sample is looked at, or all of a small one
constexpr int64_t kSmallSample = 1 << 16;
constexpr int kPositions = 128, kChannels = 64;    // of one block of the copy

HOST_DEVICE int64_t look_blocks(const Pack& p) {
    const int64_t elements = p.C * p.S;
    return ceil_div(elements > kSmallSample ? (elements / kLookShare > kSmallSample ? elements / kLookShare : kSmallSample) : elements, kLookElements);
}

// -------------------------------------------------------------------------------------------------------- Kernel

// The maximum over the block, in every thread.
__device__ __forceinline__ unsigned block_max(unsigned v) {
    __shared__ unsigned warps[kThreads / 32];
    v = __reduce_max_sync(~0u, v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    unsigned max = 0;
    for (int i = 0; i < kThreads / 32; i++) max = warps[i] > max ? warps[i] : max;
    return max;
}

// One destination channel of the weight.
template <typename T> __device__ void pack_weight_row(const Pack& p, int64_t row) {
    const T* w = static_cast<const T*>(p.w) + row * p.row_stride;
    const int taps = p.taps, C = p.C, C_pad = p.C_pad, live = row < p.rows ? C * taps : 0;
    unsigned max = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < live; i += kThreads) max = umax(max, finite_magnitude(to_acc(w[i / taps * p.column_stride + i % taps])));
    max = block_max(max);
    const float scale = power_of_two(shift_of(max));
#pragma unroll 8
    for (int i = threadIdx.x; i < taps * C_pad; i += kThreads) {
        const int tap = i / C_pad, c = i % C_pad;
        const float v = row < p.rows && c < C ? to_acc(w[c * p.column_stride + (p.flip ? taps - 1 - tap : tap)]) : 0.0f;
        p.weight[(tap * p.M_pad + row) * C_pad + c] = __float2half_rn(v * scale);
    }
    if (threadIdx.x == 0) p.weight_max[row] = max;
}

// The weight's rows, and a look at parts of every sample, evenly spread.
template <typename T> __global__ void __launch_bounds__(kThreads) look_kernel(Pack p) {
    if (blockIdx.x < p.M_pad) return pack_weight_row<T>(p, blockIdx.x);
    const int64_t blocks = look_blocks(p), elements = p.C * p.S;
    const int64_t n = (blockIdx.x - p.M_pad) / blocks, block = (blockIdx.x - p.M_pad) % blocks;
    const int64_t last = elements > kLookElements ? elements - kLookElements : 0;
    const int64_t begin = blocks > 1 ? last * block / (blocks - 1) : 0;
    const T* part = static_cast<const T*>(p.x) + n * elements + begin;
    const int count = elements < kLookElements ? elements : kLookElements;
    unsigned max = 0;
#pragma unroll 16
    for (int i = threadIdx.x; i < count; i += kThreads) max = umax(max, finite_magnitude(to_acc(part[i])));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(&p.activation_max[n].part, max);
}

// kChannels x kPositions of one sample from (c0, s0) on, transposed through shared memory; returns the thread's maximum.
template <typename T> __device__ unsigned copy_tile(const Pack& p, int64_t n, int64_t c0, int64_t s0, float scale) {
    __shared__ __half2 tile[kPositions][kChannels / 2 + 1];    // (positions, channel pairs), padded: no bank conflicts
    const T* source = static_cast<const T*>(p.x) + n * p.C * p.S + s0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned max = 0;
#pragma unroll
    for (int half = 0; half < kPositions / 32; half++) {
        const int s = half * 32 + lane;
#pragma unroll
        for (int i = 0; i < kChannels / 2 / (kThreads / 32); i++) {
            const int pair = warp + i * (kThreads / 32);
            const int64_t c = c0 + 2 * pair;
            const bool inside = s0 + s < p.S;
            const float low = inside && c < p.C ? to_acc(source[c * p.S + s]) : 0.0f;
            const float high = inside && c + 1 < p.C ? to_acc(source[(c + 1) * p.S + s]) : 0.0f;
            max = umax(max, umax(finite_magnitude(low), finite_magnitude(high)));
            tile[s][pair] = __floats2half2_rn(low * scale, high * scale);
        }
    }
    __syncthreads();
    constexpr int kVectors = kChannels / 8;                    // of 16 bytes per position
    for (int i = threadIdx.x; i < kPositions * kVectors; i += kThreads) {
        const int s = i / kVectors, v = i % kVectors;
        if (s0 + s >= p.S || c0 + v * 8 >= p.C_pad) continue;
        uint4 value;
        value.x = *reinterpret_cast<const unsigned*>(&tile[s][v * 4]);
        value.y = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 1]);
        value.z = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 2]);
        value.w = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 3]);
        *reinterpret_cast<uint4*>(p.activation + (n * p.S + s0 + s) * p.C_pad + c0 + v * 8) = value;
    }
    return max;
}

HOST_DEVICE int64_t tiles_of_sample(const Pack& p) { return ceil_div(p.S, kPositions) * ceil_div(p.C_pad, kChannels); }

template <typename T> __device__ unsigned copy_tile(const Pack& p, int64_t n, int64_t tile, float scale) {
    const int64_t channel_blocks = ceil_div(p.C_pad, kChannels);
    return copy_tile<T>(p, n, tile % channel_blocks * kChannels, tile / channel_blocks * kPositions, scale);
}

template <typename T> __global__ void __launch_bounds__(kThreads) copy_kernel(Pack p) {
    const int64_t n = blockIdx.x / tiles_of_sample(p);
    const unsigned max = block_max(copy_tile<T>(p, n, blockIdx.x % tiles_of_sample(p), power_of_two(first_shift_of(p.activation_max[n]))));
    if (threadIdx.x == 0 && max > p.activation_max[n].all) atomicMax(&p.activation_max[n].all, max);
}

// Copies again the samples whose first copy does not hold: mostly none.
template <typename T> __global__ void __launch_bounds__(kThreads) copy_again_kernel(Pack p) {
    for (int64_t n = 0; n < p.N; n++) {
        if (first_copy_holds(p.activation_max[n])) continue;
        const float scale = power_of_two(shift_of(p.activation_max[n]));
        for (int64_t tile = blockIdx.x; tile < tiles_of_sample(p); tile += gridDim.x) {
            copy_tile<T>(p, n, tile, scale);
            __syncthreads();
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

template <typename T> int pack(const Pack& p, int multiprocessors, void* stream) {
    RETURN_IF_ERROR(launch(look_kernel<T>, p.M_pad + p.N * look_blocks(p), kThreads, stream, p));
    RETURN_IF_ERROR(launch(copy_kernel<T>, p.N * tiles_of_sample(p), kThreads, stream, p));
    return launch(copy_again_kernel<T>, multiprocessors * 2, kThreads, stream, p);
}

}  // namespace scaled_half
'''

_SOURCES['conv_transpose3d_forward_sm90.cu'] = r'''
// Transposed convolution of stride 1 on Hopper's tensor cores, alone or with ReLU and GroupNorm behind it.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, o + padding - k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh; TF32-equivalent), channels-last: GEMM_M = output channels, GEMM_N =
// positions of one (n, d) plane of the output, GEMM_K = (tap, input channel).
//
// A block is 1 producer and 2 consumer warpgroups, one block per multiprocessor, taking tiles from a queue. The producer
// copies a box of the input plane, halo included, once for all taps (kh, kw): positions are numbered along rows of `pitch`,
// and a tap is a shift of the wgmma descriptor's start address by whole rows of shared memory. The weights of each tap
// stream through a ring of stages. Where the whole width fits, neighbouring rows share the zeros of their halos.
//
// Fused: the epilogue writes relu(out) and, per tile and channel, the mean and the sum of squared deviations. The other warps
// of the producer's warpgroup combine these and normalize the samples that are complete, from L2, while the tensor cores
// work on the next ones. Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#include "group_norm.cuh"
#include "ptx_sm90.cuh"
#include "scaled_half.cuh"

namespace conv_sm90 {

// ---------------------------------------------------------------------------------------------------------- Tiling

constexpr int kWarpgroupM = 64;                // output channels of a warpgroup
constexpr int kMaxStages = 8;
constexpr int kInputStages = 2;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kThreads = 384;
constexpr int kNormStages = 5, kNormBytes = 4096;    // of the ring through which samples are normalized
constexpr int kSlice = 32;                           // positions of a warp's slice (16 channels) of the output on its way through shared memory
constexpr int kSliceFloats = 16 * kSlice;            // rows of 128 bytes, swizzled as the copy engine swizzles them
constexpr int kSliceBytes = 2 * kSliceFloats * 4;    // of one warp: one slice is filled while the other is stored
constexpr int kConstantBytes = 16 * 16;              // of one warp: what its 16 channels need
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// How the output is cut into tiles, and where a tile finds its input. Chosen by choose_tiling.
struct Tiling {
    int block_n;           // positions of a warpgroup
    int split_m;           // 1: the two warpgroups have the same positions, other channels; 0: the other way round
    int chunk;             // input channels of a stage: 16, 32 or 64
    int C_pad, M_pad;      // channels of the scratch copies
    int pitch;             // positions from one output row to the next, in a tile's numbering and in its box
    int tile_w, w_tiles;   // output columns of a tile
    int positions;         // of a block: block_n or 2 * block_n
    int contiguous;        // 1: a tile is one run of the output plane, which the copy engine stores
    int vectors;           // 1: four positions at a multiple of four are neighbours in memory, all inside the output or all outside
    int plane_tiles;       // tiles of one plane of H_out rows
    int box_rows;          // of the input, halo included
    int kh_per_box;        // taps kh that a box serves: all, or 1
    int input_bytes, weight_bytes, weight_stages;    // of a stage; a stage of input ends with a margin of zeros
    int64_t m_tiles, sample_tiles, tiles;
};

struct Problem {
    Geometry g;
    Tiling t;
};

inline int round_up(int64_t v, int64_t to) { return int(ceil_div(v, to) * to); }

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory.
inline Tiling choose_tiling(const Geometry& g, int multiprocessors) {
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t halo_h = (ah.kernel - 1) * ah.dilation, halo_w = (aw.kernel - 1) * aw.dilation;
    Tiling best = {};
    double best_time = 0;
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {256, 232, 192, 160, 128, 64})
    for (int64_t w_tiles = 1; w_tiles <= ceil_div(aw.out, 8) && w_tiles <= 64; w_tiles++)
    for (int kh_per_box : {int(ah.kernel), 1}) {
        Tiling t = {};
        t.block_n = block_n, t.split_m = split_m, t.kh_per_box = kh_per_box;
        t.chunk = g.C_in <= 16 ? 16 : g.C_in <= 32 ? 32 : 64;
        t.C_pad = round_up(g.C_in, t.chunk);
        const int block_m = split_m ? 2 * kWarpgroupM : kWarpgroupM;
        t.M_pad = round_up(g.C_out, block_m);
        t.w_tiles = w_tiles, t.tile_w = ceil_div(aw.out, w_tiles);
        int64_t pitch = t.tile_w + halo_w;
        // Rows share their zeros. Where rows are multiples of four positions, vectors never straddle their ends.
        if (w_tiles == 1) pitch = t.tile_w + (aw.padding < halo_w ? aw.padding : halo_w);
        if (pitch != aw.out && aw.out % 4 == 0 && t.tile_w % 4 == 0) pitch = ceil_div(pitch, 4) * 4;
        t.contiguous = w_tiles == 1 && pitch == aw.out && ah.out * aw.out % 4 == 0;
        t.vectors = t.contiguous || (pitch % 4 == 0 && aw.out % 4 == 0 && t.tile_w % 4 == 0);
        t.positions = split_m ? block_n : 2 * block_n;
        const int64_t row_bytes = 2 * t.chunk;
        const int64_t rows = (pitch + t.positions - 2) / pitch + 1 + (kh_per_box == 1 ? 0 : halo_h);
        if (pitch > 256 || rows > 256) continue;
        t.pitch = pitch, t.box_rows = rows;
        t.plane_tiles = ceil_div(ah.out * pitch, t.positions);
        t.input_bytes = round_up((rows * pitch + halo_w) * row_bytes, 1024);
        t.weight_bytes = block_m * row_bytes;
        const int64_t left = kSharedBytes - 1024 - kNormStages * kNormBytes - 8 * (kSliceBytes + kConstantBytes) - int64_t(kInputStages) * t.input_bytes;
        t.weight_stages = left / t.weight_bytes < kMaxStages ? left / t.weight_bytes : kMaxStages;
        if (left < 0 || t.weight_stages < 3) continue;
        t.m_tiles = t.M_pad / block_m;
        t.sample_tiles = ad.out * t.w_tiles * t.plane_tiles * t.m_tiles;
        t.tiles = g.N * t.sample_tiles;
        // Time of the busiest multiprocessor, in columns of wgmma: the tile's own, and a constant share for what is not overlapped.
        const double boxes = kh_per_box == 1 ? double(ah.kernel) : 1.0;
        const double load = 0.15 * boxes * rows * pitch / (ah.kernel * aw.kernel);
        const double stages = t.weight_stages < 4 ? 1.1 : 1.0;
        const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors + 0.5;
        const double time = waves * (2 * block_n + 24 + load) * stages;
        if (best.block_n == 0 || time < best_time) best = t, best_time = time;
    }
    return best;
}

// ---------------------------------------------------------------------------------------------------- Parameters

// Scratch of a call. Counters start at zero.
struct Workspace {
    unsigned *tile_ticket, *group_ticket, *row_ticket;    // queues
    unsigned *tiles_done, *groups_done;    // (N): warpgroups that finished a tile, groups with final statistics
    float2* moments;                       // (N, parts, M_pad): mean and sum of squared deviations of a tile's channel
    float* counts;                         // (N, parts): how many values they are of
};

struct Fusion {
    int64_t num_groups;                    // 0: convolution alone
    bool in_kernel;                        // normalize while the convolution runs; else only the statistics are computed
    double eps;
    const float *gamma, *beta;             // (C_out), or null
    void* y;                               // (N, C_out, D_out, H_out, W_out); may be `out`
    double *mean, *rstd;                   // (N, num_groups)
};

struct Parameters {
    Problem p;
    int dtype;
    bool apply_relu;
    bool bulk_store;    // by the copy engine: float32, contiguous tiles
    const void* bias;
    void* out;
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (M_pad)
    Workspace workspace;
    Fusion fusion;
};

// A stage of the ring through which samples are normalized.
struct NormPiece {
    float high, low, scale, offset;        // y = ((r - high) - low) * scale + offset
    float* y;
    int bytes;                             // 0: no more
};

struct SharedHead {
    uint64_t input_full[kInputStages], input_empty[kInputStages];
    uint64_t weight_full[kMaxStages], weight_empty[kMaxStages];
    uint64_t tile_full[2], tile_empty[2];
    uint64_t norm_full[kNormStages], norm_empty[kNormStages];
    int tiles[2];
    NormPiece pieces[kNormStages];
};
static_assert(sizeof(SharedHead) <= 1024, "the stages begin 1 KB into shared memory");

// Where a tile is.
struct Tile {
    int64_t n;
    int d, w0, h0, q0, m0, part;    // first row of the box's outputs, position of the tile in it, first channel, part of the statistics
    int64_t p0;                     // first position in the plane
};

__device__ __forceinline__ Tile locate(const Problem& problem, int64_t index) {
    const Tiling& t = problem.t;
    Tile tile;
    tile.m0 = index % t.m_tiles * (t.split_m ? 2 * kWarpgroupM : kWarpgroupM);
    index /= t.m_tiles;
    tile.part = index % (t.sample_tiles / t.m_tiles);
    tile.p0 = index % t.plane_tiles * t.positions;
    index /= t.plane_tiles;
    tile.w0 = index % t.w_tiles * t.tile_w;
    index /= t.w_tiles;
    tile.d = index % problem.g.axis[0].out;
    tile.n = index / problem.g.axis[0].out;
    tile.h0 = tile.p0 / t.pitch;
    tile.q0 = tile.p0 % t.pitch;
    return tile;
}

// The plane of the input that tap kd of output plane d reads, or -1.
__device__ __forceinline__ int source_plane(const Geometry& g, int d, int kd) {
    const int plane = d + int(g.axis[0].padding) - kd * int(g.axis[0].dilation);
    return plane < int(g.axis[0].in) ? plane : -1;
}

#ifdef HAS_SM90A

// ------------------------------------------------------------------------------------------------------- Producer

// One thread: takes tiles from the queue, tells the consumers, loads boxes of input and stages of weights.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap* x_map, const CUtensorMap* w_map, SharedHead& head, uint8_t* input, uint8_t* weights) {
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const Axis &ah = g.axis[1], &aw = g.axis[2];
    const int K_d = g.axis[0].kernel, K_h = ah.kernel, K_w = aw.kernel;
    const int box_bytes = t.box_rows * t.pitch * t.chunk * 2;
    RingPosition in, weight, slot;
    unsigned next = atomicAdd(a.workspace.tile_ticket, 1u);
    while (true) {
        const int64_t index = next;
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        head.tiles[slot.stage] = index < t.tiles ? int(index) : -1;
        mbarrier_arrive(head.tile_full + slot.stage);
        slot.advance(2);
        if (index >= t.tiles) return;
        next = atomicAdd(a.workspace.tile_ticket, 1u);
        const Tile tile = locate(a.p, index);
        const int w_start = tile.w0 + int(aw.padding) - (K_w - 1) * int(aw.dilation);
        for (int kd = 0; kd < K_d; kd++) {
            const int plane = source_plane(g, tile.d, kd);
            if (plane < 0) continue;
            for (int kh0 = 0; kh0 < K_h; kh0 += t.kh_per_box)
            for (int c = 0; c < t.C_pad; c += t.chunk) {
                const int h_start = tile.h0 + int(ah.padding) - (kh0 + t.kh_per_box - 1) * int(ah.dilation);
                mbarrier_wait(head.input_empty + in.stage, in.phase ^ 1);
                mbarrier_arrive_expect_tx(head.input_full + in.stage, box_bytes);
                tma_load_5d(input + in.stage * t.input_bytes, x_map, head.input_full + in.stage, c, w_start, h_start, plane, int(tile.n));
                in.advance(kInputStages);
                for (int kh = kh0; kh < kh0 + t.kh_per_box; kh++)
                for (int kw = 0; kw < K_w; kw++) {
                    mbarrier_wait(head.weight_empty + weight.stage, weight.phase ^ 1);
                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, t.weight_bytes);
                    tma_load_3d(weights + weight.stage * t.weight_bytes, w_map, head.weight_full + weight.stage, c, tile.m0, (kd * K_h + kh) * K_w + kw);
                    weight.advance(t.weight_stages);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------- Consumer

// Tells that this warpgroup's part of a tile of sample n is in global memory.
__device__ __forceinline__ void signal_done(const Parameters& a, int64_t n) {
    if (threadIdx.x % 32 == 0) {
        bulk_wait_group();
        fence_proxy_async_all();
    }
    named_barrier(threadIdx.x / 128, 128);
    if (threadIdx.x % 128 == 0) {
        __threadfence();
        atomicAdd(a.workspace.tiles_done + n, 1u);
    }
}

// The sums of one tile: d (64 channels, kBlockN positions) of this warpgroup. kSteps: chunk / 16; known to the compiler, or
// it would wait for each wgmma by itself.
template <int kBlockN, int kSteps>
__device__ __forceinline__ void multiply(const Parameters& a, const Tile& tile, SharedHead& head, const uint8_t* input, const uint8_t* weights,
                                         RingPosition& in, RingPosition& weight, int64_t& pending, float (&d)[kBlockN / 2]) {
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const int warpgroup = threadIdx.x / 128 - 1;
    const bool elected = threadIdx.x % 128 == 0;
    constexpr int row_bytes = kSteps * 32;
    const int K_d = g.axis[0].kernel, K_h = g.axis[1].kernel, K_w = g.axis[2].kernel;
    const int dilation_h = g.axis[1].dilation, dilation_w = g.axis[2].dilation;
    const uint64_t descriptor = wgmma_descriptor_base(row_bytes);
    const int a_offset = t.split_m ? warpgroup * kWarpgroupM * row_bytes : 0;
    const int b_row = tile.q0 + (t.split_m ? 0 : warpgroup * kBlockN);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
    int done_weight = -1, done_input = -1;    // stages whose last reader is the wgmma group in flight
    for (int kd = 0; kd < K_d; kd++) {
        if (source_plane(g, tile.d, kd) < 0) continue;
        for (int kh0 = 0; kh0 < K_h; kh0 += t.kh_per_box)
        for (int c = 0; c < t.C_pad; c += t.chunk) {
            mbarrier_wait(head.input_full + in.stage, in.phase);
            const uint32_t box = shared_address(input + in.stage * t.input_bytes) + b_row * row_bytes;
            for (int kh = t.kh_per_box - 1; kh >= 0; kh--)
            for (int kw = K_w - 1; kw >= 0; kw--) {
                const uint32_t b = box + (kh * dilation_h * t.pitch + kw * dilation_w) * row_bytes;
                mbarrier_wait(head.weight_full + weight.stage, weight.phase);
                const uint32_t w = shared_address(weights + weight.stage * t.weight_bytes) + a_offset;
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < kSteps; step++) wgmma_m64k16_f16<kBlockN>(d, wgmma_descriptor(descriptor, w + step * 32), wgmma_descriptor(descriptor, b + step * 32));
                wgmma_commit_group();
                if (pending >= 0) {    // by now the previous tile's stores are through: the fence costs little
                    signal_done(a, pending);
                    pending = -1;
                }
                wgmma_wait_group<1>();
                if (elected && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
                if (elected && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
                done_input = -1, done_weight = weight.stage;
                weight.advance(t.weight_stages);
            }
            done_input = in.stage;
            in.advance(kInputStages);
        }
    }
    wgmma_wait_group<0>();
    if (elected && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
    if (elected && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
}

__device__ __forceinline__ float load_as_float(const void* p, int dtype, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    return dtype == kFloat16 ? to_acc(static_cast<const __half*>(p)[i]) : to_acc(static_cast<const __nv_bfloat16*>(p)[i]);
}

// kCount neighbours, at a multiple of kCount
template <int kCount> __device__ __forceinline__ void store(void* p, int dtype, int64_t i, const float (&v)[kCount]) {
    if constexpr (kCount == 4) {
        if (dtype == kFloat32) {
            *reinterpret_cast<float4*>(static_cast<float*>(p) + i) = make_float4(v[0], v[1], v[2], v[3]);
        } else if (dtype == kFloat16) {
            reinterpret_cast<__half2*>(static_cast<__half*>(p) + i)[0] = __floats2half2_rn(v[0], v[1]);
            reinterpret_cast<__half2*>(static_cast<__half*>(p) + i)[1] = __floats2half2_rn(v[2], v[3]);
        } else {
            reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p) + i)[0] = __floats2bfloat162_rn(v[0], v[1]);
            reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p) + i)[1] = __floats2bfloat162_rn(v[2], v[3]);
        }
    } else {
        if (dtype == kFloat32) static_cast<float*>(p)[i] = v[0];
        else if (dtype == kFloat16) static_cast<__half*>(p)[i] = from_acc<__half>(v[0]);
        else static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(v[0]);
    }
}

// The sum over aligned runs of kLanes lanes.
template <int kLanes> __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

// Scales back, adds the bias, applies ReLU, stores, and leaves the tile's moments where the fusion wants them. A warp has 16
// channels; it passes kSlice positions at a time through shared memory, from where a lane takes kVector neighbouring ones.
template <int kBlockN, int kVector>
__device__ __forceinline__ void finish(const Parameters& a, const CUtensorMap* out_map, const Tile& tile, float* slices, float4* constants, const float (&d)[kBlockN / 2]) {
    constexpr int kLanes = kSlice / kVector;       // lanes of a row
    constexpr int kRows = 32 / kLanes;             // rows of a step
    constexpr int kSteps = 16 / kRows;
    constexpr int kSlices = (kBlockN + kSlice - 1) / kSlice;
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const int warpgroup = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int H = g.axis[1].out, W = g.axis[2].out;
    const int width = min(t.tile_w, W - tile.w0), height = H - tile.h0;
    const int64_t plane = int64_t(H) * W, volume = g.axis[0].out * plane;
    const uint32_t magic = 0xffffffffu / t.pitch + 1;    // p / pitch = p * magic >> 32 for p < 2^16, pitch > 1
    const bool fused = a.fusion.num_groups > 0, bulk = kVector == 4 && a.bulk_store;
    const int block0 = t.split_m ? 0 : warpgroup * kBlockN, first = tile.q0 + block0 + lane % kLanes * kVector;
    const int warp_channel = tile.m0 + (t.split_m ? warpgroup * kWarpgroupM : 0) + warp * 16, channel0 = warp_channel + lane / kLanes;    // of step 0
    const int64_t base = (tile.n * g.C_out + channel0) * volume + tile.d * plane + int64_t(tile.h0) * W + tile.w0;
    const float first_scale = scaled_half::power_of_two(-scaled_half::shift_of(a.activation_max[tile.n]));
    const float lowest = a.apply_relu ? 0.0f : -INFINITY;
    // A channel's scale, its bias, and the shift of its moments: the mean of its first values, which bounds what the variance
    // can cancel.
    __syncwarp();
    if (lane < 16) {
        const int channel = warp_channel + lane;
        constants[lane] = make_float4(scaled_half::power_of_two(-scaled_half::shift_of(a.weight_max[channel])),
                                      a.bias && channel < g.C_out ? load_as_float(a.bias, a.dtype, channel) : 0.0f, 0.0f, 0.0f);
    }
    float sum[kSteps] = {}, squares[kSteps] = {}, count = 0.0f;
    bool shifted = false;

#pragma unroll
    for (int s = 0; s < kSlices; s++) {
        float* slice = slices + s % 2 * kSliceFloats;
        auto at = [slice](int row, int position) { return slice + row * kSlice + ((position / 4 ^ row % 8) * 4 | position % 4); };
        if (bulk && lane == 0) bulk_wait_group_read<1>();    // the store before last has left this slice
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kSlice / 8; j++)
            if (s * kSlice / 8 + j < kBlockN / 8)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = (s * kSlice / 8 + j) * 4 + half * 2;
                    *reinterpret_cast<float2*>(at(lane / 4 + half * 8, j * 8 + lane % 4 * 2)) = make_float2(d[i], d[i + 1]);
                }
        __syncwarp();
        const int p = first + s * kSlice;
        const int h = t.pitch == 1 ? p : int(__umulhi(p, magic)), w = p - h * t.pitch;
        const bool inside = w < width && h < height && s * kSlice + lane % kLanes * kVector < kBlockN;
        const bool whole = (s + 1) * kSlice <= kBlockN;      // the last slice may end within the next tile
        const int64_t offset = base + h * W + w;
        float v[kSteps][kVector];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const int row = step * kRows + lane / kLanes;
            float* source = at(row, lane % kLanes * kVector);
            if constexpr (kVector == 4) {
                const float4 four = *reinterpret_cast<const float4*>(source);
                v[step][0] = four.x, v[step][1] = four.y, v[step][2] = four.z, v[step][3] = four.w;
            } else {
                v[step][0] = *source;
            }
            const float2 scale_bias = *reinterpret_cast<const float2*>(constants + row);
#pragma unroll
            for (int e = 0; e < kVector; e++) v[step][e] = max_nan(fmaf(v[step][e] * first_scale, scale_bias.x, scale_bias.y), lowest);
            if (bulk && whole) store<kVector>(source, kFloat32, 0, v[step]);
            else if (inside && channel0 + step * kRows < g.C_out) store(a.out, a.dtype, offset + step * kRows * volume, v[step]);
        }
        if (bulk && whole) {
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) {
                tma_store_4d(out_map, slice, int(tile.p0) + block0 + s * kSlice, tile.d, warp_channel, int(tile.n));
                bulk_commit_group();
            }
        }
        if (!fused) continue;
        const float here = inside ? float(kVector) : 0.0f;
        if (!shifted && __any_sync(~0u, inside)) {
            shifted = true;
            const float total = lanes_sum<kLanes>(here);
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                float of_lane = 0.0f;
#pragma unroll
                for (int e = 0; e < kVector; e++) of_lane += v[step][e];
                const float shift = lanes_sum<kLanes>(inside ? of_lane : 0.0f) / total;
                if (lane % kLanes == 0) constants[step * kRows + lane / kLanes].z = shift;
            }
            __syncwarp();
        }
        count += here;
        if (inside)
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const float shift = constants[step * kRows + lane / kLanes].z;
#pragma unroll
                for (int e = 0; e < kVector; e++) {
                    const float deviation = v[step][e] - shift;
                    sum[step] += deviation;
                    squares[step] = fmaf(deviation, deviation, squares[step]);
                }
            }
    }
    if (!fused) return;

    const float total = lanes_sum<kLanes>(count), inverse = total > 0 ? 1.0f / total : 0.0f;
    const int64_t parts = t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2);
    const int64_t part = tile.n * parts + (t.split_m ? tile.part : tile.part * 2 + warpgroup);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        const float row_sum = lanes_sum<kLanes>(sum[step]), row_squares = lanes_sum<kLanes>(squares[step]);
        const float mean = row_sum * inverse;
        if (lane % kLanes == 0) {
            const float shift = constants[step * kRows + lane / kLanes].z;
            a.workspace.moments[part * t.M_pad + channel0 + step * kRows] = make_float2(shift + mean, row_squares - row_sum * mean);
        }
    }
    if (lane == 0 && warp == 0) a.workspace.counts[part] = total;    // the same from every tile of these positions
}

template <int kBlockN>
__device__ __forceinline__ void consume(const Parameters& a, const CUtensorMap* out_map, SharedHead& head, const uint8_t* input, const uint8_t* weights, uint8_t* slices) {
    RingPosition in, weight, slot;
    float d[kBlockN / 2];
    int64_t pending = -1;    // the sample of the tile that is finished but not yet signalled
    const int consumer_warp = threadIdx.x / 32 - 4;
    float* slice = reinterpret_cast<float*>(slices + consumer_warp * kSliceBytes);
    float4* constants = reinterpret_cast<float4*>(slices + 8 * kSliceBytes + consumer_warp * kConstantBytes);
    while (true) {
        mbarrier_wait(head.tile_full + slot.stage, slot.phase);
        const int index = head.tiles[slot.stage];
        mbarrier_arrive(head.tile_empty + slot.stage);
        slot.advance(2);
        if (index < 0) break;
        const Tile tile = locate(a.p, index);
        switch (a.p.t.chunk) {
            case 64: multiply<kBlockN, 4>(a, tile, head, input, weights, in, weight, pending, d); break;
            case 32: multiply<kBlockN, 2>(a, tile, head, input, weights, in, weight, pending, d); break;
            default: multiply<kBlockN, 1>(a, tile, head, input, weights, in, weight, pending, d); break;
        }
        if (a.p.t.vectors) finish<kBlockN, 4>(a, out_map, tile, slice, constants, d);
        else finish<kBlockN, 1>(a, out_map, tile, slice, constants, d);
        if (a.fusion.num_groups > 0) pending = tile.n;
    }
    if (pending >= 0) signal_done(a, pending);
    if (threadIdx.x % 32 == 0) bulk_wait_group();
}

// ----------------------------------------------------------------------------------------------------- Normalizer
//
// Three warps: one combines moments, one loads rows of complete samples into a ring, one normalizes them and sends them back.
// Their queues are taken in order, so each waits only for tiles and groups that running blocks have taken before.

constexpr int kRowPieces = 8;    // pieces of one item of the row queue

// One warp: the statistics of (n, group), in a fixed order. Sums of squares in float64 lose nothing that float32 had.
__device__ __forceinline__ void combine_moments(const Parameters& a) {
    const Tiling& t = a.p.t;
    const int lane = threadIdx.x % 32;
    const int channels = a.p.g.C_out / a.fusion.num_groups, parts = t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2);
    const double values = double(channels) * out_volume(a.p.g);
    while (true) {
        unsigned item = lane == 0 ? atomicAdd(a.workspace.group_ticket, 1u) : 0;
        item = __shfl_sync(~0u, item, 0);
        const int64_t n = item / a.fusion.num_groups, group = item % a.fusion.num_groups;
        if (n >= a.p.g.N) return;
        while (ld_acquire_gpu(a.workspace.tiles_done + n) < t.sample_tiles * 2) __nanosleep(200);
        const float2* moments = a.workspace.moments + n * parts * t.M_pad + group * channels;
        const float* counts = a.workspace.counts + n * parts;
        double sum = 0, squares = 0;
#pragma unroll 8
        for (int i = lane; i < parts * channels; i += 32) {
            const int part = i / channels;
            const float2 m = __ldcg(moments + int64_t(part) * t.M_pad + i % channels);
            const double count = __ldcg(counts + part);
            sum += count * m.x;
            squares += m.y + count * m.x * m.x;
        }
        for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            squares += __shfl_xor_sync(~0u, squares, offset);
        }
        const double mean = sum / values, variance = squares / values - mean * mean;
        if (lane == 0) {
            a.fusion.mean[n * a.fusion.num_groups + group] = mean;
            a.fusion.rstd[n * a.fusion.num_groups + group] = 1 / sqrt((variance < 0 ? 0 : variance) + a.fusion.eps);
            __threadfence();
            atomicAdd(a.workspace.groups_done + n, 1u);
        }
    }
}

// One thread: takes kRowPieces pieces of a (n, channel) row at a time and loads them.
__device__ __forceinline__ void load_rows(const Parameters& a, SharedHead& head, uint8_t* ring) {
    const int64_t row_bytes = out_volume(a.p.g) * 4, row_items = ceil_div(row_bytes, kRowPieces * kNormBytes);
    const int64_t channels = a.p.g.C_out, group_channels = channels / a.fusion.num_groups;
    RingPosition stage;
    unsigned next = atomicAdd(a.workspace.row_ticket, 1u);
    while (true) {
        const int64_t row = next / row_items, n = row / channels, channel = row % channels, group = row / group_channels;
        if (n >= a.p.g.N) break;
        const int64_t begin = next % row_items * kRowPieces * kNormBytes;
        next = atomicAdd(a.workspace.row_ticket, 1u);
        while (ld_acquire_gpu(a.workspace.groups_done + n) < a.fusion.num_groups) __nanosleep(200);
        fence_proxy_async_all();    // what other multiprocessors stored is now visible to the copy engine too
        const double mean = __ldcg(a.fusion.mean + group);
        NormPiece piece;
        piece.high = float(mean), piece.low = float(mean - double(piece.high));    // r - mean without losing the mean's low bits
        piece.scale = float(__ldcg(a.fusion.rstd + group)) * (a.fusion.gamma ? a.fusion.gamma[channel] : 1.0f);
        piece.offset = a.fusion.beta ? a.fusion.beta[channel] : 0.0f;
        const int64_t end = begin + kRowPieces * kNormBytes < row_bytes ? begin + kRowPieces * kNormBytes : row_bytes;
        for (int64_t at = begin; at < end; at += kNormBytes) {
            piece.bytes = end - at < kNormBytes ? end - at : kNormBytes;
            piece.y = static_cast<float*>(a.fusion.y) + (row * row_bytes + at) / 4;
            mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
            head.pieces[stage.stage] = piece;
            mbarrier_arrive_expect_tx(head.norm_full + stage.stage, piece.bytes);
            bulk_load(ring + stage.stage * kNormBytes, static_cast<const uint8_t*>(a.out) + row * row_bytes + at, piece.bytes, head.norm_full + stage.stage);
            stage.advance(kNormStages);
        }
    }
    mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
    head.pieces[stage.stage].bytes = 0;
    mbarrier_arrive(head.norm_full + stage.stage);
}

// One warp: normalizes the pieces in place and stores them.
__device__ __forceinline__ void normalize_rows(SharedHead& head, uint8_t* ring) {
    const int lane = threadIdx.x % 32;
    RingPosition stage;
    int storing = -1;    // the stage whose store may still read it
    while (true) {
        mbarrier_wait(head.norm_full + stage.stage, stage.phase);
        const NormPiece piece = head.pieces[stage.stage];
        if (piece.bytes == 0) break;
        float4* values = reinterpret_cast<float4*>(ring + stage.stage * kNormBytes);
        auto apply = [&piece](float v) { return fmaf((v - piece.high) - piece.low, piece.scale, piece.offset); };
#pragma unroll 8
        for (int i = lane; i < piece.bytes / 16; i += 32) {
            const float4 v = values[i];
            values[i] = make_float4(apply(v.x), apply(v.y), apply(v.z), apply(v.w));
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            bulk_store(piece.y, values, piece.bytes);
            bulk_commit_group();
            bulk_wait_group_read<1>();
            if (storing >= 0) mbarrier_arrive(head.norm_empty + storing);
        }
        storing = stage.stage;
        stage.advance(kNormStages);
    }
    if (lane == 0) bulk_wait_group_read<0>();
}

#endif  // HAS_SM90A

// --------------------------------------------------------------------------------------------------------- Kernel

template <int kBlockN>
__global__ void __launch_bounds__(kThreads, 1)
conv_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t shared[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(shared);
    const Tiling& t = a.p.t;
    uint8_t* input = shared + 1024;                                  // (kInputStages, box_rows, pitch, chunk) fp16 and margins
    uint8_t* weights = input + kInputStages * t.input_bytes;         // (weight_stages, block_m, chunk) fp16
    uint8_t* norm_ring = weights + t.weight_stages * t.weight_bytes; // (kNormStages, kNormBytes), then a slice for each consumer warp

    // Prologue: barriers, and zeros behind each box, where the last row's halo looks.
    if (threadIdx.x == 0) {
        for (int i = 0; i < kInputStages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 2);
        for (int i = 0; i < t.weight_stages; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, 2);
        for (int i = 0; i < 2; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 256);
        for (int i = 0; i < kNormStages; i++) mbarrier_init(head.norm_full + i, 1), mbarrier_init(head.norm_empty + i, 1);
        fence_mbarrier_init();
    }
    const int box_bytes = t.box_rows * t.pitch * t.chunk * 2;
    for (int stage = 0; stage < kInputStages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += kThreads * 4) *reinterpret_cast<uint32_t*>(input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x == 0) produce(a, &x_map, &w_map, head, input, weights);
        if (warp == 1 && a.fusion.num_groups > 0) combine_moments(a);
        if (threadIdx.x == 64 && a.fusion.in_kernel) load_rows(a, head, norm_ring);
        if (warp == 3 && a.fusion.in_kernel) normalize_rows(head, norm_ring);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        consume<kBlockN>(a, &out_map, head, input, weights, norm_ring + kNormStages * kNormBytes);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

// Bytes of scratch, or its parts: the same arithmetic for both.
struct Layout {
    int64_t bytes = 0;
    uint8_t* base;
    explicit Layout(void* base) : base(static_cast<uint8_t*>(base)) {}
    template <typename T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + bytes);
        bytes += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
        return p;
    }
};

struct Plan {
    Problem problem;
    scaled_half::Pack pack;
    Workspace workspace;
    unsigned* counters;
    int64_t counter_bytes, bytes;
};

inline int multiprocessors_of(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

inline Plan make_plan(const Geometry& g, int multiprocessors, bool fused, void* base) {
    Plan plan = {};
    const Tiling t = choose_tiling(g, multiprocessors);
    plan.problem = {g, t};
    scaled_half::Pack& p = plan.pack;
    p.N = g.N, p.C = g.C_in, p.S = in_volume(g), p.C_pad = t.C_pad;
    p.rows = g.C_out, p.M_pad = t.M_pad, p.taps = kernel_volume(g);
    p.row_stride = p.taps, p.column_stride = g.C_out * p.taps, p.flip = false;
    Layout layout(base);
    const int64_t parts = t.m_tiles ? t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2) : 0;
    plan.counter_bytes = (3 + 4 * g.N) * 4;
    plan.counters = layout.take<unsigned>(3 + 4 * g.N);
    p.activation_max = reinterpret_cast<scaled_half::SampleMax*>(plan.counters);
    Workspace& w = plan.workspace;
    w.tile_ticket = plan.counters + 2 * g.N, w.group_ticket = w.tile_ticket + 1, w.row_ticket = w.tile_ticket + 2;
    w.tiles_done = w.tile_ticket + 3, w.groups_done = w.tiles_done + g.N;
    p.weight_max = layout.take<unsigned>(t.M_pad);
    p.activation = layout.take<__half>(g.N * p.S * t.C_pad);
    p.weight = layout.take<__half>(p.taps * t.M_pad * t.C_pad);
    w.moments = layout.take<float2>(fused ? g.N * parts * t.M_pad : 0);
    w.counts = layout.take<float>(fused ? g.N * parts : 0);
    plan.bytes = layout.bytes;
    return plan;
}

template <int kBlockN>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const int bytes = 1024 + kInputStages * t.input_bytes + t.weight_stages * t.weight_bytes + kNormStages * kNormBytes + 8 * (kSliceBytes + kConstantBytes);
    RETURN_IF_ERROR(cudaFuncSetAttribute(conv_kernel<kBlockN>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;
    conv_kernel<kBlockN><<<unsigned(blocks), kThreads, bytes, stream>>>(x_map, w_map, out_map, a);
    return cudaGetLastError();
}

inline int run(const Geometry& g, int dtype, int device, void* stream_pointer, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out, const Fusion& fusion) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    const int multiprocessors = multiprocessors_of(device);
    Plan plan = make_plan(g, multiprocessors, fusion.num_groups > 0, workspace);
    const Tiling& t = plan.problem.t;
    if (t.block_n == 0) return cudaErrorNotSupported;
    plan.pack.x = x, plan.pack.w = w;
    RETURN_IF_ERROR(cudaMemsetAsync(plan.counters, 0, plan.counter_bytes, stream));
    switch (dtype) {
        case kFloat32: RETURN_IF_ERROR(scaled_half::pack<float>(plan.pack, multiprocessors, stream)); break;
        case kFloat16: RETURN_IF_ERROR(scaled_half::pack<__half>(plan.pack, multiprocessors, stream)); break;
        case kBFloat16: RETURN_IF_ERROR(scaled_half::pack<__nv_bfloat16>(plan.pack, multiprocessors, stream)); break;
        default: return cudaErrorInvalidValue;
    }
    CUtensorMap x_map, w_map, out_map = {};
    const bool bulk_store = t.contiguous && dtype == kFloat32;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, plan.pack.activation, {t.C_pad, g.axis[2].in, g.axis[1].in, g.axis[0].in, g.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, plan.pack.weight, {t.C_pad, t.M_pad, plan.pack.taps}, {t.chunk, t.split_m ? 2 * kWarpgroupM : kWarpgroupM, 1}));
    if (bulk_store)
        RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, out, {g.axis[1].out * g.axis[2].out, g.axis[0].out, g.C_out, g.N}, {kSlice, 1, 16, 1}));
    const Parameters a = {plan.problem, dtype, apply_relu, bulk_store, bias, out, plan.pack.activation_max, plan.pack.weight_max, plan.workspace, fusion};
    switch (t.block_n) {
        case 256: return launch_conv<256>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 232: return launch_conv<232>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 192: return launch_conv<192>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 160: return launch_conv<160>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 128: return launch_conv<128>(x_map, w_map, out_map, a, multiprocessors, stream);
        default: return launch_conv<64>(x_map, w_map, out_map, a, multiprocessors, stream);
    }
}

}  // namespace conv_sm90

// Whether a tiling fits: 1 or 0.
extern "C" int conv_transpose3d_sm90_supports(const Geometry* g, int device) {
    return conv_sm90::choose_tiling(*g, conv_sm90::multiprocessors_of(device)).block_n > 0;
}

extern "C" int64_t conv_transpose3d_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::make_plan(*g, conv_sm90::multiprocessors_of(device), false, nullptr).bytes;
}

extern "C" int conv_transpose3d_forward_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                             const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, apply_relu != 0, out, conv_sm90::Fusion{});
}

extern "C" int64_t conv_transpose3d_relu_group_norm_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::make_plan(*g, conv_sm90::multiprocessors_of(device), true, nullptr).bytes;
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_sm90(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace,
                                                             const void* x, const void* w, const void* bias, const void* gamma, const void* beta, int num_groups, double eps,
                                                             void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    // The copy engine moves float32 rows whose length is a multiple of 16 bytes; the rest is normalized by a kernel of its own.
    const bool in_kernel = dtype == kFloat32 && out_volume(*g) % 4 == 0;
    double* rstd = statistics + g->N * num_groups;
    const conv_sm90::Fusion fusion = {num_groups, in_kernel, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), y, statistics, rstd};
    RETURN_IF_ERROR(conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, true, activation, fusion));
    if (in_kernel) return cudaSuccess;
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), num_groups};
    return group_norm::with_dtypes(dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, activation, statistics, rstd, gamma, beta, y);
    });
}
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
