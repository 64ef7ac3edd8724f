"""From Python: a whole run, and its parts, as functions."""
