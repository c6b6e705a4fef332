"""A curve as SVG: matplotlib draws it, and what a browser needs is put in: theme colours, names, keyboard focus."""

import io
import re
from typing import Any
from xml.etree import ElementTree as ET

from edgebuild.report.content import Curve, Point
from edgebuild.report.figures import one_line

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

# Colours that stand for the page's own, which differ by light and dark.
_INK, _FAINT, _LINE, _CHOSEN, _BOUND = "#010101", "#020202", "#030303", "#040404", "#050505"
_THEME = {
    _INK: "var(--ink)",
    _FAINT: "var(--rule)",
    _LINE: "var(--accent)",
    _CHOSEN: "var(--good)",
    _BOUND: "var(--bad)",
}

_MARKERS = {  # marker, size, edge, face
    "plan": ("o", 7, _LINE, _LINE),
    "chosen": ("o", 12, _CHOSEN, "none"),
    "draft": ("D", 7, _INK, "none"),
    "built": ("D", 7, _INK, _INK),
    "artifact": ("*", 17, _CHOSEN, _CHOSEN),
}
KINDS = {
    "plan": "a plan, as predicted",
    "chosen": "the plan that was chosen",
    "draft": "built as a draft, not trained",
    "built": "built in a round",
    "artifact": "the artifact, as found",
}
_UNITS = {
    "latency": ("Latency", {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}),
    "size": ("Size", {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}),
    "peak": ("Peak memory", {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}),
}
_LARGEST = 1e15  # bytes, seconds or nats; what is above is no figure, and would overflow the axes
_DECADES, _LEAST = 9, 1e-12  # a loss that is this much smaller than the largest, or than this, counts as none
_FAR = 1.6  # a budget this far beyond the last point is said and not drawn


def drawable(curve: Curve) -> tuple[Point, ...]:
    """The points that fit on axes. All of them, unless a figure is absurd."""
    return tuple(point for point in curve.points if 0 <= point.cost < _LARGEST and abs(point.loss) < _LARGEST)


def bound_shows(curve: Curve) -> bool:
    """Whether the budget lies near enough to the points to be drawn."""
    most = max((point.cost for point in drawable(curve)), default=0.0)
    return curve.bound is not None and 0 < curve.bound <= _FAR * most


def svg(curve: Curve) -> str:
    """An `<svg>` element with a focusable, named `<g class="point">` for each point; "" where there is none to draw.

    It has neither scripts, styles, references outwards nor ids that two curves could share. The same bytes each time.
    """
    points = drawable(curve)
    if not points:
        return ""
    return _for_the_page(_drawn(curve, points), {f"point-{i}": point for i, point in enumerate(points)}, curve.title)


def _drawn(curve: Curve, points: tuple[Point, ...]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    most = max(point.cost for point in points)
    name, units = _UNITS.get(curve.quantity, ("", {"": 1.0}))
    unit, factor = max(
        (pair for pair in units.items() if most >= 3 * pair[1]), key=lambda pair: pair[1], default=("", 0)
    )
    if not factor:
        unit, factor = next(iter(units.items()))
    largest = max(point.loss for point in points)
    floor = max(min((p.loss for p in points if p.loss > 0), default=1.0), largest / 10**_DECADES, _LEAST)
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": curve.title,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.edgecolor": _FAINT,
        "grid.color": _FAINT,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "font.size": 12.5,
    }
    # what a user has in matplotlibrc must not show here
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(6, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.set_xlabel(f"{name} ({unit})" if unit else "")
        axes.set_ylabel("Loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        line = sorted((p.cost / factor, max(p.loss, floor)) for p in points if p.kind in ("plan", "chosen"))
        axes.plot([x for x, _ in line], [y for _, y in line], color=_LINE, linewidth=1.5, zorder=2)
        named = set()
        for i, point in enumerate(points):
            marker, size, edge, face = _MARKERS[point.kind]
            label = KINDS[point.kind] if point.kind not in named else ""
            named.add(point.kind)
            axes.plot(
                [point.cost / factor],
                [max(point.loss, floor)],
                marker=marker,
                markersize=size,
                markeredgecolor=edge,
                markerfacecolor=face,
                markeredgewidth=1.5,
                linestyle="",
                label=label,
                clip_on=False,
                gid=f"point-{i}",
                zorder=4 if point.kind == "artifact" else 3,
            )
        if bound_shows(curve):
            assert curve.bound
            at = curve.bound / factor
            axes.axvline(at, label="the budget", color=_BOUND, linestyle=(0, (5, 4)), linewidth=1.5, zorder=1)
        axes.margins(0.08, 0.12)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _for_the_page(drawn: str, points: dict[str, Point], title: str) -> str:
    """The drawing without what a strict Content-Security-Policy refuses (styles) and what nobody needs."""
    for colour, variable in _THEME.items():
        drawn = drawn.replace(colour, variable)
    ET.register_namespace("", SVG)
    root = ET.fromstring(drawn)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    for name in ("width", "height", "version"):  # the page says how large it is
        del root.attrib[name]
    used = set(re.findall(r'#([\w.-]+)[")]', drawn))
    for element in root.iter():
        for declaration in filter(None, map(str.strip, element.attrib.pop("style", "").split(";"))):
            key, _, value = declaration.partition(":")
            if key != "font-family":
                element.set(key, value.strip())
        if link := element.attrib.pop(f"{{{XLINK}}}href", None):
            element.set("href", link)
        if point := points.get(element.get("id", "")):
            label = one_line(point.text)
            element.attrib |= {"class": "point", "tabindex": "0", "role": "img", "aria-label": label}
            # shown on hover where no script runs
            tip = ET.Element(f"{{{SVG}}}title")
            tip.text = label
            element.insert(0, tip)
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        element.text = element.text and re.sub(r"\s+", " ", element.text).strip()
        element.tail = None
    root.attrib |= {"role": "group", "aria-label": one_line(title)}
    return ET.tostring(root, encoding="unicode")
