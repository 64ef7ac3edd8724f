"""What a run came to, as its folder says: numbers as arrays, before and after, and figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_jax.errors import UserError, nearest, short
from dpo_jax.page.folder import EXPORTS, Curve, RunFolder, read
from dpo_jax.reporting.metrics import before_and_after, held_out_of, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = 6
"""Figures that `plot` draws where none are asked for."""


class Result:
    """A run, as `fit` or `python -m dpo_jax.train` left it in its folder: `Result("runs/quickstart")`.

    Attributes:
      folder: everything that the run wrote.
      metrics: by name, what was recorded: `steps, values = result.metrics["loss"]`, float64 arrays, nan where a value
        was not finite. What was measured on held-out data begins with `eval_`.
      before: metrics of the first evaluation, and `after` of the one that is exported; empty where there was none.
      notes: what was said beside the metrics, such as alarms.
    """

    def __init__(self, folder: str | Path):
        """Read a run's folder.

        Raises:
          UserError: it is no run's.
        """
        self._run: RunFolder = read(folder)
        self.folder = self._run.path
        self.metrics: Mapping[str, Curve] = {name: self._run.curve(name) for name in self._run.metrics}
        self.before, self.after = self._before_and_after()
        self.notes: list[str] = [note["note"] for note in self._run.notes]

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end and exported."""
        return self._run.finished

    @property
    def step(self) -> int:
        """The last step of which there is a record."""
        return self._run.step

    @property
    def model(self) -> Path:
        """Folder of what was trained: of the model, or where an adapter alone was exported of that.

        Raises:
          UserError: nothing has been exported yet.
        """
        found = [self.folder / name for name in EXPORTS.values() if (self.folder / name).is_dir()]
        if not (self.finished and found):
            raise UserError(f"{self.folder}: the run has not come to its end, and exported nothing; call fit again")
        return found[0]

    def plot(self, *metrics: str) -> "Figure":
        """A figure of Matplotlib: curves of training, and marks of held-out data, of these metrics or the main ones.

        Raises:
          UserError: a metric was not recorded.
        """
        from dpo_jax.page.drawing import fill
        from dpo_jax.page.panels import plots
        from dpo_jax.python.figure import Shown

        names = [held_out_of(name)[1] for name in metrics]
        known = {held_out_of(name)[1] for name in self.metrics}
        if unknown := [name for name in names if name not in known]:
            near = nearest(unknown[0], known) or ", ".join(sorted(known)[:5])
            raise UserError(f"{short(unknown[0])}: no such metric was recorded; did you mean {near}?")
        found = plots(self._run, names)
        if not found:
            raise UserError(f"{self.folder}: nothing was recorded yet that could be drawn; train some steps first")
        figure = Shown()
        fill(figure, found if names else found[:PLOTS])
        return figure

    def _before_and_after(self) -> tuple[dict[str, float], dict[str, float]]:
        before, after = before_and_after(self._run.measured.evaluations, self._run.best)
        return before or {}, after or {}

    def __repr__(self) -> str:
        """How far it came, and held-out data before and after."""
        of = f" of {self._run.steps:,}" if self._run.steps else ""
        lines = [f"{self.folder}: {self.step:,}{of} steps{', finished' if self.finished else ''}"]
        rows = table(self.before, self.after)
        width = max((len(label) for label, _, _ in rows), default=0)
        return "\n".join(lines + [f"{label:<{width}}  {old:>8} -> {new:>8}" for label, old, new in rows])
