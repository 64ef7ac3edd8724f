"""What a run says of itself: records, terminal, health checks."""
