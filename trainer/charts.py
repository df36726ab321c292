"""Drawing: courses and values by module -> matplotlib figures -> SVG and PNG.

Owns all that knows matplotlib, by its object API: no pyplot, no backend chosen for the process.
Text from files is drawn as it stands, never read as mathematics.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from trainer.module_grid import by_layer
from trainer.run_log import Course

_INK = "#17191d"  # of text and axes; in SVG it gives way to the page's own colour
_LINE = "#2f6fd0"
# Of evaluation sets; read on white and on near black, and by the colour-blind.
_SET_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a63d2")
_COLOUR_MAP = "viridis"
_WIDTH = 5.2  # inches; narrow, so that text is readable when a phone shrinks the picture
_MAX_POINTS = 1600  # of a line: two for each pixel column
_MAX_VECTOR_CELLS = 2500  # more cells are an image within the SVG, which is smaller
_MAX_LABELLED_CELLS = 400
_MAX_NAMED_COLUMNS = 16
_MAX_NAMED_LAYERS = 40
_MAX_BARS = 100
_MAX_HEIGHT = 40.0  # inches of a heat map; a PNG has at most 65,535 rows
_PNG_DPI = 150
_MAX_NAME = 40  # characters of a label
_STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the first comes with matplotlib
    "font.size": 9,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",  # text stays text: small, searchable
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Picture:
    """One drawing in both forms; equal input gives equal bytes.

    Args:
        name: of its files, without an ending.
        svg: an <svg> element to stand in HTML, in the colour of the text around it.
        png: on white.
    """

    name: str
    svg: str
    png: bytes


def draw_losses(
    name: str, training: Course, evaluations: Mapping[str, Course], best_step: int | None
) -> Picture:
    """Draw training loss, raw and smoothed, and the loss of every evaluation set over it."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "loss")
        raw, smooth = training.thinned(_MAX_POINTS), training.smoothed().thinned(_MAX_POINTS)
        axes.plot(raw.steps, raw.values, color=_LINE, alpha=0.3, linewidth=0.7)
        handles = axes.plot(smooth.steps, smooth.values, color=_LINE, linewidth=1.6)
        labels = ["training"]
        for place, (label, course) in enumerate(evaluations.items()):
            colour = _SET_COLOURS[place % len(_SET_COLOURS)]
            points = course.thinned(_MAX_POINTS)
            marker = "o" if len(points) <= 60 else ""
            handles += axes.plot(
                points.steps, points.values, color=colour, marker=marker, markersize=3.5
            )
            labels.append(_short(label))
        if best_step is not None:
            handles.append(axes.axvline(best_step, color=_INK, linewidth=0.8, linestyle=":"))
            labels.append(f"best, step {best_step}")
        if len(labels) > 1:
            axes.legend(handles, labels, frameon=False, fontsize=8)

    return _draw(name, draw, height=3.0)


def draw_course(name: str, course: Course, label: str) -> Picture:
    """Draw one quantity over steps."""

    def draw(figure: Figure) -> None:
        points = course.thinned(_MAX_POINTS)
        _axes(figure, label).plot(points.steps, points.values, color=_LINE, linewidth=1.2)

    return _draw(name, draw, height=2.2)


def draw_log_course(name: str, course: Course, label: str) -> Picture:
    """Draw one quantity over steps on a logarithmic scale; what is not positive is left out."""

    def draw(figure: Figure) -> None:
        positive = course.values > 0
        points = Course(course.steps[positive], course.values[positive]).thinned(_MAX_POINTS)
        axes = _axes(figure, label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would be mathematics
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.plot(points.steps, points.values, color=_LINE, linewidth=1.2)

    return _draw(name, draw, height=2.2)


def draw_modules(name: str, values: Mapping[str, float], label: str) -> Picture:
    """Draw a value for each module path: a heat map layer by kind of module, else bars.

    The first number in a path is the layer; modules without one become bars under the heat map.

    Args:
        values: at least one, by module path. A place for which there is none, or that is not
            finite, stays blank.
        label: what the values are.
    """
    grid, layers, columns, others = by_layer(values)
    bars = sorted(others, key=lambda module: -abs(others[module]))[:_MAX_BARS]
    heights = [min(1.3 + 0.19 * len(layers), _MAX_HEIGHT)] if grid else []
    heights += [0.7 + 0.22 * len(bars)] if bars else []

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if grid:
            cells = np.full((len(layers), len(columns)), np.nan)
            for (layer, kind), value in grid.items():
                cells[layers.index(layer), columns.index(kind)] = value
            _heat_map(rows[0], cells, layers, columns)
            rows[0].set_title(label, fontsize=9)
        if bars:
            _bars(rows[-1], {module: others[module] for module in others if module in bars})
            left_out = f", {len(bars)} largest of {len(others)}" if len(bars) < len(others) else ""
            rows[-1].set_xlabel(label + left_out)

    return _draw(name, draw, height=sum(heights))


def _heat_map(
    axes: Axes, cells: NDArray[np.float64], layers: Sequence[int], columns: Sequence[str]
) -> None:
    """Draw cells [num_layers, num_columns], those that are not finite blank."""
    least, most = _limits(cells)
    mesh = axes.pcolormesh(
        cells,
        cmap=_COLOUR_MAP,
        vmin=least,
        vmax=most,
        rasterized=cells.size > _MAX_VECTOR_CELLS,
    )
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    if len(columns) <= _MAX_NAMED_COLUMNS:
        names = [_short(name) for name in columns]
        axes.set_xticks(np.arange(len(columns)) + 0.5, names, rotation=40, ha="right")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(columns)} kinds, {_short(columns[0])} to {_short(columns[-1])}")
    every = max(1, len(layers) // _MAX_NAMED_LAYERS)
    axes.set_yticks(np.arange(len(layers))[::every] + 0.5, [str(n) for n in layers[::every]])
    axes.tick_params(length=0, labelsize=7.5)
    if len(columns) <= 8 and cells.size <= _MAX_LABELLED_CELLS:
        _label_cells(axes, cells, middle=(least + most) / 2)
    else:
        axes.get_figure(root=True).colorbar(mesh, ax=axes, aspect=40)  # type: ignore[union-attr]


def _limits(cells: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the colour scale; zero is always on it."""
    known = cells[np.isfinite(cells)]
    least, most = float(known.min(initial=0.0)), float(known.max(initial=0.0))
    return least, most if most > least else least + 1.0


def _label_cells(axes: Axes, cells: NDArray[np.float64], *, middle: float) -> None:
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            # The upper half of the colour map is light.
            colour = "black" if value > middle else "white"
            centre = {"ha": "center", "va": "center", "fontsize": 6.5}
            axes.text(column + 0.5, row + 0.5, f"{value:.3g}", color=colour, **centre)  # type: ignore[arg-type]


def _bars(axes: Axes, values: Mapping[str, float]) -> None:
    names = list(values)
    widths = [value if np.isfinite(value) else 0.0 for value in values.values()]
    axes.barh(np.arange(len(names)), widths, color=_LINE)
    axes.set_yticks(np.arange(len(names)), [_short(name) for name in names], fontsize=7.5)
    axes.invert_yaxis()


def _axes(figure: Figure, label: str) -> Axes:
    axes: Axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=True, color="#808080", alpha=0.25, linewidth=0.6)
    return axes


def _short(text: str) -> str:
    printable = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return printable if len(printable) <= _MAX_NAME else f"{printable[: _MAX_NAME - 1]}…"


def _draw(name: str, draw: Callable[[Figure], None], *, height: float) -> Picture:
    """Draw a figure of a height in inches in both forms."""
    with _settings(name):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
        draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", metadata=metadata)
        white_png: dict[str, Any] = {"format": "png", "dpi": _PNG_DPI, "facecolor": "white"}
        figure.savefig(png, metadata={"Software": None}, **white_png)
    return Picture(name, _for_html(name, svg.getvalue()), png.getvalue())


@contextmanager
def _settings(name: str) -> Iterator[None]:
    """Set matplotlib's settings for the block; some of them can be given in no other way."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A name in a script that the font lacks: boxes in the PNG, and right in the SVG.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def _for_html(name: str, svg: str) -> str:
    """Return the <svg> element alone, its ids apart from those of others, in the page's colour."""
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    return element.replace(_INK, "currentColor")
