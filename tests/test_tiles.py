"""The tensor-core kernels' index arithmetic, carried out on the host for random shapes: it needs no GPU."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("name, shapes", [("tiles_emulation", 1000), ("dweight_emulation", 1500), ("taps_emulation", 1500)])
def test_every_element_is_written_once_and_right(name, shapes, tmp_path):
    program, source = tmp_path / name, Path(__file__).with_name(f"{name}.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program, str(shapes), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
