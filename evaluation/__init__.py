"""Evaluation of predictions: sliding window, metrics, files of a test, statistics, figures."""
