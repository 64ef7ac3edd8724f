"""The parts of a run, opened from its settings."""
