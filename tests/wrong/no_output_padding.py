"""output_padding forgotten."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_3", "depth: expected 8, got 7: as if output_padding is left out"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        return F.conv_transpose3d(x, self.weight, self.bias, self.stride, self.padding)
