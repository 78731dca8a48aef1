"""The PyTorch models that model_new.py replaces, and the problems on which check.py and bench.py compare the two.

``Model``, ``get_inputs`` and ``get_init_inputs`` follow KernelBench's convention (level 2, problem 61), so its harness can
take this file and model_new.py as they are.
"""

from dataclasses import dataclass, field

import torch
from torch import nn


class Model(nn.Module):
    """ConvTranspose3d -> ReLU -> GroupNorm. ``groups`` are GroupNorm's; the keywords are ConvTranspose3d's (eps: GroupNorm's)."""

    def __init__(self, in_channels, out_channels, kernel_size, groups, bias=False, *, stride=1, padding=0, output_padding=0, dilation=1, eps=1e-5):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose3d(in_channels, out_channels, kernel_size, stride=stride, padding=padding,
                                                 output_padding=output_padding, bias=bias, dilation=dilation)
        self.group_norm = nn.GroupNorm(groups, out_channels, eps=eps)

    def forward(self, x):
        return self.group_norm(torch.relu(self.conv_transpose(x)))


class ConvTranspose3dModel(nn.ConvTranspose3d):
    """ConvTranspose3d alone, with the defaults of ConvTranspose3dNew (no bias) and its argument order."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, bias=False, dilation=1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, output_padding=output_padding,
                         groups=groups, bias=bias, dilation=dilation)


batch_size = 16
in_channels = 64
out_channels = 128
D, H, W = 32, 32, 32
kernel_size = 3
groups = 8
bias = False


def get_inputs():
    return [torch.rand(batch_size, in_channels, D, H, W)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, groups, bias]


@dataclass(frozen=True)
class Problem:
    """A model and its input: ``model`` is "fused" (Model, ModelNew) or "plain" (ConvTranspose3dModel, ConvTranspose3dNew)."""

    name: str
    model: str
    input_shape: tuple    # (N, C_in, D, H, W), or (C_in, D, H, W)
    init: dict = field(default_factory=dict)

    @property
    def reference_class(self):
        return Model if self.model == "fused" else ConvTranspose3dModel


def _plain(name, input_shape, *init, **keywords):
    names = ("in_channels", "out_channels", "kernel_size")
    return Problem(name, "plain", input_shape, {**dict(zip(names, init)), **keywords})


def _fused(name, input_shape, *init, **keywords):
    names = ("in_channels", "out_channels", "kernel_size", "groups")
    return Problem(name, "fused", input_shape, {**dict(zip(names, init)), **keywords})


#: The fixed problems: checked and timed.
PROBLEMS = (
    _fused("fused", (16, 64, 32, 32, 32), 64, 128, 3, 8),
    _fused("fused_same", (16, 64, 32, 32, 32), 64, 128, 3, 8, padding=1),
    _plain("grouped", (4, 32, 32, 64, 128), 32, 32, 3, stride=2, padding=1, groups=4),
    _plain("dense", (4, 32, 32, 64, 128), 32, 32, 3, stride=2, padding=1),
)

#: Checked only: small, and each of them awkward in its own way.
SMALL_PROBLEMS = (
    _plain("unit", (1, 1, 1, 1, 1), 1, 1, 1),
    _plain("unit_kernel_3", (1, 1, 1, 1, 1), 1, 1, 3, bias=True),
    _plain("unbatched", (5, 3, 4, 5), 5, 7, 3, stride=2),
    _plain("odd", (3, 5, 7, 9, 11), 5, 7, 3, stride=2, padding=1, bias=True),
    _plain("odd_channels", (2, 20, 5, 6, 7), 20, 36, 3, padding=1, bias=True),
    _plain("wide_row", (1, 3, 2, 3, 131), 3, 5, 3, stride=2, padding=1),
    _plain("kernel_3x5x7", (2, 6, 5, 6, 7), 6, 10, (3, 5, 7), padding=(1, 2, 3)),
    _plain("kernel_5", (2, 16, 6, 5, 7), 16, 16, 5, padding=2),
    _plain("kernel_smaller_than_stride", (2, 4, 4, 3, 5), 4, 6, (1, 2, 2), stride=(3, 4, 3), bias=True),
    _plain("upsample_2", (2, 16, 4, 5, 6), 16, 8, 2, stride=2, bias=True),
    _plain("upsample_3", (2, 16, 4, 5, 6), 16, 8, 3, stride=2, padding=1, output_padding=1, bias=True),
    _plain("upsample_4", (2, 16, 4, 5, 6), 16, 8, 4, stride=2, padding=1),
    _plain("dilated", (2, 4, 5, 6, 7), 4, 6, 3, dilation=2, padding=2),
    _plain("stride_dilated", (2, 4, 5, 6, 7), 4, 6, (2, 3, 4), stride=(3, 2, 4), dilation=(2, 4, 6), padding=(1, 2, 0)),
    _plain("output_padding_below_dilation", (2, 6, 3, 4, 3), 6, 4, (3, 2, 1), stride=(3, 2, 1), padding=(1, 0, 0), output_padding=(2, 3, 1), dilation=4, groups=2),
    _plain("groups", (2, 12, 5, 4, 6), 12, 8, 3, stride=(1, 2, 3), padding=1, groups=4, bias=True),
    _plain("depthwise", (2, 6, 5, 6, 7), 6, 12, 3, stride=2, padding=1, groups=6),
    _plain("padding_beyond_kernel", (2, 4, 7, 8, 9), 4, 4, 3, stride=2, padding=(3, 4, 5)),
    _plain("empty_batch", (0, 4, 3, 4, 5), 4, 6, 3, stride=2, bias=True),
    _fused("fused_odd", (3, 5, 4, 5, 7), 5, 12, 3, 3, bias=True),
    _fused("fused_one_group", (2, 8, 3, 5, 4), 8, 16, 3, 1, padding=1),
    _fused("fused_instance", (2, 8, 5, 3, 4), 8, 16, 3, 16, bias=True),
    _fused("fused_stride_2", (2, 16, 4, 5, 6), 16, 32, 3, 8, stride=2, padding=1, output_padding=1),
    _fused("fused_kernel_135", (2, 6, 4, 5, 6), 6, 8, (1, 3, 5), 4, padding=(0, 1, 2)),
    _fused("fused_dilated", (2, 6, 4, 5, 6), 6, 8, 3, 2, dilation=2),
    _fused("fused_empty_batch", (0, 6, 4, 5, 6), 6, 8, 3, 2, bias=True),
)
