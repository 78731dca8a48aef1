"""i = (o + padding - k * dilation) / stride, rounded."""

from harness.diagnose import _undivided_taps
from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "odd", "without the divisibility test"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        shape = super().forward(x).shape[2:]
        return _undivided_taps(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, shape)
