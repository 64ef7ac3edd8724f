"""Run the notebooks of configs/notebooks as a person would, and keep what they show.

    python tools/notebooks.py [NAME ...]

Needs `pip install '.[notebooks]'`: a Jupyter kernel runs them, so that what is kept is what a notebook shows. What they
wrote into runs/notebooks before is removed first, since a run that is finished would show nothing.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "notebooks"
WRITTEN = ROOT / "runs" / "notebooks"
SECONDS = 3600
"""A cell may take, on a machine that others use too."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> dict[str, Any]:
    """A notebook as JSON."""
    return json.loads(path.read_text("utf-8"))


def written(notebook: dict[str, Any]) -> str:
    """A notebook as a file has it here: without what differs from machine to machine, such as warnings of packages, and
    with what was printed in one piece."""
    cells = [
        {**cell, "metadata": {}} | ({"outputs": shown(cell)} if "outputs" in cell else {}) for cell in notebook["cells"]
    ]
    return json.dumps({**notebook, "cells": cells, "metadata": METADATA}, indent=1, ensure_ascii=False) + "\n"


def shown(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell shows: its results, and all that it printed before them."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream" and output["name"] == "stdout"]
    lines = "".join("".join(output["text"]) for output in streams).splitlines(keepends=True)
    printed = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return printed + [output for output in cell["outputs"] if output["output_type"] != "stream"]


def run(path: Path) -> None:
    """Run a notebook in its own folder and write it again, with its outputs."""
    nbclient, nbformat = (importlib.import_module(name) for name in ("nbclient", "nbformat"))  # of the extra alone
    notebook = nbformat.reads(path.read_text("utf-8"), as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    path.write_text(written(json.loads(nbformat.writes(notebook))), "utf-8")


def main(names: Sequence[str]) -> None:
    """Run those that are named, or all."""
    for name in names or [""]:
        shutil.rmtree(WRITTEN / name, ignore_errors=True)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            print(path.name, flush=True)
            run(path)


if __name__ == "__main__":
    main(sys.argv[1:])
