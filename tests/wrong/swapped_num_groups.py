"""The number of groups and of channels per group swapped."""

import torch
import torch.nn.functional as F

from reference import Model

PROBLEM, EXPECT = "fused_odd", "num_groups and channels per group are swapped (4 groups, not 3)"


class ModelNew(Model):
    def forward(self, x):
        norm = self.group_norm
        return F.group_norm(torch.relu(self.conv_transpose(x)), norm.num_channels // norm.num_groups, norm.weight, norm.bias)
