"""What `python -m tools.plan` is made of."""
