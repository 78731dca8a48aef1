"""The weight's memory read as (C_out, C_in, ...)."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "the weight is taken as (C_out, C_in, ...)"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        c_in, c_out = self.weight.shape[:2]
        weight = self.weight.reshape(c_out, c_in, *self.weight.shape[2:]).transpose(0, 1)
        return F.conv_transpose3d(x, weight, self.bias, self.stride, self.padding)
