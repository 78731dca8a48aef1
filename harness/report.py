"""bench.py's output: the table, the comparison of two runs, the plot, the README's copy."""

import math
import re
from pathlib import Path

from harness import timing

COLUMNS = ("problem", "pass", "ms", "p20-p80", "eager ms", "x eager", "best of PyTorch", "x best", "TFLOP/s", "GB/s", "% of floor")
MEASURES = {"forward": "forward", "forward_recording": "forward, recording", "forward_backward": "forward+backward"}
BEGIN, END = "<!-- bench: begin (written by python bench.py --update-readme) -->", "<!-- bench: end -->"


def _amount(problem, measure):
    work = timing.work(problem)
    if measure != "forward_backward":
        return [work["forward"]]
    return [work["forward"], work["backward"]]


def rows(problems, results, limits):
    """One row per problem and measure: dicts keyed by COLUMNS (numbers as numbers, None where unknown)."""
    table = []
    for problem in problems:
        times = results[problem.name]
        for measure, label in MEASURES.items():
            ours = times["ours"][measure]
            peers = {name: t[measure]["ms"] for name, t in times.items() if name != "ours"}
            best = min(peers, key=peers.get) if peers else None
            amounts = _amount(problem, measure)
            floor = sum(timing.floor_ms(a, limits) for a in amounts) if limits else None
            table.append({
                "problem": problem.name, "pass": label, "ms": ours["ms"], "p20-p80": (ours["p20"], ours["p80"]),
                "eager ms": peers.get("eager"), "x eager": peers["eager"] / ours["ms"] if "eager" in peers else None,
                "best of PyTorch": (best, peers[best]) if best else None, "x best": peers[best] / ours["ms"] if best else None,
                "TFLOP/s": sum(a["flop"] for a in amounts) / ours["ms"] / 1e9, "GB/s": sum(a["bytes"] for a in amounts) / ours["ms"] / 1e6,
                "% of floor": 100 * floor / ours["ms"] if floor else None,
            })
            if floor and ours["ms"] < floor:
                table[-1]["problem"] += " (BELOW THE FLOOR: an error of measurement)"
    return table


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, tuple) and isinstance(value[0], str):
        return f"{value[1]:.3f} ({value[0]})"
    if isinstance(value, tuple):
        return f"{value[0]:.3f}-{value[1]:.3f}"
    return value if isinstance(value, str) else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def markdown(table):
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |" for row in table]
    return "\n".join(lines)


def geometric_means(table):
    """A line with the geometric mean of each speed-up over all problems, per measure."""
    parts = []
    for label in MEASURES.values():
        for column in ("x eager", "x best"):
            factors = [row[column] for row in table if row["pass"] == label and row[column]]
            if factors:
                parts.append(f"{label} {column} {math.exp(sum(map(math.log, factors)) / len(factors)):.2f}")
    return "geometric means: " + ", ".join(parts)


def peers_table(problems, results):
    """Every competitor's median, forward and forward+backward, in milliseconds, and peak memory of the latter."""
    lines = ["| problem | peer | forward | forward+backward | peak GiB | largest error |", "| --- | --- | --- | --- | --- | --- |"]
    for problem in problems:
        for name, t in results[problem.name].items():
            lines.append(f"| {problem.name} | {name} | {t['forward']['ms']:.3f} | {t['forward_backward']['ms']:.3f} | {t['peak_memory_gib']:.2f} | {max(t['errors'].values()):.1e} |")
    return "\n".join(lines)


def compare(a, b):
    """The ratio of two runs' times (files of --json), a line per problem and measure; above 1, the second is faster."""
    lines = ["| problem | pass | first ms | second ms | first / second |", "| --- | --- | --- | --- | --- |"]
    for problem, times in a["results"].items():
        for measure, label in MEASURES.items():
            if problem in b["results"]:
                old, new = times["ours"][measure]["ms"], b["results"][problem]["ours"][measure]["ms"]
                lines.append(f"| {problem} | {label} | {old:.3f} | {new:.3f} | {old / new:.2f} |")
    return "\n".join(lines)


def plot(path, problems, results):
    """Bars of every competitor's forward and forward+backward."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(problems), figsize=(5 * len(problems), 8), squeeze=False)
    for column, problem in enumerate(problems):
        for row, measure in enumerate(("forward", "forward_backward")):
            times = {name: t[measure]["ms"] for name, t in results[problem.name].items()}
            axes[row][column].barh(list(times), list(times.values()), color=["C1" if name == "ours" else "C0" for name in times])
            axes[row][column].set_title(f"{problem.name}, {MEASURES[measure]} (ms)")
            axes[row][column].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def update_readme(path, text):
    readme = Path(path).read_text()
    if BEGIN not in readme or END not in readme:
        raise RuntimeError(f"--update-readme: {path} lacks the lines {BEGIN} and {END}")
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.S)
    Path(path).write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", readme))
