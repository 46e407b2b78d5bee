"""Where clips come from: the world, video folders, the latent cache, the loader."""
