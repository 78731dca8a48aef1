"""The kernels' index arithmetic, carried out on the host for random shapes, and kernels that run there: it needs no GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS, EMULATION = Path(__file__).parents[1] / "kernels", Path(__file__).parent / "emulation"


@pytest.mark.parametrize("name, shapes", [("tiles", 1000), ("taps", 1500)])
def test_every_element_is_written_once_and_right(name, shapes, tmp_path):
    program, source = tmp_path / name, EMULATION / f"{name}.cpp"
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    done = subprocess.run([program, str(shapes), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name, count", [("conv_sm90", 40), ("conv_sm80", 40), ("gemm", 60), ("depthwise", 40), ("sweep", 60), ("sweep_sm90", 80), ("polyphase_sm90", 120), ("dweight", 1500), ("group_norm", 60), ("generic", 100)])
def test_kernels_run_on_the_host(name, count, tmp_path):
    """The kernels themselves, but for what host_cuda/ has in place of CUDA's headers and of PTX instructions: in random order, copies and products as late as they may be."""
    for path in KERNELS.iterdir():
        if path.suffix in (".h", ".cuh", ".cu"):
            (tmp_path / path.name).write_text(re.sub(r"extern __shared__ __align__\(\d+\) uint8_t (\w+)\[\];", r"uint8_t* const \1 = fibers::shared_memory;", path.read_text()))
    for path in [*EMULATION.glob("*.h"), *(EMULATION / "host_cuda").iterdir()]:
        shutil.copy(path, tmp_path)
    program = tmp_path / name
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-w"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, "-I", tmp_path, "-o", program, EMULATION / f"{name}.cpp"], check=True)
    done = subprocess.run([program, str(count), "1"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
