"""The stopwatch's runner of dpo_jax, with more settings: `PYTHON ours.py SPEC.json [--trace FOLDER] [key=value ...]`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "runners")]

from protocol import Events, Spec, bind  # isort: split

import tempfile

from tools.runners.ours import run


def main() -> None:
    """Run the spec of the command line."""
    path, *rest = sys.argv[1:]
    trace = Path(rest[1]) if rest[:1] == ["--trace"] else None
    events, spec = Events(), Spec.read(path)
    bind(spec.threads)
    with tempfile.TemporaryDirectory() as folder:
        run(spec, events, Path(folder), rest[2:] if trace else rest, trace)


if __name__ == "__main__":
    main()
