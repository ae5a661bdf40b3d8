"""Parts that know nothing of each other's papers: losses, ramps, distances, metrics, windows, checkpoints, options."""
