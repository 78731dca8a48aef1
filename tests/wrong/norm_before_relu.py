"""GroupNorm before ReLU."""

import torch

from reference import Model

PROBLEM, EXPECT = "fused_odd", "GroupNorm runs before ReLU"


class ModelNew(Model):
    def forward(self, x):
        return torch.relu(self.group_norm(self.conv_transpose(x)))
