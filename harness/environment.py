"""The machine and the flags in force, for the headers of check.py and bench.py, and for --doctor."""

import os
import shutil
import subprocess

import torch

FORCED = "CONV_TRANSPOSE3D_NEW_ARCHITECTURE"    # the architecture whose kernels run (model_new.py)


def _output(*command):
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def describe(device):
    """{name: value} of everything a reader needs to repeat a measurement on ``device``."""
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        query = _output("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        facts = {
            "GPU": torch.cuda.get_device_name(device), "compute capability": "%d.%d" % torch.cuda.get_device_capability(device),
            "torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(),
            "driver, SM clock, memory clock": query,
            **({FORCED: os.environ[FORCED]} if os.environ.get(FORCED) else {}),
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32, "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def header(device):
    return "\n".join(f"# {name}: {value}" for name, value in describe(device).items())


def doctor(model_new):
    """Prints the tools and the GPU found, with the command that mends what is missing; returns whether all is there."""
    cuda = torch.cuda.is_available()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, " + (f"{torch.cuda.device_count()} GPU(s)" if cuda else "no GPU: the CPU backend serves"))
    complete = True
    for backend in ("cuda", "cpu") if cuda else ("cpu",):
        for tool, (found, remedy) in model_new.toolchain(backend).items():
            print(f"{backend:5} {tool:6} {found}" if found else f"{backend:5} {tool:6} MISSING; mend it with: {remedy}")
            complete &= bool(found)
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        supported = major >= 8
        print(f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}" + ("" if supported else ": MISSING; 8.0 or higher is needed"))
        complete &= supported
    root = model_new.toolchain("cuda")["nvcc"][0] if cuda else None
    if root:
        version = (_output(f"{root}/bin/nvcc", "--version") or "").split("release ")[-1].split(",")[0]
        agrees = version.split(".")[0] == str(torch.version.cuda).split(".")[0]
        print(f"nvcc {version}" + ("" if agrees else f": MISSING; torch was built for CUDA {torch.version.cuda}, nvcc's major version must agree: set CUDA_HOME"))
        complete &= agrees
    return complete
