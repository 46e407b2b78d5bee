"""Networks made of the layers in `nn`."""
