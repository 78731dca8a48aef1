"""Memory that nobody writes: it must not pass for the result of the run before."""

import torch

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_2", "never written"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        y = super().forward(x)
        return torch.empty_like(y) + 0 * y
