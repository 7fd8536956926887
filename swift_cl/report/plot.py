"""The stage x task matrix as a heat map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_cl.io import atomic_write
from swift_cl.report.tables import Results, direction, labels, scale, scorers


def write_heatmap(path: Path, results: Sequence[Results], scorer: str | None = None) -> None:
    """One panel a run, side by side, on one colour scale; cells that were not measured stay grey and say so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scorer = scorer or scorers(results)[0]
    shown = [(label, e) for label, e in zip(labels(results), results, strict=True) if scorer in e["scorers"]]
    grids = [
        [e["scorers"][scorer]["base"] or [None] * len(e["order"]), *e["scorers"][scorer]["matrix"]] for _, e in shown
    ]
    low, high = scale(results, scorer)
    size = max(len(entry["order"]) for _, entry in shown)
    figure = Figure(figsize=((1.1 * size + 1.6) * len(shown) + 1.0, 0.75 * (size + 1) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    # Yellow is good in either direction.
    colours = "viridis" if direction(results, scorer) == "higher" else "viridis_r"
    image: Any = None
    for axis, (label, entry), grid in zip(axes, shown, grids, strict=True):
        order = entry["order"]
        values = [[float("nan") if cell is None else cell for cell in row] for row in grid]
        axis.set_facecolor("0.85")
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axis.set_title(label)
        axis.set_xticks(range(len(order)), order, rotation=45 if max(map(len, order)) > 6 else 0)
        axis.set_yticks(range(len(order) + 1), ["base", *(f"after {task}" for task in order)])
        for row, cells in enumerate(grid):
            for column, cell in enumerate(cells):
                shade = 0.0 if cell is None else (cell - low) / (high - low)
                dark = (shade < 0.6) if colours == "viridis" else (shade > 0.4)
                axis.text(
                    column,
                    row,
                    "-" if cell is None else f"{cell:.1f}",
                    ha="center",
                    va="center",
                    color="white" if dark and cell is not None else "black",
                )
    figure.colorbar(image, ax=list(axes), label=f"{scorer} (%)")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
