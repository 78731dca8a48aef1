"""One phase of the stride left at zero."""

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "wrong by phase of the stride (d, h, w): (0, 0, 0) 0%"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        y = super().forward(x)
        mask = y.detach() * 0 + 1
        mask[..., 1::2] = 0
        return y * mask
