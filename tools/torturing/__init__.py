"""The parts of `python -m tools.torture`."""
