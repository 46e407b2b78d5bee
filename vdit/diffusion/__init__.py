"""Noise processes, predictions, steps and samplers: pure functions of arrays."""
