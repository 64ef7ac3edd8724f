"""The decoder: one frozen spec, its layers, and how they attend."""
