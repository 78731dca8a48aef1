"""The kernels' index arithmetic, carried out on the host for random shapes, and kernels that run there: it needs no GPU."""

import os
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.mark.parametrize("name, shapes", [("tiles_emulation", 1000), ("taps_emulation", 1500)])
def test_every_element_is_written_once_and_right(name, shapes, tmp_path):
    program, source = tmp_path / name, Path(__file__).with_name(f"{name}.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program, str(shapes), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name, layers, sources", [
    ("gemm_emulation", 60, ("taps.cuh", "gemm.cuh", "conv_transpose3d_gemm.cu", "precision.h")),
    ("depthwise_emulation", 40, ("depthwise_tiles.h", "depthwise.cuh", "sum_partials.cuh", "depthwise_dweight.cuh", "conv_transpose3d_depthwise.cu")),
    ("dweight_emulation", 1500, ("stencil.h", "conv_tiling.h", "dweight_tiles.h", "dweight_units.h", "dweight_parts.cuh")),
    ("group_norm_emulation", 60, ("group_norm.cuh", "group_norm_backward.cuh", "relu_group_norm_generic.cu"))])
def test_kernels_run_on_the_host(name, layers, sources, tmp_path):
    """The kernels themselves, but for what host_cuda/ has in place of CUDA."""
    tests = Path(__file__).parent
    for path in [*(KERNELS / source for source in ("geometry.h", "taps.h", *sources)), tests / "emulated_layer.h", *(tests / "host_cuda").iterdir()]:
        (tmp_path / path.name).write_text(path.read_text().replace("extern __shared__", "extern"))    # here: the one that a program defines
    program = tmp_path / name
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-I", tmp_path, "-o", program, tests / f"{name}.cpp"], check=True)
    done = subprocess.run([program, str(layers), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
