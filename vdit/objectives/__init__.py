"""What is trained: each objective is an `init` and a `loss`."""
