"""The right output, half the weight's gradient."""

import torch.nn.functional as F

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "as if multiplied by 0.5"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        weight = self.weight / 2 + self.weight.detach() / 2
        return F.conv_transpose3d(x, weight, self.bias, self.stride, self.padding)
