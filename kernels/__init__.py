"""The CUDA and C++ sources of model_new.py: the one place where they are edited.

``python -m kernels`` writes them into model_new.py, between its begin and end markers, so that the file works alone.
``python -m kernels --check`` only says whether that copy is fresh.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL_NEW = FOLDER.parent / "model_new.py"

#: In the order of reading: what is included comes first.
SOURCES = (
    "geometry.h",
    "precision.h",
    "stencil.h",
    "launch.cuh",
    "group_norm.cuh",
    "add_parts.cuh",
    "ptx_sm80.cuh",
    "swizzle.h",
    "taps.h",
    "taps.cuh",
    "gemm.cuh",
    "conv_transpose3d_gemm.cu",
    "direct_generic.cuh",
    "direct_rows_generic.cuh",
    "conv_transpose3d_generic.cu",
    "sum_partials.cuh",
    "conv_transpose3d_dweight_generic.cu",
    "depthwise_tiles.h",
    "depthwise.cuh",
    "depthwise_dweight.cuh",
    "conv_transpose3d_depthwise.cu",
    "group_norm_backward.cuh",
    "relu_group_norm_generic.cu",
    "scaled_half.cuh",
    "conv_tiling.h",
    "conv_tiles.h",
    "conv_epilogue.cuh",
    "conv_statistics.cuh",
    "conv_plan.cuh",
    "sweep_direct.cuh",
    "sweep_tiles.h",
    "sweep.cuh",
    "conv_transpose3d_sweep.cu",
    "conv_transpose3d_sweep_16.cu",
    "conv_transpose3d_sweep_24.cu",
    "conv_transpose3d_forward.cuh",
    "dweight_tiles.h",
    "dweight_parts.cuh",
    "dweight.cuh",
    "dweight_taps_tiles.h",
    "conv_transpose3d_gradients.cuh",
    "tiling_sm80.h",
    "conv_epilogue_sm80.cuh",
    "conv_sm80.cuh",
    "conv_launch_sm80.cuh",
    "conv_transpose3d_sm80.cu",
    "dweight_sm80.cuh",
    "conv_transpose3d_gradients_sm80.cu",
    "ptx_sm90.cuh",
    "pipeline_sm90.cuh",
    "tiling_sm90.h",
    "conv_normalizer.cuh",
    "conv_sm90.cuh",
    "conv_launch_sm90.cuh",
    "conv_transpose3d_sm90.cu",
    "polyphase_tiles.h",
    "polyphase_sm90.cuh",
    "conv_transpose3d_polyphase_sm90.cu",
    "sweep_sm90_tiles.h",
    "sweep_sm90.cuh",
    "conv_transpose3d_sweep_sm90.cu",
    "dweight_sm90.cuh",
    "dweight_units.h",
    "dout_packer_sm90.cuh",
    "dweight_packing_sm90.cuh",
    "dweight_taps_sm90.cuh",
    "conv_transpose3d_gradients_sm90.cu",
    "cpu_backend.cpp",
)

BEGIN = "# ---- begin of the embedded copy of kernels/ (written by: python -m kernels; do not edit here)\n"
END = "# ---- end of the embedded copy of kernels/\n"


def embedded(text: str) -> str:
    """The text of model_new.py with a fresh copy of the sources between its markers."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    blocks = []
    for name in SOURCES:
        source = (FOLDER / name).read_text()
        assert "'''" not in source, f"{name} would end the string that embeds it"
        blocks.append(f"_SOURCES[{name!r}] = r'''\n{source}'''\n")
    return head + BEGIN + "\n" + "\n".join(blocks) + "\n" + END + tail
