"""Held-out preferences, generation, and answers judged by a rule."""
