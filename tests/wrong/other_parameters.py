"""Parameters created in another order: the same seed gives other values."""

import torch

from reference import ConvTranspose3dModel

PROBLEM, EXPECT = "upsample_4", "the same seed gives other parameters"


class ConvTranspose3dNew(ConvTranspose3dModel):
    def __init__(self, *arguments, **keywords):
        torch.rand(1)
        super().__init__(*arguments, **keywords)
