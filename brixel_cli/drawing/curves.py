"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from brixel_cli.core.files import replacing
from brixel_cli.drawing.charts import SERIES


def draw_curves(path: Path, curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    """Draw loss over steps, a colour for each source and a thin line for each seed; the file appears when complete.

    Args:
        path: of the PNG.
        curves: for each source its curves, a point being {step, loss}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only where a picture is drawn
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, seeds), colour in zip(curves.items(), cycle(SERIES.values())):
        for seed, points in enumerate(seeds):
            steps, losses = [point["step"] for point in points], [point["loss"] for point in points]
            axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.8, label=None if seed else label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    if all(point["loss"] > 0 for seeds in curves.values() for points in seeds for point in points):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
