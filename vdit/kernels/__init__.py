"""Attention kernels: callables that the runtime picks and the models are given."""
