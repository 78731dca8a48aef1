"""The tensor-core kernels' index arithmetic, carried out on the host for random shapes: it needs no GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.mark.parametrize("name, shapes", [("tiles_emulation", 1000), ("dweight_emulation", 1500), ("taps_emulation", 1500)])
def test_every_element_is_written_once_and_right(name, shapes, tmp_path):
    program, source = tmp_path / name, Path(__file__).with_name(f"{name}.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program, str(shapes), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout


def test_products_of_matrices_run_on_the_host(tmp_path):
    """The kernels themselves, but for what host_cuda/ has in place of CUDA."""
    for path in [*(KERNELS / name for name in ("geometry.h", "taps.h", "precision.h", "taps.cuh", "gemm.cuh", "conv_transpose3d_gemm.cu")), *Path(__file__).with_name("host_cuda").iterdir()]:
        shutil.copy(path, tmp_path)
    program, source = tmp_path / "gemm_emulation", Path(__file__).with_name("gemm_emulation.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-I", tmp_path, "-o", program, source], check=True)
    done = subprocess.run([program, "60", "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
