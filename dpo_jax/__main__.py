"""`dpo-jax COMMAND ...`, also `python -m dpo_jax COMMAND ...`: every command under one name."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence

import dpo_jax
from dpo_jax.config import completion
from dpo_jax.config.command import Parser, command
from dpo_jax.config.console import COMMANDS, listed, program
from dpo_jax.errors import COMMAND_LINE, UserError, nearest, short


@command
def main(argv: Sequence[str]) -> int:
    """Start the command that is named first with the other arguments, which are its own."""
    parser = _parser()
    if completion.ASKED in os.environ:
        completion.dispatch(parser)
    if not argv or argv[0].startswith("-"):
        options = parser.parse_args(argv)
        if options.completion:
            print(completion.script(options.completion), end="")
            return 0
        parser.print_help()
        return 2
    name, *rest = argv
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        remedy = f"did you mean {near}?" if near else f"{program('')} --help lists them"
        raise UserError(f"{COMMAND_LINE}: {short(name)}: no such command; {remedy}")
    return importlib.import_module(f"dpo_jax.{name}").main(rest)


def _parser() -> Parser:
    parser = Parser("", "\n".join(["Preference training in JAX.", "", "commands:", *listed()]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} COMMAND ..."
    parser.epilog = f"{parser.prog} COMMAND --help says what a command takes."
    parser.add_argument("--version", action=_Version, help="print the versions of dpo_jax, Python and jax")
    parser.add_argument("--completion", choices=completion.SHELLS, help="print what makes this shell complete commands")
    if completion.ASKED in os.environ:
        parser.add_argument("command", nargs="?", choices=COMMANDS)
    return parser


class _Version(argparse.Action):
    """Print the versions, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **how):
        """An option without a value."""
        super().__init__(option_strings, dest, nargs=0, **how)

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        """Print."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            jax = f"jax {version('jax')}"
        except PackageNotFoundError:
            jax = "no jax"
        print(f"dpo_jax {dpo_jax.__version__} (Python {platform.python_version()}, {jax})")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
