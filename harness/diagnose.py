"""Says how a wrong result is wrong: the term of the shape formula, where the errors sit, and which usual mistake explains it."""

import itertools

import torch
import torch.nn.functional as F

AXES = ("depth", "height", "width")


# ------------------------------------------------------------------------------------------------------------ Shapes


def _triples(problem):
    def triple(name, default):
        value = problem.init.get(name, default)
        return (value,) * 3 if isinstance(value, int) else tuple(value)

    return {name: triple(name, default) for name, default in (("kernel_size", None), ("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))}


def _formula(size, kernel, stride, padding, output_padding, dilation):
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def explain_shape(problem, got, expected):
    """Lines that name the term of the size formula which explains the wrong shape."""
    lines = [f"shape: expected {list(expected)}, got {list(got)}; out = (in - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1"]
    if len(got) != len(expected):
        return lines
    sizes = _triples(problem)
    for a, axis in enumerate(AXES):
        if got[a - 3] == expected[a - 3]:
            continue
        size, k, s, p, op, d = (problem.input_shape[a - 3], *(sizes[name][a] for name in ("kernel_size", "stride", "padding", "output_padding", "dilation")))
        mistakes = {
            "padding is left out": _formula(size, k, s, 0, op, d),
            "padding is subtracted once, not twice": _formula(size, k, s, p, op, d) + p,
            "padding is added, not subtracted": _formula(size, k, s, -p, op, d),
            "output_padding is left out": _formula(size, k, s, p, 0, d),
            "stride is left out": _formula(size, k, 1, p, op, d),
            "stride multiplies in, not in - 1": _formula(size, k, s, p, op, d) + s,
            "dilation is left out": _formula(size, k, s, p, op, 1),
            "the size is that of an ordinary convolution": (size + 2 * p - d * (k - 1) - 1) // s + 1,
            "the size is the input's": size,
        }
        causes = [cause for cause, value in mistakes.items() if value == got[a - 3]]
        lines.append(f"{axis}: expected {expected[a - 3]}, got {got[a - 3]}" + (f": as if {' or '.join(causes)}" if causes else ""))
    if got[-4] != expected[-4]:
        lines.append(f"channels: expected {expected[-4]}, got {got[-4]}")
    return lines


# ------------------------------------------------------------------------------------------------------------- Places


def _share(wrong, total):
    return f"{100 * wrong / max(total, 1):.3g}%"


def explain_places(problem, name, wrong):
    """Where the wrong elements of a tensor are: first coordinate, count, border or inside, phase of the stride, channel group."""
    first = tuple(wrong.nonzero()[0].tolist())
    lines = [f"first mismatch at {first}, {int(wrong.sum())} of {wrong.numel()} elements ({_share(int(wrong.sum()), wrong.numel())})"]
    if name not in ("output", "d input") or wrong.dim() < 4:
        return lines
    wrong = wrong.unsqueeze(0) if wrong.dim() == 4 else wrong
    border = torch.ones_like(wrong)
    if min(wrong.shape[2:]) > 2:
        border[:, :, 1:-1, 1:-1, 1:-1] = False
        lines.append(f"on the border {_share(int((wrong & border).sum()), int(border.sum()))} of the elements are wrong, inside {_share(int((wrong & ~border).sum()), int((~border).sum()))}")
    strides = _triples(problem)["stride"] if name == "output" else (1, 1, 1)
    if max(strides) > 1:
        phases = {}
        for phase in itertools.product(*(range(s) for s in strides)):
            part = wrong[:, :, phase[0]::strides[0], phase[1]::strides[1], phase[2]::strides[2]]
            phases[phase] = _share(int(part.sum()), part.numel())
        if len(set(phases.values())) > 1 and len(phases) <= 27:
            lines.append("wrong by phase of the stride (d, h, w): " + ", ".join(f"{phase} {share}" for phase, share in phases.items()))
    num_groups = problem.init.get("groups", 1)
    if name == "output" and num_groups > 1 and wrong.shape[1] % num_groups == 0:
        shares = [_share(int(part.sum()), part.numel()) for part in wrong.chunk(num_groups, dim=1)]
        if len(set(shares)) > 1:
            lines.append("wrong by channel group: " + ", ".join(shares))
    return lines


# ------------------------------------------------------------------------------------------------------------ Mistakes


def _undivided_taps(x, weight, bias, stride, padding, dilation, groups, out_shape):
    """Transposed convolution with i = (o + padding - k * dilation) / stride rounded, not tested for divisibility."""
    channels = weight.shape[1] * groups
    out = x.new_zeros((x.shape[0], channels, *out_shape))
    for tap in itertools.product(*(range(k) for k in weight.shape[2:])):
        part = x
        for a in range(3):
            source = torch.div(torch.arange(out_shape[a], device=x.device) + padding[a] - tap[a] * dilation[a], stride[a], rounding_mode="trunc")
            inside = (source >= 0) & (source < x.shape[2 + a])
            part = part.index_select(2 + a, source.clamp(0, x.shape[2 + a] - 1))
            part = part * inside.to(x.dtype).view([-1 if axis == 2 + a else 1 for axis in range(5)])
        for g, (xs, ws) in enumerate(zip(part.chunk(groups, 1), weight.chunk(groups, 0))):
            out[:, g * weight.shape[1]:(g + 1) * weight.shape[1]] += torch.einsum("ncdhw,co->nodhw", xs, ws[(..., *tap)])
    return out if bias is None else out + bias.view(1, -1, 1, 1, 1)


def _mistakes(problem, reference, x, out_shape):
    """(description, function giving the output which that mistake gives), for one sample x (1, C_in, D, H, W) in float64."""
    conv = getattr(reference, "conv_transpose", reference)
    norm = getattr(reference, "group_norm", None)
    weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()
    sizes = dict(stride=conv.stride, padding=conv.padding, output_padding=conv.output_padding, groups=conv.groups, dilation=conv.dilation)
    c_in, c_out_group = weight.shape[:2]

    def convolve(w=weight, b=bias, x=x):
        return F.conv_transpose3d(x, w, b, **sizes)

    def finish(z, num_groups=None, affine=True):
        if norm is None:
            return z
        gamma, beta = (norm.weight.detach().double(), norm.bias.detach().double()) if affine else (None, None)
        return F.group_norm(z.relu(), num_groups or norm.num_groups, gamma, beta, norm.eps)

    yield "the kernel is flipped", lambda: finish(convolve(weight.flip(2, 3, 4)))
    if conv.groups == 1:
        yield "the weight is taken as (C_out, C_in, ...), not (C_in, C_out, ...)", lambda: finish(convolve(weight.reshape(c_out_group, c_in, *weight.shape[2:]).transpose(0, 1)))
    if max(conv.stride) > 1:
        yield "taps are taken without the divisibility test of (o + padding - k * dilation) / stride", lambda: finish(
            _undivided_taps(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, out_shape))
    if bias is not None:
        yield "the bias is left out", lambda: finish(convolve(b=None))
    if norm is not None:
        yield "GroupNorm runs before ReLU", lambda: F.group_norm(convolve(), norm.num_groups, norm.weight.detach().double(), norm.bias.detach().double(), norm.eps).relu()
        yield "ReLU is left out", lambda: F.group_norm(convolve(), norm.num_groups, norm.weight.detach().double(), norm.bias.detach().double(), norm.eps)
        yield "GroupNorm is left out", lambda: convolve().relu()
        yield "GroupNorm's weight and bias are left out", lambda: finish(convolve(), affine=False)
        swapped = norm.num_channels // norm.num_groups
        if swapped != norm.num_groups:
            yield f"num_groups and channels per group are swapped ({swapped} groups, not {norm.num_groups})", lambda: finish(convolve(), swapped)
        for other in {1, norm.num_channels} - {norm.num_groups, swapped}:
            yield f"the norm has {other} groups, not {norm.num_groups}", lambda other=other: finish(convolve(), other)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"the arithmetic is {str(dtype).split('.')[1]}", lambda dtype=dtype: finish(convolve(weight.to(dtype).double(), x=x.to(dtype).double()))


def explain_values(problem, name, value, truth, reference, x):
    """Lines on a tensor whose values are wrong."""
    value = value.double()
    missing = ~torch.isfinite(value) & torch.isfinite(truth)
    scale = truth.abs().max().item()
    wrong = ~torch.isclose(value, truth, rtol=1e-3, atol=1e-3 * scale) | missing
    if not wrong.any():
        return ["the error is spread thinly: no element is off by more than 0.1%"] + _explain_mistakes(problem, name, value, truth, reference, x)
    lines = explain_places(problem, name, wrong)
    if missing.any():
        lines.append(f"{int(missing.sum())} elements are NaN or Inf: never written, or computed from memory that was not")
        return lines
    if value.numel() > 1 and (value == value.flatten()[0]).all():
        lines.append(f"every element is {value.flatten()[0].item():g}: nothing was computed")
        return lines
    factor = ((value * truth).sum() / (truth * truth).sum()).item()
    if (value - factor * truth).norm() < 1e-3 * truth.norm():
        lines.append(f"as if multiplied by {factor:.6g}")
    return lines + _explain_mistakes(problem, name, value, truth, reference, x)


def _explain_mistakes(problem, name, value, truth, reference, x):
    if name != "output":
        return []
    if x.dim() == 4:
        x, value, truth = x.unsqueeze(0), value.unsqueeze(0), truth.unsqueeze(0)
    x, value, truth = x[:1].double(), value[:1], truth[:1]    # one sample tells, and GroupNorm is per sample
    lines = []
    with torch.no_grad():
        for description, mistaken in _mistakes(problem, reference, x, truth.shape[2:]):
            guess = mistaken()
            if guess.shape == value.shape and (value - guess).norm() < min(0.2 * (value - truth).norm(), 0.1 * truth.norm()):
                lines.append(f"a usual mistake explains it: {description}")
    return lines
