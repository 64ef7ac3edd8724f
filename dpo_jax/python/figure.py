"""Matplotlib's figure that a notebook shows by itself. Imported when the first one is drawn."""

import io

from matplotlib.figure import Figure


class Shown(Figure):
    """A figure that no window holds, so that it is freed with its last name; a notebook shows it as a picture."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()
