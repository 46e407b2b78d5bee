"""XLA flags for tests, which spend most time compiling: fast to compile, slow to run."""

import jaxlib.version

# A worker has one core: splitting a module only adds work.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11):
    # Removed in later versions. Without the fusion emitters a train step compiles in a third of the
    # time; tests/test_road.py keeps them, as users do.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
