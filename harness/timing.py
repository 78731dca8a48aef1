"""Timing: CUDA events around each call, a cold L2, medians; and the ceilings against which a time is read."""

import statistics
import time

import torch

FLUSH_BYTES = 256 << 20       # more than any L2
MIN_SECONDS, MIN_CALLS, MAX_CALLS = 0.3, 10, 200
LEFTOVER_SECONDS = 2e-4       # a device that is still busy for longer after the closing event works on another stream


def summarize(samples):
    """Median and 20th and 80th percentile of times in milliseconds."""
    ordered = sorted(samples)
    return {"ms": statistics.median(ordered), "p20": ordered[len(ordered) // 5], "p80": ordered[-1 - len(ordered) // 5], "calls": len(ordered)}


def measure(call, prepare, device):
    """Times ``call(prepare())`` until the samples fill MIN_SECONDS; returns (summary, the last call's result).

    The L2 is flushed before each call. ``prepare`` is not timed. Raises RuntimeError where work goes on after the closing
    event, which a stream other than the current one would hide.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    for _ in range(3):
        call(prepare())
    samples, walls, start = [], [], time.perf_counter()    # walls: the host's clock, the flush included
    while len(samples) < MIN_CALLS or (time.perf_counter() - start < MIN_SECONDS and len(samples) < MAX_CALLS):
        arguments = prepare()
        milliseconds, wall, result = clock.time(call, arguments)
        samples.append(milliseconds)
        walls.append(wall)
    clock.check()
    return {**summarize(samples), "host_ms": statistics.median(walls)}, result


class _CudaClock:
    def __init__(self, device):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.leftovers = []

    def time(self, call, arguments):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        wall = time.perf_counter()
        self.flush.random_()    # long enough that the host runs ahead: the device, not the launch, is timed
        begin.record()
        result = call(arguments)
        end.record()
        end.synchronize()
        ended = time.perf_counter()
        torch.cuda.synchronize()
        self.leftovers.append(time.perf_counter() - ended)
        return begin.elapsed_time(end), (ended - wall) * 1e3, result

    def check(self):
        leftover = statistics.median(self.leftovers)
        if leftover > LEFTOVER_SECONDS:
            raise RuntimeError(f"the device works on for {leftover * 1e3:.2f} ms after the closing event: on another stream, not timed")


class _HostClock:
    def time(self, call, arguments):
        begin = time.perf_counter()
        result = call(arguments)
        milliseconds = (time.perf_counter() - begin) * 1e3
        return milliseconds, milliseconds, result

    def check(self):
        """Nothing runs beside the host."""


# ------------------------------------------------------------------------------------------------------------- Ceilings


def ceilings(device):
    """Measured on random data: bytes/s of a device-to-device copy (read and written), FLOP/s of an 8192^3 fp16 product."""
    source = torch.rand(1 << 29, device=device)
    target = torch.empty_like(source)
    copy, _ = measure(lambda _: target.copy_(source), lambda: None, device)
    del source, target
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.float16) for _ in range(2))
    product, _ = measure(lambda _: a @ b, lambda: None, device)
    return {"copy_bytes_per_s": 2 * 4 * (1 << 29) / copy["ms"] * 1e3, "fp16_flop_per_s": 2 * 8192**3 / product["ms"] * 1e3}


def work(problem):
    """Useful floating-point operations and the fewest bytes of the forward and of the backward of a problem (float32)."""
    init = problem.init

    def triple(name, default):
        value = init.get(name, default)
        return (value,) * 3 if isinstance(value, int) else value

    kernel, stride, padding = triple("kernel_size", 1), triple("stride", 1), triple("padding", 0)
    output_padding, dilation = triple("output_padding", 0), triple("dilation", 1)
    pairs, out_volume, in_volume = 1, 1, 1
    for a in range(3):
        size = problem.input_shape[a - 3]
        out = (size - 1) * stride[a] - 2 * padding[a] + dilation[a] * (kernel[a] - 1) + output_padding[a] + 1
        pairs *= sum(0 <= i * stride[a] - padding[a] + k * dilation[a] < out for i in range(size) for k in range(kernel[a]))
        out_volume, in_volume = out_volume * out, in_volume * size
    groups = init.get("groups", 1) if problem.model == "plain" else 1
    n, c_in, c_out = problem.input_shape[0], init["in_channels"], init["out_channels"]
    flop = 2 * n * c_in * c_out // groups * pairs
    x, y = 4 * n * c_in * in_volume, 4 * n * c_out * out_volume
    saved = y if problem.model == "fused" else 0    # the activation
    return {"forward": {"flop": flop, "bytes": x + y}, "backward": {"flop": 2 * flop, "bytes": y + saved + 2 * x}}


def floor_ms(amount, limits):
    """The time below which no implementation runs: the larger of arithmetic at the fp16 rate and memory at the copy's."""
    return 1e3 * max(amount["flop"] / limits["fp16_flop_per_s"], amount["bytes"] / limits["copy_bytes_per_s"])
