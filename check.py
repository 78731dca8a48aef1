#!/usr/bin/env python3
"""Proves model_new.py against reference.py: output and every gradient, on the fixed problems and on small awkward ones.

    python check.py                        everything, on the GPU if there is one
    python check.py --problem fused        one problem (several: --problem fused,odd)
    python check.py --candidate other.py   another file's ModelNew and ConvTranspose3dNew, the same way
    python check.py --doctor               the tools and the GPU found, and what to do about what is missing

Values are random, drawn anew for every run (the seed is printed; --seed repeats it), memory is poisoned with NaN before
the candidate runs, and errors are measured against float64 beside the reference's own at the same torch flags.

Exit code: 0 correct, 1 wrong, 2 cannot run (no compiler, no such problem).
"""

import argparse
import dataclasses
import importlib.util
import json
import random
import sys
import time

import torch

import reference
from harness import environment, verify

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU_BATCH = 1                      # of the fixed problems on the CPU
SEEDS = {"cuda": 3, "cpu": 1}      # runs of each fixed problem; small problems are run in every dtype instead


def load(path):
    """The module of a candidate's file."""
    spec = importlib.util.spec_from_file_location("candidate", path)
    if spec is None or not spec.loader:
        raise ImportError(f"--candidate: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["candidate"] = module
    spec.loader.exec_module(module)
    return module


def select(names):
    """The problems named, or all of them; raises KeyError for a name that there is not."""
    problems = {p.name: p for p in (*reference.PROBLEMS, *reference.SMALL_PROBLEMS)}
    if not names:
        return list(problems.values())
    unknown = [name for name in names if name not in problems]
    if unknown:
        raise KeyError(f"--problem: no such problem: {', '.join(unknown)}; there are {', '.join(problems)}")
    return [problems[name] for name in names]


def plan(problems, dtype, device):
    """(problem, dtype, number of seeds) of every run."""
    for problem in problems:
        fixed = problem in reference.PROBLEMS
        if fixed and device.type == "cpu":
            problem = dataclasses.replace(problem, input_shape=(CPU_BATCH, *problem.input_shape[1:]))
        for name in [dtype] if dtype else ["float32"] if fixed else DTYPES:
            yield problem, name, SEEDS[device.type] if fixed else 1


def check(problem, dtype, seeds, candidate, device, args, recorder):
    """Runs one problem and prints it; returns its record, or None where the candidate has no class for it."""
    candidate_class = getattr(candidate, "ModelNew" if problem.model == "fused" else "ConvTranspose3dNew", None)
    if candidate_class is None:
        return None
    start, results = time.time(), []
    with recorder() as launches:
        for seed in seeds:
            results += verify.verify(problem, candidate_class, device, DTYPES[dtype], seed)
    right = all(r.right for r in results)
    print(f"{'ok   ' if right else 'WRONG'} {problem.name} {dtype} input {'x'.join(map(str, problem.input_shape))} seeds {','.join(map(str, seeds))} {time.time() - start:.1f} s")
    if not right or not args.brief:
        for result in results:
            print(result.line())
            for line in result.why:
                print(f"        {line}")
    if launches and not args.brief:
        print(f"  paths: {', '.join(dict.fromkeys(launches))}")
    return {"problem": problem.name, "dtype": dtype, "input_shape": problem.input_shape, "seeds": seeds, "right": right,
            "paths": sorted(set(launches)), "tensors": [dataclasses.asdict(r) for r in results]}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", action="append", default=[], help="a problem's name, or several with commas")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 for the fixed problems, every dtype for the small ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, help="repeat the run that printed this seed")
    parser.add_argument("--candidate", metavar="FILE", help="check this file's classes instead of model_new.py's")
    parser.add_argument("--brief", action="store_true", help="one line per problem, details only where it is wrong")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.add_argument("--doctor", action="store_true", help="print the tools and the GPU found, and what to do")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    try:
        problems = select([name for names in args.problem for name in names.split(",")])
        device = torch.device(args.device)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("--device: there is no GPU that torch can use; try --device cpu")
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        if args.doctor and not args.candidate:
            return doctor()
        candidate = load(args.candidate or "model_new.py")
    except (KeyError, ImportError, OSError, RuntimeError) as error:
        print(f"check.py: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    print(environment.header(device))
    recorder = getattr(candidate, "record_launches", NoRecorder)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    records, missing = [], []
    for problem, dtype, count in plan(problems, args.dtype, device):
        record = check(problem, dtype, [seed + i for i in range(count)], candidate, device, args, recorder)
        (missing if record is None else records).append(problem.name if record is None else record)
    if missing:
        print(f"not checked, the candidate has no class for them: {', '.join(dict.fromkeys(missing))}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": environment.describe(device), "seed": seed, "results": records}, file, indent=1, default=str)
    return summary(records, device, seed)


def summary(records, device, seed):
    if not records:
        print("check.py: the candidate has no class for any of the problems", file=sys.stderr)
        return 2
    wrong = [f"{r['problem']} {r['dtype']}" for r in records if not r["right"]]
    if device.type == "cpu":
        print(f"on the CPU: the fixed problems ran at batch {CPU_BATCH}; this proves the CPU backend, not the CUDA kernels")
    print(f"{len(records) - len(wrong)} of {len(records)} correct, seed {seed}" + (f"; WRONG: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def doctor():
    """Looks at the machine without compiling anything."""
    import os
    os.environ["CONV_TRANSPOSE3D_NO_BUILD"] = "1"
    return 0 if environment.doctor(load("model_new.py")) else 2


class NoRecorder:
    """For candidates that do not say which kernels they run."""

    def __enter__(self):
        return []

    def __exit__(self, *exception):
        return None


if __name__ == "__main__":
    sys.exit(main())
