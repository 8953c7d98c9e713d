"""What processes do together."""
