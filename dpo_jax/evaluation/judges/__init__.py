"""The kinds of judges: a rule, a reward model, a model that compares, a server, a person."""
