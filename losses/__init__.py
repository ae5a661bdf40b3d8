"""Every equation: the terms of the losses, ramps, distance maps, mixing, perturbation and moving averages."""
