"""What `python -m tools.bench` is made of."""
