"""Data as they come: batches, their rows, and samples of them."""
