"""Compares a candidate's module with the reference on one problem: output and every gradient, against float64."""

import copy
import dataclasses

import torch

from harness import diagnose

#: An error this small (relative, in norm) is right whatever the reference's own error is.
ERROR_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13, torch.float16: 5e-4, torch.bfloat16: 4e-3}
#: Otherwise it may be this many times the reference's.
ERROR_RATIO = 2.0
#: KernelBench's tolerance for float32, absolute and relative.
ALLCLOSE = 1e-4


@dataclasses.dataclass
class TensorResult:
    """One tensor's verdict. Errors are norms of differences from float64, relative to the norm of the float64 tensor."""

    name: str
    shape: tuple
    right: bool
    max_abs: float = float("nan")
    error: float = float("nan")
    reference_error: float = float("nan")
    why: list = dataclasses.field(default_factory=list)

    def line(self):
        verdict = "ok   " if self.right else "WRONG"
        shape = "x".join(map(str, self.shape)) or "scalar"
        limit = f"{100 * self.error / self.limit:6.1f}%" if self.limit else "      "
        return f"  {verdict} {self.name:24} {shape:22} max abs {self.max_abs:8.2e}  relative {self.error:8.2e}  reference {self.reference_error:8.2e}  of limit {limit}"

    limit: float = 0.0


def relative_error(value, truth):
    """||value - truth|| / ||truth||, or ||value - truth|| where the truth is all zero; 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    norm = truth.norm().item()
    difference = (value.double() - truth).norm().item()
    return difference / norm if norm > 0 else difference


def random_inputs(problem, device, dtype, generator):
    """Fresh input and upstream-gradient source: (x, make_grad)."""
    x = torch.randn(problem.input_shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
    return x, lambda y: torch.randn(y.shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)


def build_pair(problem, candidate_class, device, dtype, seed):
    """(reference, candidate) with equal random parameters; checks that equal seeds initialise them equally."""
    torch.manual_seed(seed)
    reference = problem.reference_class(**problem.init)
    torch.manual_seed(seed)
    candidate = candidate_class(**problem.init)
    state = reference.state_dict()
    same = state.keys() == candidate.state_dict().keys() and all(torch.equal(state[k], v) for k, v in candidate.state_dict().items())
    for key in state:
        if key.startswith("group_norm"):    # ones and zeros would hide mistakes
            state[key] = state[key] + 0.5 * torch.randn(state[key].shape)
    reference.load_state_dict(state)
    candidate.load_state_dict(state)
    return reference.to(device=device, dtype=dtype), candidate.to(device=device, dtype=dtype), same


def run(model, x, grad):
    """{name: tensor}: the output, the gradient of the input and those of every parameter."""
    x = x.detach().requires_grad_(True)
    output = model(x)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output, (x, *parameters.values()), grad)
    return {"output": output.detach(), "d input": gradients[0], **{f"d {name}": g for name, g in zip(parameters, gradients[1:])}}


def run_reference(model, x, grad):
    """As run; where torch lacks the dtype on this device, computed in float32 and rounded."""
    try:
        return run(model, x, grad)
    except (NotImplementedError, RuntimeError):
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise
        return {name: t.to(x.dtype) for name, t in run(copy.deepcopy(model).float(), x.float(), grad.float()).items()}


class poisoned_memory:
    """In this block, memory that torch hands out uninitialised is full of NaN."""

    def __init__(self, device, num_bytes):
        self.device, self.num_bytes = device, num_bytes

    def __enter__(self):
        if self.device.type == "cuda":    # for candidates with allocations of their own from torch's cache
            blocks = [torch.full((self.num_bytes // 4,), float("nan"), device=self.device) for _ in range(2)]
            del blocks
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)    # torch.empty then fills with NaN

    def __exit__(self, *exception):
        torch.use_deterministic_algorithms(self.before)


def verify(problem, candidate_class, device, dtype, seed):
    """The TensorResults of one run on fresh random values drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    reference, candidate, same_start = build_pair(problem, candidate_class, device, dtype, seed)
    x, make_grad = random_inputs(problem, device, dtype, generator)
    with torch.no_grad():
        shape_truth = copy.deepcopy(reference).double()(x.double())
        grad = make_grad(shape_truth)
        warm_up = candidate(torch.rand_like(x))    # other values first: a cached result would show
    results = []
    if not same_start:
        results.append(TensorResult("initial parameters", (), False, why=["the same seed gives other parameters than the reference's"]))
    if warm_up.shape != shape_truth.shape:
        why = diagnose.explain_shape(problem, warm_up.shape, shape_truth.shape)
        return [*results, TensorResult("output", tuple(warm_up.shape), False, why=why)]
    del warm_up, shape_truth

    before, version = x.clone(), x._version
    with poisoned_memory(device, 4 * grad.numel()):
        values = run(candidate, x, grad)
        again = run(candidate, x, grad)
    truths = run(copy.deepcopy(reference).double(), x.double(), grad.double())
    references = run_reference(reference, x, grad)
    for name, truth in truths.items():
        results.append(compare(name, values[name], truth, references[name], dtype, device))
        if not results[-1].right:
            results[-1].why += diagnose.explain_values(problem, name, values[name], truth, reference, x)
        elif not torch.equal(values[name], again[name]):
            results[-1].right = False
            results[-1].why.append("two runs on the same input differ: a race, or a sum in an order that changes")
    if not torch.equal(before, x) or x._version != version:
        results.append(TensorResult("input", tuple(x.shape), False, why=["the input was changed"]))
    if values["output"].numel() and values["output"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        results.append(TensorResult("output", tuple(x.shape), False, why=["the output shares the input's memory"]))
    return results


def compare(name, value, truth, reference, dtype, device):
    result = TensorResult(name, tuple(value.shape), True)
    expected_dtype = reference.dtype
    for what, got, expected in (("shape", value.shape, truth.shape), ("dtype", value.dtype, expected_dtype), ("device", value.device.type, device.type)):
        if got != expected:
            result.right = False
            result.why.append(f"{what}: expected {expected}, got {got}")
            return result
    if value.numel() == 0:
        result.max_abs = result.error = result.reference_error = 0.0
        return result
    result.max_abs = (value.double() - truth).abs().max().item()
    result.error, result.reference_error = relative_error(value, truth), relative_error(reference, truth)
    result.limit = max(ERROR_FLOOR[dtype], ERROR_RATIO * result.reference_error)
    result.right = result.error <= result.limit    # False for NaN
    if not result.right:
        result.why.append(f"relative error {result.error:.2e} exceeds the limit {result.limit:.2e}")
    # Where the reference is the less accurate of the two, or as far from the truth itself (TF32), being far from it is no fault.
    elif (name == "output" and dtype == torch.float32 and result.error > result.reference_error
          and torch.allclose(reference.double(), truth, ALLCLOSE, ALLCLOSE) and not torch.allclose(value, reference, ALLCLOSE, ALLCLOSE)):
        result.right = False
        result.why.append(f"not within {ALLCLOSE} of the reference (absolute and relative)")
    return result
