"""`Shots`: bodies in clips of several shots."""
