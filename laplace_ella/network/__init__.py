"""The network as a function of its weights, and how it is differentiated."""
