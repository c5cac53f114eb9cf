"""Names of the noise kernels, and limits that recipes check. It loads without torch and NumPy."""

KERNELS: dict[str, str] = {
    "native": "raytrain.seeds.kernels.native:NativeKernel",
    "numba": "raytrain.seeds.kernels.numba_cpu:NumbaKernel",
    "triton": "raytrain.seeds.kernels.triton_gpu:TritonKernel",
    "reference": "raytrain.seeds.kernels.reference:ReferenceKernel",
}

MAX_DIRECTIONS = 2**16 - 1
"""Directions per step that a trajectory can store."""
