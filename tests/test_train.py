"""harness/train.py: on the CPU, the layers of model_new.py train like torch.nn's."""

import pytest
import torch

from harness import train


def test_the_same_losses(monkeypatch):
    monkeypatch.setattr(train, "SIZE", 16)
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "WIDTH", 16)
    expected, ours = (train.train(*train.RUNS[name][:2], 3, 0, torch.device("cpu"))[0] for name in ("torch.nn", "ours"))
    assert ours == pytest.approx(expected, rel=1e-4) and ours[2] < ours[0]
