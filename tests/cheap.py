"""XLA's flags for tests, where compilation is most of the time: cheap to compile, slow to run."""

import jaxlib.version

# One core compiles: a module in parts is only more work.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11):
    # Later ones have no such flag. Without its emitters a train step compiles in a third of the
    # time; tests/test_road.py has them, as users do.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
