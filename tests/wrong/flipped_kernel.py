"""A convolution with the weight not flipped."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "kernel_5", "the kernel is flipped"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        return F.conv_transpose3d(x, self.weight.flip(2, 3, 4), self.bias, self.stride, self.padding)
