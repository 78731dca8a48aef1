"""The embedded copy, the compilation for every architecture, the build of model_new.py away from the checkout."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kernels
import model_new

ROOT = Path(model_new.__file__).parent
USE = "import torch, model_new; print(model_new.ModelNew(2, 4, 3, 2)(torch.rand(1, 2, 2, 2, 2)).shape)"


def python(folder, code, cache, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **environment})


def test_the_embedded_copy_is_fresh():
    text = kernels.MODEL_NEW.read_text()
    assert kernels.embedded(text) == text, "run: python -m kernels"


def test_every_source_is_listed():
    found = {p.name for p in kernels.FOLDER.iterdir() if p.suffix in (".h", ".cuh", ".cu", ".cpp")}
    assert found == set(kernels.SOURCES)


NVCC = (model_new._cuda_root() or "") + "/bin/nvcc"


def architectures_of(source):
    """The gradients' sources have the convolution too, which is most of what there is to compile."""
    if source.endswith("_sm90.cu"):
        return ["90a"]
    return ["80", "89", "100", "120"] if source.endswith("gradients_sm80.cu") else ["80"] if source.endswith("_sm80.cu") else ["80", "90a"]


@pytest.mark.skipif(not os.path.exists(NVCC), reason="no nvcc")
@pytest.mark.parametrize("source, architecture", [(name, a) for name in kernels.SOURCES if name.endswith(".cu") for a in architectures_of(name)])
def test_compiles_without_warnings(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-O1", "--split-compile=0", "-c", str(kernels.FOLDER / source), "-o", str(tmp_path / "out.o"), f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
               "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stdout + done.stderr    # ptxas then waits for each wgmma by itself


def test_the_cpu_backend_compiles_without_warnings(tmp_path):
    done = subprocess.run(["g++", "-std=c++17", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", str(tmp_path / "out.so"), str(kernels.FOLDER / "cpu_backend.cpp")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_alone_in_an_empty_folder_and_two_at_once(tmp_path):
    shutil.copy(ROOT / "model_new.py", tmp_path)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": "cache"}    # relative, as an evaluation harness may set it
    runs = [subprocess.Popen([sys.executable, "-c", USE], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert all("torch.Size([1, 4, 4, 4, 4])" in out for out, _ in outputs), outputs
    libraries = list((tmp_path / "cache").rglob("*.so"))
    assert libraries and all(library.parent.name == "conv_transpose3d_new" for library in libraries), libraries
    warm = python(tmp_path, USE, "cache")
    assert warm.returncode == 0 and warm.stderr == "", warm.stderr


def test_a_killed_build_does_not_hang_the_next_import(tmp_path):
    shutil.copy(ROOT / "model_new.py", tmp_path)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    killed = subprocess.Popen([sys.executable, "-c", "import model_new"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "compiling" in killed.stderr.readline()
    time.sleep(0.7)    # inside the compilation
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architectures, paths", [(["90a"], {"sm90"}), (["80", "120"], {"sm80"}), (["80", "90a"], {"sm80", "sm90"})])
def test_a_library_has_the_paths_of_its_architectures(architectures, paths, monkeypatch):
    monkeypatch.setattr(model_new, "_architectures", lambda: architectures)
    source = model_new._source("cuda")
    assert {path for path in ("sm80", "sm90") if f"LAUNCHERS({path}," in source} == paths
    assert "conv_transpose3d_forward_generic" in source


def test_a_forced_architecture_must_be_known(monkeypatch):
    monkeypatch.setenv("CONV_TRANSPOSE3D_NEW_ARCHITECTURE", "75")
    model_new._forced_capability.cache_clear()
    try:
        with pytest.raises(ImportError, match="CONV_TRANSPOSE3D_NEW_ARCHITECTURE: expected one of 80, .*, got '75'"):
            model_new._forced_capability()
        monkeypatch.setenv("CONV_TRANSPOSE3D_NEW_ARCHITECTURE", "120")
        assert model_new._forced_capability() == (12, 0)
    finally:
        model_new._forced_capability.cache_clear()


def test_what_is_missing_is_named(tmp_path):
    shutil.copy(ROOT / "model_new.py", tmp_path)
    done = python(tmp_path, "import model_new", tmp_path / "cache", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "g++ was not found" in done.stderr and "apt-get install g++" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_architectures_are_the_gpus():
    major, minor = torch.cuda.get_device_capability(0)
    assert any(a.rstrip("a") == f"{major}{minor}" for a in model_new._architectures())


def test_every_kernel_waits_for_the_one_before_it():
    """A kernel may be launched while the one before it still runs (kernels/launch.cuh), and none is launched in another way."""
    sources = {name: text for name, text in model_new._SOURCES.items() if name.endswith((".cu", ".cuh"))}
    bodies = [body for text in sources.values() for body in re.findall(r"^(?:template <[^\n]*> )?__global__ [^{]*\{\n(.*?)^\}", text, flags=re.M | re.S)]
    assert len(bodies) == sum(len(re.findall(r"^[^/\n]*__global__ ", text, flags=re.M)) for text in sources.values())
    waits = re.compile(r"wait_(for_previous|before_next)_kernel\(\);|wait_for_end_of_previous_kernel\(\);\n$")    # the last: at its own end
    assert all(waits.search(body) for body in bodies)
    assert not any("<<<" in re.sub("//.*", "", text) for text in sources.values())
