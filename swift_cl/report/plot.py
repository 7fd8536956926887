"""The stage x task matrix as a picture, in the colours of the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_cl.io import atomic_write
from swift_cl.report.heatmap import DARK
from swift_cl.report.tables import Results, direction, grid_rows, labels, scale, scorers

WORST, BEST = "#f3f5f7", "#062b4f"


def write_heatmap(path: Path, results: Sequence[Results], scorer: str | None = None) -> None:
    """One panel a run, side by side, on one colour scale; cells that were not measured are hatched and say so.

    A frame marks the task that a stage has just learned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scorer = scorer or scorers(results)[0]
    shown = [(label, e) for label, e in zip(labels(results), results, strict=True) if scorer in e["scorers"]]
    low, high = scale(results, scorer)
    lower = direction(results, scorer) == "lower"
    colours = LinearSegmentedColormap.from_list("page", [BEST, WORST] if lower else [WORST, BEST])
    size = max(len(entry["order"]) for _, entry in shown)
    grids = [grid_rows(entry["scorers"][scorer], entry["order"]) for _, entry in shown]
    height = 0.6 * max(map(len, grids)) + 1.4
    figure = Figure(figsize=((1.0 * size + 1.6) * len(shown) + 1.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    image: Any = None
    for axis, (label, entry), grid in zip(axes, shown, grids, strict=True):
        order = entry["order"]
        values = [[float("nan") if cell is None else cell for cell in row.cells] for row in grid]
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axis.set_title(label, fontweight="bold")
        axis.set_xticks(range(len(order)), order, rotation=45 if max(map(len, order)) > 6 else 0)
        axis.set_yticks(range(len(grid)), [row.name for row in grid])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        stage = 0
        for y, row in enumerate(grid):
            for x, cell in enumerate(row.cells):
                if cell is None:
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.8", lw=0))
                shade = 0.0 if cell is None else (cell - low) / (high - low)
                dark = cell is not None and (1 - shade if lower else shade) >= DARK
                text = "-" if cell is None else f"{cell:.1f}"
                axis.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
            if row.key == "stage":
                axis.add_patch(Rectangle((stage - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="black", lw=1.6))
                stage += 1
    figure.colorbar(image, ax=list(axes), label=f"{scorer}, {'lower' if lower else 'higher'} is better")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
