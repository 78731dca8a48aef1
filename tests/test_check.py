"""check.py: its exit codes, and that deliberately wrong candidates fail it with the right explanation."""

import json
from pathlib import Path

import pytest
import torch

import check

WRONG = sorted((Path(__file__).parent / "wrong").glob("*.py"))


@pytest.mark.parametrize("path", WRONG, ids=lambda p: p.stem)
def test_wrong_candidates_fail(path, capsys):
    candidate = check.load(str(path))
    if getattr(candidate, "NEEDS_GPU", False) and not torch.cuda.is_available():
        pytest.skip("no GPU")
    code = check.main(["--candidate", str(path), "--problem", candidate.PROBLEM, "--dtype", "float32"])
    output = capsys.readouterr().out
    assert code == 1, output
    assert candidate.EXPECT in output, output


def test_a_right_candidate_is_right(tmp_path, capsys):
    path = tmp_path / "right.py"
    path.write_text("from reference import Model as ModelNew, ConvTranspose3dModel as ConvTranspose3dNew\n")
    assert check.main(["--candidate", str(path), "--problem", "odd,fused_odd"]) == 0


def test_no_such_problem(capsys):
    assert check.main(["--problem", "nothing"]) == 2
    assert "no such problem: nothing" in capsys.readouterr().err


def test_no_such_candidate(capsys):
    assert check.main(["--candidate", "/nowhere/candidate.py"]) == 2
    assert "candidate" in capsys.readouterr().err


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert check.main(["--device", "cuda"]) == 2


def test_json_and_seed(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert check.main(["--problem", "fused_odd", "--dtype", "float32", "--seed", "5", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["seed"] == 5 and record["results"][0]["right"] and record["results"][0]["paths"]


def test_doctor(capsys):
    assert check.main(["--doctor"]) in (0, 2)
    assert "g++" in capsys.readouterr().out
