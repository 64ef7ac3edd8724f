"""One run's settings: YAML, overrides, help, and the names used elsewhere."""
