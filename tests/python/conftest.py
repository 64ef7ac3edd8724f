"""Runs from Python compile the same few programs again and again; they are kept as those of commands are."""

from tests.commands.conftest import _keep_what_was_compiled  # noqa: F401
