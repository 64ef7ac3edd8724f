"""Figures: what Matplotlib draws, as SVG that stands in a page and takes the page's colours, in light and in dark.

Nothing that a user or a model wrote is in a figure: titles, units and legends are text of the page. Matplotlib is
imported when the first figure is drawn.
"""

import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from dpo_jax.page.curves import Thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, FONT = 360, 216, 11
"""Of a figure and its text, in CSS pixels at its natural size: about that of a column of the page, and of a phone."""
INK = {name: f"#0000{number:02x}" for number, name in enumerate(("text", "muted", "grid", "ground"), 1)}
"""A stand-in for each colour of the page that is in every figure."""
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
LOGARITHMIC = 50.0
"""How many times its median the largest of the positive values must be for an axis of powers of ten."""


class Line(NamedTuple):
    """A line of a figure.

    Attributes:
      curve: what it goes through.
      colour: name of a colour of the page, such as `held`.
      marked: with a mark at each point, and a dashed line between them: what was measured now and then.
      band: the lower and upper edge of what is shaded around it, in place of the curve's own extremes.
      label: its name in the legend.
      last: the newest value, for the legend.
      dash: pattern of the line: 0 is solid.
    """

    curve: Thin
    colour: str
    marked: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None
    label: str = ""
    last: float = math.nan
    dash: int = 0


class Bars(NamedTuple):
    """A histogram: counts between edges, filled or as an outline; or, where all values are one, a line at it."""

    edges: np.ndarray
    counts: np.ndarray
    colour: str
    filled: bool
    label: str = ""
    last: float = math.nan
    marked: bool = False
    dash: int = 0


class Plot(NamedTuple):
    """A figure, with its title, the unit of its upright axis, and values at which there is a thin line across."""

    title: str
    unit: str
    parts: Sequence[Line | Bars]
    rules: Sequence[float] = ()
    across: str = "step"
    bounds: tuple[float, float] | None = None
    about: str = ""


DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


def colour_of(name: str) -> str:
    """The stand-in of a colour of the page, which `_recoloured` turns into it."""
    if name in INK:
        return INK[name]
    return "#01" + hashlib.sha256(name.encode()).hexdigest()[:4]


def draw(plot: Plot, number: int) -> str:
    """A figure as an `svg` element; `number` is its own on the page, so that no two have an id in common."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": str(number),
        "font.size": FONT,
        "text.parse_math": False,
        "text.usetex": False,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
        left, bottom = 50 / WIDTH, 38 / HEIGHT
        axes = figure.add_axes((left, bottom, 1 - left - 12 / WIDTH, 1 - bottom - 10 / HEIGHT), facecolor="none")
        for part in plot.parts:
            _add(axes, part, colour_of)
        _dress(axes, plot, colour_of)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _inlined(file.getvalue(), {part.colour for part in plot.parts}, number, f"{plot.title}, {plot.unit}")


@functools.cache
def light_colours() -> dict[str, str]:
    """The page's colours by name, in light."""
    style = resources.files("dpo_jax.page").joinpath("style.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style.partition("@media")[0]))


def fill(figure: "Figure", plots: Sequence[Plot], across: int = 3) -> None:
    """Draw plots side by side into a figure of Matplotlib, so many across, with their titles and legends."""
    colour = light_colours().__getitem__
    rows = math.ceil(len(plots) / across)
    figure.set_size_inches(WIDTH / 72 * min(across, len(plots)), (HEIGHT + 40) / 72 * rows)
    figure.set_layout_engine("constrained")
    for number, plot in enumerate(plots, 1):
        axes = figure.add_subplot(rows, min(across, len(plots)), number)
        for part in plot.parts:
            _add(axes, part, colour)
        _dress(axes, plot, colour)
        axes.set_title(f"{plot.title}, {plot.unit}" if plot.unit else plot.title, fontsize=FONT, color=colour("text"))
        axes.legend(fontsize=FONT - 2, frameon=False, labelcolor=colour("text"))


def _add(axes: "Axes", part: Line | Bars, tone: Callable[[str], str]) -> None:
    if isinstance(part, Line):
        _add_line(axes, part, tone(part.colour))
    else:
        _add_bars(axes, part, tone(part.colour))


def _add_line(axes: "Axes", line: Line, colour: str) -> None:
    steps, mean, low, high = line.curve
    edges = line.band or ((low, high) if line.curve.is_thinned else None)
    if edges is not None:
        axes.fill_between(steps, *edges, color=colour, alpha=0.16, linewidth=0)
    points = int(np.isfinite(mean).sum())
    # between two points lies what nobody has measured
    joined = (0, (4, 2)) if points > 2 else "none"
    how = {"marker": "o", "markersize": 4.5 if points <= 40 else 2.5, "linestyle": joined} if line.marked else {}
    lone = not line.marked and points == 1
    how |= {"marker": "o", "markersize": 3} if lone else {}
    how |= {} if line.marked else {"linestyle": DASHES[line.dash % len(DASHES)]}
    axes.plot(steps, mean, color=colour, linewidth=1.6, markeredgewidth=0, label=line.label, **how)


def _add_bars(axes: "Axes", bars: Bars, colour: str) -> None:
    if bars.filled:
        axes.stairs(bars.counts, bars.edges, fill=True, color=colour, alpha=0.35, linewidth=0)
    style = "-" if bars.filled else (0, (4, 2))
    axes.stairs(bars.counts, bars.edges, color=colour, linewidth=1.4, linestyle=style, label=bars.label)


def _dress(axes: "Axes", plot: Plot, tone: Callable[[str], str]) -> None:
    """Axes without a box, a faint grid, few numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(tone("grid"))
    axes.grid(axis="y", color=tone("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    for rule in plot.rules:
        axes.axhline(rule, color=tone("muted"), linewidth=0.9, linestyle=(0, (1, 2)))
    axes.tick_params(length=0, colors=tone("muted"), labelcolor=tone("muted"), pad=4)
    whole = all(isinstance(part, Line) for part in plot.parts)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number(axes.get_xlim())))
    axes.set_xlabel(plot.across, color=tone("muted"), labelpad=3)
    if plot.bounds is not None:
        axes.set_ylim(*plot.bounds)
    if whole and _spread(plot) > LOGARITHMIC:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(_short_number((0.0, 1e9))))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(_short_number(axes.get_ylim())))


def _spread(plot: Plot) -> float:
    """How many times its median the largest value is; 0 where some are not positive, or the axis has bounds."""
    values = np.concatenate([part.curve.high for part in plot.parts if isinstance(part, Line)])
    values = values[np.isfinite(values)]
    if plot.bounds is not None or not len(values) or values.min() <= 0:
        return 0.0
    return float(values.max() / np.median(values))


def _short_number(bounds: tuple[float, float]) -> Callable[[float, object], str]:
    """Numbers of an axis between these bounds, as short as they can be told apart: 0.25, 2k, 5e-7."""
    largest = max(abs(bound) for bound in bounds)

    def text(value: float, _: object = None) -> str:
        if abs(value) < 1e-9 * largest:
            return "0"
        if abs(value) >= 1e4:
            small, unit = (value / 1e6, "M") if abs(value) >= 1e6 else (value / 1e3, "k")
            return f"{small:.4g}{unit}".replace("-", "\u2212")
        return re.sub(r"e([-+])0*", lambda found: "e" + found[1].replace("+", ""), f"{value:.4g}").replace(
            "-", "\u2212"
        )

    return text


def _inlined(text: str, colours: set[str], number: int, title: str) -> str:
    """The SVG of a file as an element of a page: its colours are the page's, its font too, its ids its own.

    Without what is of no use in a page: the size in points, metadata, a style sheet that would be the whole page's.
    """
    root = ElementTree.fromstring(text)
    ElementTree.register_namespace("", SVG)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"(?:href=\"#|url\(#)([\w-]+)", text))
    names = {f"#{name}": f"#f{number}-{name}" for name in used}
    tones = {colour_of(name): name for name in (*INK, *sorted(colours))}
    for element in root.iter():
        _mend(element, used, names, tones, number)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    found = ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{SVG}"', "")
    return re.sub(r"\s*\n\s*", " ", found)


def _mend(
    element: ElementTree.Element, used: set[str], names: dict[str, str], tones: dict[str, str], number: int
) -> None:
    found = dict(element.attrib)
    if "id" in found and found["id"] not in used:
        del found["id"]
    elif "id" in found:
        found["id"] = f"f{number}-{found['id']}"
    if link := found.pop(f"{{{XLINK}}}href", None):
        found["href"] = names[link]
    if "clip-path" in found:
        found["clip-path"] = re.sub(r"#[\w-]+", lambda hit: names[hit[0]], found["clip-path"])
    if "style" in found:
        style = re.sub(r"#[0-9a-f]{6}\b", lambda hit: _tone(hit[0], tones), found["style"])
        found["style"] = re.sub(r"font(-family)?: [^;]*(;|$)", lambda hit: _font(hit[0]), style)
    if "d" in found:
        found["d"] = re.sub(r"-?\d+\.\d+", lambda hit: f"{float(hit[0]):.1f}".removesuffix(".0"), found["d"])
    element.attrib.clear()
    element.attrib.update(found)


def _tone(colour: str, tones: dict[str, str]) -> str:
    return f"var(--{tones[colour]})" if colour in tones else "none"


def _font(declaration: str) -> str:
    """Of a declaration of a font, its size: the letters are the page's."""
    size = re.search(r"[\d.]+px", declaration)
    return f"font-size: {size[0]}; " if size else ""
