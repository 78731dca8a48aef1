"""The competitors of bench.py, each timed in a process of its own: cuDNN fixes its plan for a shape at the first call.

python -m harness.peers PEER PROBLEM[,PROBLEM...] DEVICE SEED prints one JSON line per problem.
"""

import copy
import dataclasses
import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

import reference
from harness import timing, verify


@dataclasses.dataclass(frozen=True)
class Peer:
    """How PyTorch is asked to run a problem's reference model."""

    name: str
    benchmark: bool = True           # cudnn.benchmark, on before the first call
    channels_last: bool = False
    compiled: bool = False           # torch.compile, mode max-autotune-no-cudagraphs: a graph reuses the memory of outputs that are still to be verified
    rewrite: str = ""                # "flipped": conv3d of the flipped weight (stride 1); "block": a dense block-diagonal weight (groups)
    ours: bool = False

    @property
    def slow(self):
        return self.compiled

    def applies(self, problem):
        plain_groups = problem.init.get("groups", 1) if problem.model == "plain" else 1
        if self.rewrite == "flipped":
            return problem.init.get("stride", 1) == 1
        if self.compiled and plain_groups > 1:
            return False    # the compiler leaves the convolution to cuDNN, and cuDNN to the kernel that eager takes: minutes for nothing
        return plain_groups > 1 if self.rewrite == "block" else True


PEERS = (
    Peer("ours", ours=True),
    Peer("eager", benchmark=False),
    Peer("eager, benchmark"),
    Peer("channels_last", channels_last=True),
    Peer("block-diagonal", rewrite="block"),
    Peer("block-diagonal, channels_last", rewrite="block", channels_last=True),
    Peer("compile", compiled=True),
    Peer("compile, channels_last", compiled=True, channels_last=True),
    Peer("flipped conv3d, compile", compiled=True, rewrite="flipped"),
    Peer("flipped conv3d, compile, channels_last", compiled=True, rewrite="flipped", channels_last=True),
)


class FlippedConv3d(nn.Module):
    """A stride-1 transposed convolution as a convolution: the weight flipped, its channels swapped, padding complemented."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = tuple(d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel_size, conv.padding))
        self.dilation = conv.dilation

    def forward(self, x):
        return F.conv3d(x, self.weight.flip(2, 3, 4).transpose(0, 1), self.bias, padding=self.padding, dilation=self.dilation)


class BlockDiagonal(nn.Module):
    """A grouped transposed convolution as a dense one, whose weight is zero outside the groups' blocks."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.weight, self.bias = [conv], conv.weight, conv.bias

    def forward(self, x):
        conv = self.conv[0]
        rows = []
        for g, block in enumerate(self.weight.chunk(conv.groups)):
            rows.append(F.pad(block, (0, 0, 0, 0, 0, 0, g * block.shape[1], (conv.groups - 1 - g) * block.shape[1])))
        return F.conv_transpose3d(x, torch.cat(rows), self.bias, conv.stride, conv.padding, conv.output_padding, 1, conv.dilation)


def build(peer, problem, device, seed):
    """(reference model, the peer's model) with equal parameters."""
    if peer.ours:
        import model_new
        candidate_class = model_new.ModelNew if problem.model == "fused" else model_new.ConvTranspose3dNew
    else:
        candidate_class = problem.reference_class
    model, candidate, _ = verify.build_pair(problem, candidate_class, device, torch.float32, seed)
    rewrite = {"flipped": FlippedConv3d, "block": BlockDiagonal}.get(peer.rewrite)
    if rewrite and problem.model == "fused":
        candidate.conv_transpose = rewrite(candidate.conv_transpose)
    elif rewrite:
        candidate = rewrite(candidate)
    if peer.channels_last:
        candidate = candidate.to(memory_format=torch.channels_last_3d)
    if peer.compiled:
        candidate = torch.compile(candidate, mode="max-autotune-no-cudagraphs")
    return model, candidate


def time_problem(peer, problem, device, seed):
    """{"forward", "forward_recording", "forward_backward": summary, "errors": of the timed calls' tensors}."""
    model, candidate = build(peer, problem, device, seed)
    generator = torch.Generator().manual_seed(seed)
    x, make_grad = verify.random_inputs(problem, device, torch.float32, generator)
    with torch.no_grad():
        grad = make_grad(model(x))
    if peer.channels_last:
        x, grad = (t.to(memory_format=torch.channels_last_3d) for t in (x, grad))
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
    parameters = [leaf, *candidate.parameters()]

    def forward(_):
        with torch.no_grad():
            return candidate(x)

    def forward_backward(_):
        output = candidate(leaf)
        output.backward(grad)
        return output

    def clear():
        for parameter in parameters:
            parameter.grad = None

    times, outputs = {}, {}
    if peer.ours:
        import model_new
        with model_new.record_launches() as launches:
            forward_backward(None)
        clear()
        times["paths"] = list(dict.fromkeys(launches))
    times["forward"], outputs["forward"] = timing.measure(forward, lambda: None, device)
    times["forward_recording"], output = timing.measure(lambda _: candidate(leaf), lambda: None, device)
    del output
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times["forward_backward"], outputs["forward_backward"] = timing.measure(forward_backward, clear, device)
    times["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    # What was timed is what is verified: the last calls' outputs and gradients.
    gradients = [leaf.grad] + [p.grad for p in candidate.parameters()]
    truth = verify.run(copy.deepcopy(model).double(), x.double(), grad.double())
    timed = {"output": outputs["forward"], "output with gradients": outputs["forward_backward"].detach(), **dict(zip(list(truth)[1:], gradients))}
    times["errors"] = {name: verify.relative_error(value, truth[name.split(" with")[0]]) for name, value in timed.items()}
    return times


def main(arguments):
    name, problems, device, seed = arguments
    peer = next(p for p in PEERS if p.name == name)
    torch.backends.cudnn.benchmark = peer.benchmark
    device = torch.device(device)
    for problem in json.loads(problems):
        problem = reference.Problem(**{**problem, "input_shape": tuple(problem["input_shape"])})
        if peer.applies(problem):
            print(json.dumps({"peer": peer.name, "problem": problem.name, **time_problem(peer, problem, device, int(seed))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
