"""bench.py's parts that need no long measurement: the competitors are right, the arithmetic of the table, the reports."""

import dataclasses
import json

import pytest
import torch

import bench
from harness import peers, report, timing
from reference import PROBLEMS

SMALL = {p.name: dataclasses.replace(p, input_shape=(1, p.input_shape[1], 3, 4, 5)) for p in PROBLEMS}


@pytest.mark.parametrize("peer", [p for p in peers.PEERS if not p.compiled], ids=lambda p: p.name)
@pytest.mark.parametrize("problem", SMALL.values(), ids=lambda p: p.name)
def test_peers_compute_the_problem(peer, problem, monkeypatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MIN_CALLS", 1)
    if peer.applies(problem):
        times = peers.time_problem(peer, problem, torch.device("cpu"), seed=1)
        assert max(times["errors"].values()) < 1e-4


@pytest.mark.parametrize("problem", [p for p in SMALL.values() if p.model == "fused"], ids=lambda p: p.name)
def test_the_flipped_rewrite_is_the_same_function(problem):
    peer = next(p for p in peers.PEERS if p.rewrite == "flipped")
    model, rewritten = peers.build(dataclasses.replace(peer, compiled=False), problem, torch.device("cpu"), 1)
    x = torch.randn(problem.input_shape)
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-4, atol=1e-4)


def test_work_of_the_fixed_problems():
    work = {p.name: timing.work(p)["forward"] for p in PROBLEMS}
    assert round(work["fused"]["flop"] / 1e9) == 232
    assert round(work["dense"]["flop"] / 1e9) == 56    # of 58: padding crops some
    assert work["dense"]["flop"] == 4 * work["grouped"]["flop"]
    assert work["dense"]["bytes"] == 4 * 4 * 32 * (32 * 64 * 128 + 63 * 127 * 255)


def fake_results(factor=1.0):
    def times(ms):
        return {measure: {"ms": ms, "p20": ms, "p80": ms} for measure in report.MEASURES} | {"peak_memory_gib": 1.0, "errors": {"output": 1e-7}}

    return {"fused": {"ours": times(1.0 * factor), "eager": times(4.0), "compile": times(2.0)}}


def test_the_table():
    limits = {"copy_bytes_per_s": 4.3e12, "fp16_flop_per_s": 790e12}
    rows = report.rows([PROBLEMS[0]], fake_results(), limits)
    assert rows[0]["x eager"] == 4 and rows[0]["x best"] == 2 and rows[0]["best of PyTorch"] == ("compile", 2.0)
    assert 29 < rows[0]["% of floor"] < 30
    assert "x best 2.00" in report.geometric_means(rows)
    too_fast = report.rows([PROBLEMS[0]], fake_results(0.01), limits)
    assert "BELOW THE FLOOR" in report.markdown(too_fast)


def test_compare(tmp_path, capsys):
    paths = []
    for name, factor in (("a", 1.0), ("b", 0.5)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"results": fake_results(factor)}))
    assert bench.main(["--compare", *map(str, paths)]) == 0
    assert "| fused | forward | 1.000 | 0.500 | 2.00 |" in capsys.readouterr().out


def test_update_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(readme, "new")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(RuntimeError, match="lacks the lines"):
        report.update_readme(readme, "new")


def test_no_such_problem(capsys):
    assert bench.main(["--problem", "nothing"]) == 2
    assert "no such problem" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_work_on_another_stream_is_noticed():
    stream, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")

    def cheat(_):
        with torch.cuda.stream(stream):
            for _ in range(20):
                a @ a

    with pytest.raises(RuntimeError, match="another stream"):
        timing.measure(cheat, lambda: None, torch.device("cuda", 0))


def test_tables_of_earlier_runs_in_one(tmp_path, capsys):
    times = {"ms": 1.0, "p20": 0.9, "p80": 1.1}
    entry = {"forward": times, "forward_recording": times, "forward_backward": times, "peak_memory_gib": 0.0, "errors": {"output": 0.0}}
    for name in ("fused", "dense"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": {"GPU": "some"}, "ceilings": None, "results": {name: {"ours": entry, "eager": entry}}}))
    assert bench.main(["--tables", str(tmp_path / "dense.json"), str(tmp_path / "fused.json")]) == 0
    out = capsys.readouterr().out
    assert out.index("| fused | forward |") < out.index("| dense | forward |")


def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path, monkeypatch):
    def run_peer(peer, problems, device, seed):
        if peer.name != "ours":
            raise KeyboardInterrupt
        return {"fused": fake_results()["fused"]["ours"] | {"paths": ["a", "b"]}}

    monkeypatch.setattr(bench, "run_peer", run_peer)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        bench.run_all([PROBLEMS[0]], torch.device("cpu"), False, ["eager"], lambda results: bench.save(path, results, None, {}))
    _, results, _, _ = bench.load([path])
    assert list(results["fused"]) == ["ours"]


def test_chosen_competitors(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "run_peer", lambda peer, *rest: asked.append(peer.name) or {})
    bench.run_all([PROBLEMS[0]], torch.device("cuda"), True, ["eager", "channels_last"], lambda results: None)
    assert asked == ["ours", "eager", "channels_last"]


def test_shapes_of_ones_own(tmp_path, monkeypatch, capsys):
    plain, fused = bench.problem_of("2,320,8,8,8 256 1,2,2 stride=1,2,2 groups=2"), bench.problem_of("2,64,8,8,8 32 3 padding=1 norm=8")
    assert plain.model == "plain" and plain.input_shape == (2, 320, 8, 8, 8) and plain.init == {"in_channels": 320, "out_channels": 256, "kernel_size": (1, 2, 2), "stride": (1, 2, 2), "groups": 2}
    assert fused.model == "fused" and fused.init["groups"] == 8 and "norm" not in fused.init
    path = tmp_path / "shapes.json"
    bench.save(path, {fused.name: {}, "dense": {}}, None, {})
    problems, results, _, _ = bench.load([path])
    assert [p.name for p in problems] == ["dense", fused.name] and problems[1] == fused
    for wrong in ("2,8,4,4,4 8", "2,8,4,4,4 8 2 strid=2", "2,8,4,4,4 8 2 stride=x", "8 8 2"):
        assert bench.main(["--device", "cpu", "--shape", wrong]) == 2
        assert f"got '{wrong}'" in capsys.readouterr().err
    assert bench.main(["--device", "cpu", "--shape", plain.name, "--update-readme"]) == 2
