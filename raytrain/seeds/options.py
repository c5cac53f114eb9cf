"""What a recipe and the command name of seeds. It loads without torch and NumPy."""

KERNELS: dict[str, str] = {
    "native": "raytrain.seeds.native:NativeKernel",
    "numba": "raytrain.seeds.portable:PortableKernel",
    "triton": "raytrain.seeds.gpu:TritonKernel",
    "reference": "raytrain.seeds.kernels:ReferenceKernel",
}

MOST_DIRECTIONS = 2**16 - 1
"""Of one step, in a trajectory."""
