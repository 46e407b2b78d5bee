"""`python -m vdit` is the command `vdit`."""

from vdit.cli import script

if __name__ == "__main__":
    script()
