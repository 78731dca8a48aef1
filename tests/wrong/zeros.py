"""Zeros."""

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_2", "every element is 0: nothing was computed"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        return 0 * super().forward(x)
