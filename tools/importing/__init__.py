"""What `python -m tools.import_weights` is made of."""
