"""Line charts as geometry: what the SVG macro in templates/chart.html.j2 draws. Colours come from the page's theme."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 300, 176
"""Units of the drawing; about pixels."""
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 8, 24
CHARACTER = 6.2
"""Width of a character of an axis label."""
POINTS = 200
"""More points than this are thinned out."""

Value = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A line to draw.

    Attributes:
        label: its name; also its place in the legend.
        style: number of its colour and dashes, shared by all charts of a page.
        values: (x, y) with y None where there is a gap.
        titles: what a pointer shows at each value.
        dots: whether the values are marked.
    """

    label: str
    style: int
    values: Sequence[Value]
    titles: Sequence[str] = ()
    dots: bool = True


@dataclass(frozen=True)
class Drawn:
    """A line in drawing units: an SVG path and its dots (x, y, title)."""

    label: str
    style: int
    path: str
    dots: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """A chart in drawing units.

    Attributes:
        x_ticks, y_ticks: (position, label).
        shaded_to: left part that is shaded, or None.
        levels: dashed lines across: (y, name).
        summary: the chart in words, for those who do not see it.
    """

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]
    shaded_to: float | None
    levels: list[tuple[float, str]]
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str,
    lines: Sequence[Line],
    y_range: tuple[float, float],
    x_labels: Sequence[str] | None = None,
    shaded_to: float | None = None,
    levels: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Lay out a chart.

    Args:
        y_range: lowest and highest value of the y axis.
        x_labels: names of x = 0, 1, ...; None for a numeric axis from 0.
        shaded_to: x up to which the ground is shaded (a task that was not learned yet).
        levels: dashed lines across: (y, name).
    """
    last = max([x for line in lines for x, _ in line.values], default=1.0) if x_labels is None else len(x_labels) - 1
    low, high = y_range

    def across(x: float) -> float:
        return round(LEFT + x / (last or 1.0) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = [_draw(line, across, up) for line in lines]
    if x_labels is None:
        x_ticks = [(across(x), _short(x)) for x in nice_ticks(0.0, last, 4) if 0 <= x <= last]
    else:
        x_ticks = [(across(index), name) for index, name in _some(x_labels)]
    return Chart(
        title,
        x_ticks,
        [(up(y), _short(y)) for y in nice_ticks(low, high, 4) if low <= y <= high],
        drawn,
        None if shaded_to is None else across(shaded_to),
        [(up(y), name) for y, name in levels],
        f"{title}: " + "; ".join(_in_words(line, x_labels) for line in lines),
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that cover the range."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high)]


def _draw(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> Drawn:
    step = -(-len(line.values) // POINTS)
    path, dots, pen = [], [], "M"
    for index, (x, y) in enumerate(line.values):
        if y is None:
            pen = "M"
        elif index % step == 0 or index == len(line.values) - 1:
            path.append(f"{pen}{across(x)} {up(y)}")
            pen = "L"
            if line.dots:
                dots.append((across(x), up(y), line.titles[index] if line.titles else ""))
    return Drawn(line.label, line.style, "".join(path), dots)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def _some(names: Sequence[str]) -> list[tuple[int, str]]:
    """As many labels as fit side by side, the first and the last among them; long names lose their middle."""
    short = [name if len(name) <= 9 else f"{name[:4]}…{name[-4:]}" for name in names]
    fit = max(2, int((WIDTH - LEFT - RIGHT) / (max(map(len, short)) * CHARACTER + 8)))
    if len(short) <= fit:
        return list(enumerate(short))
    chosen = sorted({round(k * (len(short) - 1) / (fit - 1)) for k in range(fit)})
    return [(index, short[index]) for index in chosen]


def _in_words(line: Line, x_labels: Sequence[str] | None) -> str:
    measured = [(x, y) for x, y in line.values if y is not None]
    if not measured:
        return f"{line.label} not measured"
    (first, at_first), (end, at_end) = measured[0], measured[-1]
    names = [f"step {x:g}" if x_labels is None else x_labels[int(x)] for x in (first, end)]
    return f"{line.label} from {at_first:.3g} ({names[0]}) to {at_end:.3g} ({names[1]})"
