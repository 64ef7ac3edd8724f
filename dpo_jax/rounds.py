"""`python -m dpo_jax.rounds CONFIG [key=value ...]`: iterative DPO, each round from the model that the last one left.

In each round the model answers prompts, a judge makes preferences of the answers, and an ordinary run trains on them.
The command goes on where it was stopped, however that was, and does no finished round again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.config import command as commands
from dpo_jax.config import rounds as config
from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.files import locked


@commands.command
def main(argv: Sequence[str]) -> int:
    """Read the settings, then go round; nothing heavy is imported before they are known to be right."""
    run, settings = config.load(argv)
    commands.quiet_libraries()
    return go(run, settings)


def go(run: Run, settings: config.RoundsSettings) -> int:
    """All rounds. Exit code 0 when done, that of the run which was stopped otherwise."""
    folder = Path(run.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder")
    from dpo_jax.run import compile_cache
    from dpo_jax.run.iterating import Rounds, shown
    from dpo_jax.train import train

    with locked(folder, "output"):
        compile_cache.use(run.model.compile_cache)
        rounds = Rounds(run, settings)
        rounds.measure(0, {})
        for number in range(1, settings.number + 1):
            collected = rounds.collect(number)
            if code := train(rounds.run_of(number)):
                return code
            rounds.measure(number, collected)
    print("\n".join(shown(rounds.table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
