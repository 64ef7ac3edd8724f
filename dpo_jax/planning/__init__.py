"""What a run will take before it is started: memory, operations and traffic of its own compiled step."""
