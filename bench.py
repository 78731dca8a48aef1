#!/usr/bin/env python3
"""Times model_new.py against PyTorch on the fixed problems of reference.py, after verifying what it times.

    python bench.py                      every problem against every competitor (slow: torch.compile tunes)
    python bench.py --quick              without the compiled competitors
    python bench.py --peer eager         against this one only (may be given several times)
    python bench.py --problem fused      one problem (several with commas)
    python bench.py --shape "2,320,8,8,8 256 3 stride=2 padding=1 output_padding=1"    a shape of yours (may be given several times)
    python bench.py --compare A.json B.json
    python bench.py --tables A.json B.json    the tables of earlier runs, of some problems each, in one

Each competitor runs in a process of its own, cudnn.benchmark set before its first call; ours runs first and again last,
and the two must agree. Times are medians of CUDA events with a cold L2. "% of floor" is the time that the measured copy
bandwidth and fp16 matrix rate of this GPU leave at the least, over ours. On a machine without a GPU the CPU backend is
timed, at batch 1: that says whether it works, not how fast the kernels are.

Exit code: 0 measured, 1 a timed result was wrong, 2 cannot run.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys

import torch

import reference
from harness import environment, peers, report, timing

WRONG = 5e-2    # relative error of a timed tensor beyond which no precision flag explains it
DRIFT = 0.1     # relative difference of our own two timings that is worth a warning


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", action="append", default=[], help="a problem's name, or several with commas")
    parser.add_argument("--shape", action="append", default=[], metavar="SHAPE", help="instead of the fixed problems, or beside those of --problem: input shape, output channels, kernel size, name=value of ConvTranspose3d's others; "
                        "norm=8: with ReLU and GroupNorm of 8 groups; three numbers with commas for the axes")
    parser.add_argument("--quick", action="store_true", help="leave out the competitors that compile")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", choices=[p.name for p in peers.PEERS if not p.ours], help="only this competitor, or these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="compare two files of --json; nothing is run")
    parser.add_argument("--tables", nargs="+", metavar="FILE.json", help="the tables of files of --json; nothing is run")
    parser.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    parser.add_argument("--update-readme", action="store_true", help="write the table into README.md")
    return parser.parse_args(arguments)


def select(names):
    problems = {p.name: p for p in reference.PROBLEMS}
    unknown = [name for name in names if name not in problems]
    if unknown:
        raise KeyError(f"--problem: no such problem: {', '.join(unknown)}; there are {', '.join(problems)}")
    return [problems[name] for name in names] if names else list(problems.values())


def problem_of(text):
    """The problem that an argument of --shape describes."""
    def numbers(word):
        values = tuple(int(number) for number in word.split(","))
        return values[0] if len(values) == 1 else values

    try:
        shape, out_channels, kernel_size, *others = text.split()
        shape, keywords = numbers(shape), {name: numbers(value) for name, value in (word.split("=") for word in others)}
        init = {"in_channels": shape[-4], "out_channels": int(out_channels), "kernel_size": numbers(kernel_size), **keywords}
        norm = init.pop("norm", None)
        if norm:
            init["groups"] = norm
        problem = reference.Problem(text, "fused" if norm else "plain", shape, init)
        problem.reference_class(**init)
    except (IndexError, TypeError, ValueError) as error:
        raise RuntimeError(f"--shape: expected an input shape, output channels, a kernel size and name=value, as in '2,320,8,8,8 256 3 stride=2 padding=1', got '{text}': {error}")
    return problem


def run_peer(peer, problems, device, seed):
    """{problem name: times} of one competitor, from its own process; what failed is said and left out."""
    command = [sys.executable, "-m", "harness.peers", peer.name, json.dumps([dataclasses.asdict(p) for p in problems]), str(device), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{peer.name}: failed after {len(lines)} of its problems: {last}", file=sys.stderr)
        if peer.ours:
            raise RuntimeError(done.stderr)
    return {line.pop("problem"): line for line in lines}


def run_all(problems, device, quick, names, save):
    """(results {problem: {peer: times}}, names of wrong results); ``save`` is called with the results so far."""
    seed = random.SystemRandom().randrange(2**31)
    results, wrong = {p.name: {} for p in problems}, []
    chosen = [p for p in peers.PEERS if not (quick and p.slow) and (p.ours or not names or p.name in names)]
    if device.type == "cpu":
        chosen = [p for p in chosen if p.name in ("ours", "eager")]
    for peer in chosen:
        print(f"# timing: {peer.name}", file=sys.stderr, flush=True)
        for name, times in run_peer(peer, problems, device, seed).items():
            if peer.ours:
                print(f"# {name}: {', '.join(times['paths'])}")
            bad = {tensor: error for tensor, error in times["errors"].items() if not error <= WRONG}
            if bad:
                wrong.append(f"{peer.name} on {name}: relative errors {bad}")
                continue
            results[name][peer.name] = times
        save(results)
    if device.type == "cuda" and not quick:
        for name, times in run_peer(peers.PEERS[0], problems, device, seed).items():
            first, last = (t["forward_backward"]["ms"] for t in (results[name]["ours"], times))
            if abs(first - last) > DRIFT * first:
                print(f"WARNING: {name}: ours took {first:.3f} ms at first and {last:.3f} ms in the end; the machine is not steady")
    return results, wrong


def main(arguments=None):
    args = parse(arguments)
    try:
        if args.compare:
            print(report.compare(*(json.load(open(path)) for path in args.compare)))
            return 0
        if args.tables:
            publish(args, *load(args.tables))
            return 0
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device: there is no GPU that torch can use; try --device cpu")
        if args.plot:
            import matplotlib  # noqa: F401  (before the measurements, not after them)
        names = [name for names in args.problem for name in names.split(",")]
        problems = [problem_of(text) for text in args.shape] + (select(names) if names or not args.shape else [])
        if args.shape and args.update_readme:
            raise RuntimeError("--update-readme: README.md's table is of the fixed problems, without --shape")
        if device.type == "cpu":
            problems = [dataclasses.replace(p, input_shape=(1, *p.input_shape[1:])) for p in problems]
        print(environment.header(device))
        limits = timing.ceilings(device) if device.type == "cuda" else None
        if limits:
            print(f"# ceilings: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), fp16 product {limits['fp16_flop_per_s'] / 1e12:.0f} TFLOP/s")
            torch.cuda.empty_cache()
        described = environment.describe(device)
        results, wrong = run_all(problems, device, args.quick, args.peer, lambda results: save(args.json, results, limits, described))
    except ModuleNotFoundError as error:
        print(f"bench.py: {error}; --plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (KeyError, OSError, RuntimeError) as error:
        print(f"bench.py: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    if wrong:
        print("WRONG: " + "\nWRONG: ".join(wrong))
    if any("ours" not in times for times in results.values()):
        return 1
    publish(args, problems, results, limits, described)
    return 1 if wrong else 0


def load(paths):
    """publish's arguments from files of --json: where two have the same problem, the later one's results."""
    runs = [json.load(open(path)) for path in paths]
    results = {name: times for run in runs for name, times in run["results"].items()}
    fixed = [p for p in reference.PROBLEMS if p.name in results]
    names = {p.name for p in fixed}
    return fixed + [problem_of(name) for name in results if name not in names], results, runs[0]["ceilings"], runs[0]["environment"]


def save(path, results, limits, described):
    """Writes the results so far, so that a run that is stopped has not been in vain."""
    if path:
        with open(path, "w") as file:
            json.dump({"environment": described, "ceilings": limits, "results": results}, file, indent=1, default=str)


def publish(args, problems, results, limits, described):
    table = report.rows(problems, results, limits)
    text = report.markdown(table) + "\n\n" + report.geometric_means(table)
    print(text + "\n\n" + report.peers_table(problems, results))
    if limits is None:
        print("\nThis is the CPU backend at batch 1, beside torch's: it shows that the package works here. The kernels' speed needs a GPU.")
    save(args.json, results, limits, described)
    if args.plot:
        report.plot(args.plot, problems, results)
    if args.update_readme:
        report.update_readme("README.md", "\n".join(f"{name}: {value}  " for name, value in described.items()) + "\n\n" + text)


if __name__ == "__main__":
    sys.exit(main())
