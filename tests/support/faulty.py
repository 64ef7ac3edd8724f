"""`python -m tests.support.faulty KIND PROCESS STEP ARGS...`: `dpo_jax.train` in which one process misbehaves.

At that step of that process: `hang` (in Python, for ever), `raise` (an error of ours), `refuse` (an error of the
user's), `slow` (every step from then on takes two seconds more), `full` (no checkpoint can be written).
"""

import errno
import os
import sys
import time
from typing import Any

from dpo_jax import train
from dpo_jax.errors import UserError
from dpo_jax.processes.here import here


def main(kind: str, process: int, step: int, *arguments: str) -> int:
    from dpo_jax.run.recorder import Recorder
    from dpo_jax.training.checkpoints import Checkpoints

    take, save = Recorder.take, Checkpoints.save

    def misbehave(self: Recorder, at: int, *args: Any, **named: Any) -> None:
        if here().process == process and (at == step or (at > step and kind == "slow")):
            if kind == "hang":
                time.sleep(10_000)
            if kind == "raise":
                raise ValueError("the wheel came off")
            if kind == "refuse":
                raise UserError("a file went away; put it back")
            if kind == "slow":
                time.sleep(2)
        take(self, at, *args, **named)

    def saves(self: Checkpoints, at: int, *args: Any, **named: Any) -> None:
        if kind == "full" and here().process == process and at >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.place.root))
        save(self, at, *args, **named)

    Recorder.take, Checkpoints.save = misbehave, saves
    return train.main(list(arguments))


if __name__ == "__main__":
    kind, process, step, *rest = sys.argv[1:]
    sys.exit(main(kind, int(process), int(step), *rest))
