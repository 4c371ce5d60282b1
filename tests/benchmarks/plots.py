"""The figures of a run, as SVG; each says the command that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {
    "service": "#1a7f64",
    "nchan": "#8a8f98",
    "nchan-serial": "#4f6d8f",
    "aiohttp-sse": "#c9a227",
    "sse-starlette": "#b5543c",
}
FAN_OUT = ("A", "A2", "B", "C")


def draw(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Draw what the run has the numbers for; return the files."""
    import matplotlib as mpl

    mpl.use("svg")
    # Text as text, and the same file for the same numbers.
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "sse_labels", "font.family": "sans-serif"}
    )
    measured = [each for each in found["results"] if each["verdict"] != "left out"]
    figures = {
        "cpu-per-delivery": _cpu,
        "connections": _connections,
        "history": _history,
    }
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        drawn = figure(measured)
        if drawn is None:
            continue
        drawn.text(0.01, 0.005, found["command"], fontsize=7, color="#666666", family="monospace")
        path = folder / f"{name}.svg"
        drawn.savefig(path, metadata={"Date": None, "Creator": None})
        made.append(path)
    return made


def _figure(title: str, wide: float = 7.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Room for the command at the bottom.
    layout = ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96))
    figure = Figure(figsize=(wide, 3.4), layout=layout)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _cpu(measured: list[dict[str, Any]]) -> Any:
    """Bars: the cost of a delivery, per scenario and server."""
    shown = [each for each in measured if each["scenario"] in FAN_OUT and each["server_us"]]
    if not shown:
        return None
    scenarios = [name for name in FAN_OUT if any(each["scenario"] == name for each in shown)]
    names = [name for name in COLORS if any(each["server"] == name for each in shown)]
    figure, axes = _figure("Server CPU per delivery, µs (log scale; less is better)")
    wide = 0.8 / len(names)
    for place, name in enumerate(names):
        for each in (each for each in shown if each["server"] == name):
            x = scenarios.index(each["scenario"]) + (place - (len(names) - 1) / 2) * wide
            behind = each["verdict"] != "complete"
            axes.bar(
                x, each["server_us"], wide * 0.92, color=COLORS[name], alpha=0.55 if behind else 1,
                hatch="///" if behind else None, edgecolor="white",
            )  # fmt: skip
            label = (
                f"{each['server_us']:.2g}" if each["server_us"] < 10 else f"{each['server_us']:.0f}"
            )
            axes.annotate(
                label, (x, each["server_us"]), ha="center", va="bottom", fontsize=7,
                xytext=(0, 1), textcoords="offset points",
            )  # fmt: skip
    axes.set_yscale("log")
    variants = {each["scenario"]: each["variant"].replace(", ", "\n") for each in shown}
    axes.set_xticks(range(len(scenarios)), [f"{name}\n{variants[name]}" for name in scenarios])
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[name], label=name) for name in names]
    if any(each["verdict"] != "complete" for each in shown):
        handles.append(Patch(facecolor="#dddddd", hatch="///", label="falls behind"))
    axes.legend(handles=handles, fontsize=7, frameon=False, ncols=len(handles))
    axes.margins(y=0.25)
    return figure


def _connections(measured: list[dict[str, Any]]) -> Any:
    """Lines: the cost of a delivery as connections grow."""
    shown = [
        each
        for each in measured
        if each["scenario"] == "H" and each["server_us"] and "history" not in each["more"]
    ]
    if not shown:
        return None
    figure, axes = _figure(
        "Server CPU per delivery, µs, as connections grow (hollow: falls behind)"
    )
    for name, color in COLORS.items():
        own = sorted(
            (each["connections"], each["server_us"], each["verdict"] == "complete")
            for each in shown
            if each["server"] == name
        )
        if not own:
            continue
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], color=color, label=name)
        for x, y, complete in own:
            axes.plot(x, y, "o", color=color, markerfacecolor=color if complete else "white")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("connections", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _history(measured: list[dict[str, Any]]) -> Any:
    """A line: memory as history grows."""
    own = sorted(
        (each["more"]["history"], each["peak_mib"])
        for each in measured
        if "history" in each["more"] and each["peak_mib"]
    )
    if not own:
        return None
    figure, axes = _figure("Most memory of the service, MiB, as history grows")
    axes.plot([x for x, _ in own], [y for _, y in own], "o-", color=COLORS["service"])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("labels stored", fontsize=8)
    return figure
