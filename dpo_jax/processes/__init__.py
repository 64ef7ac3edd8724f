"""Several processes that are one run: how they find each other, agree, and end together."""
