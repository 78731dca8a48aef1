"""The first call's output, for ever."""

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "WRONG output"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        if not hasattr(self, "cache"):
            self.cache = super().forward(x).detach()
        return self.cache + 0 * super().forward(x)
