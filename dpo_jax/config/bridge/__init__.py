"""Configs of other trainers, read and rewritten as ours."""
