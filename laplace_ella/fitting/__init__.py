"""From a loader to a fit: what it costs, how it is computed, and how it is kept."""
