"""What validation data say about the parameters of the predictive."""
