"""Cases on disk, two-stream batches of augmented crops, and the phantom set."""
