"""Case files, two-stream batches of augmented crops, and the phantom set."""
