"""The right output, and the input overwritten."""

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "the input was changed"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        y = super().forward(x)
        x.data.mul_(0)
        return y
