"""The machine: mesh, optimizer, checkpoints, metrics, files. Knows no model."""
