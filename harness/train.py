"""A training loop with the layers of model_new.py and with torch.nn's: the same losses, and the time of a step.

``python -m harness.train [--steps N] [--seed N]`` trains an autoencoder of volumes of random blobs, whose decoder is made of
transposed convolutions (three upsamplers and a stage of stride 1, with ReLU and GroupNorm, and a last layer), three times from the same weights and on the
same volumes: with torch.nn's layers, with torch.nn's once more under ``cudnn.benchmark``, where cuDNN chooses other algorithms,
which tells how far apart equally good arithmetic drifts, and with ours; each in a process of its own, since cuDNN keeps what it
has chosen. Exit code 1 where our losses are further from the first run's than ``LIMIT`` allows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

import model_new

LIMIT = 0.02         # of the loss, averaged over WINDOW steps
WINDOW = 20
SIZE, BATCH, WIDTH = 64, 8, 64


def torch_stage(in_channels, out_channels, kernel_size, groups, **sizes):
    return nn.Sequential(nn.ConvTranspose3d(in_channels, out_channels, kernel_size, bias=False, **sizes), nn.ReLU(), nn.GroupNorm(groups, out_channels))


class Autoencoder(nn.Module):
    """Volumes (N, 1, SIZE, SIZE, SIZE) to 1/512 of their voxels and back; ``stage`` and ``conv_transpose`` make the decoder."""

    def __init__(self, stage, conv_transpose):
        super().__init__()
        widths = (1, WIDTH // 2, WIDTH, 2 * WIDTH)
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Conv3d(a, b, 4, stride=2, padding=1), nn.ReLU()) for a, b in zip(widths, widths[1:])))
        self.decoder = nn.Sequential(
            stage(2 * WIDTH, WIDTH, 4, 8, stride=2, padding=1),
            stage(WIDTH, WIDTH, 3, 8, padding=1),
            stage(WIDTH, WIDTH // 2, 4, 8, stride=2, padding=1),
            stage(WIDTH // 2, WIDTH // 2, 3, 8, stride=2, padding=1, output_padding=1),
            conv_transpose(WIDTH // 2, 1, 3, padding=1, bias=True),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


def blobs(generator, device):
    """BATCH volumes of four Gaussian blobs each, float32."""
    axis = torch.linspace(-1, 1, SIZE, device=device)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centers = torch.rand(BATCH, 4, 3, 1, 1, 1, generator=generator).to(device) * 1.6 - 0.8
    widths = torch.rand(BATCH, 4, 1, 1, 1, generator=generator).to(device) * 0.3 + 0.1
    return (-((grid - centers) ** 2).sum(2) / widths**2).exp().sum(1, keepdim=True)


def train(stage, conv_transpose, steps, seed, device):
    """(losses, milliseconds of a step: the median)."""
    torch.manual_seed(seed)
    model = Autoencoder(stage, conv_transpose).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for _ in range(steps):
        x = blobs(generator, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        losses.append(loss.item())
    return losses, statistics.median(times)


def smooth(losses):
    window = min(WINDOW, len(losses))
    return [statistics.mean(losses[i:i + window]) for i in range(len(losses) - window + 1)]


RUNS = {
    # name: (stage, layer, cudnn.benchmark)
    "torch.nn": (torch_stage, nn.ConvTranspose3d, False),
    "torch.nn, cudnn.benchmark": (torch_stage, nn.ConvTranspose3d, True),
    "ours": (model_new.ModelNew, model_new.ConvTranspose3dNew, False),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", choices=RUNS, help="this run only, as JSON")
    args = parser.parse_args(arguments)
    if args.run:
        stage, conv_transpose, torch.backends.cudnn.benchmark = RUNS[args.run]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(train(stage, conv_transpose, args.steps, args.seed, device)))
        return 0
    runs = {}
    for name in RUNS:
        command = [sys.executable, "-m", "harness.train", "--run", name, "--steps", str(args.steps), "--seed", str(args.seed)]
        runs[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for step in sorted({0, *range(19, args.steps, 20), args.steps - 1}):
        print(f"step {step + 1:4}  " + "  ".join(f"{name} {losses[step]:.6f}" for name, (losses, _) in runs.items()))
    reference = smooth(runs["torch.nn"][0])
    worst = {name: max(abs(a - b) / a for a, b in zip(reference, smooth(losses))) for name, (losses, _) in runs.items()}
    for name, (_, step_time) in runs.items():
        print(f"{name}: {step_time:.2f} ms a step; losses within {worst[name]:.2%} of torch.nn's (means of {WINDOW} steps)")
    return 0 if worst["ours"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
