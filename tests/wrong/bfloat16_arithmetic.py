"""Operands rounded to bfloat16."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "the arithmetic is bfloat16"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        return F.conv_transpose3d(x.bfloat16().float(), self.weight.bfloat16().float(), self.bias, self.stride, self.padding)
