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
import math
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
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _triple(name, value):
    if type(value) is int:    # first, since a small layer's time is made of such lines
        return (value, value, value)
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
    volume = weight_shape[2] * weight_shape[3] * weight_shape[4]
    _check(volume < _MAX_AXIS, f"weight: expected a kernel of less than 2**30 elements, got {volume}")
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


def _allows_tensor_cores(dtype, tf32):
    """Whether their operands, of 10 bits of mantissa, are precise enough."""
    return tf32 if dtype == torch.float32 else dtype != torch.float64


def _is_hopper(device):
    """Or is taken for one."""
    return _tensor_core_path(_capability(device.index)) == "sm90"


def _positions(geometry):
    """Of a sample of the input."""
    return math.prod(axis.in_size for axis in geometry.axis)


def _outputs(geometry):
    """Of a sample."""
    return geometry.C_out * math.prod(axis.out_size for axis in geometry.axis)


def _tensor_cores(path, operation, geometry, dtype, tf32, device):
    """TF32-equivalent arithmetic allowed, enough work to fill tiles, and a tiling of ``path``, which is the device's."""
    return (_tensor_core_path(_capability(device.index)) == path and _allows_tensor_cores(dtype, tf32)
            and all(axis.kernel <= 7 and axis.stride <= 4 for axis in geometry.axis)
            and _multiply_adds(geometry) >= _FEW_MULTIPLY_ADDS
            and bool(getattr(_library("cuda"), f"conv_transpose3d_{operation}_supports_{path}")(ctypes.addressof(geometry), device.index)))


def _multiply_adds(geometry):
    """In all, those by inserted zeros included. As multiply_adds in precision.h."""
    count = geometry.N * geometry.C_in * geometry.C_out // geometry.groups
    for axis in geometry.axis:
        count *= axis.out_size * axis.kernel
    return count


def _has_tf32(geometry):
    """Strides with which cuDNN computes in TF32 where that is allowed; with all others it is float32-accurate (kernels/NOTES.md). As has_tf32 in precision.h."""
    axes, strides = geometry.axis, {axis.stride for axis in geometry.axis}
    return strides == {1} or (strides <= {1, 2} and all(axis.dilation == 1 for axis in axes)
                              and (strides == {2} or any(axis.kernel > axis.stride for axis in axes)))


def _has_few_channels(geometry):
    """Where they are few, cuDNN computes a float32 forward in float32 though TF32 is allowed (kernels/NOTES.md). As has_few_channels in precision.h."""
    overlaps = any(axis.kernel > axis.stride > 1 for axis in geometry.axis)
    return geometry.groups == 1 and not overlaps and (geometry.C_out <= 8 or (geometry.C_in <= 4 and geometry.C_out < 64))


def _forward_in_float32(geometry):
    """Whether a float32 forward has to be float32-accurate though TF32 is allowed. As forward_in_float32 in precision.h."""
    if _multiply_adds(geometry) < _FEW_MULTIPLY_ADDS:
        return True
    return not _merges_groups(geometry) if geometry.groups > 1 else _has_few_channels(geometry) or not _has_tf32(geometry)


def _has_float32_dinput(geometry, dtype):
    """Where output channels are few, it computes the input's gradient in float32 too."""
    return dtype == torch.float32 and geometry.C_out <= 3


_FEW_MULTIPLY_ADDS = 2**24    # as kFewMultiplyAdds in precision.h: with fewer, cuDNN computes in float32
_MOST_SPLIT_TERMS = 128    # of several groups; as kMostSplitTerms in precision.h
_MOST_THIRD_TERMS = 256    # of one group
_MOST_THIRD_CHANNELS = 640    # of one group where no taps overlap: all small products are added first


def _terms(geometry):
    """Products of an output, at most. As terms_of in precision.h."""
    terms = geometry.C_in // geometry.groups
    for axis in geometry.axis:
        terms *= -(-axis.kernel // (axis.stride // math.gcd(axis.stride, axis.dilation)))    # taps of a phase
    return terms


def _merges_groups(geometry):
    """Where groups have many channels and strides are 1, cuDNN computes in TF32, and so do we, as one group with zeros between; short sums are split. As merges_groups in precision.h."""
    channels = min(geometry.C_in, geometry.C_out) // geometry.groups
    return geometry.groups > 1 and channels >= 32 and all(axis.stride == 1 for axis in geometry.axis) and _terms(geometry) > _MOST_SPLIT_TERMS


_MOST_PRODUCTS = 2**23    # that are stored, or elements of spread gradients: so many stay in the L2 cache


def _has_single_taps(geometry):
    """Whether every output has one tap, at position * stride + element of the kernel. As has_single_taps in taps.h."""
    return all(axis.kernel == axis.stride and axis.padding == 0 and (axis.dilation == 1 or axis.kernel == 1) and axis.out_size == axis.in_size * axis.stride
               for axis in geometry.axis)


def _products(geometry):
    """Of elements of kernels and positions of the input, for each output channel and sample."""
    return geometry.N * geometry.C_out * _positions(geometry) * math.prod(axis.kernel for axis in geometry.axis)


def _has_tiles(geometry):
    """Channels and positions enough for tiles of products of matrices; not too many of these, and a sample's elements and the weight's fewer than an int counts."""
    channels, positions = geometry.C_in // geometry.groups, _positions(geometry)
    rows = geometry.C_out // geometry.groups * math.prod(axis.kernel for axis in geometry.axis)
    largest = max(geometry.C_in * positions, _outputs(geometry), geometry.C_in * rows)
    return channels >= 8 and rows >= 32 and positions >= 32 and _products(geometry) <= 2**40 and largest < 2**30


def _gemm(geometry, dtype, tf32, device):
    """Where outputs have several taps, products are stored, and must not be too many."""
    return _allows_tensor_cores(dtype, tf32) and _has_tiles(geometry) and (_has_single_taps(geometry) or (dtype == torch.float32 and _products(geometry) < _MOST_PRODUCTS))


def _gemm_first(geometry, dtype, tf32, device):
    """Where that is faster than packed copies (kernels/NOTES.md): on Hopper, few products and outputs; where none are stored, short sums and kernels of 1 too."""
    split, products, channels = dtype == torch.float32 and _forward_in_float32(geometry), _products(geometry), geometry.C_in // geometry.groups
    if not _is_hopper(device):
        first = True
    elif _has_single_taps(geometry):
        first = products * channels <= (2**29 if split else 5 * 2**28) or channels <= 32 or all(axis.kernel == 1 for axis in geometry.axis)
    else:
        first = products + 4 * geometry.N * _outputs(geometry) <= 5e6 and products * channels <= (2**29 if split else 2**30)
    return first and _gemm(geometry, dtype, tf32, device)


def _gemm_norm_first(geometry, dtype, tf32, device):
    """The same behind ReLU + GroupNorm, which then reads the outputs for its statistics: on Hopper, where they nearly stay in the L2 cache."""
    return (not _is_hopper(device) or geometry.N * _outputs(geometry) <= 2**25) and _gemm_first(geometry, dtype, tf32, device)


def _gemm_gradients(geometry, dtype, tf32, device):
    """Where they are TF32, and the spread gradient of the outputs is not too large."""
    return dtype == torch.float32 and tf32 and _multiply_adds(geometry) >= _FEW_MULTIPLY_ADDS and _has_tiles(geometry) and _products(geometry) < _MOST_PRODUCTS


def _gemm_gradients_first(geometry, dtype, tf32, device):
    """Where that is faster than packed copies (kernels/NOTES.md): on Hopper, small problems, and weights of more elements than there are products."""
    products, terms = _products(geometry), geometry.N * _positions(geometry)
    few = products <= 1.8e6 or terms <= (1.8 if products <= 3e6 else 0.9) * geometry.C_in / geometry.groups
    return (few or not _is_hopper(device)) and _gemm_gradients(geometry, dtype, tf32, device)


def _depthwise(geometry, dtype, tf32, device):
    """Groups of few channels, or few channels: tensor cores would multiply zeros."""
    return dtype != torch.float64 and bool(_library("cuda").conv_transpose3d_supports_depthwise(ctypes.addressof(geometry), device.index))


def _sweep(geometry, dtype, tf32, device):
    """Groups behind strides of 2, float32-accurate in short sums, on every GPU (kernels/sweep_tiles.h)."""
    return (dtype == torch.float32 and tf32 and geometry.groups > 1 and _terms(geometry) <= _MOST_SPLIT_TERMS
            and bool(_library("cuda").conv_transpose3d_supports_sweep(ctypes.addressof(geometry), device.index)))


def _sweep_first(geometry, dtype, tf32, device):
    """Where that is faster (kernels/NOTES.md): than packed copies on Hopper, where kernels are not large and channels no more than the input's; than products of matrices, unless outputs are few."""
    faster = geometry.C_out <= geometry.C_in and geometry.axis[0].kernel * geometry.axis[1].kernel <= 9
    few = geometry.N * _outputs(geometry) < 2**19 and _gemm_first(geometry, dtype, tf32, device)
    return faster and not few and _sweep(geometry, dtype, tf32, device)


def _tf32_on_hopper(path, geometry, dtype, tf32, device):
    """One group, float32 where cuDNN's forward is TF32, on Hopper, in a layer that ``path`` has a plan for."""
    return (dtype == torch.float32 and tf32 and geometry.groups == 1 and not _forward_in_float32(geometry) and _is_hopper(device)
            and bool(getattr(_library("cuda"), f"conv_transpose3d_supports_{path}")(ctypes.addressof(geometry), device.index)))


def _sweep_sm90(geometry, dtype, tf32, device):
    """Few channels behind strides of 2 (kernels/sweep_sm90_tiles.h)."""
    return _tf32_on_hopper("sweep_sm90", geometry, dtype, tf32, device)


def _sweep_sm90_first(geometry, dtype, tf32, device):
    """Where that is faster (kernels/NOTES.md): than packed copies, rows that fill half of its tile, and half of its output channels; than products of matrices, unless outputs are few."""
    fills = geometry.axis[2].in_size >= 32 and geometry.C_out > 16
    few = geometry.N * _outputs(geometry) < (2**25 if _has_single_taps(geometry) else 2**19) and _gemm_first(geometry, dtype, tf32, device)
    return fills and not few and _sweep_sm90(geometry, dtype, tf32, device)


def _forward_on(path):
    def condition(geometry, dtype, tf32, device):
        """Where cuDNN's forward is float32-accurate, so are split operands, as long as no sum is too long."""
        if dtype == torch.float32 and _has_few_channels(geometry):
            return False
        if geometry.groups > 1:
            possible = _merges_groups(geometry) or (dtype == torch.float32 and _terms(geometry) <= _MOST_SPLIT_TERMS)
        else:
            terms = _terms(geometry)
            possible = _has_tf32(geometry) or (dtype == torch.float32 and terms <= (_MOST_THIRD_CHANNELS if terms == geometry.C_in else _MOST_THIRD_TERMS))
        return possible and _tensor_cores(path, "forward", geometry, dtype, tf32, device)
    return condition


def _polyphase_sm90(geometry, dtype, tf32, device):
    """Many channels behind a stride of 2 along W (kernels/polyphase_tiles.h)."""
    return _tf32_on_hopper("polyphase_sm90", geometry, dtype, tf32, device)


_PACKED_ZEROS_CYCLES = 16000    # of the convolution of packed phases: what its zeros among the weights cost, to be packed and repaired


def _polyphase_sm90_first(geometry, dtype, tf32, device):
    """Where that is faster than the convolution of packed phases, as both estimate their cycles (kernels/NOTES.md)."""
    def cycles(path):
        return getattr(_library("cuda"), f"conv_transpose3d_forward_cycles_{path}")(ctypes.addressof(geometry), device.index)
    return _polyphase_sm90(geometry, dtype, tf32, device) and cycles("polyphase_sm90") < cycles("sm90") + _PACKED_ZEROS_CYCLES


def _norm_forward_on(path):
    """Behind the norm nothing can repair what zeros between groups make of infinite values."""
    forward = _forward_on(path)
    return lambda geometry, dtype, tf32, device: not _merges_groups(geometry) and forward(geometry, dtype, tf32, device)


def _gradients_on(path):
    def condition(geometry, dtype, tf32, device):
        """cuDNN computes nearly all of them in TF32. Groups are computed as one, with zeros between them: worth it where they have 8 channels or more."""
        channels = min(geometry.C_in, geometry.C_out) // geometry.groups
        return (geometry.groups == 1 or channels >= 8) and _tensor_cores(path, "gradients", geometry, dtype, tf32, device)
    return condition


def _norm_gradients_on(path):
    gradients = _gradients_on(path)
    return lambda geometry, dtype, tf32, device: dtype == torch.float32 and not _has_float32_dinput(geometry, dtype) and gradients(geometry, dtype, tf32, device)


_PATHS = {
    # operation: ((path, condition), ...)
    # sweep: groups behind strides of 2, by mma.sync straight from the tensors. sweep_sm90: one group of few channels, likewise, by wgmma, on Hopper. polyphase_sm90: one group of many channels behind a stride of 2 along W, by the phases of its outputs, on Hopper. gemm: products of matrices by mma.sync. depthwise: few channels, of groups or in all, on the CUDA cores. sm90: wgmma, on Hopper. sm80: mma.sync, on every other tensor core from sm_80 up. composed: of other operations of this table.
    "conv_transpose3d_forward": (("depthwise", _depthwise), ("sweep", _sweep_first), ("sweep_sm90", _sweep_sm90_first), ("gemm", _gemm_first), ("polyphase_sm90", _polyphase_sm90_first), ("sm90", _forward_on("sm90")), ("sweep", _sweep), ("sm80", _forward_on("sm80")), ("gemm", _gemm), ("generic", _always)),
    "conv_transpose3d_relu_group_norm_forward": (("composed", _depthwise), ("composed", _gemm_norm_first), ("polyphase_sm90", _polyphase_sm90_first), ("sm90", _norm_forward_on("sm90")), ("sm80", _norm_forward_on("sm80")), ("composed", _always)),
    "conv_transpose3d_gradients": (("composed", _depthwise), ("gemm", _gemm_gradients_first), ("sm90", _gradients_on("sm90")), ("sm80", _gradients_on("sm80")), ("gemm", _gemm_gradients), ("composed", _always)),
    "conv_transpose3d_relu_group_norm_gradients": (("composed", _depthwise), ("composed", _gemm_gradients_first), ("sm90", _norm_gradients_on("sm90")), ("sm80", _norm_gradients_on("sm80")), ("composed", _always)),
    "conv_transpose3d_dinput": (("depthwise", _depthwise), ("generic", _always)),
    "conv_transpose3d_dweight": (("depthwise", _depthwise), ("generic", _always)),
    "conv_transpose3d_dbias": (("generic", _always),),
    "group_norm_forward": (("generic", _always),),
    "relu_group_norm_backward": (("generic", _always),),
}

# What follows an operation's common arguments: p a pointer, i an int, d a double.
_SIGNATURES = {
    "conv_transpose3d_forward": "pppip",            # x, weight, bias, relu; out
    "conv_transpose3d_relu_group_norm_forward": "pppppidppp",    # x, weight, bias, gamma, beta, num_groups, eps; activation, y, statistics
    "conv_transpose3d_gradients": "ppppp",          # dout, x, weight; dx, dweight
    "conv_transpose3d_relu_group_norm_gradients": "ppppippppppp",    # dy, r, statistics, gamma, num_groups, x, weight; dx, dweight, dgamma, dbeta, dbias
    "conv_transpose3d_dinput": "ppp",               # dout, weight; dx
    "conv_transpose3d_dweight": "ppp",              # x, dout; dweight
    "conv_transpose3d_dbias": "pp",                 # dout; dbias
    "group_norm_forward": "pppdpp",                 # r, gamma, beta, eps; y, statistics
    "relu_group_norm_backward": "pppppppp",         # dy, r, statistics, gamma; dz, dgamma, dbeta, dbias
}
_TWO_DTYPES = ("conv_transpose3d_relu_group_norm_forward", "group_norm_forward", "relu_group_norm_backward")    # the activation's and the output's


def select_path(operation, geometry, dtype, device, packed=None):
    """The name of the path that runs ``operation`` (a key of the table above) on ``device`` at the flags in force, or those of the forward that left ``packed``."""
    return _select(operation, geometry, dtype, device, _tf32_allowed(dtype, packed))


@functools.lru_cache(maxsize=4096)
def _select(operation, geometry, dtype, device, tf32):
    if device.type == "cpu":
        return "composed" if _PATHS[operation][-1][0] == "composed" else "cpu"
    return next(path for path, condition in _PATHS[operation] if condition(geometry, dtype, tf32, device))


def _tf32_allowed(dtype, packed=None):
    """Whether torch lets cuDNN's convolutions round float32 to TF32. It did where a forward left ``packed`` (_packed_input)."""
    if dtype != torch.float32:
        return False
    if packed is not None:
        return True
    if _fp32_precision:    # torch 2.9 and later, where the older flag cannot always be read
        return _fp32_precision("cuda", "conv") == "tf32"
    return torch.backends.cudnn.allow_tf32


_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


# Shared memory that a block can have, in bytes, by architecture (CUDA C++ Programming Guide, "Compute Capabilities").
_SHARED_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 7): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024}


@functools.lru_cache(maxsize=None)
def _forced_capability():
    """The compute capability that the GPUs are to be taken for, from CONV_TRANSPOSE3D_NEW_ARCHITECTURE ("80" is (8, 0)), or None.

    The kernels are then built as that architecture's PTX, which later cards run too, and use no more shared memory than it has.
    """
    name = os.environ.get("CONV_TRANSPOSE3D_NEW_ARCHITECTURE")
    if not name:
        return None
    known = [f"{major}{minor}" for major, minor in _SHARED_BYTES]
    if name not in known:
        raise ImportError(f"CONV_TRANSPOSE3D_NEW_ARCHITECTURE: expected one of {', '.join(known)}, got {name!r}")
    return _capability_of(name)


@functools.lru_cache(maxsize=None)
def _capability(device_index):
    own, forced = torch.cuda.get_device_capability(device_index), _forced_capability()
    if forced and forced > own:
        raise ImportError(f"CONV_TRANSPOSE3D_NEW_ARCHITECTURE: expected at most the GPU's own compute capability, {own[0]}.{own[1]}, got {forced[0]}.{forced[1]}")
    return forced or own


def _capability_of(architecture):
    """(8, 6) of "86", (9, 0) of "90a"."""
    digits = architecture.rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def _tensor_core_path(capability):
    return "sm90" if capability == (9, 0) else "sm80"


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
    """(C function, its name, its first arguments, bytes of workspace, bytes of the packed input, or None where the function has none); the shape structs are compared by
    identity, being cached themselves."""
    name = f"{operation}_{_select(operation, shape, dtypes[0], device, tf32)}"
    library = _library(device.type)
    if device.type == "cpu":
        return getattr(library, name), name, (ctypes.addressof(shape),), 0, None
    codes = [_DTYPES[dtype] for dtype in dtypes]
    workspace_bytes = getattr(library, f"{name}_workspace")(ctypes.addressof(shape), codes[0], device.index)
    packed = getattr(library, f"{name}_packed", None)
    packed_bytes = packed and packed(ctypes.addressof(shape), codes[0], device.index)
    return getattr(library, name), name, (ctypes.addressof(shape), *codes, device.index), workspace_bytes, packed_bytes


def _launch(operation, shape, dtypes, device, inputs, outputs, packed=None):
    """Runs ``operation`` on ``device``'s current stream: contiguous ``inputs`` (tensors, numbers or None) into ``outputs``. ``packed``: see _packed_input."""
    function, name, first, workspace_bytes, packed_bytes = _resolve(operation, shape, dtypes, device, _tf32_allowed(dtypes[0], packed))
    for names in _recorders:
        names.append(name)
    if device.type == "cpu":
        return _launch_cpu(function, first, inputs, outputs)
    behind = packed_bytes if packed_bytes and packed is None else 0    # for the packed input, unless that has memory of its own
    scratch = torch.empty(workspace_bytes + behind, dtype=torch.uint8, device=device) if workspace_bytes + behind else None
    if behind:
        packed = scratch.data_ptr() + workspace_bytes
    memory = (scratch,) if packed_bytes is None else (scratch, packed)
    error = function(*first, torch._C._cuda_getCurrentRawStream(device.index), *_pointers(memory), *_pointers(inputs), *_pointers(outputs))
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}, {_library('cuda').cuda_error_string(error).decode()}")


def _packed_input(operation, geometry, input, kept):
    """Memory for the copy of ``input`` that the forward ``operation`` makes for the tensor cores and the gradients read: the weight's gradient then needs it in
    place of the input, so it is appended to ``kept``. None if there is none, or if it is larger than the input (some bytes a sample aside), or where ``kept`` is None."""
    if kept is None or input.device.type == "cpu":
        return None
    count = _shared_packed_bytes(operation, geometry, input.dtype, input.device, _tf32_allowed(input.dtype))
    if not 0 < count <= input.nbytes + 16 * len(input) + 512:
        return None
    kept.append(torch.empty(count, dtype=torch.uint8, device=input.device))
    return kept[0]


@functools.lru_cache(maxsize=4096)
def _shared_packed_bytes(operation, geometry, dtype, device, tf32):
    """Bytes of that copy; 0 where the forward and the gradients do not take the same path."""
    path = _select(operation, geometry, dtype, device, tf32).removeprefix("polyphase_")    # which packs as its namesake does
    packed = getattr(_library("cuda"), f"conv_transpose3d_gradients_{path}_packed", None)
    if not packed or _select("conv_transpose3d_gradients", geometry, dtype, device, tf32) != path:
        return 0
    return packed(ctypes.addressof(geometry), _DTYPES[dtype], device.index)


def _pointers(arguments):
    return [a if a is None or type(a) in (int, float) else a.data_ptr() for a in arguments]


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


def _forward(input, weight, bias, stride, padding, output_padding, groups, dilation, kept=None):
    """kept: a list, for what the backward can use in place of the input."""
    geometry, output = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if output.numel():
        _launch_forward(geometry, input, weight, bias, False, output, kept)
    return output


def _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation):
    _check_tensors(input, weight, bias)
    geometry, shape = _geometry(input.shape, weight.shape, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    _check_bias(bias, shape[1])
    return geometry, input.new_empty(shape)


def _launch_forward(geometry, input, weight, bias, relu, output, kept):
    _launch("conv_transpose3d_forward", geometry, (input.dtype,), input.device,
            (input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), int(relu)), (output,), _packed_input("conv_transpose3d_forward", geometry, input, kept))


def _forward_fake(input, weight, bias, stride, padding, output_padding, groups, dilation):
    _check_tensors(input, weight, bias)
    shape = _output_shape(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    _check_bias(bias, shape[1])
    return input.new_empty(shape)


def _backward(grad, input, packed, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs):
    """Gradients of input, weight and bias; an empty tensor where ``needs`` says that one is not wanted. ``packed``: in place of ``input``, see _packed_input."""
    outputs = _backward_fake(grad, input, packed, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs)
    if grad.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    geometry, _ = _geometry(tuple(input_shape), tuple(weight_shape), tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    grad = grad.contiguous()
    dx, dweight, dbias = (output if need else None for output, need in zip(outputs, needs))
    _launch_gradients(geometry, grad, input, packed, weight, dx, dweight)
    if dbias is not None:
        _launch("conv_transpose3d_dbias", geometry, (grad.dtype,), grad.device, (grad,), (dbias,))
    return outputs


def _launch_gradients(geometry, grad, input, packed, weight, dx, dweight):
    """Gradients of input and weight from a contiguous ``grad`` into ``dx`` and ``dweight``; None: not wanted."""
    dtypes, device = (grad.dtype,), grad.device
    together_dx = None if _has_float32_dinput(geometry, grad.dtype) else dx
    if (together_dx is not None or dweight is not None) and select_path("conv_transpose3d_gradients", geometry, grad.dtype, device, packed) != "composed":
        _launch("conv_transpose3d_gradients", geometry, dtypes, device,
                (grad, input.contiguous() if dweight is not None and packed is None else None, weight.contiguous() if together_dx is not None else None), (together_dx, dweight), packed)
        dx, dweight = dx if together_dx is None else None, None
    if dx is not None:
        _launch("conv_transpose3d_dinput", geometry, dtypes, device, (grad, weight.contiguous()), (dx,))
    if dweight is not None:
        _launch("conv_transpose3d_dweight", geometry, dtypes, device, (input.contiguous(), grad), (dweight,))


def _backward_fake(grad, input, packed, weight, input_shape, weight_shape, stride, padding, output_padding, groups, dilation, needs):
    shapes = (input_shape, weight_shape, (grad.shape[1],))
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs))


def _fused_forward(input, weight, bias, gn_weight, gn_bias, num_groups, eps, stride, padding, output_padding, groups, dilation, float32_output, save, kept=None):
    """(output, activation, statistics): activation = relu(conv_transpose3d(...)) and statistics (2, N, num_groups), the mean
    and reciprocal standard deviation in float64, are what backward needs; activation is empty where it need not be saved. kept: as _forward's."""
    geometry, activation = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    _check_group_norm_tensors(input, gn_weight, gn_bias, activation.shape[1])
    norm_shape = _norm_shape(tuple(activation.shape), num_groups)
    output_dtype = torch.float32 if float32_output else input.dtype
    in_place = not save and output_dtype == input.dtype
    output = activation if in_place else torch.empty_like(activation, dtype=output_dtype)
    statistics = input.new_empty((2, activation.shape[0], num_groups), dtype=torch.float64)
    dtypes, gamma, beta = (input.dtype, output_dtype), _parameter(gn_weight, input), _parameter(gn_bias, input)
    if output.numel() and select_path("conv_transpose3d_relu_group_norm_forward", geometry, input.dtype, input.device) == "composed":
        _launch_forward(geometry, input, weight, bias, True, activation, kept)
        _launch("group_norm_forward", norm_shape, dtypes, input.device, (activation, gamma, beta, eps), (output, statistics))
    elif output.numel():
        _launch("conv_transpose3d_relu_group_norm_forward", geometry, dtypes, input.device,
                (input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), gamma, beta, num_groups, eps), (activation, output, statistics),
                _packed_input("conv_transpose3d_relu_group_norm_forward", geometry, input, kept))
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
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _fused_backward(grad, activation, statistics, input, packed, weight, gn_weight, input_shape, weight_shape, num_groups,
                    stride, padding, output_padding, groups, dilation, needs):
    """Gradients of input, weight, bias, gn_weight and gn_bias; empty where not needed."""
    outputs = _fused_backward_fake(grad, activation, statistics, input, packed, weight, gn_weight, input_shape, weight_shape, num_groups,
                                   stride, padding, output_padding, groups, dilation, needs)
    if grad.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    geometry, _ = _geometry(tuple(input_shape), tuple(weight_shape), tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    need_dx, need_dweight = needs[:2]
    grad, gamma = grad.contiguous(), _parameter(gn_weight, activation)
    dx, dweight, dbias, dgamma, dbeta = (output if need else None for output, need in zip(outputs, needs))
    if ((need_dx or need_dweight) and grad.dtype == activation.dtype
            and select_path("conv_transpose3d_relu_group_norm_gradients", geometry, grad.dtype, grad.device, packed) != "composed"):
        _launch("conv_transpose3d_relu_group_norm_gradients", geometry, (grad.dtype,), grad.device,
                (grad, activation, statistics, gamma, num_groups, input.contiguous() if need_dweight and packed is None else None, weight.contiguous() if need_dx else None),
                (dx, dweight, dgamma, dbeta, dbias), packed)
        return outputs
    dz = torch.empty_like(activation) if need_dx or need_dweight else None
    _launch("relu_group_norm_backward", _norm_shape(tuple(activation.shape), num_groups), (activation.dtype, grad.dtype), grad.device,
            (grad, activation, statistics, gamma), (dz, dgamma, dbeta, dbias))
    if dz is not None:
        _launch_gradients(geometry, dz, input, packed, weight, dx, dweight)
    return outputs


def _fused_backward_fake(grad, activation, statistics, input, packed, weight, gn_weight, input_shape, weight_shape, num_groups,
                         stride, padding, output_padding, groups, dilation, needs):
    channels = activation.shape[1]
    shapes = (input_shape, weight_shape, (channels,), (channels,), (channels,))
    norm_dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    dtypes = (activation.dtype,) * 3 + (norm_dtype,) * 2
    return tuple(activation.new_empty(shape if need else 0, dtype=dtype) for shape, need, dtype in zip(shapes, needs, dtypes))


# ------------------------------------------------------------------------------------------------------------ Autograd


def _save_for_backward(ctx, inputs, output, packed=None):
    input, weight, bias, *ctx.sizes = inputs
    ctx.shapes = tuple(input.shape), tuple(weight.shape)
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight and packed is None else None, packed, weight if need_input else None)


def _autograd(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    grads = _call("conv_transpose3d_backward", grad, *ctx.saved_tensors, *ctx.shapes, *ctx.sizes, list(needs))
    return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 5


def _save_for_fused_backward(ctx, inputs, output, packed=None):
    input, weight, bias, gn_weight, gn_bias, ctx.num_groups, _, *sizes, _, _ = inputs
    ctx.sizes, ctx.shapes = sizes, (tuple(input.shape), tuple(weight.shape))
    ctx.gn_dtypes = gn_weight is not None and gn_weight.dtype, gn_bias is not None and gn_bias.dtype
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(*output[1:], input if need_weight and packed is None else None, packed, weight if need_input else None, gn_weight)
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
    (f"conv_transpose3d_backward(Tensor grad, Tensor? input, Tensor? packed, Tensor? weight, SymInt[] input_shape, SymInt[] weight_shape, {_SIZES}, bool[] needs)"
     " -> (Tensor, Tensor, Tensor)", _backward, _backward_fake, None, _no_second_order),
    ("conv_transpose3d_relu_group_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? gn_weight, Tensor? gn_bias, int num_groups, float eps,"
     f" {_SIZES}, bool float32_output, bool save) -> (Tensor, Tensor, Tensor)",
     _fused_forward, _fused_forward_fake, _save_for_fused_backward, _fused_autograd),
    ("conv_transpose3d_relu_group_norm_backward(Tensor grad, Tensor activation, Tensor statistics, Tensor? input, Tensor? packed, Tensor? weight, Tensor? gn_weight,"
     f" SymInt[] input_shape, SymInt[] weight_shape, int num_groups, {_SIZES}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
     _fused_backward, _fused_backward_fake, None, _no_second_order),
)


class _Operator:
    """A registered operator, and the shorter way to it."""

    def __init__(self, registered, implementation, setup, backward):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                if not setup:
                    return implementation(*arguments)
                kept = [] if ctx.needs_input_grad[1] else None    # of the weight
                output = implementation(*arguments, kept=kept)
                setup(ctx, arguments, output, *kept or ())
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


def _source(backend):
    """One translation unit of the backend's sources; of those for the tensor cores, what the visible GPUs need."""
    suffix, unused = ".cpp" if backend == "cpu" else ".cu", ()
    if backend == "cuda":
        wanted = {_tensor_core_path(_capability_of(name)) for name in _architectures()}
        unused = tuple(f"_{path}.cu" for path in ("sm90", "sm80") if path not in wanted)
    included = set()
    return "".join(_expand(name, included) for name in _SOURCES if name.endswith(suffix) and not name.endswith(unused))


def _architectures():
    """nvcc's names of the visible GPUs' architectures, for instance ["90a"] (wgmma needs the a) or ["80", "86"]."""
    capabilities = {_capability(i) for i in range(torch.cuda.device_count())}
    for major, minor in capabilities:
        _check(major >= 8, f"GPU: expected compute capability 8.0 or higher, got {major}.{minor}")
    return sorted(f"{major}{minor}" + ("a" if major == 9 else "") for major, minor in capabilities)


def _flags(backend):
    if backend == "cpu":
        return ["-O3", "-std=c++17", "-fopenmp"]
    # -O is for the host's code only, which takes seconds longer above 1; the device's is optimized all the same.
    forced = [f"-DSHARED_BYTES={_SHARED_BYTES[_forced_capability()]}"] if _forced_capability() else []
    kind = "compute" if forced else "sm"
    return ["-O1", "-std=c++17", "--split-compile=0", *forced] + [f"-gencode=arch=compute_{a},code={kind}_{a}" for a in _architectures()]


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
    source = _source(backend)
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
                packed = getattr(library, f"{operation}_{path}_packed", None)
                function.argtypes = [pointer, *dtypes, integer, pointer, pointer, *[pointer] * bool(packed), *arguments]    # shape, dtypes, device, stream, workspace, packed input
                for size in filter(None, (getattr(library, f"{operation}_{path}_workspace"), packed)):
                    size.argtypes, size.restype = [pointer, integer, integer], ctypes.c_int64
    if backend == "cuda":
        library.cuda_error_string.restype = ctypes.c_char_p
        library.conv_transpose3d_supports_depthwise.argtypes = library.conv_transpose3d_supports_sweep.argtypes = [pointer, integer]
        for path in ("sm90", "sm80", "sweep_sm90", "polyphase_sm90"):
            for question, answer in (("forward_supports", integer), ("gradients_supports", integer), ("supports", integer), ("forward_cycles", ctypes.c_double)):
                function = getattr(library, f"conv_transpose3d_{question}_{path}", None)
                if function:
                    function.argtypes, function.restype = [pointer, integer], answer
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

// Blocks of so many bytes that a multiprocessor's shared memory has room for: it has a kilobyte more than a block can have, and keeps one for each block.
inline int64_t blocks_that_fit(int64_t shared_bytes, int64_t most_shared) { return (most_shared + 1024) / (shared_bytes + 1024); }

constexpr int kAddedOutputs = 1024;    // of a channel, that a block adds the parts of (add_parts.cuh)

// The upper half of the product.
HOST_DEVICE unsigned multiply_high(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return unsigned(uint64_t(a) * b >> 32);
#endif
}

// The last digit of i, which is below `count`; i becomes what is left.
HOST_DEVICE int take_digit(int& i, int count) {
    const int digit = i % count;
    i /= count;
    return digit;
}

// Division by what is known when a plan is made, of numbers from 0 to 2^31 - 1: n / d = (n + n * magic / 2^32) / 2^shift (Granlund, Montgomery: "Division by Invariant
// Integers using Multiplication"). A division takes a warp 100 cycles, and locating a tile is a chain of a dozen.
struct Divisor {
    unsigned magic;
    int shift, value;
    HOST_DEVICE int divide(int n) const { return int((multiply_high(unsigned(n), magic) + unsigned(n)) >> shift); }
    // The remainder; n becomes the quotient.
    HOST_DEVICE int take(int& n) const {
        const int quotient = divide(n), rest = n - quotient * value;
        n = quotient;
        return rest;
    }
};
inline Divisor make_divisor(int value) {
    int shift = 0;
    while (int64_t(1) << shift < value) shift++;
    return {unsigned((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value) / value + 1), shift, value};
}

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

// The taps k, k + period, ... of a kernel share their outputs' residue.
HOST_DEVICE int64_t tap_period(const Axis& a) { return a.stride / gcd(a.stride, a.dilation); }

HOST_DEVICE int64_t num_phases(Direction direction, const Axis& a) { return direction == Direction::kForward ? a.stride : 1; }

HOST_DEVICE Phase make_phase(Direction direction, const Axis& a, int64_t phase) {
    if (direction == Direction::kDInput)
        return {0, 1, int(a.in), 0, 1, int(a.kernel), int(-a.padding), int(a.stride), int(a.dilation), int(a.out)};
    // Taps of the outputs o = phase + q * stride are those with (phase + padding - k * dilation) mod stride == 0.
    int64_t period = tap_period(a);
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

_SOURCES['precision.h'] = r'''
// Where a float32 forward on the tensor cores has split operands: where cuDNN's is float32-accurate although TF32 is allowed (NOTES.md). Which forwards come to the
// tensor cores at all is up to the table of paths in model_new.py, which has functions of the same names (tests/test_paths.py).
#pragma once

#include "geometry.h"

// Several groups: as accurate as float32 where no sum has more products than this; with more, they are computed as one group, with zeros between them.
constexpr int64_t kMostSplitTerms = 128;

// Products of an output, at most.
inline int64_t terms_of(const Geometry& g) {
    int64_t terms = g.C_in / g.groups;
    for (const Axis& a : g.axis) terms *= ceil_div(a.kernel, tap_period(a));    // taps of a phase
    return terms;
}

// Strides with which cuDNN computes a single group in TF32.
inline bool has_tf32(const Geometry& g) {
    bool ones = true, twos = true, up_to_two = true, dilated = false, overlaps = false;
    for (const Axis& a : g.axis) ones &= a.stride == 1, twos &= a.stride == 2, up_to_two &= a.stride <= 2, dilated |= a.dilation > 1, overlaps |= a.kernel > a.stride;
    return ones || (up_to_two && !dilated && (twos || overlaps));
}

// Channels so few that cuDNN computes float32 in float32.
inline bool has_few_channels(const Geometry& g) {
    bool overlaps = false;
    for (const Axis& a : g.axis) overlaps |= a.kernel > a.stride && a.stride > 1;
    return g.groups == 1 && !overlaps && (g.C_out <= 8 || (g.C_in <= 4 && g.C_out < 64));
}

// Groups of many channels, which cuDNN computes in TF32.
inline bool merges_groups(const Geometry& g) {
    bool ones = true;
    for (const Axis& a : g.axis) ones &= a.stride == 1;
    return g.groups > 1 && ones && (g.C_in < g.C_out ? g.C_in : g.C_out) / g.groups >= 32 && terms_of(g) > kMostSplitTerms;
}

// Multiplications in all, those by inserted zeros included. Where they are few, cuDNN computes in float32.
constexpr int64_t kFewMultiplyAdds = 1 << 24;
inline double multiply_adds(const Geometry& g) {
    double count = double(g.N) * g.C_in * g.C_out / g.groups;
    for (const Axis& a : g.axis) count *= double(a.out) * a.kernel;
    return count;
}

inline bool forward_in_float32(const Geometry& g) { return multiply_adds(g) < kFewMultiplyAdds || (g.groups > 1 ? !merges_groups(g) : has_few_channels(g) || !has_tf32(g)); }

inline bool splits_groups(const Geometry& g) { return g.groups > 1 && terms_of(g) <= kMostSplitTerms; }

// Channels of a third of GEMM_K, which is [low, high, high] then; or 0.
inline int third_of(const Geometry& g) { return g.groups == 1 && !has_tf32(g) ? int(ceil_div(g.C_in, 8)) * 8 : 0; }
'''

_SOURCES['stencil.h'] = r'''
// A transposed convolution of any stride, and its gradient, as a convolution of stride 1.
//
// Output o of an axis has u = o + padding + start = stride * q + r with phase r in [0, stride). Input i reaches it through tap k where
// u = stride * i + dilation * k + start: then r = (dilation * k + start) mod stride, and i = q - m with m = (dilation * k + start) div stride. So each tap k
// belongs to one phase r and one shift m, and the layer is a convolution of stride 1 on the grid of the q, with one output
// channel per (channel, phase), and taps (m). Backwards, for dx, the grid of the q is the source, its (channel, phase) pairs are
// the source channels, and i reads q = i + m. Not every phase has a weight at every shift. Any start in [0, stride) will do: the one with the fewest taps, then positions, is
// taken, so that a kernel of 3 and stride 2 that doubles sizes has as many positions as inputs.
#pragma once

#include "geometry.h"

constexpr int kMaxTaps = 7, kMaxStride = 4;

// x / phases, of 1 to 4 phases.
HOST_DEVICE int divide_by_phases(unsigned x, int phases) {
    static_assert(kMaxStride == 4, "below");
    return int(phases == 3 ? multiply_high(x, 0xaaaaaaabu) >> 1 : x >> phases / 2);
}

// One axis. Position p of the destination's grid reads the source's grid at first + p - shift[t] for every tap t, where that
// is in [0, sources). Position p and phase r of the destination's grid are its element p * phases + r - crop, where that is in
// [0, out); the same for the source. Only the layer's output has phases: the destination forward, the source for dx.
struct StencilAxis {
    int sources, positions, first;
    int taps, shift[kMaxTaps];                   // ascending
    int phases, crop, out;
    int source_phases, source_crop, source_out;
    int live[kMaxStride];                        // bit t: tap t has a weight in this phase
    int8_t kernel_of[kMaxTaps][kMaxStride];      // which weight: the kernel index of (tap, phase), or -1
    int8_t tap_of[kMaxTaps], phase_of[kMaxTaps]; // of a kernel index
    int kernel;
};

struct Stencil {
    StencilAxis axis[3];              // D, H, W
    HOST_DEVICE int taps() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
    HOST_DEVICE int phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
    HOST_DEVICE int source_phases() const { return axis[0].source_phases * axis[1].source_phases * axis[2].source_phases; }
};

// Which row of GEMM_M is which (channel, phase), phase = (r_d * phases_h + r_h) * phases_w + r_w. A row tile is 8 granules of 8
// channels each, `octets` channel octets times `packed_phases` neighbouring phases; the other phases have row tiles of their own.
struct RowMap {
    int packed_phases, octets, channel_tiles;
    HOST_DEVICE int row(int channel, int phase) const {
        const int row_tile = phase / packed_phases * channel_tiles + channel / (octets * 8);
        return row_tile * 64 + (channel / 8 % octets * packed_phases + phase % packed_phases) * 8 + channel % 8;
    }
};

HOST_DEVICE int kernel_volume(const Stencil& s) { return s.axis[0].kernel * s.axis[1].kernel * s.axis[2].kernel; }

// The index in the kernel's volume of a tap (d, h, w) and a phase, each counted over all axes, W fastest; -1 where there is none.
HOST_DEVICE int kernel_index(const Stencil& s, int tap, int phase) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int phases_h = h.phases * h.source_phases, phases_w = w.phases * w.source_phases;    // one of the two is 1
    const int kd = d.kernel_of[tap / w.taps / h.taps][phase / phases_w / phases_h];
    const int kh = h.kernel_of[tap / w.taps % h.taps][phase / phases_w % phases_h];
    const int kw = w.kernel_of[tap % w.taps][phase % phases_w];
    return kd >= 0 && kh >= 0 && kw >= 0 ? (kd * h.kernel + kh) * w.kernel + kw : -1;
}

// The tap and the phase of element k of the kernel's volume: the other way round.
struct TapPhase { int tap, phase; };
HOST_DEVICE TapPhase place_of_kernel(const Stencil& s, int k) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int kw = k % w.kernel, kh = k / w.kernel % h.kernel, kd = k / w.kernel / h.kernel;
    return {(d.tap_of[kd] * h.taps + h.tap_of[kh]) * w.taps + w.tap_of[kw], (d.phase_of[kd] * h.phases * h.source_phases + h.phase_of[kh]) * w.phases * w.source_phases + w.phase_of[kw]};
}

inline StencilAxis forward_axis_from(const Axis& a, int start) {
    StencilAxis s = {};
    s.kernel = a.kernel;
    s.phases = a.stride, s.crop = (a.padding + start) % a.stride, s.out = a.out;
    s.source_phases = 1, s.source_out = s.sources = a.in;
    s.first = (a.padding + start) / a.stride;
    s.positions = (a.out - 1 + s.crop) / a.stride + 1;
    for (auto& phases : s.kernel_of)
        for (int8_t& k : phases) k = -1;
    for (int k = 0; k < s.kernel; k++) {
        const int shift = (k * a.dilation + start) / a.stride, phase = (k * a.dilation + start) % a.stride;
        if (s.taps == 0 || s.shift[s.taps - 1] != shift) s.shift[s.taps++] = shift;
        s.live[phase] |= 1 << (s.taps - 1);
        s.kernel_of[s.taps - 1][phase] = k;
        s.tap_of[k] = s.taps - 1, s.phase_of[k] = phase;
    }
    return s;
}

inline StencilAxis make_forward_axis(const Axis& a) {
    StencilAxis best = forward_axis_from(a, 0);
    for (int start = 1; start < a.stride; start++) {
        const StencilAxis s = forward_axis_from(a, start);
        if (s.taps < best.taps || (s.taps == best.taps && s.positions < best.positions)) best = s;
    }
    return best;
}

// The forward axis the other way round: the source's position is first + p - shift with the shifts counted from the largest on.
inline StencilAxis make_dinput_axis(const Axis& a) {
    const StencilAxis forward = make_forward_axis(a);
    StencilAxis s = forward;
    s.sources = forward.positions, s.positions = forward.sources;
    s.phases = 1, s.crop = 0, s.out = forward.sources;
    s.source_phases = forward.phases, s.source_crop = forward.crop, s.source_out = forward.out;
    const int last = forward.taps - 1;
    s.first = forward.shift[last] - forward.first;
    for (int& live : s.live) live = 0;
    for (int k = 0; k < s.kernel; k++) s.tap_of[k] = last - forward.tap_of[k];
    for (int t = 0; t < s.taps; t++) {
        s.shift[t] = forward.shift[last] - forward.shift[last - t];
        for (int phase = 0; phase < s.source_phases; phase++) {
            s.kernel_of[t][phase] = forward.kernel_of[last - t][phase];
            s.live[phase] |= (forward.live[phase] >> (last - t) & 1) << t;
        }
    }
    return s;
}

inline Stencil make_stencil(Direction direction, const Geometry& g) {
    const auto make = direction == Direction::kForward ? make_forward_axis : make_dinput_axis;
    return {{make(g.axis[0]), make(g.axis[1]), make(g.axis[2])}};
}

// Whether the arrays above suffice, and 32-bit indices into a channel, the phases at its edges included.
inline bool has_stencil(const Geometry& g) {
    double in = 1, out = 1;
    for (const Axis& a : g.axis) {
        if (a.kernel > kMaxTaps || a.stride > kMaxStride) return false;
        in *= double(a.in), out *= double(a.out + 2 * a.stride);
    }
    return in < 1 << 30 && out < 1 << 30;
}
'''

_SOURCES['launch.cuh'] = r'''
// What every launcher shares: element types, the device guard, the launch check.
//
// A launcher is `extern "C"`, takes raw pointers, sizes, a device and a stream, and returns a cudaError_t as int
// (0 = success). It never synchronises and never allocates: scratch memory comes from the caller.
#pragma once

#include <atomic>

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

// One element of an array of dtype kFloat32, kFloat16 or kBFloat16.
__device__ __forceinline__ float load_as_float(const void* p, int dtype, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    return dtype == kFloat16 ? to_acc(static_cast<const __half*>(p)[i]) : to_acc(static_cast<const __nv_bfloat16*>(p)[i]);
}

__device__ __forceinline__ void store_as(void* p, int dtype, int64_t i, float v) {
    if (dtype == kFloat32) static_cast<float*>(p)[i] = v;
    else if (dtype == kFloat16) static_cast<__half*>(p)[i] = from_acc<__half>(v);
    else static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(v);
}

// Calls f with a value of the type behind one of these dtypes.
template <typename F> __device__ __forceinline__ void with_element(int dtype, F f) {
    if (dtype == kFloat32) f(float{});
    else if (dtype == kFloat16) f(__half{});
    else f(__nv_bfloat16{});
}

// Four neighbours, the i-th ones.
__device__ __forceinline__ void store_as(void* p, int dtype, int64_t i, float4 v) {
    if (dtype == kFloat32) {
        static_cast<float4*>(p)[i] = v;
        return;
    }
    const bool half = dtype == kFloat16;
    const __half2 h[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
    const __nv_bfloat162 b[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
    static_cast<uint2*>(p)[i] = half ? *reinterpret_cast<const uint2*>(h) : *reinterpret_cast<const uint2*>(b);
}

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

// Neighbours in memory, loaded and stored at once.
template <typename T, int kCount> struct alignas(kCount * sizeof(T)) Vector { T v[kCount]; };
template <typename V> bool holds(const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(V) == 0; }    // whether a V can stand there

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

inline int multiprocessors_of(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Shared memory that a block can have. SHARED_BYTES: of the architecture that this one is to be taken for.
inline int block_shared_bytes([[maybe_unused]] int device) {
#ifdef SHARED_BYTES
    return SHARED_BYTES;
#else
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
#endif
}

constexpr int64_t kMaxGrid = 0x7fffffff;    // blocks of a one-dimensional grid
constexpr int64_t kOverlappedBlocks = 1024;    // more of them start one after another, and waiting costs each a microsecond

#define RETURN_IF_ERROR(expression)          \
    do {                                     \
        const int error_ = (expression);     \
        if (error_ != 0) return error_;      \
    } while (0)

// On Hopper and later, a kernel's blocks are brought to the multiprocessors while the last ones of the kernel before it still run ("programmatic dependent launch"): as soon as all
// blocks of that one let them come, or have ended.
__device__ __forceinline__ void let_next_kernel_come() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_end_of_previous_kernel() {    // its writes included
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every kernel starts with this, or
__device__ __forceinline__ void wait_for_previous_kernel() { let_next_kernel_come(), wait_for_end_of_previous_kernel(); }
// with this, if the next kernel runs beside it: that one needs what this one has waited for, nothing that it writes, and waits at its own end, so that who waits for that has waited for both.
__device__ __forceinline__ void wait_before_next_kernel() { wait_for_end_of_previous_kernel(), let_next_kernel_come(); }

// Whether that is what the kernels for the current device do; not where they were built for an earlier architecture.
static bool kernels_wait(const void* kernel) {
    constexpr int kDevices = 64;
    enum : int { kUnknown, kNo, kYes };
    static std::atomic<int> known[kDevices];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
    if (known[device] == kUnknown) {
        cudaFuncAttributes attributes = {};
        known[device] = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 ? kYes : kNo;
    }
    return known[device] == kYes;
}

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(args...); an empty grid is a success. overlaps: its blocks, unless they are many, come while the kernel before runs.
template <typename... Params, typename... Args>
int launch_kernel(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, bool overlaps, void* stream, Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 0) RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes), config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap, config.numAttrs = overlaps && blocks <= kOverlappedBlocks && kernels_wait(reinterpret_cast<const void*>(kernel));
    cudaLaunchKernelEx(&config, kernel, Params(args)...);
    return cudaGetLastError();    // which then is forgotten
}

template <typename... Params, typename... Args>
int launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, void* stream, Args... args) {
    return launch_kernel(kernel, blocks, threads, shared_bytes, true, stream, args...);
}

template <typename... Params, typename... Args> int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    return launch_with_shared(kernel, blocks, threads, 0, stream, args...);
}
'''

_SOURCES['group_norm.cuh'] = r'''
// What every path of GroupNorm shares: reductions, and the elementwise half y = (r - mean) * rstd * gamma + beta.
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
    Mean() = default;
    __device__ explicit Mean(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
    __device__ __forceinline__ A center(A r) const { return (r - high) - low; }
};

// The elementwise half, in one channel.
template <typename A> struct ChannelNorm {
    Mean<A> mean;
    A scale, offset;
    ChannelNorm() = default;
    __device__ __forceinline__ ChannelNorm(double mean, double rstd, A gamma, A beta) : mean(mean), scale(A(rstd) * gamma), offset(beta) {}
    __device__ __forceinline__ A operator()(A r) const { return mean.center(r) * scale + offset; }
};

constexpr int64_t kSplitElements = 16384;    // of one block of a reduction

struct Pair { double a, b; };

// Moments that the epilogue of a convolution leaves, and what the statistics need beside them; null: not wanted.
struct MomentSets {
    float2* moments;         // (N, parts, channels): mean and sum of squared deviations of a channel in a part of the sample
    float* counts;           // (N, parts): how many values they are of; starts at zero
    Pair* group_sums;        // (N, num_groups, blocks): what the blocks of a group found (conv_statistics.cuh)
    unsigned* group_tickets; // (N, num_groups): how many of them are done; start at zero
    int parts, channels;
};

// Of `count` values, given their sum and that of their squares.
struct Statistics {
    double mean, rstd;
    __device__ __forceinline__ Statistics(Pair sums, double count, double eps) : mean(sums.a / count) {
        const double variance = sums.b / count - mean * mean;
        rstd = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
    }
};

// The sum over the block, in a fixed order, in every thread.
template <int kBlock = kThreads> __device__ __forceinline__ Pair block_sum(Pair v) {
    static_assert((kBlock & (kBlock - 1)) == 0, "halved again and again");
    __shared__ Pair sums[kBlock];
    __syncthreads();
    sums[threadIdx.x] = v;
    for (int half = kBlock / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x].a += sums[threadIdx.x + half].a;
            sums[threadIdx.x].b += sums[threadIdx.x + half].b;
        }
    }
    __syncthreads();
    return sums[0];
}

// gamma, beta may be null (1, 0). y may be r. Grid: (n, c, tile), the last first, which is still in the L2 cache. kWidth: elements that
// are loaded and stored at once.
template <typename T, typename Y, int kWidth>
__global__ void __launch_bounds__(kThreads)
normalize_kernel(Shape s, int64_t tiles, const T* r, const double* __restrict__ mean, const double* __restrict__ rstd,
                 const Acc<T>* __restrict__ gamma, const Acc<T>* __restrict__ beta, Y* y) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t block = gridDim.x - 1 - blockIdx.x, row = block / tiles, c = row % s.C, group = row / s.group_channels();
    const int64_t begin = row * s.S + block % tiles * (kThreads * kApplyElements) + threadIdx.x * kWidth, end = (row + 1) * s.S;
    Vector<T, kWidth> values[kApplyElements / kWidth];
#pragma unroll
    for (int i = 0; i < kApplyElements / kWidth; i++)
        if (begin + i * kThreads * kWidth < end) values[i] = *reinterpret_cast<const Vector<T, kWidth>*>(r + begin + i * kThreads * kWidth);
    const ChannelNorm<A> norm(mean[group], rstd[group], gamma ? gamma[c] : A(1), beta ? beta[c] : A(0));
#pragma unroll
    for (int i = 0; i < kApplyElements / kWidth; i++) {
        Vector<Y, kWidth> normalized;
#pragma unroll
        for (int e = 0; e < kWidth; e++) normalized.v[e] = from_acc<Y>(norm(to_acc(values[i].v[e])));
        if (begin + i * kThreads * kWidth < end) *reinterpret_cast<Vector<Y, kWidth>*>(y + begin + i * kThreads * kWidth) = normalized;
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

// Whether rows of two tensors can be read and written four elements at a time.
template <typename T, typename Y> bool has_vectors(const Shape& s, const void* r, const void* y) { return s.S % 4 == 0 && holds<Vector<T, 4>>(r) && holds<Vector<Y, 4>>(y); }

inline int64_t tiles_of(const Shape& s) { return ceil_div(s.S, kThreads * kApplyElements); }

template <typename T, typename Y>
int normalize(const Shape& s, void* stream, const void* r, const double* mean, const double* rstd, const void* gamma, const void* beta, void* y) {
    return launch(has_vectors<T, Y>(s, r, y) ? normalize_kernel<T, Y, 4> : normalize_kernel<T, Y, 1>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const T*>(r), mean, rstd,
                  static_cast<const Acc<T>*>(gamma), static_cast<const Acc<T>*>(beta), static_cast<Y*>(y));
}

}  // namespace group_norm
'''

_SOURCES['add_parts.cuh'] = r'''
// Sums over source channels that were made in parts, where whole ones are work for too few blocks: each part is an array like the result, in scratch
// memory, and here they are added.
#pragma once

#include "group_norm.cuh"

namespace parts {

constexpr int kThreads = 256;

// The result is (N, C, volume), the parts (count, N, C, volume).
struct Parts {
    const float* values;
    int count;
    int64_t N;
    int C, volume;
};

// Grid: (n, channel, kAddedOutputs values). A part of the moments is a block's values. out = epilogue(the sum of the parts, in their order); bias may be null.
__global__ void __launch_bounds__(kThreads) add_kernel(Parts p, int dtype, const void* bias, bool apply_relu, void* out, group_norm::MomentSets sets) {
    wait_for_previous_kernel();
    constexpr int kOwn = kAddedOutputs / kThreads;
    const int spans = (p.volume + kAddedOutputs - 1) / kAddedOutputs, span = blockIdx.x % spans, row = blockIdx.x / spans, channel = row % p.C, n = row / p.C;
    const int first = span * kAddedOutputs + threadIdx.x, count = min(kAddedOutputs, p.volume - span * kAddedOutputs);
    const int64_t origin = int64_t(row) * p.volume, part_size = p.N * p.C * p.volume;
    const float own_bias = bias ? load_as_float(bias, dtype, channel) : 0.0f;
    float values[kOwn] = {};
#pragma unroll 4
    for (int part = 0; part < p.count; part++)
#pragma unroll
        for (int i = 0; i < kOwn; i++)
            if (first + i * kThreads < p.volume) values[i] += p.values[part * part_size + origin + first + i * kThreads];
    group_norm::Pair sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        if (first + i * kThreads >= p.volume) continue;
        values[i] += own_bias;
        if (apply_relu) values[i] = relu(values[i]);
        store_as(out, dtype, origin + first + i * kThreads, values[i]);
        sum.a += values[i];
    }
    if (!sets.moments) return;
    const double mean = group_norm::block_sum<kThreads>(sum).a / count;
    sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++)
        if (first + i * kThreads < p.volume) sum.a += (values[i] - mean) * (values[i] - mean);
    sum = group_norm::block_sum<kThreads>(sum);
    if (threadIdx.x > 0) return;
    const int64_t set = int64_t(n) * spans + span;
    sets.moments[set * sets.channels + channel] = make_float2(float(mean), float(sum.a));
    sets.counts[set] = float(count);    // the same from every channel
}

inline int add(const Parts& p, int dtype, const void* bias, bool apply_relu, void* out, const group_norm::MomentSets& sets, void* stream) {
    return launch(add_kernel, p.N * p.C * ceil_div(p.volume, kAddedOutputs), kThreads, stream, p, dtype, bias, apply_relu, out, sets);
}

}  // namespace parts
'''

_SOURCES['ptx_sm80.cuh'] = r'''
// PTX instructions of sm_80 and up, one per wrapper, named after it. Reference: the PTX ISA's chapters "mma.m16n8k16", "ldmatrix" and
// "cp.async".
#pragma once

#include "launch.cuh"

// ----------------------------------------------------------------------------------------------------- Arithmetic

// v as TF32, in the bits of a float32 of which the tensor cores take the upper 19: rounded to nearest, ties away from zero, as cvt.rna.tf32 does, which has no instruction.
__device__ __forceinline__ uint32_t to_tf32(float v) {
    const float magnitude = __uint_as_float(__float_as_uint(v) & 0xff800000);    // a power of two, half of whose TF32 unit is added
    return __float_as_uint(fmaf(magnitude, 1.0f / 2048, v));
}
// What that leaves of v, likewise.
__device__ __forceinline__ uint32_t tf32_rest(float v) { return to_tf32(v - __uint_as_float(to_tf32(v) & 0xffffe000)); }

// max that keeps NaN
__device__ __forceinline__ float max_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// -------------------------------------------------------------------------------------------------- Shared memory

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void shared_store(uint32_t address, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory"); }
// Where `inside` is true.
__device__ __forceinline__ void shared_store(uint32_t address, const uint4& v, bool inside) {
    asm volatile("{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n@inside st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(inside)) : "memory");
}
__device__ __forceinline__ float shared_load(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

// Copies 16 bytes from global to shared memory in the background, or writes zeros where `inside` is false (`source` is then not read).
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(inside ? 16 : 0) : "memory");
}
// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(uint32_t destination, const void* source, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(inside ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Waits until all but kPending of this thread's groups are complete.
template <int kPending> __device__ __forceinline__ void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// --------------------------------------------------------------------------------------------------- Tensor cores

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 give the rows of matrix i, 16 bytes each. Element (lane / 4, lane % 4 * 2)
// and its neighbour go to a lane; transposed: element (lane % 4 * 2, lane / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// d (16, 8) += a (16, 16) * b (16, 8): fp16 operands, fp32 sums. Element i of a lane is row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16, 8) += a (16, 8) * b (8, 8): TF32 operands, fp32 sums. a: rows lane / 4 and 8 further of column lane % 4, then of the one 4 further; b: rows lane % 4 and 4
// further of column lane / 4; d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
'''

_SOURCES['swizzle.h'] = r'''
// Where elements of operands are, in shared memory and as fragments.
#pragma once

#include "geometry.h"

// Rows of a tile in shared memory, 32, 64 or 128 bytes each, are swizzled as the TMA unit does it: by the row's place in 128-byte lines,
// so that eight neighbouring rows' equal pieces lie in different banks. The offset of a 16-byte piece:
HOST_DEVICE uint32_t swizzled(int row, int piece, int row_bytes) {
    const int turn = row_bytes == 128 ? row & 7 : row_bytes == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return row * row_bytes + ((piece ^ turn) << 4);
}

// 64 rows of 16 columns of operand A as the lanes of four mma.m16n8k16 hold them: 16 bytes of each lane, 32 lanes, 16 rows after 16 rows (PTX ISA, "mma.m16n8k16"). Where an element is,
// in elements, is the sum of both; neighbouring columns, the first one even, are neighbours.
HOST_DEVICE int fragment_place_of_row(int row) { return row / 16 * 256 + row % 8 * 32 + row % 16 / 8 * 2; }
HOST_DEVICE int fragment_place_of_column(int column) { return column % 8 / 2 * 8 + column / 8 * 4 + column % 2; }
'''

_SOURCES['taps.h'] = r'''
// A layer's outputs as sums of products, one for each element k of the kernel and position i of the input, and its outputs' gradient spread out likewise: the index
// arithmetic, for host and device.
//
//   out[n, co, o] = bias[co] + sum over k, i with i * stride - padding + k * dilation = o of products[n, co, k, i]
//   spread[n, co, k, i] = dout[n, co, i * stride - padding + k * dilation], or 0 outside
//
//   products, spread (N, C_out, kernel volume, positions of the input)   out, dout (N, C_out, D_out, H_out, W_out)
#pragma once

#include "geometry.h"

#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace taps {

// Of an axis: the taps k, k + period, ... of an output read the positions i, i - step, ...
struct TapAxis {
    int in, out, kernel, stride, padding, dilation, period, step;
    Divisor by_in, by_out, by_kernel;
};

struct Layer {
    TapAxis d, h, w;
    int64_t rows;                              // (sample, output channel)
    int C_out, volume, positions, outputs;     // volume: of a kernel; positions and outputs: of a channel, whose products an int counts
};

inline TapAxis make_axis(const Axis& a) {
    const int64_t period = tap_period(a);
    return {int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(period), int(period * a.dilation / a.stride),
            make_divisor(int(a.in)), make_divisor(int(a.out)), make_divisor(int(a.kernel))};
}
inline Layer make_layer(const Geometry& g) {
    return {make_axis(g.axis[0]), make_axis(g.axis[1]), make_axis(g.axis[2]), g.N * g.C_out, int(g.C_out), int(kernel_volume(g)), int(in_volume(g)), int(out_volume(g))};
}

// Whether element k of the kernel and position i make output i * stride + k, and no others do. `_has_single_taps` in model_new.py is the same (tests/test_paths.py).
inline bool has_single_taps(const Geometry& g) {
    bool single = true;
    for (const Axis& a : g.axis) single &= a.kernel == a.stride && a.padding == 0 && (a.dilation == 1 || a.kernel == 1) && a.out == a.in * a.stride;
    return single;
}

// Taps that an output has along an axis, at most.
inline int most_taps(const TapAxis& a) { return int(ceil_div(a.kernel, a.period)); }
inline int most_taps(const Layer& layer) {
    const int d = most_taps(layer.d), h = most_taps(layer.h), w = most_taps(layer.w);
    return d > h ? (d > w ? d : w) : (h > w ? h : w);
}

struct Tap { int k, i; };

// The first tap that output o has inside the input, or one behind the kernel.
HOST_DEVICE Tap first_tap(const TapAxis& a, int o) {
    int k = 0;
    while (k < a.period && (o + a.padding - k * a.dilation) % a.stride != 0) k++;
    if (k == a.period) return {a.kernel, 0};
    Tap tap = {k, (o + a.padding - k * a.dilation) / a.stride};
    while (tap.i >= a.in && tap.k < a.kernel) tap.k += a.period, tap.i -= a.step;
    return tap;
}

// Where the taps of an output along an axis are among a channel's products, which is the sum of the three axes' places, or -1 where there is no such tap.
template <int kMost> struct Places {
    int at[kMost];
    HOST_DEVICE Places(const TapAxis& a, int o, int kernel_step, int position_step) {
        Tap tap = first_tap(a, o);
        UNROLL
        for (int& place : at) {
            place = tap.k < a.kernel && tap.i >= 0 ? tap.k * kernel_step + tap.i * position_step : -1;
            tap.k += a.period, tap.i -= a.step;
        }
    }
};

// The sum that output o of a channel is, where each axis has at most kMost taps; any number where kMost is 0. products: the channel's.
template <int kMost> HOST_DEVICE float sum_of(const Layer& layer, const float* products, int o) {
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    int od = o;
    const int ow = aw.by_out.take(od), oh = ah.by_out.take(od), plane = ah.in * aw.in, row_kernels = aw.kernel * layer.positions;
    float sum = 0;
    if constexpr (kMost > 0) {
        const Places<kMost> d(ad, od, ah.kernel * row_kernels, plane), h(ah, oh, row_kernels, aw.in), w(aw, ow, layer.positions, 1);
        UNROLL
        for (int i = 0; i < kMost; i++) {
            float values[kMost * kMost];    // under way at once
            UNROLL
            for (int j = 0; j < kMost * kMost; j++) {
                const int at_h = h.at[j / kMost], at_w = w.at[j % kMost];
                values[j] = d.at[i] >= 0 && at_h >= 0 && at_w >= 0 ? products[d.at[i] + at_h + at_w] : 0.0f;
            }
            UNROLL
            for (float v : values) sum += v;
        }
    } else {
        const Tap first_h = first_tap(ah, oh), first_w = first_tap(aw, ow);
        for (Tap d = first_tap(ad, od); d.k < ad.kernel && d.i >= 0; d.k += ad.period, d.i -= ad.step)
            for (Tap h = first_h; h.k < ah.kernel && h.i >= 0; h.k += ah.period, h.i -= ah.step)
                for (Tap w = first_w; w.k < aw.kernel && w.i >= 0; w.k += aw.period, w.i -= aw.step)
                    sum += products[(d.k * ah.kernel + h.k) * row_kernels + d.i * plane + h.i * aw.in + w.k * layer.positions + w.i];
    }
    return sum;
}

// The output of a channel that element k of its kernel makes of position i, or -1.
HOST_DEVICE int output_of(const Layer& layer, int k, int i) {
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    const int kw = aw.by_kernel.take(k), kh = ah.by_kernel.take(k), iw = aw.by_in.take(i), ih = ah.by_in.take(i);
    const int od = i * ad.stride - ad.padding + k * ad.dilation, oh = ih * ah.stride - ah.padding + kh * ah.dilation, ow = iw * aw.stride - aw.padding + kw * aw.dilation;
    const bool inside = unsigned(od) < unsigned(ad.out) && unsigned(oh) < unsigned(ah.out) && unsigned(ow) < unsigned(aw.out);
    return inside ? (od * ah.out + oh) * aw.out + ow : -1;
}

}  // namespace taps
'''

_SOURCES['taps.cuh'] = r'''
// Sums of taps, and the spread gradient of outputs (taps.h).
#pragma once

#include "launch.cuh"
#include "taps.h"

namespace taps {

constexpr int kThreads = 256;

// Grid: (sample, output channel, kThreads outputs). bias may be null.
template <int kMost> __global__ void __launch_bounds__(kThreads, 4) add_kernel(const __grid_constant__ Layer layer, const float* products, const float* bias, bool apply_relu, float* out) {
    wait_for_previous_kernel();
    const int spans = (layer.outputs + kThreads - 1) / kThreads, row = blockIdx.x / spans, o = (blockIdx.x - row * spans) * kThreads + threadIdx.x;
    if (o >= layer.outputs) return;
    float sum = sum_of<kMost>(layer, products + int64_t(row) * layer.volume * layer.positions, o);
    if (bias) sum += bias[row % layer.C_out];
    out[int64_t(row) * layer.outputs + o] = apply_relu ? relu(sum) : sum;
}

inline int add(const Layer& layer, void* stream, const float* products, const float* bias, bool apply_relu, float* out) {
    const int most = most_taps(layer);
    return launch(most <= 2 ? add_kernel<2> : most == 3 ? add_kernel<3> : add_kernel<0>, layer.rows * ceil_div(layer.outputs, kThreads), kThreads, stream, layer, products, bias, apply_relu, out);
}

// Grid: (sample, output channel, k, kThreads positions).
__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ Layer layer, const float* dout, float* spread) {
    wait_for_previous_kernel();
    const int spans = (layer.positions + kThreads - 1) / kThreads, tap = blockIdx.x / spans, i = (blockIdx.x - tap * spans) * kThreads + threadIdx.x, row = tap / layer.volume;
    if (i >= layer.positions) return;
    const int o = output_of(layer, tap - row * layer.volume, i);
    spread[int64_t(tap) * layer.positions + i] = o >= 0 ? dout[int64_t(row) * layer.outputs + o] : 0.0f;
}

inline int spread(const Layer& layer, void* stream, const float* dout, float* spread) {
    return launch(spread_kernel, layer.rows * layer.volume * ceil_div(layer.positions, kThreads), kThreads, stream, layer, dout, spread);
}

}  // namespace taps
'''

_SOURCES['gemm.cuh'] = r'''
// Products of matrices on the tensor cores in TF32, of operands as they lie in memory, which are elements of tensors (sample, channel, position): no copies, no scales.
//
//   out[m, n] = bias[m] + sum over k of rows[m, k] * columns[k, n]
//
// An operand whose neighbours in memory are rows (columns) of equal k is an outer one, one whose neighbours are k of a row (column) an inner one.
// Where float32 accuracy is wanted, an operand is high + low, both TF32, and high * high + high * low + low * high is added up.
// conv_transpose3d_gemm.cu tells what is multiplied.
#pragma once

#include <type_traits>

#include "ptx_sm80.cuh"

namespace gemm {

constexpr int kChunk = 16;                     // of GEMM_K: a stage of shared memory
constexpr int kBlockRows = 32, kBlockColumns = 32;    // that a warp multiplies at a time

// Warps of a block, the blocks of rows that a warp has, stages of shared memory, blocks on a multiprocessor.
template <int kWarpsM_, int kWarpsN_, int kBlocks_, int kStages_, int kResident_> struct Cut {
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kRows = kWarpsM * kBlocks * kBlockRows, kColumns = kWarpsN * kBlockColumns;
};

// Where an operand lies: element (sample, group, i, j) at sample * sample_pitch + group * group_pitch + i * pitch + j. i is k of an outer one, j of an inner one.
struct Matrix {
    const void* data;
    int64_t sample_pitch, group_pitch, pitch;
    bool aligned;                              // whether neighbours are whole vectors
};

// Outputs that are neighbours in memory: those of two rows, with a kernel of 2 along W, and there of two positions; or those of four positions.
enum class Neighbours { kNone, kPairs, kPairsOfTwo, kFour };

struct Parameters {
    Matrix rows, columns;
    int groups, M, N, K;                       // of a group. N: the positions of all samples, where vectors of them are of one sample, or of one; K: of a sample
    int column_samples, k_samples;             // samples that are not part of N; samples to be summed
    int k_parts, part_steps;                   // the sum in parts, each of so many stages; each part has an output of its own
    int tiles;
    Divisor by_row_tiles, by_column_tiles, by_groups, by_column_samples;    // tiles: (part of the sum, sample, group, columns, rows)
    // Outputs: row m is element k of channel c's kernel, column n position i of its sample, and out[n, c, i * stride + k] the output.
    int positions;                             // of a sample
    Divisor by_positions, by_volume, by_kernel_w, by_kernel_h, by_in_w, by_in_h;
    int out_h, out_w, out_volume, stride_d, stride_h, stride_w;
    int64_t sample_outputs, part_outputs;
    Neighbours neighbours;
    bool apply_relu;
    const void* bias;                          // or null
    void* out;
    __host__ __device__ __forceinline__ int sample_steps() const { return (K + kChunk - 1) / kChunk; }
};

// ------------------------------------------------------------------------------------------------------- Operands
//
// A stage has kChunk of GEMM_K, of which lane % 4 = t multiplies 4 t to 4 t + 3: with the tensor cores' k = t and t + 4 of the first 8 and of the last 8, which are any
// four as long as both operands have the same.

// Four neighbouring elements.
template <typename T> __device__ __forceinline__ void load_four(float (&v)[4], const T* p) {
    const auto four = *reinterpret_cast<const Vector<T, 4>*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_acc(four.v[i]);
}

template <typename T> __device__ __forceinline__ void copy_element(T* to, const T* from, bool inside) {
    if constexpr (sizeof(T) == 4) cp_async_4(shared_address(to), from, inside);
    else *to = inside ? *from : T();
}

// A stage: (kChunk, kCount), k = 4 t + i as row 4 i + t. Rows begin 8 banks apart, so that a fragment's lanes read different ones.
template <typename T, int kCount, int kThreads> struct Outer {
    static constexpr int kVector = 16 / sizeof(T), kPieces = kCount / kVector, kStep = kThreads / kPieces, kPitch = kCount + 32 / int(sizeof(T)), kElements = kChunk * kPitch;
    static_assert(kThreads % kPieces == 0 && kChunk % kStep == 0 && kStep % 4 == 0, "every thread has the same neighbours of some k");
    const T* source;     // the thread's neighbours of its first k of the next stage
    int64_t pitch;
    int count, left;     // neighbours and k that there are, from there on
    bool aligned;

    // first: its first neighbour for k = 0, of `count`.
    __device__ __forceinline__ Outer(const Parameters& a, const Matrix& m, const T* first, int count, int step)
        : source(first + (own_k() + step * kChunk) * m.pitch), pitch(m.pitch), count(count), left(a.K - own_k() - step * kChunk), aligned(m.aligned) {}
    static __device__ __forceinline__ int own_k() { return threadIdx.x / kPieces; }
    static __device__ __forceinline__ int own() { return threadIdx.x % kPieces * kVector; }    // neighbours

    __device__ __forceinline__ void load(T* stage) {
        T* const to = stage + (own_k() % 4 * 4 + own_k() / 4) * kPitch + own();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kChunk; i += kStep) cp_async_16(shared_address(to + i / 4 * kPitch), source + i * pitch, i < left && count > 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kChunk; i += kStep)
#pragma unroll
                for (int j = 0; j < kVector; j++) copy_element(to + i / 4 * kPitch + j, source + i * pitch + j, i < left && j < count);
        }
        source += kChunk * pitch, left -= kChunk;
    }
    // v[i][k]: of the lane's rows or columns, four neighbours of each block of 32 from `first` on.
    template <int kBlocks> static __device__ __forceinline__ void fragment(float (&v)[kBlocks * 4][4], const T* stage, int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
                float four[4];
                load_four(four, stage + (k * 4 + lane % 4) * kPitch + first + block * 32 + lane / 4 * 4);
#pragma unroll
                for (int i = 0; i < 4; i++) v[block * 4 + i][k] = four[i];
            }
    }
};

// A stage: (kCount, kChunk). Rows begin 20 banks apart.
template <typename T, int kCount, int kThreads> struct Inner {
    static_assert(sizeof(T) == 4, "a vector has four k");
    static constexpr int kVector = 4, kPieces = kChunk / kVector, kStep = kThreads / kPieces, kPitch = kChunk + 4, kElements = kCount * kPitch;
    static_assert(kCount % kStep == 0, "every thread has the same k of some rows");
    const T* source;     // the thread's k of its first row of the next stage
    int64_t pitch, jump; // jump: to the next sample, at a sample's end
    int count, left;     // rows and k of the sample that there are, from there on
    int K;
    bool aligned;

    // first: the tile's first row of sample 0 for k = 0, of `count`.
    __device__ __forceinline__ Inner(const Parameters& a, const Matrix& m, const T* first, int count, int step)
        : pitch(m.pitch), jump(m.sample_pitch - a.sample_steps() * kChunk), count(count - own_row()), K(a.K - own_k()), aligned(m.aligned) {
        const int sample = step / a.sample_steps(), k = (step - sample * a.sample_steps()) * kChunk;
        source = first + sample * m.sample_pitch + own_row() * pitch + own_k() + k, left = K - k;
    }
    static __device__ __forceinline__ int own_row() { return threadIdx.x / kPieces; }
    static __device__ __forceinline__ int own_k() { return threadIdx.x % kPieces * kVector; }
    static __device__ __forceinline__ int own() { return 0; }

    __device__ __forceinline__ void load(T* stage) {
        T* const to = stage + own_row() * kPitch + own_k();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kCount; i += kStep) cp_async_16(shared_address(to + i * kPitch), source + i * pitch, i < count && left > 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kCount; i += kStep)
#pragma unroll
                for (int j = 0; j < kVector; j++) copy_element(to + i * kPitch + j, source + i * pitch + j, i < count && j < left);
        }
        source += kChunk, left -= kChunk;
        if (left + own_k() <= 0) source += jump, left = K;
    }
    template <int kBlocks> static __device__ __forceinline__ void fragment(float (&v)[kBlocks * 4][4], const T* stage, int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < kBlocks; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) load_four(v[block * 4 + i], stage + (first + block * 32 + lane / 4 * 4 + i) * kPitch + lane % 4 * 4);
    }
};

// Which operands are inner ones.
template <bool kInnerRows_, bool kInnerColumns_> struct Layout {
    static constexpr bool kInnerRows = kInnerRows_, kInnerColumns = kInnerColumns_;
};

// ------------------------------------------------------------------------------------------------------- Products

// The sums of a warp, in fragments of 16 rows and 8 columns. Rows and columns are dealt to them so that a lane has neighbours: rows lane / 4 * 4 to + 3 are those of two
// fragments, columns lane % 4 * 8 to + 7 those of four.
template <int kBlocks> struct Sums {
    float v[kBlocks * 2][4][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : v)
#pragma unroll
            for (auto& fragment : row)
#pragma unroll
                for (float& sum : fragment) sum = 0;
    }
    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (int i = 0; i < kBlocks * 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) v[i][j][k] += other.v[i][j][k];
    }
};

// What a warp multiplies at a time, 8 of GEMM_K: high parts, or low ones.
template <int kBlocks> struct Fragments {
    uint32_t a[kBlocks * 2][4], b[4][2];
    __device__ __forceinline__ void put_row(int i, int half, uint32_t v) { a[i / 2][half * 2 + i % 2] = v; }
    __device__ __forceinline__ void put_column(int j, int half, uint32_t v) { b[j][half] = v; }
};

template <int kBlocks> __device__ __forceinline__ void multiply(Sums<kBlocks>& sums, const Fragments<kBlocks>& rows, const Fragments<kBlocks>& columns) {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_m16n8k8_tf32(sums.v[i][j], rows.a[i], columns.b[j][0], columns.b[j][1]);
}

// sums += the product of a stage. rows and columns: the lane's values of it.
template <bool kSplit, int kBlocks> __device__ __forceinline__ void multiply_stage(Sums<kBlocks>& sums, const float (&rows)[kBlocks * 4][4], const float (&columns)[4][4]) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        Fragments<kBlocks> high, low;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int k = step * 2 + half;
#pragma unroll
            for (int i = 0; i < kBlocks * 4; i++) {
                high.put_row(i, half, to_tf32(rows[i][k]));
                if (kSplit) low.put_row(i, half, tf32_rest(rows[i][k]));
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                high.put_column(j, half, to_tf32(columns[j][k]));
                if (kSplit) low.put_column(j, half, tf32_rest(columns[j][k]));
            }
        }
        if (kSplit) multiply(sums, low, high), multiply(sums, high, low);
        multiply(sums, high, high);
    }
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// A tile: its first row and column, its group, sample and part of the sum.
struct Place { int row, column, group, sample, part; };

// A column of a tile: its sample and position.
struct Column { int n, position; };
__device__ __forceinline__ Column column_of(const Parameters& a, const Place& tile, int column) {
    int n = column;
    const int position = a.by_positions.take(n);
    return {tile.sample + n, position};
}

// Of a row of a tile: its first output in a sample, or -1 where there is none, and its bias.
struct Row {
    int place;
    float bias;
};

template <typename T> __device__ __forceinline__ Row row_of(const Parameters& a, int row, int group) {
    if (row >= a.M) return {-1, 0};
    const int tap = a.by_volume.take(row), channel = group * a.by_volume.divide(a.M) + row;
    int k = tap;
    const int kw = a.by_kernel_w.take(k), kh = a.by_kernel_h.take(k);
    return {channel * a.out_volume + (k * a.out_h + kh) * a.out_w + kw, a.bias ? to_acc(static_cast<const T*>(a.bias)[channel]) : 0.0f};
}

// A sum in float32, of outer operands.
template <typename T> __device__ __noinline__ float sum_again(const Parameters& a, int group, int row, const Column& column) {
    const T* m = static_cast<const T*>(a.rows.data) + group * a.rows.group_pitch + row;
    const T* n = static_cast<const T*>(a.columns.data) + column.n * a.columns.sample_pitch + group * a.columns.group_pitch + column.position;
    float sum = 0;
    for (int k = 0; k < a.K; k++) sum = fmaf(to_acc(m[k * a.rows.pitch]), to_acc(n[k * a.columns.pitch]), sum);
    return sum;
}

// A warp's sums go by way of shared memory, 16 rows at a time, (16, kStagingPitch), each two of which are neighbours.
constexpr int kStagedRows = 16, kStagingPitch = kBlockColumns + 4;

// Stores them. A lane has kPositions neighbours along W of kRows neighbouring rows, which are outputs that are neighbours in memory. rows: the warp's.
template <typename T, bool kSplit, int kPositions, int kRows>
__device__ __forceinline__ void store_staged(const Parameters& a, const Place& tile, int first_row, int column, const Row* rows, int first, const float* staging) {
    const int lane = threadIdx.x % 32, own = lane * kPositions % 32;
    if (column + own >= a.N) return;
    const Column first_column = column_of(a, tile, column + own);
    int d = first_column.position;
    const int w = a.by_in_w.take(d), h = a.by_in_h.take(d);
    T* const out = static_cast<T*>(a.out) + tile.part * a.part_outputs + first_column.n * a.sample_outputs + (d * a.stride_d * a.out_h + h * a.stride_h) * a.out_w + w * a.stride_w;
#pragma unroll 2
    for (int staged = lane * kPositions / 32 * kRows; staged < kStagedRows; staged += kPositions * kRows) {
        const int row = first + staged / 2 * 4 + staged % 2;
        const int place = rows[row].place;
        if (place < 0) continue;
        Vector<T, kPositions * kRows> outputs;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const auto sums = *reinterpret_cast<const Vector<float, kPositions>*>(staging + (staged + i) * kStagingPitch + own);
#pragma unroll
            for (int j = 0; j < kPositions; j++) {
                float v = sums.v[j];
                // The parts of what is not finite, or rounds to what is not, make NaN of what may be Inf.
                if (kSplit && !(fabsf(v) < __int_as_float(0x7f800000))) v = sum_again<T>(a, tile.group, first_row + row + i, {first_column.n, first_column.position + j});
                v += rows[row + i].bias;
                outputs.v[j * kRows + i] = from_acc<T>(a.apply_relu ? relu(v) : v);
            }
        }
        *reinterpret_cast<Vector<T, kPositions * kRows>*>(out + place) = outputs;
    }
}

template <typename T, bool kSplit, int kBlocks>
__device__ __forceinline__ void store(const Parameters& a, const Place& tile, int warp_row, int column, const Row* rows, const Sums<kBlocks>& sums, float* staging) {
    const int lane = threadIdx.x % 32, first_row = tile.row + warp_row;
#pragma unroll 1
    for (int i = 0; i < kBlocks * 2; i++) {
        __syncwarp();
#pragma unroll
        for (int own = 0; own < kBlocks * 2; own++) {
            if (own != i) continue;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    *reinterpret_cast<float4*>(staging + (lane / 4 * 2 + half) * kStagingPitch + lane % 4 * 8 + k * 4) =
                        make_float4(sums.v[own][0][half * 2 + k], sums.v[own][1][half * 2 + k], sums.v[own][2][half * 2 + k], sums.v[own][3][half * 2 + k]);
        }
        __syncwarp();
        const int first = i / 2 * kBlockRows + i % 2 * 2;
        switch (a.neighbours) {
            case Neighbours::kPairsOfTwo: store_staged<T, kSplit, 2, 2>(a, tile, first_row, column, rows, first, staging); break;
            case Neighbours::kPairs: store_staged<T, kSplit, 1, 2>(a, tile, first_row, column, rows, first, staging); break;
            case Neighbours::kFour: store_staged<T, kSplit, 4, 1>(a, tile, first_row, column, rows, first, staging); break;
            default: store_staged<T, kSplit, 1, 1>(a, tile, first_row, column, rows, first, staging);
        }
    }
}

// --------------------------------------------------------------------------------------------------------- Kernel

template <typename T, typename L, typename C> struct Shared {
    using Rows = std::conditional_t<L::kInnerRows, Inner<T, C::kRows, C::kThreads>, Outer<T, C::kRows, C::kThreads>>;
    using Columns = std::conditional_t<L::kInnerColumns, Inner<T, C::kColumns, C::kThreads>, Outer<T, C::kColumns, C::kThreads>>;
    struct {
        T rows[Rows::kElements], columns[Columns::kElements];
    } stages[C::kStages];
    float staging[C::kThreads / 32][kStagedRows * kStagingPitch];    // of the warps
    Row rows[2][C::kRows];                                  // of the tile, and of the one before
};

template <typename T, bool kSplit, typename L, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) gemm_kernel(const __grid_constant__ Parameters a) {
    wait_for_previous_kernel();
    using Memory = Shared<T, L, C>;
    using Rows = typename Memory::Rows;
    using Columns = typename Memory::Columns;
    extern __shared__ __align__(16) uint8_t base[];
    Memory& shared = *reinterpret_cast<Memory*>(base);
    const int warp = threadIdx.x / 32, warp_row = warp % C::kWarpsM * C::kBlocks * kBlockRows, warp_column = warp / C::kWarpsM * kBlockColumns;
    const int all_steps = a.sample_steps() * a.k_samples;

    const auto place_of = [&](int tile) {
        const int row = a.by_row_tiles.take(tile), column = a.by_column_tiles.take(tile), group = a.by_groups.take(tile), sample = a.by_column_samples.take(tile);
        return Place{row * C::kRows, column * C::kColumns, group, sample, tile};
    };
    const auto steps_of = [&](const Place& p) { return min(a.part_steps, all_steps - p.part * a.part_steps); };
    // Loads go on from tile to tile, so that the next one's are on their way while outputs are stored.
    const auto rows_of = [&](const Place& p) {
        const int row = p.row + Rows::own();
        return Rows(a, a.rows, static_cast<const T*>(a.rows.data) + p.group * a.rows.group_pitch + row * (L::kInnerRows ? a.rows.pitch : 1), a.M - row, p.part * a.part_steps);
    };
    const auto columns_of = [&](const Place& p) {
        const int column = p.column + Columns::own();
        const T* const first = static_cast<const T*>(a.columns.data) + p.group * a.columns.group_pitch;
        const Column own = column_of(a, p, column);
        return Columns(a, a.columns, L::kInnerColumns ? first + column * a.columns.pitch : first + own.n * a.columns.sample_pitch + own.position, a.N - column, p.part * a.part_steps);
    };
    int next_tile = blockIdx.x, next_step = 0, next_stage = 0;
    Place next = place_of(next_tile);
    int next_steps = steps_of(next);
    Rows rows = rows_of(next);
    Columns columns = columns_of(next);
    const auto load_next = [&] {
        if (next_tile < a.tiles) {
            if (next_step == next_steps) {
                next_step = 0, next_tile += gridDim.x;
                if (next_tile < a.tiles) {
                    next = place_of(next_tile);
                    next_steps = steps_of(next), rows = rows_of(next), columns = columns_of(next);
                }
            }
            if (next_tile < a.tiles) rows.load(shared.stages[next_stage].rows), columns.load(shared.stages[next_stage].columns), next_step++;
        }
        cp_async_commit_group();
        next_stage = next_stage + 1 == C::kStages ? 0 : next_stage + 1;
    };
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1; i++) load_next();

    int stage = 0;
    bool odd = false;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, odd = !odd) {
        const Place place = place_of(tile);
        Row* const own_rows = shared.rows[odd];    // some warps may still be at the tile before
#pragma unroll 1
        for (int i = threadIdx.x; i < C::kRows; i += C::kThreads) own_rows[i] = row_of<T>(a, place.row + i, place.group);
        Sums<C::kBlocks> sums;
        sums.clear();
        const int steps = steps_of(place);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            cp_async_wait_group<C::kStages - 2>();
            __syncthreads();
            load_next();
            float row_values[C::kBlocks * 4][4], column_values[4][4];
            Rows::template fragment<C::kBlocks>(row_values, shared.stages[stage].rows, warp_row);
            Columns::template fragment<1>(column_values, shared.stages[stage].columns, warp_column);
            if constexpr (kSplit) {    // short sums on the tensor cores, which truncate each, and the long one rounded
                Sums<C::kBlocks> part;
                part.clear();
                multiply_stage<true>(part, row_values, column_values);
                sums.add(part);
            } else {
                multiply_stage<false>(sums, row_values, column_values);
            }
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
        }
        store<T, kSplit>(a, place, warp_row, place.column + warp_column, own_rows + warp_row, sums, shared.staging[warp]);
    }
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <typename T, bool kSplit, typename L, typename C> int launch_cut(Parameters a, int multiprocessors, void* stream) {
    const int64_t row_tiles = ceil_div(a.M, C::kRows), column_tiles = ceil_div(a.N, C::kColumns), tiles = row_tiles * column_tiles * a.groups * a.column_samples * a.k_parts;
    if (tiles > 1 << 30) return cudaErrorInvalidConfiguration;
    a.by_row_tiles = make_divisor(int(row_tiles)), a.by_column_tiles = make_divisor(int(column_tiles)), a.by_groups = make_divisor(a.groups), a.by_column_samples = make_divisor(a.column_samples);
    a.tiles = int(tiles);
    const int64_t most = int64_t(multiprocessors) * C::kResident;
    return launch_with_shared(gemm_kernel<T, kSplit, L, C>, tiles < most ? tiles : most, C::kThreads, sizeof(Shared<T, L, C>), stream, a);
}

template <typename L> using Large = Cut<1, 4, 2, 3, L::kInnerRows ? 3 : 4>;    // inner operands take more registers
using Small = Cut<2, 2, 1, 8, 2>;

// Tiles that a multiprocessor has, in numbers of small ones.
template <typename C> double time_of(const Parameters& a, int multiprocessors) {
    return double(ceil_div(ceil_div(a.M, C::kRows) * ceil_div(a.N, C::kColumns) * a.groups * a.column_samples * a.k_parts, multiprocessors)) * (C::kBlocks > 1 ? 1.3 : 1);
}

// Split operands take more registers too, and small tiles were as fast (NOTES.md).
template <typename T, bool kSplit, typename L> int multiply(const Parameters& a, int multiprocessors, void* stream) {
    if constexpr (!kSplit)
        if (time_of<Large<L>>(a, multiprocessors) <= time_of<Small>(a, multiprocessors)) return launch_cut<T, kSplit, L, Large<L>>(a, multiprocessors, stream);
    return launch_cut<T, kSplit, L, Small>(a, multiprocessors, stream);
}

}  // namespace gemm
'''

_SOURCES['conv_transpose3d_gemm.cu'] = r'''
// Transposed convolution and its gradients as products of matrices (gemm.cuh): the launchers. With i the positions of a sample, and k the elements of a kernel,
//
//   forward   products[n, (co, k), i] = sum over ci of w[ci, (co, k)] * x[n, ci, i], which are the outputs where each has one tap; otherwise taps.cuh adds them up
//   dx        dx[n, ci, i] = sum over co, k of w[ci, (co, k)] * spread[n, (co, k), i], dout as taps.cuh spreads it
//   dweight   dw[ci, (co, k)] = sum over n, i of x[n, ci, i] * spread[n, (co, k), i]
//
// Formula: torch.nn.ConvTranspose3d.

#include "add_parts.cuh"
#include "gemm.cuh"
#include "precision.h"
#include "taps.cuh"

namespace gemm {

using Forward = Layout<false, false>;
using DInput = Layout<true, false>;
using DWeight = Layout<true, true>;

constexpr int kLeastSteps = 8;                 // of a part of the sum

template <typename T> Matrix matrix_of(const void* data, int64_t sample_pitch, int64_t group_pitch, int64_t pitch) {
    const auto whole = [](int64_t elements) { return elements * int64_t(sizeof(T)) % 16 == 0; };
    return {data, sample_pitch, group_pitch, pitch, whole(sample_pitch) && whole(group_pitch) && whole(pitch) && holds<uint4>(data)};
}

// The positions of samples as GEMM_N.
inline void set_columns(Parameters& a, int64_t positions, int64_t samples, bool whole) {
    const bool together = whole && samples * positions < 1 << 30;
    a.positions = int(positions), a.by_positions = make_divisor(a.positions);
    a.N = int(together ? samples * positions : positions), a.column_samples = int(together ? 1 : samples);
}

// Outputs of a layer with single taps.
template <typename T> void set_outputs(Parameters& a, const Geometry& g, void* out) {
    const Axis &d = g.axis[0], &h = g.axis[1], &w = g.axis[2];
    a.by_volume = make_divisor(int(kernel_volume(g))), a.by_kernel_w = make_divisor(int(w.kernel)), a.by_kernel_h = make_divisor(int(h.kernel));
    a.by_in_w = make_divisor(int(w.in)), a.by_in_h = make_divisor(int(h.in));
    a.out_h = int(h.out), a.out_w = int(w.out), a.out_volume = int(out_volume(g)), a.sample_outputs = g.C_out * a.out_volume;
    a.stride_d = int(d.stride), a.stride_h = int(h.stride), a.stride_w = int(w.stride), a.out = out;
    if (w.kernel == 2 && holds<Vector<T, 4>>(out)) a.neighbours = w.in % 2 == 0 ? Neighbours::kPairsOfTwo : Neighbours::kPairs;
    if (w.kernel == 1 && holds<Vector<T, 4>>(out) && w.in % 4 == 0) a.neighbours = Neighbours::kFour;
}

// The layer whose outputs are (channels, positions) of a sample, a row each: a kernel of 1.
inline Geometry rows_of(int64_t channels, int64_t positions) {
    const Axis one = {1, 1, 1, 1, 0, 1}, all = {positions, positions, 1, 1, 0, 1};
    return {1, channels, channels, 1, {one, one, all}};
}

// ------------------------------------------------------------------------------------------------------- Forward

inline int64_t products_of(const Geometry& g) { return g.N * g.C_out * kernel_volume(g) * in_volume(g); }

inline int64_t forward_workspace(const Geometry& g) { return taps::has_single_taps(g) ? 0 : products_of(g) * int64_t(sizeof(float)); }

template <typename T> int forward(const Geometry& g, int device, void* stream, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const int64_t in = g.C_in / g.groups, rows = g.C_out / g.groups * kernel_volume(g), positions = in_volume(g);
    const bool single = taps::has_single_taps(g);
    if (!single && sizeof(T) != 4) return cudaErrorNotSupported;
    Parameters a = {};
    a.rows = matrix_of<T>(w, 0, in * rows, rows), a.columns = matrix_of<T>(x, g.C_in * positions, in * positions, positions);
    a.groups = int(g.groups), a.M = int(rows), a.K = int(in), a.k_samples = a.k_parts = 1, a.part_steps = a.sample_steps();
    set_columns(a, positions, g.N, positions * sizeof(T) % 16 == 0);
    if (single) set_outputs<T>(a, g, out), a.bias = bias, a.apply_relu = apply_relu;
    else set_outputs<T>(a, rows_of(g.C_out * kernel_volume(g), positions), workspace);
    const int multiprocessors = multiprocessors_of(device);
    RETURN_IF_ERROR((sizeof(T) == 4 && forward_in_float32(g) ? multiply<T, sizeof(T) == 4, Forward>(a, multiprocessors, stream) : multiply<T, false, Forward>(a, multiprocessors, stream)));
    return single ? cudaSuccess : taps::add(taps::make_layer(g), stream, static_cast<const float*>(workspace), static_cast<const float*>(bias), apply_relu, static_cast<float*>(out));
}

// ----------------------------------------------------------------------------------------------------- Gradients

// The sum in so many parts that all multiprocessors have tiles.
inline void cut_sum(Parameters& a, int multiprocessors) {
    const int64_t tiles = ceil_div(a.M, Small::kRows) * ceil_div(a.N, Small::kColumns) * a.groups * a.column_samples, steps = int64_t(a.sample_steps()) * a.k_samples;
    const int64_t wanted = Small::kResident * multiprocessors / tiles, most = ceil_div(steps, kLeastSteps), parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
    a.part_steps = int(ceil_div(steps, parts)), a.k_parts = int(ceil_div(steps, a.part_steps));
}

// dx, without its addresses.
inline Parameters dinput_of(const Geometry& g, int multiprocessors) {
    Parameters a = {};
    a.groups = int(g.groups), a.M = int(g.C_in / g.groups), a.K = int(g.C_out / g.groups * kernel_volume(g)), a.k_samples = 1;
    set_columns(a, in_volume(g), g.N, in_volume(g) % 4 == 0);
    cut_sum(a, multiprocessors);
    return a;
}
// dweight, likewise: rows are input channels, columns elements of their kernels, as the positions of one sample.
inline Parameters dweight_of(const Geometry& g, int multiprocessors) {
    Parameters a = {};
    a.groups = int(g.groups), a.M = int(g.C_in / g.groups), a.K = int(in_volume(g)), a.k_samples = int(g.N);
    set_columns(a, g.C_out / g.groups * kernel_volume(g), 1, true);
    cut_sum(a, multiprocessors);
    return a;
}

struct GradientsMemory {
    float *spread, *parts;
    int64_t bytes;
    GradientsMemory(const Geometry& g, const Parameters& dinput, const Parameters& dweight, void* base) {
        const int64_t spread_count = kernel_volume(g) == 1 && taps::has_single_taps(g) ? 0 : ceil_div(products_of(g), 64) * 64;
        const auto count = [](const Parameters& a, int64_t outputs) { return a.k_parts > 1 ? a.k_parts * outputs : 0; };
        const int64_t dinput_count = count(dinput, g.N * g.C_in * in_volume(g)), dweight_count = count(dweight, g.C_in * (g.C_out / g.groups) * kernel_volume(g));
        spread = spread_count > 0 ? static_cast<float*>(base) : nullptr, parts = static_cast<float*>(base) + spread_count;
        bytes = (spread_count + (dinput_count > dweight_count ? dinput_count : dweight_count)) * int64_t(sizeof(float));    // one after the other
    }
};

inline int64_t gradients_workspace(const Geometry& g, int device) {
    const int multiprocessors = multiprocessors_of(device);
    return GradientsMemory(g, dinput_of(g, multiprocessors), dweight_of(g, multiprocessors), nullptr).bytes;
}

// out (samples, channels, positions): the product, or the sum of its parts.
template <typename L> int multiply_parts(Parameters& a, int64_t samples, int64_t channels, float* parts, float* out, int multiprocessors, void* stream) {
    set_outputs<float>(a, rows_of(channels, a.positions), a.k_parts > 1 ? parts : out);
    a.part_outputs = samples * a.sample_outputs;
    RETURN_IF_ERROR((multiply<float, false, L>(a, multiprocessors, stream)));
    return a.k_parts == 1 ? cudaSuccess : parts::add({parts, a.k_parts, samples, int(channels), a.positions}, kFloat32, nullptr, false, out, {}, stream);
}

// dx and dweight may be null.
inline int gradients(const Geometry& g, int device, void* stream, void* workspace, const float* dout, const float* x, const float* w, float* dx, float* dweight) {
    const int multiprocessors = multiprocessors_of(device);
    const int64_t in = g.C_in / g.groups, elements = g.C_out / g.groups * kernel_volume(g), positions = in_volume(g), spread_channels = g.C_out * kernel_volume(g);
    Parameters dinput_product = dinput_of(g, multiprocessors), dweight_product = dweight_of(g, multiprocessors);
    const GradientsMemory memory(g, dinput_product, dweight_product, workspace);
    if (memory.spread) RETURN_IF_ERROR(taps::spread(taps::make_layer(g), stream, dout, memory.spread));
    const Matrix spread = matrix_of<float>(memory.spread ? memory.spread : dout, spread_channels * positions, elements * positions, positions);
    if (dx) {
        dinput_product.rows = matrix_of<float>(w, 0, in * elements, elements), dinput_product.columns = spread;
        RETURN_IF_ERROR(multiply_parts<DInput>(dinput_product, g.N, g.C_in, memory.parts, dx, multiprocessors, stream));
    }
    if (!dweight) return cudaSuccess;
    dweight_product.rows = matrix_of<float>(x, g.C_in * positions, in * positions, positions), dweight_product.columns = spread;
    return multiply_parts<DWeight>(dweight_product, 1, g.C_in, memory.parts, dweight, multiprocessors, stream);
}

}  // namespace gemm

extern "C" int64_t conv_transpose3d_forward_gemm_workspace(const Geometry* g, int, int) { return gemm::forward_workspace(*g); }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_gemm(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) -> int {
        using T = decltype(element);
        if constexpr (sizeof(T) == 8) return cudaErrorNotSupported;
        else return gemm::forward<T>(*g, device, stream, workspace, x, w, bias, apply_relu != 0, out);
    });
}

extern "C" int64_t conv_transpose3d_gradients_gemm_workspace(const Geometry* g, int, int device) { return gemm::gradients_workspace(*g, device); }

// float32. dx and dweight may be null.
extern "C" int conv_transpose3d_gradients_gemm(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* dout, const void* x, const void* w, void* dx, void* dweight) {
    DeviceGuard guard(device);
    if (dtype != kFloat32) return cudaErrorNotSupported;
    return gemm::gradients(*g, device, stream, workspace, static_cast<const float*>(dout), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<float*>(dx), static_cast<float*>(dweight));
}
'''

_SOURCES['direct_generic.cuh'] = r'''
// Transposed convolution for any parameters and dtype: forward and dx by direct convolution.
//
//   forward  out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// Both gather a source tensor into a destination along the phases of geometry.h, so they are one kernel: a thread owns
// kPositions destinations of one phase (neighbouring lanes, neighbouring sources) times kChannels channels in registers.
// A block brings the weights of many taps and kChain source channels to shared memory.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "launch.cuh"

namespace direct_generic {

constexpr int kMaxChannels = 8;      // destination channels of a thread: so many, or fewer where there are fewer
constexpr int min_blocks_per_sm(int channels) { return channels == kMaxChannels ? 3 : 4; }    // caps the registers
constexpr int kChain = 16;           // source channels summed before the sum joins the total: keeps fp32 chains short
constexpr int kThreads = 128;
constexpr int kWeights = 2048;       // in shared memory at a time

// Destinations of a thread, kThreads apart: as many as the registers hold.
template <typename T> constexpr int kPositionsOf = sizeof(Acc<T>) == 8 ? 2 : 4;

// Channels of one group on either side of the gather.
struct Channels {
    int64_t src, dst;                // per group
};

HOST_DEVICE Channels channels_of(Direction direction, const Geometry& g) {
    const bool forward = direction == Direction::kForward;
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    return {forward ? in : out, forward ? out : in};
}

// The taps of a phase, counted.
struct TapCounter {
    int d = 0, h = 0, w = 0;
    __device__ __forceinline__ void advance(const Phase& ph, const Phase& pw) {
        if (++w == pw.taps) w = 0, h++;
        if (h == ph.taps) h = 0, d++;
    }
};

// Which samples are wanted: those whose flag, one every `stride` numbers, is not zero. No flags: all.
struct Samples {
    const unsigned* flags;
    int stride;
    __device__ __forceinline__ bool has(int64_t n) const { return flags == nullptr || flags[n * stride] != 0; }
    // A warp: whether it has any. In few instructions, which are fetched when the kernel before this one has ended.
    __device__ __forceinline__ bool any(int N) const {
        if (flags == nullptr) return true;
        bool found = false;
#pragma unroll 1
        for (int n = threadIdx.x % 32; n < N; n += 32) found |= flags[n * stride] != 0;
        return __any_sync(~0u, found);
    }
};

// ------------------------------------------------------------------------------------------- Direct convolution

// dst = epilogue(gather of src), tile `block` of num_blocks; bias may be null.
template <typename T, Direction kDirection, int kChannels>
__device__ __forceinline__ void direct_tile(const Geometry& g, int64_t block, Samples only, const T* __restrict__ src, const T* __restrict__ w, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    using A = Acc<T>;
    constexpr int kPositions = kPositionsOf<T>;
    const Channels channels = channels_of(kDirection, g);

    // Prologue: the block's tile. Phases along W come fastest, so that the blocks which share memory sectors run together.
    __shared__ Phase phases[3];      // shared, not registers: the loops need those
    auto take = [&block](int64_t count) { const int64_t digit = block % count; block /= count; return digit; };
    const int64_t phase_w = take(num_phases(kDirection, g.axis[2]));
    const int64_t channel = take(ceil_div(channels.dst, kChannels)) * kChannels;
    const int64_t phase_h = take(num_phases(kDirection, g.axis[1]));
    const int64_t phase_d = take(num_phases(kDirection, g.axis[0]));
    const int64_t group = take(g.groups);
    const int64_t n = take(g.N);
    if (!only.has(n)) return;
    __syncthreads();
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
    const T* w_group = w + group * channels.src * channels.dst * kernel_volume(g);
    constexpr int kTaps = kWeights / (kChain * kChannels);
    __shared__ A weights[kTaps][kChain][kChannels];
    const int taps = pd.taps * ph.taps * pw.taps;
    A total[kPositions][kChannels] = {};
#pragma unroll 1
    for (int64_t c0 = 0; c0 < channels.src; c0 += kChain) {
        const int chain = channels.src - c0 < kChain ? channels.src - c0 : kChain;
        A sum[kPositions][kChannels] = {};
        TapCounter to_bring, tap;
#pragma unroll 1
        for (int first_tap = 0; first_tap < taps; first_tap += kTaps) {
            const int count = taps - first_tap < kTaps ? taps - first_tap : kTaps;
            __syncthreads();
            if (threadIdx.x < kChain * kChannels) {    // a thread has a pair of channels
                const int own_src = threadIdx.x / kChannels, own_dst = threadIdx.x % kChannels;
                const int64_t from = c0 + own_src, to = channel + own_dst, pair = forward ? from * channels.dst + to : to * channels.src + from;
                const bool exists = from < channels.src && to < channels.dst;
                const T* kernel = w_group + (exists ? pair : 0) * kernel_volume(g);
#pragma unroll 4
                for (int i = 0; i < count; i++) {
                    const int at = ((pd.k + to_bring.d * pd.k_step) * int(g.axis[1].kernel) + ph.k + to_bring.h * ph.k_step) * int(g.axis[2].kernel) + pw.k + to_bring.w * pw.k_step;
                    weights[i][own_src][own_dst] = exists ? to_acc(kernel[at]) : A(0);
                    to_bring.advance(ph, pw);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < count; i++, tap.advance(ph, pw)) {
                bool inside[kPositions];
                const T* s[kPositions];
                bool any = false;
#pragma unroll
                for (int p = 0; p < kPositions; p++) {
                    const int d = src_d[p] + tap.d * pd.src_tap_step, h = src_h[p] + tap.h * ph.src_tap_step, w = src_w[p] + tap.w * pw.src_tap_step;
                    inside[p] = unsigned(d) < unsigned(pd.src_size) && unsigned(h) < unsigned(ph.src_size) && unsigned(w) < unsigned(pw.src_size);
                    s[p] = src_group + c0 * src_volume + ((int64_t(d) * ph.src_size + h) * pw.src_size + w);
                    any |= inside[p];
                }
                if (!any) continue;
                const auto add = [&](int c) {
                    A v[kPositions], wt[kChannels];
#pragma unroll
                    for (int p = 0; p < kPositions; p++) v[p] = inside[p] ? to_acc(*s[p]) : A(0), s[p] += src_volume;
#pragma unroll
                    for (int m = 0; m < kChannels; m++) wt[m] = weights[i][c][m];
#pragma unroll
                    for (int p = 0; p < kPositions; p++)
                        if (inside[p])    // not a product with zero: the weight may be Inf
#pragma unroll
                            for (int m = 0; m < kChannels; m++) sum[p][m] += v[p] * wt[m];
                };
                if (chain == kChain) {
#pragma unroll(kChannels == kMaxChannels ? 2 : 4)
                    for (int c = 0; c < kChain; c++) add(c);
                } else {
#pragma unroll 1
                    for (int c = 0; c < chain; c++) add(c);
                }
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

// A block for each tile, or fewer that take several.
template <typename T, Direction kDirection, int kChannels>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm(kChannels))
direct_kernel(Geometry g, int64_t tiles, Samples only, const T* __restrict__ src, const T* __restrict__ w, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    wait_for_previous_kernel();
    if (!only.any(int(g.N))) return;
    __shared__ volatile int64_t next;    // shared, not a register: the tile needs those
    if (threadIdx.x == 0) next = blockIdx.x;
    __syncthreads();
    while (next < tiles) {
        direct_tile<T, kDirection, kChannels>(g, next, only, src, w, bias, apply_relu, dst);
        __syncthreads();
        if (threadIdx.x == 0) next = next + gridDim.x;
        __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------------- Launchers

template <typename T, Direction kDirection> int64_t num_blocks(const Geometry& g, int block_channels) {
    int64_t volume = 1, phases = 1;
    for (const Axis& a : g.axis) {
        volume *= make_phase(kDirection, a, 0).count;    // phase 0 is the longest
        phases *= num_phases(kDirection, a);
    }
    return ceil_div(volume, kThreads * kPositionsOf<T>) * phases * ceil_div(channels_of(kDirection, g).dst, block_channels) * g.groups * g.N;
}

constexpr int64_t kRepairBlocks = 264;    // where only some samples are wanted, mostly none

template <typename T, Direction kDirection, int kChannels>
int launch_direct(const Geometry& g, void* stream, Samples only, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const int64_t tiles = num_blocks<T, kDirection>(g, kChannels);
    return launch(direct_kernel<T, kDirection, kChannels>, only.flags && tiles > kRepairBlocks ? kRepairBlocks : tiles, kThreads, stream,
                  g, tiles, only, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias), apply_relu, static_cast<T*>(dst));
}

template <Direction kDirection>
int direct(const Geometry& g, int dtype, void* stream, Samples only, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const int64_t channels = channels_of(kDirection, g).dst;
    if (dtype == kFloat32 && !only.flags && channels <= 4)
        return channels == 1 ? launch_direct<float, kDirection, 1>(g, stream, only, src, w, bias, apply_relu, dst)
                             : launch_direct<float, kDirection, 4>(g, stream, only, src, w, bias, apply_relu, dst);
    return with_dtype(dtype, [&](auto element) { return launch_direct<decltype(element), kDirection, kMaxChannels>(g, stream, only, src, w, bias, apply_relu, dst); });
}

}  // namespace direct_generic
'''

_SOURCES['direct_rows_generic.cuh'] = r'''
// Transposed convolution of stride 1 to few channels in float32, the last layer of many a generator: forward by direct convolution.
//
//   out[n, co, o] = bias[co] + sum over ci, k with o + padding - k * dilation == i of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Loads are what such a layer takes: the kernel of direct_generic.cuh has one for each product of a position. Here a thread owns kRows
// neighbouring rows of one column (neighbouring lanes, neighbouring columns), so that a source element it loads serves all taps h. Where that makes few
// blocks, C_in is cut into parts.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "add_parts.cuh"

namespace direct_rows {

constexpr int kThreads = 128;
constexpr int kRows = 8;             // of a thread
constexpr int kChain = 8;            // source channels summed before the sum joins the total: keeps fp32 chains short
constexpr int kMaxChannels = 4;
constexpr int kMaxWeights = 8192;    // of kChain source channels, in shared memory

inline bool supports(const Geometry& g, int dtype) {
    const Axis* axis = g.axis;
    return dtype == kFloat32 && g.groups == 1 && g.C_out <= kMaxChannels && axis[0].stride == 1 && axis[1].stride == 1 && axis[2].stride == 1 && axis[1].dilation == 1 &&
           (axis[1].kernel == 3 || axis[1].kernel == 5) && kernel_volume(g) * kChain * kMaxChannels <= kMaxWeights && in_volume(g) < 1 << 30 && out_volume(g) < 1 << 30;
}

// A sample's threads are (d, group of kRows rows, w).
HOST_DEVICE int row_groups(const Geometry& g) { return (int(g.axis[1].out) + kRows - 1) / kRows; }
HOST_DEVICE int sample_threads(const Geometry& g) { return int(g.axis[0].out) * row_groups(g) * int(g.axis[2].out); }
HOST_DEVICE int sample_blocks(const Geometry& g) { return (sample_threads(g) + kThreads - 1) / kThreads; }

// Source channels of each part: whole chains, fewer for more blocks.
constexpr int kWantedBlocks = 512;
inline int64_t part_channels(const Geometry& g) {
    const int64_t blocks = g.N * sample_blocks(g), chains = ceil_div(g.C_in, kChain);
    const int64_t parts = blocks == 0 || blocks * 2 > kWantedBlocks ? 1 : kWantedBlocks / blocks;
    return ceil_div(chains, parts) * kChain;
}
inline int64_t parts_of(const Geometry& g) { return ceil_div(g.C_in, part_channels(g)); }
inline int64_t out_elements(const Geometry& g) { return g.N * g.C_out * out_volume(g); }
inline int64_t workspace_bytes(const Geometry& g) { return parts_of(g) > 1 ? parts_of(g) * out_elements(g) * int64_t(sizeof(float)) : 0; }

// out: of each part. bias may be null.
template <int kTapsH, int kChannels>
__global__ void __launch_bounds__(kThreads)
forward_kernel(Geometry g, int channels_of_part, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
    wait_for_previous_kernel();
    __shared__ __align__(16) float weights[kMaxWeights / kMaxChannels * kChannels];    // (chain, K_d, K_w, K_h, kChannels)
    const int in_d = g.axis[0].in, in_h = g.axis[1].in, in_w = g.axis[2].in, out_h = g.axis[1].out, out_w = g.axis[2].out;
    const int taps_d = g.axis[0].kernel, taps_w = g.axis[2].kernel, volume = taps_d * kTapsH * taps_w, C_in = g.C_in, C_out = g.C_out;
    const int64_t in_channel = in_volume(g), out_channel = out_volume(g);

    // The thread's column: source coordinates of the first taps, and which of its source rows there are.
    const int groups = row_groups(g), blocks = sample_blocks(g);
    const int part = int(blockIdx.x) / blocks / int(g.N);
    const int64_t n = int(blockIdx.x) / blocks % int(g.N);
    const int q = int(blockIdx.x) % blocks * kThreads + threadIdx.x, column = q % out_w, first_row = q / out_w % groups * kRows, plane = q / out_w / groups;
    const bool exists = q < sample_threads(g);
    const int src_d = plane + int(g.axis[0].padding), src_w = column + int(g.axis[2].padding), src_h = first_row + int(g.axis[1].padding) - (kTapsH - 1);
    unsigned rows = 0;    // bit s: source row src_h + s
#pragma unroll
    for (int s = 0; s < kRows + kTapsH - 1; s++) rows |= unsigned(exists && unsigned(src_h + s) < unsigned(in_h)) << s;

    float total[kRows][kChannels] = {};
    for (int c0 = part * channels_of_part; c0 < min((part + 1) * channels_of_part, C_in); c0 += kChain) {
        const int chain = min(kChain, C_in - c0);
        __syncthreads();
        for (int i = threadIdx.x; i < chain * kChannels * volume; i += kThreads) {    // in the order of w
            const int k = i % volume, m = i / volume % kChannels, c = i / volume / kChannels, kw = k % taps_w, kh = k / taps_w % kTapsH, kd = k / taps_w / kTapsH;
            weights[(((c * taps_d + kd) * taps_w + kw) * kTapsH + kh) * kChannels + m] = m < C_out ? w[(int64_t(c0 + c) * C_out + m) * volume + k] : 0.0f;
        }
        __syncthreads();
        float sum[kRows][kChannels] = {};
        const float* tap = weights;
#pragma unroll 1
        for (int c = 0; c < chain; c++) {
            const float* source = x + (n * C_in + c0 + c) * in_channel;
#pragma unroll 1
            for (int kd = 0; kd < taps_d; kd++) {
                const int d = src_d - kd * int(g.axis[0].dilation);
#pragma unroll 3
                for (int kw = 0; kw < taps_w; kw++, tap += kTapsH * kChannels) {
                    const int v = src_w - kw * int(g.axis[2].dilation);
                    const unsigned inside = unsigned(d) < unsigned(in_d) && unsigned(v) < unsigned(in_w) ? rows : 0;
                    const float* at = source + (int64_t(d) * in_h + src_h) * in_w + v;
                    float values[kRows + kTapsH - 1], own[kTapsH][kChannels];
#pragma unroll
                    for (int s = 0; s < kRows + kTapsH - 1; s++, at += in_w) values[s] = inside >> s & 1 ? *at : 0.0f;
#pragma unroll
                    for (int kh = 0; kh < kTapsH; kh++)
#pragma unroll
                        for (int m = 0; m < kChannels; m++) own[kh][m] = tap[kh * kChannels + m];
#pragma unroll
                    for (int s = 0; s < kRows + kTapsH - 1; s++)
                        if (inside >> s & 1)    // not a product with zero: the weight may be Inf
#pragma unroll
                            for (int kh = 0; kh < kTapsH; kh++) {
                                const int row = s + kh - (kTapsH - 1);
                                if (row < 0 || row >= kRows) continue;
#pragma unroll
                                for (int m = 0; m < kChannels; m++) sum[row][m] += values[s] * own[kh][m];
                            }
                }
            }
        }
#pragma unroll
        for (int row = 0; row < kRows; row++)
#pragma unroll
            for (int m = 0; m < kChannels; m++) total[row][m] += sum[row][m];
    }

    if (!exists) return;
    float* to = out + (part * g.N + n) * C_out * out_channel + (int64_t(plane) * out_h + first_row) * out_w + column;
#pragma unroll
    for (int row = 0; row < kRows; row++)
#pragma unroll
        for (int m = 0; m < kChannels; m++) {
            if (m >= C_out || first_row + row >= out_h) continue;
            const float v = total[row][m] + (bias ? bias[m] : 0.0f);
            to[m * out_channel + int64_t(row) * out_w] = apply_relu ? relu(v) : v;
        }
}

// bias may be null; apply_relu writes relu(out).
inline int forward(const Geometry& g, void* stream, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const int64_t count = parts_of(g);
    auto* part = static_cast<float*>(count > 1 ? workspace : out);
    const auto run = [&](auto kernel) {
        return launch(kernel, count * g.N * sample_blocks(g), kThreads, stream, g, int(part_channels(g)), static_cast<const float*>(x), static_cast<const float*>(w), count > 1 ? nullptr : static_cast<const float*>(bias), count == 1 && apply_relu, part);
    };
    RETURN_IF_ERROR(g.axis[1].kernel == 3 ? g.C_out == 1 ? run(forward_kernel<3, 1>) : run(forward_kernel<3, kMaxChannels>) : g.C_out == 1 ? run(forward_kernel<5, 1>) : run(forward_kernel<5, kMaxChannels>));
    if (count == 1) return cudaSuccess;
    return parts::add({part, int(count), g.N, int(g.C_out), int(out_volume(g))}, kFloat32, bias, apply_relu, out, {}, stream);
}

}  // namespace direct_rows
'''

_SOURCES['conv_transpose3d_generic.cu'] = r'''
// Transposed convolution for any parameters and dtype: the launchers of forward and dx.

#include "direct_generic.cuh"
#include "direct_rows_generic.cuh"

extern "C" int64_t conv_transpose3d_forward_generic_workspace(const Geometry* g, int dtype, int) { return direct_rows::supports(*g, dtype) ? direct_rows::workspace_bytes(*g) : 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    if (direct_rows::supports(*g, dtype)) return direct_rows::forward(*g, stream, workspace, x, w, bias, apply_relu != 0, out);
    return direct_generic::direct<Direction::kForward>(*g, dtype, stream, {}, x, w, bias, apply_relu != 0, out);
}

extern "C" int64_t conv_transpose3d_dinput_generic_workspace(const Geometry*, int, int) { return 0; }

extern "C" int conv_transpose3d_dinput_generic(const Geometry* g, int dtype, int device, void* stream, void*,
                                               const void* dout, const void* w, void* dx) {
    DeviceGuard guard(device);
    return direct_generic::direct<Direction::kDInput>(*g, dtype, stream, {}, dout, w, nullptr, false, dx);
}
'''

_SOURCES['sum_partials.cuh'] = r'''
// Sums of what blocks have left, one array each.
#pragma once

#include "launch.cuh"

constexpr int kSumThreads = 256;

// out[i] = sum over s of partial[s, i], in order; partial (splits, count)
template <typename T, typename P>
__global__ void sum_partials_kernel(const P* __restrict__ partial, int64_t splits, int64_t count, T* __restrict__ out) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
    if (i >= count) return;
    double sum = 0;
#pragma unroll 8
    for (int64_t s = 0; s < splits; s++) sum += partial[s * count + i];
    out[i] = from_acc<T>(Acc<T>(sum));
}

template <typename T, typename P> int sum_partials(const P* partial, int64_t splits, int64_t count, void* stream, void* out) {
    return launch(sum_partials_kernel<T, P>, ceil_div(count, kSumThreads), kSumThreads, stream, partial, splits, count, static_cast<T*>(out));
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

#include "group_norm.cuh"
#include "sum_partials.cuh"

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
    wait_for_previous_kernel();
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

template <typename T, int kBlockM, int kBlockN>
int dweight_tiled(const Geometry& g, void* stream, const void* x, const void* dout, void* dweight, void* workspace) {
    const int64_t tiles = num_tiles(g, kBlockM, kBlockN);
    const Sizes sizes = sizes_of(g, tiles);
    auto* partial = static_cast<Acc<T>*>(workspace);
    RETURN_IF_ERROR(launch(dweight_kernel<T, kBlockM, kBlockN>, tiles * sizes.splits, Tile<kBlockM, kBlockN>::kThreads, stream,
                           g, sizes, static_cast<const T*>(x), static_cast<const T*>(dout), partial));
    return sum_partials<T>(partial, sizes.splits, g.groups * sizes.gemm_m * sizes.gemm_n, stream, dweight);
}

// Few input channels in a group leave a square tile mostly empty.
inline bool narrow(const Geometry& g) { return g.C_in / g.groups <= 8; }
constexpr int kSquare = 64, kNarrowM = 8, kNarrowN = 256;

// -------------------------------------------------------------------------------------------------------- dbias

constexpr int kBiasThreads = 256;
constexpr int64_t kBiasBlocks = 2048;          // wanted
constexpr int64_t kMinBiasElements = 8192;     // of a block

// Blocks of a channel of a sample.
HOST_DEVICE int64_t bias_parts(const Geometry& g) {
    const int64_t wanted = ceil_div(kBiasBlocks, g.N * g.C_out), most = ceil_div(out_volume(g), kMinBiasElements);
    return wanted < most ? wanted : most;
}

// Grid: (sample, part, channel), channels fastest. partial (N * parts, C_out)
template <typename T>
__global__ void __launch_bounds__(kBiasThreads) dbias_kernel(Geometry g, int64_t parts, const T* __restrict__ dout, double* __restrict__ partial) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    constexpr int kWidth = 16 / sizeof(T), kLoads = 8;    // of a vector, and vectors under way
    using V = Vector<T, kWidth>;
    const int64_t channel = blockIdx.x % g.C_out, part = blockIdx.x / g.C_out % parts, n = blockIdx.x / g.C_out / parts, volume = out_volume(g);
    const int64_t begin = volume * part / parts, count = volume * (part + 1) / parts - begin;
    const T* const from = dout + (n * g.C_out + channel) * volume + begin;
    const int64_t unaligned = reinterpret_cast<uintptr_t>(from) % sizeof(V) / sizeof(T), to_vector = (kWidth - unaligned) % kWidth, head = to_vector < count ? to_vector : count;
    const int64_t vectors = (count - head) / kWidth, tail = head + vectors * kWidth;
    const V* const body = reinterpret_cast<const V*>(from + head);
    double sum = 0;
    for (int64_t first = threadIdx.x; first < vectors; first += kBiasThreads * kLoads) {    // short sums in A
        A own = 0;
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            if (first + i * kBiasThreads >= vectors) continue;
            const V v = body[first + i * kBiasThreads];
#pragma unroll
            for (T element : v.v) own += to_acc(element);
        }
        sum += own;
    }
    if (threadIdx.x < head) sum += to_acc(from[threadIdx.x]);
    if (tail + threadIdx.x < count) sum += to_acc(from[tail + threadIdx.x]);
    sum = group_norm::block_sum<kBiasThreads>({sum, 0}).a;
    if (threadIdx.x == 0) partial[(n * parts + part) * g.C_out + channel] = sum;
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

extern "C" int64_t conv_transpose3d_dbias_generic_workspace(const Geometry* g, int, int) { return g->N * parameter_gradients_generic::bias_parts(*g) * g->C_out * int64_t(sizeof(double)); }

extern "C" int conv_transpose3d_dbias_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* dout, void* dbias) {
    using namespace parameter_gradients_generic;
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        auto* partial = static_cast<double*>(workspace);
        const int64_t parts = bias_parts(*g);
        RETURN_IF_ERROR(launch(dbias_kernel<T>, g->N * parts * g->C_out, kBiasThreads, stream, *g, parts, static_cast<const T*>(dout), partial));
        return sum_partials<T>(partial, g->N * parts, g->C_out, stream, dbias);
    });
}
'''

_SOURCES['depthwise_tiles.h'] = r'''
// How the kernels for groups of few channels cut their work, for host and device. The index arithmetic is that of geometry.h's phases, in both directions:
// destination q of a phase gathers tap j from source src + q * src_step + j * src_tap_step.
#pragma once

#include <initializer_list>

#include "geometry.h"

namespace depthwise {

constexpr int kMaxGroupChannels = 4;    // of either side
constexpr int kMaxStride = 4, kMaxKernel = 16;
constexpr int kMaxWeights = 4096;       // of a group

// Kernels that know the size of a kernel and the stride along H and W, K and S, from compilation on; K = 0 for the one of all others.
struct Square { int K, S; };
// Output o of H has u = o + padding + start = S * q + r, as in stencil.h; start makes that S * (q - first) + r without a remainder at the usual padding, which is (K - 1) / 2.
HOST_DEVICE constexpr int start_of(int K, int S) { return S == 1 ? 0 : (S - (K - 1) / 2 % S) % S; }

inline Square square_of(const Geometry& g) {
    const Axis &h = g.axis[1], &w = g.axis[2];
    if (h.kernel != w.kernel || h.stride != w.stride || h.dilation * w.dilation != 1) return {};
    const int K = int(h.kernel), S = int(h.stride);
    const bool built = S == 1 ? K == 3 || K == 5 : S == 2 && K >= 2 && K <= 5, aligned = (h.padding + start_of(K, S)) % S == 0 && (w.padding + start_of(K, S)) % S == 0;
    return built && aligned ? Square{K, S} : Square{};
}

// Floats of a row of a box of 32 destinations, with up to 3 in front of them, that step so far; where the compiler knows.
HOST_DEVICE constexpr int pitch_of(int step) { return 32 * step + 8; }

// Rows of a thread: fewer where boxes are larger than tiles.
HOST_DEVICE constexpr int rows_of(Direction direction, int S) { return direction == Direction::kForward || S == 1 ? 8 : 4; }

constexpr int kMostBytes = 64 * 1024;   // of shared memory, which leave room for three blocks on a multiprocessor (one where it has 99 KB)

// An axis of a tile: `tile` destinations of every phase. They read the `box` source positions from first + step * (the tile's first destination) on.
struct TileAxis {
    int phases, count;                  // destinations of the longest phase
    int step, first;
    int tile, tiles, box;
    int dst, src;                       // sizes of the tensors
};

struct Tiling {
    TileAxis axis[3];                   // D, H, W
    int src_channels, dst_channels, groups, volume;
    int rows, row_groups;               // of a thread, neighbours in their phase of H; how many such threads a column of a tile has
    int columns;                        // destinations along W, of all phases
    int pitch;                          // floats of a row of a box
    int units;                          // (plane, row group, column) of a phase of D and H
    int64_t tiles;                      // of a channel of a sample, of all
    Divisor by_columns, by_row_groups, by_tile_h, by_box_h, by_box_d, by_quads, by_phases_w, by_tiles_w, by_tiles_h;
    HOST_DEVICE int box_floats() const { return axis[0].box * axis[1].box * pitch; }
    HOST_DEVICE int quads() const { return (axis[2].box + 3 + 3) / 4; }    // of neighbours in memory, which a row of a box may need
};

inline TileAxis make_axis(Direction direction, const Axis& a) {
    TileAxis t = {};
    t.phases = int(num_phases(direction, a));
    int last = 0;
    bool any = false;
    for (int i = 0; i < t.phases; i++) {
        const Phase p = make_phase(direction, a, i);
        t.count = p.count > t.count ? p.count : t.count, t.step = p.src_step;
        for (int j = 0; j < p.taps; j++) {
            const int at = p.src + j * p.src_tap_step;
            t.first = !any || at < t.first ? at : t.first, last = !any || at > last ? at : last;
            any = true;
        }
    }
    t.box = last - t.first + 1;    // of one destination; with_tile() makes it the tile's
    const bool forward = direction == Direction::kForward;
    t.dst = int(forward ? a.out : a.in), t.src = int(forward ? a.in : a.out);
    return t;
}

// Equal tiles of at most `most` destinations, a multiple of `unit`.
inline TileAxis with_tile(TileAxis t, int most, int unit) {
    const int64_t tiles = ceil_div(t.count, most);
    t.tile = int(ceil_div(ceil_div(t.count, tiles), unit)) * unit, t.tiles = int(ceil_div(t.count, t.tile));
    t.box += (t.tile - 1) * t.step;
    return t;
}

inline bool can_tile(const Geometry& g) {
    for (const Axis& a : g.axis)
        if (a.kernel > kMaxKernel || a.stride > kMaxStride) return false;
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    return in <= kMaxGroupChannels && out <= kMaxGroupChannels && in * out * kernel_volume(g) <= kMaxWeights && in_volume(g) < 1 << 30 && out_volume(g) < 1 << 30;
}

// Tiles whose boxes fit, of all source channels, or for dweight of one, with its destinations beside them; units 0 where there are none. Of those that fit the one with the fewest
// floats to bring and to leave.
inline Tiling choose_tiling(Direction direction, const Geometry& g, bool for_dweight, int threads, int multiprocessors) {
    const bool forward = direction == Direction::kForward;
    const Square square = square_of(g);
    Tiling t = {};
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    t.src_channels = int(forward ? in : out), t.dst_channels = int(forward ? out : in), t.groups = int(g.groups), t.volume = int(kernel_volume(g));
    t.rows = rows_of(direction, square.S);
    if (!can_tile(g)) return t;
    const int rows = t.rows, channels = for_dweight ? 1 : t.src_channels;
    const TileAxis d = make_axis(direction, g.axis[0]), h = make_axis(direction, g.axis[1]), w = make_axis(direction, g.axis[2]);
    Tiling best = t;
    double least = 0;
    for (int columns : {32, 64})
    for (int row_groups : {1, 2, 4, 8})
    for (int planes : {1, 2, 4, 8, 16}) {
        t.axis[0] = with_tile(d, planes, 1), t.axis[1] = with_tile(h, row_groups * rows, rows), t.axis[2] = with_tile(w, columns / w.phases, 1);
        t.row_groups = t.axis[1].tile / rows;
        t.columns = t.axis[2].tile * t.axis[2].phases, t.pitch = square.K > 0 ? pitch_of(t.axis[2].step) : t.quads() * 4;
        if (t.quads() * 4 > t.pitch) continue;
        t.units = t.axis[0].tile * t.row_groups * t.columns;
        const int64_t bytes = (int64_t(channels) * t.box_floats() + (for_dweight ? t.units * rows : 0)) * 4;
        if (bytes > kMostBytes) continue;
        t.tiles = int64_t(t.axis[0].tiles) * t.axis[1].tiles * t.axis[2].tiles;
        // Floats of a tile: of the box, each some 2 outputs' worth, and of the outputs of whole rounds of the threads.
        const double rounds = double(ceil_div(t.units, threads)), box = double(channels) * t.axis[0].box * t.axis[1].box * t.axis[2].box;
        const double work = box + rounds * threads * rows * t.axis[0].phases * t.axis[1].phases * t.dst_channels;
        const double waves = double(g.N) * g.groups * t.tiles / (4 * multiprocessors), cost = work * (waves < 1 ? 1 : waves) * (bytes > kMostBytes / 2 ? 1.1 : 1);
        if (best.units == 0 || cost < least) best = t, least = cost;
    }
    t = best;
    if (t.units == 0) return t;
    t.by_columns = make_divisor(t.columns), t.by_row_groups = make_divisor(t.row_groups), t.by_tile_h = make_divisor(t.axis[1].tile), t.by_box_h = make_divisor(t.axis[1].box), t.by_box_d = make_divisor(t.axis[0].box);
    t.by_quads = make_divisor(t.quads()), t.by_phases_w = make_divisor(t.axis[2].phases), t.by_tiles_w = make_divisor(t.axis[2].tiles), t.by_tiles_h = make_divisor(t.axis[1].tiles);
    return t;
}

// Where a tile begins: its first destination of every phase.
struct TileOrigin { int d, h, w; };
HOST_DEVICE TileOrigin origin_of(const Tiling& t, int tile) {
    const int w = t.by_tiles_w.take(tile), h = t.by_tiles_h.take(tile);
    return {tile * t.axis[0].tile, h * t.axis[1].tile, w * t.axis[2].tile};
}

// A row of a box begins with the multiple of 4 columns at or before its first one, which stands so far behind.
HOST_DEVICE int skew_of(const Tiling& t, TileOrigin origin) { return (t.axis[2].first + origin.w * t.axis[2].step) & 3; }

}  // namespace depthwise
'''

_SOURCES['depthwise.cuh'] = r'''
// Transposed convolution with groups of few channels, depthwise for instance: forward and dx, on the CUDA cores in float32.
//
//   forward  out[n, co, o] = bias[co] + sum over ci of the group, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co of the group, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// There is so little to multiply that memory is the limit. A block brings a box of the source, halo included, and its group's weights to shared memory; a thread
// has some neighbouring rows of a column (neighbouring lanes, neighbouring destinations). Where the kernel's size and stride are known to the compiler (Square), weights are
// in registers, and a source element that a thread reads serves all the taps h that it has; elsewhere a weight that it reads serves all its rows.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "depthwise_tiles.h"
#include "ptx_sm80.cuh"

namespace depthwise {

constexpr int kThreads = 256;

// Of a phase of W and one of its taps: where it reads, from the thread's column on, and the kernel's index.
struct TapColumn { int offset, kernel; };

HOST_DEVICE int round_up_to_quads(int floats) { return (floats + 3) & ~3; }

// What is known of the phases, in shared memory.
struct alignas(16) Phases {
    Phase d[kMaxStride], h[kMaxStride], w[kMaxStride];
    TapColumn columns[kMaxStride][kMaxKernel];
};

// One thread of each phase of each axis.
__device__ __forceinline__ void find_phases(Phases& phases, Direction direction, const Geometry& g, const Tiling& t) {
    const int axis = threadIdx.x / kMaxStride, i = threadIdx.x % kMaxStride;
    if (axis > 2 || i >= t.axis[axis].phases) return;
    const Phase phase = make_phase(direction, g.axis[axis], i);
    (axis == 0 ? phases.d : axis == 1 ? phases.h : phases.w)[i] = phase;
    for (int j = 0; axis == 2 && j < phase.taps; j++) phases.columns[i][j] = {phase.src - t.axis[2].first + j * phase.src_tap_step, phase.k + j * phase.k_step};
}

// Brings the box of the tile at `origin` to shared memory, zeros where the source ends: `channels` of the source, (D, H, W) each, from the `first`-th element on. Four
// neighbours at a time, as they are aligned in memory where rows are. Some may still be under way afterwards (cp_async_wait_all).
__device__ __forceinline__ void load_box(const Tiling& t, TileOrigin origin, const void* src, int dtype, int64_t first, int channels, float* box, int threads) {
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int d0 = ad.first + origin.d * ad.step, h0 = ah.first + origin.h * ah.step, w0 = (aw.first + origin.w * aw.step) & ~3;
    const int64_t volume = int64_t(ad.src) * ah.src * aw.src;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        using Quad = Vector<T, 4>;
        const T* const from = static_cast<const T*>(src) + first;
        const bool aligned = aw.src % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0;
        const int count = channels * ad.box * ah.box * t.quads();
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += threads) {
            int row = i;
            const int w = w0 + t.by_quads.take(row) * 4;
            float* const to = box + row * t.pitch + w - w0;
            int c = row;
            const int h = h0 + t.by_box_h.take(c), d = d0 + t.by_box_d.take(c);
            const bool inside = unsigned(d) < unsigned(ad.src) && unsigned(h) < unsigned(ah.src);
            const T* const at = from + (inside ? c * volume + (d * ah.src + h) * aw.src + w : 0);
            if (aligned) {
                const bool exists = inside && unsigned(w) < unsigned(aw.src);
                if constexpr (std::is_same<T, float>::value) {
                    cp_async_16(shared_address(to), exists ? at : from, exists);
                } else {
                    const Quad quad = exists ? *reinterpret_cast<const Quad*>(at) : Quad{};
                    *reinterpret_cast<float4*>(to) = make_float4(to_acc(quad.v[0]), to_acc(quad.v[1]), to_acc(quad.v[2]), to_acc(quad.v[3]));
                }
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const bool exists = inside && unsigned(w + k) < unsigned(aw.src);
                    if constexpr (std::is_same<T, float>::value) cp_async_4(shared_address(to + k), exists ? at + k : from, exists);
                    else to[k] = exists ? to_acc(at[k]) : 0.0f;
                }
            }
        }
    });
}

// A thread's destinations in a tile: rows of a column of one phase.
struct Unit {
    int d, row, column;    // of the tile: plane and first row of their phases; along W of all phases
    __device__ __forceinline__ Unit(const Tiling& t, int i) {
        column = t.by_columns.take(i);
        row = t.by_row_groups.take(i) * t.rows;
        d = i;
    }
};

// What a block multiplies.
struct Block {
    const Geometry& g;
    const Tiling& t;
    const Phases& phases;
    const float *weights, *box;    // (channels of x, channels of out, kernel); (source channels, planes, rows, pitch), from the first column on
    TileOrigin origin;
};

// sum[r] += the gather of a unit's row r, of destination channel m, in a phase of D and of H. kChecked: a value outside is not multiplied, since the weight may be Inf.
template <Direction kDirection, bool kChecked, int kRows>
__device__ __forceinline__ void gather_rows(const Block& b, const Unit& unit, int m, const Phase& pd, const Phase& ph, float (&sum)[kRows]) {
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int kernel_h = int(b.g.axis[1].kernel), kernel_w = int(b.g.axis[2].kernel), row_step = ah.step * t.pitch;
    int q = unit.column;
    const int phase_w = t.by_phases_w.take(q);
    const Phase& pw = b.phases.w[phase_w];
    const int taps_w = pw.taps;
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++) {
        const float* const pair = b.weights + (kDirection == Direction::kForward ? c * t.dst_channels + m : m * t.src_channels + c) * t.volume;
#pragma unroll 1
        for (int jd = 0; jd < pd.taps; jd++)
#pragma unroll 1
        for (int jh = 0; jh < ph.taps; jh++) {
            const int d = unit.d * ad.step + pd.src - ad.first + jd * pd.src_tap_step, h = unit.row * ah.step + ph.src - ah.first + jh * ph.src_tap_step;
            const float* const kernel = pair + ((pd.k + jd * pd.k_step) * kernel_h + ph.k + jh * ph.k_step) * kernel_w;
            const float* const row = b.box + ((c * ad.box + d) * ah.box + h) * t.pitch + q * aw.step;
#pragma unroll 2
            for (int jw = 0; jw < taps_w; jw++) {
                const TapColumn column = b.phases.columns[phase_w][jw];
                const float weight = kernel[column.kernel], *at = row + column.offset;
                const int source_d = ad.first + b.origin.d * ad.step + d, source_h = ah.first + b.origin.h * ah.step + h, source_w = pw.src + (b.origin.w + q) * aw.step + jw * pw.src_tap_step;
#pragma unroll
                for (int r = 0; r < kRows; r++)
                    if (!kChecked || (unsigned(source_d) < unsigned(ad.src) && unsigned(source_h + r * ah.step) < unsigned(ah.src) && unsigned(source_w) < unsigned(aw.src))) sum[r] += at[r * row_step] * weight;
            }
        }
    }
}

// The same forward, of all phases of H: row r of phase p is sum[r * S + p].
template <int K, int S, int kRows>
__device__ __forceinline__ void gather_forward(const Block& b, const Unit& unit, int m, const Phase& pd, float (&sum)[kRows * S]) {
    constexpr int kStart = start_of(K, S), kTapsH = (K - 1 + kStart) / S + 1, kTapsW = (K + S - 1) / S, kPitch = pitch_of(1);
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int q = unit.column / S;
    const Phase& pw = b.phases.w[unit.column % S];
    const bool has_last = K % S == 0 || pw.taps == kTapsW;    // of the taps w
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++)
#pragma unroll 1
    for (int jd = 0; jd < pd.taps; jd++) {
        const float* const kernel = b.weights + ((c * t.dst_channels + m) * int(b.g.axis[0].kernel) + pd.k + jd * pd.k_step) * K * K + pw.k;
        const float* const plane = b.box + ((c * ad.box + unit.d * ad.step + pd.src - ad.first + jd * pd.src_tap_step) * ah.box + unit.row) * kPitch + q + pw.src - aw.first;
        float weights[K][kTapsW];
#pragma unroll
        for (int kh = 0; kh < K; kh++)
#pragma unroll
            for (int j = 0; j < kTapsW; j++)
                if (j < kTapsW - 1 || has_last) weights[kh][j] = kernel[kh * K + j * S];
#pragma unroll
        for (int i = 0; i < kRows + kTapsH - 1; i++)    // source rows
#pragma unroll
            for (int j = 0; j < kTapsW; j++) {
                if (j == kTapsW - 1 && !has_last) continue;
                const float value = plane[i * kPitch - j];
#pragma unroll
                for (int kh = 0; kh < K; kh++) {
                    const int row = i - (kTapsH - 1) + (kh + kStart) / S;
                    if (row >= 0 && row < kRows) sum[row * S + (kh + kStart) % S] += value * weights[kh][j];
                }
            }
    }
}

// What the taps of a column read in a row of dout: those from the start_of()-th on. With stride 2 pairs are aligned.
template <int K, int S> struct Window {
    static constexpr int kStart = start_of(K, S), kCount = S == 1 ? K : (K + kStart + 1) / 2 * 2;
    float values[kCount];
    __device__ __forceinline__ explicit Window(const float* at) {    // at tap 0
        if constexpr (S == 1)
#pragma unroll
            for (int i = 0; i < kCount; i++) values[i] = at[i];
        else
#pragma unroll
            for (int i = 0; i < kCount; i += 2) {
                const float2 pair = *reinterpret_cast<const float2*>(at - kStart + i);
                values[i] = pair.x, values[i + 1] = pair.y;
            }
    }
    __device__ __forceinline__ float operator[](int kw) const { return values[kw + (S == 1 ? 0 : kStart)]; }
};

// The same of dx.
template <int K, int S, int kRows>
__device__ __forceinline__ void gather_dinput(const Block& b, const Unit& unit, int m, float (&sum)[kRows]) {
    constexpr int kPitch = pitch_of(S);
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1];
    const int kernel_d = int(b.g.axis[0].kernel);
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++)
#pragma unroll 1
    for (int kd = 0; kd < kernel_d; kd++) {
        const float* const kernel = b.weights + ((m * t.src_channels + c) * kernel_d + kd) * K * K;
        const float* const plane = b.box + ((c * ad.box + unit.d * ad.step + kd * int(b.g.axis[0].dilation)) * ah.box + unit.row * S) * kPitch + unit.column * S;
        float weights[K][K];
#pragma unroll
        for (int i = 0; i < K * K; i++) weights[i / K][i % K] = kernel[i];
#pragma unroll
        for (int i = 0; i < (kRows - 1) * S + K; i++) {    // rows of dout
            const Window<K, S> window(plane + i * kPitch);
#pragma unroll
            for (int kw = 0; kw < K; kw++)
#pragma unroll
                for (int r = 0; r < kRows; r++)
                    if (i - r * S >= 0 && i - r * S < K) sum[r] += window[kw] * weights[i - r * S][kw];
        }
    }
}

// Grid: (n, group, tile), tiles fastest. dst = epilogue(gather of src); bias may be null. K, S: square_of(g).
template <Direction kDirection, int K, int S>
__global__ void __launch_bounds__(kThreads, 3)
gather_kernel(Geometry g, Tiling t, int dtype, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    wait_for_previous_kernel();
    extern __shared__ __align__(16) uint8_t base[];
    Phases& phases = *reinterpret_cast<Phases*>(base);
    float* const weights = reinterpret_cast<float*>(base + sizeof(Phases));    // of the group, in the order of w
    const int pairs = t.src_channels * t.dst_channels;
    float* const box = weights + round_up_to_quads(pairs * t.volume);
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];

    const int64_t tiles = t.tiles, plane = blockIdx.x / tiles;    // of (n, group)
    const int group = int(plane % t.groups);
    const TileOrigin origin = origin_of(t, int(blockIdx.x % tiles));
    load_box(t, origin, src, dtype, plane * t.src_channels * (int64_t(ad.src) * ah.src * aw.src), t.src_channels, box, kThreads);
    find_phases(phases, kDirection, g, t);
    bool finite = true;
    for (int i = threadIdx.x; i < pairs * t.volume; i += kThreads) {
        weights[i] = load_as_float(w, dtype, int64_t(group) * pairs * t.volume + i);
        finite &= fabsf(weights[i]) <= 3.4e38f;
    }
    cp_async_wait_all();
    const bool all_finite = __syncthreads_and(finite);

    constexpr int kRows = rows_of(kDirection, S), kPhases = kDirection == Direction::kForward && K > 0 ? S : 1;    // of H, that a thread has
    const Block b = {g, t, phases, weights, box + skew_of(t, origin), origin};
    const int64_t dst_volume = int64_t(ad.dst) * ah.dst * aw.dst;
    for (int m = 0; m < t.dst_channels; m++)
    for (int phase_d = 0; phase_d < ad.phases; phase_d++)
    for (int phase_h = 0; phase_h < ah.phases; phase_h += kPhases)
    for (int i = threadIdx.x; i < t.units; i += kThreads) {
        const Unit unit(t, i);
        const Phase& pd = phases.d[phase_d];
        const int out_d = (origin.d + unit.d) * ad.phases + phase_d, out_h = (origin.h + unit.row) * ah.phases + phase_h, out_w = origin.w * aw.phases + unit.column;
        if (out_d >= ad.dst || out_h >= ah.dst || out_w >= aw.dst) continue;
        float sum[kRows * kPhases] = {};
        if (K > 0 && all_finite) {
            if constexpr (K > 0 && kDirection == Direction::kForward) gather_forward<K, S, kRows>(b, unit, m, pd, sum);
            else if constexpr (K > 0) gather_dinput<K, S, kRows>(b, unit, m, sum);
        } else {
#pragma unroll
            for (int p = 0; p < kPhases; p++) {
                float own[kRows] = {};
                if (all_finite) gather_rows<kDirection, false>(b, unit, m, pd, phases.h[phase_h + p], own);
                else gather_rows<kDirection, true>(b, unit, m, pd, phases.h[phase_h + p], own);
#pragma unroll
                for (int r = 0; r < kRows; r++) sum[r * kPhases + p] = own[r];
            }
        }
        const int channel = group * t.dst_channels + m, row_step = kPhases > 1 ? 1 : ah.phases;
        const float own_bias = bias ? load_as_float(bias, dtype, channel) : 0.0f;
        const int64_t first = (plane * t.dst_channels + m) * dst_volume + (int64_t(out_d) * ah.dst + out_h) * aw.dst + out_w;
        with_element(dtype, [&](auto element) {
            using T = decltype(element);
            T* to = static_cast<T*>(dst) + first;
#pragma unroll
            for (int r = 0; r < kRows * kPhases; r++, to += row_step * aw.dst) {
                if (out_h + r * row_step >= ah.dst) break;
                const float v = sum[r] + own_bias;
                *to = from_acc<T>(apply_relu ? relu(v) : v);
            }
        });
    }
}

inline int64_t shared_bytes(const Tiling& t) { return int64_t(sizeof(Phases)) + (round_up_to_quads(t.src_channels * t.dst_channels * t.volume) + t.src_channels * t.box_floats()) * int64_t(sizeof(float)); }

inline Tiling tiling_of(Direction direction, const Geometry& g, int multiprocessors) {
    return choose_tiling(direction, g, false, kThreads, multiprocessors);
}

// Calls f(K, S) with what the compiler knows of the kernel and the stride.
template <int kNumber> using Number = std::integral_constant<int, kNumber>;
template <typename F> int with_square(Square square, F f) {
    switch (square.S * 10 + square.K) {
        case 13: return f(Number<3>(), Number<1>());
        case 15: return f(Number<5>(), Number<1>());
        case 22: return f(Number<2>(), Number<2>());
        case 23: return f(Number<3>(), Number<2>());
        case 24: return f(Number<4>(), Number<2>());
        case 25: return f(Number<5>(), Number<2>());
        default: return f(Number<0>(), Number<0>());
    }
}

// dst = epilogue(gather of src); bias may be null.
template <Direction kDirection> int gather(const Geometry& g, int dtype, int device, void* stream, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const Tiling t = tiling_of(kDirection, g, multiprocessors_of(device));
    return with_square(square_of(g), [&](auto K, auto S) {
        return launch_with_shared(gather_kernel<kDirection, decltype(K)::value, decltype(S)::value>, g.N * t.groups * t.tiles, kThreads, shared_bytes(t), stream, g, t, dtype, src, w, bias, apply_relu, dst);
    });
}

}  // namespace depthwise
'''

_SOURCES['depthwise_dweight.cuh'] = r'''
// The weight's gradient of a transposed convolution with groups of few channels, on the CUDA cores in float32.
//
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]    (ci and co of one group)
//
// A block has a pair of channels: it takes tiles of input positions, one after another, and brings x and the box of dout that they reach to shared memory. A set of taps, one kd where the
// kernel is square (depthwise_tiles.h), is a warp's or some warps', each of which sums them over a part of the positions. Blocks leave sums over a part of all tiles, which are added in a fixed order.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <algorithm>

#include "depthwise.cuh"
#include "sum_partials.cuh"

namespace depthwise {

HOST_DEVICE constexpr int set_taps(int K) { return K > 0 ? K * K : 9; }
constexpr int kMaxWarps = 6;

// How dweight is cut: taps into sets, sets into blocks, whose warps take `shares` of the positions for each of them.
struct DweightPlan {
    Tiling t;                         // of dx, whose box it is
    int taps_of_set, sets, sets_of_block, blocks_of_pair, shares, splits;
    Divisor by_shares;
    HOST_DEVICE int threads() const { return sets_of_block * shares * 32; }
    HOST_DEVICE int x_floats() const { return t.axis[0].tile * t.axis[1].tile * t.axis[2].tile; }
    HOST_DEVICE int64_t pairs() const { return int64_t(t.groups) * t.src_channels * t.dst_channels; }
    HOST_DEVICE int sum_floats() const { return shares * sets_of_block * taps_of_set; }    // of its warps, where box and x were
    int64_t shared_bytes() const { return int64_t(sizeof(float)) * std::max(t.box_floats() + x_floats(), sum_floats()); }
};

constexpr int64_t kWantedBlocks = 8;    // for each multiprocessor

inline DweightPlan make_dweight_plan(const Geometry& g, int multiprocessors) {
    DweightPlan p = {};
    p.taps_of_set = set_taps(square_of(g).K), p.sets = int(ceil_div(kernel_volume(g), p.taps_of_set));
    p.blocks_of_pair = int(ceil_div(p.sets, kMaxWarps)), p.sets_of_block = int(ceil_div(p.sets, p.blocks_of_pair)), p.shares = kMaxWarps / p.sets_of_block;
    p.t = choose_tiling(Direction::kDInput, g, true, p.shares * 32, multiprocessors);
    if (p.t.units == 0) return p;
    const int64_t blocks = p.pairs() * p.blocks_of_pair, tiles = g.N * p.t.tiles, splits = ceil_div(kWantedBlocks * multiprocessors, blocks);
    p.splits = int(splits < tiles ? splits : tiles), p.by_shares = make_divisor(p.shares);
    return p;
}

// Grid: (split, pair of channels, sets of taps), splits fastest. partial (splits, C_in, C_out / groups, kernel volume)
template <int K, int S>
__global__ void __launch_bounds__(kMaxWarps * 32, 4)
dweight_kernel(Geometry g, DweightPlan p, int dtype, const void* x, const void* dout, float* __restrict__ partial) {
    wait_for_previous_kernel();
    constexpr int kTaps = set_taps(K), kRows = rows_of(Direction::kDInput, S);
    extern __shared__ __align__(16) uint8_t base[];
    float *const box = reinterpret_cast<float*>(base), *const own_x = box + p.t.box_floats();    // own_x (D, H, W) of the tile
    const Tiling& t = p.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];

    int block = blockIdx.x;
    const auto take = [&block](int count) { const int digit = block % count; block /= count; return digit; };
    const int split = take(p.splits), dst_channel = take(t.dst_channels), src_channel = take(t.src_channels), group = take(t.groups), first_set = block * p.sets_of_block;    // dx's, so dst is x's
    const int ci = group * t.dst_channels + dst_channel, co = group * t.src_channels + src_channel;

    // A thread's taps: where the first one is in the box, from its position on, and the others from there.
    int set = threadIdx.x / 32;
    const int share = p.by_shares.take(set), first_tap = (first_set + set) * kTaps;
    const auto place_of = [&](int k) {
        const int kernel_h = int(g.axis[1].kernel), kernel_w = int(g.axis[2].kernel), kw = k % kernel_w, kh = k / kernel_w % kernel_h, kd = k / kernel_w / kernel_h;
        return (kd * int(g.axis[0].dilation) * ah.box + kh * int(g.axis[1].dilation)) * t.pitch + kw * int(g.axis[2].dilation);
    };
    const int first_place = place_of(min(first_tap, t.volume - 1));
    int places[kTaps];
    if constexpr (K == 0)
#pragma unroll
        for (int i = 0; i < kTaps; i++) places[i] = place_of(min(first_tap + i, t.volume - 1)) - first_place;
    else
#pragma unroll
        for (int i = 0; i < kTaps; i++) places[i] = i / K * pitch_of(S) + i % K;
    const int row_step = K > 0 ? S * pitch_of(S) : ah.step * t.pitch;

    float total[kTaps] = {};
    const int64_t tiles = g.N * t.tiles;
    for (int64_t i = split; i < tiles; i += p.splits) {
        const int64_t n = i / t.tiles, first_x = (n * g.C_in + ci) * (int64_t(ad.dst) * ah.dst * aw.dst);
        const TileOrigin origin = origin_of(t, int(i % t.tiles));
        __syncthreads();    // the tile before is done
        load_box(t, origin, dout, dtype, (n * g.C_out + co) * (int64_t(ad.src) * ah.src * aw.src), 1, box, p.threads());
        for (int k = threadIdx.x; k < p.x_floats(); k += p.threads()) {
            int row = k;
            const int column = t.by_columns.take(row), d = t.by_tile_h.divide(row), h = row - d * ah.tile;
            const bool exists = origin.d + d < ad.dst && origin.h + h < ah.dst && origin.w + column < aw.dst;
            own_x[k] = exists ? load_as_float(x, dtype, first_x + ((origin.d + d) * ah.dst + origin.h + h) * aw.dst + origin.w + column) : 0.0f;
        }
        cp_async_wait_all();
        __syncthreads();
        float sum[kTaps] = {};
        for (int k = share * 32 + threadIdx.x % 32; k < t.units; k += p.shares * 32) {
            const Unit unit(t, k);
            const int rows = origin.d + unit.d < ad.dst && origin.w + unit.column < aw.dst ? min(kRows, ah.dst - origin.h - unit.row) : 0;    // that there are
            const float* const from_x = own_x + (unit.d * ah.tile + unit.row) * aw.tile + unit.column;
            const float* const from = box + (unit.d * ad.step * ah.box + unit.row * ah.step) * t.pitch + unit.column * aw.step + skew_of(t, origin) + first_place;
            if (rows == kRows) {
                float values[kRows];
#pragma unroll
                for (int r = 0; r < kRows; r++) values[r] = from_x[r * aw.tile];
                if constexpr (K > 0) {
#pragma unroll
                    for (int j = 0; j < (kRows - 1) * S + K; j++) {    // rows of dout
                        const Window<K, S> window(from + j * pitch_of(S));
#pragma unroll
                        for (int kw = 0; kw < K; kw++)
#pragma unroll
                            for (int r = 0; r < kRows; r++)
                                if (j - r * S >= 0 && j - r * S < K) sum[(j - r * S) * K + kw] += values[r] * window[kw];
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < kTaps; j++)
#pragma unroll
                        for (int r = 0; r < kRows; r++) sum[j] += values[r] * from[places[j] + r * row_step];
                }
            } else {    // one that is not there is not multiplied, since dout may be Inf
#pragma unroll 1
                for (int r = 0; r < rows; r++)
#pragma unroll
                    for (int j = 0; j < kTaps; j++) sum[j] += from_x[r * aw.tile] * from[places[j] + r * row_step];
            }
        }
#pragma unroll
        for (int j = 0; j < kTaps; j++) total[j] += sum[j];
    }

    // The sums of a set's warps, in their order.
    __syncthreads();
    float* const sums = box;    // (shares, sets_of_block * kTaps)
#pragma unroll
    for (int j = 0; j < kTaps; j++) {
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) total[j] += __shfl_xor_sync(~0u, total[j], lane);
        if (threadIdx.x % 32 == 0) sums[share * p.sets_of_block * kTaps + set * kTaps + j] = total[j];
    }
    __syncthreads();
    const int first = first_set * kTaps, count = min(p.sets_of_block * kTaps, t.volume - first);
    float* const to = partial + ((int64_t(split) * g.C_in + ci) * t.src_channels + src_channel) * t.volume + first;
    for (int k = threadIdx.x; k < count; k += p.threads()) {
        float sum = 0;
        for (int i = 0; i < p.shares; i++) sum += sums[i * p.sets_of_block * kTaps + k];
        to[k] = sum;
    }
}

inline int dweight(const Geometry& g, int dtype, const DweightPlan& p, void* stream, void* workspace, const void* x, const void* dout, void* dweight) {
    auto* partial = static_cast<float*>(workspace);
    RETURN_IF_ERROR(with_square(square_of(g), [&](auto K, auto S) {
        return launch_with_shared(dweight_kernel<decltype(K)::value, decltype(S)::value>, p.pairs() * p.blocks_of_pair * p.splits, p.threads(), p.shared_bytes(), stream, g, p, dtype, x, dout, partial);
    }));
    return with_dtype(dtype, [&](auto element) { return sum_partials<decltype(element)>(partial, p.splits, p.pairs() * p.t.volume, stream, dweight); });
}

}  // namespace depthwise
'''

_SOURCES['conv_transpose3d_depthwise.cu'] = r'''
// Transposed convolution with groups of few channels: the launchers. For float32, float16 and bfloat16.

#include "depthwise_dweight.cuh"

extern "C" int conv_transpose3d_supports_depthwise(const Geometry* g, int device) {
    using namespace depthwise;
    const int multiprocessors = multiprocessors_of(device);
    return can_tile(*g) && tiling_of(Direction::kForward, *g, multiprocessors).units > 0 && tiling_of(Direction::kDInput, *g, multiprocessors).units > 0 && make_dweight_plan(*g, multiprocessors).t.units > 0;
}

extern "C" int64_t conv_transpose3d_forward_depthwise_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return depthwise::gather<Direction::kForward>(*g, dtype, device, stream, x, w, bias, apply_relu != 0, out);
}

extern "C" int64_t conv_transpose3d_dinput_depthwise_workspace(const Geometry*, int, int) { return 0; }

extern "C" int conv_transpose3d_dinput_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* dout, const void* w, void* dx) {
    DeviceGuard guard(device);
    return depthwise::gather<Direction::kDInput>(*g, dtype, device, stream, dout, w, nullptr, false, dx);
}

extern "C" int64_t conv_transpose3d_dweight_depthwise_workspace(const Geometry* g, int, int device) {
    const depthwise::DweightPlan p = depthwise::make_dweight_plan(*g, multiprocessors_of(device));
    return p.splits * p.pairs() * p.t.volume * int64_t(sizeof(float));
}

extern "C" int conv_transpose3d_dweight_depthwise(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* x, const void* dout, void* dweight) {
    DeviceGuard guard(device);
    return depthwise::dweight(*g, dtype, depthwise::make_dweight_plan(*g, multiprocessors_of(device)), stream, workspace, x, dout, dweight);
}
'''

_SOURCES['group_norm_backward.cuh'] = r'''
// The sums that the backward of ReLU and GroupNorm needs, and its elementwise half:
//
//   dr = rstd * (gamma * dy - m1 - xhat * m2), xhat = (r - mean) * rstd,
//   m1, m2 = mean over the group of gamma * dy and of gamma * dy * xhat;   dz = dr where r > 0 (or NaN), else 0
//   dgamma[c] = sum over n, s of dy * xhat,   dbeta[c] = sum over n, s of dy
//   dbias[c] = sum over n, s of dz = sum over n of rstd * (gamma * sum of dy - m1 * count - m2 * sum of xhat), all of these over the s with r > 0:
//   of the bias in front of ReLU, without dz
//
// Sums are taken in float64 (those over r > 0 of four elements at a time) and added in a fixed order. Formula: torch.nn.GroupNorm.
#pragma once

#include "group_norm.cuh"

namespace group_norm {

// Whether ReLU passes the gradient; NaN keeps its gradient, as in torch.
template <typename A> __device__ __forceinline__ bool is_active(A r) { return !(r <= A(0)); }

// Of the active elements: their number, the sums of dy and of xhat.
struct ActiveSums { double count, dy, xhat; };

// partial (N * C, splits): sums of dy and of dy * xhat. active (N * C, splits): where kActive. kWidth: elements that are loaded at once.
template <typename T, typename Y, int kWidth, bool kActive>
__global__ void __launch_bounds__(kThreads)
gradient_sums_kernel(Shape s, int64_t splits, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd, Pair* __restrict__ partial, ActiveSums* __restrict__ active) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t row = blockIdx.x / splits, group = row / s.group_channels();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.S ? begin + kSplitElements : s.S;
    const Mean<A> m(mean[group]);
    Pair sum = {0, 0}, active_sum = {0, 0};
    int active_count = 0;
#pragma unroll(kWidth == 1 ? 4 : 2)
    for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += kThreads * kWidth) {
        const auto dys = *reinterpret_cast<const Vector<Y, kWidth>*>(dy + row * s.S + i);
        const auto rs = *reinterpret_cast<const Vector<T, kWidth>*>(r + row * s.S + i);
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            const double d = to_acc(dys.v[e]);
            sum.a += d;
            sum.b += d * m.center(to_acc(rs.v[e]));
        }
        if constexpr (!kActive) continue;
        A of_dy = 0, of_r = 0;
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            if (!is_active(to_acc(rs.v[e]))) continue;
            active_count++;
            of_dy += to_acc(dys.v[e]);
            of_r += m.center(to_acc(rs.v[e]));
        }
        active_sum.a += of_dy;
        active_sum.b += of_r;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = {sum.a, sum.b * rstd[group]};
    if constexpr (!kActive) return;
    active_sum = block_sum(active_sum);
    const Pair counts = block_sum(Pair{double(active_count), 0});
    if (threadIdx.x == 0) active[blockIdx.x] = {counts.a, active_sum.a, active_sum.b * rstd[group]};
}

// One block per (n, group): channel_sums (N, C) of the partials, group_means (N, num_groups) weighted by gamma, and, where `active` is not null, bias_sums (N, C) of dz.
template <typename A>
__global__ void __launch_bounds__(kThreads)
finish_gradient_sums_kernel(Shape s, int64_t splits, const A* __restrict__ gamma, const double* __restrict__ rstd, const Pair* __restrict__ partial, const ActiveSums* __restrict__ active,
                            Pair* __restrict__ channel_sums, Pair* __restrict__ group_means, double* __restrict__ bias_sums) {
    wait_for_previous_kernel();
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
    const Pair means = {weighted.a / s.group_count(), weighted.b / s.group_count()};
    if (threadIdx.x == 0) group_means[blockIdx.x] = means;
    if (!active) return;
    for (int64_t k = threadIdx.x; k < s.group_channels(); k += kThreads) {
        const int64_t row = blockIdx.x * s.group_channels() + k;
        ActiveSums sum = {0, 0, 0};
        for (int64_t i = 0; i < splits; i++) {
            const ActiveSums& p = active[row * splits + i];
            sum.count += p.count, sum.dy += p.dy, sum.xhat += p.xhat;
        }
        const double weight = gamma ? gamma[row % s.C] : A(1);
        bias_sums[row] = sum.count == 0 ? 0 : rstd[blockIdx.x] * (weight * sum.dy - means.a * sum.count - means.b * sum.xhat);    // a NaN of the group does not get to where none is active
    }
}

// dgamma, dbeta, dbias (C): channel_sums and bias_sums (N, C) over n
template <typename T>
__global__ void __launch_bounds__(kThreads)
parameter_gradients_kernel(Shape s, const Pair* __restrict__ channel_sums, const double* __restrict__ bias_sums, Acc<T>* __restrict__ dgamma, Acc<T>* __restrict__ dbeta, T* __restrict__ dbias) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= s.C) return;
    Pair sum = {0, 0};
    double bias_sum = 0;
    for (int64_t n = 0; n < s.N; n++) {
        sum.a += channel_sums[n * s.C + c].a;
        sum.b += channel_sums[n * s.C + c].b;
        if (dbias) bias_sum += bias_sums[n * s.C + c];
    }
    if (dbeta) dbeta[c] = A(sum.a);
    if (dgamma) dgamma[c] = A(sum.b);
    if (dbias) dbias[c] = from_acc<T>(A(bias_sum));
}

// dz of one (n, channel).
template <typename A> struct ChannelGradient {
    Mean<A> m;
    A inv, weight, mean1, mean2;
    ChannelGradient() = default;
    __device__ __forceinline__ ChannelGradient(double mean, double rstd, A weight, Pair group_means) : m(mean), inv(A(rstd)), weight(weight), mean1(A(group_means.a)), mean2(A(group_means.b)) {}
    __device__ __forceinline__ A dz(A dy, A r) const {
        const A dr = inv * (weight * dy - mean1 - m.center(r) * inv * mean2);
        return is_active(r) ? dr : A(0);
    }
};

// ---------------------------------------------------------------------------------------------------- Launcher

// What the sums leave for dz and for the parameters' gradients.
struct GradientSums {
    Pair *partial, *channel_sums, *group_means;    // (N * C, splits), (N, C), (N, num_groups)
    ActiveSums* active;                            // (N * C, splits)
    double* bias_sums;                             // (N, C)
    static int64_t splits(const Shape& s) { return ceil_div(s.S, kSplitElements); }
    static int64_t bytes(const Shape& s) {
        const int64_t rows = s.N * s.C;
        return (rows * (splits(s) + 1) + s.N * s.num_groups) * int64_t(sizeof(Pair)) + rows * splits(s) * int64_t(sizeof(ActiveSums)) + rows * int64_t(sizeof(double));
    }
    GradientSums(const Shape& s, void* memory)
        : partial(static_cast<Pair*>(memory)), channel_sums(partial + s.N * s.C * splits(s)), group_means(channel_sums + s.N * s.C),
          active(reinterpret_cast<ActiveSums*>(group_means + s.N * s.num_groups)), bias_sums(reinterpret_cast<double*>(active + s.N * s.C * splits(s))) {}
};

// dgamma, dbeta and dbias may be null: not wanted.
template <typename T, typename Y>
int sum_gradients(const Shape& s, void* stream, const void* dy, const void* r, const double* statistics, const void* gamma, const GradientSums& sums, void* dgamma, void* dbeta, void* dbias) {
    using A = Acc<T>;
    const int64_t splits = GradientSums::splits(s);
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    ActiveSums* active = dbias ? sums.active : nullptr;
    const bool vectors = has_vectors<T, Y>(s, r, dy);
    const auto sum = active ? vectors ? gradient_sums_kernel<T, Y, 4, true> : gradient_sums_kernel<T, Y, 1, true> : vectors ? gradient_sums_kernel<T, Y, 4, false> : gradient_sums_kernel<T, Y, 1, false>;
    RETURN_IF_ERROR(launch(sum, s.N * s.C * splits, kThreads, stream, s, splits, static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd, sums.partial, active));
    RETURN_IF_ERROR(launch(finish_gradient_sums_kernel<A>, s.N * s.num_groups, kThreads, stream, s, splits, static_cast<const A*>(gamma), rstd, static_cast<const Pair*>(sums.partial), static_cast<const ActiveSums*>(active), sums.channel_sums, sums.group_means, sums.bias_sums));
    if (!dgamma && !dbeta && !dbias) return cudaSuccess;
    return launch(parameter_gradients_kernel<T>, ceil_div(s.C, kThreads), kThreads, stream, s, static_cast<const Pair*>(sums.channel_sums), static_cast<const double*>(sums.bias_sums), static_cast<A*>(dgamma), static_cast<A*>(dbeta), static_cast<T*>(dbias));
}

}  // namespace group_norm
'''

_SOURCES['relu_group_norm_generic.cu'] = r'''
// GroupNorm of an activation r = relu(z), and the backward of both, for any shape and dtype.
//
//   forward   y = (r - mean) * rstd * gamma + beta, mean and variance (biased) over each (n, group)
//   backward  group_norm_backward.cuh
//
//   r, dz (N, C, S) of type T   y, dy (N, C, S) of type Y   statistics (2, N, num_groups) float64: mean, rstd   gamma, beta, dgamma, dbeta (C) Acc<T>   dbias (C) T
//
// Sums are taken in float64, of values shifted by the group's first element, so neither a large mean nor a large range
// cancels; they are added in a fixed order. Formula: torch.nn.GroupNorm.

#include "group_norm_backward.cuh"

namespace relu_group_norm_generic {

using namespace group_norm;

// ------------------------------------------------------------------------------------------------------ Forward

// partial (N * num_groups, splits): sum and sum of squares of r - r[first of the group]
template <typename T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Shape s, int64_t splits, const T* __restrict__ r, Pair* __restrict__ partial) {
    wait_for_previous_kernel();
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
    wait_for_previous_kernel();
    Pair sum = {0, 0};
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) {
        sum.a += partial[blockIdx.x * splits + i].a;
        sum.b += partial[blockIdx.x * splits + i].b;
    }
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const Statistics shifted(sum, double(s.group_count()), eps);
    mean[blockIdx.x] = to_acc(r[blockIdx.x * s.group_count()]) + shifted.mean;
    rstd[blockIdx.x] = shifted.rstd;
}

// ----------------------------------------------------------------------------------------------------- Backward

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
dz_kernel(Shape s, int64_t tiles, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd,
          const Acc<T>* __restrict__ gamma, const Pair* __restrict__ group_means, T* __restrict__ dz) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t row = blockIdx.x / tiles, c = row % s.C, group = row / s.group_channels();
    const ChannelGradient<A> gradient(mean[group], rstd[group], gamma ? gamma[c] : A(1), group_means[group]);
    const int64_t begin = blockIdx.x % tiles * (kThreads * kApplyElements) + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kApplyElements; e++) {
        const int64_t i = begin + e * kThreads;
        if (i < s.S) dz[row * s.S + i] = from_acc<T>(gradient.dz(to_acc(dy[row * s.S + i]), to_acc(r[row * s.S + i])));
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
    return group_norm::GradientSums::bytes(*s);
}

// dz, dgamma, dbeta and dbias may be null: not wanted.
extern "C" int relu_group_norm_backward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                                const void* dy, const void* r, const double* statistics, const void* gamma, void* dz, void* dgamma, void* dbeta, void* dbias) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        using A = Acc<T>;
        const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        const GradientSums sums(s, workspace);
        RETURN_IF_ERROR((sum_gradients<T, Y>(s, stream, dy, r, statistics, gamma, sums, dgamma, dbeta, dbias)));
        if (!dz) return int(cudaSuccess);
        return launch(dz_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd,
                      static_cast<const A*>(gamma), static_cast<const Pair*>(sums.group_means), static_cast<T*>(dz));
    });
}

extern "C" const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
'''

_SOURCES['scaled_half.cuh'] = r'''
// The operands of the fp16 tensor-core paths: channels-last fp16 copies, scaled by powers of two.
//
// fp16 keeps as many mantissa bits as TF32 (10). Where a tensor's largest finite magnitude is scaled to 2^m <= 2^15, every
// element within 2^(m + 14) of it rounds exactly as TF32 rounds it, to nearest, and a smaller one is off by at most 2^-(m + 25)
// of the maximum. NaN and Inf stay what they are. Products of two such numbers are exact in float32.
//
// Weights have one scale per destination channel, from its maximum, with m = 15. Activations have one scale per sample,
// so that they are read once: the maximum of a part of the sample is scaled to [2^8, 2^9), the copy finds the true maximum on
// its way, and a sample that turns out to hold something 2^6 times larger is copied again, its maximum scaled to [2^14, 2^15).
// The maxima live in device memory: nothing synchronises with the host.
#pragma once

#include "group_norm_backward.cuh"
#include "stencil.h"
#include "swizzle.h"

namespace scaled_half {

constexpr int kThreads = 256;
constexpr int kLookElements = 4096;        // that one block looks at
constexpr int kLookColumns = 4 * kThreads, kLookRows = 8;    // of a weight, likewise, where the destination's kernels are neighbours
constexpr int kWeightColumns = 64, kWeightChannels = 64;    // elements of destination channels' kernels, and source channels, that one block copies
constexpr int kMaxShift = 120;             // keeps the scale and its inverse normal float32 numbers

__device__ __forceinline__ int clamp_shift(int shift) { return shift < kMaxShift ? shift : kMaxShift; }
__device__ __forceinline__ int exponent_of(unsigned magnitude_bits) { return int(magnitude_bits >> 23) - 127; }

// scale = 2^shift, from the bits of the largest finite magnitude
__device__ __forceinline__ int shift_of(unsigned max_bits) { return max_bits == 0 ? 0 : clamp_shift(14 - exponent_of(max_bits)); }

// The bits of the largest finite magnitude of a sample, of the part that was looked at first and of all; and whether it has
// values that are not finite.
struct SampleMax { unsigned part, all, non_finite; };

__device__ __forceinline__ int first_shift_of(SampleMax m) { return m.part == 0 ? 0 : clamp_shift(8 - exponent_of(m.part)); }
// Whether the first copy holds: nothing overflowed, and there was something to look at.
__device__ __forceinline__ bool first_copy_holds(SampleMax m) { return m.part != 0 ? exponent_of(m.all) + first_shift_of(m) <= 14 : m.all == 0; }
__device__ __forceinline__ int shift_of(SampleMax m) { return first_copy_holds(m) ? first_shift_of(m) : shift_of(m.all); }

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Two scaled values as high and low halves: value = high + low with 22 bits.
struct SplitPair { __half2 high, low; };
__device__ __forceinline__ SplitPair split(float x, float y) {
    const __half2 high = __floats2half2_rn(x, y);
    return {high, __floats2half2_rn(x - __low2float(high), y - __high2float(high))};
}

// 2^exponent = scale * more, where more is 1 unless that is not a normal number; for exponents of two shifts.
struct ScaleInParts { float scale, more; };
__device__ __forceinline__ ScaleInParts scale_in_parts(int exponent) {
    const int normal = max(-126, min(127, exponent));
    return {power_of_two(normal), power_of_two(max(-126, exponent - normal))};
}

constexpr unsigned kInfinity = 0x7f800000;    // the bits of an infinite magnitude; those of a NaN are more
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffff; }
__device__ __forceinline__ unsigned finite_magnitude(float v) { return magnitude(v) < kInfinity ? magnitude(v) : 0; }
struct Extremes { unsigned finite, any; };    // the largest magnitudes, of the finite values and of all
__device__ __forceinline__ void find_extremes(Extremes& e, float v) { e.finite = umax(e.finite, finite_magnitude(v)), e.any = umax(e.any, magnitude(v)); }

// ---------------------------------------------------------------------------------------------------- Parameters

// float32 only: where r is not null, an activation's x is the gradient of group_norm(relu(z)), and what is copied is the gradient of z.
struct NormGradient {
    const void* r;                                 // relu(z), of x's shape and dtype
    group_norm::Shape shape;
    const double *mean, *rstd;                     // (N, num_groups)
    const float* gamma;                            // (C), or null
    const group_norm::Pair* group_means;           // (N, num_groups)
    __device__ __forceinline__ group_norm::ChannelGradient<float> channel(int64_t n, int64_t c) const {
        const int64_t group = n * shape.num_groups + c / int(shape.group_channels());
        return {mean[group], rstd[group], gamma ? gamma[c] : 1.0f, group_means[group]};
    }
};

// x (N, C, D, H, W) of the tensor's dtype -> copy (N, positions d, h, w, phases, phase_channels) fp16. Element u - crop of an axis,
// u = position * phases + phase, where that is in [0, size); zero elsewhere, and in the added channels. x = high + low. Several groups: phase_channels
// is 2 * C, for each group of `split` channels their high halves and then their low ones. One group: `third` channels [low, high, high].
struct Activation {
    struct Axis { int positions, phases, crop, size; };
    int64_t N, C, phase_channels;
    int split, third;                              // channels of a group, of a third; or 0
    Axis axis[3];                                  // D, H, W
    const void* x;
    __half* copy;
    __half* unsplit;                               // where it is split, the copy that the gradients read, if they want one: (N, positions, unsplit_channels)
    int64_t unsplit_channels;
    SampleMax* max;                                // (N), starts at zero
    bool vectors;                                  // rows and the address are multiples of four elements
    NormGradient norm;
    HOST_DEVICE int64_t sample() const { return C * axis[0].size * axis[1].size * axis[2].size; }
    HOST_DEVICE int64_t positions() const { return int64_t(axis[0].positions) * axis[1].positions * axis[2].positions; }
    HOST_DEVICE int phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
    HOST_DEVICE int channels() const { return int(split ? C : phase_channels - 2 * third); }    // before the split, those added to the last third included
    HOST_DEVICE int64_t copied() const { return N * positions() * phases() * phase_channels; }
};

// The source of a stencil; each of its channels has less than 2^31 elements, phases included.
inline Activation make_activation(const Stencil& s, int64_t N, int64_t C, int64_t phase_channels, int split, int third) {
    Activation a = {N, C, phase_channels, split, third, {}, nullptr, nullptr, nullptr, 0, nullptr, false, {}};
    for (int i = 0; i < 3; i++) a.axis[i] = {s.axis[i].sources, s.axis[i].source_phases, s.axis[i].source_crop, s.axis[i].source_out};
    return a;
}

// w -> copy (taps, M_pad, source phases, phase_channels) fp16: the weight of each row, a (channel, phase) of the destination, at
// each tap (d, h, w) of the stencil; zero where there is none. Rows that belong to no channel stay as they are. Split: phase_channels
// is 4 * split, of the channel's own group [high, high, low, 0]. Thirds: [high, low, high]. Fragments: instead, 64 rows of 16 columns (a source phase's channel) after another.
struct Weight {
    Stencil stencil;
    RowMap rows;
    int64_t channels, C, M_pad, phase_channels;    // destination channels, source channels
    int split, third;                              // source channels of a group, of a third; or 0
    int64_t groups, group_C_out;                   // of the layer
    bool forward;                                  // the destination is the layer's output
    bool fragments;
    const void* w;                                 // (C_in, C_out / groups, kernel)
    __half* copy;
    unsigned* max;                                 // (channels), starts at zero
    // What w has for a destination channel: kernels of `count` source channels from `first` on, those of its group, at `begin` + stride * i.
    struct Kernels { int first, count; int64_t begin; int stride; };
    HOST_DEVICE Kernels kernels_of(int destination) const {
        if (groups == 1) return {0, int(C), destination * (forward ? kernel_volume(stencil) : row_elements()), forward ? int(channels) * kernel_volume(stencil) : kernel_volume(stencil)};
        const int volume = kernel_volume(stencil), in = int((forward ? C : channels) / groups), out = int(group_C_out), group = destination / (forward ? out : in);
        if (forward) return {group * in, in, (int64_t(group) * in * out + destination % out) * volume, out * volume};
        return {group * out, out, int64_t(destination) * out * volume, volume};
    }
    HOST_DEVICE int64_t copied() const { return stencil.taps() * M_pad * stencil.source_phases() * phase_channels; }
    // Where the copy of a row of all taps begins, of a source phase; and where its columns are behind that.
    HOST_DEVICE int64_t begin_of_row(int row, int phase) const {
        const int64_t pitch = stencil.source_phases() * phase_channels, begin = phase * phase_channels;
        return fragments ? (row / 64 * pitch + begin) * 64 + fragment_place_of_row(row % 64) : row * pitch + begin;
    }
    HOST_DEVICE int64_t place_of_column(int column) const { return fragments ? column / 16 * (64 * 16) + fragment_place_of_column(column % 16) : column; }
    // Rows of neighbouring elements that memory has, and blocks that look at parts of them: (rows of a group, its columns, group) or (row, columns).
    HOST_DEVICE int64_t row_elements() const { return group_C_out * kernel_volume(stencil); }
    HOST_DEVICE int64_t look_blocks() const {    // none where a weight for dx has no channels: not wanted
        if (forward) return ceil_div(row_elements(), kLookColumns) * ceil_div(C / groups, kLookRows) * groups;
        return channels * ceil_div(row_elements(), kLookElements);
    }
};

constexpr int kLookShare = 32;                     // so much of a sample is looked at: all of a small one, kLargeLook elements of a large one
constexpr int64_t kSmallSample = 1 << 18, kLargeLook = 1 << 19;
constexpr int kTileElements = 8192;                // of one block of the copy: 32 or 64 channels
HOST_DEVICE int tile_channels(const Activation& a) { return a.channels() <= 32 || a.split || a.third ? 32 : 64; }
HOST_DEVICE int tile_positions(const Activation& a) { return kTileElements / tile_channels(a); }

HOST_DEVICE int64_t look_blocks(const Activation& a) {
    const int64_t elements = a.sample();
    const int64_t share = elements / kLookShare < kLargeLook ? elements / kLookShare : kLargeLook;
    return ceil_div(elements > kSmallSample ? share : elements, kLookElements);
}
HOST_DEVICE bool looks_at_all(const Activation& a) { return look_blocks(a) * kLookElements >= a.sample(); }

// Blocks of the copies, each kTileElements at most: of a sample, and of the weight.
HOST_DEVICE int64_t elements_of_channel(const Activation& a) { return a.positions() * a.phases(); }
HOST_DEVICE int64_t tiles_of_sample(const Activation& a) { return ceil_div(elements_of_channel(a), tile_positions(a)) * ceil_div(a.channels(), tile_channels(a)); }
HOST_DEVICE int64_t tiles_of_weight(const Weight& p) { return p.split ? p.channels : ceil_div(p.channels * kernel_volume(p.stencil), kWeightColumns) * ceil_div(p.phase_channels - 2 * p.third, kWeightChannels); }

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

// The maxima of the destination channels in a part of the weight. Forward, a row has a source channel's kernels of all of them, so a thread keeps to its columns and
// goes from row to row; for dx it has one destination channel's.
template <typename T> __device__ void look_at_weight(const Weight& p, int block) {
    const int volume = kernel_volume(p.stencil), elements = int(p.row_elements());
    if (!p.forward) {
        const int parts = int(ceil_div(elements, kLookElements)), channel = block / parts, begin = block % parts * kLookElements, end = min(begin + kLookElements, elements);
        const T* row = static_cast<const T*>(p.w) + int64_t(channel) * elements;
        unsigned max = 0;
#pragma unroll 8
        for (int i = begin + threadIdx.x; i < end; i += kThreads) max = umax(max, finite_magnitude(to_acc(row[i])));
        max = block_max(max);
        if (threadIdx.x == 0) atomicMax(p.max + channel, max);
        return;
    }
    __shared__ unsigned maxima[kLookColumns + 1];
    const int tiles = int(ceil_div(elements, kLookColumns)), group_rows = int(p.C / p.groups), parts = int(ceil_div(group_rows, kLookRows));
    const int begin = block % tiles * kLookColumns, first_row = block / tiles % parts * kLookRows, group = block / tiles / parts, rows = min(kLookRows, group_rows - first_row);
    const int first_channel = begin / volume, count = (min(begin + kLookColumns, elements) - 1) / volume - first_channel + 1;
    const T* row = static_cast<const T*>(p.w) + (int64_t(group) * group_rows + first_row) * elements;
    for (int i = threadIdx.x; i < count; i += kThreads) maxima[i] = 0;
    __syncthreads();
    constexpr int kColumns = kLookColumns / kThreads;
    float values[kLookRows][kColumns];
#pragma unroll
    for (int r = 0; r < kLookRows; r++)
#pragma unroll
        for (int i = 0; i < kColumns; i++) values[r][i] = to_acc(row[min(r, rows - 1) * int64_t(elements) + min(begin + i * kThreads + int(threadIdx.x), elements - 1)]);
    unsigned max[kColumns] = {};
#pragma unroll
    for (int r = 0; r < kLookRows; r++)
#pragma unroll
        for (int i = 0; i < kColumns; i++) max[i] = umax(max[i], finite_magnitude(values[r][i]));
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const int column = begin + i * kThreads + threadIdx.x;
        if (column < elements) atomicMax(maxima + column / volume - first_channel, max[i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) atomicMax(p.max + group * int(p.group_C_out) + first_channel + i, maxima[i]);
}

// kWeightColumns columns, each an element of a destination channel's kernel, of kWeightChannels source channels, transposed through shared memory; and, beside a
// channel's first element, the rows that no element belongs to. kThirds: once for the first and the last third, once for the second.
template <typename T, bool kThirds> __device__ void copy_weight_tile(const Weight& p, int tile) {
    __shared__ __half values[kWeightColumns][kWeightChannels + 2];    // the rows begin in different banks
    __shared__ int64_t rows[kWeightColumns];    // where they begin
    const int volume = kernel_volume(p.stencil), columns = int(p.channels) * volume, column_tiles = int(ceil_div(columns, kWeightColumns));
    const int first = tile % column_tiles * kWeightColumns, c0 = tile / column_tiles * kWeightChannels, own = threadIdx.x % kWeightColumns, own_c = threadIdx.x / kWeightColumns;
    const int source_phases = p.stencil.source_phases();
    const auto row_of = [&](int channel, int tap, int phase) { return p.begin_of_row(tap * int(p.M_pad) + p.rows.row(channel, phase / source_phases), phase % source_phases); };    // one of the two is 1
    const int column = min(first + own, columns - 1), channel = column / volume, k = column - channel * volume;
    const Weight::Kernels kernels = p.kernels_of(channel);
    const T* w = static_cast<const T*>(p.w) + kernels.begin + k;
    constexpr int kSteps = kThreads / kWeightColumns, kEach = kWeightChannels / kSteps;
    float v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int c = c0 + own_c + i * kSteps - kernels.first;
        v[i] = unsigned(c) < unsigned(kernels.count) ? to_acc(w[int64_t(c) * kernels.stride]) : 0.0f;
    }
    const float scale = power_of_two(shift_of(p.max[channel]));
#pragma unroll
    for (int i = 0; i < kEach; i++) values[own][own_c + i * kSteps] = __float2half_rn(v[i] * scale);
    if (own_c == 0) {
        const TapPhase place = place_of_kernel(p.stencil, k);
        rows[own] = row_of(channel, place.tap, place.phase);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = c0 + lane * 2;
    const auto write = [&](int64_t row, bool low, bool high, __half2 v) {
        const auto write_to = [&](int third) {
            if (c + third * p.third < (third < 2 && kThirds ? (third + 1) * p.third : p.phase_channels)) *reinterpret_cast<__half2*>(p.copy + row + p.place_of_column(c + third * p.third)) = v;
        };
        if (high) write_to(0);
        if (kThirds && low) write_to(1);
        if (kThirds && high) write_to(2);
    };
    const auto write_values = [&](bool low) {
        for (int i = warp; i < kWeightColumns && first + i < columns; i += kThreads / 32) write(rows[i], low, !low, *reinterpret_cast<const __half2*>(&values[i][lane * 2]));
    };
    write_values(false);
    if (kThirds) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            __half& value = values[own][own_c + i * kSteps];
            value = __float2half_rn(v[i] * scale - __half2float(value));
        }
        __syncthreads();
        write_values(true);
    }
    const int all = p.stencil.taps() * p.stencil.phases() * source_phases;
    if (all == volume) return;
    for (int i = warp * 32 + lane; i - lane < all; i += kThreads) {    // each lane knows a tap and a phase
        const int tap = i % p.stencil.taps(), phase = i / p.stencil.taps();
        const unsigned without = __ballot_sync(~0u, i < all && kernel_index(p.stencil, tap, phase) < 0);
        for (int m = int(ceil_div(first, volume)); m * volume < min(first + kWeightColumns, columns); m++) {
            const int64_t row = row_of(m, tap, phase);
            for (unsigned left = without; left; left &= left - 1) write(__shfl_sync(~0u, row, __ffs(left) - 1), true, true, __half2half2(__float2half_rn(0.0f)));
        }
    }
}

// One destination channel, split.
template <typename T> __device__ void copy_split_weight(const Weight& p, int channel) {
    const float scale = power_of_two(shift_of(p.max[channel]));
    const Weight::Kernels kernels = p.kernels_of(channel);
    const T* w = static_cast<const T*>(p.w) + kernels.begin;
    const int taps = p.stencil.taps(), columns = 4 * p.split;
    for (int i = threadIdx.x; i < taps * p.stencil.phases() * columns; i += kThreads) {
        const int column = i % columns, tap = i / columns % taps, phase = i / columns / taps, part = column / p.split;
        const int k = kernel_index(p.stencil, tap, phase);
        const float v = k >= 0 && part < 3 ? to_acc(w[column % p.split * kernels.stride + k]) * scale : 0.0f;
        const __half high = __float2half_rn(v);
        p.copy[p.begin_of_row(tap * int(p.M_pad) + p.rows.row(channel, phase), 0) + p.place_of_column(column)] = part < 2 ? high : __float2half_rn(v - __half2float(high));
    }
}

// The maxima of the weight's channels, and of parts of every sample, evenly spread.
template <typename T, bool kNorm> __global__ void __launch_bounds__(kThreads) look_kernel(Activation a, Weight p) {
    wait_for_previous_kernel();
    const int64_t weight_blocks = p.look_blocks(), blocks = look_blocks(a), elements = a.sample();
    if (blockIdx.x < weight_blocks) return look_at_weight<T>(p, blockIdx.x);
    const int64_t n = (blockIdx.x - weight_blocks) / blocks, block = (blockIdx.x - weight_blocks) % blocks;
    const int64_t last = elements > kLookElements ? elements - kLookElements : 0;
    const int64_t begin = blocks > 1 ? last * block / (blocks - 1) : 0;
    const T* part = static_cast<const T*>(a.x) + n * elements + begin;
    const int count = elements < kLookElements ? elements : kLookElements;
    constexpr int kEach = kLookElements / kThreads;
    float values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) values[i] = i * kThreads + threadIdx.x < count ? to_acc(part[i * kThreads + threadIdx.x]) : 0.0f;
    if constexpr (kNorm) {
        const T* activation = static_cast<const T*>(a.norm.r) + n * elements + begin;
        float activations[kEach];
#pragma unroll
        for (int i = 0; i < kEach; i++) activations[i] = i * kThreads + threadIdx.x < count ? to_acc(activation[i * kThreads + threadIdx.x]) : 0.0f;
        group_norm::ChannelGradient<float> gradient;
        int64_t channel_end = 0;    // of the elements that it is for
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int64_t at = begin + i * kThreads + threadIdx.x;
            if (at >= channel_end && at < elements) {
                const int64_t c = at / a.norm.shape.S;
                gradient = a.norm.channel(n, c), channel_end = (c + 1) * a.norm.shape.S;
            }
            values[i] = gradient.dz(values[i], activations[i]);    // zero where the activation is
        }
    }
    unsigned max = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) max = umax(max, finite_magnitude(values[i]));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(&a.max[n].part, max);
}

template <typename T> using Four = Vector<T, 4>;

enum class Kind { kPlain, kSplit, kNorm };

// Element `f` of a sample's channel, counted in the order (position d, phase d, position h, phase h, u): x, the element of the
// source's channel, or -1 where there is none; y, the position and phase of the copy.
__device__ __forceinline__ int2 place_of(const Activation& a, unsigned f) {
    const auto &ad = a.axis[0], &ah = a.axis[1], &aw = a.axis[2];
    const unsigned row_u = aw.positions * aw.phases, rows = ah.positions * ah.phases, row = f / row_u;
    const int w = int(f - row * row_u), d = int(row / rows), h = int(row - d * rows);    // u of each axis
    const int source_d = d - ad.crop, source_h = h - ah.crop, source_w = w - aw.crop;
    const bool inside = source_d >= 0 && source_d < ad.size && source_h >= 0 && source_h < ah.size && source_w >= 0 && source_w < aw.size;
    const int pd = divide_by_phases(d, ad.phases), ph = divide_by_phases(h, ah.phases), pw = divide_by_phases(w, aw.phases);
    const int position = (pd * ah.positions + ph) * aw.positions + pw, phase = ((d - pd * ad.phases) * ah.phases + h - ph * ah.phases) * aw.phases + w - pw * aw.phases;
    return make_int2(inside ? (source_d * ah.size + source_h) * aw.size + source_w : -1, position * a.phases() + phase);
}

// Where shared memory has channels 8 * octet to 8 * octet + 7 of position s, counted in vectors of 16 bytes. Eight of them, of consecutive
// positions, of every fourth, or of consecutive octets, are in different banks.
template <int kOctets> __device__ __forceinline__ int staged_at(int s, int octet) {
    const int at = s * kOctets + octet, line = at / 8;
    return at ^ ((line ^ line >> 3) & 7);
}

// Four elements of each of eight channels; zero where `from` is -1, and from channel `channels` on. kVectors: they are neighbours; kAll: there are all channels.
template <bool kVectors, bool kAll, typename T> __device__ __forceinline__ void load_octet(const T* channel, int64_t volume, int channels, const int (&from)[4], Four<T> (&eight)[8]) {
    const T* at[4];
#pragma unroll
    for (int e = 0; e < 4; e++) at[e] = channel + from[e];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (kVectors) eight[i] = from[0] >= 0 ? *reinterpret_cast<const Four<T>*>(at[0]) : Four<T>{};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (!kVectors) eight[i].v[e] = (kAll || i < channels) && from[e] >= 0 ? *at[e] : from_acc<T>(0.0f);
            at[e] += volume;
        }
    }
}

// Tile `index` of a sample: channels x positions, transposed through shared memory; returns the thread's extremes.
template <typename T, int kChannels, Kind kKind> __device__ Extremes copy_tile(const Activation& a, int64_t n, unsigned index, float scale) {
    constexpr int kOctets = kChannels / 8, kPositions = kTileElements / kChannels;
    constexpr bool kSplit = kKind == Kind::kSplit, kNorm = kKind == Kind::kNorm;
    const unsigned channel_tiles = ceil_div(a.channels(), kChannels);
    const int c0 = int(index % channel_tiles) * kChannels, f0 = int(index / channel_tiles) * kPositions, count = int(elements_of_channel(a));
    const int64_t volume = int64_t(a.axis[0].size) * a.axis[1].size * a.axis[2].size;
    const bool plain = a.phases() == 1;    // then the source and the copy have the same order
    __shared__ uint4 tile[kSplit ? 2 : 1][kPositions * kOctets];    // high, low
    __shared__ int2 places[kPositions];    // source element or -1, position and phase of the copy
    if (!plain) {
        if (threadIdx.x < kPositions) places[threadIdx.x] = f0 + int(threadIdx.x) < count ? place_of(a, f0 + threadIdx.x) : make_int2(-1, 0);
        __syncthreads();
    }
    // A warp has eight channels of 128 positions, four a lane.
    static_assert(kOctets * (kPositions / 128) * 32 == kThreads, "one for each");
    const int lane = threadIdx.x % 32, octet = threadIdx.x / 32 % kOctets, c = c0 + octet * 8, channels = int(a.C) - c;
    const int first = threadIdx.x / 32 / kOctets * 128 + (a.vectors ? lane * 4 : lane), step = a.vectors ? 1 : 32;
    int from[4];                           // elements of the source, or -1
#pragma unroll
    for (int e = 0; e < 4; e++) from[e] = plain ? (f0 + first + e * step < count ? f0 + first + e * step : -1) : places[first + e * step].x;
    const auto load = [&](const void* x, Four<T> (&eight)[8]) {
        const T* channel = static_cast<const T*>(x) + (n * a.C + c) * volume;
        if (channels < 8) load_octet<false, false>(channel, volume, channels, from, eight);
        else if (a.vectors) load_octet<true, true>(channel, volume, channels, from, eight);
        else load_octet<false, true>(channel, volume, channels, from, eight);
    };
    Four<T> values[8];
    load(a.x, values);
    if constexpr (kNorm) {
        Four<T> activations[8];
        load(a.norm.r, activations);
        __shared__ group_norm::ChannelGradient<float> gradients[kChannels];    // taken while those loads are under way
        if (threadIdx.x < kChannels) gradients[threadIdx.x] = a.norm.channel(n, min(c0 + int(threadIdx.x), int(a.C) - 1));
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const group_norm::ChannelGradient<float> gradient = gradients[octet * 8 + i];
#pragma unroll
            for (int e = 0; e < 4; e++) values[i].v[e] = gradient.dz(values[i].v[e], activations[i].v[e]);    // zero where r is zero: outside too
        }
    }
    unsigned any = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        __half2 high[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float x = to_acc(values[k * 2].v[e]), y = to_acc(values[k * 2 + 1].v[e]);
            any = umax(any, umax(magnitude(x), magnitude(y)));
            const SplitPair pair = split(x * scale, y * scale);
            high[k] = pair.high, low[k] = pair.low;
        }
        const int at = staged_at<kOctets>(first + e * step, octet);
        tile[0][at] = *reinterpret_cast<const uint4*>(high);
        if (kSplit) tile[kSplit][at] = *reinterpret_cast<const uint4*>(low);
    }
    Extremes max = {any, any};
    if (any >= kInfinity) {
        max.finite = 0;
        for (const Four<T>& four : values)
            for (const T& value : four.v) max.finite = umax(max.finite, finite_magnitude(to_acc(value)));
    }
    __syncthreads();
    const bool thirds = kSplit && a.third;
    const int column = c0 + int(threadIdx.x) % kOctets * 8, channel = kSplit && !thirds ? column / a.split * 2 * a.split + column % a.split : column;
    if (column < a.channels()) {
        __half* copy = a.copy + n * count * a.phase_channels + channel;
#pragma unroll
        for (int s = threadIdx.x / kOctets; s < kPositions; s += kThreads / kOctets) {
            if (f0 + s >= count) continue;
            __half* to = copy + int64_t(plain ? f0 + s : places[s].y) * int(a.phase_channels);
            const int at = staged_at<kOctets>(s, threadIdx.x % kOctets);
            if (!thirds) *reinterpret_cast<uint4*>(to) = tile[0][at];
            if (kSplit && !thirds) *reinterpret_cast<uint4*>(to + a.split) = tile[kSplit][at];
            if (thirds && column < a.third) *reinterpret_cast<uint4*>(to) = tile[kSplit][at], *reinterpret_cast<uint4*>(to + a.third) = tile[0][at];
            if (thirds) *reinterpret_cast<uint4*>(to + 2 * a.third) = tile[0][at];
            if (kSplit && a.unsplit && column < a.unsplit_channels) *reinterpret_cast<uint4*>(a.unsplit + (n * count + (plain ? f0 + s : places[s].y)) * a.unsplit_channels + column) = tile[0][at];
        }
    }
    return max;
}

// The weight, and every sample: so many blocks each.
template <typename T, int kChannels, Kind kKind> __global__ void __launch_bounds__(kThreads) copy_kernel(Activation a, Weight p, unsigned weight_tiles, unsigned sample_tiles) {
    wait_for_previous_kernel();
    if (blockIdx.x < weight_tiles) return kKind == Kind::kSplit && p.split ? copy_split_weight<T>(p, blockIdx.x) : copy_weight_tile<T, kKind == Kind::kSplit>(p, blockIdx.x);
    const unsigned block = blockIdx.x - weight_tiles, n = block / sample_tiles;
    const Extremes extremes = copy_tile<T, kChannels, kKind>(a, n, block - n * sample_tiles, power_of_two(first_shift_of(a.max[n])));
    const unsigned max = block_max(extremes.finite);
    if (threadIdx.x == 0 && max > a.max[n].all) atomicMax(&a.max[n].all, max);
    if (extremes.any >= kInfinity) a.max[n].non_finite = 1;
}

// The weight alone, beside the kernel before, which started when the look's maxima were there.
__global__ void __launch_bounds__(kThreads) copy_weight_kernel(Weight p) {
    let_next_kernel_come();
    copy_weight_tile<float, false>(p, blockIdx.x);
    wait_for_end_of_previous_kernel();
}

// Whether some sample's first copy does not hold: mostly none. Each warp finds out by itself.
__device__ __forceinline__ bool any_copied_again(const SampleMax* max, int samples) {
    bool again = false;
#pragma unroll 1
    for (int n = threadIdx.x % 32; n < samples; n += 32) again |= !first_copy_holds(max[n]);
    return __any_sync(~0u, again);
}

// Copies those again.
template <typename T, int kChannels, Kind kKind> __global__ void __launch_bounds__(kThreads) copy_again_kernel(Activation a, unsigned sample_tiles) {
    wait_for_previous_kernel();
    if (!any_copied_again(a.max, int(a.N))) return;
    for (int64_t n = 0; n < a.N; n++) {
        if (first_copy_holds(a.max[n])) continue;
        const float scale = power_of_two(shift_of(a.max[n]));
        for (unsigned tile = blockIdx.x; tile < sample_tiles; tile += gridDim.x) {
            copy_tile<T, kChannels, kKind>(a, n, tile, scale);
            __syncthreads();
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

template <typename T, bool kNorm> int look(const Activation& a, const Weight& p, bool overlaps, void* stream) { return launch_kernel(look_kernel<T, kNorm>, p.look_blocks() + a.N * look_blocks(a), kThreads, 0, overlaps, stream, a, p); }

template <typename T, int kChannels, Kind kKind> int copy(const Activation& a, const Weight& p, int multiprocessors, void* stream) {
    RETURN_IF_ERROR((look<T, kKind == Kind::kNorm>(a, p, true, stream)));
    const int64_t weight_tiles = tiles_of_weight(p), sample_tiles = tiles_of_sample(a);
    RETURN_IF_ERROR(launch(copy_kernel<T, kChannels, kKind>, weight_tiles + a.N * sample_tiles, kThreads, stream, a, p, unsigned(weight_tiles), unsigned(sample_tiles)));
    if (looks_at_all(a)) return cudaSuccess;    // then the first copy holds
    return launch(copy_again_kernel<T, kChannels, kKind>, multiprocessors * 2, kThreads, stream, a, unsigned(sample_tiles));
}

template <typename T> int pack(Activation a, const Weight& p, int multiprocessors, void* stream) {
    const auto& w = a.axis[2];
    const bool whole_rows = a.phases() == 1 || (w.size % 4 == 0 && w.crop == 0 && w.positions * w.phases % 4 == 0);    // a vector lies in one row
    a.vectors = whole_rows && a.sample() / a.C % 4 == 0 && holds<Four<T>>(a.x) && holds<Four<T>>(a.norm.r);
    const bool narrow = tile_channels(a) == 32;
    if constexpr (sizeof(T) == 4) {
        if (a.split || a.third) return copy<T, 32, Kind::kSplit>(a, p, multiprocessors, stream);
        if (a.norm.r) return narrow ? copy<T, 32, Kind::kNorm>(a, p, multiprocessors, stream) : copy<T, 64, Kind::kNorm>(a, p, multiprocessors, stream);
    }
    if (a.split || a.third || a.norm.r) return cudaErrorNotSupported;
    return narrow ? copy<T, 32, Kind::kPlain>(a, p, multiprocessors, stream) : copy<T, 64, Kind::kPlain>(a, p, multiprocessors, stream);
}

// Copies an activation, and a weight unless it has no channels.
inline int pack(const Activation& a, const Weight& p, int dtype, int multiprocessors, void* stream) {
    switch (dtype) {
        case kFloat32: return pack<float>(a, p, multiprocessors, stream);
        case kFloat16: return pack<__half>(a, p, multiprocessors, stream);
        case kBFloat16: return pack<__nv_bfloat16>(a, p, multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
}

// Where another kernel copies the activation, float32, one operand, no norm: the look at both, and, beside that kernel, the copy of the weight. That kernel lives on the L1 cache, of which a
// multiprocessor has what the kernels before left it (the convolution 28 KB) until it was idle: so no block of the look comes early.
inline int look_when_idle(const Activation& a, const Weight& p, void* stream) { return look<float, false>(a, p, false, stream); }
inline int copy_weight_beside(const Weight& p, void* stream) { return launch(copy_weight_kernel, tiles_of_weight(p), kThreads, stream, p); }

}  // namespace scaled_half
'''

_SOURCES['conv_tiling.h'] = r'''
// How the tensor cores' convolutions cut their work: GEMM_M rows into (channel, phase), GEMM_N into runs of positions.
#pragma once

#include "stencil.h"

namespace conv {

constexpr int kRows = 64;                      // GEMM_M of a warpgroup
constexpr int kMaxWarpgroups = 3;              // that multiply
constexpr int kMostRunPlanes = 15;             // as many as Run::live has bits for in table_key()
constexpr int kMostPaired = 136;               // the largest block_n whose epilogue knows paired runs, and runs with outputs of the next one (conv_tiles.h)
constexpr int kSector = 8, kLine = 32;         // floats of memory that are written at once, and requested at once: parts of a sector cost more than all of it

// Rows. The phases of the packed axes, of W at least, lie in the same row tile, so that one block has whole output rows.
//
// Positions. A strip of tile_w columns of an (n, d) plane of the grid at a time, in runs of `run` positions for each warpgroup: neighbouring runs of one
// plane, or the same run of neighbouring planes, which small planes are too few positions without. Of the smallest a run has several, `run_planes` whole ones.
// A box of the source, halo included, is copied once for all taps (h, w): rows of `pitch`, so that a tap is a shift of an
// address by whole rows of shared memory. Where the strip is the whole width, neighbouring rows share the zeros of their halos.
struct Tiling {
    int warpgroups;                            // that multiply
    int block_n;                               // GEMM_N of a warpgroup: at least the span of its run, gaps between rows included
    int split_m;                               // 1: the warpgroups, two of them, have the same positions, other rows; 0: the other way round
    int chunk, chunk_phases;                   // source channels of a stage: 16, 32 or 64; neighbouring phases of W that they are of
    int live_w[kMaxStride];                    // of a phase, bit t: it or another of its stage has a weight at tap t
    int phase_channels, C_pad;                 // source channels of GEMM_K: of each phase, of all
    int k_parts, part_channels;                // parts of GEMM_K, which are added in the end; source channels of each
    int split, products, group_tiles;          // channels of a group where operands are split (else 0), products of a tap, row tiles of a group
    bool packed[3];                            // axes
    RowMap rows;
    int row_tiles, M_pad;                      // M_pad = 64 * row_tiles
    int tile_w, strips;                        // columns of a strip
    int run, runs;                             // positions of a run, runs of a strip, in groups of tile_runs()
    int run_planes;                            // of the grid in a run: 1, or several whole ones
    int planes, plane_groups;                  // of the grid in a tile: of one run, or of one for each warpgroup; tiles for all planes
    int pitch, box_rows;                       // of a plane of a box
    int taps_per_box;                          // taps h that a box serves: all, or 1
    bool whole_rows;                           // a run is whole rows of the strip
    bool whole_sectors;                        // of memory are stored: a run has the first outputs of the next one too, to the end of its last sector
    bool contiguous;                           // the outputs of a run are neighbours in memory
    bool bulk, dense, vectors;                 // staged outputs are aligned as in memory; position q is float q of its region; with two phases of W, pairs of positions are aligned vectors
    bool tensor_store;                         // one copy of the whole run
    bool pairs;                                // positions 2 i and 2 i + 1 are aligned pairs of outputs, or none, which float32 is stored by, not staged (mma.sync)
    int staging_unit;                          // contiguous outputs are staged as they are aligned to so many floats in memory
    int region_channels, region_stride;        // channels of a row tile that are staged; floats of the staged outputs of a channel
    int buffers, table_bytes;                  // one for each warpgroup, or one for all; what tells a warpgroup where to stage
    bool fragments;                            // packed weights lie as mma.sync takes them (swizzle.h), else in rows
    int item_taps, items;                      // taps of a stage of weights: 1, all w, or all (h, w); products of those taps, or 1
    int input_bytes, weight_bytes, input_stages, weight_rings, weight_stages;    // stages of each ring; one ring where all warpgroups have the same rows
    int lag;                                   // taps by which the second warpgroup begins later
    int buffer_bytes;
    int row_pairs, tiles;                      // row tiles of a block
    bool keeps_weights;                        // from tile to tile
    int loaders, box_loader;                   // warps; which of them loads boxes
    int queues;                                // of tiles: one, or one for each row pair, whose weights a block keeps
    int column_warps;                          // warps that share a row's positions
    double cycles;                             // estimated, of a multiprocessor
    Divisor by_row_pairs, by_runs, by_strips, by_plane_groups, by_tile_w, by_pitch, by_channel_tiles;
    HOST_DEVICE int sample_places() const { return plane_groups * strips * runs; }    // of tiles, on the grid
    HOST_DEVICE int tile_runs() const { return split_m || planes > 1 ? 1 : warpgroups; }    // of a plane
    HOST_DEVICE int tile_parts() const { return split_m ? 1 : warpgroups; }                  // runs of all its planes
    HOST_DEVICE int box_bytes() const { return planes * box_rows * pitch * chunk * 2; }
    HOST_DEVICE int channels() const { return rows.channel_tiles * rows.octets * 8; }
};

// Phases of an axis that lie in the same row tile.
HOST_DEVICE int packed_phases(const Tiling& t, const Stencil& s, int axis) { return t.packed[axis] ? s.axis[axis].phases : 1; }

// Output planes of a channel that a run has, each staged in a region of its own: the packed phases of D, or, where a run has several planes of the grid, one of each;
// and how far they are apart.
HOST_DEVICE int region_planes(const Tiling& t, const Stencil& s) { return t.run_planes > 1 ? t.run_planes : packed_phases(t, s, 0); }
HOST_DEVICE int region_plane_step(const Tiling& t, const Stencil& s) { return t.run_planes > 1 ? s.axis[0].phases : 1; }

inline int round_up(int64_t v, int64_t to) { return int(ceil_div(v, to) * to); }

// Positions from the first to the last of a run that begins at position `begin` of a strip, gaps included.
inline int span_of(const Tiling& t, int64_t begin, int64_t count) {
    return int(((begin + count - 1) / t.tile_w - begin / t.tile_w) * t.pitch + (begin + count - 1) % t.tile_w - begin % t.tile_w) + 1;
}

// Rows of a box, of `tile_w` positions and their halo. Where a strip is the whole width, rows share their zeros: those right of one
// row are those left of the next. halo: columns by which taps are apart; left, right: those of zeros.
inline int box_pitch(int halo, int left, int right, int tile_w, int strips) {
    int shared = left < right ? left : right;
    shared = strips > 1 || shared < 0 ? 0 : shared < halo ? shared : halo;
    return tile_w + halo - shared;
}
inline int box_pitch(const StencilAxis& w, int tile_w, int strips) {
    const int halo = w.shift[w.taps - 1];
    return box_pitch(halo, halo - w.first, w.first + w.positions - w.sources, tile_w, strips);
}

inline bool runs_fit(const Tiling& t, int64_t strip, int64_t run) {
    for (int64_t begin = 0; begin < strip; begin += run)
        if (span_of(t, begin, run < strip - begin ? run : strip - begin) > t.block_n) return false;
    return true;
}

// The length of the fewest equal runs of a strip that fit, 8 mod 16 or a multiple of 4; 0 where there is none.
inline int longest_run(const Tiling& t, int64_t strip, int step) {
    for (int64_t count = ceil_div(strip, t.block_n);; count++) {
        const int64_t run = ceil_div(strip, count), length = step == 16 ? round_up(run + 8, 16) - 8 : round_up(run, 4);
        if (runs_fit(t, strip, length)) return int(length);
        if (run <= 4) return 0;
    }
}

// Cuts a strip into runs. False where one would not fit. may_share: runs may have outputs of the next one too.
inline bool cut_runs(Tiling& t, const Stencil& s, bool may_share) {
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    const int64_t strip = int64_t(h.positions) * t.tile_w, group = t.tile_runs();
    t.whole_rows = h.phases * w.phases > 1 || t.strips > 1;
    if (t.whole_rows) {
        if (t.tile_w > t.block_n) return false;
        const int rows = (t.block_n - t.tile_w) / t.pitch + 1;
        t.run = (rows < h.positions ? rows : h.positions) * t.tile_w;
        const int shared = ceil_div(kSector - 1 + w.crop, w.phases);    // positions of the next row
        t.whole_sectors = may_share && t.block_n <= kMostPaired && t.strips == 1 && (h.phases == 1 || t.packed[1]) && rows < h.positions && w.out > kSector && w.out % kSector != 0 && rows * t.pitch + shared <= t.block_n;
    } else {
        // Runs of 8 mod 16 positions, which suits lay_out_regions, if that makes hardly more of them.
        const int suited = longest_run(t, strip, 16), other = longest_run(t, strip, 4);
        if (suited <= 0 && other <= 0) return false;
        t.run = suited > 0 && ceil_div(strip, suited) * 16 <= ceil_div(strip, other) * 17 ? suited : other;
    }
    t.runs = ceil_div(ceil_div(strip, t.run), group);
    int rows = 0;    // of the grid, from a group's first to its last
    for (int64_t i = 0; i < t.runs; i++) {
        const int64_t begin = i * group * t.run, end = begin + group * t.run < strip ? begin + group * t.run : strip;
        const int span = int((end - 1) / t.tile_w - begin / t.tile_w) + 1;
        rows = span > rows ? span : rows;
        if (i > 64) { rows++; break; }
    }
    t.box_rows = rows + t.whole_sectors + (t.taps_per_box == 1 ? 0 : h.shift[h.taps - 1]);
    return t.box_rows <= 256;
}

// Gives a run of a whole plane as many planes as there are columns for, `warpgroups` such runs a tile. False where that is one.
inline bool join_planes(Tiling& t, const Stencil& s, int warpgroups) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1];
    if (t.runs > 1 || t.strips > 1 || t.packed[0] || (h.phases > 1 && !t.packed[1])) return false;
    const int64_t most = (t.block_n - span_of(t, 0, int64_t(h.positions) * t.tile_w)) / (t.box_rows * t.pitch) + 1, tiles = ceil_div(d.positions, (most < kMostRunPlanes ? most : kMostRunPlanes) * warpgroups);
    t.run_planes = int(ceil_div(d.positions, tiles * warpgroups)), t.planes = t.run_planes * warpgroups;
    return t.run_planes > 1;
}

// Lays a run's outputs out for staging: a region for each (channel, output plane). bulk_copies: what stores them; then the epilogue
// also knows runs without a table.
inline void lay_out_regions(Tiling& t, const Stencil& s, int64_t channels, bool bulk_copies) {
    const int out_h = s.axis[1].out, out_w = s.axis[2].out;
    const int phases_h = packed_phases(t, s, 1), phases_w = s.axis[2].phases;
    t.contiguous = t.strips == 1 && (s.axis[1].phases == 1 || t.packed[1]);
    const int rows = ceil_div(t.run, t.tile_w) * phases_h;
    const bool aligned = int64_t(out_h) * out_w % 4 == 0 && (t.whole_rows && t.contiguous ? out_w : t.run) % 4 == 0;
    t.bulk = t.contiguous || (aligned && out_w % 4 == 0 && t.tile_w * phases_w % 4 == 0 && s.axis[2].crop == 0);
    t.dense = bulk_copies && t.contiguous && aligned && phases_h * phases_w == 1 && t.pitch == t.tile_w && t.run_planes == 1;
    t.vectors = aligned && t.contiguous && t.whole_rows && phases_w == 2 && s.axis[2].crop == 0 && t.run_planes == 1;
    // 8 mod 16: pairs of neighbours go to shared memory without bank conflicts; where the neighbours are phases, 4 mod 8 is better, or 16 mod 32 for vectors.
    const auto stride_of = [&](int floats) { return t.vectors ? round_up(floats - 16, 32) + 16 : phases_w == 2 ? round_up(floats - 4, 8) + 4 : round_up(floats - 8, 16) + 8; };
    const int outputs = !t.contiguous ? rows * t.tile_w * phases_w : t.whole_rows ? rows * out_w : t.dense ? t.block_n : t.run;
    t.tensor_store = t.run_planes == 1 && t.contiguous && !t.whole_rows && aligned && stride_of(outputs) == t.run;
    t.staging_unit = t.whole_sectors ? kLine : 4;
    t.region_stride = stride_of(outputs + (t.contiguous ? t.staging_unit - (aligned ? 4 : 1) : 0) + (t.whole_sectors ? kSector - 1 : 0));
    if (t.run_planes > 1)    // a channel's planes are staged as far apart as in memory, modulo 4
        while ((int64_t(out_h) * out_w * region_plane_step(t, s) - t.region_stride) % 4 != 0) t.region_stride++;
    t.table_bytes = t.dense ? 0 : round_up(phases_h * phases_w * t.block_n * 4, 128);
    t.region_channels = round_up(channels, 8) < t.rows.octets * 8 ? round_up(channels, 8) : t.rows.octets * 8;
    const int regions = t.region_channels * region_planes(t, s);
    t.buffer_bytes = round_up(int64_t(regions) * t.region_stride * 4, 128);
}

// Source channels of a stage, and what the channels of a phase are padded to.
inline int chunk_of(int64_t channels) { return channels <= 16 ? 16 : channels <= 32 ? 32 : 64; }
inline int padded_channels(int64_t channels) { return round_up(channels, chunk_of(channels)); }

// With several groups, the operands are split into high and low halves, x = high + low: as accurate as float32. A row tile has rows
// of one group, GEMM_K is that group's [high, low], and each tap has two products: with the weight's [high, high] and [low, 0].
inline bool can_split(const Geometry& g) {
    const int64_t group_in = g.C_in / g.groups;
    return (group_in == 8 || group_in == 16 || group_in == 32) && g.C_out / g.groups % 8 == 0;
}

// Makes a stage of all channels of so many phases of W, which divide them, at all taps of any of them: some products are with zeros, but stages are fewer, and rows of memory longer.
inline bool join_phases(Tiling& t, const StencilAxis& w, int count) {
    if (count > 1 && (t.chunk < t.phase_channels || t.chunk * count > 64)) return false;
    t.chunk_phases = count, t.chunk *= count;
    for (int phase = 0; phase < w.source_phases; phase++) {
        t.live_w[phase] = 0;
        for (int i = 0; i < count; i++) t.live_w[phase] |= w.live[phase / count * count + i];
    }
    return true;
}

// What the channels are padded to and how many row tiles that makes; needs the packing and split_m. False where groups do not fit.
inline bool set_channels(Tiling& t, const Stencil& s, int64_t source_channels, int64_t channels, int64_t groups) {
    t.products = 1;
    t.chunk = chunk_of(source_channels);
    t.phase_channels = padded_channels(source_channels);
    t.rows.channel_tiles = ceil_div(channels, t.rows.octets * 8);
    if (groups > 1) {
        t.split = source_channels / groups, t.products = 2;
        t.phase_channels = t.chunk = 2 * t.split;
        t.group_tiles = channels / groups / (t.rows.octets * 8);
        if (t.split_m || t.group_tiles * t.rows.octets * 8 * groups != channels) return false;
    }
    join_phases(t, s.axis[2], 1);
    t.C_pad = t.phase_channels * s.source_phases();
    t.k_parts = 1, t.part_channels = t.C_pad;
    t.row_tiles = round_up(s.phases() / t.rows.packed_phases * t.rows.channel_tiles, t.split_m ? 2 : 1);
    t.M_pad = kRows * t.row_tiles;
    t.row_pairs = t.row_tiles / (t.split_m ? 2 : 1);
    return true;
}

// Cuts GEMM_K into `parts` of whole stages, and of whole phases of the source where it has several. False where that does not go.
inline bool cut_channels(Tiling& t, const Stencil& s, int parts) {
    if (parts > 1 && s.source_phases() > 1 && s.source_phases() % (parts * t.chunk_phases) != 0) return false;
    t.k_parts = parts, t.part_channels = int(ceil_div(t.C_pad / t.chunk, parts)) * t.chunk;
    return int64_t(t.part_channels) * (parts - 1) < t.C_pad;
}

inline bool count_tiles(Tiling& t, const Stencil& s, int64_t samples) {
    t.plane_groups = int(ceil_div(s.axis[0].positions, t.planes));
    const int64_t tiles = samples * t.plane_groups * t.strips * t.runs * t.row_pairs * t.k_parts;
    if (tiles > 1 << 30) return false;
    t.tiles = int(tiles);
    return true;
}

// The chosen tiling, complete.
inline Tiling with_divisors(Tiling t) {
    if (t.block_n == 0) return t;
    t.by_row_pairs = make_divisor(t.row_pairs), t.by_runs = make_divisor(t.runs), t.by_strips = make_divisor(t.strips), t.by_plane_groups = make_divisor(t.plane_groups);
    t.by_tile_w = make_divisor(t.tile_w), t.by_pitch = make_divisor(t.pitch), t.by_channel_tiles = make_divisor(t.rows.channel_tiles);
    return t;
}

HOST_DEVICE int count_bits(int bits) {
#ifdef __CUDA_ARCH__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

// The place of the bit that has `rank` lower ones.
HOST_DEVICE int place_of_bit(int bits, int rank) {
    for (; rank > 0; rank--) bits &= bits - 1;
    return count_bits((bits & -bits) - 1);
}

// A phase of the source, of each axis.
struct SourcePhase {
    int d = 0, h = 0, w = 0;
    HOST_DEVICE void advance(const Stencil& s, int count = 1) {    // of W, which that divides
        if ((w += count) == s.axis[2].source_phases) w = 0, h++;
        if (h == s.axis[1].source_phases) h = 0, d++;
    }
};

// Where the source has phases, a part of GEMM_K is so many of them.
HOST_DEVICE int phases_of_part(const Tiling& t, const Stencil& s) { return t.k_parts == 1 ? s.source_phases() : s.source_phases() / t.k_parts; }

// How much of a tile's steps its largest part has.
inline double largest_part(const Tiling& t, const Stencil& s) {
    if (s.source_phases() == 1 || t.k_parts == 1) return double(t.part_channels) / t.C_pad;
    SourcePhase phase;
    int all = 0, largest = 0;
    for (int part = 0; part < t.k_parts; part++) {
        int taps = 0;
        for (int i = 0; i < phases_of_part(t, s); i++, phase.advance(s)) taps += count_bits(s.axis[0].live[phase.d]) * count_bits(s.axis[1].live[phase.h]) * count_bits(s.axis[2].live[phase.w]);
        all += taps, largest = taps > largest ? taps : largest;
    }
    return double(largest) / all;
}

// The taps w of all source phases, those included at which only one has a weight that it is joined with.
inline int taps_w_of_phases(const Tiling& t, const StencilAxis& w) {
    int taps = 0;
    for (int phase = 0; phase < w.source_phases; phase++) taps += count_bits(t.live_w[phase]);
    return taps;
}

// What a tile has on average: steps of 16 source channels at a tap, bytes of outputs, and boxes.
inline double steps_of(const Tiling& t, const Stencil& s) {
    int kernel_taps = 1;    // with a weight, of all source phases, and those that are joined with them
    for (const StencilAxis& a : s.axis) kernel_taps *= a.source_phases == 1 ? a.taps : &a == s.axis + 2 ? taps_w_of_phases(t, a) : a.kernel;
    const int phases_d = s.axis[0].phases;
    return double(kernel_taps) * t.products * t.phase_channels / 16 * (t.packed[0] ? 1.0 : (phases_d + 1.0) / (2.0 * phases_d)) * (t.packed[1] || s.axis[1].phases == 1 ? 1.0 : 0.75);
}
inline double out_bytes_of(const Tiling& t) { return 4.0 * t.warpgroups * kRows * t.run * t.run_planes * t.rows.octets * t.rows.packed_phases / 8; }
inline double boxes_of(const Tiling& t, const Stencil& s) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1];
    return double(t.C_pad / t.chunk / d.source_phases) * (t.taps_per_box == 1 ? h.taps : 1) * (d.source_phases > 1 ? d.kernel : d.taps);
}

}  // namespace conv
'''

_SOURCES['conv_tiles.h'] = r'''
// Where a tile of the tensor cores' convolutions reads and writes: the index arithmetic of the kernels, for host and device.
#pragma once

#include "conv_tiling.h"

namespace conv {

// ---------------------------------------------------------------------------------------------------------- Problem

HOST_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int max_of(int a, int b) { return a > b ? a : b; }

struct Problem {
    int64_t N, C_out;
    int64_t out_volume;
    Stencil s;
    Tiling t;
};

// ---------------------------------------------------------------------------------------------------------- Tiles

// A warpgroup's run of a tile, and where its outputs go. They are staged in regions, one for each (channel, output plane: region_planes()):
// either as one piece, in the order of global memory and aligned as there (staging_unit), or as one piece for each output row.
struct Run {
    int row_tile, channel0, outer;       // first channel of the row tile, phase of the axes that are not packed
    int b_row;                           // of the box
    int count, rows, h0, q0;             // positions of a plane, whole rows of them; the first one's row and column
    int od0, phase_h;                    // first output plane, phase of H where it is not packed
    int live;                            // bit i: there is the i-th of its output planes, and the run has positions
    int oh0, ow0, oh_end, ow_end;        // the outputs of a region
    int first;                           // floats of the region's first row before the run
    int alignment;                       // of the first region, modulo staging_unit
    bool paired;                         // W has two phases, and position q has floats 2 q and 2 q + 1 of its row; only column 0's phase 0 may be missing
    int paired_place;                    // then: where the first row's column 0 has phase 0 in its region, for packed phase 0 of H
};

// Whether a row of GEMM_M of this packed phase of D has an output plane, or some of several.
HOST_DEVICE bool has_outputs(const Tiling& t, const Run& run, int packed_d) { return t.run_planes > 1 ? run.live != 0 : run.live >> packed_d & 1; }

struct Place {
    int n, d, w0, columns;       // sample of the outputs, those of part 0 of GEMM_K first; first plane of the grid; or n = -1: no more. First column of the strip, and how many
    int sample, part_k;          // of the source
    int h0, part;                // first row of the box's positions; index in the sample
    int row_tile, first_run;     // of the first warpgroup
    int source_channel;          // the first of the copy
    int live_d, live_h;          // bit t: some row has a weight at tap t, and tap d reads a plane of the source
    bool empty;                  // no tap reads anything
};

struct Tile : Place {
    Run run[kMaxWarpgroups];     // of the warpgroups
};

// How many phases the axes have that are not packed.
HOST_DEVICE int outer_phases(const Problem& p) { return (p.t.packed[0] ? 1 : p.s.axis[0].phases) * (p.t.packed[1] ? 1 : p.s.axis[1].phases); }    // W is packed

// The phases of D and H, where they are not packed, of outer phase `outer` (but of one that an added row tile has).
struct OuterPhases { int d, h; };
HOST_DEVICE OuterPhases outer_phases_of(const Problem& p, int outer) {
    const Tiling& t = p.t;
    const int phases_h = t.packed[1] ? 1 : p.s.axis[1].phases, d = divide_by_phases(outer, phases_h), phases_d = p.s.axis[0].phases;
    return {t.packed[0] ? 0 : d - divide_by_phases(d, phases_d) * phases_d, outer - d * phases_h};
}

// Sets of moments of a channel: of each run and phase, or of what a block adds.
HOST_DEVICE int parts_of_sample(const Problem& p) {
    const Tiling& t = p.t;
    if (t.k_parts > 1) return int(ceil_div(p.out_volume, kAddedOutputs));
    return t.sample_places() * t.tile_parts() * t.column_warps * p.s.phases();
}

// The index of a run among all runs of all samples that have moments of their own.
HOST_DEVICE int64_t index_of_run(const Problem& p, const Tile& tile, int warpgroup) {
    const Tiling& t = p.t;
    return (int64_t(tile.n) * t.sample_places() + tile.part) * t.tile_parts() + (t.split_m ? 0 : warpgroup);
}

// Where the source has phases: the first one of a part of GEMM_K.
HOST_DEVICE SourcePhase first_phase_of(const Problem& p, int part_k) {
    const int phases_h = p.s.axis[1].source_phases, phases_w = p.s.axis[2].source_phases;
    const int first = part_k * phases_of_part(p.t, p.s), dh = divide_by_phases(first, phases_w), d = divide_by_phases(dh, phases_h);
    return {d, dh - d * phases_h, first - dh * phases_w};
}

// Bit t: tap t has weights in some row of a row tile.
HOST_DEVICE int live_taps(const StencilAxis& a, bool packed, int phase) { return packed || a.phases == 1 ? (1 << a.taps) - 1 : a.live[phase]; }

// A tile's boxes, in the order in which everyone takes them: of every tap d, some taps h, and a chunk of GEMM_K.
struct Cursor {
    const Problem* p;
    int d, h0, c_begin, c_end;
    int tile_live;                      // bits: taps (h) with weights, from bit 8 on taps (d), from bit 16 on the part of GEMM_K: tiles of the same one have the same steps
    int live_h = 0, live_w = 0;         // of the box: bit t tells that tap t has weights
    int td, first, c;                   // tap (d), first tap (h), channel of GEMM_K
    int phase_c = 0;                    // c within the phase of the source: counted, since a division takes a warp 100 cycles
    SourcePhase phase, first_phase;     // of the box, the first one where it has several; of the part

    // Before the first box of a tile.
    HOST_DEVICE Cursor(const Problem& p, const Tile& tile)
        : p(&p), d(tile.d), h0(tile.h0), c_begin(tile.part_k * p.t.part_channels), c_end(min_of(p.t.C_pad, c_begin + p.t.part_channels)), tile_live(tile.live_h | tile.live_d << 8 | tile.part_k << 16),
          td(-1), first(p.s.axis[1].taps), c(c_end) {
        if (tile.part_k > 0 && p.t.phase_channels < p.t.C_pad) first_phase = first_phase_of(p, tile.part_k);
    }
    // Whether there is another box with live taps, which it then is at.
    HOST_DEVICE bool next_box() {
        const StencilAxis &ad = p->s.axis[0], &ah = p->s.axis[1], &aw = p->s.axis[2];
        while (true) {
            c += p->t.chunk, phase_c += p->t.chunk;
            if (phase_c >= p->t.phase_channels) phase_c = 0, phase.advance(p->s, p->t.chunk_phases);
            if (c >= c_end) {
                first += p->t.taps_per_box;
                if (first >= ah.taps) {
                    do {
                        if (++td >= ad.taps) return false;
                    } while (!(tile_live >> (8 + td) & 1));
                    first = 0;
                }
                c = c_begin, phase_c = p->t.phase_channels < p->t.C_pad ? 0 : c_begin, phase = first_phase;    // parts are whole phases, or of the only one
            }
            live_h = tile_live & ((1 << p->t.taps_per_box) - 1) << first, live_w = (1 << aw.taps) - 1;
            if (p->t.phase_channels < p->t.C_pad) {
                if (!(ad.live[phase.d] >> td & 1)) continue;
                live_h &= ah.live[phase.h], live_w = p->t.live_w[phase.w];
            }
            if (live_h == 0 || live_w == 0) continue;
            if (p->t.item_taps > 1) live_w = 1;             // all taps w are one stage,
            if (p->t.item_taps > aw.taps) live_h = 1;       // all taps h too
            return true;
        }
    }

    HOST_DEVICE int last_shift() const { return p->s.axis[1].shift[min_of(first + p->t.taps_per_box, p->s.axis[1].taps) - 1]; }
    HOST_DEVICE int plane() const { return p->s.axis[0].first + d - p->s.axis[0].shift[td]; }    // of the source
    HOST_DEVICE int source_row() const { return p->s.axis[1].first + h0 - last_shift(); }
};

// The taps of the box that a cursor is at, each with its products.
struct BoxTaps {
    struct Tap {
        int rows;                       // of shared memory, by which the tap is shifted in its box
        int tap, column;                // the tap (d, h, w); of the packed weights
    };
    const Problem* p;
    int live_h, live_w, live_taps_w;    // of every tap h; how many
    int td, last_shift, c, products;    // products: that have a stage of their own
    int count;

    HOST_DEVICE BoxTaps(const Cursor& at)
        : p(at.p), live_h(at.live_h), live_w(at.live_w), live_taps_w(count_bits(at.live_w)), td(at.td), last_shift(at.last_shift()), c(at.c), products(p->t.items > 1 ? 1 : p->t.products),
          count(count_bits(live_h) * live_taps_w * products) {}
    HOST_DEVICE Tap operator[](int i) const {
        const StencilAxis &ah = p->s.axis[1], &aw = p->s.axis[2];
        const int product = products == 1 ? 0 : i % 2;
        int bits_h = live_h, rank_w = products == 1 ? i : i / 2;
        for (; rank_w >= live_taps_w; rank_w -= live_taps_w) bits_h &= bits_h - 1;
        const int th = place_of_bit(bits_h, 0), tw = place_of_bit(live_w, rank_w);
        return {(last_shift - ah.shift[th]) * p->t.pitch + aw.shift[aw.taps - 1] - aw.shift[tw], (td * ah.taps + th) * aw.taps + tw, c + product * p->t.C_pad};
    }
};

// Floats from one staged row to the next.
HOST_DEVICE int staged_row(const Problem& p) { return p.t.contiguous ? p.s.axis[2].out : p.t.tile_w * p.s.axis[2].phases; }

// The global index of a region's first float, in arithmetic of type T.
template <typename T> HOST_DEVICE T region_origin(const Problem& p, const Place& place, const Run& run, int channel, int od) {
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    return ((T(place.n) * T(p.C_out) + T(channel)) * T(ad.out) + T(od)) * T(ah.out) * T(aw.out) + T(run.oh0) * T(aw.out) + T(run.ow0) + T(run.first);
}

HOST_DEVICE Place place_of(const Problem& p, int index) {
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    Place place = {};
    place.row_tile = t.by_row_pairs.take(index) * (t.split_m ? 2 : 1);
    const int run = t.by_runs.take(index), strip = t.by_strips.take(index), plane_group = t.by_plane_groups.take(index);
    place.first_run = run * t.tile_runs(), place.w0 = strip * t.tile_w, place.d = plane_group * t.planes, place.n = index;
    place.part = (plane_group * t.strips + strip) * t.runs + run;
    place.part_k = t.k_parts > 1 ? place.n / int(p.N) : 0, place.sample = place.n - place.part_k * int(p.N);
    place.columns = min_of(t.tile_w, aw.positions - place.w0);
    place.h0 = t.by_tile_w.divide(place.first_run * t.run);
    place.source_channel = t.split ? place.row_tile % t.rows.channel_tiles / t.group_tiles * t.phase_channels : 0;
    for (int i = 0; i <= t.split_m; i++) {
        const OuterPhases outer = outer_phases_of(p, t.by_channel_tiles.divide(place.row_tile + i));
        place.live_d |= live_taps(ad, t.packed[0], outer.d), place.live_h |= live_taps(ah, t.packed[1], outer.h);
    }
    for (int td = 0; td < ad.taps; td++) {
        const int plane = ad.first + place.d - ad.shift[td];    // that the first one reads
        if (plane + t.planes <= 0 || plane >= ad.sources) place.live_d &= ~(1 << td);
    }
    place.empty = place.live_d == 0 || place.live_h == 0;
    if (t.k_parts > 1 && t.phase_channels < t.C_pad) {    // the part's phases may have no weights at those taps
        SourcePhase phase = first_phase_of(p, place.part_k);
        bool live = false;
        for (int i = 0; i < phases_of_part(t, p.s); i++, phase.advance(p.s)) live |= (ad.live[phase.d] & place.live_d) && (ah.live[phase.h] & place.live_h) && aw.live[phase.w];
        place.empty = !live;
    }
    return place;
}

HOST_DEVICE Run run_of(const Problem& p, const Place& place, int warpgroup) {
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    Run run = {};
    run.row_tile = place.row_tile + (t.split_m ? warpgroup : 0);
    run.outer = t.by_channel_tiles.divide(run.row_tile), run.channel0 = (run.row_tile - run.outer * t.rows.channel_tiles) * t.rows.octets * 8;
    const OuterPhases outer = outer_phases_of(p, run.outer);
    run.phase_h = outer.h;
    const int plane = t.planes > t.run_planes ? warpgroup * t.run_planes : 0, begin = (place.first_run + (t.tile_runs() > 1 ? warpgroup : 0)) * t.run;
    const bool exists = run.outer < outer_phases(p) && place.d + plane < ad.positions;    // not in an added row tile or plane
    run.count = exists ? max_of(0, min_of(t.run, ah.positions * t.tile_w - begin)) : 0;
    run.h0 = t.by_tile_w.divide(begin), run.q0 = begin - run.h0 * t.tile_w;
    run.b_row = run.count > 0 ? (plane * t.box_rows + run.h0 - place.h0) * t.pitch + run.q0 : 0;
    run.od0 = (place.d + plane) * ad.phases + outer.d - ad.crop;
    for (int i = 0, od = run.od0; i < region_planes(t, p.s); i++, od += region_plane_step(t, p.s)) run.live |= (run.count > 0 && od >= 0 && od < ad.out) << i;
    run.oh0 = run.h0 * ah.phases - ah.crop + run.phase_h, run.ow0 = max_of(0, place.w0 * aw.phases - aw.crop);
    if (t.packed[1]) run.oh0 = max_of(0, run.oh0);
    run.rows = t.by_tile_w.divide(run.count);
    const int oh_end = (run.h0 + run.rows) * ah.phases - ah.crop, ow_end = (place.w0 + place.columns) * aw.phases - aw.crop;
    run.oh_end = min_of(ah.out, oh_end), run.ow_end = min_of(aw.out, ow_end);
    run.first = t.whole_rows ? 0 : run.q0;
    run.paired = t.block_n <= kMostPaired && t.run_planes == 1 && aw.phases == 2 && t.whole_rows && t.tile_w % 8 == 0 && place.columns == t.tile_w && (run.rows == 1 || (run.rows > 1 && t.pitch == t.tile_w)) &&
                 run.h0 * ah.phases >= ah.crop && oh_end <= ah.out && ow_end <= aw.out && (!t.whole_sectors || oh_end == ah.out || run.rows * t.pitch >= t.block_n - 8);
    run.paired_place = (t.packed[1] ? run.h0 * ah.phases - ah.crop - run.oh0 : 0) * staged_row(p) + place.w0 * 2 - aw.crop - run.ow0;
    run.alignment = t.contiguous ? region_origin<unsigned>(p, place, run, run.channel0, run.od0) & (t.staging_unit - 1) : 0;
    return run;
}

HOST_DEVICE void locate(const Problem& p, int index, Tile& tile) {
    static_cast<Place&>(tile) = place_of(p, index);
    for (int i = 0; i < p.t.warpgroups; i++) tile.run[i] = run_of(p, tile, i);
}

// Item i of a stage of weights is tap i % item_taps and product i / item_taps: by how many rows it is shifted against the first.
HOST_DEVICE int rows_of_item(const Problem& p, int i) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int tap = i % p.t.item_taps;
    return (ah.shift[0] - ah.shift[tap / aw.taps]) * p.t.pitch + aw.shift[0] - aw.shift[tap % aw.taps];
}

// -------------------------------------------------------------------------------------------------- Staged outputs

// Where a region begins behind a multiple of region_stride, so that its outputs are staged as they are aligned in memory: the run's alignment + the region's,
// modulo staging_unit. channel and plane from the run's first on. Only where runs are contiguous.
HOST_DEVICE int alignment_of_region(const Problem& p, int channel, int plane) {
    const unsigned area = unsigned(p.s.axis[1].out) * unsigned(p.s.axis[2].out), region = channel * region_planes(p.t, p.s) + plane;
    return p.t.contiguous ? ((unsigned(channel) * unsigned(p.s.axis[0].out) + unsigned(plane * region_plane_step(p.t, p.s))) * area - region * unsigned(p.t.region_stride)) & (p.t.staging_unit - 1) : 0;
}

// Outputs of a region, where they are neighbours in memory.
HOST_DEVICE int contiguous_count(const Problem& p, const Run& run) { return p.t.whole_rows ? (run.oh_end - run.oh0) * p.s.axis[2].out : run.count; }

// Where position q of a phase is in its region, whose rows and planes are so far apart, or, of a run of several planes, behind the channel's first one; or -1; from contiguous_count() on: the next run's.
// Positions count the gaps, from column 0 of the run's first row on.
HOST_DEVICE int place_of_position(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w, int row_stride, int plane_stride) {
    const Tiling& t = p.t;
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    int row = q, region = 0;
    const int column = t.by_pitch.take(row);
    if (t.run_planes > 1) {
        const int plane = row / t.box_rows;
        if (plane >= t.run_planes || !(run.live >> plane & 1)) return -1;
        row -= plane * t.box_rows, region = plane * plane_stride;
    }
    const int oh = (run.h0 + row) * ah.phases + (t.packed[1] ? packed_h : run.phase_h) - ah.crop, ow = (tile.w0 + column) * aw.phases + phase_w - aw.crop;
    if (column >= tile.columns || oh < 0 || oh >= ah.out || ow < 0 || ow >= aw.out) return -1;
    const int place = (t.packed[1] ? oh - run.oh0 : row) * row_stride + ow - run.ow0 - run.first;
    const bool own = row * t.tile_w + column - run.q0 < run.count, of_next = t.whole_sectors && place < contiguous_count(p, run) + kSector - 1;
    return own || of_next ? region + place : -1;
}

// The same where outputs are staged, and in memory.
HOST_DEVICE int staged_place(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w) {
    return place_of_position(p, tile, run, q, packed_h, phase_w, staged_row(p), p.t.region_stride);
}
HOST_DEVICE int place_in_memory(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    return place_of_position(p, tile, run, q, packed_h, phase_w, (p.t.packed[1] ? 1 : ah.phases) * aw.out, region_plane_step(p.t, p.s) * ah.out * aw.out);
}

// The first position of a row of GEMM_M that is an output, given its staged places: columns 0 and 1 or the first row of the grid may be cropped, and the first plane
// of several. Where it has no outputs, any.
HOST_DEVICE int first_output(const Tiling& t, const int* places) {
    if (places[0] >= 0) return 0;
    if (places[1] >= 0) return 1;
    const int next_row = min_of(t.pitch, t.block_n - 2);
    if (t.run_planes == 1 || places[next_row] >= 0 || places[next_row + 1] >= 0) return next_row + (places[next_row] < 0);
    for (int q = t.box_rows * t.pitch; q < t.block_n; q++)
        if (places[q] >= 0) return q;
    return 0;
}

// Floats of a paired run from row to row of the grid.
HOST_DEVICE int paired_row(const Problem& p) { return (p.t.packed[1] ? p.s.axis[1].phases : 1) * staged_row(p); }

// Staged regions of a run: (channel, output plane).
HOST_DEVICE int regions_of(const Problem& p, const Run& run) { return run.count > 0 ? p.t.region_channels * region_planes(p.t, p.s) : 0; }

// Which channel of its run a region is of, and which output plane.
struct RegionPlace { int channel, plane; };
HOST_DEVICE RegionPlace place_of_region(const Problem& p, int region) {
    const int planes = region_planes(p.t, p.s), channel = p.t.run_planes > 1 ? region / planes : divide_by_phases(region, planes);
    return {channel, region - channel * planes};
}

// Calls f(global index, region, float of the region, count) for the pieces of every `step`-th region from `first` to `end`.
template <typename F> HOST_DEVICE void for_each_piece(const Problem& p, const Tile& tile, const Run& run, int first, int end, int step, F f) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int plane_step = region_plane_step(p.t, p.s);
    const int rows = p.t.contiguous ? 1 : run.rows * packed_phases(p.t, p.s, 1), row_step = p.t.packed[1] ? 1 : ah.phases;
    const int count = p.t.contiguous ? contiguous_count(p, run) : run.ow_end - run.ow0;
    const int64_t run_origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0), area = int64_t(ah.out) * aw.out;
    for (int region = first; region < end; region += step) {
        const auto [channel, plane] = place_of_region(p, region);
        if (run.channel0 + channel >= p.C_out || !(run.live >> plane & 1)) continue;
        const int64_t origin = run_origin + (int64_t(channel) * p.s.axis[0].out + plane * plane_step) * area;
        // A sector that two runs share is the first one's.
        const int skipped = p.t.whole_sectors && run.oh0 > 0 ? int(-origin & (kSector - 1)) : 0, added = p.t.whole_sectors && run.oh_end < ah.out ? int(-(origin + count) & (kSector - 1)) : 0;
        for (int row = 0; row < rows; row++) {
            const int oh = run.oh0 + row * row_step;
            if (oh >= 0 && oh < (p.t.packed[1] ? run.oh_end : ah.out))
                f(origin + skipped + int64_t(row) * row_step * aw.out, region, p.t.contiguous ? (int(origin - region * p.t.region_stride) & (p.t.staging_unit - 1)) + skipped : row * staged_row(p), count - skipped + added);
        }
    }
}

}  // namespace conv
'''

_SOURCES['conv_epilogue.cuh'] = r'''
// What the tensor cores' convolutions are given and leave behind, on every architecture.
#pragma once

#include "conv_tiles.h"
#include "ptx_sm80.cuh"
#include "scaled_half.cuh"

namespace conv {

// ---------------------------------------------------------------------------------------------------- Parameters

// Scratch of a call.
struct Workspace {
    float* parts;                                  // or null. (k_parts, N, C_out, D_out, H_out, W_out): what is to be added
    unsigned* tile_tickets;                        // (queues): how many tiles have been taken; start at zero
    group_norm::MomentSets sets;                   // of runs and phases
    unsigned *stored, *ready, *groups, *pieces;    // conv_normalizer.cuh: (N), (N), (1), (1); start at zero
};

// GroupNorm in the convolution's kernel (conv_normalizer.cuh).
struct Normalization {
    int blocks;                                    // that do hardly anything else; 0: another kernel normalizes
    group_norm::Shape shape;
    double eps;
    const float *gamma, *beta;                     // (C_out), or null
    float* y;                                      // may be the convolution's output
    double *mean, *rstd;                           // (N, num_groups)
};

struct Parameters {
    Problem p;
    int dtype;
    bool apply_relu;
    const void* bias;                                // (C_out), or null
    void* out;                                       // (k_parts, N, C_out, D_out, H_out, W_out)
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (C_out)
    Workspace workspace;
    Normalization norm;
};

// -------------------------------------------------------------------------------------------------------- Values

// Sum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// What the table of a run's staged places depends on: runs of the same form, all but those at the edges, have the same one.
__device__ __forceinline__ int4 table_key(const Problem& p, const Tile& tile, const Run& run) {
    const StencilAxis& ah = p.s.axis[1];
    return make_int4(run.count, p.t.run_planes > 1 ? run.live << 16 : run.q0, tile.w0, ((run.oh_end - run.h0 * ah.phases) * 8 + run.phase_h) * 4 + (run.oh_end == ah.out) * 2 + (run.h0 == 0));
}
__device__ __forceinline__ bool same_key(int4 a, int4 b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }

// A warpgroup: table() = (packed phases of H and W, kBlockN positions) places, where outputs are staged or in memory.
template <int kBlockN, typename F> __device__ __forceinline__ void fill_table(const Problem& p, const Tile& tile, const Run& run, F table, bool in_memory = false) {
    const StencilAxis& aw = p.s.axis[2];
    const int phases_hw = packed_phases(p.t, p.s, 1) * aw.phases;
    for (int i = threadIdx.x % 128; i < phases_hw * kBlockN; i += 128) {
        const int phase = i / kBlockN, phase_h = divide_by_phases(phase, aw.phases);
        const int q = run.q0 + i - phase * kBlockN, phase_w = phase - phase_h * aw.phases;
        table()[i] = in_memory ? place_in_memory(p, tile, run, q, phase_h, phase_w) : staged_place(p, tile, run, q, phase_h, phase_w);
    }
}

}  // namespace conv
'''

_SOURCES['conv_statistics.cuh'] = r'''
// Moments of what a convolution's epilogue has, and statistics of GroupNorm from them.
#pragma once

#include "conv_epilogue.cuh"
#include "group_norm.cuh"

namespace conv {

using group_norm::MomentSets;

constexpr int kStatisticsThreads = 512, kStatisticsBlocks = 16;    // of a group, at most

// The moments of a lane's share of a row. They are of deviations from one of the row's values, whose own squared deviation is part of
// the result, which bounds the cancellation.
struct Moments {
    float shift = 0, sum = 0, squares = 0;
    int count = 0;    // whoever adds counts
    __device__ __forceinline__ void add(float value) {
        const float deviation = value - shift;
        sum += deviation, squares = fmaf(deviation, deviation, squares);
    }
    // Mean and sum of squared deviations of a row that a quad has, and how many values they are of.
    __device__ __forceinline__ float2 of_quad(float& total) const {
        total = quad_sum(float(count));
        const float all = quad_sum(sum), mean = total > 0 ? all / total : 0.0f, deviations = quad_sum(squares) - all * mean;
        return make_float2(shift + mean, deviations < 0 ? 0 : deviations);    // NaN stays
    }
};

// Blocks of a group: each has some 8 thousand moments or more.
inline int statistics_blocks(const MomentSets& sets, const group_norm::Shape& shape) {
    const int64_t blocks = int64_t(sets.parts) * shape.group_channels() / 8192;
    return int(blocks < 1 ? 1 : blocks > kStatisticsBlocks ? kStatisticsBlocks : blocks);
}

// A thread's share of a group's sums, of values and of their squares: the moments of a channel in some of its parts. They are shared out to `blocks` blocks of kThreads
// threads each. Sums of squares in float64 lose nothing that float32 had.
template <int kThreads>
__device__ __forceinline__ group_norm::Pair sum_moments(const MomentSets& sets, const group_norm::Shape& shape, int index, int thread, int block, int blocks) {
    const int group = index % int(shape.num_groups), n = index / int(shape.num_groups), group_channels = int(shape.C) / int(shape.num_groups);
    const int parts = sets.parts, channels = sets.channels;
    const float* counts = sets.counts + int64_t(n) * parts;
    const float2* moments = sets.moments + int64_t(n) * parts * channels + group * group_channels;
    const int columns = min(group_channels, kThreads), rows = kThreads / columns, row = thread / columns;
    group_norm::Pair sums = {0, 0};
    constexpr int kAtOnce = 10;    // that are under way
    for (int c = thread % columns; c < group_channels && row < rows; c += columns) {
        for (int first = block * rows + row; first < parts; first += kAtOnce * blocks * rows) {
            float count[kAtOnce];
            float2 m[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int part = min(first + i * blocks * rows, parts - 1);
                count[i] = counts[part], m[i] = moments[int64_t(part) * channels + c];
                if (first + i * blocks * rows >= parts) count[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const double own = count[i], mean = count[i] > 0 ? m[i].x : 0, square = count[i] > 0 ? m[i].y : 0;    // else there are no moments
                sums.a += own * mean;
                sums.b += square + own * mean * mean;
            }
        }
    }
    return sums;
}

__device__ __forceinline__ void leave_statistics(const group_norm::Shape& shape, double eps, group_norm::Pair sums, int index, double* mean, double* rstd) {
    const group_norm::Statistics statistics(sums, double(shape.group_count()), eps);
    mean[index] = statistics.mean, rstd[index] = statistics.rstd;
}

// mean, rstd (N, num_groups): some blocks for each. Sums are added in a fixed order, those of the blocks by the last one that is done.
__global__ void __launch_bounds__(kStatisticsThreads, 2)
statistics_kernel(MomentSets sets, group_norm::Shape shape, int blocks, double eps, double* mean, double* rstd) {
    wait_for_previous_kernel();
    const int index = blockIdx.x / blocks, block = blockIdx.x % blocks;
    group_norm::Pair sums = group_norm::block_sum<kStatisticsThreads>(sum_moments<kStatisticsThreads>(sets, shape, index, threadIdx.x, block, blocks));
    if (threadIdx.x != 0) return;
    volatile group_norm::Pair* all = sets.group_sums + int64_t(index) * kStatisticsBlocks;
    all[block].a = sums.a, all[block].b = sums.b;
    __threadfence();
    if (atomicAdd(sets.group_tickets + index, 1u) != blocks - 1) return;
    __threadfence();
    sums = {0, 0};
    for (int i = 0; i < blocks; i++) sums.a += all[i].a, sums.b += all[i].b;
    leave_statistics(shape, eps, sums, index, mean, rstd);
}

// statistics (2, N, num_groups): mean, rstd; y = the group norm of r, which may be y.
inline int normalize(const MomentSets& sets, const group_norm::Shape& shape, int r_dtype, int y_dtype, double eps, const void* gamma, const void* beta, const void* r, void* y, double* statistics, void* stream) {
    const int blocks = statistics_blocks(sets, shape);
    double* rstd = statistics + shape.N * shape.num_groups;
    RETURN_IF_ERROR(launch(statistics_kernel, shape.N * shape.num_groups * blocks, kStatisticsThreads, stream, sets, shape, blocks, eps, statistics, rstd));
    return group_norm::with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, r, statistics, rstd, gamma, beta, y);
    });
}

}  // namespace conv
'''

_SOURCES['conv_plan.cuh'] = r'''
// What a launcher of the tensor cores' convolutions needs: the plan of a shape, scratch memory, packed operands.
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "add_parts.cuh"
#include "conv_statistics.cuh"
#include "direct_generic.cuh"
#include "precision.h"

namespace conv {

// ----------------------------------------------------------------------------------------------------------- Plan

// What was found for a shape, a direction and a device, once. (To be held by static functions: an inline function's static variables would
// be shared with other builds of this file in the same process.)
template <typename T> class Memo {
public:
    template <typename F> const T& get(const Geometry& g, Direction direction, int device, F find) {
        std::lock_guard<std::mutex> lock(mutex_);
        const Key key = {g, int64_t(direction), device};
        const auto found = values_.find(key);
        return found != values_.end() ? found->second : values_[key] = find();
    }

private:
    struct Key {
        Geometry g;
        int64_t direction, device;
        bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) < 0; }
    };
    std::mutex mutex_;
    std::map<Key, T> values_;
};

// How the convolution of some shape is done.
struct Plan {
    Problem problem;
    Direction direction;
    int64_t source_channels;
    int third;                   // channels of a third of GEMM_K (precision.h), or 0
    bool repairs;                // some packed weights are zeros that stand for nothing, and must not meet an infinite input
    int multiprocessors;
};

// Path: the launches of an architecture (conv_launch_sm90.cuh, conv_launch_sm80.cuh).
template <typename Path> Plan make_plan(const Geometry& g, Direction direction, int device) {
    const bool forward = direction == Direction::kForward;
    Plan plan = {};
    plan.direction = direction;
    plan.multiprocessors = multiprocessors_of(device);
    plan.source_channels = forward ? g.C_in : g.C_out;
    plan.problem.N = g.N, plan.problem.C_out = forward ? g.C_out : g.C_in, plan.problem.out_volume = forward ? out_volume(g) : in_volume(g);
    if (has_stencil(g)) {
        plan.problem.s = make_stencil(plan.direction, g);
        plan.third = forward ? third_of(g) : 0;
        plan.repairs = g.groups > 1 || plan.third;
        for (const StencilAxis& a : plan.problem.s.axis)
            for (int phase = 0; phase < a.phases; phase++) plan.repairs |= a.phases > 1 && a.live[phase] != (1 << a.taps) - 1;
        const bool split = forward && splits_groups(g);
        if (!split || can_split(g))
            plan.problem.t = Path::choose_tiling(plan.problem.s, g.N, plan.third ? 3 * plan.third : plan.source_channels, plan.problem.C_out, split ? g.groups : 1, plan.multiprocessors, device);
        const StencilAxis& w = plan.problem.s.axis[2];
        plan.repairs |= plan.problem.t.block_n > 0 && w.source_phases > 1 && taps_w_of_phases(plan.problem.t, w) > w.kernel;    // joined with others
    }
    return plan;
}

template <typename Path> static const Plan& plan_of(const Geometry& g, Direction direction, int device) {
    static Memo<Plan> plans;
    return plans.get(g, direction, device, [&] { return make_plan<Path>(g, direction, device); });
}

// -------------------------------------------------------------------------------------------------- Scratch memory

// A kernel of its own: one behind a memset would not be brought to the multiprocessors before that ends.
__global__ void __launch_bounds__(256) zero_kernel(uint4* memory, int64_t count, uint4* other, int64_t other_count) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < count) memory[i] = make_uint4(0, 0, 0, 0);
    else if (i - count < other_count) other[i - count] = make_uint4(0, 0, 0, 0);
}

// Takes pieces of the memory from `base` on (null where only their sizes are wanted), those that start at zero first.
class Scratch {
public:
    explicit Scratch(void* base) : base_(static_cast<uint8_t*>(base)) {}
    template <typename T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base_ + bytes_);
        bytes_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
        return p;
    }
    template <typename T> T* take_zeroed(int64_t count) {
        T* p = take<T>(count);
        zeroed_ = bytes_;
        return p;
    }
    int64_t bytes() const { return bytes_; }
    // This one's and the other's.
    int zero(const Scratch& other, cudaStream_t stream) const {
        return launch(zero_kernel, ceil_div((zeroed_ + other.zeroed_) / 16, 256), 256, stream, reinterpret_cast<uint4*>(base_), zeroed_ / 16, reinterpret_cast<uint4*>(other.base_), other.zeroed_ / 16);
    }

private:
    uint8_t* base_;
    int64_t bytes_ = 0, zeroed_ = 0;
};

// Takes the memory of moments, behind all else that starts at zero.
inline MomentSets take_moment_sets(Scratch& scratch, int64_t N, int64_t C_out, int parts, int channels) {
    MomentSets sets = {};
    sets.parts = parts, sets.channels = channels;
    sets.counts = scratch.take_zeroed<float>(N * parts);
    sets.group_tickets = scratch.take_zeroed<unsigned>(N * C_out);    // as many groups as there can be
    sets.group_sums = scratch.take<group_norm::Pair>(N * C_out * kStatisticsBlocks);
    sets.moments = scratch.take<float2>(N * parts * channels);
    return sets;
}

inline Workspace take_workspace(Scratch& scratch, const Problem& p, bool fused) {
    Workspace w = {};
    w.tile_tickets = scratch.take_zeroed<unsigned>(p.t.queues);
    if (fused) {
        w.stored = scratch.take_zeroed<unsigned>(p.N), w.ready = scratch.take_zeroed<unsigned>(p.N);
        w.groups = scratch.take_zeroed<unsigned>(1), w.pieces = scratch.take_zeroed<unsigned>(1);
        w.sets = take_moment_sets(scratch, p.N, p.C_out, parts_of_sample(p), p.t.channels());
    }
    if (p.t.k_parts > 1) w.parts = scratch.take<float>(p.t.k_parts * p.N * p.C_out * p.out_volume);
    return w;
}

// These take the memory of the copies of an activation, maxima included unless there are some, and of a weight.
inline scaled_half::Activation take_activation(Scratch& scratch, const Stencil& s, int64_t N, int64_t channels, int split, int third, const void* x, scaled_half::SampleMax* max = nullptr) {
    scaled_half::Activation a = scaled_half::make_activation(s, N, channels, split ? 2 * channels : padded_channels(third ? 3 * third : channels), split, third);
    a.x = x, a.max = max ? max : scratch.take_zeroed<scaled_half::SampleMax>(N);
    a.copy = scratch.take<__half>(a.copied());
    return a;
}

inline scaled_half::Weight take_weight(Scratch& scratch, const Plan& plan, const Geometry& g, unsigned* max, const void* w) {
    const Problem& p = plan.problem;
    scaled_half::Weight weight = {p.s, p.t.rows, p.C_out, plan.source_channels, p.t.M_pad, p.t.phase_channels * p.t.products, p.t.split, plan.third, g.groups, g.C_out / g.groups, plan.direction == Direction::kForward, p.t.fragments, w, nullptr, max};
    weight.copy = scratch.take<__half>(weight.copied());
    return weight;
}

// ---------------------------------------------------------------------------------------------------- Convolution

// out = the convolution of packed operands, and its moments where there is room for them. bias may be null; apply_relu writes relu(out). norm: where it has blocks, its
// y too.
template <typename Path>
int convolve(const Plan& plan, const scaled_half::Activation& source, const scaled_half::Weight& weight, const Workspace& workspace, int dtype, const void* bias, bool apply_relu, void* out, const Normalization& norm, cudaStream_t stream) {
    const Problem& p = plan.problem;
    if (p.t.block_n == 0) return cudaErrorNotSupported;
    Parameters a = {p, dtype, apply_relu, bias, out, source.max, weight.max, workspace, norm};
    if (p.t.k_parts == 1) return Path::convolve(a, source, weight, plan.multiprocessors, stream);
    a.dtype = kFloat32, a.apply_relu = false, a.bias = nullptr, a.out = workspace.parts, a.workspace.sets.moments = nullptr;
    RETURN_IF_ERROR(Path::convolve(a, source, weight, plan.multiprocessors, stream));
    return parts::add({workspace.parts, p.t.k_parts, p.N, int(p.C_out), int(p.out_volume)}, dtype, bias, apply_relu, out, workspace.sets, stream);
}

// --------------------------------------------------------------------------------------------------------- Repair

// Computes the samples with non-finite inputs once more, without the zeros that the tensor cores multiply them by.
template <Direction kDirection>
int repair(const Plan& plan, const Geometry& g, int dtype, const scaled_half::SampleMax* max, const void* source, const void* w, const void* bias, bool apply_relu, void* out, void* stream) {
    if (!plan.repairs) return cudaSuccess;
    return direct_generic::direct<kDirection>(g, dtype, stream, {&max->non_finite, int(sizeof(*max) / sizeof(unsigned))}, source, w, bias, apply_relu, out);
}

}  // namespace conv
'''

_SOURCES['sweep_direct.cuh'] = r'''
// What kernels that sweep down their planes do where a value is not finite: all outputs of the block once more, product by product, so that no zero that stands for nothing meets it.
#pragma once

#include "launch.cuh"
#include "stencil.h"

namespace sweep_direct {

// The outputs of a block: of `channels` channels, rows [row0, row1) of the planes of position d.
struct Part {
    const float *x, *w, *bias;         // of the group's input channels; of the first output channel; or null
    float* out;                        // of the first output channel
    int group_in, group_out, channels, d, row0, row1;
};

// A function by itself, so that nothing that it needs is kept in registers until then.
__device__ __noinline__ void compute(const Stencil& s, const Part& part, bool apply_relu) {
    const StencilAxis &ad = s.axis[0], &ah = s.axis[1], &aw = s.axis[2];
    const int rows = part.row1 - part.row0, volume = ad.sources * ah.sources * aw.sources, outputs = ad.phases * part.channels * rows * aw.out;
    __syncthreads();
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
        const int column = i % aw.out, row = part.row0 + i / aw.out % rows, stream = i / aw.out / rows, channel = stream % part.channels, pd = stream / part.channels, plane = part.d * ad.phases + pd - ad.crop;
        if (unsigned(plane) >= unsigned(ad.out)) continue;
        const int uh = row + ah.crop, uw = column + aw.crop;
        float sum = 0;
        for (int ci = 0; ci < part.group_in; ci++)
            for (int td = 0; td < ad.taps; td++) for (int th = 0; th < ah.taps; th++) for (int tw = 0; tw < aw.taps; tw++) {
                const int kd = ad.kernel_of[td][pd], kh = ah.kernel_of[th][uh % ah.phases], kw = aw.kernel_of[tw][uw % aw.phases];
                const int sd = ad.first + part.d - ad.shift[td], sh = ah.first + uh / ah.phases - ah.shift[th], sw = aw.first + uw / aw.phases - aw.shift[tw];
                if (min(kd, min(kh, kw)) < 0 || unsigned(sd) >= unsigned(ad.sources) || unsigned(sh) >= unsigned(ah.sources) || unsigned(sw) >= unsigned(aw.sources)) continue;
                const int64_t kernel = (int64_t(ci) * part.group_out + channel) * kernel_volume(s);
                sum = fmaf(part.x[ci * int64_t(volume) + (sd * ah.sources + sh) * aw.sources + sw], part.w[kernel + (kd * ah.kernel + kh) * aw.kernel + kw], sum);
            }
        if (part.bias) sum += part.bias[channel];
        part.out[((int64_t(channel) * ad.out + plane) * ah.out + row) * aw.out + column] = apply_relu ? relu(sum) : sum;
    }
}

}  // namespace sweep_direct
'''

_SOURCES['sweep_tiles.h'] = r'''
// How a strided forward of split operands is cut for blocks that sweep down their planes (sweep.cuh).
#pragma once

#include <initializer_list>

#include "stencil.h"

namespace sweep {

constexpr int kWarps = 4, kRoleThreads = 32 * kWarps;    // of each role: those that bring and store, those that multiply
constexpr int kThreads = 2 * kRoleThreads, kBlocks = 2;  // of a multiprocessor
constexpr int kChannels = 8;          // output channels of a block
constexpr int kOctets = 4;            // times 8 positions of a row: what a warp has of a step
constexpr int kMaxOcts = 3;           // times 8 input channels of a group
constexpr int kMaxUnits = 16;         // of GEMM_K at a tap (d, h)
constexpr int kMaxSlots = 32;
constexpr int kLine = 32;             // floats of a line of memory: only whole ones are stored, but for the ends of a sweep
constexpr int kHeadBytes = 2048;

constexpr int kWeightBytes = 2 * 2 * kChannels * 16;    // of a unit of GEMM_K and a tap: (high or low, phase w, channel), 8 channels each

// Which taps of an axis have weights in a phase, as the compiler knows it: bit phase * 2 + tap. Of kernels 2, 3 (where phases begin in two ways) and 4 with stride 2, and of 1 with stride 1.
constexpr int kKernel2 = 0b0101, kKernel3 = 0b0111, kKernel3Later = 0b1110, kKernel4 = 0b1111, kKernel1 = 0b10001;
HOST_DEVICE constexpr int live_of(int pattern, int phase) { return pattern >> 2 * phase & 3; }
HOST_DEVICE constexpr int taps_of(int pattern) { return (pattern & 0b1010) != 0 ? 2 : 1; }
HOST_DEVICE constexpr int phases_of(int pattern) { return pattern == kKernel1 ? 1 : 2; }
HOST_DEVICE constexpr int weights_of(int pattern) { return (pattern & 1) + (pattern >> 1 & 1) + (pattern >> 2 & 1) + (pattern >> 3 & 1); }

// 0: another one.
inline int pattern_of(const StencilAxis& a) {
    const int pattern = a.phases == 1 ? (kKernel1 & -16) | a.live[0] : a.live[0] | a.live[1] << 2;
    if (a.phases > 2 || a.taps > 2 || a.taps != taps_of(pattern)) return 0;
    for (int known : {kKernel1, kKernel2, kKernel3, kKernel3Later, kKernel4})
        if (pattern == known) return pattern;
    return 0;
}

// A block has one plane of positions, some of its rows from the first to the last, and 8 output channels of a group. It brings each row of the source
// once for each tap d, in batches of as many rows as a step has rows of positions, a thread for each of their columns, and keeps those that later steps need.
struct Plan {
    Stencil s;
    int N, groups, group_out;
    int octs;                         // input channels of a group / 8
    int units;                        // of GEMM_K at a tap (d, h): (tap w, 8 channels), and zeros if these are odd
    int octets;                       // times 8 positions: a row, of whole warps
    int rows, lead;                   // of a step and a batch; batches that a step reads beside its own
    int pitch;                        // columns of a row in shared memory: column c is column c + first_column of the source
    int first_column, column0, columns;    // those from column0 on are there
    int row_units;                    // of 16 bytes, of a row in shared memory: (tap d, high or low, 8 channels, column)
    int weight_bytes;                 // (tap h, two units of GEMM_K, tap d, phases (d, h) that have weights; high or low, unit, phase w, channel), 8 channels of the unit each
    int stages, stage_stride;         // a step's outputs: 2, if two blocks fit then; floats of a stream
    int segment_rows, segments;
    HOST_DEVICE int group_in() const { return octs * 8; }
    HOST_DEVICE int batches() const { return lead + 2; }    // that are kept: a step's and the next one's
    HOST_DEVICE int slots() const { return batches() * rows; }
    HOST_DEVICE int stage_floats() const { return kChannels * s.axis[0].phases * stage_stride; }    // of a step
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + weight_bytes + slots() * row_units * 16 + stages * stage_floats() * 4; }
    int64_t blocks() const { return int64_t(N) * groups * (group_out / kChannels) * s.axis[0].positions * segments; }
};

// Which columns of a row in shared memory are there: of a plan that has its pitch.
template <typename P> void locate_columns(P& p) {
    const StencilAxis& w = p.s.axis[2];
    p.first_column = w.first - w.shift[w.taps - 1];
    p.column0 = p.first_column < 0 ? -p.first_column : 0;
    const int end = w.sources - p.first_column;
    p.columns = (end < p.pitch ? end : p.pitch) - p.column0;
    if (p.columns < 0) p.columns = 0;
}

// The plan with as many segments as fill the blocks that can be resident, a block's start being as long as three steps of so many rows.
template <typename P> P cut_in_segments(const P& whole, int step_rows, int64_t resident) {
    const int positions = whole.s.axis[1].positions;
    P best = whole;
    double best_time = 0;
    for (int segments = 1; segments <= positions; segments++) {
        const int rows = int(ceil_div(ceil_div(positions, segments), step_rows)) * step_rows;
        P cut = whole;
        cut.segment_rows = rows, cut.segments = int(ceil_div(positions, rows));
        if (segments > 1 && cut.blocks() > 8 * resident) break;
        const double time = double(ceil_div(cut.blocks(), resident)) * (rows / step_rows + 3);
        if (best.segments == 0 || time < best_time) best_time = time, best = cut;
    }
    return best;
}

// A plan, or one without segments where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {};
    if (!has_stencil(g)) return p;
    p.s = make_stencil(Direction::kForward, g);
    const StencilAxis &d = p.s.axis[0], &h = p.s.axis[1], &w = p.s.axis[2];
    const int64_t group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
    if (group_in % 8 != 0 || group_in > 8 * kMaxOcts || group_out % kChannels != 0 || w.phases != 2) return p;
    const int pattern_h = pattern_of(h), pattern_d = pattern_of(d);
    if (pattern_h == 0 || h.phases != 2 || (pattern_d != pattern_h && pattern_d != kKernel1)) return p;
    if (group_in * in_volume(g) >= int64_t(1) << 31 || g.N >= 1 << 30 || g.C_out >= 1 << 30) return p;
    p.N = int(g.N), p.groups = int(g.groups), p.group_out = int(group_out);
    p.octs = int(group_in / 8);
    p.units = (w.taps * p.octs + 1) / 2 * 2;
    p.octets = int(ceil_div(w.positions, 8 * kOctets)) * kOctets;
    const int per_step = kWarps * kOctets, span = h.shift[h.taps - 1] - h.shift[0];
    p.pitch = p.octets * 8 + w.shift[w.taps - 1] - w.shift[0];
    locate_columns(p);
    p.rows = p.octets < per_step ? per_step / p.octets : 1;
    if (p.rows > h.positions) p.rows = h.positions;
    while (p.rows > 1 && p.rows * p.columns > kRoleThreads) p.rows--;
    p.lead = int(ceil_div(span, p.rows));
    p.row_units = d.taps * 2 * p.octs * p.pitch, p.weight_bytes = weights_of(pattern_d) * weights_of(pattern_h) * p.units * kWeightBytes;
    p.stage_stride = (p.rows * h.phases * w.out + 2 * kLine + kLine - 1) / kLine * kLine;
    if (p.octets > per_step || p.units > kMaxUnits || p.slots() > kMaxSlots || p.rows * p.columns > kRoleThreads) return p;
    p.stages = 2;
    if (blocks_that_fit(p.shared_bytes(), most_shared) < kBlocks) p.stages = 1;
    const int64_t fitting = blocks_that_fit(p.shared_bytes(), most_shared), resident = multiprocessors * (fitting < kBlocks ? fitting : kBlocks);
    if (fitting < 1) return p;
    return cut_in_segments(p, p.rows, resident);
}

}  // namespace sweep
'''

_SOURCES['sweep.cuh'] = r'''
// Strided transposed convolution of groups of few channels, as accurate as float32, straight from the tensors.
//
//   out[n, co, o] = bias[co] + sum over ci of the group, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// There is little to multiply and much to write, so memory is the limit: x is read as it lies, and outputs leave as whole lines. A block sweeps down the rows of one
// plane of positions (stencil.h). It keeps the rows of x that it still needs in shared memory, as fp16 high and low halves scaled by a power of two for each
// row, (x * 2^shift = high + low with 22 bits); products are high * high, high * low and low * high. GEMM_M is (phase of W, 8 output channels), GEMM_N positions of a row,
// GEMM_K (tap w, channel); each phase of (D, H) has sums of its own. Four warps multiply a step and stage its outputs; meanwhile four others store the step before and bring
// the rows that the next one needs. There are two stages, by the step's parity; one, free when the outputs of the step before have left it, where two leave room for one block only. A channel's outputs on a plane are neighbours in memory from row to row: they are staged in
// the order of memory, and what does not fill a line waits for the next row.
// Where x or w is not finite, zeros of GEMM_M must not meet it: such a block computes its outputs once more, product by product.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "ptx_sm90.cuh"
#include "scaled_half.cuh"
#include "sweep_direct.cuh"
#include "sweep_tiles.h"

namespace sweep {

// Outputs are staged as they are aligned in memory, modulo so many floats: as vectors, or as sectors of memory, without which bulk copies take 1.65 times as long (NOTES.md).
#ifdef HAS_SM90A
constexpr int kAlignment = 8;
#else
constexpr int kAlignment = 4;
#endif
constexpr int kMultiplyRegisters = 144, kBringRegisters = 112;    // of a thread, where roles can have different numbers: 128 on average
constexpr int kMostShiftAdded = 80;    // to the row's before: sums are scaled from one row's scale to the next one's, and must not overflow

// A step's outputs of a stream, its channel's on an output plane, which are neighbours in memory. They are staged as they are aligned there.
struct alignas(16) Stage {
    float* to;                         // the line of memory that they begin in
    int from;                          // where that line is staged
    int begin, end;                    // what is stored: floats of that line and those behind it; whole lines, but for the ends of a sweep
    int first, next;                   // where this step's outputs begin, and the next one's
};

// A step's first output row and the next one's; whether it stores parts of vectors.
struct alignas(16) Rows { int begin, end, has_ends; };

// A warp's positions of a step: 8 * kOctets of one of its rows, from an octet on.
struct alignas(8) Positions { int row, octet; };

struct SharedHead {
    alignas(16) unsigned row_max[2][kWarps];    // bits of the largest magnitudes of a batch of rows that its warps have, by its parity
    Rows rows[2];                      // by the step's parity
    int not_finite;
    int q0, q1, steps;                 // rows of positions
    int weight_shift[kChannels];
    float bias[kChannels];
    Positions positions[kWarps];
    int row_shift[kMaxSlots];          // 2^shift is the scale of the row in a slot
    int unit_offset[kMaxUnits];        // of the high half: from a position's column of the row's first unit on
    int64_t origin[2 * kChannels];     // of streams: their plane, in floats from address 0 on; or -1: there is none
    Stage stages[2][2 * kChannels];    // of streams, by the step's parity
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the weights begin behind the head");

// 8 values as high and low halves, at `high` and `low`. Values that are not finite are another code's business.
__device__ __forceinline__ void split(const float (&v)[8], float scale, uint4* high, uint4* low) {
    alignas(16) __half2 h[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const scaled_half::SplitPair pair = scaled_half::split(v[2 * i] * scale, v[2 * i + 1] * scale);
        h[i] = pair.high, l[i] = pair.low;
    }
    *high = *reinterpret_cast<const uint4*>(h), *low = *reinterpret_cast<const uint4*>(l);
}

// What a block has. kOcts: times 8 input channels; known to the compiler, as loads behind a branch are waited for at once. kPatternD, kPatternH: which taps have weights.
template <int kOcts, int kPatternD, int kPatternH> struct Block {
    static constexpr int kPhasesD = phases_of(kPatternD), kPhasesH = 2, kPhasesW = 2, kTapsD = taps_of(kPatternD), kTapsH = taps_of(kPatternH), kStreams = kChannels * kPhasesD;
    using Sums = float[kPhasesD][kPhasesH][kOctets][4];
    static HOST_DEVICE constexpr bool has_weights(int td, int th, int pd, int ph) { return (live_of(kPatternD, pd) >> td & live_of(kPatternH, ph) >> th & 1) != 0; }

    const Plan& p;
    const float *x, *w;                // of the group
    int n, group, channel0, d, segment;    // channel of the layer; plane of positions
    int own = 0;                       // where the batch is kept that a step has the number of
    int thread, lane, warp;            // of the role
    // Of those that bring rows: the thread's column of a batch, of as many planes as there are taps d; its row of the batch, if any.
    float v[kTapsD][kOcts][8];
    int own_row, own_column;

    static __device__ __forceinline__ uint8_t* shared() {
        extern __shared__ __align__(128) uint8_t base[];
        return base;
    }
    static __device__ __forceinline__ SharedHead& head() { return *reinterpret_cast<SharedHead*>(shared()); }
    static __device__ __forceinline__ uint4* weights() { return reinterpret_cast<uint4*>(shared() + kHeadBytes); }
    __device__ __forceinline__ uint4* slots() const { return reinterpret_cast<uint4*>(shared() + kHeadBytes + p.weight_bytes); }
    __device__ __forceinline__ float* stage(int step) const { return reinterpret_cast<float*>(slots() + p.slots() * p.row_units) + (step & (p.stages - 1)) * p.stage_floats(); }    // (stream, stage_stride)
    enum Barrier { kMultiply = 1, kBring, kStageFree };
    static __device__ __forceinline__ void sync_role(Barrier role) { named_barrier(role, kRoleThreads); }

    __device__ __forceinline__ Block(const Plan& p, const float* x_all, const float* w_all) : p(p), thread(threadIdx.x % kRoleThreads), lane(threadIdx.x % 32), warp(threadIdx.x / 32 % kWarps) {
        int i = blockIdx.x;
        d = take_digit(i, p.s.axis[0].positions), segment = take_digit(i, p.segments);
        const int channel_tile = take_digit(i, p.group_out / kChannels);
        group = take_digit(i, p.groups), n = i;
        channel0 = group * p.group_out + channel_tile * kChannels;
        x = x_all + (int64_t(n) * p.groups + group) * p.group_in() * volume(), w = w_all + (int64_t(group) * p.group_in() * p.group_out + channel_tile * kChannels) * kernel_volume(p.s);
    }
    __device__ __forceinline__ int64_t volume() const { return int64_t(p.s.axis[0].sources) * p.s.axis[1].sources * p.s.axis[2].sources; }

    // ------------------------------------------------------------------------------------------------ Weights

    __device__ __forceinline__ const float* kernel(int ci, int channel) const { return w + (int64_t(ci) * p.group_out + channel) * kernel_volume(p.s); }

    // Each channel's scale and bias, and all its weights, split; zeros where a phase has none at a tap.
    __device__ __forceinline__ void prepare_weights(const float* bias) {
        const int elements = kernel_volume(p.s), lanes = kRoleThreads / kChannels, channel = thread / lanes;
        unsigned most = 0;
        for (int i = thread % lanes; i < p.group_in() * elements; i += lanes) most = umax(most, scaled_half::magnitude(kernel(i / elements, channel)[i % elements]));
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2) most = umax(most, __shfl_xor_sync(~0u, most, distance));
        if (thread % lanes == 0) head().weight_shift[channel] = scaled_half::shift_of(most), head().bias[channel] = bias ? bias[channel0 + channel] : 0.0f;
        if (most >= scaled_half::kInfinity) head().not_finite = 1;
        sync_role(kMultiply);
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        int done = 0;
        for (int th = kTapsH - 1; th >= 0; th--) for (int unit = 0; unit < p.units; unit += 2) for (int td = 0; td < kTapsD; td++) for (int pd = 0; pd < kPhasesD; pd++) for (int ph = 0; ph < kPhasesH; ph++) {
            if (!has_weights(td, th, pd, ph)) continue;
            if (done % kWarps == warp) {
                const int own = lane % kChannels, mine = unit + lane / (kPhasesW * kChannels), tw = mine / kOcts, kw = tw < aw.taps ? aw.kernel_of[tw][lane / kChannels % kPhasesW] : -1;
                const int at = (ad.kernel_of[td][pd] * ah.kernel + ah.kernel_of[th][ph]) * aw.kernel + kw;
                float values[8];
#pragma unroll
                for (int c = 0; c < 8; c++) values[c] = kw >= 0 ? kernel(mine % kOcts * 8 + c, own)[at] : 0.0f;
                uint4* const to = weights() + done * 2 * 32 + lane;
                split(values, scaled_half::power_of_two(head().weight_shift[own]), to, to + 32);
            }
            done++;
        }
    }
    static_assert(2 * kPhasesW * kChannels == 32, "a lane has the row of a matrix");

    // ------------------------------------------------------------------------------------------- Rows of the source

    __device__ __forceinline__ void locate_column() {
        const int columns = max(p.columns, 1), row = thread / columns;
        own_row = thread < p.rows * p.columns ? row : kMaxSlots, own_column = p.column0 + thread - row * columns;
    }

    // f(8 values, tap d, 8 channels) of all that the thread brings.
    template <typename F> __device__ __forceinline__ void for_each_item(F f) {
#pragma unroll
        for (int td = 0; td < kTapsD; td++)
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++) f(v[td][oct], td, oct);
    }

    // Begins to bring a batch. Rows of the source are counted from the first one that the first step reads.
    __device__ __forceinline__ void load(int batch) {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int first = ah.first + head().q0 - ah.shift[ah.taps - 1] + batch * p.rows, channel_step = int(volume());
        const bool inside = own_row < p.rows && unsigned(first + own_row) < unsigned(ah.sources) && batch < head().steps + p.lead;    // no step needs later ones
        for_each_item([&](float (&values)[8], int td, int oct) {
            const int plane = ad.first + d - ad.shift[td];
            const bool exists = inside && unsigned(plane) < unsigned(ad.sources);
            const float* from = x + (exists ? oct * 8 * channel_step + (plane * ah.sources + first + own_row) * aw.sources + p.first_column + own_column : 0);
#pragma unroll
            for (int c = 0; c < 8; c++, from += channel_step) values[c] = exists ? *from : 0.0f;
        });
    }

    // Waits for what has been brought.
    __device__ __forceinline__ void find_max(int batch) {
        unsigned most = 0;
        for_each_item([&](const float (&values)[8], int, int) {
#pragma unroll
            for (float value : values) most = umax(most, scaled_half::magnitude(value));
        });
        most = __reduce_max_sync(~0u, most);
        if (lane == 0) head().row_max[batch % 2][warp] = most;
    }

    __device__ __forceinline__ void split_rows(int batch, int slot) {
        unsigned most = 0;
#pragma unroll
        for (unsigned its : head().row_max[batch % 2]) most = umax(most, its);
        const int before = head().row_shift[(slot == 0 ? p.slots() : slot) - 1];
        const int shift = most >= scaled_half::kInfinity ? before : min(most == 0 ? scaled_half::kMaxShift : scaled_half::shift_of(most), before + kMostShiftAdded);
        if (thread < p.rows) head().row_shift[slot + thread] = shift;
        if (most >= scaled_half::kInfinity) head().not_finite = 1;
        const float scale = scaled_half::power_of_two(shift);
        uint4* const to = slots() + (slot + own_row) * p.row_units + own_column;
        if (own_row < p.rows)
            for_each_item([&](const float (&values)[8], int td, int oct) {
                uint4* const high = to + (td * 2 * kOcts + oct) * p.pitch;
                split(values, scale, high, high + kOcts * p.pitch);
            });
    }

    // ------------------------------------------------------------------------------------------------- Outputs

    // The first output row of a step.
    __device__ __forceinline__ int first_row(int step) const {
        const StencilAxis& ah = p.s.axis[1];
        return min(max(min(head().q0 + step * p.rows, head().q1) * kPhasesH - ah.crop, 0), ah.out);
    }
    __device__ __forceinline__ int64_t address(int stream, int row) const { return head().origin[stream] + int64_t(row) * p.s.axis[2].out; }    // in floats

    // The last warp, a lane for each stream or two. Eight channels differ in the bank where their rows are not aligned alike.
    __device__ __forceinline__ void locate_stages(int step) const {
        if (warp != kWarps - 1) return;
        const int stream = lane % kStreams, first = first_row(step), next = first_row(step + 1);
        const int64_t at = address(stream, first), line = at & -kLine, next_at = address(stream, next);
        const bool exists = head().origin[stream] >= 0;
        const int begin = exists ? int(max(address(stream, first_row(0)) - line, int64_t(0))) : 0, end = exists ? int((step == head().steps - 1 ? next_at : next_at & -kLine) - line) : 0;
        Stage& s = head().stages[step % 2][stream];
        s.to = reinterpret_cast<float*>(uintptr_t(line) * sizeof(float)), s.begin = begin, s.end = end, s.first = int(at - line), s.next = int(next_at - line);
        s.from = stream * p.stage_stride + ((stream % kChannels / 4 * 16 - int(at & (kLine - kAlignment))) & (kLine - 1));
        const bool has_ends = __any_sync(~0u, begin % 4 != 0 || end % 4 != 0);
        if (lane == 0) head().rows[step % 2] = {first, next, has_ends};
    }

    // Stores whole vectors, all of a step's but at the ends of a sweep: by the copy engine, where there is one.
    __device__ __forceinline__ void store(int step) const {
        const Stage* const stages = head().stages[step % 2];
#ifdef HAS_SM90A
        if (lane < kStreams / kWarps) {
            const Stage& s = stages[warp * (kStreams / kWarps) + lane];
            const int begin = (s.begin + 3) & -4, end = s.end & -4;
            fence_proxy_async();    // of what was carried here
            if (begin < end) bulk_store(s.to + begin, stage(step) + s.from + begin, (end - begin) * 4);
            bulk_commit_group();
        }
#else
        for (int i = thread * 4; i < p.stage_stride; i += kRoleThreads * 4) {
#pragma unroll 4
            for (int stream = 0; stream < kStreams; stream++) {
                const Stage& s = stages[stream];
                if (i >= s.begin && i + 4 <= s.end) *reinterpret_cast<float4*>(s.to + i) = *reinterpret_cast<const float4*>(stage(step) + s.from + i);
            }
        }
#endif
        if (!head().rows[step % 2].has_ends) return;
        for (int i = thread; i < kStreams * 8; i += kRoleThreads) {    // what is in front of them, and behind
            const Stage& s = stages[i / 8];
            const int k = (i % 8 < 4 ? s.begin & -4 : max((s.begin + 3) & -4, s.end & -4)) + i % 4;
            if (k >= s.begin && k < s.end && (i % 8 >= 4 || s.begin % 4 != 0)) s.to[k] = stage(step)[s.from + k];
        }
    }
    // Waits until what store() reads may be written again.
    __device__ __forceinline__ void wait_for_store() const {
#ifdef HAS_SM90A
        if (lane < kStreams / kWarps) bulk_wait_group_read<0>();
#endif
    }

    // What does not fill a line goes to the next step: 8 threads have a stream's, and read it before a stage of both steps is written.
    static_assert(kStreams * kLine <= kRoleThreads * 4, "one vector a thread");
    static __device__ __forceinline__ int carried_of(int thread) { return thread % (kLine / 4) * 4; }    // float of the line
    __device__ __forceinline__ float4 read_carried(int step) const {
        if (thread >= kStreams * kLine / 4) return {};
        const Stage& s = head().stages[step % 2][thread / (kLine / 4)];
        if (carried_of(thread) >= (s.next & (kLine - 1))) return {};
        return *reinterpret_cast<const float4*>(stage(step) + s.from + (s.next & -kLine) + carried_of(thread));
    }
    __device__ __forceinline__ void write_carried(int step, const float4& values) const {
        if (thread >= kStreams * kLine / 4) return;
        const int first = carried_of(thread);
        const Stage& next = head().stages[(step + 1) % 2][thread / (kLine / 4)];
        const float each[4] = {values.x, values.y, values.z, values.w};
        float* const to = stage(step + 1) + next.from + first;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k < next.first) to[k] = each[k];
    }

    // ------------------------------------------------------------------------------------------------ Products

    template <typename F> static __device__ __forceinline__ void for_each_sum(Sums& sums, F f) {
#pragma unroll
        for (auto& of_phase : sums)
#pragma unroll
            for (auto& of_phases : of_phase)
#pragma unroll
                for (auto& of_octet : of_phases)
#pragma unroll
                    for (float& sum : of_octet) f(sum);
    }

    // The sums of the warp's positions: returns the shift of what they are sums of. Rows come in their order, from the first on.
    __device__ __forceinline__ int multiply(Sums& sums) const {
        const StencilAxis& ah = p.s.axis[1];
        const Positions at = head().positions[warp];
        const int operand = (at.octet * 8 + lane / 16 * kOcts * p.pitch + lane % 8) * 16;    // what the lane reads for the tensor cores, in bytes from a row on
        const int plane = 2 * kOcts * p.pitch * 16;    // of a tap d, in bytes
        uint32_t weight = shared_address(weights()) + lane * 16;
        int before = 0;
#pragma unroll
        for (int th = kTapsH - 1; th >= 0; th--) {
            int slot = own * p.rows + at.row + ah.shift[kTapsH - 1] - ah.shift[th];
            if (slot >= p.slots()) slot -= p.slots();
            const int shift = head().row_shift[slot];
            if (th < kTapsH - 1 && shift != before) {
                const float factor = scaled_half::power_of_two(max(shift - before, -126));
                for_each_sum(sums, [&](float& sum) { sum *= factor; });
            }
            before = shift;
            const uint32_t from = shared_address(slots()) + slot * p.row_units * 16 + operand;
#pragma unroll 1
            for (int unit = 0; unit < p.units; unit += 2) {
                const uint32_t source = from + head().unit_offset[unit + lane / 8 % 2] * 16;
#pragma unroll
                for (int td = 0; td < kTapsD; td++) {
                    uint32_t b[kOctets][4];    // high halves of two units of the source, their low ones
#pragma unroll
                    for (int u = 0; u < kOctets; u++) ldmatrix_x4(b[u], source + td * plane + u * 128);
#pragma unroll
                    for (int pd = 0; pd < kPhasesD; pd++)
#pragma unroll
                        for (int ph = 0; ph < kPhasesH; ph++) {
                            if (!has_weights(td, th, pd, ph)) continue;
                            uint32_t high[4], low[4];
                            ldmatrix_x4(high, weight), ldmatrix_x4(low, weight + 512);
                            weight += 1024;
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], high, b[u][2], b[u][3]);
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], high, b[u][0], b[u][1]);
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], low, b[u][0], b[u][1]);
                        }
                }
            }
        }
        return before;
    }

    // Stages the warp's outputs: a lane has a channel's, two positions of 8, which are four neighbours.
    __device__ __forceinline__ void stage_outputs(int step, Sums& sums, int shift, bool apply_relu) const {
        const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
        const Positions at = head().positions[warp];
        const int output_row = (head().q0 + step * p.rows + at.row) * kPhasesH - ah.crop, column = (at.octet * 8 + lane % 4 * 2) * kPhasesW - aw.crop;
        const Rows rows = head().rows[step % 2];
        const scaled_half::ScaleInParts back = scaled_half::scale_in_parts(-shift - head().weight_shift[lane / 4]);
        const float added = head().bias[lane / 4];
        if (__any_sync(~0u, back.more != 1)) for_each_sum(sums, [&](float& sum) { sum *= back.more; });
        for_each_sum(sums, [&](float& sum) { sum = fmaf(sum, back.scale, added); });
        if (apply_relu) for_each_sum(sums, [&](float& sum) { sum = max_nan(sum, 0.0f); });
        uint32_t to[kPhasesD][kPhasesH];
        bool exists[kPhasesH];
#pragma unroll
        for (int ph = 0; ph < kPhasesH; ph++) {
            exists[ph] = output_row + ph >= rows.begin && output_row + ph < rows.end;
#pragma unroll
            for (int pd = 0; pd < kPhasesD; pd++) {
                const Stage& s = head().stages[step % 2][pd * kChannels + lane / 4];
                to[pd][ph] = shared_address(stage(step) + s.from + s.first + (output_row + ph - rows.begin) * aw.out + column);
            }
        }
        const auto stage_columns = [&](auto whole) {
#pragma unroll
            for (int u = 0; u < kOctets; u++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (decltype(whole)::value || unsigned(column + u * 16 + k) < unsigned(aw.out))
#pragma unroll
                        for (int ph = 0; ph < kPhasesH; ph++)
                            if (exists[ph])
#pragma unroll
                                for (int pd = 0; pd < kPhasesD; pd++) shared_store(to[pd][ph] + (u * 16 + k) * 4, sums[pd][ph][u][k % 2 * 2 + k / 2]);
        };
        if (__all_sync(~0u, column >= 0 && column + kOctets * 16 - 12 <= aw.out)) stage_columns(std::true_type());
        else stage_columns(std::false_type());
    }

    // --------------------------------------------------------------------------------------------------- Sweep

    __device__ __forceinline__ void run_multiplying(const float* bias, bool apply_relu) {
        prepare_weights(bias);
        __syncthreads();
        for (int step = 0; step < head().steps; step++) {
            const auto wait_for_stage = [&] { if (p.stages == 1) named_barrier(kStageFree, kThreads); };
            if (head().positions[warp].row < p.rows) {
                Sums sums = {};
                const int shift = multiply(sums);
                wait_for_stage();
                stage_outputs(step, sums, shift, apply_relu);
            } else {
                wait_for_stage();
            }
            own = own + 1 == p.batches() ? 0 : own + 1;
#ifdef HAS_SM90A
            fence_proxy_async();    // of what is staged, for the copy engine
#endif
            __syncthreads();
        }
    }

    __device__ __forceinline__ void run_bringing() {
        locate_column();
        load(0);
        for (int batch = 0; batch <= p.lead; batch++) {
            find_max(batch);
            sync_role(kBring);
            split_rows(batch, batch * p.rows);
            load(batch + 1);
        }
        locate_stages(0);
        __syncthreads();
        for (int step = 0; step < head().steps; step++) {    // those that multiply are at this one
            const int next = step + p.lead + 1;       // batch
            float4 carried = {};
            if (step > 0) {
                store(step - 1), carried = read_carried(step - 1);
                if (p.stages == 2) write_carried(step - 1, carried);    // 2% faster than behind the barrier
            }
            find_max(next);
            if (p.stages == 1) wait_for_store();
            sync_role(kBring);
            if (p.stages == 1) {
                if (step > 0) write_carried(step - 1, carried);
                named_barrier_arrive(kStageFree, kThreads);
            }
            split_rows(next, (own == 0 ? p.batches() - 1 : own - 1) * p.rows);
            load(next + 1);
            locate_stages(step + 1);
            own = own + 1 == p.batches() ? 0 : own + 1;
            if (p.stages == 2) wait_for_store();
            __syncthreads();
        }
        store(head().steps - 1);
#ifdef HAS_SM90A
        bulk_wait_group<0>();
#endif
    }

    // The block's outputs.
    __device__ __forceinline__ sweep_direct::Part part(const float* bias, float* out) const {
        const int64_t volume = int64_t(p.s.axis[0].out) * p.s.axis[1].out * p.s.axis[2].out;
        float* const first = out + (int64_t(n) * p.groups * p.group_out + channel0) * volume;
        return {x, w, bias ? bias + channel0 : nullptr, first, p.group_in(), p.group_out, kChannels, d, first_row(0), first_row(head().steps)};
    }

    __device__ __forceinline__ void run(const float* bias, bool apply_relu, float* out) {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        SharedHead& h = head();
        if (threadIdx.x == 0) {
            h.not_finite = 0;
            h.q0 = segment * p.segment_rows, h.q1 = min(h.q0 + p.segment_rows, ah.positions), h.steps = (h.q1 - h.q0 + p.rows - 1) / p.rows;
        }
        if (threadIdx.x < kStreams) {
            const int plane = d * kPhasesD + thread / kChannels - ad.crop;
            const int64_t channel = (int64_t(n) * p.groups * p.group_out + channel0 + thread % kChannels) * ad.out;
            h.origin[thread] = unsigned(plane) < unsigned(ad.out) ? int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(float)) + (channel + plane) * ah.out * aw.out : -1;
        }
        if (threadIdx.x < kMaxSlots) h.row_shift[threadIdx.x] = scaled_half::kMaxShift;
        if (threadIdx.x < kWarps) {
            const int first = thread * kOctets, row = first / p.octets;
            h.positions[thread] = {row, first - row * p.octets};
        }
        if (threadIdx.x < p.units) {
            const int tw = min(thread / kOcts, aw.taps - 1);    // the last one's weights are zeros where there are no more taps
            h.unit_offset[thread] = thread % kOcts * p.pitch + aw.shift[aw.taps - 1] - aw.shift[tw];
        }
        for (int i = threadIdx.x; i < p.slots() * p.row_units; i += kThreads) slots()[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        if (threadIdx.x < kRoleThreads) {
#ifdef HAS_SM90A
            setmaxnreg_inc<kMultiplyRegisters>();
#endif
            run_multiplying(bias, apply_relu);
        } else {
#ifdef HAS_SM90A
            setmaxnreg_dec<kBringRegisters>();
#endif
            run_bringing();
        }
    }
};

// A function by itself, so that nothing that it needs is kept in registers until then.
template <int kOcts, int kPatternD, int kPatternH>
__device__ __noinline__ void compute_directly(const Plan& p, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    sweep_direct::compute(p.s, Block<kOcts, kPatternD, kPatternH>(p, x, w).part(bias, out), apply_relu);
}

template <int kOcts, int kPatternD, int kPatternH>
__global__ void __launch_bounds__(kThreads, kBlocks)
sweep_kernel(const __grid_constant__ Plan p, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
    using Block = Block<kOcts, kPatternD, kPatternH>;
    wait_for_previous_kernel();
    Block(p, x, w).run(bias, apply_relu, out);
    if (Block::head().not_finite) compute_directly<kOcts, kPatternD, kPatternH>(p, x, w, bias, apply_relu, out);
}

template <int kOcts> int forward(const Plan& p, cudaStream_t stream, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    const auto launch = [&](auto pattern) {
        constexpr int kPattern = decltype(pattern)::value;
        const auto kernel = p.s.axis[0].phases == 1 ? sweep_kernel<kOcts, kKernel1, kPattern> : sweep_kernel<kOcts, kPattern, kPattern>;
        return launch_with_shared(kernel, p.blocks(), kThreads, p.shared_bytes(), stream, p, x, w, bias, apply_relu, out);
    };
    switch (pattern_of(p.s.axis[1])) {
        case kKernel2: return launch(std::integral_constant<int, kKernel2>{});
        case kKernel3: return launch(std::integral_constant<int, kKernel3>{});
        case kKernel3Later: return launch(std::integral_constant<int, kKernel3Later>{});
        default: return launch(std::integral_constant<int, kKernel4>{});
    }
}

extern template int forward<2>(const Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);    // conv_transpose3d_sweep_16.cu
extern template int forward<3>(const Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);    // conv_transpose3d_sweep_24.cu

}  // namespace sweep
'''

_SOURCES['conv_transpose3d_sweep.cu'] = r'''
// Strided transposed convolution of groups of few channels, as accurate as float32: the launchers. For float32.

#include "conv_plan.cuh"
#include "sweep.cuh"

namespace sweep {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

}  // namespace sweep

extern "C" int conv_transpose3d_supports_sweep(const Geometry* g, int device) { return sweep::plan_of(*g, device).segments > 0; }

extern "C" int64_t conv_transpose3d_forward_sweep_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_sweep(const Geometry* g, int, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const sweep::Plan& plan = sweep::plan_of(*g, device);
    if (plan.segments == 0) return cudaErrorNotSupported;
    constexpr decltype(&sweep::forward<1>) kForwards[sweep::kMaxOcts] = {sweep::forward<1>, sweep::forward<2>, sweep::forward<3>};
    return kForwards[plan.octs - 1](plan, static_cast<cudaStream_t>(stream), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<const float*>(bias), apply_relu != 0, static_cast<float*>(out));
}
'''

_SOURCES['conv_transpose3d_sweep_16.cu'] = r'''
// Strided transposed convolution of groups of few channels: the kernels for groups of 16 input channels.

#include "sweep.cuh"

template int sweep::forward<2>(const sweep::Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);
'''

_SOURCES['conv_transpose3d_sweep_24.cu'] = r'''
// Strided transposed convolution of groups of few channels: the kernels for groups of 24 input channels.

#include "sweep.cuh"

template int sweep::forward<3>(const sweep::Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);
'''

_SOURCES['conv_transpose3d_forward.cuh'] = r'''
// Transposed convolution on the tensor cores, alone or with ReLU and GroupNorm behind it.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, i] * w[ci, co, k] with i * stride - padding + k * dilation = o
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#pragma once

#include "conv_plan.cuh"

namespace conv {

// The packed copy of x has memory of its own, which the gradients may need. Where operands are split, the convolution has another, and that one is made if there is memory for it.
struct ForwardMemory {
    Scratch scratch, packed;
    Workspace workspace;
    scaled_half::Activation source;
    scaled_half::Weight weight;
    ForwardMemory(const Geometry& g, const Plan& plan, bool fused, void* base, void* packed_base, const void* x, const void* w) : scratch(base), packed(packed_base) {
        const Problem& p = plan.problem;
        const bool splits = p.t.split || plan.third, has_unsplit = !splits || packed_base;
        auto* weight_max = scratch.take_zeroed<unsigned>(p.C_out);
        auto* max = has_unsplit ? nullptr : scratch.take_zeroed<scaled_half::SampleMax>(g.N);
        workspace = take_workspace(scratch, p, fused);
        const scaled_half::Activation unsplit = has_unsplit ? take_activation(packed, p.s, g.N, g.C_in, 0, 0, x) : scaled_half::Activation{};
        source = splits ? take_activation(scratch, p.s, g.N, g.C_in, p.t.split, plan.third, x, has_unsplit ? unsplit.max : max) : unsplit;
        if (splits) source.unsplit = unsplit.copy, source.unsplit_channels = unsplit.phase_channels;
        weight = take_weight(scratch, plan, g, weight_max, w);
    }
};

// Whether a tiling fits: 1 or 0.
template <typename Path> int forward_supports(const Geometry& g, int device) { return plan_of<Path>(g, Direction::kForward, device).problem.t.block_n > 0; }

template <typename Path> ForwardMemory forward_memory(const Geometry& g, bool fused, int device) {
    return ForwardMemory(g, plan_of<Path>(g, Direction::kForward, device), fused, nullptr, nullptr, nullptr, nullptr);
}

template <typename Path>
int pack_and_convolve(const Plan& plan, const ForwardMemory& memory, int dtype, cudaStream_t stream, const void* bias, bool apply_relu, void* out, const Normalization& norm) {
    RETURN_IF_ERROR(memory.scratch.zero(memory.packed, stream));
    RETURN_IF_ERROR(scaled_half::pack(memory.source, memory.weight, dtype, plan.multiprocessors, stream));
    return convolve<Path>(plan, memory.source, memory.weight, memory.workspace, dtype, bias, apply_relu, out, norm, stream);
}

template <typename Path>
int forward(const Geometry& g, int dtype, int device, cudaStream_t stream, void* base, void* packed, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const Plan& plan = plan_of<Path>(g, Direction::kForward, device);
    const ForwardMemory memory(g, plan, false, base, packed, x, w);
    RETURN_IF_ERROR(pack_and_convolve<Path>(plan, memory, dtype, stream, bias, apply_relu, out, {}));
    return repair<Direction::kForward>(plan, g, dtype, memory.source.max, x, w, bias, apply_relu, out, stream);
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd. Needs no repair: a group
// with a value that is not finite is NaN as a whole.
template <typename Path>
int forward_relu_group_norm(const Geometry& g, int dtype, int y_dtype, int device, cudaStream_t stream, void* base, void* packed, const void* x, const void* w, const void* bias,
                            const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) {
    const Plan& plan = plan_of<Path>(g, Direction::kForward, device);
    const ForwardMemory memory(g, plan, true, base, packed, x, w);
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), num_groups};
    double* rstd = statistics + g.N * num_groups;
    const Normalization norm = {Path::normalizing_blocks(plan, shape, dtype, y_dtype, activation, y), shape, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), static_cast<float*>(y), statistics, rstd};
    RETURN_IF_ERROR(pack_and_convolve<Path>(plan, memory, dtype, stream, bias, true, activation, norm));
    if (norm.blocks > 0) return cudaSuccess;
    return normalize(memory.workspace.sets, shape, dtype, y_dtype, eps, gamma, beta, activation, y, statistics, stream);
}

}  // namespace conv

// The C functions of a path. packed: memory for the copy of x that the gradients read (theirs tell its size); null where the forward needs none and they do not want it.
#define FORWARD_LAUNCHERS(path, Path)                                                                                                                      \
    extern "C" int conv_transpose3d_forward_supports_##path(const Geometry* g, int device) { return conv::forward_supports<Path>(*g, device); }            \
    extern "C" int64_t conv_transpose3d_forward_##path##_workspace(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, false, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_forward_##path##_packed(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, false, device).packed.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_forward_##path##_workspace(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, true, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_forward_##path##_packed(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, true, device).packed.bytes(); } \
    extern "C" int conv_transpose3d_forward_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, \
                                                   int apply_relu, void* out) {                                                                            \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::forward<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, x, w, bias, apply_relu != 0, out);             \
    }                                                                                                                                                      \
    extern "C" int conv_transpose3d_relu_group_norm_forward_##path(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, \
                                                                   const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::forward_relu_group_norm<Path>(*g, dtype, y_dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, x, w, bias, gamma, beta, num_groups, eps, activation, y, statistics); \
    }
'''

_SOURCES['dweight_tiles.h'] = r'''
// How the tensor cores' kernels for dweight cut their work, and which element is where: for host and device. dweight.cuh tells the method.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace dweight {

constexpr int kConsumers = 3;
constexpr int kRows = 64;              // GEMM_M of a consumer
constexpr int kMaxItems = 3;
constexpr int kMaxStages = 6;
constexpr int kHeadBytes = 1024;

// Where a block packs dout itself (dweight_packing_sm90.cuh), it has more warps for that and fewer consumers of more sums.
constexpr int kPackingConsumers = 2, kPackingItems = 5, kPackerWarps = 8;

// --------------------------------------------------------------------------------------------------------- Tiling

struct Tiling {
    int block_n;                       // GEMM_N: 64, 128 or 192
    int chunk, blocks;                 // channels of x in a row of shared memory, and how many such columns of GEMM_N are used
    bool n_over_taps, m_over_taps;     // what GEMM_N and the consumers have neighbours of; or
    bool joint;                        // a block has all row blocks and taps (d, h), whose jobs the consumers take in turns:
    int live_jobs;                     // bit (row block, d, h): it has weights
    bool packs;                        // a block, of one group that has everything, packs dout
    int consumers, items;              // sums of kRows x block_n that a consumer has: 1; joint ones kMaxItems or kPackingItems
    int row_blocks, chunks;            // of GEMM_M, of 64 rows; of x
    int tile_w, strips, rows, row_groups, pitch;    // a stage has `rows` rows of a strip
    int steps, box_rows;               // of 16 positions; rows of x
    int dout_bytes, x_bytes;           // of a box
    int dout_boxes, x_boxes, stage_bytes, stages;
    int groups_m, groups_n, groups_h, groups_w, groups, splits;
    double plane_cycles, cycles;       // estimated, of a plane of a sample in a block, and of a multiprocessor
};

struct Problem {
    Stencil s;                         // the forward's
    Tiling t;
    int64_t N, C_in, C_out, groups, dout_phase_channels;
};

// What a group has, by its index.
struct Group {
    int m, n, td, th, tw;              // first row block, first chunk of x, taps; the first of several
    HOST_DEVICE Group(const Tiling& t, const Stencil& s, int index) {
        auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
        m = take(t.groups_m) * (t.m_over_taps ? 1 : kConsumers);
        n = take(t.groups_n) * (t.n_over_taps ? 1 : t.blocks);
        tw = take(t.groups_w) * t.blocks * (t.n_over_taps ? 1 : 0);
        th = take(t.groups_h) * (t.m_over_taps ? kConsumers : 1);
        td = t.joint ? 0 : take(s.axis[0].taps);
    }
};

// What a consumer has sums of, beside the group's taps w and channels of x.
struct Job { int row_block, td, th; };

// Whether some row of the job's block has a weight at its taps (d, h).
HOST_DEVICE bool is_live(const Problem& a, Job job) {
    const StencilAxis &ad = a.s.axis[0], &ah = a.s.axis[1], &aw = a.s.axis[2];
    if (job.th >= ah.taps || job.row_block >= a.t.row_blocks) return false;
    const int channels = int(a.dout_phase_channels);
    for (int c = job.row_block * kRows; c < (job.row_block + 1) * kRows; c += channels - c % channels) {
        const int phase = c / channels;
        if (phase < a.s.phases() && ad.live[phase / aw.phases / ah.phases] >> job.td & 1 && ah.live[phase / aw.phases % ah.phases] >> job.th & 1) return true;
    }
    return false;
}

HOST_DEVICE Job job_of(const Problem& a, const Group& g, int consumer, int item) {
    const Tiling& t = a.t;
    if (!t.joint) return {g.m + (t.m_over_taps ? 0 : consumer), g.td, g.th + (t.m_over_taps ? consumer : 0)};
    const int job = conv::place_of_bit(t.live_jobs, item * t.consumers + consumer), taps_h = a.s.axis[1].taps, row_tap = job / taps_h;
    return {row_tap / a.s.axis[0].taps, row_tap % a.s.axis[0].taps, job % taps_h};
}

// How many jobs a consumer has.
HOST_DEVICE int items_of(const Problem& a, const Group& g, int consumer) {
    return a.t.joint ? (conv::count_bits(a.t.live_jobs) + a.t.consumers - 1 - consumer) / a.t.consumers : is_live(a, job_of(a, g, consumer, 0));
}
HOST_DEVICE bool is_live(const Problem& a, const Group& g) {
    for (int consumer = 0; consumer < a.t.consumers; consumer++)
        if (items_of(a, g, consumer) > 0) return true;
    return false;
}

// The last taps of a group.
HOST_DEVICE int last_tap_h(const Problem& a, const Group& g) {
    const int taps = a.s.axis[1].taps, last = a.t.joint ? taps - 1 : g.th + (a.t.m_over_taps ? kConsumers : 1) - 1;
    return last < taps ? last : taps - 1;
}
// That tap w is the first block of columns, so that the next blocks are further on in x.
HOST_DEVICE int last_tap_w(const Tiling& t, const Stencil& s, int first) {
    const int last = first + (t.n_over_taps ? t.blocks : 1) - 1;
    return last < s.axis[2].taps ? last : s.axis[2].taps - 1;
}

// Boxes of a stage that a group loads.
HOST_DEVICE int dout_boxes_of(const Tiling& t, const Group& g) { return t.dout_boxes < t.row_blocks - g.m ? t.dout_boxes : t.row_blocks - g.m; }
HOST_DEVICE int x_boxes_of(const Tiling& t, const Group& g) { return t.joint ? t.x_boxes : t.n_over_taps ? 1 : t.blocks < t.chunks - g.n ? t.blocks : t.chunks - g.n; }
HOST_DEVICE int x_bytes_of(const Tiling& t, const Group& g) { return x_boxes_of(t, g) * t.box_rows * t.pitch * t.chunk * 2; }

// The boxes of GEMM_K: (sample, plane, strip, rows), for the planes of dout that the tap d connects with one of x, or for all.
struct Boxes {
    int begin_d, planes;
    int count;
    HOST_DEVICE Boxes(const Problem& a, const Group& g) {
        const StencilAxis& ad = a.s.axis[0];
        const int offset = ad.shift[g.td] - ad.first, end = ad.sources + offset < ad.positions ? ad.sources + offset : ad.positions;
        begin_d = offset > 0 ? offset : 0;
        planes = end > begin_d ? end - begin_d : 0;
        if (a.t.joint) begin_d = 0, planes = ad.positions;
        count = int(a.N) * planes * a.t.strips * a.t.row_groups;    // each has many positions
    }
    HOST_DEVICE int begin_of(const Tiling& t, int split) const { return int(int64_t(count) * split / t.splits); }
};

// Rows of x from one block of columns to the next, where they are taps.
HOST_DEVICE int step_w(const Stencil& s) { return s.axis[2].taps > 1 ? s.axis[2].shift[1] - s.axis[2].shift[0] : 0; }

// A block that packs takes dout by units: so many elements of a box's row, of so many channels. A box's units are (phase d, row, phase h, elements, channels).
constexpr int kUnitElements = 64, kUnitChannels = 8, kMostUnits = 32;
HOST_DEVICE int row_elements(const Problem& a) { return a.t.tile_w * a.s.axis[2].phases; }    // of a box
HOST_DEVICE int units_of_box(const Problem& a) {
    return int(ceil_div(a.C_out, kUnitChannels)) * int(ceil_div(row_elements(a), kUnitElements)) * a.t.rows * a.s.axis[0].phases * a.s.axis[1].phases;
}

// How GEMM_M, GEMM_N and the taps are shared out. False where a joint one does not fit.
inline bool cut_products(Problem& p, int64_t phase_channels_x, bool joint, bool packs) {
    const Stencil& s = p.s;
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling& t = p.t = {};
    t.chunk = phase_channels_x % 64 == 0 ? 64 : int(phase_channels_x);
    t.chunks = int(phase_channels_x / t.chunk);
    t.row_blocks = int(ceil_div(p.dout_phase_channels * s.phases(), kRows));
    t.n_over_taps = w.taps > 1, t.m_over_taps = !joint && h.taps > 1, t.joint = joint;
    const int columns = t.n_over_taps ? w.taps : t.chunks, most = 192 / t.chunk;
    t.blocks = int(ceil_div(columns, ceil_div(columns, most)));
    t.block_n = t.blocks * t.chunk <= 64 ? 64 : t.blocks * t.chunk <= 128 ? 128 : 192;
    t.groups_m = int(joint ? 1 : t.m_over_taps ? t.row_blocks : ceil_div(t.row_blocks, kConsumers));
    t.groups_n = int(t.n_over_taps ? t.chunks : ceil_div(t.chunks, t.blocks));
    t.groups_h = int(joint ? 1 : t.m_over_taps ? ceil_div(h.taps, kConsumers) : h.taps);
    t.groups_w = int(t.n_over_taps ? ceil_div(w.taps, t.blocks) : 1);
    t.groups = (joint ? 1 : d.taps) * t.groups_h * t.groups_w * t.groups_n * t.groups_m;
    t.dout_boxes = t.m_over_taps ? 1 : joint || t.row_blocks < kConsumers ? t.row_blocks : kConsumers;
    t.x_boxes = joint ? d.taps : t.n_over_taps ? 1 : t.block_n / t.chunk;
    t.packs = packs, t.consumers = packs ? kPackingConsumers : kConsumers, t.items = 1;
    if (!joint) return true;
    const int jobs = t.row_blocks * d.taps * h.taps;
    if (t.block_n * kMaxItems > 192 || jobs > 31) return false;
    for (int job = 0; job < jobs; job++) t.live_jobs |= int(is_live(p, {job / h.taps / d.taps, job / h.taps % d.taps, job % h.taps})) << job;
    t.items = packs ? kPackingItems : kMaxItems;
    return conv::count_bits(t.live_jobs) > kConsumers && conv::count_bits(t.live_jobs) <= t.consumers * t.items;
}

// The boxes of least estimated time. False where none fit.
inline bool cut_boxes(Problem& p, int shared_bytes) {
    const Stencil& s = p.s;
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    Tiling& t = p.t;
    const int halo_w = w.shift[w.taps - 1];
    int halo_h = 0;
    for (int i = 0; i < t.groups_h; i++) {
        Group g(t, s, 0);
        g.th = i * kConsumers;
        const int halo = t.m_over_taps || t.joint ? h.shift[last_tap_h(p, g)] - h.shift[g.th] : 0;
        halo_h = halo > halo_h ? halo : halo_h;
    }
    const int row_bytes = t.chunk * 2;
    // Jobs of a block, and the cycles of one: bound by the tensor cores or by shared memory.
    const int jobs = t.joint ? conv::count_bits(t.live_jobs) : t.m_over_taps ? (h.taps < kConsumers ? h.taps : kConsumers) : t.dout_boxes;
    const double product = t.block_n / 2.0, operands = (kRows * 32 + t.block_n * 32) / 128.0;
    Tiling best = {};
    for (int strips = 1; strips <= 16 && strips <= w.positions; strips++)
    for (int rows = 1; rows <= h.positions && rows <= 64; rows++) {
        t.strips = strips, t.rows = rows;
        t.tile_w = int(ceil_div(w.positions, strips));
        t.pitch = conv::box_pitch(w, t.tile_w, strips);
        t.row_groups = int(ceil_div(h.positions, rows));
        t.steps = int(ceil_div(int64_t(rows - 1) * t.pitch + t.tile_w, 16));
        t.box_rows = rows + halo_h;
        if (t.pitch > 256 || t.tile_w > 256 || t.box_rows > 256) continue;
        const int64_t reach = int64_t(halo_h) * t.pitch + t.steps * 16 + halo_w + int64_t(t.block_n / t.chunk) * step_w(s), box = int64_t(t.box_rows) * t.pitch;
        const int64_t dout_bytes = ceil_div(int64_t(t.steps) * 16 * kRows * 2, 1024) * 1024, x_bytes = ceil_div((reach > box ? reach : box) * row_bytes, 1024) * 1024;
        const int64_t stage = t.dout_boxes * dout_bytes + t.x_boxes * x_bytes, stages = (shared_bytes - kHeadBytes) / stage;
        if (stages < 2) break;
        if (t.packs && units_of_box(p) > kMostUnits) continue;
        t.dout_bytes = int(dout_bytes), t.x_bytes = int(x_bytes), t.stage_bytes = int(stage), t.stages = int(stages < kMaxStages ? stages : kMaxStages);
        // Cycles of a stage: the products, or the loads, at 18 bytes a cycle, or packing: a packer takes 1250 for a unit, and loads the ends of rows for nothing.
        const double products = t.steps * jobs * (product > operands ? product : operands);
        const double dout = t.packs ? double(p.C_out) * s.axis[0].phases * h.phases * rows * (row_elements(p) + 16) * 4 : t.dout_boxes * double(rows) * t.tile_w * 128;
        const double loads = (dout + double(x_boxes_of(t, Group(t, s, 0))) * box * row_bytes) / 18, packing = t.packs ? ceil_div(units_of_box(p), kPackerWarps) * 1250.0 : 0;
        const double time = (std::max({products, loads, packing}) + 150) * strips * t.row_groups * (t.stages == 2 ? 1.15 : 1.0);
        if (best.block_n == 0 || time < best.plane_cycles) best = t, best.plane_cycles = time;
    }
    t = best;
    return t.block_n > 0;
}

// Sets the parts of GEMM_K that make full waves of blocks, as few as that takes.
inline void split(Problem& p, int multiprocessors) {
    int64_t live = 0, boxes = 0;
    for (int group = 0; group < p.t.groups; group++) {
        const Group g(p.t, p.s, group);
        const int64_t count = Boxes(p, g).count;
        if (is_live(p, g)) live++, boxes = count > boxes ? count : boxes;
    }
    double best_waste = 1e30;
    int best = 1;
    for (int waves = 1; waves <= 4 && live > 0; waves++) {
        int64_t splits = int64_t(waves) * multiprocessors / live;
        splits = splits < 1 ? 1 : splits > boxes && boxes > 0 ? boxes : splits;
        const double waste = double(ceil_div(splits * live, multiprocessors)) / splits * (1 + 0.02 * waves);
        if (waste < best_waste) best_waste = waste, best = int(splits);
    }
    p.t.splits = best;
    const double planes = double(boxes) / (p.t.strips * p.t.row_groups);
    p.t.cycles = ceil_div(live * best, multiprocessors) * (p.t.plane_cycles * planes / best + 2000.0 * ceil_div(p.N, best) + 3000) + double(best + 1) * p.C_in * p.C_out / p.groups * kernel_volume(p.s) * 4 / 500 + 8000;
}

// Whether a block can pack dout: it reads all of a box, and lanes have the same phase in all of a row's units. Known when products are cut.
inline bool can_pack(const Problem& p) { return p.t.groups == 1 && 32 % p.s.axis[2].phases == 0; }
// Where that is faster than a copy of dout first (NOTES.md): units are not half empty, and there is enough to do for all packers and blocks. Known when boxes are cut.
inline bool pays_to_pack(const Problem& p, int multiprocessors) {
    return row_elements(p) > kUnitElements / 2 && units_of_box(p) >= 2 * kPackerWarps && Boxes(p, Group(p.t, p.s, 0)).count >= 32 * multiprocessors;
}

// The tiling; block_n 0 where none fits. A joint one, where there is one, reads least. packs: one of blocks that pack dout, where that pays.
inline Tiling choose_tiling(Problem p, int64_t phase_channels_x, int multiprocessors, int shared_bytes, bool packs) {
    const StencilAxis& w = p.s.axis[2];
    for (int t = 1; t < w.taps; t++)
        if (w.shift[t] - w.shift[t - 1] != step_w(p.s)) return {};
    for (bool joint : {true, false}) {
        if ((packs && !joint) || !cut_products(p, phase_channels_x, joint, packs) || (packs && !can_pack(p))) continue;
        if (!cut_boxes(p, shared_bytes) || (packs && !pays_to_pack(p, multiprocessors))) continue;
        split(p, multiprocessors);
        return p.t;
    }
    return {};
}

// --------------------------------------------------------------------------------------------------------- Places

struct Box { int n, d, w0, h0; };

HOST_DEVICE Box box_of(const Problem& a, const Boxes& boxes, int index) {
    Box b;
    b.h0 = index % a.t.row_groups * a.t.rows, index /= a.t.row_groups;
    b.w0 = index % a.t.strips * a.t.tile_w, index /= a.t.strips;
    b.d = boxes.begin_d + index % boxes.planes, b.n = index / boxes.planes;
    return b;
}

// The next one, but for the last.
HOST_DEVICE void advance(const Problem& a, const Boxes& boxes, Box& b) {
    b.h0 += a.t.rows;
    if (b.h0 < a.t.row_groups * a.t.rows) return;
    b.h0 = 0, b.w0 += a.t.tile_w;
    if (b.w0 < a.t.strips * a.t.tile_w) return;
    b.w0 = 0, b.d++;
    if (b.d == boxes.begin_d + boxes.planes) b.d = boxes.begin_d, b.n++;
}

// Row and column of x that the first row of a group's box has, and the row of the box that the first block of columns of a job begins with.
HOST_DEVICE int first_row(const Problem& a, const Group& g) { return a.s.axis[1].first - a.s.axis[1].shift[last_tap_h(a, g)]; }
HOST_DEVICE int first_column(const Problem& a) { return a.s.axis[2].first - a.s.axis[2].shift[a.s.axis[2].taps - 1]; }
HOST_DEVICE int first_shift(const Problem& a, const Group& g, Job job) {
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    return (ah.shift[last_tap_h(a, g)] - ah.shift[job.th]) * a.t.pitch + aw.shift[aw.taps - 1] - aw.shift[last_tap_w(a.t, a.s, g.tw)];
}
// Which boxes of a stage a job reads, of dout and the first of x; and what the latter has.
HOST_DEVICE int dout_box_of(const Tiling& t, Job job, int consumer) { return t.joint ? job.row_block : t.m_over_taps ? 0 : consumer; }
HOST_DEVICE int x_box_of(const Tiling& t, Job job) { return t.joint ? job.td : 0; }
struct BoxOfX { int chunk, td; };
HOST_DEVICE BoxOfX box_of_x(const Tiling& t, const Group& g, int box) { return t.joint ? BoxOfX{g.n, box} : BoxOfX{g.n + box, g.td}; }
// From one block of columns to the next, where the joint's one block may be half of GEMM_N.
HOST_DEVICE int block_bytes(const Tiling& t, const Stencil& s) { return t.n_over_taps ? step_w(s) * t.chunk * 2 : t.joint ? 0 : t.x_bytes; }

// Where the sum for an element k of the kernel's volume is, whatever the channels: the first of the groups that have its taps; among the jobs of a row block, or the
// consumer; block of columns; first row of GEMM_M.
struct SumOfTap { int group, job, block, first_row; };
HOST_DEVICE SumOfTap sum_of_tap(const Problem& a, int k) {
    const Tiling& t = a.t;
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    const TapPhase place = place_of_kernel(a.s, k);
    const int tw = place.tap % aw.taps, dh = place.tap / aw.taps, th = dh % ah.taps, td = dh / ah.taps;
    const int group_w = t.n_over_taps ? tw / t.blocks : 0, group_h = t.joint ? 0 : t.m_over_taps ? th / kConsumers : th;
    return {(((t.joint ? 0 : td) * t.groups_h + group_h) * t.groups_w + group_w) * t.groups_n * t.groups_m, t.joint ? dh : th % kConsumers,
            t.n_over_taps ? last_tap_w(t, a.s, group_w * t.blocks) - tw : 0, place.phase * int(a.dout_phase_channels)};
}

// The same of an input channel, whatever the taps: what it adds to the group; block of columns; column.
struct SumOfInput { int group, block, column; };
HOST_DEVICE SumOfInput sum_of_input(const Problem& a, int ci) {
    const Tiling& t = a.t;
    const int chunk = ci / t.chunk, n = t.n_over_taps ? chunk : chunk / t.blocks;
    return {n * t.groups_m, t.n_over_taps ? 0 : chunk - n * t.blocks, ci - chunk * t.chunk};
}

// Of which group, consumer and item, in which row and column the sum for an output channel is.
struct Sum { int group, consumer, item, row, column; };
HOST_DEVICE Sum sum_of(const Problem& a, const SumOfTap& tap, const SumOfInput& input, int co) {
    const Tiling& t = a.t;
    const int m = tap.first_row + co, row_block = m / kRows;
    Sum sum = {tap.group + input.group, 0, 0, m % kRows, (tap.block + input.block) * t.chunk + input.column};
    if (t.joint) {
        const int job = row_block * a.s.axis[0].taps * a.s.axis[1].taps + tap.job, live = conv::count_bits(t.live_jobs & ((1 << job) - 1));
        sum.consumer = live % t.consumers, sum.item = live / t.consumers;
    } else if (t.m_over_taps) {
        sum.group += row_block, sum.consumer = tap.job;
    } else {
        sum.group += row_block / kConsumers, sum.consumer = row_block % kConsumers;
    }
    return sum;
}

}  // namespace dweight
'''

_SOURCES['dweight_parts.cuh'] = r'''
// The parts of dweight's sums that blocks leave in scratch memory (dweight.cuh): where they are, and how dweight is made of them.
#pragma once

#include "dweight_tiles.h"
#include "launch.cuh"

namespace dweight {

// Memory: (splits, groups, consumers, items, block_n / 8, 128, 4), a thread's sums of one item, four by four.
HOST_DEVICE int64_t partial_count(const Tiling& t) { return int64_t(t.splits) * t.groups * t.consumers * t.items * kRows * t.block_n; }

// A thread has rows r and r + 8, two neighbours of every eight columns: sums 4i and 4i + 1 the first row's, 4i + 2 and 4i + 3 the second's. Vector v of scratch memory has
// four sums of one row, which are in two columns' eights, the first at sum_at(v), so that neighbours have 16 columns of a row.
HOST_DEVICE constexpr int sum_at(int v) { return v / 2 * 8 + v % 2 * 2; }
HOST_DEVICE int place_in_partial(const Tiling& t, const Sum& s) {
    const int item = (s.group * t.consumers + s.consumer) * t.items + s.item, vector = s.column / 16 * 2 + s.row / 8 % 2, thread = s.row / 16 * 32 + s.row % 8 * 4 + s.column % 8 / 2;
    return ((item * (t.block_n / 8) + vector) * 128 + thread) * 4 + s.column / 8 % 2 * 2 + s.column % 2;
}

// ---------------------------------------------------------------------------------------------------------- Adding

constexpr int kAddThreads = 256, kAddInputs = 16, kAddFloats = 8192, kAddBlocks = 256;    // kAddBlocks: fewer would leave multiprocessors idle
constexpr int kManyParts = 8;
constexpr int kMostVolume = kMaxTaps * kMaxTaps * kMaxTaps;

// A block has kAddInputs input channels, 2^outputs output channels and `taps` elements of their kernels: all of them, or those of one output channel cut into
// tiles. Each of these sums is made by `shares` threads, which take the parts in turns.
struct AddPlan {
    int outputs, taps, shares;
    HOST_DEVICE int sums() const { return (taps << outputs) * kAddInputs; }
    HOST_DEVICE int row() const { return (taps << outputs) | 1; }    // in shared memory, of an input channel: neighbours begin in different banks
    HOST_DEVICE int tap_tiles(const Problem& p) const { return int(ceil_div(kernel_volume(p.s), taps)); }
    HOST_DEVICE int output_tiles(const Problem& p) const { return int(ceil_div(p.C_out / p.groups, 1 << outputs)); }
    HOST_DEVICE int64_t blocks(const Problem& p) const { return ceil_div(p.C_in, kAddInputs) * output_tiles(p) * tap_tiles(p); }
};

inline AddPlan make_add_plan(const Problem& p) {
    AddPlan plan = {6, kernel_volume(p.s), 1};
    while (plan.outputs > 0 && (plan.row() * kAddInputs > kAddFloats || plan.blocks(p) < kAddBlocks)) plan.outputs--;
    while (plan.taps > 1 && plan.blocks(p) < kAddBlocks) plan.taps = (plan.taps + 1) / 2;    // where an output channel of a block is not few enough
    while (p.t.splits > kManyParts && plan.sums() * plan.shares * 2 <= kAddThreads) plan.shares *= 2;
    return plan;
}

// A thread's share of a block's sums, kEach elements at a time, for each of them kParts parts at a time: so much is under way. `from` tells where an element's
// first part is, `to` takes its sum.
template <int kEach, int kParts, typename F, typename G> __device__ __forceinline__ void gather(const Problem& p, const AddPlan& plan, const float* __restrict__ partial, F from, G to) {
    const int64_t stride = partial_count(p.t) / p.t.splits;
    const int step = kAddThreads / plan.shares, own = threadIdx.x % step, share = threadIdx.x / step;
    for (int first = own; first < plan.sums(); first += kEach * step) {
        const float* parts[kEach];
        double sums[kEach] = {};
#pragma unroll
        for (int e = 0; e < kEach; e++) parts[e] = partial + from(first + e * step);
        for (int split = share; split < p.t.splits; split += kParts * plan.shares) {
            float values[kParts][kEach];
#pragma unroll
            for (int i = 0; i < kParts; i++)
#pragma unroll
                for (int e = 0; e < kEach; e++) values[i][e] = split + i * plan.shares < p.t.splits ? parts[e][(split + i * plan.shares) * stride] : 0.0f;
#pragma unroll
            for (int i = 0; i < kParts; i++)
#pragma unroll
                for (int e = 0; e < kEach; e++) sums[e] += values[i][e];
        }
#pragma unroll
        for (int e = 0; e < kEach; e++) to(first + e * step, sums[e]);
    }
}

// dweight (C_in, C_out / groups, kernel) from the parts. Threads gather sums, neighbouring ones of neighbouring input channels, and put them together in shared memory
// in the order of dweight.
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ Problem p, AddPlan plan, const float* __restrict__ partial, int dtype, void* __restrict__ dweight) {
    __shared__ SumOfTap taps[kMostVolume];
    __shared__ float values[kAddFloats];
    __shared__ double shares[kAddThreads];
    const int volume = kernel_volume(p.s), group_in = int(p.C_in / p.groups), group_out = int(p.C_out / p.groups), output_tiles = plan.output_tiles(p), tap_tiles = plan.tap_tiles(p);
    const int k0 = blockIdx.x % tap_tiles * plan.taps, co0 = blockIdx.x / tap_tiles % output_tiles << plan.outputs, ci0 = blockIdx.x / tap_tiles / output_tiles * kAddInputs;
    const int last_tap = min(plan.taps, volume - k0) - 1, last_output = min(1 << plan.outputs, group_out - co0) - 1, last_input = min(kAddInputs, int(p.C_in) - ci0) - 1;
    for (int k = threadIdx.x; k <= last_tap; k += kAddThreads) taps[k] = sum_of_tap(p, k0 + k);
    wait_for_previous_kernel();
    __syncthreads();
    // Element i: input channel, the thread's own; output channel; k. Where there is none: one of the others.
    const int input = threadIdx.x % kAddInputs, ci = ci0 + min(input, last_input), co = ci / group_in * group_out + co0;
    const SumOfInput sum_input = sum_of_input(p, ci);
    const auto from = [&](int i) {
        const int at = i / kAddInputs, k = at >> plan.outputs, output = at - (k << plan.outputs);
        return place_in_partial(p.t, sum_of(p, taps[min(k, last_tap)], sum_input, co + min(output, last_output)));
    };
    const auto to = [&](int i, double sum) {
        const int at = i / kAddInputs, k = at >> plan.outputs, output = at - (k << plan.outputs);
        if (k < plan.taps) values[input * plan.row() + output * plan.taps + k] = float(sum);
    };
    if (plan.shares > 1) {    // of one sum
        gather<1, 8>(p, plan, partial, from, [&](int, double sum) { shares[threadIdx.x] = sum; });
        __syncthreads();
        if (threadIdx.x < plan.sums()) {
            double sum = 0;
            for (int i = threadIdx.x; i < kAddThreads; i += kAddThreads / plan.shares) sum += shares[i];
            to(threadIdx.x, sum);
        }
    } else if (p.t.splits > kManyParts) {
        gather<1, 16>(p, plan, partial, from, to);
    } else {
        gather<8, 2>(p, plan, partial, from, to);
    }
    __syncthreads();
    const int floats = last_output * plan.taps + last_tap + 1;    // neighbours: the taps are all, or the output channel is one
    for (int i = threadIdx.x / 32; i <= last_input; i += kAddThreads / 32)
        for (int j = threadIdx.x % 32; j < floats; j += 32) store_as(dweight, dtype, (int64_t(ci0 + i) * group_out + co0) * volume + k0 + j, values[i * plan.row() + j]);
}

inline int add_parts(const Problem& p, const float* partial, int dtype, void* dweight, void* stream) {
    const AddPlan plan = make_add_plan(p);
    return launch(add_parts_kernel, plan.blocks(p), kAddThreads, stream, p, plan, partial, dtype, dweight);
}

}  // namespace dweight
'''

_SOURCES['dweight.cuh'] = r'''
// Gradient of a transposed convolution's weight on the tensor cores, any stride as in stencil.h.
//
//   dweight[ci, co, k] = sum over n, p of dout[n, p, (phase, co)] * x[n, first + p - shift, ci],   k = kernel_index(shift, phase)
//
// A matrix product on the scaled fp16 copies that dx and the forward read (scaled_half.cuh), channels-last: GEMM_M = (phase, output
// channel), GEMM_N = (neighbouring taps w, input channel), GEMM_K = positions p. Both operands are transposed ones, a row of shared
// memory for each position; a tap is a shift of x by whole rows. Where there is one tap w, GEMM_N is several chunks of channels.
//
// Samples have scales of their own: where the scale changes, and after kChain positions, which keeps the tensor cores' chains of
// additions short, the sums are scaled back and added to those in scratch memory.
#pragma once

#include "conv_plan.cuh"
#include "dweight_parts.cuh"

namespace dweight {

constexpr int kChain = 32768;

struct Parameters {
    Problem p;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                    // partial_count of them, as dweight_parts.cuh tells
};

// Scales a sum back by 2^-shift_a and 2^-shift_b, in an order in which nothing overflows.
struct ScaleBack {
    float small, large;
    __device__ __forceinline__ ScaleBack(int shift_a, int shift_b) : small(scaled_half::power_of_two(-max(shift_a, shift_b))), large(scaled_half::power_of_two(-min(shift_a, shift_b))) {}
    __device__ __forceinline__ float operator()(float sum) const { return sum * small * large; }
};

// Adds a vector's sums to those before, if there are any.
__device__ __forceinline__ void add_sums(float4& sums, bool first, const ScaleBack& back, const float* d) {
    const float4 before = first ? make_float4(0, 0, 0, 0) : sums;
    sums = make_float4(before.x + back(d[0]), before.y + back(d[1]), before.z + back(d[4]), before.w + back(d[5]));
}

}  // namespace dweight
'''

_SOURCES['dweight_taps_tiles.h'] = r'''
// How dweight of small grids and many channels is cut, element by element of the kernel (dweight_taps_sm90.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace dweight_taps {

constexpr int kBlock = 64;                 // channels of a box
constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kMaxSteps = 7, kMinStages = 3, kMaxStages = 8;
constexpr int kHeadBytes = 1024;

// GEMM_M = input channels, GEMM_N = output channels, GEMM_K = positions, for one element of the kernel. A stage has a box of positions, of x and of dout's phase, in 16 * steps rows; those behind the
// box are zeros. So no positions are wasted on gaps between rows, of which small grids would have many, and every element loads its own boxes.
struct Plan {
    Stencil s;                             // the forward's
    int N, C_in, C_out, dout_phase_channels;
    int x_blocks, dout_blocks;             // channels of x of a consumer, and of dout, in blocks
    int row_tiles, column_tiles;
    int box[3], boxes[3];                  // positions of a box along D, H, W; boxes of a sample
    int steps, stages, splits;             // splits: parts of GEMM_K
    double cycles;                         // estimated, of a multiprocessor; 0: the layer does not fit
    HOST_DEVICE int rows() const { return row_tiles * kConsumers * x_blocks * kBlock; }
    HOST_DEVICE int columns() const { return column_tiles * dout_blocks * kBlock; }
    HOST_DEVICE int sample_boxes() const { return boxes[0] * boxes[1] * boxes[2]; }
    HOST_DEVICE int positions() const { return box[0] * box[1] * box[2]; }
    HOST_DEVICE int block_bytes() const { return steps * 16 * kBlock * 2; }
    HOST_DEVICE int stage_blocks() const { return kConsumers * x_blocks + dout_blocks; }
    HOST_DEVICE int stage_bytes() const { return stage_blocks() * block_bytes(); }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + stages * stage_bytes(); }
    HOST_DEVICE int tiles() const { return kernel_volume(s) * row_tiles * column_tiles; }
    HOST_DEVICE int begin_of(int split) const { return int(int64_t(N) * sample_boxes() * split / splits); }    // boxes
    HOST_DEVICE int64_t partial_count() const { return cycles > 0 ? int64_t(splits) * kernel_volume(s) * rows() * columns() : 0; }    // (splits, kernel, rows, columns)
};

// A block's tile, and its part of GEMM_K.
struct Tile { int k, row, column, split; };    // element of the kernel; first channels
HOST_DEVICE Tile tile_of(const Plan& p, int index) {
    Tile t;
    t.column = index % p.column_tiles * p.dout_blocks * kBlock, index /= p.column_tiles;
    t.row = index % p.row_tiles * kConsumers * p.x_blocks * kBlock, index /= p.row_tiles;
    t.k = index % kernel_volume(p.s), t.split = index / kernel_volume(p.s);
    return t;
}

// A box: its sample and first position.
struct Box { int n, d, h, w; };
HOST_DEVICE Box box_of(const Plan& p, int index) {
    Box b;
    b.w = index % p.boxes[2] * p.box[2], index /= p.boxes[2];
    b.h = index % p.boxes[1] * p.box[1], index /= p.boxes[1];
    b.d = index % p.boxes[0] * p.box[0], b.n = index / p.boxes[0];
    return b;
}

// The parts of GEMM_K of least estimated time, and that.
inline void split(Plan& p, int multiprocessors) {
    const int64_t boxes = int64_t(p.N) * p.sample_boxes();
    // A stage: its products, or what comes from the L2 cache.
    const double stage = std::max(p.steps * kConsumers * p.x_blocks * p.dout_blocks * kBlock / 2.0, p.stage_blocks() * double(p.positions()) * kBlock * 2 / 20) + 60;
    for (int splits = 1; splits <= 64 && splits <= boxes; splits++) {
        const double added = double(splits + 1) * kernel_volume(p.s) * p.C_in * p.C_out * 4;    // bytes
        const double time = ceil_div(int64_t(p.tiles()) * splits, multiprocessors) * (ceil_div(boxes, splits) * stage + 5000) + added / 1500 + 4000;
        if (p.cycles == 0 || time < p.cycles) p.cycles = time, p.splits = splits;
    }
}

// The plan of least estimated time, of no cycles where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Stencil& s, const Geometry& g, int dout_phase_channels, int most_shared, int multiprocessors) {
    Plan best = {}, p = {};
    if (g.groups > 1 || g.C_in <= kBlock / 2 || g.C_out <= kBlock / 2 || g.N == 0 || g.C_in >= 1 << 20 || g.C_out >= 1 << 20) return best;
    p.s = s, p.N = int(g.N), p.C_in = int(g.C_in), p.C_out = int(g.C_out), p.dout_phase_channels = dout_phase_channels;
    const int d = s.axis[0].positions, h = s.axis[1].positions, w = s.axis[2].positions;
    for (int x_blocks : {2, 1})
    for (int dout_blocks : {2, 1})
    for (int box_w = std::min(w, 16 * kMaxSteps); box_w > 0 && box_w * 2 > std::min(w, 16 * kMaxSteps); box_w--)    // whole rows, or long pieces
    for (int box_h = 1; box_h <= h && box_h * box_w <= 16 * kMaxSteps; box_h++)
    for (int box_d = 1; box_d <= d && box_d * box_h * box_w <= 16 * kMaxSteps; box_d++) {
        p.x_blocks = x_blocks, p.dout_blocks = dout_blocks;
        p.row_tiles = int(ceil_div(p.C_in, kConsumers * x_blocks * kBlock)), p.column_tiles = int(ceil_div(p.C_out, dout_blocks * kBlock));
        p.box[0] = box_d, p.box[1] = box_h, p.box[2] = box_w;
        p.boxes[0] = int(ceil_div(d, box_d)), p.boxes[1] = int(ceil_div(h, box_h)), p.boxes[2] = int(ceil_div(w, box_w));
        if (double(p.N) * p.boxes[0] * p.boxes[1] * p.boxes[2] > 1 << 28) continue;
        p.steps = int(ceil_div(p.positions(), 16));
        p.stages = std::min((most_shared - kHeadBytes) / p.stage_bytes(), kMaxStages);
        if (p.stages < kMinStages || int64_t(p.tiles()) * 64 > 1 << 30) continue;
        p.cycles = 0;
        split(p, multiprocessors);
        if (best.cycles == 0 || p.cycles < best.cycles) best = p;
    }
    return best;
}

}  // namespace dweight_taps
'''

_SOURCES['conv_transpose3d_gradients.cuh'] = r'''
// Gradients of a transposed convolution's input and weight on the tensor cores.
//
//   dx[n, ci, i]       = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]
//
// Both read one packed copy of dout, in which the phases of the stride are channels; dweight's kernel may also make it (dweight_packing_sm90.cuh). dx is the forward's convolution, its
// stencil the other way round; dweight is in dweight.cuh.

#pragma once

#include "dweight.cuh"
#include "dweight_taps_tiles.h"
#include "group_norm_backward.cuh"

namespace conv {

// dweight from dout's packed copy, from float32 dout, and element by element of the kernel; the latter two have block_n 0 and no cycles where that does not pay.
struct DweightPlans {
    dweight::Problem plain, packing;
    dweight_taps::Plan taps;
};

template <typename Path> static const DweightPlans& dweight_plans_of(const Geometry& g, int device) {
    static Memo<DweightPlans> plans;
    return plans.get(g, Direction::kDInput, device, [&] {
        dweight::Problem p = {};
        if (!has_stencil(g)) return DweightPlans{p, p, {}};
        p.s = make_stencil(Direction::kForward, g);
        p.N = g.N, p.C_in = g.C_in, p.C_out = g.C_out, p.groups = g.groups, p.dout_phase_channels = padded_channels(g.C_out);
        const int multiprocessors = plan_of<Path>(g, Direction::kDInput, device).multiprocessors;
        DweightPlans both = {p, p, {}};
        both.plain.t = dweight::choose_tiling(p, padded_channels(g.C_in), multiprocessors, Path::shared_bytes(device), false);
        if constexpr (Path::kHopper) {
            both.packing.t = dweight::choose_tiling(p, padded_channels(g.C_in), multiprocessors, Path::kPackingSharedBytes, true);
            both.taps = dweight_taps::make_plan(p.s, g, int(p.dout_phase_channels), block_shared_bytes(device), multiprocessors);
            if (both.taps.cycles > 0.9 * both.plain.t.cycles) both.taps = {};
        }
        return both;
    });
}

struct GradientsMemory {
    Scratch scratch, packed;    // packed: the copy of x
    Workspace workspace;
    scaled_half::Activation dout, x;
    scaled_half::Weight weight;
    float* partial;
    GradientsMemory(const Geometry& g, const Plan& plan, const DweightPlans& dweight, void* base, void* packed_base, const void* dout_data, const void* x_data, const void* w) : scratch(base), packed(packed_base) {
        auto* weight_max = scratch.take_zeroed<unsigned>(plan.problem.C_out);
        workspace = take_workspace(scratch, plan.problem, false);
        dout = take_activation(scratch, plan.problem.s, g.N, g.C_out, 0, 0, dout_data);
        weight = take_weight(scratch, plan, g, weight_max, w);
        x = take_activation(packed, dweight.plain.s, g.N, g.C_in, 0, 0, x_data);
        partial = scratch.take<float>(std::max({dweight::partial_count(dweight.plain.t), dweight::partial_count(dweight.packing.t), dweight.taps.partial_count()}));
    }
};

// dx (and w) or dweight (and x) may be null: not wanted. Where x alone is, `packed` has the copy of it that the forward made.
template <typename Path>
int gradients(const Geometry& g, int dtype, int device, cudaStream_t stream, void* workspace, void* packed, const void* dout, const scaled_half::NormGradient& norm, const void* x, const void* w, void* dx, void* dweight) {
    const Plan& plan = plan_of<Path>(g, Direction::kDInput, device);
    const DweightPlans& dweight_plans = dweight_plans_of<Path>(g, device);
    GradientsMemory memory(g, plan, dweight_plans, workspace, packed, dout, x, w);
    memory.dout.norm = norm;
    RETURN_IF_ERROR(memory.scratch.zero(x ? memory.packed : Scratch(nullptr), stream));
    scaled_half::Weight none = memory.weight;
    none.channels = 0;
    const scaled_half::Weight& weight = dx ? memory.weight : none;
    const auto pack_x = [&] { return x ? scaled_half::pack(memory.x, none, dtype, plan.multiprocessors, stream) : int(cudaSuccess); };
    const auto parameters = [&](const dweight::Problem& p) { return dweight::Parameters{p, memory.x.max, memory.dout.max, memory.partial}; };
    const bool packs = dweight && dweight_plans.packing.t.block_n > 0 && dtype == kFloat32 && !norm.r;
    if constexpr (Path::kHopper) {
        if (packs) {
            RETURN_IF_ERROR(pack_x());
            RETURN_IF_ERROR(Path::pack_and_differentiate(parameters(dweight_plans.packing), memory.x, memory.dout, weight, dweight, stream));
        }
    }
    if (!packs) RETURN_IF_ERROR(scaled_half::pack(memory.dout, weight, dtype, plan.multiprocessors, stream));
    if (dx) RETURN_IF_ERROR(convolve<Path>(plan, memory.dout, memory.weight, memory.workspace, dtype, nullptr, false, dx, {}, stream));
    if (dx && !norm.r) RETURN_IF_ERROR(repair<Direction::kDInput>(plan, g, dtype, memory.dout.max, dout, w, nullptr, false, dx, stream));
    if (!dweight || packs) return cudaSuccess;
    RETURN_IF_ERROR(pack_x());
    if constexpr (Path::kHopper) {
        if (dweight_plans.taps.cycles > 0) return Path::differentiate_taps({dweight_plans.taps, memory.x.max, memory.dout.max, memory.partial}, memory.x, memory.dout, dtype, dweight, stream);
    }
    return Path::differentiate(parameters(dweight_plans.plain), memory.x, memory.dout, dtype, dweight, stream);
}

// Whether tilings fit for both: 1 or 0.
template <typename Path> int gradients_supports(const Geometry& g, int device) {
    return plan_of<Path>(g, Direction::kDInput, device).problem.t.block_n > 0 && dweight_plans_of<Path>(g, device).plain.t.block_n > 0;
}

template <typename Path> GradientsMemory gradients_memory(const Geometry& g, int device) {
    return GradientsMemory(g, plan_of<Path>(g, Direction::kDInput, device), dweight_plans_of<Path>(g, device), nullptr, nullptr, nullptr, nullptr, nullptr);
}

// The same of group_norm(relu(conv_transpose3d(...))), and dgamma, dbeta and dbias, which may be null too: dy, r and its statistics
// (2, N, num_groups) in place of dout.
template <typename Path> int64_t relu_group_norm_gradients_workspace(const Geometry& g, int device) {
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), g.C_out};    // the largest, whatever num_groups is
    const int64_t bytes = gradients_memory<Path>(g, device).scratch.bytes() + group_norm::GradientSums::bytes(shape);
    return ceil_div(bytes, 256) * 256;    // what is behind it is aligned too
}

template <typename Path>
int relu_group_norm_gradients(const Geometry& g, int dtype, int device, cudaStream_t stream, void* workspace, void* packed, const void* dy, const void* r, const double* statistics, const void* gamma,
                              int num_groups, const void* x, const void* w, void* dx, void* dweight, void* dgamma, void* dbeta, void* dbias) {
    if (dtype != kFloat32) return cudaErrorNotSupported;
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), num_groups};
    const group_norm::GradientSums sums(shape, static_cast<uint8_t*>(workspace) + gradients_memory<Path>(g, device).scratch.bytes());
    RETURN_IF_ERROR((group_norm::sum_gradients<float, float>(shape, stream, dy, r, statistics, gamma, sums, dgamma, dbeta, dbias)));
    const scaled_half::NormGradient norm = {r, shape, statistics, statistics + shape.N * num_groups, static_cast<const float*>(gamma), sums.group_means};
    return gradients<Path>(g, dtype, device, stream, workspace, packed, dy, norm, x, w, dx, dweight);
}

}  // namespace conv

// The C functions of a path. packed: memory for the copy of x, or, where x is null, that copy.
#define GRADIENTS_LAUNCHERS(path, Path)                                                                                                                    \
    extern "C" int conv_transpose3d_gradients_supports_##path(const Geometry* g, int device) { return conv::gradients_supports<Path>(*g, device); }        \
    extern "C" int64_t conv_transpose3d_gradients_##path##_workspace(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_gradients_##path##_packed(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).packed.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_gradients_##path##_workspace(const Geometry* g, int, int device) { return conv::relu_group_norm_gradients_workspace<Path>(*g, device); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_gradients_##path##_packed(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).packed.bytes(); } \
    extern "C" int conv_transpose3d_gradients_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* dout, const void* x, const void* w, void* dx, void* dweight) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::gradients<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, dout, {}, x, w, dx, dweight);                \
    }                                                                                                                                                      \
    extern "C" int conv_transpose3d_relu_group_norm_gradients_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* dy, const void* r, const double* statistics, \
                                                                     const void* gamma, int num_groups, const void* x, const void* w, void* dx, void* dweight, void* dgamma, void* dbeta, void* dbias) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::relu_group_norm_gradients<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, dy, r, statistics, gamma, num_groups, x, w, dx, dweight, dgamma, dbeta, dbias); \
    }
'''

_SOURCES['tiling_sm80.h'] = r'''
// The mma.sync convolution's choice among the ways to cut its work (conv_sm80.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace conv_sm80 {

using namespace conv;

constexpr int kSharedHeadBytes = 2560;
constexpr int kMostTapsOfStage = 16, kStageSlots = 3;    // a stage is multiplied, the next one loaded, the one behind it found out
constexpr int kColumnWarps = 4;    // of a block, each with a quarter of the positions
constexpr int kThreads = 32 * kColumnWarps, kBytesAtOnce = 16 * kThreads;    // of a block; that it loads at a time

// Blocks of a multiprocessor, as many as its registers hold.
HOST_DEVICE constexpr int blocks_of(int block_n) { return block_n == 128 ? 4 : block_n == 192 ? 3 : 2; }

// Four blocks on a multiprocessor have too few registers for chunks of 64.
HOST_DEVICE constexpr bool is_built(int block_n, int chunk) { return block_n > 128 || chunk < 64; }

// Rows of a box with the zeros behind it, which rows share, and the bytes of the table that tells where each comes from.
HOST_DEVICE int loaded_rows(const Tiling& t, const StencilAxis& w) { return t.planes * t.box_rows * t.pitch + w.shift[w.taps - 1]; }
HOST_DEVICE int places_bytes(const Tiling& t, const StencilAxis& w) {
    const int at_once = kBytesAtOnce / 2 / t.chunk, rows = (loaded_rows(t, w) + at_once - 1) / at_once * at_once;
    return (rows * 4 + 127) / 128 * 128;
}

// Where the pipeline's stages begin in shared memory, behind the head and the tables.
HOST_DEVICE int stages_begin(const Tiling& t, const StencilAxis& w) { return kSharedHeadBytes + t.table_bytes + places_bytes(t, w); }

// Shared memory of a block: the boxes, and behind the last product, in their place, half of the staged outputs.
inline int64_t shared_bytes(const Tiling& t, const StencilAxis& w) {
    const int64_t boxes = int64_t(t.input_stages) * t.input_bytes, staged = t.buffer_bytes / 2;
    return stages_begin(t, w) + (boxes > staged ? boxes : staged);
}

// Blocks of a multiprocessor.
inline int resident_blocks(const Tiling& t, const StencilAxis& w, int64_t most_shared) { return int(std::min<int64_t>(blocks_of(t.block_n), blocks_that_fit(shared_bytes(t, w), most_shared))); }

// Cycles, fitted to the times of 21 layers and 558 tilings (NOTES.md): of a tile from begin to end, what a block takes by itself for products, taps, boxes, less where another one
// is being multiplied, and pieces of outputs that are staged; and what the blocks of a multiprocessor share, the ways of weights and boxes.
inline double time_of(const Tiling& t, const Stencil& s, int64_t samples, int64_t channels, int blocks, int multiprocessors) {
    const double part = largest_part(t, s), steps = steps_of(t, s) * part, boxes = boxes_of(t, s) * part;
    const double pieces = t.pairs ? 0 : t.rows.octets * 8.0 * region_planes(t, s) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1));
    const double by_itself = 0.32 * steps * t.block_n + 147 * steps / (t.chunk / 16) + 305 * boxes / t.input_stages + (t.contiguous ? 48 : 71) * pieces + 16200;
    const double shared_units = 55 * steps + 0.015 * boxes * t.box_bytes();
    const int64_t at_once = int64_t(multiprocessors) * blocks;
    const double waves = t.tiles < 4 * at_once ? double(ceil_div(t.tiles, at_once)) : double(t.tiles) / at_once + 0.5;
    const double added_bytes = 4.0 * t.k_parts * samples * channels * s.axis[0].out * s.axis[1].out * s.axis[2].out;    // of the parts
    return (by_itself + blocks * shared_units) * waves + (t.k_parts == 1 ? 0 : 2400 + added_bytes / 4000);
}

// The tiling of least estimated time, or one of block_n 0 where none fits. groups: of the split, or 1. most_shared: bytes that a block can have.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int64_t most_shared) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    for (int packing = 0; packing < 3; packing++)
    for (int block_n : {256, 192, 128})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (int chunk : {64, 32, 16})
    for (int input_stages : {1, 2})
    for (bool joins_planes : {false, true}) {
        if (!is_built(block_n, chunk)) continue;
        Tiling t = {};
        t.warpgroups = 1, t.queues = 1, t.planes = t.run_planes = 1;
        t.block_n = block_n, t.taps_per_box = taps_per_box, t.input_stages = input_stages, t.column_warps = kColumnWarps;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (8 % t.rows.packed_phases != 0 || (t.rows.packed_phases == 8 && packed_phases(t, s, 0) != 2)) continue;    // half a row tile has whole regions
        t.rows.octets = 8 / t.rows.packed_phases;
        if (!set_channels(t, s, source_channels, channels, groups) || t.phase_channels % chunk != 0) continue;
        t.chunk = chunk;
        t.item_taps = t.items = 1;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pairs = w.phases == 1 && w.out % 2 == 0 && t.tile_w % 2 == 0;
        t.pitch = round_up(box_pitch(w, t.tile_w, strips), t.pairs ? 2 : 1);
        if (!cut_runs(t, s, false) || (joins_planes && !join_planes(t, s, 1))) continue;
        lay_out_regions(t, s, t.rows.octets * 8, false);    // halves of all rows take turns
        const int halo_w = w.shift[w.taps - 1], halo_h = taps_per_box == 1 ? 0 : h.shift[h.taps - 1], row_bytes = 2 * chunk;
        // Rows of shared memory that a box's stage has: positions that are no outputs read beyond the box.
        int64_t first = 0;    // of a run, at most
        for (int64_t begin = 0, group = int64_t(t.tile_runs()) * t.run; begin < int64_t(t.tile_w) * h.positions; begin += group) {
            const int64_t last = begin + group - t.run, row = (last / t.tile_w - begin / t.tile_w) * t.pitch + last % t.tile_w;
            first = std::max({first, begin % t.tile_w, row});
        }
        const int64_t reach = first + block_n + halo_h * t.pitch + halo_w;
        const int64_t loaded = loaded_rows(t, w);
        t.input_bytes = round_up((reach > loaded ? reach : loaded) * row_bytes, kBytesAtOnce);
        t.fragments = true;
        const int blocks = resident_blocks(t, w, most_shared);
        for (int k_parts : {1, 2, 3, 4, 5, 6, 8}) {
            if (blocks < 1 || !cut_channels(t, s, k_parts) || !count_tiles(t, s, samples)) continue;
            if (k_parts > 1 && (groups > 1 || t.tiles > 2 * k_parts * blocks * multiprocessors)) break;    // there are enough tiles
            const double time = time_of(t, s, samples, channels, blocks, multiprocessors);
            if (best.block_n == 0 || time < best.cycles) best = t, best.cycles = time;
        }
    }
    return with_divisors(best);
}

}  // namespace conv_sm80
'''

_SOURCES['conv_epilogue_sm80.cuh'] = r'''
// The epilogue of the mma.sync convolution (conv_sm80.cuh). Where neighbouring positions are aligned pairs of outputs, each warp stores its own from its registers; else they are staged where the pipeline's
// stages were, half a row tile at a time, and whole warps store rows of memory. Fused: it leaves the moments of relu(out), a second kernel makes statistics of them.
#pragma once

#include "conv_epilogue.cuh"
#include "tiling_sm80.h"

namespace conv_sm80 {

// What a lane needs of a row of a row tile: its factor and bias, where it is staged, or how many output planes it is behind the run's first in memory (-1: it is nobody's output), and its phase of (H, W).
struct Row { float scale, bias; int region, phase_hw; };
constexpr int kMostPhases = 8;         // of (H, W) in a row tile

struct Epilogue {
    Row rows[kRows];
    int moments[kRows];                // where they go
    float2 counts[kColumnWarps][kMostPhases];    // of a warp's outputs, and 1 / count
    int4 table_key;                    // what the table was made for
};

// Whether outputs are stored from registers.
__device__ __forceinline__ bool stores_pairs(const Parameters& a) { return a.p.t.pairs && a.dtype == kFloat32; }

// Element (granule, j, e) of a lane: row granule * 8 + lane / 4 of the row tile, position j * 8 + lane % 4 * 2 + e of the warp's.
template <int kColumns> struct Sums {
    float v[4][kColumns / 8][4];
    __device__ __forceinline__ float& at(int granule, int j, int e) { return v[granule / 2][j][granule % 2 * 2 + e]; }
};

// The regions of the first and the second half of a row tile's granules, of a run of one plane. Where the halves are phases of D, they take turns.
__device__ __forceinline__ bool halves_are_phases(const Problem& p) { return p.t.rows.octets == 1 && packed_phases(p.t, p.s, 0) == 2; }
__device__ __forceinline__ int slot_of(const Problem& p, int region) { return halves_are_phases(p) ? region / 2 : region & (p.t.rows.octets * 4 * packed_phases(p.t, p.s, 0) - 1); }

// Threads 0 to 63: what their rows are. Phases' numbers are powers of two (choose_tiling).
__device__ __forceinline__ void find_row(const Parameters& a, const Run& run, Epilogue& shared) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const int log_d = __ffs(packed_phases(t, p.s, 0)) - 1, log_phases = __ffs(t.rows.packed_phases) - 1, log_hw = log_phases - log_d, granule = threadIdx.x / 8;
    const int phase = granule & (t.rows.packed_phases - 1), packed_d = phase >> log_hw, channel = (granule >> log_phases) * 8 + threadIdx.x % 8, region = (channel << log_d) + packed_d;
    const bool live = run.channel0 + channel < p.C_out && has_outputs(t, run, packed_d);
    const int slot = t.run_planes > 1 ? channel % (t.rows.octets * 4) * t.run_planes : slot_of(p, region);
    const int alignment = (run.alignment + alignment_of_region(p, channel, packed_d)) & (t.staging_unit - 1);
    shared.rows[threadIdx.x] = {live ? scaled_half::power_of_two(-scaled_half::shift_of(a.weight_max[run.channel0 + channel])) : 0.0f, live && a.bias ? load_as_float(a.bias, a.dtype, run.channel0 + channel) : 0.0f,
                              !live ? -1 : stores_pairs(a) ? channel * p.s.axis[0].out + packed_d : slot * t.region_stride + alignment, phase & ((1 << log_hw) - 1)};
    shared.moments[threadIdx.x] = phase * t.channels() + run.channel0 + channel;
}

// Counts a warp's outputs.
template <int kColumns> __device__ __forceinline__ void count_outputs(const int* table, int phases_hw, float2* counts) {
    const int lane = threadIdx.x % 32;
    for (int phase = 0; phase < phases_hw; phase++, table += kColumns * kColumnWarps) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < kColumns; i += 32) count += __popc(__ballot_sync(~0u, i + lane < kColumns && table[min(i + lane, kColumns - 1)] >= 0));
        if (lane == 0) counts[phase] = make_float2(count, count > 0 ? 1.0f / count : 0.0f);
    }
}

// Calls f(value, place) for the sums of a lane's row `granule`; place: of the staged output, or negative. Some places at a time are loaded in advance: no load moves in front of a
// store to shared memory.
template <int kColumns, typename F> __device__ __forceinline__ void for_each_output(Sums<kColumns>& sums, int granule, const int* table, F f) {
    constexpr int kAtOnce = kColumns / 16;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += kAtOnce) {
        int2 places[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) places[j] = *reinterpret_cast<const int2*>(table + (first + j) * 8);
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) f(sums.at(granule, first + j, 0), places[j].x), f(sums.at(granule, first + j, 1), places[j].y);
    }
}

// Leaves the moments of a lane's row `granule`, given the sum of its outputs: the mean, and the sum of squared deviations.
template <int kColumns> __device__ __forceinline__ void leave_moments(const Epilogue& shared, const Row& row, int granule, const int* places, float sum, float2* moments, Sums<kColumns>& sums) {
    const int lane = threadIdx.x % 32;
    const float mean = quad_sum(sum) * shared.counts[threadIdx.x / 32][row.phase_hw].y;
    float squares = 0;
    for_each_output(sums, granule, places, [&](float v, int place) {
        if (place >= 0) squares = fmaf(v - mean, v - mean, squares);
    });
    squares = quad_sum(squares);
    if (lane % 4 == 0 && row.region >= 0) moments[shared.moments[granule * 8 + lane / 4]] = make_float2(mean, squares);
}

// Scales half of a lane's rows back, adds the bias, applies ReLU and stages them; moments: of the warp's outputs of each row, or null.
template <int kColumns, int kHalf>
__device__ __forceinline__ void stage(const Epilogue& shared, const int* table, float* staged, float first_scale, float lowest, float2* moments, Sums<kColumns>& sums) {
#pragma unroll
    for (int granule = kHalf * 4; granule < kHalf * 4 + 4; granule++) {
        const Row row = shared.rows[granule * 8 + threadIdx.x % 32 / 4];
        const int* places = table + row.phase_hw * (kColumns * kColumnWarps);
        float* region = staged + row.region;
        float sum = 0;
        for_each_output(sums, granule, places, [&](float& v, int place) {
            v = max_nan(fmaf(v * first_scale, row.scale, row.bias), lowest);
            if (row.region >= 0 && place >= 0) region[place] = v;
            if (place >= 0) sum += v;
        });
        if (moments) leave_moments(shared, row, granule, places, sum, moments, sums);
    }
}

// The same of all rows, which it stores, in pairs. origin: the run's first output.
template <int kColumns>
__device__ __forceinline__ void store_pairs(const Epilogue& shared, const int* table, float* origin, int64_t area, float first_scale, float lowest, float2* moments, Sums<kColumns>& sums) {
#pragma unroll
    for (int granule = 0; granule < 8; granule++) {
        const Row row = shared.rows[granule * 8 + threadIdx.x % 32 / 4];
        const int* places = table + row.phase_hw * (kColumns * kColumnWarps);
        float* const out = origin + row.region * area;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            const int place = places[j * 8];
            float &v0 = sums.at(granule, j, 0), &v1 = sums.at(granule, j, 1);
            v0 = max_nan(fmaf(v0 * first_scale, row.scale, row.bias), lowest), v1 = max_nan(fmaf(v1 * first_scale, row.scale, row.bias), lowest);
            if (row.region >= 0 && place >= 0) *reinterpret_cast<float2*>(out + place) = make_float2(v0, v1);
            if (place >= 0) sum += v0 + v1;
        }
        if (moments) leave_moments(shared, row, granule, places, sum, moments, sums);
    }
}

template <typename T> __device__ constexpr int type_of() { return std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, __half> ? kFloat16 : kBFloat16; }

// A warp: stores `count` neighbours from out on; vectors: four at a time, as they are staged like they are aligned in memory.
template <typename T> __device__ __forceinline__ void store_row(T* out, int alignment, const float* from, int count, bool vectors) {
    const int lane = threadIdx.x % 32;
    if (vectors) {
        const int head = min(count, -alignment & 3), body = (count - head) & ~3, tail = count - head - body;
        const int own = lane < 4 ? lane : head + body + lane - 4;    // the lanes from 4 on store what is behind the vectors
        if (lane < head || unsigned(lane - 4) < unsigned(tail)) out[own] = from_acc<T>(from[own]);
#pragma unroll 2
        for (int k = lane * 4; k < body; k += 128) store_as(out + head + k, type_of<T>(), 0, *reinterpret_cast<const float4*>(from + head + k));
    } else {
#pragma unroll 1
        for (int k = lane; k < count; k += 32) out[k] = from_acc<T>(from[k]);
    }
}

// A warp: stores every fourth of the regions that are staged.
template <typename T> __device__ __forceinline__ void store_half(const Parameters& a, const Tile& tile, const Epilogue& shared, const float* staged, int half) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[0];
    const int warp = threadIdx.x / 32, phases_d = packed_phases(t, p.s, 0), log_d = __ffs(phases_d) - 1, phases_hw = t.rows.packed_phases >> log_d, out_w = p.s.axis[2].out, regions = regions_of(p, run);
    const int plane_step = region_plane_step(t, p.s);
    const bool turns = halves_are_phases(p), several = t.run_planes > 1;
    const int first = turns ? half + 2 * warp : half * regions / 2 + warp, end = turns ? regions : (half + 1) * regions / 2, step = turns ? 8 : 4;
    const int count = t.contiguous ? contiguous_count(p, run) : run.ow_end - run.ow0, rows = t.contiguous ? 1 : run.rows * packed_phases(t, p.s, 1);
    const int row_step = t.packed[1] ? 1 : p.s.axis[1].phases, oh_end = t.packed[1] ? run.oh_end : p.s.axis[1].out, row_pitch = staged_row(p), out_d = p.s.axis[0].out;
    const int64_t area = int64_t(p.s.axis[1].out) * out_w, origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0);
#pragma unroll 1
    for (int region = first; region < end; region += step) {
        const auto [channel, plane] = place_of_region(p, region);
        int place = shared.rows[((channel >> 3 << log_d) + (several ? 0 : plane)) * phases_hw * 8 + channel % 8].region;
        if (place < 0 || !(run.live >> plane & 1)) continue;
        if (several) place += plane * t.region_stride;
        const int64_t at = origin + (channel * out_d + plane * plane_step) * area;
#pragma unroll 1
        for (int row = 0, oh = run.oh0; row < rows; row++, oh += row_step) {
            const int64_t row_at = at + int64_t(row * row_step) * out_w;
            if (oh >= 0 && oh < oh_end) store_row(static_cast<T*>(a.out) + row_at, int(row_at), staged + place + row * row_pitch, count, t.bulk);
        }
    }
}

// All threads, in advance: what finish() needs to know of a tile, when the tile before is finished with. True where the table is the one of the tile before. There must be a barrier between the two.
template <int kColumns> __device__ __forceinline__ bool prepare_finish(const Parameters& a, const Tile& tile, Epilogue& shared, int* table) {
    const Run& run = tile.run[0];
    if (threadIdx.x < kRows) find_row(a, run, shared);
    const bool same = same_key(table_key(a.p, tile, run), shared.table_key);
    if (!same) fill_table<kColumns * kColumnWarps>(a.p, tile, run, [&] { return table; }, stores_pairs(a));
    return same;
}

// Stores a tile's outputs, and leaves the moments where they are wanted.
template <int kColumns> __device__ __forceinline__ void finish(const Parameters& a, const Tile& tile, Epilogue& shared, bool same_table, int* table, float* staged, Sums<kColumns>& sums) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[0];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, phases_hw = packed_phases(t, p.s, 1) * p.s.axis[2].phases;
    const float first_scale = scaled_half::power_of_two(-scaled_half::shift_of(a.activation_max[tile.sample])), lowest = a.apply_relu ? 0.0f : -INFINITY;
    const int* own_table = table + warp * kColumns;
    float2* moments = nullptr;
    if (a.workspace.sets.moments) {
        if (!same_table) count_outputs<kColumns>(own_table, phases_hw, shared.counts[warp]);
        __syncwarp();
        const int64_t set = (index_of_run(p, tile, 0) * kColumnWarps + warp) * p.s.phases() + run.outer * t.rows.packed_phases;
        const int phases_d = packed_phases(t, p.s, 0);
        if (lane < t.rows.packed_phases && has_outputs(t, run, lane * phases_d / t.rows.packed_phases)) a.workspace.sets.counts[set + lane] = shared.counts[warp][lane % phases_hw].x;
        moments = a.workspace.sets.moments + set * t.channels();
    }
    if (threadIdx.x == 0) shared.table_key = table_key(p, tile, run);
    if (stores_pairs(a)) {
        const int64_t origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0);
        store_pairs(shared, own_table + lane % 4 * 2, static_cast<float*>(a.out) + origin, int64_t(p.s.axis[1].out) * p.s.axis[2].out, first_scale, lowest, moments, sums);
        return;
    }
    __syncthreads();    // the stages are not read any more
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        if (half == 0) stage<kColumns, 0>(shared, own_table + lane % 4 * 2, staged, first_scale, lowest, moments, sums);
        else stage<kColumns, 1>(shared, own_table + lane % 4 * 2, staged, first_scale, lowest, moments, sums);
        __syncthreads();
        if (a.dtype == kFloat32) store_half<float>(a, tile, shared, staged, half);
        else if (a.dtype == kFloat16) store_half<__half>(a, tile, shared, staged, half);
        else store_half<__nv_bfloat16>(a, tile, shared, staged, half);
        __syncthreads();
    }
}

}  // namespace conv_sm80
'''

_SOURCES['conv_sm80.cuh'] = r'''
// Convolution of stride 1 by mma.sync, on any tensor core from sm_80 up: what conv_sm90.cuh does, cut by the same tiles and with
// the same operands, where there are no wgmma, TMA and warps that only load.
//
// A block is four warps, each with all 64 rows of a tile and a quarter of its positions. Boxes of the source come by cp.async; weights lie in memory as the
// lanes hold them (swizzle.h) and come straight from the L1 cache, which the four warps share, so that between two boxes no warp waits for another. A warp
// finds out what comes next, all load it. Two to four blocks share a multiprocessor, so that the tensor cores have products of one while another loads a box, waits, or stores its outputs.
//
// What counts is the number of instructions: few warps issue one every six cycles.
#pragma once

#include "conv_epilogue_sm80.cuh"
#include "swizzle.h"

namespace conv_sm80 {

struct Operands {
    Parameters a;
    const __half *x, *w;            // packed
    int x_pitch, w_pitch;           // elements of a position, of a row
};

// ------------------------------------------------------------------------------------------------------------ Walk

// What is multiplied between two barriers: taps of a box.
struct Stage {
    int count;                         // of taps; 0: there are no more stages
    bool opens_box;
    int plane, source_row, channel;    // of the box
    int2 taps[kMostTapsOfStage + 1];   // rows of shared memory by which one is shifted in its box; its weights' first vector of 16 bytes
};

struct SharedHead {
    Tile tile;
    Epilogue epilogue;
    Cursor at;                         // of the walk over the tile's boxes: in shared memory, since a warp walks and all need registers
    int tap;                           // the next one of the box
    int2 placed[kColumnWarps];         // the box whose places each warp found out: its first row, and its plane where it has several
    Stage stages[kStageSlots];
    __device__ __forceinline__ Stage& stage(int index) { return stages[unsigned(index) % kStageSlots]; }
};
static_assert(sizeof(SharedHead) <= kSharedHeadBytes, "the tables begin behind the head");

// A warp: finds out a tile's stage, the one behind the one before.
__device__ __forceinline__ void find_stage(const Operands& o, SharedHead& head, int index) {
    const Problem& p = o.a.p;
    const int lane = threadIdx.x % 32;
    Stage& stage = head.stage(index);
    Cursor at = index == 0 ? Cursor(p, head.tile) : head.at;
    at.p = &p;
    int tap = index == 0 ? 0 : head.tap;
    if (index == 0 || tap == BoxTaps(at).count) {
        if (head.tile.empty || !at.next_box()) {
            if (lane == 0) stage.count = 0;
            return;
        }
        tap = 0;
    }
    const BoxTaps taps(at);
    const int count = min(kMostTapsOfStage, taps.count - tap);
    if (lane < count) {
        const BoxTaps::Tap own = taps[tap + lane];
        stage.taps[lane] = make_int2(own.rows, ((own.tap * p.t.row_tiles + head.tile.run[0].row_tile) * (o.w_pitch / 16) + own.column / 16) * (4 * 32));
    }
    __syncwarp();
    if (lane != 0) return;
    stage.count = count, stage.opens_box = tap == 0, stage.plane = at.plane(), stage.source_row = at.source_row(), stage.channel = at.c;
    head.at = at, head.tap = tap + count;
}

// --------------------------------------------------------------------------------------------------------- Loading

// All threads: loads boxes.
template <int kChunk> struct Loader {
    static constexpr int kRowBytes = kChunk * 2, kPieces = kRowBytes / 16, kAtOnce = kThreads / kPieces;    // rows that the block loads at a time
    static_assert(kAtOnce % 8 == 0, "those are swizzled alike");
    const Operands& o;
    SharedHead& head;
    int* const places;              // of a box's rows in a plane of the source, in vectors of 16 bytes, or -1: each warp finds out those of the rows that it loads

    // A warp: finds out the places, unless they are those of the box before.
    __device__ __forceinline__ void find_places(const Stage& from) {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        constexpr int kOwn = kAtOnce / kColumnWarps;    // rows of a warp
        const int warp = threadIdx.x / 32, count = passes() * kOwn, w0 = aw.first + head.tile.w0 - aw.shift[aw.taps - 1];
        const int2 key = make_int2(from.source_row, o.a.p.t.planes > 1 ? from.plane : 0), last = head.placed[warp];
        if (key.x == last.x && key.y == last.y) return;
        __syncwarp();
        if (threadIdx.x % 32 == 0) head.placed[warp] = key;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < count; i += 32) {
            const int row = i / kOwn * kAtOnce + warp * kOwn + i % kOwn;
            int h = row;
            const int w = w0 + o.a.p.t.by_pitch.take(h), plane = o.a.p.t.planes > 1 ? h / o.a.p.t.box_rows : 0;
            h += from.source_row - plane * o.a.p.t.box_rows;
            const bool inside = unsigned(h) < unsigned(ah.sources) && unsigned(w) < unsigned(aw.sources) && row < loaded_rows(o.a.p.t, aw) && (o.a.p.t.planes == 1 || unsigned(from.plane + plane) < unsigned(ad.sources));
            places[row] = inside ? ((plane * ah.sources + h) * aw.sources + w) * (o.x_pitch / 8) : -1;
        }
        __syncwarp();
    }
    __device__ __forceinline__ int passes() const { return (loaded_rows(o.a.p.t, o.a.p.s.axis[2]) + kAtOnce - 1) / kAtOnce; }

    // The box of a stage. Behind a box there are the zeros that rows share.
    __device__ __forceinline__ void load_box(const Stage& from, uint32_t box) {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        find_places(from);
        const char* plane = reinterpret_cast<const char*>(o.x + (int64_t(head.tile.sample) * ad.sources + from.plane) * ah.sources * aw.sources * o.x_pitch + head.tile.source_channel + from.channel + threadIdx.x % kPieces * 8);
        const int* row = places + threadIdx.x / kPieces;
        uint32_t to = box + swizzled(threadIdx.x / kPieces, threadIdx.x % kPieces, kRowBytes);
#pragma unroll 1
        for (int left = passes(); left > 0; left -= 4, row += 4 * kAtOnce, to += 4 * kBytesAtOnce) {
            int at[4];    // loaded in advance: no load moves in front of a copy
#pragma unroll
            for (int i = 0; i < 4; i++) at[i] = i < left ? row[i * kAtOnce] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < left) cp_async_16(to + i * kBytesAtOnce, plane + int64_t(at[i]) * 16, at[i] >= 0);
        }
    }
};

// -------------------------------------------------------------------------------------------------------- Products

// Fragments of 16 rows of weights that are on their way while one is multiplied, as many as there are registers for.
HOST_DEVICE constexpr int ahead_of(int columns) { return columns == 32 ? 1 : 3; }

template <int kAhead> struct Fragments { uint32_t v[kAhead + 1][4]; };    // fragment i is number i % (kAhead + 1)

__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const uint4* from) {
    const uint4 v = *from;
    fragment[0] = v.x, fragment[1] = v.y, fragment[2] = v.z, fragment[3] = v.w;
}

// Products of a stage: 64 rows of weights, kColumns positions from row `first_row` of the box on. weights: the lane's own; a: the first tap's first fragments,
// and then those at `after`. Positions are loaded ahead of the products, 16 channels at a time; in the end once more, in vain.
template <int kColumns, int kChunk, int kAhead>
__device__ __forceinline__ void multiply(const Stage& stage, const uint4* weights, int after, uint32_t box, int first_row, Fragments<kAhead>& a, Sums<kColumns>& sums) {
    constexpr int kRowBytes = kChunk * 2, kSteps = kChunk / 16, kPairs = kColumns / 16, kFragments = kSteps * 4;
    static_assert(kFragments % (kAhead + 1) == 0, "taps begin with fragment 0");
    const int lane = threadIdx.x % 32, count = stage.count;
    // A step of 16 channels is two pieces on, which only the swizzle's bits tell of; 16 rows on, the swizzle is the same.
    const auto place_of_row = [&](int row) { return box + swizzled(first_row + row + lane / 16 * 8 + lane % 8, lane / 8 % 2, kRowBytes); };
    uint32_t b[2][kPairs][4], b_at = place_of_row(stage.taps[0].x);
    const uint4* a_at = weights + stage.taps[0].y;
#pragma unroll
    for (int j = 0; j < kPairs; j++) ldmatrix_x4(b[0][j], b_at + j * 16 * kRowBytes);
#pragma unroll 1
    for (int tap = 1; tap <= count; tap++) {
        const int2 next = stage.taps[tap];    // behind the last one, any
        const uint4* const next_a = weights + (tap < count ? next.y : after);
        const uint32_t next_b = tap < count ? place_of_row(next.x) : b_at;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const uint32_t b_ahead = step + 1 < kSteps ? b_at ^ (step + 1) << 5 : next_b;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const int fragment = step * 4 + m, ahead = fragment + kAhead;
                load_fragment(a.v[ahead % (kAhead + 1)], ahead < kFragments ? a_at + ahead * 32 : next_a + (ahead - kFragments) * 32);
                if (m < kPairs) ldmatrix_x4(b[(step + 1) % 2][m], b_ahead + m * 16 * kRowBytes);
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(sums.v[m][j], a.v[fragment % (kAhead + 1)], b[step % 2][j / 2][j % 2 * 2], b[step % 2][j / 2][j % 2 * 2 + 1]);
            }
        }
        if (kSteps % 2 == 1) {
#pragma unroll
            for (int j = 0; j < kPairs; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) b[0][j][i] = b[1][j][i];
        }
        a_at = next_a, b_at = next_b;
    }
}

// ---------------------------------------------------------------------------------------------------------- Kernel

template <int kBlockN, int kChunk>
__global__ void __launch_bounds__(kThreads, blocks_of(kBlockN)) conv_kernel(const __grid_constant__ Operands o) {
    wait_for_previous_kernel();
    extern __shared__ __align__(1024) uint8_t base[];
    const Problem& p = o.a.p;
    const Tiling& t = p.t;
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    int* table = reinterpret_cast<int*>(base + kSharedHeadBytes);
    int* places = reinterpret_cast<int*>(base + kSharedHeadBytes + t.table_bytes);
    const uint32_t boxes = shared_address(base + stages_begin(t, p.s.axis[2]));
    constexpr int kColumns = kBlockN / kColumnWarps, kAhead = ahead_of(kColumns);
    const int warp = threadIdx.x / 32;
    const uint4* const weights = reinterpret_cast<const uint4*>(o.w) + threadIdx.x % 32;
    if (threadIdx.x == 0) head.epilogue.table_key = make_int4(-1, 0, 0, 0);
    for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) locate(p, index, head.tile);
        if (threadIdx.x < kColumnWarps) head.placed[threadIdx.x] = make_int2(INT_MIN, 0);
        __syncwarp();
        if (warp == 0) find_stage(o, head, 0);
        __syncthreads();
        Sums<kColumns> sums = {};
        Fragments<kAhead> first;       // of the next stage
        Loader<kChunk> loader = {o, head, places};
        bool more = head.stage(0).count > 0;
        if (more) {
            loader.load_box(head.stage(0), boxes);
#pragma unroll
            for (int i = 0; i < kAhead; i++) load_fragment(first.v[i], weights + head.stage(0).taps[0].y + i * 32);
            if (warp == 1) find_stage(o, head, 1);
        }
        const bool same_table = prepare_finish<kColumns>(o.a, head.tile, head.epilogue, table);
        if (!more) __syncthreads();    // as there is in each of the rounds below
        uint32_t box = boxes;          // that is multiplied
        for (int i = 0; more; i++) {
            cp_async_wait_all();
            __syncthreads();           // stage i is there, stage i + 1 found out, and stage i - 1 multiplied
            const Stage &stage = head.stage(i), &next = head.stage(i + 1);
            more = next.count > 0;
            const bool opens_box = more && next.opens_box, waits = opens_box && t.input_stages == 1;    // for this box's products
            const uint32_t next_box = !opens_box || waits ? box : 2 * boxes + t.input_bytes - box;
            if (opens_box && !waits) loader.load_box(next, next_box);
            if (more && warp == (i + 2) % kColumnWarps) find_stage(o, head, i + 2);    // warps take turns
            multiply<kColumns, kChunk>(stage, weights, more ? next.taps[0].y : stage.taps[0].y, box, head.tile.run[0].b_row + warp * kColumns, first, sums);
            box = next_box;
            if (waits) {
                __syncthreads();
                loader.load_box(next, box);
            }
        }
        finish<kColumns>(o.a, head.tile, head.epilogue, same_table, table, reinterpret_cast<float*>(base + stages_begin(t, p.s.axis[2])), sums);
    }
}

}  // namespace conv_sm80
'''

_SOURCES['conv_launch_sm80.cuh'] = r'''
// The mma.sync convolution's launch.
#pragma once

#include "conv_plan.cuh"
#include "conv_sm80.cuh"

namespace conv_sm80 {

template <int kBlockN, int kChunk> int launch_conv(const Operands& o, int most_blocks, cudaStream_t stream) {
    const Tiling& t = o.a.p.t;
    return launch_with_shared(conv_kernel<kBlockN, kChunk>, std::min(t.tiles, most_blocks), kThreads, shared_bytes(t, o.a.p.s.axis[2]), stream, o);
}

// The launches of the tensor cores from sm_80 up (conv_plan.cuh).
struct Path {
    static Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int device) {
        return conv_sm80::choose_tiling(s, samples, source_channels, channels, groups, multiprocessors, block_shared_bytes(device));
    }

    static int normalizing_blocks(const Plan&, const group_norm::Shape&, int, int, const void*, const void*) { return 0; }
    // a.out = the convolution of packed operands, or the parts of it, and its moments where there is room for them.
    static int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
        const Problem& p = a.p;
        const Operands o = {a, source.copy, weight.copy, int(source.phase_channels) * source.phases(), p.t.C_pad * p.t.products};
        int device = 0;
        RETURN_IF_ERROR(cudaGetDevice(&device));
        const int most_blocks = multiprocessors * resident_blocks(p.t, p.s.axis[2], block_shared_bytes(device));
        const auto launch_chunk = [&](auto chunk) {
            constexpr int kChunk = decltype(chunk)::value;
            if constexpr (is_built(128, kChunk))
                if (p.t.block_n == 128) return launch_conv<128, kChunk>(o, most_blocks, stream);
            return p.t.block_n == 256 ? launch_conv<256, kChunk>(o, most_blocks, stream) : launch_conv<192, kChunk>(o, most_blocks, stream);
        };
        return p.t.chunk == 64 ? launch_chunk(std::integral_constant<int, 64>{}) : p.t.chunk == 32 ? launch_chunk(std::integral_constant<int, 32>{}) : launch_chunk(std::integral_constant<int, 16>{});
    }
};

}  // namespace conv_sm80
'''

_SOURCES['conv_transpose3d_sm80.cu'] = r'''
// Transposed convolution on the tensor cores from sm_80 up: mma.sync, cp.async.

#include "conv_launch_sm80.cuh"
#include "conv_transpose3d_forward.cuh"

FORWARD_LAUNCHERS(sm80, conv_sm80::Path)
'''

_SOURCES['dweight_sm80.cuh'] = r'''
// dweight.cuh by mma.sync, from sm_80 up.
//
// A block is 3 warpgroups, which share x and dout and the work as in dweight_sm90.cuh. Each of a warpgroup's four warps has all of its 64 rows and a quarter of GEMM_N. A block of the grid is one group of taps and
// channels and one part of GEMM_K. All threads load, by cp.async through a ring of stages; dout has zeros between its rows and behind
// them, where x has its halo or what was there before.
#pragma once

#include "dweight.cuh"
#include "ptx_sm80.cuh"
#include "swizzle.h"

namespace dweight_sm80 {

using namespace dweight;

constexpr int kThreads = 128 * kConsumers;
constexpr int kColumnWarps = 4;

struct Operands {
    Parameters a;
    const __half *x, *dout;         // packed
    int x_pitch, dout_pitch;        // elements of a position
};

// What is loaded of a plane: of positions inside of h_end and w_end, channels from `from` on. width: of the plane; pitch: elements from position to position.
struct Plane { const __half* from; int pitch, width, h_end, w_end; };

// All threads: loads rows of shared memory, row_bytes each, `box_pitch` positions of each row of the plane from (h, w) on; zeros outside.
__device__ __forceinline__ void load_rows(uint32_t to, const Plane& plane, int h, int w, int rows, int box_pitch, int row_bytes) {
    const int pieces = row_bytes / 16, at_once = kThreads / pieces, row = threadIdx.x / pieces, piece = threadIdx.x % pieces, step_h = at_once / box_pitch, step_w = at_once % box_pitch;
    const int w_wrap = w + box_pitch;
    const __half* from = plane.from + piece * 8;
    to += swizzled(row, piece, row_bytes), h += row / box_pitch, w += row % box_pitch;
#pragma unroll 2
    for (int left = rows - row; left > 0; left -= at_once) {
        const bool inside = unsigned(h) < unsigned(plane.h_end) && unsigned(w) < unsigned(plane.w_end);
        cp_async_16(to, from + (inside ? int64_t(h * plane.width + w) * plane.pitch : 0), inside);
        to += kThreads * 16, h += step_h, w += step_w;    // as many rows on, the swizzle is the same
        if (w >= w_wrap) w -= box_pitch, h++;
    }
}

__device__ __forceinline__ void load_stage(const Operands& o, const Group& g, const Box& b, uint32_t stage) {
    const Problem& p = o.a.p;
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    for (int j = 0; j < x_boxes_of(t, g); j++) {
        const BoxOfX box = box_of_x(t, g, j);
        const int d = ad.first + b.d - ad.shift[box.td];    // outside of x, with a joint group: zeros
        const bool inside = d >= 0 && d < ad.sources;
        const __half* x = o.x + (int64_t(b.n) * ad.sources + (inside ? d : 0)) * ah.sources * aw.sources * o.x_pitch + box.chunk * t.chunk;
        load_rows(stage + t.dout_boxes * t.dout_bytes + j * t.x_bytes, {x, o.x_pitch, aw.sources, inside ? ah.sources : 0, aw.sources}, first_row(p, g) + b.h0, first_column(p) + b.w0, t.box_rows * t.pitch, t.pitch, t.chunk * 2);
    }
    const __half* dout = o.dout + (int64_t(b.n) * ad.positions + b.d) * ah.positions * aw.positions * o.dout_pitch;
    for (int j = 0; j < dout_boxes_of(t, g); j++) {
        const int channel = (g.m + j) * kRows, piece = threadIdx.x % (kRows / 8) * 8;
        const int h_end = channel + piece < o.dout_pitch ? min(ah.positions, b.h0 + t.rows) : 0;
        load_rows(stage + j * t.dout_bytes, {dout + channel, o.dout_pitch, aw.positions, h_end, min(aw.positions, b.w0 + t.tile_w)}, b.h0, b.w0, t.steps * 16, t.pitch, kRows * 2);
    }
}

// --------------------------------------------------------------------------------------------------------- Kernel

// Grid: (group, split), groups fastest, so that the blocks which read the same boxes run together.
template <int kBlockN, int kItems> __global__ void __launch_bounds__(kThreads, 1) dweight_kernel(const __grid_constant__ Operands o) {
    wait_for_previous_kernel();
    extern __shared__ __align__(1024) uint8_t stages[];
    const Parameters& a = o.a;
    const Tiling& t = a.p.t;
    const int index = blockIdx.x % t.groups, split = blockIdx.x / t.groups;
    const Group g(t, a.p.s, index);
    if (!is_live(a.p, g)) return;
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
    __syncthreads();

    const Boxes boxes(a.p, g);
    const int begin = boxes.begin_of(t, split), end = boxes.begin_of(t, split + 1);
    const int consumer = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int items = items_of(a.p, g, consumer);

    // Where this lane's rows of 8 x 8 matrices begin in a stage: 8 positions, 8 rows of GEMM_M or columns of GEMM_N.
    constexpr int kColumns = kBlockN / kColumnWarps;
    const int row_bytes = t.chunk * 2, matrix = lane / 8;
    uint32_t dout_at[kItems][4], x_at[kItems][kColumns / 16];
#pragma unroll
    for (int i = 0; i < kItems; i++) {
        const Job job = job_of(a.p, g, consumer, min(i, max(items - 1, 0)));
#pragma unroll
        for (int m = 0; m < 4; m++) dout_at[i][m] = dout_box_of(t, job, consumer) * t.dout_bytes + swizzled(matrix / 2 * 8 + lane % 8, m * 2 + matrix % 2, kRows * 2);
#pragma unroll
        for (int j = 0; j < kColumns / 16; j++) {
            const int column = warp * kColumns + j * 16, block = column / t.chunk, piece = column % t.chunk / 8 + matrix / 2;
            const int row = (items > 0 ? first_shift(a.p, g, job) : 0) + (t.n_over_taps ? block * step_w(a.p.s) : 0) + matrix % 2 * 8 + lane % 8;
            x_at[i][j] = t.dout_boxes * t.dout_bytes + x_box_of(t, job) * t.x_bytes + (t.n_over_taps ? 0 : block * block_bytes(t, a.p.s)) + swizzled(row, piece, row_bytes);
        }
    }

    float d[kItems][4][kColumns / 8][4] = {};
    float4* partial = reinterpret_cast<float4*>(a.partial) + ((int64_t(split) * t.groups + index) * kConsumers + consumer) * t.items * (kBlockN / 8 * 128);
    bool first = true;
    int shift_x = 0, shift_dout = 0, chain = 0;
    // Adds the sums to scratch memory, scaled back, and clears them.
    auto flush = [&] {
        const ScaleBack back(shift_x, shift_dout);
#pragma unroll
        for (int i = 0; i < kItems; i++) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                float4* sums = partial + (i * (kBlockN / 8) + warp * (kColumns / 8)) * 128 + m * 32 + lane;
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++)
                    if (kItems == 1 || i < items) add_sums(sums[j * 128], first, back, &d[i][m][0][0] + sum_at(j));
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) d[i][m][j][e] = 0.0f;
            }
        }
        first = false, chain = 0;
    };
    const uint32_t base = shared_address(stages);
    Box next = begin < end ? box_of(a.p, boxes, begin) : Box{};    // that is loaded
    for (int i = 0; i < t.stages - 1; i++) {
        if (begin + i < end) load_stage(o, g, next, base + i * t.stage_bytes), advance(a.p, boxes, next);
        cp_async_commit_group();
    }
    const int boxes_of_sample = boxes.planes * t.strips * t.row_groups;
    for (int i = begin, slot = 0, sample_end = begin; i < end; i++, slot = slot + 1 == t.stages ? 0 : slot + 1) {
        if (i == sample_end) {
            const int sample = i / boxes_of_sample, next_x = scaled_half::shift_of(a.x_max[sample]), next_dout = scaled_half::shift_of(a.dout_max[sample]);
            if (i > begin && (next_x != shift_x || next_dout != shift_dout)) flush();
            shift_x = next_x, shift_dout = next_dout, sample_end = (sample + 1) * boxes_of_sample;
        }
        if (chain >= kChain) flush();
        chain += t.steps * 16;
        if (t.stages == 2) cp_async_wait_group<0>();
        else cp_async_wait_group<1>();
        __syncthreads();
        if (i + t.stages - 1 < end) load_stage(o, g, next, base + (slot == 0 ? t.stages - 1 : slot - 1) * t.stage_bytes), advance(a.p, boxes, next);
        cp_async_commit_group();
        const uint32_t stage = base + slot * t.stage_bytes;
#pragma unroll
        for (int item = 0; item < kItems; item++) {
            if (item >= items) break;
#pragma unroll 1
            for (int step = 0; step < t.steps; step++) {
                uint32_t dout[4][4], x[kColumns / 16][4];
#pragma unroll
                for (int j = 0; j < kColumns / 16; j++) ldmatrix_x4_transposed(x[j], stage + x_at[item][j] + step * 16 * row_bytes);
#pragma unroll
                for (int m = 0; m < 4; m++) ldmatrix_x4_transposed(dout[m], stage + dout_at[item][m] + step * 16 * kRows * 2);
#pragma unroll
                for (int m = 0; m < 4; m++)
#pragma unroll
                    for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(d[item][m][j], dout[m], x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    flush();
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN, int kItems = 1> int launch_dweight(const Operands& o, cudaStream_t stream) {
    const Tiling& t = o.a.p.t;
    const int shared = t.stages * t.stage_bytes;
    return launch_with_shared(dweight_kernel<kBlockN, kItems>, t.groups * t.splits, kThreads, shared, stream, o);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Operands o = {a, x.copy, dout.copy, int(x.phase_channels), int(dout.phase_channels) * dout.phases()};
    switch (a.p.t.block_n) {
        case 64: RETURN_IF_ERROR((a.p.t.joint ? launch_dweight<64, kMaxItems>(o, stream) : launch_dweight<64>(o, stream))); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(o, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(o, stream)); break;
    }
    return add_parts(a.p, a.partial, dtype, dweight, stream);
}

}  // namespace dweight_sm80
'''

_SOURCES['conv_transpose3d_gradients_sm80.cu'] = r'''
// Gradients of a transposed convolution on the tensor cores from sm_80 up: mma.sync, cp.async.

#include "conv_launch_sm80.cuh"
#include "conv_transpose3d_gradients.cuh"
#include "dweight_sm80.cuh"

namespace gradients_sm80 {

struct Path : conv_sm80::Path {
    static constexpr bool kHopper = false;
    static int shared_bytes(int device) { return block_shared_bytes(device); }
    static int differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_sm80::differentiate(a, x, dout, dtype, dweight, stream);
    }
};

}  // namespace gradients_sm80

GRADIENTS_LAUNCHERS(sm80, gradients_sm80::Path)
'''

_SOURCES['ptx_sm90.cuh'] = r'''
// PTX instructions of sm_90a, one per wrapper, named after it. Reference: the PTX ISA's chapters "Asynchronous warpgroup
// level matrix instructions", "mbarrier" and "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include "ptx_sm80.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_SM90A 1
#endif

// -------------------------------------------------------------------------------------------------- Shared memory

// Orders this thread's ordinary shared-memory writes before later accesses by the copy engine and the tensor cores.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// barrier.sync among `threads` threads of the block
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// barrier.arrive: the same, without waiting
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ------------------------------------------------------------------------------------------------- Global memory

// Counters in global memory that blocks wait for: what was written before is seen by whoever reads the count.
__device__ __forceinline__ void add_release(unsigned* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}
// Orders what this thread knows of global memory before later accesses there by the copy engine.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

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

// ------------------------------------------------------------------------------------- Tensor memory access (copy engine)

__device__ __forceinline__ void tma_load_3d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load_5d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// What lies outside the tensor is left out.
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void tma_store_5d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 ::"l"(map), "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// These are of 16-byte aligned runs of bytes, without a tensor map.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* destination, const void* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(shared_address(source)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but kPending of this thread's groups are complete, or have read their source.
template <int kPending> __device__ __forceinline__ void bulk_wait_group() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory"); }
template <int kPending> __device__ __forceinline__ void bulk_wait_group_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory"); }

// --------------------------------------------------------------------------------------------------------- wgmma

#ifdef HAS_SM90A

template <int kRegisters> __device__ __forceinline__ void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// Keeps the compiler from using a register's value ahead of this point.
__device__ __forceinline__ void keep_after(float& v) { asm volatile("" : "+f"(v)::"memory"); }

// Here and not before, where a zero would not be wanted.
__device__ __forceinline__ void make_zero(float& v) { asm volatile("mov.f32 %0, 0f00000000;" : "=f"(v)); }

// Says that a register's value is not wanted any more.
__device__ __forceinline__ void make_undefined(float& v) { asm volatile("" : "=f"(v)); }

// d (64, 2 * registers) += a * b, or = without kAccumulate; fp16 operands in shared memory, K-major (0) or both transposed (1), fp32 sums in registers:
// element i of lane l in warp w is row 16 * w + l / 4 + (i / 2 % 2) * 8, column i / 4 * 8 + l % 4 * 2 + i % 2.
#define REGS10(t) "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define ACC10(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9])

template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " "%30, %31" "}, %32, %33, %35, 1, 1, %34, %34;\n"
                 : ACC10(0), ACC10(10), ACC10(20), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[36], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " "%30, %31, %32, %33, %34, %35" "}, %36, %37, %39, 1, 1, %38, %38;\n"
                 : ACC10(0), ACC10(10), ACC10(20), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[40], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") "}, %40, %41, %43, 1, 1, %42, %42;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[44], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n88k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " "%40, %41, %42, %43" "}, %44, %45, %47, 1, 1, %46, %46;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[52], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n104k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " "%50, %51" "}, %52, %53, %55, 1, 1, %54, %54;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), "+f"(d[50]), "+f"(d[51]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " "%60, %61, %62, %63" "}, %64, %65, %67, 1, 1, %66, %66;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[68], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n136k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " "%60, %61, %62, %63, %64, %65, %66, %67" "}, %68, %69, %71, 1, 1, %70, %70;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[72], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n144k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " "%70, %71" "}, %72, %73, %75, 1, 1, %74, %74;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), "+f"(d[70]), "+f"(d[71]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[80], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") "}, %80, %81, %83, 1, 1, %82, %82;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[96], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " "%90, %91, %92, %93, %94, %95" "}, %96, %97, %99, 1, 1, %98, %98;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[100], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n200k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") "}, %100, %101, %103, 1, 1, %102, %102;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[112], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n224k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " "%110, %111" "}, %112, %113, %115, 1, 1, %114, %114;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), "+f"(d[110]), "+f"(d[111]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[116], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n232k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " "%110, %111, %112, %113, %114, %115" "}, %116, %117, %119, 1, 1, %118, %118;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}

#undef REGS10
#undef ACC10

#endif  // HAS_SM90A
'''

_SOURCES['pipeline_sm90.cuh'] = r'''
// What a pipeline through shared memory needs beside the instructions of ptx_sm90.cuh: positions in its rings, descriptors of operands, and the tensor maps of what the copy engine brings.
#pragma once

#include "ptx_sm90.cuh"

// A ring of stages: the position of one of its users.
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// An operand in rows of 128, 64 or 32 bytes, swizzled over the row: everything of its descriptor but the address. K-major: a row
// is one of GEMM_M or GEMM_N. Transposed: a row is one of GEMM_K, and where it is shorter than GEMM_M or GEMM_N, the next
// elements are in rows `block_stride` bytes further on.
// The hardware swizzles absolute addresses, so the address may be any row of a tile, not only a multiple of eight.
__device__ __forceinline__ uint64_t wgmma_descriptor_base(int row_bytes, int block_stride = 16) {
    const uint64_t layout = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return layout << 62 | uint64_t(8 * row_bytes / 16) << 32 | uint64_t(block_stride / 16) << 16;
}
// An operand in columns of 16 bytes, K-major: a row's 8 elements of GEMM_K, and `rows` further on its next 8. Not swizzled: neighbouring rows are neighbours in memory.
__device__ __forceinline__ uint64_t wgmma_plain_descriptor_base(int rows) { return uint64_t(8) << 32 | uint64_t(rows) << 16; }
// vector: the address in units of 16 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint64_t base, uint32_t vector) { return base >> 32 << 32 | (uint32_t(base) + vector); }
__device__ __forceinline__ uint32_t shared_vector(const void* p) { return shared_address(p) / 16; }

// cuTensorMapEncodeTiled, looked up at run time so that nothing links libcuda.
using TensorMapEncode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                     CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static TensorMapEncode tensor_map_encode() {
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

// A map of a dense tensor; dims and box fastest first, zeros outside the tensor.
template <int kRank> int make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, CUtensorMapSwizzle swizzle, const void* base, const int64_t (&dims)[kRank], const int (&box)[kRank]) {
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
                                                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
'''

_SOURCES['tiling_sm90.h'] = r'''
// The Hopper convolution's choice among the ways to cut its work.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace conv_sm90 {

using namespace conv;

constexpr int kSharedBytes = 227 * 1024;
constexpr int kMaxStages = 16;                 // of weights, all rings together
constexpr int kMaxInputStages = 6;
constexpr int kMaxItems = 64;
constexpr int kHeadBytes = 2560;               // barriers and the like

// Whether there is a kernel of these columns for stages of such a chunk, with several products or one. Each costs nvcc seconds, so those that hardly any
// shape is best with are left out (NOTES.md).
HOST_DEVICE constexpr bool is_built(int block_n, int chunk, bool many) {
    switch (chunk) {
        case 16: return block_n == 136;
        case 32: return block_n == 232 || block_n == 200 || block_n == 136 || block_n == 64;
        default: return (!many && block_n != 200) || block_n == 160 || block_n == 88 || block_n == 64;
    }
}

inline int64_t shared_bytes(const Tiling& t) {
    return kHeadBytes + int64_t(t.input_stages) * t.input_bytes + int64_t(t.weight_rings) * t.weight_stages * t.weight_bytes + int64_t(t.buffers) * t.buffer_bytes + t.warpgroups * int64_t(t.table_bytes);
}

// The stages that shared memory has room for, and what becomes of the weights. False where there are too few of them.
inline bool lay_out_stages(Tiling& t, const Stencil& s) {
    const bool many = t.item_taps > 1;
    const int halo_w = s.axis[2].shift[s.axis[2].taps - 1], row_bytes = 2 * t.chunk;
    t.input_bytes = round_up((int64_t(t.planes) * t.box_rows * t.pitch + halo_w) * row_bytes, 1024);
    t.weight_bytes = t.items * kRows * row_bytes;
    t.weight_rings = t.split_m ? 2 : 1;
    t.buffers = t.warpgroups;
    if (t.warpgroups == 2 && kSharedBytes - shared_bytes(t) < (many ? 3 : 10) * t.weight_bytes) t.buffers = 1;
    const int64_t left_bytes = kSharedBytes - shared_bytes(t);    // for weights
    t.weight_stages = (left_bytes / t.weight_bytes < kMaxStages ? left_bytes / t.weight_bytes : kMaxStages) / t.weight_rings;
    // A tile's weights stay in shared memory for the next tile, where the ring has as many stages as they fill or a multiple.
    const int tile_stages = s.taps() / t.item_taps * (t.C_pad / t.chunk) * (many ? 1 : t.products);
    t.keeps_weights = t.k_parts == 1 && t.weight_rings == 1 && t.weight_stages >= 2 && tile_stages <= t.weight_stages;
    if (t.keeps_weights) t.weight_stages -= t.weight_stages % tile_stages;
    else if (t.weight_stages * t.weight_rings < (many ? 3 : 6)) return false;
    // With one ring, the stages between the two warpgroups are not there to load weights in advance.
    const int advance = int(ceil_div(2000, int64_t(t.block_n) * t.chunk / 16 * t.items)) + 2;
    t.lag = t.split_m ? 4 : t.weight_stages > advance ? t.weight_stages - advance : 1;
    // One warp is enough for boxes and weights that are kept; otherwise each ring has one, or boxes and the one ring.
    t.loaders = t.keeps_weights ? 1 : 2, t.box_loader = t.keeps_weights || t.weight_rings == 2 ? 0 : 1;
    t.queues = t.keeps_weights ? t.row_pairs : 1;
    t.column_warps = 1;
    return true;
}

// Estimated cycles of the busiest multiprocessor. The numbers are fitted to the times of 170 layers (NOTES.md).
inline double time_of(const Tiling& t, const Stencil& s, int64_t samples, int64_t channels, int multiprocessors) {
    const double chunk_steps = t.chunk / 16, part = largest_part(t, s), steps = steps_of(t, s) * part, boxes = boxes_of(t, s) * part, stages = steps / chunk_steps / t.items;
    // The tensor cores: a step of all consumers, longer where the weights' stages that are not in use do not cover the latency of loads.
    const double step = t.warpgroups * t.block_n / 2 + 20 / chunk_steps, latency = 2050;
    const double free_stages = t.weight_stages - (t.split_m ? 2 : t.item_taps > 1 ? 1.5 : 3), lead = std::max(100.0, free_stages * step * chunk_steps * t.items);
    double products = steps * step * (t.keeps_weights ? 1 : std::max(1.0, latency / lead)) + (t.warpgroups == 3 ? 300 * stages : 0) + 0.68 * boxes * t.planes * t.box_rows * t.pitch * chunk_steps;
    const auto at_least = [&](double cycles) { products = std::max(products, cycles); };
    at_least(boxes * (2150 + t.box_bytes() / 73) / (t.input_stages - 1));    // loads in flight
    // A consumer's instructions, each waiting for the one before; and, where these are few and boxes have a loader of their own, what comes from the L2 cache.
    if (t.box_loader == 1 && t.chunk == 32 && t.items == 1) at_least(stages * 620 + boxes * 300), at_least(boxes * t.box_bytes() / 21.5);
    else at_least(stages * (700 + 100 * t.items) + boxes * 400);
    // Two warps issue the copies of the runs' pieces one after another.
    const double pieces = t.warpgroups * (t.tensor_store ? 1.0 : t.region_channels * region_planes(t, s) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1)));
    const double copies = t.bulk ? pieces * 28 : 0;
    at_least(copies);
    const double outputs = out_bytes_of(t) / 34;
    double tile = std::max(products, outputs) + 0.1 * std::min(products, outputs);
    if (t.buffers == 1) tile += 1.8 * outputs;
    if (!t.tensor_store && !t.whole_sectors) tile += t.contiguous ? 0.58 * outputs : t.bulk ? 0.68 * copies : 9.5 * outputs;
    if (t.warpgroups == 2 && !t.dense) tile += 9.6 * t.block_n;    // with three, one's epilogue is always beside the others' products
    const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors;
    const double added_bytes = 4.0 * t.k_parts * samples * channels * s.axis[0].out * s.axis[1].out * s.axis[2].out;    // of the parts
    return waves * (tile + (t.keeps_weights ? 2450 : 1250)) + (t.k_parts == 1 ? 0 : 2400 + added_bytes / 4000);
}

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory. groups: of the split, or 1.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    for (int packing = 0; packing < 3; packing++)
    for (int warpgroups : {2, 3})
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {232, 224, 200, 192, 160, 136, 128, 88, 64})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (int chunk_phases : {1, 2, 4})
    for (bool half_chunk : {false, true})
    for (int planes : {1, warpgroups})
    for (bool joins_planes : {false, true})
    for (int input_stages : {2, 3, 4, 6})
    for (int item_taps : {h.taps * w.taps, w.taps, 1}) {
        if (w.source_phases % chunk_phases != 0) continue;
        if ((warpgroups == 3) != (block_n == 136) || (warpgroups == 3 && split_m)) continue;    // as many sums as there are registers for
        if (planes > 1 && (split_m || d.positions == 1)) continue;
        Tiling t = {};
        t.input_stages = input_stages, t.warpgroups = warpgroups;
        t.block_n = block_n, t.split_m = split_m, t.planes = planes, t.run_planes = 1, t.taps_per_box = taps_per_box;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (t.rows.packed_phases > 8) continue;
        t.rows.octets = 8 / t.rows.packed_phases;
        if (!set_channels(t, s, source_channels, channels, groups)) continue;
        if (chunk_phases > 1 && !join_phases(t, w, chunk_phases)) continue;
        if (half_chunk && (warpgroups == 2 || chunk_phases > 1 || t.split || t.chunk < 64)) continue;    // where three consumers leave room for no more
        if (half_chunk) t.chunk /= 2;
        const bool many = item_taps > 1;
        if (!is_built(block_n, t.chunk, many)) continue;
        t.item_taps = item_taps, t.items = many ? item_taps * t.products : 1;
        if (many && (split_m || t.items > kMaxItems || (item_taps > w.taps && taps_per_box < h.taps) || s.source_phases() > 1)) continue;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pitch = box_pitch(w, t.tile_w, strips);
        if (t.pitch > 256 || !cut_runs(t, s, true)) continue;
        if (planes > 1 && t.runs > 1) continue;    // whole planes only: neighbouring runs share more of their boxes
        if (joins_planes && ((planes == 1 && !split_m) || !join_planes(t, s, planes))) continue;
        lay_out_regions(t, s, channels, true);
        for (int k_parts : {1, 2, 3, 4, 5, 6, 8}) {
            if (!cut_channels(t, s, k_parts) || !count_tiles(t, s, samples)) continue;
            if (k_parts > 1 && (groups > 1 || t.tiles > 2 * k_parts * multiprocessors)) break;    // there are enough tiles
            if (!lay_out_stages(t, s)) continue;
            const double time = time_of(t, s, samples, channels, multiprocessors);
            if (best.block_n == 0 || time < best.cycles) best = t, best.cycles = time;
        }
    }
    return with_divisors(best);
}

}  // namespace conv_sm90
'''

_SOURCES['conv_normalizer.cuh'] = r'''
// GroupNorm in the convolution's kernel on Hopper: some blocks, on multiprocessors of their own, normalize the samples that are complete while the others
// multiply, which join them when there are no more tiles. Before there is anything to normalize, they take kFirstTiles tiles each. Products
// leave memory idle; what a multiprocessor can read, its weights take.
//
//   a storer whose tile is in memory: stored[n] += 1
//   the producers' warpgroup of a normalizing block, when all of a sample's are: the statistics of a group, ready[n] += 1
//   the other warps there, when all groups' are: pieces of channels
//
// Blocks that have no more tiles do both too. Whoever takes a tile, a group or a piece takes the next one that there is, and waits only for what others took before: so it
// does not matter which blocks run at the same time (tests/test_protocol.py).
#pragma once

#include "conv_statistics.cuh"
#include "pipeline_sm90.cuh"

namespace conv {

constexpr int kFirstTiles = 2;
constexpr int kPieceStages = 2, kPieces = 2, kMostPieceFloats = 4096;    // kPieces: neighbours, that a warp takes at a time before the last sample
constexpr double kMostSampleBytes = 24 << 20;    // with larger ones, passes of their own are faster
constexpr double kNormalizedBytes = 20;          // that a multiprocessor normalizes in a cycle, reading and writing as many

// Floats of a channel that a warp normalizes at a time: the stages are where boxes and weights were.
HOST_DEVICE int piece_floats(const Tiling& t) {
    const int most = (t.input_stages * t.input_bytes + t.weight_rings * t.weight_stages * t.weight_bytes) / (t.warpgroups * 4 * kPieceStages) / 512 * 128;
    return most < kMostPieceFloats ? most : kMostPieceFloats;
}
inline int64_t pieces_of(const Tiling& t, const group_norm::Shape& shape) { return shape.N * shape.C * ceil_div(shape.S, piece_floats(t)); }

// How many blocks are to normalize beside those that multiply; 0 where passes of their own are better, or necessary. r: relu(out).
inline int normalizing_blocks(const Problem& p, const group_norm::Shape& shape, int dtype, int y_dtype, int multiprocessors, const void* r, const void* y) {
    if (dtype != kFloat32 || y_dtype != kFloat32 || !group_norm::has_vectors<float, float>(shape, r, y)) return 0;
    const double sample = double(shape.C * shape.S) * sizeof(float), normalized = shape.N * sample / kNormalizedBytes / multiprocessors;    // bytes; cycles, if all multiprocessors did it
    if (shape.N < 4 || sample > kMostSampleBytes || p.t.k_parts > 1 || p.t.tiles < 4 * multiprocessors || pieces_of(p.t, shape) > 1 << 30) return 0;
    if (3 * normalized > p.t.cycles) return 0;    // memory is not idle enough
    return int(multiprocessors * normalized / (normalized + p.t.cycles) + 0.5);
}

__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned count) {
    while (load_acquire(counter) < count) __nanosleep(100);
}

struct SharedStatistics {
    group_norm::Pair sums[4];    // of the warps
    int index;                   // of the group
};

// A warpgroup: takes groups, one after another, until there are no more. reports: of a sample.
__device__ __forceinline__ void find_statistics(const Parameters& a, unsigned reports, SharedStatistics& shared, int barrier) {
    wait_for_previous_kernel();
    const Normalization& norm = a.norm;
    const int thread = threadIdx.x % 128, groups = int(norm.shape.num_groups), all = int(norm.shape.N) * groups;
    while (true) {
        if (thread == 0) {
            shared.index = int(atomicAdd(a.workspace.groups, 1u));
            if (shared.index < all) wait_for_count(a.workspace.stored + shared.index / groups, reports);
        }
        named_barrier(barrier, 128);
        const int index = shared.index;
        if (index >= all) return;
        group_norm::Pair sums = sum_moments<128>(a.workspace.sets, norm.shape, index, thread, 0, 1);
        for (int step = 16; step > 0; step /= 2) sums.a += __shfl_xor_sync(~0u, sums.a, step), sums.b += __shfl_xor_sync(~0u, sums.b, step);
        if (thread % 32 == 0) shared.sums[thread / 32] = sums;
        named_barrier(barrier, 128);
        if (thread > 0) continue;
        for (int warp = 1; warp < 4; warp++) sums.a += shared.sums[warp].a, sums.b += shared.sums[warp].b;
        leave_statistics(norm.shape, norm.eps, sums, index, norm.mean, norm.rstd);
        add_release(a.workspace.ready + index / groups);
    }
}

// A warp: takes pieces of channels, one after another, until there are no more. The copy engine brings them to stages of shared memory, which are the warp's own. All
// warps of all blocks come to the last sample, each for one piece or two: there, none is taken before the warp has nothing else to do.
struct PieceNormalizer {
    const Parameters& a;
    float* stages;
    uint64_t* full;
    int floats;                             // of a piece
    unsigned pieces, all, last_sample;      // of a channel; of all; the first of the last sample
    unsigned newest = 0, left = 0, next;    // the last that was loaded; how many were taken with it and are not loaded; lane 0: the next ones, if they are taken ahead
    bool ahead = false;
    int ready = -1;                         // the last sample whose statistics are known

    __device__ __forceinline__ PieceNormalizer(const Parameters& a, uint8_t* stages, uint64_t* full)
        : a(a), stages(reinterpret_cast<float*>(stages)), full(full), floats(piece_floats(a.p.t)), pieces((int(a.norm.shape.S) + floats - 1) / floats), all(unsigned(a.norm.shape.N * a.norm.shape.C) * pieces),
          last_sample(all - unsigned(a.norm.shape.C) * pieces) {}
    __device__ __forceinline__ unsigned take(int count) const { return threadIdx.x % 32 == 0 ? atomicAdd(a.workspace.pieces, unsigned(count)) : 0; }
    struct Span { unsigned row; int first, count; };    // floats of a row, a sample's channel
    __device__ __forceinline__ Span span_of(unsigned piece) const {
        const unsigned row = piece / pieces;
        const int first = int(piece - row * pieces) * floats;
        return {row, first, min(floats, int(a.norm.shape.S) - first)};
    }
    __device__ __forceinline__ int64_t origin_of(const Span& span) const { return int64_t(span.row) * a.norm.shape.S + span.first; }

    // Takes a piece, unless there is one at hand, and loads it. False: there is none.
    __device__ __forceinline__ bool load(int stage) {
        if (left > 0) {
            newest++, left--;
        } else {
            left = ahead ? kPieces - 1 : 0;
            if (!ahead) next = take(1);
            newest = __shfl_sync(~0u, next, 0);
            ahead = newest < last_sample;
            if (ahead) next = take(kPieces);
        }
        if (newest >= all) return false;
        const Span span = span_of(newest);
        const int n = span.row / unsigned(a.norm.shape.C);
        if (threadIdx.x % 32 == 0) {
            if (n != ready) wait_for_count(a.workspace.ready + n, unsigned(a.norm.shape.num_groups)), fence_proxy_async_global();
            mbarrier_arrive_expect_tx(full + stage, span.count * 4);
            bulk_load(stages + stage * floats, static_cast<const float*>(a.out) + origin_of(span), span.count * 4, full + stage);
        }
        ready = n;
        __syncwarp();
        return true;
    }

    __device__ __forceinline__ void run() {
        const Normalization& norm = a.norm;
        unsigned loaded[kPieceStages], known = all;    // pieces, the next one first; the row whose constants are known
        int count = 0;
        group_norm::ChannelNorm<float> normalized;
        RingPosition to, at;
        while (true) {
            while (count < kPieceStages && newest < (count == 0 ? all : last_sample) && load(to.stage)) {
#pragma unroll
                for (int i = 0; i < kPieceStages; i++)
                    if (i == count) loaded[i] = newest;
                count++, to.advance(kPieceStages);
            }
            if (count == 0) return;
            const Span span = span_of(loaded[0]);
            if (span.row != known) {
                const int c = span.row % unsigned(norm.shape.C), group = span.row / unsigned(norm.shape.group_channels());
                normalized = {__ldcg(norm.mean + group), __ldcg(norm.rstd + group), norm.gamma ? norm.gamma[c] : 1.0f, norm.beta ? norm.beta[c] : 0.0f};
                known = span.row;
            }
            const float4* const values = reinterpret_cast<const float4*>(stages + at.stage * floats);
            float4* const out = reinterpret_cast<float4*>(norm.y + origin_of(span));
            mbarrier_wait(full + at.stage, at.phase);
#pragma unroll 4
            for (int i = threadIdx.x % 32; i < span.count / 4; i += 32) {
                const float4 v = values[i];
                __stcs(out + i, make_float4(normalized(v.x), normalized(v.y), normalized(v.z), normalized(v.w)));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i + 1 < kPieceStages; i++) loaded[i] = loaded[i + 1];
            count--, at.advance(kPieceStages);
        }
    }
};

}  // namespace conv
'''

_SOURCES['conv_sm90.cuh'] = r'''
// Convolution of stride 1 on Hopper's tensor cores, which is a transposed convolution of any stride (stencil.h), alone or with
// ReLU and GroupNorm behind it.
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh; TF32-equivalent), channels-last: GEMM_M = (channel, phase) of the
// output, GEMM_N = positions of one (n, d) plane of the grid, GEMM_K = (tap, source channel). tiling_sm90.h tells how it is cut.
//
// A block is a warpgroup whose warps have a task each (publisher, loaders, storers) and two or three consumer warpgroups, which compute;
// one block per multiprocessor, taking tiles from a queue. A box of the source plane, halo included, is copied once for all taps (h, w);
// a tap is a shift of the wgmma descriptor's start address by whole rows of shared memory. Of two consumers, one is some taps ahead of
// the other, so that its epilogue overlaps the other's products; three, of fewer sums each, where epilogues count for more (tiling_sm90.h).
// An epilogue stages the outputs in shared memory in the order of global memory; the storers send them off by bulk copies.
// Consumers that have different rows get their weights through a ring each, from a loader each; consumers that have the same rows share
// one ring, and boxes have the other loader. Where that ring has room for all weights of a row tile, they stay there, and one loader is
// enough: a block then has a queue of that row tile's own, and helps with the others when it is empty.
//
// Fused: the epilogue also leaves, per run and row, the mean and the sum of squared deviations of relu(out), of which
// conv_statistics.cuh makes the statistics, or blocks of this kernel that also normalize (conv_normalizer.cuh).
#pragma once

#include <type_traits>

#include "conv_normalizer.cuh"
#include "pipeline_sm90.cuh"
#include "tiling_sm90.h"

namespace conv_sm90 {

constexpr int kTileSlots = 4;
constexpr int kBeginBarrier = 1 + kMaxWarpgroups, kStagesFreeBarrier = kBeginBarrier + 1, kStatisticsBarrier = kBeginBarrier + 2;    // behind the consumers' own

// Threads of a block with so many consumers, and registers of a thread.
HOST_DEVICE constexpr int threads_of(int consumers) { return 128 + 128 * consumers; }
HOST_DEVICE constexpr int producer_registers(int consumers) { return consumers == 2 ? 104 : 96; }
HOST_DEVICE constexpr int consumer_registers(int consumers) { return consumers == 2 ? 200 : 136; }
static_assert(128 * producer_registers(2) + 2 * 128 * consumer_registers(2) <= 65536 && 128 * producer_registers(3) + 3 * 128 * consumer_registers(3) <= 65536, "the register file of a multiprocessor");

// What a stage of weights is for: rows of shared memory by which the tap is shifted in its box, and flags.
constexpr int kOpensBox = 1 << 29, kLastTap = 1 << 30, kTapRows = kOpensBox - 1;

struct SharedHead {
    uint64_t input_full[kMaxInputStages], input_empty[kMaxInputStages];
    uint64_t weight_full[kMaxStages], weight_empty[kMaxStages];    // one ring behind the other
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t buffer_free[kMaxWarpgroups], staged[2][kMaxWarpgroups];    // by the consumer that used it; by the tile's parity too, as storers take turns
    uint64_t piece_full[4 * kMaxWarpgroups][kPieceStages];    // of the consumers' warps, when they normalize
    int taps[kMaxStages];                  // of the weights' stages
    int item_rows[kMaxItems + 1];          // of a stage's items, where there are several
    Tile tiles[kTileSlots];
    SharedStatistics statistics;
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the stages begin behind the head");

// The parts of shared memory.
struct SharedParts {
    SharedHead& head;
    uint8_t *input, *weights, *buffers, *tables;    // (input_stages, planes, box_rows, pitch, chunk) fp16 and margins; (weight_rings, weight_stages, 64, chunk) fp16; ...
    __device__ SharedParts(uint8_t* base, const Tiling& t) : head(*reinterpret_cast<SharedHead*>(base)) {
        input = base + kHeadBytes;
        weights = input + t.input_stages * t.input_bytes;
        buffers = weights + t.weight_rings * t.weight_stages * t.weight_bytes;
        tables = buffers + t.buffers * t.buffer_bytes;
    }
    // Where a consumer stages.
    __device__ float* buffer(const Tiling& t, int consumer) const { return reinterpret_cast<float*>(buffers + (t.buffers > 1 ? consumer : 0) * t.buffer_bytes); }
};

#ifdef HAS_SM90A

// ------------------------------------------------------------------------------------------------------ Producers

// A warp, which may be a storer too: takes tiles from the queues and tells everyone. A block's first tile is that of its own number, unless blocks
// wait for each other (conv_normalizer.cuh): then none is kept for a block that may not run yet.
struct Publisher {
    const Parameters& a;
    SharedHead& head;
    int queue, left;                        // where it takes tiles; queues that were not empty yet
    int most;                               // tiles that it takes
    int next;                               // tile, or -1: no more
    bool waited = false;                    // for the kernel before this one: others than the first tile are not taken earlier
    RingPosition slot;                      // to fill next

    __device__ __forceinline__ Publisher(const Parameters& a, SharedHead& head) : a(a), head(head), queue(blockIdx.x % a.p.t.queues), left(a.p.t.queues), most(blockIdx.x < gridDim.x - a.norm.blocks ? a.p.t.tiles : kFirstTiles), next(blockIdx.x) {}

    __device__ __forceinline__ void take() {
        if (!waited) wait_for_previous_kernel();
        waited = true;
        const int queues = a.p.t.queues;
        if (most-- == 0) left = 0;
        for (next = -1; next < 0 && left > 0;) {
            const unsigned first = a.norm.blocks > 0 ? 0 : (gridDim.x - queue + queues - 1) / queues;    // these are the blocks'
            const unsigned ticket = __shfl_sync(~0u, threadIdx.x % 32 == 0 ? atomicAdd(a.workspace.tile_tickets + queue, 1u) + first : 0, 0);
            if (ticket * queues + queue < a.p.t.tiles) next = ticket * queues + queue;
            else queue = queue + 1 < queues ? queue + 1 : 0, left--;
        }
    }

    // False: there was no more, which everyone knows now.
    __device__ __forceinline__ bool publish() {
        if (a.norm.blocks > 0 && !waited) take();
        Tile& tile = head.tiles[slot.stage];
        const bool more = next >= 0;
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        const int lane = threadIdx.x % 32;
        if (lane < a.p.t.warpgroups) {
            Place place = {-1};
            if (more) place = place_of(a.p, next), tile.run[lane] = run_of(a.p, place, lane);
            if (lane == 0) static_cast<Place&>(tile) = place;
            mbarrier_arrive(head.tile_full + slot.stage);
        }
        __syncwarp();
        slot.advance(kTileSlots);
        if (more) take();
        return more;
    }
};

// A warp: loads a ring's weights, boxes, or both. Each lane knows one of the steps that come next, a tap and its box.
// Tiles with the same live taps have the same steps; where there are no more than lanes, they are looked up once.
struct Loader {
    const Parameters& a;
    const SharedParts& shared;
    const CUtensorMap *x_map, *w_map;
    int ring;
    bool loads_boxes, loads_weights;
    RingPosition slot, in, weight;
    int kept = -1, kept_row = -1;      // which weights lane i's stage i of the ring has, of this row
    struct Step {
        int rows, weights;             // rows with kOpensBox; which weights: tap << 20 | column / 16
        int plane, row, channel;       // of the box, from the tile's on
    } step = {};
    int steps = 0, steps_live = -1;    // known ones; of tiles with these live taps they are all

    // Takes the steps of the box at the cursor, from `tap` on, that there are lanes for. more: whether there are others, then.
    __device__ __forceinline__ void take_steps(const Tile& tile, Cursor& at, int& tap, bool& more) {
        const BoxTaps taps(at);
        const int lane = threadIdx.x % 32, own = tap + lane - steps, taken = min(taps.count - tap, 32 - steps);
        if (lane >= steps && lane < steps + taken) {
            const BoxTaps::Tap t = taps[own];
            step = {t.rows | (own == 0 ? kOpensBox : 0), t.tap << 20 | t.column / 16, at.plane() - tile.d, at.source_row() - tile.h0, at.c};
        }
        steps += taken, tap += taken;
        if (tap == taps.count) more = at.next_box(), tap = 0;
    }

    // Lane `i` loads its step's box.
    __device__ __forceinline__ void load_box(const Tile& tile, int i) {
        const StencilAxis& aw = a.p.s.axis[2];
        SharedHead& head = shared.head;
        mbarrier_wait(head.input_empty + in.stage, in.phase ^ 1);
        if (threadIdx.x % 32 == i) {
            mbarrier_arrive_expect_tx(head.input_full + in.stage, a.p.t.box_bytes());
            tma_load_5d(shared.input + in.stage * a.p.t.input_bytes, x_map, head.input_full + in.stage, tile.source_channel + step.channel, aw.first + tile.w0 - aw.shift[aw.taps - 1],
                        tile.h0 + step.row, tile.d + step.plane, tile.sample);
        }
        __syncwarp();
        in.advance(a.p.t.input_stages);
    }

    // Lane `i` loads its step's weights, unless the stage has them already. row: of the packed ones.
    __device__ __forceinline__ void load_weights(int i, int row, bool last) {
        const Tiling& t = a.p.t;
        SharedHead& head = shared.head;
        const int lane = threadIdx.x % 32, at = ring * t.weight_stages + weight.stage;
        mbarrier_wait(head.weight_empty + at, weight.phase ^ 1);
        const int is_kept = __shfl_sync(~0u, kept, weight.stage), wanted = __shfl_sync(~0u, step.weights, i);
        if (lane == weight.stage) kept = wanted;
        if (lane == i) head.taps[at] = step.rows | (last ? kLastTap : 0);
        if (lane == i && is_kept == wanted) {
            mbarrier_arrive(head.weight_full + at);
        } else if (lane == i) {
            const int tap = wanted >> 20, column = (wanted & 0xfffff) * 16;
            uint8_t* stage = shared.weights + at * t.weight_bytes;
            mbarrier_arrive_expect_tx(head.weight_full + at, t.weight_bytes);
            tma_load_3d(stage, w_map, head.weight_full + at, column, row, tap);
            if (t.items > 1 && t.products > 1) tma_load_3d(stage + t.weight_bytes / 2, w_map, head.weight_full + at, column + t.chunk, row, tap);
        }
        __syncwarp();
        weight.advance(t.weight_stages);
    }

    __device__ __forceinline__ void run() {
        SharedHead& head = shared.head;
        mbarrier_wait(head.tile_full, 0);    // the first tile
        wait_for_previous_kernel();
        while (true) {
            mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            const int row = tile.run[ring].row_tile * kRows;
            if (row != kept_row) kept = -1, kept_row = row;
            Cursor at(a.p, tile);
            int tap = 0;
            bool more = false, all = true;    // whether the lanes know all steps
            if (at.tile_live != steps_live) {
                steps_live = at.tile_live, steps = 0;
                more = at.next_box();
            }
            for (int i = 0;; i++) {
                if (i == steps) {    // take others as late as can be: the first loads do not wait for all of them
                    if (!more) break;
                    if (steps == 32) i = steps = 0, all = false;
                    take_steps(tile, at, tap, more);
                }
                if (loads_boxes && __shfl_sync(~0u, step.rows, i) & kOpensBox) load_box(tile, i);
                if (loads_weights) load_weights(i, row, i == steps - 1 && !more);
            }
            if (!all) steps_live = -1;
            mbarrier_arrive(head.tile_empty + slot.stage);
            slot.advance(kTileSlots);
        }
    }
};

// Whether bulk copies store the staged outputs.
__device__ __forceinline__ bool stores_bulk(const Parameters& a) { return a.dtype == kFloat32 && a.p.t.bulk; }

// A warp: stores what consumers have staged, by bulk copies of what is 16-byte aligned.
struct Storer {
    const Parameters& a;
    const SharedParts& shared;
    const CUtensorMap* out_map;
    int warp;    // of two, which take turns

    __device__ __forceinline__ void store(const Tile& tile, const Run& run, const float* buffer) const {
        const Tiling& t = a.p.t;
        if (t.tensor_store && a.dtype == kFloat32) {
            if (threadIdx.x % 32 == 0 && run.live & 1)
                tma_store_4d(out_map, buffer, run.h0 * t.tile_w + run.q0, run.od0, run.channel0, tile.n);
        } else if (stores_bulk(a)) {
            float* out = static_cast<float*>(a.out);
            for_each_piece(a.p, tile, run, threadIdx.x % 32, regions_of(a.p, run), 32, [&](int64_t at, int region, int offset, int count) {
                const int staged = region * t.region_stride + offset;
                const int head = min(count, int(-at & 3)), body = (count - head) / 4 * 4;
                if (body > 0) bulk_store(out + at + head, buffer + staged + head, body * 4);
#pragma unroll 1
                for (int k = 0; k < head; k++) out[at + k] = buffer[staged + k];
#pragma unroll 1
                for (int k = head + body; k < count; k++) out[at + k] = buffer[staged + k];
            });
        }
        bulk_commit_group();
    }

    // Tells that what it stored of a sample's tile is in memory. Both storers do for every tile.
    static __device__ __forceinline__ unsigned reports_of_sample(const Problem& p) { return 2 * unsigned(p.t.tiles / int(p.N)); }
    __device__ __forceinline__ void report(int n) const {
        bulk_wait_group<0>();
        __syncwarp();
        if (threadIdx.x % 32 == 0) add_release(a.workspace.stored + n);
    }

    // publishes: two tiles ahead, when consumers begin one; in one place, since its code is long. reports: every tile, when the next one begins and its copies have
    // ended or will have soon.
    __device__ __forceinline__ void run(Publisher& publisher, bool publishes, bool reports) const {
        SharedHead& head = shared.head;
        const int consumers = a.p.t.warpgroups;
        bool more = publishes;
        int consumer = warp, before = -1;    // before: the sample of the tile before this one, to be reported
        RingPosition slot;
#pragma unroll 1
        for (int tiles = -2;; tiles++) {
            if (tiles >= 0) mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            if (more) more = publisher.publish();
            if (tiles < 0) continue;
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            if (before >= 0) report(before);
            if (reports) before = tile.n;
            for (; consumer < consumers; consumer += 2) {
                mbarrier_wait(head.staged[tiles % 2] + consumer, tiles / 2 % 2);
                store(tile, tile.run[consumer], shared.buffer(a.p.t, consumer));
                bulk_wait_group_read<0>();
                mbarrier_arrive(head.buffer_free + consumer);
            }
            consumer -= consumers;
            mbarrier_arrive(head.tile_empty + slot.stage);
            slot.advance(kTileSlots);
        }
        bulk_wait_group<0>();
        if (before >= 0) report(before);
    }
};

// ------------------------------------------------------------------------------------------------------- Consumer

// One of the two rows that a lane has of each tile: row 16 * warp + lane / 4, and the one 8 further, in the next granule.
struct LaneRow {
    int channel, phase, packed_d;                // channel from the row tile's first on; phase among the packed ones, and of D
    int alignment, paired_place;                 // of its region and its phase of H, to be added to the run's
    int region;                                  // first float of its region
    int table;                                   // first entry of its phase in the table of staged places
    bool used, exists;                           // by a channel; by one that there is
    unsigned weight_max;                         // of the tile's channel
    float bias;
    float scale, more;                           // back to what the sums stand for: scale, unless that would not be a normal number
    bool live;                                   // there is such an output plane (one of several), channel and run
};

// Whether consumers have registers to keep the epilogue's constants from tile to tile.
template <int kBlockN> constexpr bool kKeepsConstants = kBlockN <= 136;

// What a consumer warpgroup carries from tile to tile.
struct Consumer {
    const Parameters& a;
    const SharedParts& shared;
    int warpgroup;                 // from 0 on
    RingPosition in, weight, slot;
    LaneRow rows[2];
    int channel0 = -1, n = -1;     // what the constants were loaded for
    scaled_half::SampleMax activation_max;    // of the tile's sample
    int staged = 0;                // how often this one staged outputs
    int4 table_key = {-1, 0, 0, 0};    // what the table was made for
    bool first = true;

    __device__ __forceinline__ Consumer(const Parameters& a, const SharedParts& shared) : a(a), shared(shared), warpgroup(threadIdx.x / 128 - 1) {
        const Problem& p = a.p;
        const Tiling& t = p.t;
        const int phases_h = packed_phases(t, p.s, 1), phases_w = p.s.axis[2].phases;
        for (int half = 0; half < 2; half++) {
            LaneRow& row = rows[half];
            const int granule = threadIdx.x / 32 % 4 * 2 + half, octet = granule / t.rows.packed_phases;
            row.phase = granule - octet * t.rows.packed_phases;
            row.used = octet < t.rows.octets;
            row.channel = octet * 8 + threadIdx.x % 32 / 4;
            const int phase_dh = divide_by_phases(row.phase, phases_w);
            row.packed_d = divide_by_phases(phase_dh, phases_h);
            row.region = row.used ? (row.channel * region_planes(t, p.s) + row.packed_d) * t.region_stride : 0;
            row.alignment = alignment_of_region(p, row.channel, row.packed_d), row.paired_place = (phase_dh - row.packed_d * phases_h) * staged_row(p);
            row.table = (row.phase - row.packed_d * phases_h * phases_w) * t.block_n;
        }
    }
    __device__ bool elected() const { return threadIdx.x % 32 == 0; }    // of a warp
    __device__ void sync() const { named_barrier(1 + warpgroup, 128); }
    __device__ float* buffer() const { return shared.buffer(a.p.t, warpgroup); }
    __device__ int* table() const { return reinterpret_cast<int*>(shared.tables + warpgroup * a.p.t.table_bytes); }

    // Consumers that share a buffer take turns: the first waits for the second's release of the tile before, the second for the first's
    // release of this tile. One that has its own waits for its release of the tile before.
    __device__ __forceinline__ void wait_for_buffer() {
        const int shared_buffer = a.p.t.buffers == 1, releaser = warpgroup ^ shared_buffer, release = shared_buffer && warpgroup == 1 ? staged : staged - 1;
        mbarrier_wait(shared.head.buffer_free + releaser, release & 1);
        staged++;
    }

    // Loads what the epilogue will need of global memory; prepare_rows makes use of it, many cycles later.
    // kKeeps: they are there for the next tile too, if it is of the same channels and sample.
    template <bool kKeeps> __device__ __forceinline__ void load_constants(const Tile& tile) {
        const Run& run = tile.run[warpgroup];
        if (!kKeeps || run.channel0 != channel0 || tile.n != n) {
            channel0 = run.channel0, n = tile.n;
            activation_max = a.activation_max[tile.sample];
#pragma unroll
            for (LaneRow& row : rows) {
                const int channel = channel0 + row.channel;
                row.exists = row.used && channel < a.p.C_out;
                row.weight_max = row.exists ? a.weight_max[channel] : 0;
                row.bias = row.exists && a.bias ? load_as_float(a.bias, a.dtype, channel) : 0.0f;
            }
            if (kKeeps) prepare_rows();
        }
#pragma unroll
        for (LaneRow& row : rows) row.live = row.exists && has_outputs(a.p.t, run, row.packed_d);
    }
    __device__ __forceinline__ void prepare_rows() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const auto [scale, more] = scaled_half::scale_in_parts(-scaled_half::shift_of(activation_max) - scaled_half::shift_of(rows[half].weight_max));
            rows[half].scale = scale, rows[half].more = more;
        }
    }
};

// The sums of one tile: d (64 rows, kBlockN positions) of this warpgroup. kSteps: chunk / 16; kItems: whether a stage may have several.
//
// A warp can have hardly more than one wgmma waiting behind the one that is carried out. So the next tap is looked up between those
// of this one, or the tensor cores would be idle meanwhile.
template <int kBlockN, int kSteps, bool kItems>
__device__ __forceinline__ void multiply(Consumer& me, const Tile& tile, float (&d)[kBlockN / 2]) {
    constexpr int row_vectors = kSteps * 2;    // of 16 bytes, as all addresses of operands here
    const Tiling& t = me.a.p.t;
    SharedHead& head = me.shared.head;
    const uint64_t descriptor = wgmma_descriptor_base(row_vectors * 16);
    const int b_row = tile.run[me.warpgroup].b_row, ring = t.weight_rings == 2 ? me.warpgroup * t.weight_stages : 0;
    auto let_the_other_begin = [&] {
        if (me.first && me.warpgroup == 0) named_barrier_arrive(kBeginBarrier, 256);
        me.first = false;
    };
    me.load_constants<kKeepsConstants<kBlockN>>(tile);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) make_undefined(d[i]);
    int info = kLastTap, weight_stage = -1, input_stage = -1;    // of a tap
    uint32_t box = 0, b = 0, w = 0;
    auto take_tap = [&] {
        weight_stage = me.weight.stage;
        mbarrier_wait(head.weight_full + ring + weight_stage, me.weight.phase);
        info = __shfl_sync(~0u, me.elected() ? head.taps[ring + weight_stage] : 0, 0);    // read by the lane that releases the stage
        me.weight.advance(t.weight_stages);
        if (info & kOpensBox) {
            input_stage = me.in.stage;
            mbarrier_wait(head.input_full + input_stage, me.in.phase);
            box = shared_vector(me.shared.input + input_stage * t.input_bytes) + b_row * row_vectors;
            me.in.advance(t.input_stages);
        }
        b = box + (info & kTapRows) * row_vectors, w = shared_vector(me.shared.weights + (ring + weight_stage) * t.weight_bytes);
    };
    auto multiply_steps = [&](uint32_t w, uint32_t b, int first, int end, auto anew) {
        wgmma_fence();
#pragma unroll
        for (int step = first; step < end; step++) {
            const uint64_t a_step = wgmma_descriptor(descriptor, w + step * 2), b_step = wgmma_descriptor(descriptor, b + step * 2);
            if (decltype(anew)::value && step == 0) wgmma_m64k16_f16<0, 0>(d, a_step, b_step);
            else wgmma_m64k16_f16<0>(d, a_step, b_step);
        }
        wgmma_commit_group();
    };
    int done_weight = -1, done_input = -1;    // stages whose last reader is in flight
    auto release = [&] {
        if (me.elected() && done_weight >= 0) mbarrier_arrive(head.weight_empty + ring + done_weight);
        if (me.elected() && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
    };
    auto begin_tap = [&](auto anew) {
        if constexpr (kItems) multiply_steps(w, b, 0, kSteps, anew);    // the first item is not shifted
        else multiply_steps(w, b, 0, kSteps / 2, anew);
        wgmma_wait_group<1>();    // the tap before is done
        release();
        done_weight = weight_stage, done_input = -1;
    };
    auto end_tap = [&](uint32_t w, uint32_t b) {
        if constexpr (kItems) {
            int rows = head.item_rows[1];
#pragma unroll 1
            for (int i = 1; i < t.items; i++) {
                const uint32_t b_item = b + rows * row_vectors;
                rows = head.item_rows[i + 1];
                multiply_steps(w + i * kRows * row_vectors, b_item, 0, kSteps, std::false_type());
            }
        } else {
            multiply_steps(w, b, kSteps / 2, kSteps, std::false_type());
        }
    };
    if (!tile.empty) {
        take_tap();
        begin_tap(std::true_type());
        for (int taps = 1; !(info & kLastTap); taps++) {
            const uint32_t this_w = w, this_b = b;
            const int this_input = input_stage;
            take_tap();
            if (info & kOpensBox) done_input = this_input;
            if (taps == t.lag || done_input >= 0) let_the_other_begin();
            end_tap(this_w, this_b);
            begin_tap(std::false_type());
        }
        end_tap(w, b);
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) keep_after(d[i]);    // or ptxas serializes the wgmmas
    } else {
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) make_zero(d[i]);
    }
    done_input = input_stage;
    release();
    let_the_other_begin();
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// Where a lane's row is staged.
__device__ __forceinline__ float* staged_region(const Consumer& me, const Tile& tile, const LaneRow& row) {
    const Run& run = tile.run[me.warpgroup];
    return me.buffer() + row.region + ((run.alignment + row.alignment) & (me.a.p.t.staging_unit - 1));
}

// Leaves the moments of a row, which a quad has.
__device__ __forceinline__ void leave_moments(const Consumer& me, const Tile& tile, const LaneRow& row, const Moments& m) {
    const Parameters& a = me.a;
    const Tiling& t = a.p.t;
    const Run& run = tile.run[me.warpgroup];
    float total;
    const float2 moments = m.of_quad(total);
    if (threadIdx.x % 4 == 0 && row.live) {
        const int64_t set = index_of_run(a.p, tile, me.warpgroup) * a.p.s.phases() + run.outer * t.rows.packed_phases + row.phase;
        a.workspace.sets.moments[set * t.channels() + run.channel0 + row.channel] = moments;
        a.workspace.sets.counts[set] = total;    // the same from every channel
    }
}

// Stages a tile's values, scaled back and with the bias; kRelu: with ReLU too, and leaves each row's moments where they are wanted.
template <int kBlockN, bool kRelu> struct Stager {
    const Consumer& me;
    const Tile& tile;
    const Run& run;
    float (&v)[kBlockN / 2];

    __device__ __forceinline__ void count(float value, Moments& moments, bool own = true) const {
        if (kRelu && own) moments.add(value), moments.count++;
    }
    __device__ __forceinline__ void put(float* at, float value, Moments& moments) const {
        *at = value;
        count(value, moments);
    }
    __device__ __forceinline__ void leave(const LaneRow& row, const Moments& moments) const {
        if (kRelu && me.a.workspace.sets.moments) leave_moments(me, tile, row, moments);
    }

    // A paired run: a lane's two rows are the same channel's, so it has four neighbours at a time.
    __device__ __forceinline__ void stage_pairs() const {
        const Tiling& t = me.a.p.t;
        const int lane = threadIdx.x % 32;
        Moments low, high;
        if (kRelu) low.shift = __shfl_sync(~0u, v[1], lane & ~3), high.shift = __shfl_sync(~0u, v[3], lane & ~3);    // column 1
        if (me.rows[0].live) {
            float* const region = staged_region(me, tile, me.rows[0]) + run.paired_place + me.rows[0].paired_place + lane % 4 * 4;
            const bool first_missing = lane % 4 == 0 && tile.w0 * 2 < me.a.p.s.axis[2].crop;    // column 0 has no phase 0
            const int count = run.count;    // a copy, or every store to shared memory could have changed it
            const auto put_block = [&](float* at, int j, bool begins_row) {
                if (!begins_row || !first_missing) put(at, v[j * 4], low);
                put(at + 1, v[j * 4 + 2], high), put(at + 2, v[j * 4 + 1], low), put(at + 3, v[j * 4 + 3], high);
            };
            const auto stage_rows = [&](auto vectors) {
                const int reciprocal = t.by_tile_w.divide(1 << 19) + 1, skipped = paired_row(me.a.p) - 2 * t.tile_w;    // 2^16 / blocks of 8 positions in a row
                const auto row_of = [&](int j) { return j * reciprocal >> 16; };
#pragma unroll
                for (int j = 0; j < kBlockN / 8; j++) {
                    if (j * 8 >= count) continue;
                    float* const at = region + j * 16 + row_of(j) * skipped;
                    if (decltype(vectors)::value) {
                        *reinterpret_cast<float4*>(at) = make_float4(v[j * 4], v[j * 4 + 2], v[j * 4 + 1], v[j * 4 + 3]);
                        if (kRelu) low.add(v[j * 4]), low.add(v[j * 4 + 1]), high.add(v[j * 4 + 2]), high.add(v[j * 4 + 3]), low.count += 2, high.count += 2;
                    } else {
                        put_block(at, j, j == 0 || row_of(j) != row_of(j - 1));
                    }
                }
            };
            if (t.vectors) {
                stage_rows(std::true_type());
            } else if (run.rows > 1) {
                stage_rows(std::false_type());
            } else {
#pragma unroll
                for (int j = 0; j < kBlockN / 8; j++)
                    if (j * 8 < count) put_block(region + j * 16, j, j == 0);
            }
            if (t.whole_sectors && run.oh_end < me.a.p.s.axis[1].out && me.rows[0].paired_place == 0) {    // outputs of the next row, of the last positions
                float* const next = staged_region(me, tile, me.rows[0]) + contiguous_count(me.a.p, run);
                const int first = (kBlockN - 8 + lane % 4 * 2 - run.rows * t.pitch) * 2 - me.a.p.s.axis[2].crop;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (unsigned(first + i) < kSector - 1) next[first + i] = v[kBlockN / 2 - 4 + i % 2 * 2 + i / 2];
            }
        }
        leave(me.rows[0], low), leave(me.rows[1], high);
    }

    // The value of the first output of a row, in the lanes that have it.
    __device__ __forceinline__ float first_value(int half) const {
        const Tiling& t = me.a.p.t;
        if (t.dense || me.table()[me.rows[half].table] >= 0) return __shfl_sync(~0u, v[half * 2], threadIdx.x % 32 & ~3);
        const int q = first_output(t, me.table() + me.rows[half].table), index = q / 8 * 4 + half * 2 + q % 2;
        float first = v[half * 2];
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const float low = v[j * 4 + half * 2], high = v[j * 4 + half * 2 + 1];
            first = index == j * 4 + half * 2 ? low : index == j * 4 + half * 2 + 1 ? high : first;
        }
        return __shfl_sync(~0u, first, (threadIdx.x % 32 & ~3) + q % 8 / 2);
    }

    // Rows of the lane from the first-th on, which have the same places, and all of which are live where there are several.
    template <int kCount> __device__ __forceinline__ void stage_rows(int first, const float (&shifts)[2]) const {
        const Tiling& t = me.a.p.t;
        const int lane = threadIdx.x % 32;
        const int* table = me.table() + me.rows[first].table + lane % 4 * 2;
        const unsigned own = kBlockN <= kMostPaired && t.whole_sectors ? contiguous_count(me.a.p, run) : 1u << 31;    // the places behind them are the next run's
        Moments moments[kCount];
        float* regions[kCount];
#pragma unroll
        for (int r = 0; r < kCount; r++) moments[r].shift = shifts[first + r], regions[r] = staged_region(me, tile, me.rows[first + r]);
        if (me.rows[first].live && t.dense) {    // position q is float q of its region
            const int outputs = run.count - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) {
#pragma unroll
                for (int r = 0; r < kCount; r++) {
                    const float2 pair = make_float2(v[j * 4 + (first + r) * 2], v[j * 4 + (first + r) * 2 + 1]);
                    reinterpret_cast<float2*>(regions[r] + lane % 4 * 2)[j * 4] = pair;
                    if (kRelu && j * 8 < outputs) moments[r].add(pair.x), moments[r].add(pair.y);    // runs are even
                }
            }
#pragma unroll
            for (Moments& m : moments) m.count = max(0, min((outputs + 7) / 8, kBlockN / 8)) * 2;
        } else if (me.rows[first].live) {
            constexpr int kPlaces = 4;    // pairs of them that are read at a time: no load moves in front of a store to shared memory
            uint32_t addresses[kCount];    // so that a place takes one instruction
#pragma unroll
            for (int r = 0; r < kCount; r++) addresses[r] = shared_address(regions[r]);
#pragma unroll
            for (int begin = 0; begin < kBlockN / 8; begin += kPlaces) {
                int2 places[kPlaces];
#pragma unroll
                for (int i = 0; i < kPlaces && begin + i < kBlockN / 8; i++) places[i] = *reinterpret_cast<const int2*>(table + (begin + i) * 8);
#pragma unroll
                for (int i = 0; i < kPlaces && begin + i < kBlockN / 8; i++) {
                    const int2 place = places[i];
#pragma unroll
                    for (int r = 0; r < kCount; r++) {
                        const float low = v[(begin + i) * 4 + (first + r) * 2], high = v[(begin + i) * 4 + (first + r) * 2 + 1];
                        if (place.x >= 0) shared_store(addresses[r] + place.x * 4, low), count(low, moments[r], kBlockN > kMostPaired || unsigned(place.x) < own);
                        if (place.y >= 0) shared_store(addresses[r] + place.y * 4, high), count(high, moments[r], kBlockN > kMostPaired || unsigned(place.y) < own);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kCount; r++) leave(me.rows[first + r], moments[r]);
    }

    __device__ __forceinline__ void stage() const {
        if (__any_sync(~0u, me.rows[0].more != 1 || me.rows[1].more != 1)) {
#pragma unroll
            for (int i = 0; i < kBlockN / 2; i++) v[i] *= me.rows[i / 2 % 2].more;
        }
        // In place: a store to shared memory reads its register late, and whoever wants to write another value there waits.
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) {
            v[i] = fmaf(v[i], me.rows[i / 2 % 2].scale, me.rows[i / 2 % 2].bias);
            if (kRelu) v[i] = max_nan(v[i], 0.0f);
        }
        if (kBlockN <= kMostPaired && run.paired) return stage_pairs();
        const float shifts[2] = {kRelu ? first_value(0) : 0.0f, kRelu ? first_value(1) : 0.0f};
        if (__all_sync(~0u, me.rows[0].live && me.rows[1].live && me.rows[0].table == me.rows[1].table)) return stage_rows<2>(0, shifts);
        stage_rows<1>(0, shifts);
        stage_rows<1>(1, shifts);
    }
};

// A warp: stores a piece of staged outputs, four at a time where they are staged as they are aligned in memory.
__device__ __forceinline__ void store_piece(const Parameters& a, int64_t at, const float* from, int count) {
    const int lane = threadIdx.x % 32, head = a.p.t.bulk ? min(count, int(-at & 3)) : count, body = (count - head) / 4, tail = head + body * 4;
#pragma unroll 1
    for (int k = lane; k < head; k += 32) store_as(a.out, a.dtype, at + k, from[k]);
    if (lane < count - tail) store_as(a.out, a.dtype, at + tail + lane, from[tail + lane]);
#pragma unroll 2
    for (int k = lane; k < body; k += 32) store_as(a.out, a.dtype, (at + head) / 4 + k, reinterpret_cast<const float4*>(from + head)[k]);
}

// What a consumer does behind a tile's products.
template <int kBlockN, bool kRelu>
__device__ __forceinline__ void finish(Consumer& me, const Tile& tile, float (&v)[kBlockN / 2]) {
    const Parameters& a = me.a;
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[me.warpgroup];
    if (!kKeepsConstants<kBlockN>) me.prepare_rows();
    me.wait_for_buffer();
    if (!t.dense && !run.paired) {
        const int4 key = table_key(p, tile, run);
        if (!same_key(key, me.table_key)) {
            fill_table<kBlockN>(p, tile, run, [&] { return me.table(); });
            me.table_key = key;
        }
        me.sync();
    }
    Stager<kBlockN, kRelu>{me, tile, run, v}.stage();
    fence_proxy_async();
    if (!stores_bulk(a)) {
        me.sync();
        const float* buffer = me.buffer();
        for_each_piece(p, tile, run, threadIdx.x / 32 % 4, regions_of(p, run), 4, [&](int64_t at, int region, int offset, int count) {
            store_piece(a, at, buffer + region * t.region_stride + offset, count);
        });
    }
    mbarrier_arrive(me.shared.head.staged[1 - me.staged % 2] + me.warpgroup);    // counted already
}

template <int kBlockN, bool kRelu>
__device__ __forceinline__ void consume(const Parameters& a, const SharedParts& shared) {
    Consumer me(a, shared);
    SharedHead& head = shared.head;
    float d[kBlockN / 2] = {};
    while (true) {
        mbarrier_wait(head.tile_full + me.slot.stage, me.slot.phase);
        const Tile& tile = head.tiles[me.slot.stage];
        if (tile.n < 0) break;
        if (me.first && me.warpgroup == 1) named_barrier(kBeginBarrier, 256);
        if (is_built(kBlockN, 16, true) && a.p.t.chunk == 16) multiply<kBlockN, 1, true>(me, tile, d);
        else if (is_built(kBlockN, 32, true) && a.p.t.chunk == 32) multiply<kBlockN, 2, true>(me, tile, d);
        else if (is_built(kBlockN, 64, true) && a.p.t.items > 1) multiply<kBlockN, 4, true>(me, tile, d);
        else if (is_built(kBlockN, 64, false)) multiply<kBlockN, 4, false>(me, tile, d);
        finish<kBlockN, kRelu>(me, tile, d);
        mbarrier_arrive(head.tile_empty + me.slot.stage);
        me.slot.advance(kTileSlots);
    }
}

#endif  // HAS_SM90A

}  // namespace conv_sm90
'''

_SOURCES['conv_launch_sm90.cuh'] = r'''
// The Hopper convolution's kernel and its launch.
#pragma once

#include "conv_plan.cuh"
#include "conv_sm90.cuh"

namespace conv_sm90 {

// --------------------------------------------------------------------------------------------------------- Kernel

// kRelu: a.apply_relu. Each of the two is a kernel of its own: much of a short call is code that is brought for the first time.
template <int kBlockN, int kConsumers, bool kRelu>
__global__ void __launch_bounds__(threads_of(kConsumers), 1)
conv_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map,
            const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    const Tiling& t = a.p.t;
    const SharedParts shared(base, t);
    SharedHead& head = shared.head;
    const bool normalizes = kRelu && a.norm.blocks > 0;

    // Prologue: barriers, and zeros behind each box, where the last row's halo looks.
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.input_stages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 4 * kConsumers);
        for (int i = 0; i < t.weight_rings * t.weight_stages; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, t.weight_rings == 2 ? 4 : 4 * kConsumers);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, kConsumers), mbarrier_init(head.tile_empty + i, 128 * kConsumers + 2 * 32 + t.loaders * 32);
        for (int i = 0; normalizes && i < 4 * kConsumers * kPieceStages; i++) mbarrier_init(head.piece_full[0] + i, 1);
        for (int i = 0; i < kConsumers; i++) mbarrier_init(head.buffer_free + i, 32), mbarrier_init(head.staged[0] + i, 128), mbarrier_init(head.staged[1] + i, 128);
        fence_mbarrier_init();
    }
    if (t.items > 1 && threadIdx.x < t.items) head.item_rows[threadIdx.x] = rows_of_item(a.p, threadIdx.x);
    const int box_bytes = t.box_bytes();
    for (int stage = 0; stage < t.input_stages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += blockDim.x * 4) *reinterpret_cast<uint32_t*>(shared.input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    // A warp for each task beside the warpgroups that compute. The first tile is located while the kernel before this one ends: what reads memory waits for that.
    const int warp = threadIdx.x / 32;
    if (warp < 4) {
        setmaxnreg_dec<producer_registers(kConsumers)>();
        if (warp < t.loaders) {
            Loader{a, shared, &x_map, &w_map, t.weight_rings == 2 ? warp : 0, warp == t.box_loader, warp < t.weight_rings}.run();
        } else {
            const bool publishes = warp == (t.loaders == 2 ? 3 : 1);
            Publisher publisher(a, head);
            if (warp >= 2) Storer{a, shared, &out_map, warp - 2}.run(publisher, publishes, normalizes);
            else while (publisher.publish()) {}
        }
        if (normalizes) find_statistics(a, Storer::reports_of_sample(a.p), head.statistics, kStatisticsBarrier);
    } else {
        setmaxnreg_inc<consumer_registers(kConsumers)>();
        wait_for_previous_kernel();
        consume<kBlockN, kRelu>(a, shared);
        if (normalizes) {
            named_barrier(kStagesFreeBarrier, 128 * kConsumers);
            PieceNormalizer(a, shared.input + (warp - 4) * kPieceStages * piece_floats(t) * 4, head.piece_full[warp - 4]).run();
        }
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN, int kConsumers = 2>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;    // those that normalize beside the others included
    return launch_with_shared(a.apply_relu ? conv_kernel<kBlockN, kConsumers, true> : conv_kernel<kBlockN, kConsumers, false>, blocks, threads_of(kConsumers), shared_bytes(t), stream, x_map, w_map, out_map, a);
}

// The convolution's launches on Hopper (conv_plan.cuh).
struct Path {
    static Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int) {
        return conv_sm90::choose_tiling(s, samples, source_channels, channels, groups, multiprocessors);
    }
    static int normalizing_blocks(const Plan& plan, const group_norm::Shape& shape, int dtype, int y_dtype, const void* r, const void* y) {
        return conv::normalizing_blocks(plan.problem, shape, dtype, y_dtype, plan.multiprocessors, r, y);
    }
    // a.out = the convolution of packed operands, or the parts of it, and its moments where there is room for them.
    static int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
        const Problem& p = a.p;
        const Tiling& t = p.t;
        const StencilAxis* axis = p.s.axis;
        CUtensorMap x_map, w_map, out_map = {};
        const CUtensorMapSwizzle swizzle = swizzle_of(t.chunk * 2);
        RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, source.copy, {source.phase_channels * source.phases(), axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {t.chunk, t.pitch, t.box_rows, t.planes, 1}));
        RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, weight.copy, {t.C_pad * t.products, t.M_pad, p.s.taps()}, {t.chunk, kRows, t.item_taps}));
        if (t.tensor_store && a.dtype == kFloat32)
            RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE, a.out, {int64_t(axis[1].out) * axis[2].out, axis[0].out, p.C_out, p.N * t.k_parts}, {t.run, 1, t.region_channels, 1}));
        switch (t.block_n) {
            case 232: return launch_conv<232>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 224: return launch_conv<224>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 200: return launch_conv<200>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 192: return launch_conv<192>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 160: return launch_conv<160>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 136: return launch_conv<136, 3>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 128: return launch_conv<128>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 88: return launch_conv<88>(x_map, w_map, out_map, a, multiprocessors, stream);
            default: return launch_conv<64>(x_map, w_map, out_map, a, multiprocessors, stream);
        }
    }
};

}  // namespace conv_sm90
'''

_SOURCES['conv_transpose3d_sm90.cu'] = r'''
// Transposed convolution on Hopper: wgmma, TMA.

#include "conv_launch_sm90.cuh"
#include "conv_transpose3d_forward.cuh"

FORWARD_LAUNCHERS(sm90, conv_sm90::Path)

// Estimated, of a multiprocessor; infinite where no tiling fits.
extern "C" double conv_transpose3d_forward_cycles_sm90(const Geometry* g, int device) {
    const conv::Tiling& t = conv::plan_of<conv_sm90::Path>(*g, Direction::kForward, device).problem.t;
    return t.block_n > 0 ? t.cycles : INFINITY;
}
'''

_SOURCES['polyphase_tiles.h'] = r'''
// How a strided forward of one group is cut by the phases of its outputs (polyphase_sm90.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace polyphase {

using conv::kRows;
constexpr int kChunk = 64;                 // source channels of a stage
constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kPhasesW = 2, kMaxTapsW = 4;
constexpr int kMaxPhases = kMaxStride * kMaxStride;    // of (d, h)
constexpr int kMaxBoxes = 4, kMaxWeights = 8, kTileSlots = 4;    // stages
constexpr int kHeadBytes = 1024;

// Outputs stride * j + r of an axis are of phase r, and j is their position (geometry.h, Phase). A tile has one phase of D and of H, both of W, 64 output channels, and for each of two consumers
// so many columns of GEMM_N: `rows` rows of `tile_w` positions, of `run_planes` planes. Rows are `pitch` columns apart, planes box_rows rows: GEMM_N's columns are neighbours in the box of the
// source that a tap of D reads, halo included, and other taps of H and W are shifts of the operand's first row. The second consumer has the next rows, or the next planes.
struct Plan {
    Phase phase_d[kMaxStride], phase_h[kMaxStride];
    int order[kMaxPhases];                 // phases d * strides_h + h, those with the most taps first
    int phases, phases_h;
    int N, C_out, channel_tiles, chunks;
    int D, H, W, in_d;                     // outputs of an axis; planes of the source
    int kernel_h, taps_w;                  // elements of the kernel
    int tap_w[kMaxTapsW], shift_w[kMaxTapsW];    // elements of W in the order in which they are multiplied, of phase 1 and 0 in turns; first rows in the box
    int first_w;                           // column of the source where the box of the first strip begins
    int block_n;                           // GEMM_N of a consumer
    int tile_w, strips, pitch;
    int rows, row_tiles;                   // of a consumer; tiles of all rows
    int run_planes, planes, plane_groups;  // of a consumer, of a tile; tiles of all planes
    int box_rows, span_h, span_w;          // columns and rows by which taps of H and W are apart, at most
    bool consumers_have_planes;            // of their own, not rows
    int boxes, weights;                    // stages
    int places, last_places, tiles;        // tiles of a phase
    double cycles;                         // estimated, of a multiprocessor
    Divisor by_phases, by_last_places, by_channel_tiles, by_strips, by_row_tiles, by_plane_groups, by_pitch, by_box_rows;
    HOST_DEVICE int positions_w() const { return (W + kPhasesW - 1) / kPhasesW; }
    HOST_DEVICE bool stores_vectors() const { return W % 4 == 0; }    // of four outputs; else outputs are staged
    HOST_DEVICE int sample_places() const { return strips * row_tiles * plane_groups; }
    HOST_DEVICE int parts() const { return phases * sample_places() * kConsumers; }    // of a sample, each a consumer's outputs of a tile
    HOST_DEVICE int box_bytes() const { return planes * box_rows * pitch * kChunk * 2; }
    HOST_DEVICE int consumer_row() const { return (consumers_have_planes ? run_planes * box_rows : rows) * pitch; }    // of the box, where the second consumer begins
    HOST_DEVICE int box_stage_bytes() const {    // what is read for columns that are no positions included
        const int rows = (kConsumers - 1) * consumer_row() + span_h * pitch + span_w + block_n, bytes = rows * kChunk * 2;
        return ((bytes > box_bytes() ? bytes : box_bytes()) + 1023) / 1024 * 1024;
    }
    HOST_DEVICE int weight_bytes() const { return taps_w * kRows * kChunk * 2; }
    HOST_DEVICE int staged_row() const { return (tile_w + 1) / 2 * 2 * kPhasesW; }    // outputs, where they are staged
    HOST_DEVICE int staged_channel() const { return (run_planes * rows * staged_row() + 15) / 32 * 32 + 16; }    // without bank conflicts
    HOST_DEVICE int staged_bytes() const { return stores_vectors() ? 0 : kConsumers * kRows / 2 * staged_channel() * 4; }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + boxes * box_stage_bytes() + weights * weight_bytes() + staged_bytes(); }
};

// The rows from which a phase of H reads the source, for position 0.
HOST_DEVICE int first_row(const Phase& h) { return h.src + (h.taps - 1) * h.src_tap_step; }

// A tile, and the taps of D that read a plane of the source: those from first_tap on.
struct Tile {
    int n;                                 // sample, or -1: no more
    int channel0, d, h0, w0;               // first output channel, positions
    int phase_d, phase_h;
    int first_tap, taps_d;
    int part;                              // of the sample and the output channels
};

HOST_DEVICE Tile locate(const Plan& p, int i) {
    Tile t;
    // All phases of a place, one place after the other; in the end the last places' tiles, those with the most taps first.
    int phase;
    if (i < (p.places - p.last_places) * p.phases) {
        phase = p.by_phases.take(i);
    } else {
        i -= (p.places - p.last_places) * p.phases;
        const int place = p.places - p.last_places + p.by_last_places.take(i);
        phase = i, i = place;
    }
    phase = p.order[phase];
    t.channel0 = p.by_channel_tiles.take(i) * kRows;
    const int place = i;
    t.w0 = p.by_strips.take(i) * p.tile_w;
    t.h0 = p.by_row_tiles.take(i) * p.rows * (p.consumers_have_planes ? 1 : kConsumers);
    t.d = p.by_plane_groups.take(i) * p.planes;
    t.n = i;
    t.part = phase * p.sample_places() + place - t.n * p.sample_places();
    t.phase_d = phase / p.phases_h, t.phase_h = phase % p.phases_h;
    const Phase& d = p.phase_d[t.phase_d];
    int tap = 0, end = d.taps;             // later taps read earlier planes
    while (tap < end && t.d + d.src + tap * d.src_tap_step >= p.in_d) tap++;
    while (end > tap && t.d + p.planes - 1 + d.src + (end - 1) * d.src_tap_step < 0) end--;
    if (t.d >= d.count || p.phase_h[t.phase_h].taps == 0) end = tap;
    t.first_tap = tap, t.taps_d = end - tap;
    return t;
}

// Where column c of a consumer is. x is not below tile_w, or y not below p.rows, where that is no position.
struct Column { int plane, y, x; };
HOST_DEVICE Column column_at(const Plan& p, int c) {
    const int row = p.by_pitch.divide(c), plane = p.run_planes > 1 ? p.by_box_rows.divide(row) : 0;
    return {plane, row - plane * p.box_rows, c - row * p.pitch};
}

// Cycles that a consumer takes to store its outputs: by bytes, where vectors begin in the middle of sectors more; or, staged, by rows and requests of up to 32 outputs, channels that there are not included.
inline double store_cycles(const Plan& p) {
    const double rows = double(p.run_planes) * p.rows;
    if (p.stores_vectors()) return double(p.C_out) / p.channel_tiles * rows * p.tile_w * kPhasesW * 4 / (p.pitch % 4 == 0 ? 16 : 14);
    return kRows * rows * (8 + 10 * ceil_div(p.tile_w * kPhasesW, 32));
}

// Estimated cycles of the busiest multiprocessor. The numbers are fitted to 441 times of 33 layers (NOTES.md).
inline double time_of(const Plan& p, int multiprocessors) {
    const double stage = 1.06 * p.taps_w * (kChunk / 16) * kConsumers * p.block_n / 2 + 70, box = (1900 + p.box_bytes() / 60) / (p.boxes - 1);    // its products; its load, others under way
    double all = 0, longest = 0, shortest = 1e30;
    for (int i = 0; i < p.phases; i++) {
        const int taps_d = p.phase_d[p.order[i] / p.phases_h].taps, taps_h = p.phase_h[p.order[i] % p.phases_h].taps;
        const double products = taps_d * p.chunks * std::max(taps_h * stage, box), stores = kConsumers * store_cycles(p);    // one consumer after the other
        const double tile = std::max(products, stores) + 0.46 * std::min(products, stores) + 850;
        all += tile * p.places / multiprocessors, longest = std::max(longest, tile), shortest = std::min(shortest, tile);
    }
    return std::max(longest, all + shortest / 2) + 6900;
}

// The phase of W whose element is multiplied in turn `i`: of three elements, two are of phase 1.
HOST_DEVICE constexpr int phase_of_turn(int taps, int i) { return (i + (taps == 3)) % 2; }

// The layer: the phases of its axes, and which of them elements of the kernel are of.
inline void set_layer(Plan& p, const Geometry& g) {
    const Axis &d = g.axis[0], &h = g.axis[1], &w = g.axis[2];
    p.N = int(g.N), p.C_out = int(g.C_out), p.channel_tiles = int(ceil_div(g.C_out, kRows)), p.chunks = int(ceil_div(g.C_in, kChunk));
    p.D = int(d.out), p.H = int(h.out), p.W = int(w.out), p.in_d = int(d.in);
    p.phases_h = int(h.stride), p.phases = int(d.stride) * p.phases_h;
    for (int r = 0; r < d.stride; r++) p.phase_d[r] = make_phase(Direction::kForward, d, r);
    for (int r = 0; r < h.stride; r++) {
        p.phase_h[r] = make_phase(Direction::kForward, h, r);
        p.span_h = std::max(p.span_h, -(p.phase_h[r].taps - 1) * p.phase_h[r].src_tap_step);
    }
    for (int i = 0; i < p.phases; i++) p.order[i] = i;
    std::stable_sort(p.order, p.order + p.phases, [&](int a, int b) {
        const auto taps = [&](int phase) { return p.phase_d[phase / p.phases_h].taps * p.phase_h[phase % p.phases_h].taps; };
        return taps(a) > taps(b);
    });
    p.kernel_h = int(h.kernel), p.taps_w = int(w.kernel);
    int last = -(1 << 30);    // column of the source that position 0 reads
    p.first_w = 1 << 30;
    for (int i = 0; i < p.taps_w; i++) {
        const int phase = phase_of_turn(p.taps_w, i), k = (i + phase + int(w.padding)) % 2 ? i ^ 1 : i;    // output 2 j + phase reads column j + (phase + padding - k * dilation) / 2
        p.tap_w[i] = k, p.shift_w[i] = int((phase + w.padding - k * w.dilation) / 2);
        p.first_w = std::min(p.first_w, p.shift_w[i]), last = std::max(last, p.shift_w[i]);
    }
    p.span_w = last - p.first_w;
    for (int& shift : p.shift_w) shift -= p.first_w;
}

// Cuts the positions into tiles of `strips` strips, rows apart by a multiple of `unit` columns. False where that does not go.
inline bool cut(Plan& p, const Geometry& g, int strips, int unit) {
    const int positions_d = int(ceil_div(p.D, g.axis[0].stride)), positions_h = int(ceil_div(p.H, g.axis[1].stride)), positions_w = p.positions_w();
    p.tile_w = int(ceil_div(positions_w, strips)), p.strips = strips;
    if (strips > 1) p.tile_w += p.tile_w % 2, p.strips = int(ceil_div(positions_w, p.tile_w));
    p.pitch = conv::round_up(conv::box_pitch(p.span_w, -p.first_w, positions_w + p.first_w + p.span_w - int(g.axis[2].in), p.tile_w, p.strips), unit);
    if (p.tile_w > p.block_n || p.pitch > 256) return false;
    p.rows = (p.block_n - p.tile_w) / p.pitch + 1;
    if (p.consumers_have_planes) {
        if (p.rows < positions_h || positions_d == 1) return false;
        p.rows = positions_h, p.row_tiles = 1, p.box_rows = p.rows + p.span_h;
        p.run_planes = std::min((p.block_n - (p.rows - 1) * p.pitch - p.tile_w) / (p.box_rows * p.pitch) + 1, int(ceil_div(positions_d, kConsumers)));
        p.planes = kConsumers * p.run_planes;
    } else {
        const int tiles = int(ceil_div(positions_h, kConsumers * p.rows));
        p.rows = int(ceil_div(positions_h, kConsumers * tiles)), p.row_tiles = int(ceil_div(positions_h, kConsumers * p.rows));
        p.run_planes = p.planes = 1, p.box_rows = kConsumers * p.rows + p.span_h;
    }
    if (p.box_rows > 256 || p.planes > 256) return false;
    p.plane_groups = int(ceil_div(positions_d, p.planes));
    const int64_t places = int64_t(p.N) * p.plane_groups * p.row_tiles * p.strips * p.channel_tiles;
    if (places * p.phases > 1 << 29) return false;
    p.places = int(places), p.tiles = p.places * p.phases;
    return true;
}

// Boxes of the stages that there is room for, but for those of four stages of weights. False where there is too little.
inline bool lay_out_stages(Plan& p, int64_t most_shared) {
    const auto room = [&] { return most_shared - kHeadBytes - int64_t(p.boxes) * p.box_stage_bytes() - p.staged_bytes(); };
    for (p.boxes = kMaxBoxes; p.boxes > 2 && room() < 4 * p.weight_bytes();) p.boxes--;
    p.weights = int(std::min(room() / p.weight_bytes(), int64_t(kMaxWeights)));
    return p.weights >= 3;
}

// The plan of least estimated time, or one without tiles where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {}, best = {};
    const Axis& w = g.axis[2];
    if (!has_stencil(g) || g.groups > 1 || w.stride != kPhasesW || w.dilation % 2 == 0 || w.kernel < 2 || w.kernel > kMaxTapsW || (w.kernel == 3 && w.padding % 2 == 0)) return best;
    if (g.C_in <= kChunk / 2 || g.C_in >= 1 << 20 || g.C_out >= 1 << 20 || g.N >= 1 << 20) return best;
    set_layer(p, g);
    for (int block_n : {72, 80, 104, 144})
    for (bool consumers_have_planes : {false, true})
    for (int strips = 1; strips <= 16; strips++)
    for (int unit : {2, 4, 8}) {
        p.block_n = block_n, p.consumers_have_planes = consumers_have_planes;
        if (!cut(p, g, strips, unit) || !lay_out_stages(p, most_shared)) continue;
        p.last_places = std::min(p.places, int(ceil_div(2 * multiprocessors, p.phases)));
        p.cycles = time_of(p, multiprocessors);
        if (best.tiles == 0 || p.cycles < best.cycles) best = p;
    }
    if (best.tiles == 0) return best;
    best.by_phases = make_divisor(best.phases), best.by_last_places = make_divisor(best.last_places);
    best.by_channel_tiles = make_divisor(best.channel_tiles), best.by_strips = make_divisor(best.strips), best.by_row_tiles = make_divisor(best.row_tiles), best.by_plane_groups = make_divisor(best.plane_groups);
    best.by_pitch = make_divisor(best.pitch), best.by_box_rows = make_divisor(best.box_rows);
    return best;
}

}  // namespace polyphase
'''

_SOURCES['polyphase_sm90.cuh'] = r'''
// Strided transposed convolution of one group of many channels, alone or with ReLU and GroupNorm behind it, TF32-equivalent, from packed operands: wgmma for sm_90a.
//
//   out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh), channels-last: GEMM_M = output channels, GEMM_N = positions, GEMM_K = (tap, input channel), for one phase of the outputs (polyphase_tiles.h) at a time,
// so that nothing is multiplied with zeros between taps. Both phases of W are in the registers of the same warpgroup: a thread has two neighbouring positions of each, four neighbours in memory.
//
// One block per multiprocessor: a warp that takes tiles from a queue and loads their boxes of the source and their weights, and two warpgroups that multiply. These share boxes and weights, and take
// turns to store, so that one multiplies while the other stores. Fused: it leaves the moments of relu(out), of which conv_statistics.cuh makes the statistics.
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.
#pragma once

#include <type_traits>

#include "conv_statistics.cuh"
#include "pipeline_sm90.cuh"
#include "polyphase_tiles.h"
#include "scaled_half.cuh"

namespace polyphase {

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;

struct Parameters {
    Plan p;
    bool apply_relu;
    const float* bias;                               // (C_out), or null
    float* out;
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (C_out)
    unsigned* ticket;                                // of the next tile but a block's first; starts at zero
    group_norm::MomentSets sets;                     // of relu(out)
};

struct SharedHead {
    uint64_t box_full[kMaxBoxes], box_empty[kMaxBoxes], weight_full[kMaxWeights], weight_empty[kMaxWeights], tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t stored[kConsumers];
    Tile tiles[kTileSlots];
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the boxes begin behind the head");

#ifdef HAS_SM90A

// The parts of shared memory: the head, boxes (planes, box_rows, pitch, kChunk), weights (taps_w, kRows, kChunk), eight channels' outputs of each warp that multiplies (8, staged_channel).
struct SharedParts {
    SharedHead& head;
    uint8_t *boxes, *weights;
    float* staged;
    __device__ SharedParts(uint8_t* base, const Plan& p)
        : head(*reinterpret_cast<SharedHead*>(base)), boxes(base + kHeadBytes), weights(boxes + p.boxes * p.box_stage_bytes()), staged(reinterpret_cast<float*>(weights + p.weights * p.weight_bytes())) {}
};

// A thread: takes tiles and loads what they need.
__device__ __forceinline__ void load_all(const Parameters& a, const SharedParts& shared, const CUtensorMap* x_map, const CUtensorMap* w_map) {
    const Plan& p = a.p;
    SharedHead& head = shared.head;
    RingPosition box, weight, slot;
    for (int i = blockIdx.x;; i = gridDim.x + atomicAdd(a.ticket, 1u)) {
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        Tile tile = {-1};
        if (i < p.tiles) tile = locate(p, i);
        head.tiles[slot.stage] = tile;
        mbarrier_arrive(head.tile_full + slot.stage);
        slot.advance(kTileSlots);
        if (tile.n < 0) return;
        const Phase &d = p.phase_d[tile.phase_d], &h = p.phase_h[tile.phase_h];
        for (int tap_d = tile.first_tap; tap_d < tile.first_tap + tile.taps_d; tap_d++)
            for (int chunk = 0; chunk < p.chunks; chunk++) {
                mbarrier_wait(head.box_empty + box.stage, box.phase ^ 1);
                mbarrier_arrive_expect_tx(head.box_full + box.stage, p.box_bytes());
                tma_load_5d(shared.boxes + box.stage * p.box_stage_bytes(), x_map, head.box_full + box.stage, chunk * kChunk, tile.w0 + p.first_w, tile.h0 + first_row(h), tile.d + d.src + tap_d * d.src_tap_step, tile.n);
                box.advance(p.boxes);
                for (int tap_h = 0; tap_h < h.taps; tap_h++) {
                    mbarrier_wait(head.weight_empty + weight.stage, weight.phase ^ 1);
                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, p.weight_bytes());
                    tma_load_3d(shared.weights + weight.stage * p.weight_bytes(), w_map, head.weight_full + weight.stage, chunk * kChunk, tile.channel0, ((d.k + tap_d * d.k_step) * p.kernel_h + h.k + tap_h * h.k_step) * p.taps_w);
                    weight.advance(p.weights);
                }
            }
    }
}

// One of the two output channels that a thread has.
struct Channel {
    bool exists;
    unsigned weight_max;
    float bias, scale, more;    // back to what the sums stand for: scale, unless that would not be a normal number
};

// A consumer warpgroup.
template <int kBlockN, int kTapsW> struct Consumer {
    const Parameters& a;
    const SharedParts& shared;
    int warpgroup, warp, lane;
    RingPosition box, weight;
    int offsets[kBlockN / 8];    // of the first of two neighbouring columns' outputs, or -1; where they are staged, of that place
    Channel channels[2];
    scaled_half::SampleMax activation_max;    // of the tile's sample

    __device__ __forceinline__ Consumer(const Parameters& a, const SharedParts& shared) : a(a), shared(shared), warpgroup(threadIdx.x / 128 - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const Column at = column_at(a.p, j * 8 + lane % 4 * 2);
            offsets[j] = -1;
            if (at.plane < a.p.run_planes && at.y < a.p.rows && at.x < a.p.tile_w)
                offsets[j] = a.p.stores_vectors() ? offset_of(at) : (at.plane * a.p.rows + at.y) * a.p.staged_row() + at.x * kPhasesW;
        }
    }

    // The first of the thread's output channels, in a tile; the second is 8 further.
    __device__ __forceinline__ int own_channel() const { return warp * 16 + lane / 4; }

    // Loads what the outputs will need; prepare_channels makes use of it, many cycles later.
    __device__ __forceinline__ void load_channels(const Tile& tile) {
        activation_max = a.activation_max[tile.n];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int channel = tile.channel0 + own_channel() + half * 8;
            Channel& c = channels[half];
            c.exists = channel < a.p.C_out;
            c.weight_max = c.exists ? a.weight_max[channel] : 0;
            c.bias = c.exists && a.bias ? a.bias[channel] : 0.0f;
        }
    }
    __device__ __forceinline__ void prepare_channels() {
#pragma unroll
        for (Channel& c : channels) {
            const auto [scale, more] = scaled_half::scale_in_parts(-scaled_half::shift_of(activation_max) - scaled_half::shift_of(c.weight_max));
            c.scale = scale, c.more = more;
        }
    }

    // The sums of a tile: of elements of W in even turns, and in odd ones.
    __device__ __forceinline__ void multiply(const Tile& tile, float (&even)[kBlockN / 2], float (&odd)[kBlockN / 2]) {
        constexpr int kRowVectors = kChunk * 2 / 16;    // of 16 bytes, as all addresses of operands here
        const Plan& p = a.p;
        SharedHead& head = shared.head;
        const Phase& h = p.phase_h[tile.phase_h];
        const uint64_t descriptor = wgmma_descriptor_base(kChunk * 2);
        int stages = tile.taps_d * p.chunks * h.taps;
        if (stages == 0) {
#pragma unroll
            for (int i = 0; i < kBlockN / 2; i++) make_zero(even[i]), make_zero(odd[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) make_undefined(even[i]), make_undefined(odd[i]);
        const int step_h = h.src_tap_step * p.pitch * kRowVectors, last_h = (h.taps - 1) * -step_h + warpgroup * p.consumer_row() * kRowVectors;
        int tap_h = 0, box_stage = 0, done_weight = -1, done_box = -1;    // done: stages whose last reader is in flight
        uint32_t b = 0;
        const auto multiply_stage = [&](auto anew) {
            if (tap_h == 0) {
                box_stage = box.stage;
                mbarrier_wait(head.box_full + box_stage, box.phase);
                b = shared_vector(shared.boxes + box_stage * p.box_stage_bytes()) + last_h;
                box.advance(p.boxes);
            }
            mbarrier_wait(head.weight_full + weight.stage, weight.phase);
            const uint32_t w = shared_vector(shared.weights + weight.stage * p.weight_bytes());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTapsW; k++)
#pragma unroll
                for (int step = 0; step < kChunk / 16; step++) {
                    const uint64_t a_step = wgmma_descriptor(descriptor, w + p.tap_w[k] * kRows * kRowVectors + step * 2), b_step = wgmma_descriptor(descriptor, b + p.shift_w[k] * kRowVectors + step * 2);
                    if (decltype(anew)::value && k < 2 && step == 0) wgmma_m64k16_f16<0, 0>(k % 2 ? odd : even, a_step, b_step);
                    else wgmma_m64k16_f16<0>(k % 2 ? odd : even, a_step, b_step);
                }
            wgmma_commit_group();
            wgmma_wait_group<1>();
            if (lane == 0 && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
            if (lane == 0 && done_box >= 0) mbarrier_arrive(head.box_empty + done_box);
            done_weight = weight.stage, done_box = -1;
            weight.advance(p.weights);
            b += step_h;
            if (++tap_h == h.taps) tap_h = 0, done_box = box_stage;
        };
        multiply_stage(std::true_type());
        while (--stages > 0) multiply_stage(std::false_type());
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) keep_after(even[i]), keep_after(odd[i]);    // or ptxas serializes the wgmmas
        if (lane == 0) mbarrier_arrive(head.weight_empty + done_weight), mbarrier_arrive(head.box_empty + done_box);
    }

    // Where the consumer's outputs of a tile are: those of the thread's two channels, from the first position on, and what there is of them.
    struct Outputs {
        float *tile, *first, *second;        // of the tile's first channel; of the thread's two
        int channel0, planes, rows, columns, width;    // positions; outputs of a row
        // How many outputs there are of both phases of a column and the next, four neighbours in memory. (Rows are an even number of columns apart.)
        __device__ __forceinline__ int count(const Column& at) const { return at.plane < planes && at.y < rows ? max(0, min(4, width - at.x * kPhasesW)) : 0; }
    };
    __device__ __forceinline__ Outputs outputs_of(const Tile& tile) const {
        const Plan& p = a.p;
        const Phase &pd = p.phase_d[tile.phase_d], &ph = p.phase_h[tile.phase_h];
        const int d0 = tile.d + (p.consumers_have_planes ? warpgroup * p.run_planes : 0), h0 = tile.h0 + (p.consumers_have_planes ? 0 : warpgroup * p.rows), row = (pd.dst + d0 * pd.dst_step) * p.H + ph.dst + h0 * ph.dst_step;
        const int64_t volume = int64_t(p.D) * p.H * p.W;
        float* const to = a.out + (int64_t(tile.n) * p.C_out + tile.channel0) * volume + int64_t(row) * p.W + tile.w0 * kPhasesW, * const first = to + own_channel() * volume;
        const int columns = min(p.tile_w, p.positions_w() - tile.w0);
        return {to, first, first + 8 * volume, tile.channel0, min(p.run_planes, pd.count - d0), min(p.rows, ph.count - h0), columns, min(columns * kPhasesW, p.W - tile.w0 * kPhasesW)};
    }
    __device__ __forceinline__ bool are_whole(const Outputs& to) const { return a.p.stores_vectors() && to.planes == a.p.run_planes && to.rows == a.p.rows && to.columns == a.p.tile_w; }
    // The thread's first column, anew, so that what follows from it is not kept in registers from one use to the next.
    __device__ __forceinline__ int first_column() const {
        int column = lane % 4 * 2;
        asm volatile("" : "+r"(column));
        return column;
    }
    __device__ __forceinline__ int offset_of(const Column& at) const { return (at.plane * a.p.phase_d[0].dst_step * a.p.H + at.y * a.p.phase_h[0].dst_step) * a.p.W + at.x * kPhasesW; }
    __device__ __forceinline__ float output(float sum, int half) const { return fmaf(sum, channels[half].scale, channels[half].bias); }

    // Phases 0 and 1 of two positions, of one of the channels.
    __device__ __forceinline__ float4 four_outputs(int j, int half, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const int i = j * 4 + half * 2;
        return make_float4(output(phase0[i], half), output(phase1[i], half), output(phase0[i + 1], half), output(phase1[i + 1], half));
    }
    __device__ __forceinline__ void store_four(const Outputs& to, int j, int offset, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 four = four_outputs(j, half, phase0, phase1);
            if (channels[half].exists) *reinterpret_cast<float4*>((half ? to.second : to.first) + offset) = four;
        }
    }

    // Stores all outputs of a consumer, where rows are whole vectors. The code is short, as it is executed once a tile.
    __device__ __forceinline__ void store_whole(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            if (offsets[j] < 0) continue;
            store_four(to, j, offsets[j], phase0, phase1);
        }
    }

    // Stores those that there are, where rows are whole vectors.
    __device__ __forceinline__ void store_part(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const int first = first_column();
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const Column at = column_at(a.p, j * 8 + first);
            if (to.count(at) == 0) continue;
            store_four(to, j, offset_of(at), phase0, phase1);
        }
    }

    // Stores outputs of rows that begin anywhere: a warp's are staged, eight channels at a time, of which it stores rows.
    __device__ __forceinline__ void store_staged(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Plan& p = a.p;
        float* const staged = shared.staged + (warpgroup * 4 + warp) * (8 * p.staged_channel());
        const int64_t volume = int64_t(p.D) * p.H * p.W;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++)
                if (offsets[j] >= 0) *reinterpret_cast<float4*>(staged + lane / 4 * p.staged_channel() + offsets[j]) = four_outputs(j, half, phase0, phase1);
            __syncwarp();
            const int channel = warp * 16 + half * 8, channels = p.C_out - to.channel0 - channel;
            float* const out = to.tile + channel * volume + lane;
            for (int plane = 0; plane < to.planes; plane++)
                for (int y = 0; y < to.rows; y++) {
                    const float* const from = staged + (plane * p.rows + y) * p.staged_row() + lane;
                    float* const row = out + offset_of({plane, y, 0});
#pragma unroll 1
                    for (int k = 0; k < to.width - lane; k += 32) {
                        float v[8];
#pragma unroll
                        for (int c = 0; c < 8; c++) v[c] = from[c * p.staged_channel() + k];
#pragma unroll
                        for (int c = 0; c < 8; c++)
                            if (c < channels) row[c * volume + k] = v[c];
                    }
                }
        }
    }

    // Which outputs there are: of phases 0 and 1, bit j of the first of two neighbouring columns, then of the second.
    struct Masks { uint32_t phase0[2], phase1[2]; };
    __device__ __forceinline__ Masks masks_of(const Outputs& to) const {
        Masks masks = {};
        if (are_whole(to)) {
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) masks.phase0[0] |= uint32_t(offsets[j] >= 0) << j;
            masks.phase0[1] = masks.phase1[0] = masks.phase1[1] = masks.phase0[0];
        } else {
            const int first = first_column();
#pragma unroll 1
            for (int j = 0; j < kBlockN / 8; j++) {
                const int count = to.count(column_at(a.p, j * 8 + first));
                masks.phase0[0] |= uint32_t(count > 0) << j, masks.phase1[0] |= uint32_t(count > 1) << j, masks.phase0[1] |= uint32_t(count > 2) << j, masks.phase1[1] |= uint32_t(count > 3) << j;
            }
        }
        return masks;
    }

    // Leaves the moments of each channel's outputs, which have their final values.
    __device__ __forceinline__ void leave_moments(const Tile& tile, const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Masks masks = masks_of(to);
        const int64_t set = int64_t(tile.n) * a.sets.parts + tile.part * kConsumers + warpgroup;
#pragma unroll
        for (int half = 0; half < 2; half++) {    // one after the other, as registers are few
            conv::Moments moments;
            moments.shift = __shfl_sync(~0u, phase0[half * 2], lane & ~3);    // column 0
            moments.count = __popc(masks.phase0[0]) + __popc(masks.phase0[1]) + __popc(masks.phase1[0]) + __popc(masks.phase1[1]);
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int i = j * 4 + half * 2 + k;
                    if (masks.phase0[k] >> j & 1) moments.add(phase0[i]);
                    if (masks.phase1[k] >> j & 1) moments.add(phase1[i]);
                }
            float total;
            const float2 own = moments.of_quad(total);
            if (lane % 4 == 0 && channels[half].exists) a.sets.moments[set * a.sets.channels + tile.channel0 + own_channel() + half * 8] = own, a.sets.counts[set] = total;    // the same from every channel
        }
    }

    // What is to be done with a tile's sums, of phases 0 and 1.
    __device__ __forceinline__ void finish(const Tile& tile, uint32_t turn, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Outputs to = outputs_of(tile);
        if (a.sets.moments) leave_moments(tile, to, phase0, phase1);
        if (!a.p.stores_vectors()) {
            store_staged(to, phase0, phase1);
            return;
        }
        // One consumer after the other: the first waits for the second's outputs of the tile before, the second for the first's of this tile.
        mbarrier_wait(shared.head.stored + (warpgroup ^ 1), turn ^ (warpgroup ^ 1));
        if (are_whole(to)) store_whole(to, phase0, phase1);
        else store_part(to, phase0, phase1);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.head.stored + warpgroup);
    }

    __device__ __forceinline__ void run() {
        SharedHead& head = shared.head;
        float even[kBlockN / 2], odd[kBlockN / 2];
        uint32_t turn = 0;
        for (RingPosition slot;; slot.advance(kTileSlots)) {
            mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            load_channels(tile);
            multiply(tile, even, odd);
            prepare_channels();
            if (__any_sync(~0u, channels[0].more != 1 || channels[1].more != 1)) {
#pragma unroll
                for (int i = 0; i < kBlockN / 2; i++) even[i] *= channels[i / 2 % 2].more, odd[i] *= channels[i / 2 % 2].more;
            }
            if (a.apply_relu) {    // of what will be scaled and moved by the bias
#pragma unroll
                for (int i = 0; i < kBlockN / 2; i++) {
                    const Channel& c = channels[i / 2 % 2];
                    even[i] = max_nan(fmaf(even[i], c.scale, c.bias), 0.0f), odd[i] = max_nan(fmaf(odd[i], c.scale, c.bias), 0.0f);
                }
                channels[0].scale = channels[1].scale = 1, channels[0].bias = channels[1].bias = 0;
            }
            constexpr bool kEvenFirst = phase_of_turn(kTapsW, 0) == 0;
            finish(tile, turn, kEvenFirst ? even : odd, kEvenFirst ? odd : even);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(head.tile_empty + slot.stage);
            turn ^= 1;
        }
    }
};

#endif  // HAS_SM90A

template <int kBlockN, int kTapsW>
__global__ void __launch_bounds__(kThreads, 1) polyphase_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    const Plan& p = a.p;
    const SharedParts shared(base, p);
    SharedHead& head = shared.head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.boxes; i++) mbarrier_init(head.box_full + i, 1), mbarrier_init(head.box_empty + i, 4 * kConsumers);
        for (int i = 0; i < p.weights; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, 4 * kConsumers);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 4 * kConsumers);
        for (int i = 0; i < kConsumers; i++) mbarrier_init(head.stored + i, 4);
        fence_mbarrier_init();
    }
    // Zeros behind each box, where the last row's halo looks.
    for (int stage = 0; stage < p.boxes; stage++)
        for (int i = p.box_bytes() + threadIdx.x * 4; i < p.box_stage_bytes(); i += kThreads * 4) *reinterpret_cast<uint32_t*>(shared.boxes + stage * p.box_stage_bytes() + i) = 0;
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == 0) load_all(a, shared, &x_map, &w_map);
    } else {
        setmaxnreg_inc<kMultiplyRegisters>();
        Consumer<kBlockN, kTapsW>(a, shared).run();
    }
#endif
}

template <int kBlockN> int launch_polyphase(const CUtensorMap& x_map, const CUtensorMap& w_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Plan& p = a.p;
    const auto kernel = p.taps_w == 2 ? polyphase_kernel<kBlockN, 2> : p.taps_w == 3 ? polyphase_kernel<kBlockN, 3> : polyphase_kernel<kBlockN, 4>;
    return launch_with_shared(kernel, p.tiles < multiprocessors ? p.tiles : multiprocessors, kThreads, p.shared_bytes(), stream, x_map, w_map, a);
}

// a.out = the convolution of packed operands.
inline int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
    const Plan& p = a.p;
    CUtensorMap x_map, w_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kChunk * 2), source.copy, {source.phase_channels, source.axis[2].positions, source.axis[1].positions, source.axis[0].positions, p.N}, {kChunk, p.pitch, p.box_rows, p.planes, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kChunk * 2), weight.copy, {weight.phase_channels, weight.M_pad, weight.stencil.taps()}, {kChunk, kRows, p.taps_w}));
    switch (p.block_n) {
        case 72: return launch_polyphase<72>(x_map, w_map, a, multiprocessors, stream);
        case 80: return launch_polyphase<80>(x_map, w_map, a, multiprocessors, stream);
        case 104: return launch_polyphase<104>(x_map, w_map, a, multiprocessors, stream);
        default: return launch_polyphase<144>(x_map, w_map, a, multiprocessors, stream);
    }
}

}  // namespace polyphase
'''

_SOURCES['conv_transpose3d_polyphase_sm90.cu'] = r'''
// Strided transposed convolution by the phases of its outputs on Hopper, alone or with ReLU and GroupNorm behind it: the launchers. For float32.

#include "conv_plan.cuh"
#include "polyphase_sm90.cuh"

namespace polyphase {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

// Scratch memory. The packed copy of x has memory of its own, which the gradients may need.
struct Memory {
    conv::Scratch scratch, packed;
    unsigned* ticket;
    group_norm::MomentSets sets = {};
    scaled_half::Activation source;
    scaled_half::Weight weight;
    Memory(const Geometry& g, const Plan& p, bool fused, void* base, void* packed_base, const void* x, const void* w) : scratch(base), packed(packed_base) {
        Geometry plain = g;    // every element of the kernel a tap of its own
        for (Axis& axis : plain.axis) axis.stride = axis.dilation = 1;
        auto* weight_max = scratch.take_zeroed<unsigned>(g.C_out);
        ticket = scratch.take_zeroed<unsigned>(1);
        if (fused) sets = conv::take_moment_sets(scratch, g.N, g.C_out, p.parts(), kRows * p.channel_tiles);
        source = conv::take_activation(packed, make_stencil(Direction::kForward, g), g.N, g.C_in, 0, 0, x);
        weight = {make_stencil(Direction::kForward, plain), {1, kRows / 8, p.channel_tiles}, g.C_out, g.C_in, kRows * p.channel_tiles, source.phase_channels, 0, 0, 1, g.C_out, true, false, w, nullptr, weight_max};
        weight.copy = scratch.take<__half>(weight.copied());
    }
};

static Memory memory_of(const Geometry& g, bool fused, int device) { return Memory(g, plan_of(g, device), fused, nullptr, nullptr, nullptr, nullptr); }

static int forward(const Plan& plan, const Memory& memory, int device, void* stream, const void* bias, bool apply_relu, void* out) {
    if (plan.tiles == 0) return cudaErrorNotSupported;
    const int multiprocessors = multiprocessors_of(device);
    RETURN_IF_ERROR(memory.scratch.zero(memory.packed, static_cast<cudaStream_t>(stream)));
    RETURN_IF_ERROR(scaled_half::pack(memory.source, memory.weight, kFloat32, multiprocessors, stream));
    return convolve({plan, apply_relu, static_cast<const float*>(bias), static_cast<float*>(out), memory.source.max, memory.weight.max, memory.ticket, memory.sets}, memory.source, memory.weight, multiprocessors, static_cast<cudaStream_t>(stream));
}

}  // namespace polyphase

extern "C" int conv_transpose3d_supports_polyphase_sm90(const Geometry* g, int device) { return polyphase::plan_of(*g, device).tiles > 0; }

// Estimated, of a multiprocessor.
extern "C" double conv_transpose3d_forward_cycles_polyphase_sm90(const Geometry* g, int device) { return polyphase::plan_of(*g, device).cycles; }

extern "C" int64_t conv_transpose3d_forward_polyphase_sm90_workspace(const Geometry* g, int, int device) { return polyphase::memory_of(*g, false, device).scratch.bytes(); }
extern "C" int64_t conv_transpose3d_forward_polyphase_sm90_packed(const Geometry* g, int, int device) { return polyphase::memory_of(*g, false, device).packed.bytes(); }
extern "C" int64_t conv_transpose3d_relu_group_norm_forward_polyphase_sm90_workspace(const Geometry* g, int, int device) { return polyphase::memory_of(*g, true, device).scratch.bytes(); }
extern "C" int64_t conv_transpose3d_relu_group_norm_forward_polyphase_sm90_packed(const Geometry* g, int, int device) { return polyphase::memory_of(*g, true, device).packed.bytes(); }

// bias may be null; apply_relu writes relu(out). packed: memory for the copy of x that the gradients read.
extern "C" int conv_transpose3d_forward_polyphase_sm90(const Geometry* g, int, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const polyphase::Plan& plan = polyphase::plan_of(*g, device);
    return polyphase::forward(plan, polyphase::Memory(*g, plan, false, workspace, packed, x, w), device, stream, bias, apply_relu != 0, out);
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_polyphase_sm90(const Geometry* g, int, int, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias,
                                                                       const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    const polyphase::Plan& plan = polyphase::plan_of(*g, device);
    const polyphase::Memory memory(*g, plan, true, workspace, packed, x, w);
    RETURN_IF_ERROR(polyphase::forward(plan, memory, device, stream, bias, true, activation));
    return conv::normalize(memory.sets, {g->N, g->C_out, out_volume(*g), num_groups}, kFloat32, kFloat32, eps, gamma, beta, activation, y, statistics, stream);
}
'''

_SOURCES['sweep_sm90_tiles.h'] = r'''
// How a strided forward of one group and few channels is cut for blocks that sweep down their planes on Hopper (sweep_sm90.cuh).
#pragma once

#include "sweep_tiles.h"

namespace sweep_sm90 {

constexpr int kRoleThreads = 128;     // of those that multiply for one output plane, of those that store, of those that bring rows
constexpr int kMaxPhases = 2, kMaxTaps = 2;    // of an axis
constexpr int kThreads = (kMaxPhases + 2) * kRoleThreads;
constexpr int kPhasesW = 2, kChannels = 32;    // output channels of a block: with the phases of W they are GEMM_M
constexpr int kWarpChannels = 8;      // of them, that a warp stages
constexpr int kMaxColumns = 128;      // positions of a row, and what is added to them
constexpr int kMaxBatches = 3;
constexpr int kMaxKernel = 64;        // elements of a channel's kernel
using sweep::kLine;
constexpr int kStageFloats = kMaxColumns * kPhasesW + 2 * kLine;    // of a unit, behind a sector's place in a line and what waits for a line to be whole
constexpr int kHeadBytes = 2048;

// A block has one plane of positions, some of its rows from the first to the last, and 32 output channels. It brings each row of the source
// once for each tap d, in batches of `rows`, a thread for each of their columns, and keeps those that later rows of positions need.
struct Plan {
    Stencil s;
    int N, C_in, C_out, channel_tiles;
    int octs;                         // input channels / 8
    int gemm_n;                       // columns of a tile: 128, or 64 for rows of positions that are so short. A unit, what is staged at a time, is one output row or two
    int rows, span;                   // of a batch; that a row of positions reads behind its first one, at most one
    int pitch;                        // columns of a row in shared memory: column c is column c + first_column of the source
    int first_column, column0, columns;    // those from column0 on are there
    int segment_rows, segments;
    HOST_DEVICE int batches() const { return span + 2; }    // that are kept: those of a row of positions and the next one
    HOST_DEVICE int slots() const { return batches() * rows; }
    HOST_DEVICE int row_units() const { return s.axis[0].taps * octs * pitch; }    // of 16 bytes: (tap d, 8 channels, column)
    HOST_DEVICE int tile_units() const { return octs * kPhasesW * kChannels; }    // of 16 bytes, of the weights of kernel elements (d, h) and a tap w: (8 channels, 8 output channels, phase w, output channel)
    HOST_DEVICE int weight_units() const { return s.axis[0].kernel * s.axis[1].kernel * s.axis[2].taps * tile_units(); }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + (weight_units() + slots() * row_units()) * 16 + kMaxPhases * kChannels * kStageFloats * 4; }
    int64_t blocks() const { return int64_t(N) * channel_tiles * s.axis[0].positions * segments; }
};

// A plan, or one without segments where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {};
    if (!has_stencil(g) || g.groups > 1) return p;
    p.s = make_stencil(Direction::kForward, g);
    const StencilAxis &h = p.s.axis[1], &w = p.s.axis[2];
    for (const StencilAxis& a : p.s.axis) {
        if (a.phases > kMaxPhases || a.taps > a.phases) return p;
        for (int phase = 0; phase < a.phases; phase++)
            if (a.live[phase] == 0) return p;    // its outputs have no products
    }
    if ((g.C_in != 16 && g.C_in != 32) || g.C_out % kWarpChannels != 0 || w.phases != kPhasesW || w.positions > kMaxColumns || kernel_volume(g) > kMaxKernel) return p;
    if (g.C_in * in_volume(g) >= int64_t(1) << 31 || g.N >= 1 << 30 || g.C_out >= 1 << 30) return p;
    p.N = int(g.N), p.C_in = int(g.C_in), p.C_out = int(g.C_out), p.channel_tiles = int(ceil_div(g.C_out, kChannels));
    p.octs = int(g.C_in / 8);
    p.span = h.shift[h.taps - 1] - h.shift[0];
    p.gemm_n = w.positions <= kMaxColumns / 2 ? kMaxColumns / 2 : kMaxColumns;
    p.pitch = p.gemm_n + w.shift[w.taps - 1] - w.shift[0];
    sweep::locate_columns(p);
    if (p.columns > kRoleThreads || p.span > 1) return p;
    p.rows = p.columns > 0 && p.columns <= kRoleThreads / 2 && h.positions > 1 ? 2 : 1;
    if (p.shared_bytes() > most_shared) return p;
    return sweep::cut_in_segments(p, 1, multiprocessors);
}

}  // namespace sweep_sm90
'''

_SOURCES['sweep_sm90.cuh'] = r'''
// Strided transposed convolution of one group of few channels, TF32-equivalent, straight from the tensors: wgmma for sm_90a.
//
//   out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// There is little to multiply and much to write, so memory is the limit: x is read as it lies, and outputs leave as whole lines. A block sweeps down the rows of one
// plane of positions (stencil.h), with all weights of its 32 output channels in shared memory. A warpgroup brings the rows of x as fp16, and they stay as long as later rows of
// positions need them; all that are there have one power of two for their scale. GEMM_M is (phase of W, output channel), GEMM_N the positions of a row, GEMM_K the channels of a tap;
// a tap of W is a shift of the operand's first column. Each output plane has a warpgroup that multiplies for one output row after the other. A warp of it has the outputs of 8 channels:
// a channel's are neighbours in memory from row to row, so it stages them in the order of memory, a storing warp has whole lines copied, and what does not fill a line waits for the next row.
// Where x or w is not finite, zeros of GEMM_M must not meet it: such a block computes its outputs once more, product by product.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "pipeline_sm90.cuh"
#include "scaled_half.cuh"
#include "sweep_direct.cuh"
#include "sweep_sm90_tiles.h"

namespace sweep_sm90 {

constexpr int kMultiplyRegisters = 168, kBringRegisters = 120, kStoreRegisters = 56;    // of a thread: no more than all have at first, 128 each
constexpr int kLowestExponent = 8, kExponent = 11, kHighestExponent = 14;    // of the scaled maximum of the rows that are there: where the scale stays as it was, what a new one is for

// A tap: where its weights begin, and its columns in a row of the source, in units of 16 bytes; rows of the source behind the row of positions' first one.
struct alignas(16) Product { int weight, source, row; };
struct Products { int count; Product of[kMaxTaps * kMaxTaps * kMaxTaps]; };

struct SharedHead {
    alignas(16) uint64_t full[kMaxBatches], free[kMaxBatches];    // batches of rows of the source
    uint64_t staged[kMaxPhases][4], stored[kMaxPhases][4];    // what the warps of an output plane stage
    Products products[kMaxPhases][kMaxPhases];    // of phases (d, h)
    unsigned warp_max[2][4];           // bits of the largest magnitudes of a batch that warps have, by its parity
    int weight_shift[kChannels];       // 2^shift is the scale of an output channel's weights
    int shift[kMaxBatches];            // and of all rows that are there when this batch has come
    int not_finite;
    uint16_t place[kMaxKernel];        // of the weights at an element of the kernel, for the first channels: in units of 16 bytes
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the weights begin behind the head");

// 8 values, scaled.
__device__ __forceinline__ uint4 as_halves(const float* values, float scale) {
    alignas(16) __half2 h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) h[i] = __floats2half2_rn(values[2 * i] * scale, values[2 * i + 1] * scale);
    return *reinterpret_cast<const uint4*>(h);
}

#ifdef HAS_SM90A

// What a block has. kOcts: times 8 input channels; kTapsD: of D; known to the compiler, as a row is brought in registers.
template <int kOcts, int kTapsD, int kColumns> struct Block {
    static constexpr int kUnitRows = kMaxColumns / kColumns;    // output rows that are staged together: of one phase of H, or of both
    const Plan& p;
    const float *x, *w;                // of the sample; of the first output channel
    int n, channel0, channels, d, q0, q1;    // output channels that there are; plane of positions, its rows
    int thread, lane, warp;            // of the role

    static __device__ __forceinline__ uint8_t* shared() {
        extern __shared__ __align__(128) uint8_t base[];
        return base;
    }
    static __device__ __forceinline__ SharedHead& head() { return *reinterpret_cast<SharedHead*>(shared()); }
    static __device__ __forceinline__ uint4* weights() { return reinterpret_cast<uint4*>(shared() + kHeadBytes); }
    __device__ __forceinline__ uint4* slots() const { return weights() + p.weight_units(); }
    __device__ __forceinline__ float* stages() const { return reinterpret_cast<float*>(slots() + p.slots() * p.row_units()); }    // (phase d, channel, kStageFloats)
    enum Barrier { kPrepare = 1, kBring };

    __device__ __forceinline__ Block(const Plan& p, const float* x_all, const float* w_all) : p(p), thread(threadIdx.x % kRoleThreads), lane(threadIdx.x % 32), warp(threadIdx.x / 32 % 4) {
        int i = blockIdx.x;
        d = take_digit(i, p.s.axis[0].positions);
        q0 = take_digit(i, p.segments) * p.segment_rows, q1 = min(q0 + p.segment_rows, p.s.axis[1].positions);
        channel0 = take_digit(i, p.channel_tiles) * kChannels, channels = min(kChannels, p.C_out - channel0), n = i;
        x = x_all + int64_t(n) * p.C_in * volume(), w = w_all + int64_t(channel0) * kernel_volume(p.s);
    }
    __device__ __forceinline__ int volume() const { return p.s.axis[0].sources * p.s.axis[1].sources * p.s.axis[2].sources; }
    __device__ __forceinline__ int source_rows() const { return q1 - q0 + p.span; }
    __device__ __forceinline__ int source_batches() const { return (source_rows() + p.rows - 1) / p.rows; }
    __device__ __forceinline__ int output_row0() const { return max(q0 * p.s.axis[1].phases - p.s.axis[1].crop, 0); }
    __device__ __forceinline__ int output_row1() const { return min(q1 * p.s.axis[1].phases - p.s.axis[1].crop, p.s.axis[1].out); }
    __device__ __forceinline__ bool has_plane(int pd) const { return pd < p.s.axis[0].phases && unsigned(d * p.s.axis[0].phases + pd - p.s.axis[0].crop) < unsigned(p.s.axis[0].out); }

    // ------------------------------------------------------------------------------------------------ Weights

    static constexpr int kPreparing = (kMaxPhases + 1) * kRoleThreads;    // threads that prepare the weights: all but those that bring rows

    // f(place of an element of a kernel among those of all output channels, its weights for all input channels). Elements are neighbours in memory.
    template <typename F> __device__ __forceinline__ void for_each_element(F f) const {
        const int elements = channels * kernel_volume(p.s);
        const int64_t step = int64_t(p.C_out) * kernel_volume(p.s);
        for (int i = threadIdx.x; i < elements; i += kPreparing) {
            float values[kOcts * 8];
#pragma unroll
            for (int ci = 0; ci < kOcts * 8; ci++) values[ci] = w[ci * step + i];
            f(i, values);
        }
    }

    // The weights, scaled by a power of two for each output channel; zeros where a phase has none at a tap. The products of all phases.
    __device__ __forceinline__ void prepare_weights() const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int volume = kernel_volume(p.s);
        SharedHead& h = head();
        for (int i = threadIdx.x; i < p.weight_units(); i += kPreparing) weights()[i] = make_uint4(0, 0, 0, 0);
        if (threadIdx.x < volume) {
            int rest = threadIdx.x;
            const int kw = take_digit(rest, aw.kernel);
            h.place[threadIdx.x] = (rest * aw.taps + aw.tap_of[kw]) * p.tile_units() + aw.phase_of[kw] * kWarpChannels;
        }
        if (threadIdx.x < ad.phases * ah.phases) {
            const int pd = threadIdx.x / ah.phases, ph = threadIdx.x % ah.phases;
            Products& products = h.products[pd][ph];
            products.count = 0;
            for (int th = 0; th < ah.taps; th++) for (int td = 0; td < ad.taps; td++) for (int tw = 0; tw < aw.taps; tw++) {
                const int kd = ad.kernel_of[td][pd], kh = ah.kernel_of[th][ph];
                if (kd < 0 || kh < 0) continue;
                products.of[products.count++] = {((kd * ah.kernel + kh) * aw.taps + tw) * p.tile_units(), td * kOcts * p.pitch + aw.shift[aw.taps - 1] - aw.shift[tw], ah.shift[ah.taps - 1] - ah.shift[th]};
            }
        }
        unsigned* const element_max = reinterpret_cast<unsigned*>(stages());
        for_each_element([&](int i, const float (&values)[kOcts * 8]) {
            unsigned most = 0;
#pragma unroll
            for (float value : values) most = umax(most, scaled_half::magnitude(value));
            element_max[i] = most;
        });
        named_barrier(kPrepare, kPreparing);
        if (threadIdx.x < kChannels * 4) {    // 4 lanes have a channel
            const int channel = threadIdx.x / 4;
            unsigned most = 0;
            for (int i = threadIdx.x % 4; i < volume && channel < channels; i += 4) most = umax(most, element_max[channel * volume + i]);
            most = umax(most, __shfl_xor_sync(~0u, most, 1));
            most = umax(most, __shfl_xor_sync(~0u, most, 2));
            h.weight_shift[channel] = scaled_half::shift_of(most);
            if (most >= scaled_half::kInfinity) h.not_finite = 1;
        }
        named_barrier(kPrepare, kPreparing);
        for_each_element([&](int i, const float (&values)[kOcts * 8]) {
            const int channel = i / volume, unit = h.place[i - channel * volume] + channel / kWarpChannels * kPhasesW * kWarpChannels + channel % kWarpChannels;
            const float scale = scaled_half::power_of_two(h.weight_shift[channel]);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++) weights()[unit + oct * kPhasesW * kChannels] = as_halves(values + oct * 8, scale);
        });
        fence_proxy_async();
        named_barrier(kPrepare, kPreparing);
    }

    // ------------------------------------------------------------------------------------------- Rows of the source

    // The thread's, of a batch. Its row is p.rows where it has none.
    struct Column {
        int row, column;
        float v[kTapsD][kOcts][8];
    };

    // Begins to bring a batch. Rows are counted from the first one that the first row of positions reads.
    __device__ __forceinline__ void load(Column& column, int batch) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int i = batch * p.rows + column.row, row = ah.first + q0 - ah.shift[ah.taps - 1] + i, channel_step = volume();
        const bool inside = column.row < p.rows && unsigned(row) < unsigned(ah.sources) && i < source_rows();
#pragma unroll
        for (int td = 0; td < kTapsD; td++) {
            const int plane = ad.first + d - ad.shift[td];
            const bool exists = inside && unsigned(plane) < unsigned(ad.sources);
            const float* from = x + (exists ? (plane * ah.sources + row) * aw.sources + p.first_column + column.column : 0);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (int c = 0; c < 8; c++, from += channel_step) column.v[td][oct][c] = exists ? *from : 0.0f;
        }
    }

    // Waits for what has been brought; the bits of the batch's largest magnitude.
    __device__ __forceinline__ unsigned find_max(const Column& column, int batch) const {
        unsigned most = 0;
#pragma unroll
        for (int td = 0; td < kTapsD; td++)
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (float value : column.v[td][oct]) most = umax(most, scaled_half::magnitude(value));
        most = __reduce_max_sync(~0u, most);
        unsigned(&all)[4] = head().warp_max[batch % 2];
        if (lane == 0) all[warp] = most;
        named_barrier(kBring, kRoleThreads);
        return umax(umax(all[0], all[1]), umax(all[2], all[3]));
    }

    // The scale of all rows that are there: the one that there was, if it does. most: the bits of their largest magnitude.
    static __device__ __forceinline__ int next_shift(int before, unsigned most) {
        const int exponent = scaled_half::exponent_of(most) + before;
        const bool does = most == 0 || most >= scaled_half::kInfinity || (exponent >= kLowestExponent && exponent <= kHighestExponent);
        return does ? before : scaled_half::clamp_shift(kExponent - scaled_half::exponent_of(most));
    }

    __device__ __forceinline__ uint4* place_of(const Column& column, int batch_slot) const { return slots() + (batch_slot * p.rows + column.row) * p.row_units() + column.column; }

    // The thread's column of a batch that is there, at another scale.
    __device__ __forceinline__ void scale_again(uint4* unit, int shift_added) const {
        const float factor = scaled_half::power_of_two(max(min(shift_added, 127), -126));
        for (int i = 0; i < kTapsD * kOcts; i++, unit += p.pitch) {
            alignas(16) __half2 h[4];
            *reinterpret_cast<uint4*>(h) = *unit;
#pragma unroll
            for (__half2& two : h) two = __floats2half2_rn(__low2float(two) * factor, __high2float(two) * factor);
            *unit = *reinterpret_cast<const uint4*>(h);
        }
    }

    __device__ __forceinline__ void bring() const {
        SharedHead& h = head();
        Column column;
        const bool is_second = thread >= p.columns;
        column.row = thread < p.rows * p.columns ? is_second : p.rows, column.column = p.column0 + thread - (is_second ? p.columns : 0);
        load(column, 0);
        int shift = scaled_half::kMaxShift, slot_before = 0;
        unsigned most_before = 0;      // of the batch that is needed beside this one
        RingPosition at;
        for (int batch = 0; batch < source_batches(); batch++) {
            const unsigned most = find_max(column, batch);
            if (most >= scaled_half::kInfinity) h.not_finite = 1;
            const int before = shift;
            shift = next_shift(before, umax(most, most_before));
            most_before = p.span > 0 ? most : 0;
            if (batch >= p.batches()) mbarrier_wait(&h.free[at.stage], at.phase ^ 1);
            if (shift != before && batch > 0 && p.span > 0) {    // the batch before must not be in use for the one before that
                if (batch > 1) mbarrier_wait(&h.free[(batch - 2) % p.batches()], (batch - 2) / p.batches() & 1);
                if (column.row < p.rows) scale_again(place_of(column, slot_before), shift - before);
            }
            const float scale = scaled_half::power_of_two(shift);
            uint4* const to = place_of(column, at.stage);
            if (column.row < p.rows)
#pragma unroll
                for (int td = 0; td < kTapsD; td++)
#pragma unroll
                    for (int oct = 0; oct < kOcts; oct++) to[(td * kOcts + oct) * p.pitch] = as_halves(column.v[td][oct], scale);
            if (thread == 0) h.shift[at.stage] = shift;
            load(column, batch + 1);
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&h.full[at.stage]);
            slot_before = at.stage;
            at.advance(p.batches());
        }
    }

    // ------------------------------------------------------------------------------------------------ Products

    using Sums = float[kColumns / 2];

    // The sums of a row of positions whose first row of the source is in a slot.
    __device__ __forceinline__ void multiply(Sums& sums, const Products& products, int first_slot) const {
        const uint64_t weight = wgmma_plain_descriptor_base(kPhasesW * kChannels), source = wgmma_plain_descriptor_base(p.pitch);
        const uint32_t weight0 = shared_vector(weights()), source0 = shared_vector(slots());
        const int count = products.count;
#pragma unroll
        for (float& sum : sums) make_zero(sum);
        int i = 0;
#pragma unroll 1
        do {
            const Product product = products.of[i];
            int slot = first_slot + product.row;
            if (slot >= p.slots()) slot -= p.slots();
            const uint32_t a = weight0 + product.weight, b = source0 + slot * p.row_units() + product.source;
            wgmma_fence();
#pragma unroll
            for (int oct = 0; oct < kOcts; oct += 2) wgmma_m64k16_f16<0>(sums, wgmma_descriptor(weight, a + oct * kPhasesW * kChannels), wgmma_descriptor(source, b + oct * p.pitch));
            wgmma_commit_group();
        } while (++i < count);
        wgmma_wait_group<0>();
#pragma unroll
        for (float& sum : sums) keep_after(sum);
    }

    // ------------------------------------------------------------------------------------------------- Outputs

    // The outputs of one channel on one output plane, which are neighbours in memory from row to row. Places in memory are counted in floats from address 0 on.
    struct Stream {
        int64_t origin;
        int out_row;                   // floats
        float* stage;
        bool vectors;                  // positions' outputs are as vectors are aligned
        int bank;                      // so that lanes that stage together meet different banks
        __device__ __forceinline__ int64_t begin(int row) const { return origin + int64_t(row) * out_row; }
        // Where the line of memory is staged that a place is in.
        __device__ __forceinline__ float* staged(int64_t at) const { return stage + ((bank - int(at & (kLine - 8))) & (kLine - 1)); }
    };

    __device__ __forceinline__ Stream stream_of(float* out, int pd, int channel) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int64_t plane = (int64_t(n) * p.C_out + channel0 + channel) * ad.out + d * ad.phases + pd - ad.crop, origin = int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(float)) + plane * ah.out * aw.out;
        const bool vectors = aw.crop == 0 && aw.out % 4 == 0 && origin % 4 == 0;
        return {origin, aw.out, stages() + (pd * kChannels + channel) * kStageFloats, vectors, (vectors ? channel % 2 : channel % kWarpChannels / 4) * 16};
    }

    // Stages a unit, output rows from `row` on, behind what did not fill a line before. Four lanes have a channel's, two positions of 8 each, which are four neighbours.
    __device__ __forceinline__ void stage(const Stream& stream, const Sums (&sums)[kUnitRows], int row, int rows, int rows_before, uint64_t* stored, uint32_t parity) const {
        const int64_t at = stream.begin(row), before = stream.begin(row - rows_before);
        const float* const carried = stream.staged(before) + int((at & -kLine) - (before & -kLine)) + lane % 4 * 8;
        float* const line = stream.staged(at);
        const float4 low = *reinterpret_cast<const float4*>(carried), high = *reinterpret_cast<const float4*>(carried + 4);
        mbarrier_wait(stored, parity);
        __syncwarp();
        float4* const to_line = reinterpret_cast<float4*>(line + lane % 4 * 8);
        to_line[0] = low, to_line[1] = high;
        __syncwarp();
        const int column = lane % 4 * 4 - p.s.axis[2].crop;
#pragma unroll
        for (int i = 0; i < kUnitRows; i++) {
            float* const to = line + int(at & (kLine - 1)) + i * stream.out_row + column;
            if (i > 0) {
                if (i == rows) break;
                __syncwarp();          // a row's columns that are not there are where the next one begins
            }
            if (stream.vectors) {
#pragma unroll
                for (int u = 0; u < kColumns / 8; u++) *reinterpret_cast<float4*>(to + u * 16) = make_float4(sums[i][u * 4], sums[i][u * 4 + 2], sums[i][u * 4 + 1], sums[i][u * 4 + 3]);
            } else {
#pragma unroll
                for (int u = 0; u < kColumns / 8; u++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (u > 0 || column + k >= 0) to[u * 16 + k] = sums[i][u * 4 + k % 2 * 2 + k / 2];
            }
        }
        fence_proxy_async();
        __syncwarp();
    }

    // The units of a row of positions, units() of them. One has the rows from `row` on that there are, of phases from `phase` on.
    struct Unit { int row, rows, phase; };
    __device__ __forceinline__ int units() const { return kUnitRows > 1 ? 1 : p.s.axis[1].phases; }
    __device__ __forceinline__ Unit unit_of(int q, int i) const {
        const StencilAxis& ah = p.s.axis[1];
        const int first = q * ah.phases - ah.crop + i, row = max(first, 0), end = min(first + (kUnitRows > 1 ? ah.phases : 1), ah.out);
        return {row, max(end - row, 0), i + row - first};
    }

    // Multiplies for an output plane, unit after unit.
    __device__ __forceinline__ void multiply_all(int pd, const float* bias, bool apply_relu, float* out) const {
        SharedHead& h = head();
        const int channel = warp * kWarpChannels + lane / 4, weight_shift = h.weight_shift[channel];
        const bool has_outputs = warp * kWarpChannels < channels;
        const Stream stream = stream_of(out, pd, channel);
        const float added = bias && has_outputs ? bias[channel0 + channel] : 0.0f;
        RingPosition needed;           // the next batch that has not been waited for
        int batches_there = 0, shift = 0, slot = 0, rows_before = 0;
        uint32_t parity = 1;
        for (int q = q0; q < q1; q++) {
            for (const int last = min((q - q0) / p.rows + p.span, source_batches() - 1); batches_there <= last; batches_there++, needed.advance(p.batches())) {
                mbarrier_wait(&h.full[needed.stage], needed.phase);
                shift = h.shift[needed.stage];
            }
            const bool ends_batch = (slot + 1) % p.rows == 0;
            const scaled_half::ScaleInParts back = scaled_half::scale_in_parts(-shift - weight_shift);
            const bool in_parts = __any_sync(~0u, back.more != 1);
            for (int i = 0; i < units(); i++) {
                const Unit unit = unit_of(q, i);
                const bool frees = i == units() - 1 && ends_batch && lane == 0;
                if (unit.rows == 0) {
                    if (frees) mbarrier_arrive(&h.free[slot / p.rows]);
                    continue;
                }
                Sums sums[kUnitRows];
                multiply(sums[0], h.products[pd][unit.phase], slot);
                if constexpr (kUnitRows > 1) multiply(sums[1], h.products[pd][unit.phase + unit.rows - 1], slot);
                if (frees) mbarrier_arrive(&h.free[slot / p.rows]);
                if (!has_outputs) continue;
                for (Sums& of_row : sums) {
                    if (in_parts) {
#pragma unroll
                        for (float& sum : of_row) sum *= back.more;
                    }
#pragma unroll
                    for (float& sum : of_row) sum = fmaf(sum, back.scale, added);
                    if (apply_relu) {
#pragma unroll
                        for (float& sum : of_row) sum = max_nan(sum, 0.0f);
                    }
                }
                stage(stream, sums, unit.row, unit.rows, rows_before, &h.stored[pd][warp], parity);
                if (lane == 0) mbarrier_arrive(&h.staged[pd][warp]);
                rows_before = unit.rows, parity ^= 1;
            }
            slot = slot + 1 == p.slots() ? 0 : slot + 1;
        }
    }

    // Stores what two of a plane's warps stage, a lane for each of their channels.
    __device__ __forceinline__ void store_all(float* out) const {
        constexpr int kLanes = 2 * kWarpChannels;
        const int pd = warp / 2, channel = warp % 2 * kLanes + lane;
        if (lane >= kLanes || channel >= channels || !has_plane(pd)) return;
        const Stream stream = stream_of(out, pd, channel);
        const int64_t first = stream.begin(output_row0());
        const int row1 = output_row1();
        uint32_t parity = 0;
        for (int q = q0; q < q1; q++)
            for (int i = 0; i < units(); i++) {
                const Unit unit = unit_of(q, i);
                if (unit.rows == 0) continue;
                const int64_t at = stream.begin(unit.row), next = stream.begin(unit.row + unit.rows), line_at = at & -kLine;
                const int begin = int(max(first - line_at, int64_t(0))), end = int((unit.row + unit.rows == row1 ? next : next & -kLine) - line_at);
                const int whole = (begin + 3) & -4, whole_end = end & -4;
                const float* const from = stream.staged(at);
                float* const line = reinterpret_cast<float*>(uintptr_t(line_at) * sizeof(float));
                for (int w = 0; w < 4; w++) {
                    if (w != channel / kWarpChannels) continue;
                    mbarrier_wait(&head().staged[pd][w], parity);
                    if (whole < whole_end) bulk_store(line + whole, from + whole, (whole_end - whole) * 4);
                    bulk_commit_group();
                }
                // What is in front of whole vectors where a sweep begins, and behind where it ends.
#pragma unroll 1
                for (int k = begin; k < min(whole, end); k++) line[k] = from[k];
#pragma unroll 1
                for (int k = max(whole, whole_end); k < end; k++) line[k] = from[k];
                bulk_wait_group_read<0>();
                mbarrier_arrive(&head().stored[pd][channel / kWarpChannels]);
                parity ^= 1;
            }
        bulk_wait_group<0>();
    }

    // --------------------------------------------------------------------------------------------------- Sweep

    // The block's outputs.
    __device__ __forceinline__ sweep_direct::Part part(const float* bias, float* out) const {
        const int64_t volume = int64_t(p.s.axis[0].out) * p.s.axis[1].out * p.s.axis[2].out;
        return {x, w, bias ? bias + channel0 : nullptr, out + (int64_t(n) * p.C_out + channel0) * volume, p.C_in, p.C_out, channels, d, output_row0(), output_row1()};
    }

    __device__ __forceinline__ void run(const float* bias, bool apply_relu, float* out) const {
        SharedHead& h = head();
        if (threadIdx.x == 0) {
            for (int i = 0; i < p.batches(); i++) mbarrier_init(&h.full[i], 4), mbarrier_init(&h.free[i], 4 * (has_plane(0) + has_plane(1)));
            for (int pd = 0; pd < kMaxPhases; pd++)
                for (int w = 0; w < 4; w++) mbarrier_init(&h.staged[pd][w], 1), mbarrier_init(&h.stored[pd][w], kWarpChannels);
            fence_mbarrier_init();
            h.not_finite = 0;
        }
        for (int i = threadIdx.x; i < p.slots() * p.row_units(); i += kThreads) slots()[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        const int role = __shfl_sync(~0u, int(threadIdx.x) / kRoleThreads, 0);
        if (role == kMaxPhases + 1) {
            setmaxnreg_dec<kBringRegisters>();
            bring();
        } else {
            prepare_weights();
            if (role < kMaxPhases) {
                setmaxnreg_inc<kMultiplyRegisters>();
                if (has_plane(role)) multiply_all(role, bias, apply_relu, out);
            } else {
                setmaxnreg_dec<kStoreRegisters>();
                store_all(out);
            }
        }
        __syncthreads();
    }
};

#endif  // HAS_SM90A

template <int kOcts, int kTapsD, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
sweep_kernel(const __grid_constant__ Plan p, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
#ifdef HAS_SM90A
    wait_for_previous_kernel();
    const Block<kOcts, kTapsD, kColumns> block(p, x, w);
    block.run(bias, apply_relu, out);
    if (block.head().not_finite) sweep_direct::compute(p.s, block.part(bias, out), apply_relu);
#endif
}

template <int kOcts> int forward(const Plan& p, cudaStream_t stream, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    const bool one_tap = p.s.axis[0].taps == 1, narrow = p.gemm_n < kMaxColumns;
    const auto kernel = narrow ? one_tap ? sweep_kernel<kOcts, 1, 64> : sweep_kernel<kOcts, 2, 64> : one_tap ? sweep_kernel<kOcts, 1, 128> : sweep_kernel<kOcts, 2, 128>;
    return launch_with_shared(kernel, p.blocks(), kThreads, p.shared_bytes(), stream, p, x, w, bias, apply_relu, out);
}

}  // namespace sweep_sm90
'''

_SOURCES['conv_transpose3d_sweep_sm90.cu'] = r'''
// Strided transposed convolution of one group of few channels on Hopper: the launchers. For float32.

#include "conv_plan.cuh"
#include "sweep_sm90.cuh"

namespace sweep_sm90 {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

}  // namespace sweep_sm90

extern "C" int conv_transpose3d_supports_sweep_sm90(const Geometry* g, int device) { return sweep_sm90::plan_of(*g, device).segments > 0; }

extern "C" int64_t conv_transpose3d_forward_sweep_sm90_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_sweep_sm90(const Geometry* g, int, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const sweep_sm90::Plan& plan = sweep_sm90::plan_of(*g, device);
    if (plan.segments == 0) return cudaErrorNotSupported;
    const auto forward = plan.octs == 2 ? sweep_sm90::forward<2> : sweep_sm90::forward<4>;
    return forward(plan, static_cast<cudaStream_t>(stream), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<const float*>(bias), apply_relu != 0, static_cast<float*>(out));
}
'''

_SOURCES['dweight_sm90.cuh'] = r'''
// dweight.cuh on Hopper.
//
// A block is 1 producer and 3 consumer warpgroups. The consumers share x and dout and have neighbouring taps h, or, where there
// is one tap h, neighbouring 64 rows of GEMM_M; or, where channels are few, they share out all rows of GEMM_M and all taps (d, h). A block
// of the grid is one group of taps and channels and one part of GEMM_K; the parts' sums go to scratch memory and are added in a fixed order.
// dout has zeros between its rows, where x has its halo.
#pragma once

#include "conv_launch_sm90.cuh"
#include "dweight.cuh"

namespace dweight_sm90 {

using namespace dweight;

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
// Behind the last stage: compute-sanitizer takes the blocks of columns of an operand, which overlap, for neighbours in memory, and would see them read there.
constexpr int kTailBytes = 4096;
static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// --------------------------------------------------------------------------------------------------------- Kernel

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };

#ifdef HAS_SM90A

// A block's share of the prologue: barriers, of so many arrivals, and zeros wherever the copies leave gaps.
template <int kBlockThreads> __device__ __forceinline__ void prepare_stages(SharedHead& head, const Tiling& t, uint8_t* stages, int full, int empty) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.stages; i++) mbarrier_init(head.full + i, full), mbarrier_init(head.empty + i, empty);
        fence_mbarrier_init();
    }
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kBlockThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void load_x(const Parameters& a, const CUtensorMap& x_map, const Group& g, const Box& b, uint8_t* stage, uint64_t* full) {
    const Tiling& t = a.p.t;
    const StencilAxis& ad = a.p.s.axis[0];
    for (int j = 0; j < x_boxes_of(t, g); j++) {
        const BoxOfX x = box_of_x(t, g, j);
        tma_load_5d(stage + t.dout_boxes * t.dout_bytes + j * t.x_bytes, &x_map, full, x.chunk * t.chunk, first_column(a.p) + b.w0, first_row(a.p, g) + b.h0, ad.first + b.d - ad.shift[x.td], b.n);
    }
}

// One thread: loads the boxes from `begin` to `end`.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap& x_map, const CUtensorMap& dout_map, SharedHead& head, uint8_t* stages, const Group& g, int split) {
    const Tiling& t = a.p.t;
    const Boxes boxes(a.p, g);
    const int dout_boxes = dout_boxes_of(t, g), bytes = dout_boxes * t.rows * t.tile_w * kRows * 2 + x_bytes_of(t, g);
    RingPosition stage;
    const int end = boxes.begin_of(t, split + 1);
    for (int i = boxes.begin_of(t, split); i < end; i++) {
        const Box b = box_of(a.p, boxes, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
        load_x(a, x_map, g, b, base, full);
        for (int j = 0; j < dout_boxes; j++)
            for (int row = 0; row < t.rows; row++)
                tma_load_5d(base + j * t.dout_bytes + row * t.pitch * kRows * 2, &dout_map, full, (g.m + j) * kRows, b.w0, b.h0 + row, b.d, b.n);
        stage.advance(t.stages);
    }
}

// What a consumer multiplies: where its jobs' operands are in the first stage.
template <int kItems> struct Operands {
    uint64_t dout_descriptor, x_descriptor;
    uint32_t dout[kItems], x[kItems];
    __device__ __forceinline__ Operands(const Problem& p, const Group& g, const uint8_t* stages, int consumer, int items) {
        const Tiling& t = p.t;
        dout_descriptor = wgmma_descriptor_base(kRows * 2), x_descriptor = wgmma_descriptor_base(t.chunk * 2, block_bytes(t, p.s));
#pragma unroll
        for (int i = 0; i < kItems; i++) {    // a consumer with fewer jobs has its last one several times
            dout[i] = x[i] = 0;
            if (items == 0) continue;
            const Job job = job_of(p, g, consumer, min(i, items - 1));
            dout[i] = shared_vector(stages + dout_box_of(t, job, consumer) * t.dout_bytes);
            x[i] = shared_vector(stages + t.dout_boxes * t.dout_bytes + x_box_of(t, job) * t.x_bytes + first_shift(p, g, job) * t.chunk * 2);
        }
    }
    // Adds a stage's products to d, in the background.
    template <int kSums> __device__ __forceinline__ void multiply(const Tiling& t, int stage, float (&d)[kItems][kSums]) const {
        const uint32_t at = stage * t.stage_bytes / 16;
        const int row_bytes = t.chunk * 2;
        wgmma_fence();
#pragma unroll 1
        for (int step = 0; step < t.steps; step++) {
            const uint32_t dout_offset = at + step * kRows * 2, x_offset = at + step * row_bytes;
#pragma unroll
            for (int item = 0; item < kItems; item++) wgmma_m64k16_f16<1>(d[item], wgmma_descriptor(dout_descriptor, dout[item] + dout_offset), wgmma_descriptor(x_descriptor, x[item] + x_offset));
        }
        wgmma_commit_group();
    }
};

// Adds sums to scratch memory, scaled back, and clears them: what no wgmma adds to any more.
template <int kItems, int kSums> __device__ __forceinline__ void flush_sums(float4* partial, bool first, const ScaleBack& back, float (&d)[kItems][kSums]) {
#pragma unroll
    for (int i = 0; i < kItems; i++) {
#pragma unroll
        for (int j = 0; j < kSums; j++) keep_after(d[i][j]);
#pragma unroll
        for (int j = 0; j < kSums / 4; j++) add_sums(partial[(i * (kSums / 4) + j) * 128], first, back, &d[i][sum_at(j)]);
#pragma unroll
        for (int j = 0; j < kSums; j++) d[i][j] = 0.0f;
    }
}

template <int kBlockN, int kItems>
__device__ __forceinline__ void consume(const Parameters& a, SharedHead& head, uint8_t* stages, const Group& g, int split, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const int items = items_of(a.p, g, consumer);
    const Operands<kItems> operands(a.p, g, stages, consumer, items);
    const bool elected = threadIdx.x % 32 == 0;
    float d[kItems][kBlockN / 2];
#pragma unroll
    for (int i = 0; i < kItems; i++)
#pragma unroll
        for (int j = 0; j < kBlockN / 2; j++) d[i][j] = 0.0f;
    RingPosition stage;
    const Boxes boxes(a.p, g);
    const int begin = boxes.begin_of(t, split), end = boxes.begin_of(t, split + 1), sample_boxes = boxes.count / int(a.p.N);
    int sample_end = begin, shift_x = 0, shift_dout = 0, chain = 0, reading = -1;    // the stage that wgmma groups in flight read
    bool first = true;
    // Adds the sums to scratch memory, scaled back, and clears them.
    auto finish = [&] {
        wgmma_wait_group<0>();
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = -1;
        flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
        first = false, chain = 0;
    };
    for (int i = begin; i < end; i++) {
        if (i == sample_end) {
            const int n = i / sample_boxes, next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]);
            if (i > begin && (next_x != shift_x || next_dout != shift_dout)) finish();
            sample_end = (n + 1) * sample_boxes, shift_x = next_x, shift_dout = next_dout;
        }
        if (chain >= kChain) finish();
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        if (items > 0) {
            operands.multiply(t, stage.stage, d);
            wgmma_wait_group<1>();
        }
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = stage.stage;
        stage.advance(t.stages);
    }
    finish();
}

#endif  // HAS_SM90A

// Grid: (group, split), groups fastest, so that the blocks which read the same boxes run together.
template <int kBlockN, int kItems>
__global__ void __launch_bounds__(kThreads, 1)
dweight_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    uint8_t* stages = base + kHeadBytes;
    const Tiling& t = a.p.t;
    const int index = blockIdx.x % t.groups, split = blockIdx.x / t.groups;
    const Group g(t, a.p.s, index);
    if (!is_live(a.p, g)) return wait_for_previous_kernel();

    prepare_stages<kThreads>(head, t, stages, 1, kConsumers * 4);
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        if (threadIdx.x == 0) produce(a, x_map, dout_map, head, stages, g, split);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        const int consumer = threadIdx.x / 128 - 1;
        float4* partial = reinterpret_cast<float4*>(a.partial) + ((int64_t(split) * t.groups + index) * kConsumers + consumer) * t.items * (kBlockN / 8 * 128) + threadIdx.x % 128;
        consume<kBlockN, kItems>(a, head, stages, g, split, partial, consumer);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

// Of the copies of x and dout.
struct Maps {
    CUtensorMap x, dout;
    int make(const Problem& p, const scaled_half::Activation& x_copy, const scaled_half::Activation& dout_copy) {
        const Tiling& t = p.t;
        const StencilAxis* axis = p.s.axis;
        RETURN_IF_ERROR(make_tensor_map<5>(&x, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(t.chunk * 2), x_copy.copy, {x_copy.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
        return make_tensor_map<5>(&dout, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kRows * 2), dout_copy.copy, {dout_copy.phase_channels * dout_copy.phases(), axis[2].positions, axis[1].positions, axis[0].positions, p.N}, {kRows, t.tile_w, 1, 1, 1});
    }
};

template <int kBlockN, int kItems = 1> int launch_dweight(const Maps& maps, const Parameters& a, cudaStream_t stream) {
    const int shared = kHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kTailBytes;
    return launch_with_shared(dweight_kernel<kBlockN, kItems>, a.p.t.groups * a.p.t.splits, kThreads, shared, stream, maps.x, maps.dout, a);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    Maps maps;
    RETURN_IF_ERROR(maps.make(a.p, x, dout));
    switch (a.p.t.block_n) {
        case 64: RETURN_IF_ERROR((a.p.t.joint ? launch_dweight<64, kMaxItems>(maps, a, stream) : launch_dweight<64>(maps, a, stream))); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(maps, a, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(maps, a, stream)); break;
    }
    return add_parts(a.p, a.partial, dtype, dweight, stream);
}

}  // namespace dweight_sm90
'''

_SOURCES['dweight_units.h'] = r'''
// The units by which a block packs dout for dweight (dweight_tiles.h), which element is where: for host and device.
#pragma once

#include "dweight_tiles.h"

namespace dweight {

// A unit of every box. Of its first element: row (phases h included) and element u of the box; phase d; first channel; what comes between the box's first element and it in dout,
// channels left out; position of a stage; channel of dout's copy.
struct alignas(16) Unit { int row, u, phase_d, channel, from, position, copy_channel; };

HOST_DEVICE Unit unit_of(const Problem& p, int index) {
    const auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int channel = take(int(ceil_div(p.C_out, kUnitChannels))) * kUnitChannels, u = take(int(ceil_div(row_elements(p), kUnitElements))) * kUnitElements;
    const int row = take(p.t.rows * ah.phases), phase_d = take(ad.phases), phase_h = row % ah.phases;
    return {row, u, phase_d, channel, (phase_d * ah.out + row) * aw.out + u, row / ah.phases * p.t.pitch + u / aw.phases, (phase_d * ah.phases + phase_h) * aw.phases * int(p.dout_phase_channels) + channel};
}

}  // namespace dweight
'''

_SOURCES['dout_packer_sm90.cuh'] = r'''
// dout's packed copy, made on its way to dweight: a block's packers bring its float32 elements to shared memory, and round them into the stages that are multiplied and that the copy
// engine stores, for dx.
//
// The scale is the first one (scaled_half.cuh). Where that does not hold for some sample, all is done again with scales that do.
#pragma once

#include "dweight.cuh"
#include "dweight_units.h"
#include "pipeline_sm90.cuh"
#include "swizzle.h"

namespace dweight_sm90 {

using namespace dweight;

constexpr int kUnitsAhead = 3;         // units that are under way
constexpr int kEach = kUnitElements / 32;    // elements of a lane, 32 apart, of each of a unit's channels
constexpr int kSlots = kUnitsAhead + 1, kSlotBytes = kUnitChannels * kUnitElements * 4, kPackerBytes = kPackerWarps * kSlots * kSlotBytes;

struct Packing {
    const float* dout;
    scaled_half::SampleMax* max;       // (N)
    bool again;                        // with scales that hold, if the first ones do not
    bool stores;                       // the copy is wanted
    int units, row;                    // of a box: units, elements of a row
    Divisor strips, row_groups, planes;
};

inline Packing make_packing(const Problem& p, const scaled_half::Activation& dout, bool stores) {
    return {static_cast<const float*>(dout.x), dout.max, false, stores, units_of_box(p), row_elements(p), make_divisor(p.t.strips), make_divisor(p.t.row_groups), make_divisor(p.s.axis[0].positions)};
}

#ifdef HAS_SM90A

// Boxes are dealt out in turns, so that all blocks read neighbouring ones: those of a row follow each other.
__device__ __forceinline__ Box box_of(const Problem& p, const Packing& packing, int index) {
    const int strip = packing.strips.take(index), row_group = packing.row_groups.take(index), d = packing.planes.take(index);
    return {index, d, strip * p.t.tile_w, row_group * p.t.rows};
}

__device__ __forceinline__ int shift_of(const Packing& packing, int n) { return packing.again ? scaled_half::shift_of(packing.max[n]) : scaled_half::first_shift_of(packing.max[n]); }

// One warp: every kPackerWarps-th unit. A lane reads only what it has brought itself.
class Packer {
public:
    // units: the block's, in shared memory.
    __device__ Packer(const Problem& p, const Packing& packing, const Unit* units, uint8_t* slots, int boxes)
        : p_(p), packing_(packing), units_(units), slots_(shared_address(slots) + threadIdx.x / 32 * kSlots * kSlotBytes + lane() * 4), boxes_(boxes), next_box_(blockIdx.x) {
        locate_next();
#pragma unroll 1
        for (int i = 0; i < kUnitsAhead; i++) load_next();
    }

    // The next box: into `stage`, which is free.
    __device__ void pack(const Box& box, const uint8_t* stage) {
        if (box.n != sample_) {
            report();
            sample_ = box.n, looked_ = packing_.max[box.n].part != 0, scale_ = scaled_half::power_of_two(shift_of(packing_, box.n));
        }
#pragma unroll 1
        for (int unit = first_unit(); unit < packing_.units; unit += kPackerWarps) {
            load_next();
            cp_async_wait_group<kUnitsAhead>();
            convert(units_[unit], shared_address(stage));
        }
    }

    // Behind the last box, and a sample's: the extremes of units that the scale may be too large or too small for.
    __device__ void report() {
        const unsigned finite = __reduce_max_sync(~0u, extremes_.finite), any = __reduce_max_sync(~0u, extremes_.any);
        if (any == 0) return;
        scaled_half::SampleMax& max = packing_.max[sample_];
        if (lane() == 0) atomicMax(&max.all, finite);
        if (any >= scaled_half::kInfinity) max.non_finite = 1;
        extremes_ = {};
    }

private:
    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int first_unit() { return threadIdx.x / 32; }
    __device__ __forceinline__ bool in_box(const Unit& unit, int e) const { return unit.u + lane() + e * 32 < packing_.row; }

    __device__ void locate_next() {
        const StencilAxis &ad = p_.s.axis[0], &ah = p_.s.axis[1], &aw = p_.s.axis[2];
        const Box box = box_of(p_, packing_, next_box_);
        next_d_ = box.d * ad.phases - ad.crop, next_h_ = box.h0 * ah.phases - ah.crop, next_w_ = box.w0 * aw.phases - aw.crop + lane();
        next_ = packing_.dout + ((box.n * p_.C_out * ad.out + next_d_) * ah.out + next_h_) * aw.out + next_w_;
    }

    // Starts to bring the next unit to the next slot; with none left, nothing, which counts too.
    __device__ void load_next() {
        if (next_box_ < boxes_ && next_unit_ < packing_.units) load(units_[next_unit_]);
        cp_async_commit_group();
        slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1, next_unit_ += kPackerWarps;
        if (next_unit_ >= packing_.units && next_box_ < boxes_) {
            next_unit_ = first_unit(), next_box_ += p_.t.splits;
            locate_next();
        }
    }

    __device__ void load(const Unit& unit) const {
        const StencilAxis &ad = p_.s.axis[0], &ah = p_.s.axis[1], &aw = p_.s.axis[2];
        const int64_t volume = int64_t(ad.out) * ah.out * aw.out;
        const bool in_row = unsigned(next_d_ + unit.phase_d) < unsigned(ad.out) && unsigned(next_h_ + unit.row) < unsigned(ah.out);
        const float* next = next_ + unit.channel * volume + unit.from;
        bool inside[kEach];
#pragma unroll
        for (int e = 0; e < kEach; e++) inside[e] = in_row && unsigned(next_w_ + unit.u + e * 32) < unsigned(aw.out) && in_box(unit, e);
        const uint32_t to = slots_ + slot_ * kSlotBytes;
        const auto load_channels = [&](bool all) {
            constexpr int kAtOnce = 4;     // addresses in registers of their own: a copy reads its one late, and the next would wait for that
#pragma unroll
            for (int c0 = 0; c0 < kUnitChannels; c0 += kAtOnce) {
                const float* from[kAtOnce];
#pragma unroll
                for (int c = 0; c < kAtOnce; c++) from[c] = next, next += volume, keep(from[c]);
#pragma unroll
                for (int c = 0; c < kAtOnce; c++)
#pragma unroll
                    for (int e = 0; e < kEach; e++) cp_async_4(to + ((c0 + c) * kUnitElements + e * 32) * 4, from[c] + e * 32, inside[e] && (all || unit.channel + c0 + c < int(p_.C_out)));
            }
        };
        if (unit.channel + kUnitChannels <= int(p_.C_out)) load_channels(true);
        else load_channels(false);
    }
    __device__ static void keep(const float*& p) { asm volatile("" : "+l"(p)); }

    // The unit that was brought first: a vector of eight channels for each of a lane's elements.
    __device__ void convert(const Unit& unit, uint32_t stage) {
        const Tiling& t = p_.t;
        const int phases_w = p_.s.axis[2].phases;
        const uint32_t from = slots_ + converted_ * kSlotBytes;
        float values[kEach][kUnitChannels];    // before anything is stored, since no load moves ahead of that
#pragma unroll
        for (int e = 0; e < kEach; e++)
#pragma unroll
            for (int c = 0; c < kUnitChannels; c++) values[e][c] = shared_load(from + (c * kUnitElements + e * 32) * 4);
        const int column = divide_by_phases(lane(), phases_w), channel = unit.copy_channel + (lane() - column * phases_w) * int(p_.dout_phase_channels);
        const uint32_t block = stage + unsigned(channel) / kRows * t.dout_bytes, piece = unsigned(channel) % kRows / kUnitChannels;
        __half2 most = __float2half2_rn(0.0f);
#pragma unroll
        for (int e = 0; e < kEach; e++) {
            __half2 halves[kUnitChannels / 2];
#pragma unroll
            for (int c = 0; c < kUnitChannels / 2; c++) {
                halves[c] = __floats2half2_rn(values[e][c * 2] * scale_, values[e][c * 2 + 1] * scale_);
                most = __hmax2_nan(most, __habs2(halves[c]));
            }
            shared_store(block + swizzled(unit.position + column + divide_by_phases(e * 32, phases_w), piece, kRows * 2), reinterpret_cast<const uint4&>(halves), in_box(unit, e));
        }
        if (!looked_ || !__hblt2(most, __float2half2_rn(32768.0f))) {    // false with NaN
#pragma unroll 1
            for (int i = 0; i < kUnitChannels * kEach; i++) scaled_half::find_extremes(extremes_, shared_load(from + i * 128));
        }
        converted_ = converted_ + 1 == kSlots ? 0 : converted_ + 1;
    }

    const Problem& p_;
    const Packing& packing_;
    const Unit* const units_;
    const uint32_t slots_;                 // this lane's
    const int boxes_;                      // how many there are
    int next_box_, next_unit_ = first_unit();    // to be loaded
    int next_d_, next_h_, next_w_;         // where its first element would be in dout, and the lane's in its row
    const float* next_;                    // there
    int slot_ = 0, converted_ = 0;         // the next ones to be loaded and converted
    int sample_ = -1;
    bool looked_ = false;                  // whether there is a scale
    float scale_ = 0;
    scaled_half::Extremes extremes_ = {};
};

#endif  // HAS_SM90A

}  // namespace dweight_sm90
'''

_SOURCES['dweight_packing_sm90.cuh'] = r'''
// dweight.cuh on Hopper where a block reads all of a box of dout (Tiling::packs): from its float32 elements, whose packed copy is made on the way.
//
// A block is two warpgroups of packers and two that multiply. Shared memory leaves 60 KB of the L1 cache, which the packers' loads go through.
#pragma once

#include "dout_packer_sm90.cuh"
#include "dweight_sm90.cuh"

namespace dweight_sm90 {

constexpr int kPackingN = 64;          // GEMM_N
constexpr int kPackerThreads = 32 * kPackerWarps, kPackingThreads = kPackerThreads + 128 * kPackingConsumers, kPackerRegisters = 56, kPackingConsumerRegisters = 200;
static_assert(kPackerThreads * kPackerRegisters + 128 * kPackingConsumers * kPackingConsumerRegisters <= 65536, "the register file of a multiprocessor");

struct PackingHead : SharedHead {
    Unit units[kMostUnits];
};
constexpr int kPackingHeadBytes = 2048;    // a multiple of 1024
static_assert(sizeof(PackingHead) <= kPackingHeadBytes, "the stages begin behind the head");

// For head and stages, as choose_tiling counts them.
constexpr int kPackingSharedBytes = 195 * 1024 - kPackerBytes - (kPackingHeadBytes - kHeadBytes);

// --------------------------------------------------------------------------------------------------------- Kernel

#ifdef HAS_SM90A

// The packers; one thread also loads x.
__device__ __forceinline__ void pack(const Parameters& a, const Packing& packing, const CUtensorMap& x_map, PackingHead& head, uint8_t* stages, const Group& g, int boxes) {
    const Tiling& t = a.p.t;
    Packer packer(a.p, packing, head.units, stages + t.stages * t.stage_bytes, boxes);
    RingPosition stage;
    for (int i = blockIdx.x; i < boxes; i += t.splits) {
        const Box b = box_of(a.p, packing, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect_tx(full, x_bytes_of(t, g));
            load_x(a, x_map, g, b, base, full);
        }
        __syncwarp();
        packer.pack(b, base);
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(full);
        stage.advance(t.stages);
    }
    packer.report();
}

// A lane of each consumer's warps: its share of a packed box.
__device__ __forceinline__ void store_packed(const Tiling& t, const CUtensorMap& dout_map, const Box& b, const uint8_t* stage, int warp) {
    for (int i = warp; i < t.dout_boxes * t.rows; i += kPackingConsumers * 4) {
        const int j = i / t.rows, row = i - j * t.rows;
        tma_store_5d(&dout_map, stage + j * t.dout_bytes + row * t.pitch * kRows * 2, j * kRows, b.w0, b.h0 + row, b.d, b.n);
    }
    bulk_commit_group();
}

__device__ __forceinline__ void multiply_packed(const Parameters& a, const Packing& packing, const CUtensorMap& dout_map, PackingHead& head, uint8_t* stages, const Group& g, int boxes, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const bool elected = threadIdx.x % 32 == 0;
    const Operands<kPackingItems> operands(a.p, g, stages, consumer, items_of(a.p, g, consumer));
    float d[kPackingItems][kPackingN / 2] = {};
    RingPosition stage;
    int sample = -1, shift_x = 0, shift_dout = 0, chain = 0, reading = -1;    // the stage that wgmmas and stores in flight read
    bool first = true;
    const auto free_stage = [&] {
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
    };
    for (int i = blockIdx.x; i < boxes; i += t.splits) {
        const Box b = box_of(a.p, packing, i);
        if (b.n != sample || chain >= kChain) {
            const int next_x = scaled_half::shift_of(a.x_max[b.n]), next_dout = shift_of(packing, b.n);
            if (sample >= 0 && (next_x != shift_x || next_dout != shift_dout || chain >= kChain)) {
                wgmma_wait_group<0>();
                if (elected) bulk_wait_group_read<0>();
                free_stage();
                reading = -1;
                flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
                first = false, chain = 0;
            }
            sample = b.n, shift_x = next_x, shift_dout = next_dout;
        }
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        fence_proxy_async();               // what the packers have stored; there it would wait for their loads
        if (elected && packing.stores) store_packed(t, dout_map, b, stages + stage.stage * t.stage_bytes, consumer * 4 + threadIdx.x / 32 % 4);
        __syncwarp();
        operands.multiply(t, stage.stage, d);
        wgmma_wait_group<1>();
        if (elected) bulk_wait_group_read<1>();
        free_stage();
        reading = stage.stage;
        stage.advance(t.stages);
    }
    wgmma_wait_group<0>();
    flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
    if (elected) bulk_wait_group<0>();
}

#endif  // HAS_SM90A

__global__ void __launch_bounds__(kPackingThreads, 1)
packing_dweight_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a, const __grid_constant__ Packing packing) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    PackingHead& head = *reinterpret_cast<PackingHead*>(base);
    uint8_t* stages = base + kPackingHeadBytes;
    const Tiling& t = a.p.t;
    const Group g(t, a.p.s, 0);
    const int boxes = Boxes(a.p, g).count;
    if (packing.again) {
        wait_for_previous_kernel();
        if (!scaled_half::any_copied_again(packing.max, int(a.p.N))) return;
    }
    prepare_stages<kPackingThreads>(head, t, stages, 1 + kPackerWarps, kPackingConsumers * 4);
    for (int i = threadIdx.x; i < packing.units; i += kPackingThreads) head.units[i] = unit_of(a.p, i);
    fence_proxy_async();
    __syncthreads();
    wait_before_next_kernel();
    if (threadIdx.x < kPackerThreads) {
        setmaxnreg_dec<kPackerRegisters>();
        pack(a, packing, x_map, head, stages, g, boxes);
    } else {
        setmaxnreg_inc<kPackingConsumerRegisters>();
        const int consumer = (threadIdx.x - kPackerThreads) / 128;
        float4* partial = reinterpret_cast<float4*>(a.partial) + (int64_t(blockIdx.x) * kPackingConsumers + consumer) * kPackingItems * (kPackingN / 8 * 128) + threadIdx.x % 128;
        multiply_packed(a, packing, dout_map, head, stages, g, boxes, partial, consumer);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

// dweight from packed x and float32 dout; and for dx, unless the weight has no channels, the copies of dout and weight.
inline int pack_and_differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, const scaled_half::Weight& weight, void* dweight, cudaStream_t stream) {
    Maps maps;
    RETURN_IF_ERROR(maps.make(a.p, x, dout));
    RETURN_IF_ERROR(scaled_half::look_when_idle(dout, weight, stream));
    const int shared = kPackingHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kPackerBytes;
    Packing packing = make_packing(a.p, dout, weight.channels > 0);
    RETURN_IF_ERROR(launch_with_shared(packing_dweight_kernel, a.p.t.splits, kPackingThreads, shared, stream, maps.x, maps.dout, a, packing));
    RETURN_IF_ERROR(scaled_half::copy_weight_beside(weight, stream));
    packing.again = true;
    if (!looks_at_all(dout)) RETURN_IF_ERROR(launch_with_shared(packing_dweight_kernel, a.p.t.splits, kPackingThreads, shared, stream, maps.x, maps.dout, a, packing));
    return add_parts(a.p, a.partial, kFloat32, dweight, stream);
}

}  // namespace dweight_sm90
'''

_SOURCES['dweight_taps_sm90.cuh'] = r'''
// dweight.cuh's product on Hopper for small grids and many channels: one element of the kernel at a time.
//
//   dweight[ci, co, k] = sum over n, p of x[n, first + p - shift, ci] * dout[n, p, (phase, co)],   (shift, phase) of k
//
// A block is a warp that loads and two warpgroups that multiply: an element of the kernel, 128 or 256 input channels, 64 or 128 output channels, a part of GEMM_K (dweight_taps_tiles.h). Both operands
// are transposed ones, a row of shared memory for each position. Sums go to scratch memory, from which a second kernel adds the parts and puts the elements of a kernel together.
#pragma once

#include "dweight.cuh"
#include "dweight_taps_tiles.h"
#include "pipeline_sm90.cuh"

namespace dweight_taps {

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 208;
constexpr int kMostRescaled = 32;    // by which powers of two sums are scaled again, rather than added to scratch memory, when the scale changes

struct Parameters {
    Plan p;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                                    // (splits, kernel, rows, columns)
};

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };
static_assert(sizeof(SharedHead) <= kHeadBytes, "the stages begin behind the head");

#ifdef HAS_SM90A

// A thread: loads a tile's boxes, of x's channels, then of dout's.
__device__ __forceinline__ void load_all(const Plan& p, const Tile& tile, SharedHead& head, uint8_t* stages, const CUtensorMap* x_map, const CUtensorMap* dout_map) {
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const TapPhase place = place_of_kernel(p.s, tile.k);
    const int tap_dh = place.tap / aw.taps, shift_d = ad.first - ad.shift[tap_dh / ah.taps], shift_h = ah.first - ah.shift[tap_dh % ah.taps], shift_w = aw.first - aw.shift[place.tap % aw.taps];
    const int channel = place.phase * p.dout_phase_channels + tile.column, x_blocks = kConsumers * p.x_blocks;
    RingPosition stage;
    const int end = p.begin_of(tile.split + 1);
    for (int i = p.begin_of(tile.split); i < end; i++) {
        const Box b = box_of(p, i);
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        uint64_t* full = head.full + stage.stage;
        mbarrier_arrive_expect_tx(full, p.stage_blocks() * p.positions() * kBlock * 2);
        uint8_t* to = stages + stage.stage * p.stage_bytes();
        for (int j = 0; j < x_blocks; j++, to += p.block_bytes()) tma_load_5d(to, x_map, full, tile.row + j * kBlock, b.w + shift_w, b.h + shift_h, b.d + shift_d, b.n);
        for (int j = 0; j < p.dout_blocks; j++, to += p.block_bytes()) tma_load_5d(to, dout_map, full, channel + j * kBlock, b.w, b.h, b.d, b.n);
        stage.advance(p.stages);
    }
}

// A consumer warpgroup.
template <int kXBlocks, int kDoutBlocks> struct Consumer {
    static constexpr int kSums = kDoutBlocks * kBlock / 2;
    const Parameters& a;
    const Tile& tile;
    int consumer, lane;
    bool first = true;                         // nothing is in scratch memory yet
    int shift_x = 0, shift_dout = 0;           // the scales of the sums
    float d[kXBlocks][kSums] = {};

    __device__ __forceinline__ Consumer(const Parameters& a, const Tile& tile) : a(a), tile(tile), consumer(threadIdx.x / 128 - 1), lane(threadIdx.x % 32) {}

    // Adds the sums to scratch memory, scaled back, and clears them: what no wgmma adds to any more.
    __device__ __forceinline__ void flush() {
        const Plan& p = a.p;
        const dweight::ScaleBack back(shift_x, shift_dout);
        const int row = tile.row + consumer * kXBlocks * kBlock + threadIdx.x / 32 % 4 * 16 + lane / 4;
        float* const to = a.partial + ((int64_t(tile.split) * kernel_volume(p.s) + tile.k) * p.rows() + row) * p.columns() + tile.column + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kXBlocks; i++)
#pragma unroll
            for (int j = 0; j < kSums; j += 2) {
                float2& sums = *reinterpret_cast<float2*>(to + (i * kBlock + j / 2 % 2 * 8) * p.columns() + j / 4 * 8);
                const float2 before = first ? make_float2(0, 0) : sums;
                sums = make_float2(before.x + back(d[i][j]), before.y + back(d[i][j + 1]));
                d[i][j] = d[i][j + 1] = 0;
            }
        first = false;
    }

    __device__ __forceinline__ void run(SharedHead& head, uint8_t* stages) {
        const Plan& p = a.p;
        const int begin = p.begin_of(tile.split), end = p.begin_of(tile.split + 1), block = p.block_bytes() / 16;
        const uint64_t x_descriptor = wgmma_descriptor_base(kBlock * 2), dout_descriptor = wgmma_descriptor_base(kBlock * 2, p.block_bytes());
        int sample_end = begin, base = 0, chain = 0, reading = -1;    // base: the scale at the last flush; the stage that wgmmas in flight read
        RingPosition stage;
        const auto wait = [&] {
            wgmma_wait_group<0>();
            if (lane == 0 && reading >= 0) mbarrier_arrive(head.empty + reading);
            reading = -1;
#pragma unroll
            for (int i = 0; i < kXBlocks; i++)
#pragma unroll
                for (int j = 0; j < kSums; j++) keep_after(d[i][j]);
        };
        for (int i = begin; i < end; i++) {
            if (i == sample_end) {
                const int n = i / p.sample_boxes(), next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]), change = next_x + next_dout - shift_x - shift_dout;
                if (i > begin && change != 0) {
                    wait();
                    if (abs(next_x + next_dout - base) > kMostRescaled || abs(change) > kMostRescaled) {
                        flush(), chain = 0, base = next_x + next_dout;
                    } else {
                        const float scale = scaled_half::power_of_two(change);
#pragma unroll
                        for (int k = 0; k < kXBlocks; k++)
#pragma unroll
                            for (int j = 0; j < kSums; j++) d[k][j] *= scale;
                    }
                } else if (i == begin) {
                    base = next_x + next_dout;
                }
                sample_end = (n + 1) * p.sample_boxes(), shift_x = next_x, shift_dout = next_dout;
            }
            if (chain >= dweight::kChain) wait(), flush(), chain = 0, base = shift_x + shift_dout;
            chain += p.steps * 16;
            mbarrier_wait(head.full + stage.stage, stage.phase);
            const uint32_t at = shared_vector(stages + stage.stage * p.stage_bytes()), x = at + consumer * kXBlocks * block, dout = at + kConsumers * kXBlocks * block;
            wgmma_fence();
#pragma unroll 1
            for (int step = 0; step < p.steps; step++)
#pragma unroll
                for (int k = 0; k < kXBlocks; k++) wgmma_m64k16_f16<1>(d[k], wgmma_descriptor(x_descriptor, x + k * block + step * kBlock * 2), wgmma_descriptor(dout_descriptor, dout + step * kBlock * 2));
            wgmma_commit_group();
            wgmma_wait_group<1>();
            if (lane == 0 && reading >= 0) mbarrier_arrive(head.empty + reading);
            reading = stage.stage;
            stage.advance(p.stages);
        }
        wait();
        flush();
    }
};

#endif  // HAS_SM90A

template <int kXBlocks, int kDoutBlocks>
__global__ void __launch_bounds__(kThreads, 1) dweight_taps_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    uint8_t* const stages = base + kHeadBytes;
    const Plan& p = a.p;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) mbarrier_init(head.full + i, 1), mbarrier_init(head.empty + i, kConsumers * 4);
        fence_mbarrier_init();
    }
    // Zeros behind the box.
    const int rest = p.block_bytes() - p.positions() * kBlock * 2;
    for (int i = threadIdx.x * 16; i < p.stages * p.stage_blocks() * rest; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i / rest * p.block_bytes() + p.positions() * kBlock * 2 + i % rest) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();
    const Tile tile = tile_of(p, blockIdx.x);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == 0) load_all(p, tile, head, stages, &x_map, &dout_map);
    } else {
        setmaxnreg_inc<kMultiplyRegisters>();
        Consumer<kXBlocks, kDoutBlocks>(a, tile).run(head, stages);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------- Adding

constexpr int kAddThreads = 256, kAddOutputs = 32;

// dweight (C_in, C_out, kernel) from the parts: a block has some output channels of an input channel, whose kernels are neighbours in memory.
__global__ void __launch_bounds__(kAddThreads) add_taps_kernel(const __grid_constant__ Plan p, const float* __restrict__ partial, int dtype, void* __restrict__ dweight) {
    extern __shared__ __align__(16) uint8_t memory[];
    float* const values = reinterpret_cast<float*>(memory);    // (outputs, volume)
    const int volume = kernel_volume(p.s), tiles = (p.C_out + kAddOutputs - 1) / kAddOutputs, ci = blockIdx.x / tiles, co0 = blockIdx.x % tiles * kAddOutputs, outputs = min(kAddOutputs, p.C_out - co0);
    const int output = threadIdx.x % kAddOutputs;
    const int64_t element = int64_t(p.rows()) * p.columns();
    wait_for_previous_kernel();
    const float* const from = partial + int64_t(ci) * p.columns() + co0 + output;    // there are columns() of them
    constexpr int kAtOnce = 4, kStep = kAddThreads / kAddOutputs;    // elements of the kernel
    for (int k0 = threadIdx.x / kAddOutputs; k0 < volume; k0 += kAtOnce * kStep) {
        float sums[kAtOnce] = {};
        for (int split = 0; split < p.splits; split++)
#pragma unroll
            for (int i = 0; i < kAtOnce; i++)
                if (k0 + i * kStep < volume) sums[i] += from[(int64_t(split) * volume + k0 + i * kStep) * element];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (k0 + i * kStep < volume) values[output * volume + k0 + i * kStep] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < outputs * volume; i += kAddThreads) store_as(dweight, dtype, (int64_t(ci) * p.C_out + co0) * volume + i, values[i]);
}

// ------------------------------------------------------------------------------------------------------- Launcher

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Plan& p = a.p;
    const StencilAxis* axis = p.s.axis;
    CUtensorMap x_map, dout_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kBlock * 2), x.copy, {x.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {kBlock, p.box[2], p.box[1], p.box[0], 1}));
    RETURN_IF_ERROR(make_tensor_map<5>(&dout_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kBlock * 2), dout.copy, {dout.phase_channels * dout.phases(), axis[2].positions, axis[1].positions, axis[0].positions, p.N}, {kBlock, p.box[2], p.box[1], p.box[0], 1}));
    const auto kernel = p.x_blocks == 2 ? (p.dout_blocks == 2 ? dweight_taps_kernel<2, 2> : dweight_taps_kernel<2, 1>) : (p.dout_blocks == 2 ? dweight_taps_kernel<1, 2> : dweight_taps_kernel<1, 1>);
    RETURN_IF_ERROR(launch_with_shared(kernel, p.tiles() * p.splits, kThreads, p.shared_bytes(), stream, x_map, dout_map, a));
    return launch_with_shared(add_taps_kernel, int64_t(p.C_in) * ceil_div(p.C_out, kAddOutputs), kAddThreads, kAddOutputs * kernel_volume(p.s) * 4, stream, p, a.partial, dtype, dweight);
}

}  // namespace dweight_taps
'''

_SOURCES['conv_transpose3d_gradients_sm90.cu'] = r'''
// Gradients of a transposed convolution on Hopper: wgmma, TMA.

#include "conv_transpose3d_gradients.cuh"
#include "dweight_packing_sm90.cuh"
#include "dweight_taps_sm90.cuh"

namespace gradients_sm90 {

struct Path : conv_sm90::Path {
    static constexpr bool kHopper = true;
    static constexpr int kPackingSharedBytes = dweight_sm90::kPackingSharedBytes;
    static int shared_bytes(int) { return conv_sm90::kSharedBytes - dweight_sm90::kTailBytes; }
    static int differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_sm90::differentiate(a, x, dout, dtype, dweight, stream);
    }
    static int differentiate_taps(const dweight_taps::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_taps::differentiate(a, x, dout, dtype, dweight, stream);
    }
    static int pack_and_differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, const scaled_half::Weight& weight, void* dweight, cudaStream_t stream) {
        return dweight_sm90::pack_and_differentiate(a, x, dout, weight, dweight, stream);
    }
};

}  // namespace gradients_sm90

GRADIENTS_LAUNCHERS(sm90, gradients_sm90::Path)
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
int relu_group_norm_backward(const NormShape& s, int threads, const T* dy, const T* r, const double* statistics, const T* gamma, T* dz, T* dgamma, T* dbeta, T* dbias) {
    const int64_t channels = s.C / s.num_groups, count = channels * s.S;
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    std::vector<double> sums(s.N * s.C), products(s.N * s.C), dz_sums(s.N * s.C);    // per (n, c): sums of dy, of dy * xhat and of dz
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
    if (!dz && !dbias) return 0;
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
            const double own = r[i] <= 0 ? 0 : dr;    // NaN keeps its gradient, as in torch
            dz_sums[i / s.S] += own;
            if (dz) dz[i] = T(own);
        }
    }
    for (int64_t c = 0; dbias && c < s.C; c++) {
        double sum = 0;
        for (int64_t n = 0; n < s.N; n++) sum += dz_sums[n * s.C + c];
        dbias[c] = T(sum);
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
                                            const void* gamma, void* dz, void* dgamma, void* dbeta, void* dbias) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::relu_group_norm_backward<T>(*s, threads, (const T*)dy, (const T*)r, statistics, (const T*)gamma, (T*)dz, (T*)dgamma, (T*)dbeta, (T*)dbias);
    });
}
'''

# ---- end of the embedded copy of kernels/

_operators = _register_operators()
if "CONV_TRANSPOSE3D_NO_BUILD" not in os.environ:    # compile now, not at the first call (check.py --doctor only looks)
    _library("cuda" if torch.cuda.is_available() else "cpu")
