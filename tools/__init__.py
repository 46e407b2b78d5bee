"""Commands beside the main one: checkpoints, benchmarks."""
