"""Studies of the method: how good its probabilities are, and where. Each is a package of its own, with `run` and `report`."""
