"""How metrics are called and written: those of fidelity, and those of probes."""

from __future__ import annotations

import math

from brixel_cli.core.formatting import human_percent

FIDELITY_TITLES = {"l1": "L1", "cosine": "cosine", "edge": "edge", "spectral": "spectral"}
"""Of the metrics in `core.metrics.fidelity`."""
TITLES = {
    "miou": ("mIoU", 100, "%"),
    "boundary_iou": ("boundary IoU", 100, "%"),
    "pixel_accuracy": ("pixel accuracy", 100, "%"),
    "rmse_m": ("RMSE", 1, "m"),
    "abs_rel": ("abs rel", 1, ""),
    "delta1": ("delta1", 100, "%"),
    "delta2": ("delta2", 100, "%"),
    "delta3": ("delta3", 100, "%"),
    "silog": ("SiLog", 1, ""),
    "mean_angle_deg": ("mean angle", 1, "deg"),
    "median_angle_deg": ("median angle", 1, "deg"),
    "within_11.25": ("< 11.25 deg", 100, "%"),
    "within_22.5": ("< 22.5 deg", 100, "%"),
    "within_30": ("< 30 deg", 100, "%"),
    "pck_1": ("PCK at 1 %", 100, "%"),
    "pck_2": ("PCK at 2 %", 100, "%"),
    "pck_5": ("PCK at 5 %", 100, "%"),
    "jf_mean": ("J&F", 100, "%"),
    "j_mean": ("J", 100, "%"),
    "j_recall": ("J recall", 100, "%"),
    "j_decay": ("J decay", 100, "%"),
    "f_mean": ("F", 100, "%"),
    "f_recall": ("F recall", 100, "%"),
    "f_decay": ("F decay", 100, "%"),
}
"""Title, factor and unit of each metric of the tables. Means over images are in the files alone."""


def figure_title(name: str, align: bool) -> str:
    """A metric with its unit; `align`: depth was fitted to the truth before."""
    title, _, unit = TITLES[name]
    aligned = ", aligned" if align and name == "rmse_m" else ""
    return f"{title}{aligned}{f' ({unit})' if unit else ''}"


def figure_text(name: str, mean: float | None, spread: float | None = None) -> str:
    """A metric's mean, and its spread where that is known, in the unit of its title; a dash without a mean."""
    if mean is None or math.isnan(mean):
        return "-"
    _, factor, _ = TITLES[name]
    digits = 2 if factor == 100 or name.endswith("deg") else 4
    shown = f"{mean * factor:.{digits}f}"
    return shown if spread is None or math.isnan(spread) else f"{shown} +- {spread * factor:.{digits}f}"


def gap_text(gap: float | None, spread: float | None = None) -> str:
    """A recovered gap, and its spread where that is known: `57 +- 13 %`; a dash where there is no gap."""
    if gap is None or spread is None or math.isnan(gap) or math.isnan(spread):
        return human_percent(gap)
    return f"{gap * 100:.0f} +- {spread * 100:.0f} %"
