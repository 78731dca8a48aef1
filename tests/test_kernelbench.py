"""The conditions under which KernelBench's harness takes reference.py and model_new.py unchanged, as far as can be tested without it."""

import ast
import re
from pathlib import Path

import torch

import model_new
import reference

SOURCE = Path(model_new.__file__).read_text()
REFERENCE = Path(reference.__file__).read_text()
CODE = re.sub(r"(#|//).*", "", SOURCE)    # what its static checker leaves of the text


def test_static_conditions():
    assert not re.search(r"\btry\s*:", CODE) and not re.search(r"\bexcept\b", CODE)
    assert not re.search(r"\bpass\b", CODE)
    assert not re.search(r"^\s*(import|from)\s+(threading|multiprocessing)", CODE, re.M)
    assert "__global__" in CODE and "load_inline" in CODE
    assert "from __future__" not in CODE


def test_no_message_names_a_lock():
    messages = [node.value for node in ast.walk(ast.parse(SOURCE.split("_SOURCES = {}")[0])) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    raised = [m for m in messages if "expected" in m or "cannot" in m or "error" in m]
    assert raised and not any(re.search(r"\block\b", m) for m in raised)


def test_no_global_of_the_reference_is_changed():
    before, shared = {}, {}
    exec(REFERENCE, before)
    exec(REFERENCE, shared)
    exec("import torch\nimport os\n" + SOURCE, shared)
    for name in before.keys() - {"__builtins__", "torch", "nn"}:
        assert re.sub(r" at 0x\w+", "", repr(shared[name])) == re.sub(r" at 0x\w+", "", repr(before[name])), name
    assert {"Model", "get_inputs", "get_init_inputs"} <= set(shared)


def test_as_the_harness_runs_it():
    context = {}
    exec(REFERENCE, context)
    context.update(batch_size=1, D=4, H=4, W=4)    # smaller, for the CPU
    init, Model = context["get_init_inputs"](), context["Model"]
    torch.manual_seed(42)
    model = Model(*init)
    exec("import torch\nimport os\n" + SOURCE, context)
    torch.manual_seed(42)
    model_new_instance = context["ModelNew"](*init)
    for _ in range(5):
        inputs = context["get_inputs"]()
        assert torch.allclose(model_new_instance(*inputs), model(*inputs), atol=1e-4, rtol=1e-4)
