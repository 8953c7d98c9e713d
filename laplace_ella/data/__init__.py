"""Data as they come: batches of inputs, and samples of them."""
