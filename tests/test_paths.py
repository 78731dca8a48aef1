"""What the table of paths in model_new.py and the plans of the kernels both have to know is the same: it needs no GPU."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import pytest

import model_new


@pytest.fixture(scope="module")
def precision(tmp_path_factory):
    """kernels/precision.h, and what else both have to know, as a library."""
    folder = tmp_path_factory.mktemp("precision")
    headers = Path(__file__).parents[1] / "kernels"
    (folder / "precision.cpp").write_text(f"""#include "{headers / "precision.h"}"
        #include "{headers / "taps.h"}"
        extern "C" int64_t single_taps(const Geometry* g) {{ return taps::has_single_taps(*g); }}
        extern "C" int64_t terms(const Geometry* g) {{ return terms_of(*g); }}
        extern "C" int64_t tf32(const Geometry* g) {{ return has_tf32(*g); }}
        extern "C" int64_t in_float32(const Geometry* g) {{ return forward_in_float32(*g); }}
        extern "C" int64_t most_split_terms() {{ return kMostSplitTerms; }}""")
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-shared", "-fPIC", "-o", folder / "precision.so", folder / "precision.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "precision.so"))
    library.terms.restype = library.most_split_terms.restype = ctypes.c_int64
    return library


def test_rules_agree(precision):
    assert precision.most_split_terms() == model_new._MOST_SPLIT_TERMS
    for strides, kernels, dilations, (C_in, C_out, groups) in itertools.product(
            itertools.product((1, 2, 3, 4), repeat=3), ((1, 2, 2), (2, 2, 2), (3, 4, 5), (1, 1, 1)), ((1, 1, 1), (2, 1, 1), (1, 2, 3), (4, 4, 2)), ((24, 64, 1), (24, 64, 4), (4, 63, 1), (64, 8, 1), (64, 64, 2))):
        geometry, _ = model_new._geometry((2 if strides[0] < 3 else 40, C_in, 9, 9, 9), (C_in, C_out // groups, *kernels), strides, (0, 0, 0), (0, 0, 0), groups, dilations)
        address = ctypes.c_void_p(ctypes.addressof(geometry))
        assert precision.terms(address) == model_new._terms(geometry)
        assert bool(precision.tf32(address)) == model_new._has_tf32(geometry)
        assert bool(precision.in_float32(address)) == model_new._forward_in_float32(geometry)


def test_single_taps_agree(precision):
    found = 0
    for (kernel, stride), padding, dilation, added in itertools.product(((1, 1), (2, 2), (3, 3), (2, 1), (1, 2)), (0, 1), (1, 2, 3), (0, 1, 2)):
        if added >= max(stride, dilation):
            continue
        geometry, _ = model_new._geometry((2, 8, 9, 9, 9), (8, 8, kernel, 1, 1), (stride, 1, 1), (padding, 0, 0), (added, 0, 0), 1, (dilation, 1, 1))
        assert bool(precision.single_taps(ctypes.c_void_p(ctypes.addressof(geometry)))) == model_new._has_single_taps(geometry)
        found += model_new._has_single_taps(geometry)
        assert not model_new._has_single_taps(geometry) or (kernel == stride and padding == added == 0 and dilation * (kernel - 1) == kernel - 1)
    assert found == 5    # kernels of 1 with any dilation, of 2 and 3 without
