"""The parts of `python -m tools.import_weights`, by the kind of its source."""
