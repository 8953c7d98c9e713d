"""The Gaussian over the K coordinates, and what it predicts."""
