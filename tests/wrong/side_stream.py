"""Work on a stream that nobody waits for."""

import torch

from reference import ConvTranspose3dModel

PROBLEM, EXPECT, NEEDS_GPU = "dense", "WRONG output", True
STREAM = None


class ConvTranspose3dNew(ConvTranspose3dModel):
    def forward(self, x):
        global STREAM
        STREAM = STREAM or torch.cuda.Stream()
        y = torch.empty_like(super().forward(x[:, :, :, :, :]).detach())
        with torch.cuda.stream(STREAM):
            torch.cuda._sleep(200_000_000)
            y.copy_(super().forward(x))
        return y + 0 * self.weight.sum() + 0 * x.sum()
