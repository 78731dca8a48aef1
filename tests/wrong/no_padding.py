"""padding forgotten."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "kernel_5", "as if padding is left out"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        return F.conv_transpose3d(x, self.weight, self.bias, self.stride)
