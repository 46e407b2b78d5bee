"""The parts of `python -m tools.plan`."""
