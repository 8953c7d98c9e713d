"""Gradient rows of landmarks, their Gram matrix, and the basis that it gives."""
