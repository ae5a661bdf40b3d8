"""What a prediction is worth: sliding window, metrics, files of a test, statistics, figures."""
