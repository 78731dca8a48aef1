"""The Hopper convolution's index arithmetic, carried out on the host for random shapes: it needs no GPU."""

import os
import subprocess
from pathlib import Path


def test_tiles_cover_every_output_once(tmp_path):
    program = tmp_path / "tiles_emulation"
    source = Path(__file__).with_name("tiles_emulation.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program, "1000", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
