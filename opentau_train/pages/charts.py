"""Charts that a script draws in the page: curves of several series over steps, hours or epochs.

Every chart of a page shares its series' colours, one key that turns series off and on, and the choice of the x axis.
The script is `charts.js`, upon plotly.js, which is put into the page (about 5 MB): nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from opentau_train.errors import UserError
from opentau_train.pages.document import Html, embed, joined, tag

SCRIPT = Path(__file__).with_name("charts.js").read_text(encoding="utf-8")
COLOURS = (
    *("#2f7ed8", "#e8710a", "#1a9e77", "#c0408f", "#7a5fd0", "#b08900", "#d1495b", "#3a9fb5", "#6b8e23", "#a0643c"),
)
"""Of the series, in this order; each can be told from a white and from a dark ground. Further ones are dashed."""
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS, FEWEST_POINTS, POINTS_OF_A_CHART = 2000, 200, 10_000
"""Points that a curve may have: as many of all series' as a chart may have, within bounds. A longer one is drawn by the
means of neighbours."""
RECORDED = -1
"""The series of a curve that is none of the compared ones: what was recorded."""


@dataclass(frozen=True)
class Curve:
    """`y` [N] of the page's series number `series` at the places `x` {axis: [N]}; `errors` [N]: what one standard error
    is, drawn as a bar up and down. None is a gap. `name`: what it is called beside the series' name."""

    series: int
    x: dict[str, list[float]]
    y: list[float | None]
    errors: list[float | None] = field(default_factory=list)
    name: str = ""

    def rounded(self) -> Curve:
        """The curve with as many digits as can be seen: a page has a million numbers."""
        places = {axis: [float(f"{value:.7g}") for value in values] for axis, values in self.x.items()}
        y, errors = ([None if v is None else float(f"{v:.6g}") for v in values] for values in (self.y, self.errors))
        return replace(self, x=places, y=y, errors=errors)

    def thinned(self, most: int) -> Curve:
        """The curve with at most `most` points, each the mean of as many neighbours, without their errors."""
        stride = -(-len(self.y) // most)
        if stride <= 1:
            return self
        starts = range(0, len(self.y), stride)
        means = [_mean(self.y[i : i + stride]) for i in starts]
        places = {axis: [values[min(i + stride, len(values)) - 1] for i in starts] for axis, values in self.x.items()}
        return replace(self, x=places, y=means, errors=[])


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


@dataclass(frozen=True)
class Chart:
    """Curves under a title. `unit`: what the y axis counts; `x_title`: what the x axis does, where the reader can't
    choose it; `log`, `smooth`: whether the reader's choice of a logarithmic axis and of smoothing is for it; `points`:
    each value has a dot; `low`, `high`: where the y axis ends, where that isn't for the values to say."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    x_title: str = ""
    log: bool = False
    smooth: bool = False
    points: bool = False
    low: float | None = None
    high: float | None = None


class Charts:
    """The charts of a page, gathered as its parts are written: `place` gives an element for each."""

    def __init__(self, series: Sequence[str], axes: dict[str, str]):
        """`series`: the names of what is compared; `axes` {key of `Curve.x`: its title}, the first one being shown."""
        self.series, self.axes = list(series), axes
        self.charts: list[Chart] = []

    def place(self, charts: Sequence[Chart], *, small: bool = False) -> Html:
        """The charts side by side, nothing for none. `small`: with less height, more in a line."""
        if not charts:
            return Html()
        figures = []
        for chart in charts:
            drawn = tag("div", id=f"chart-{len(self.charts)}", class_="chart", role="img", aria_label=chart.title)
            figures.append(tag("figure", tag("figcaption", chart.title), drawn))
            self.charts.append(chart)
        return tag("div", *figures, class_="plots small" if small else "plots")

    def key(self) -> Html:
        """The key to the series' colours, and what the reader may choose."""
        buttons = []
        for number, name in enumerate(self.series):
            line = tag("i", style=f"border-top: 3px {_dash(number)} {_colour(number)}")
            buttons.append(
                tag("button", line, name, type="button", data_series=number, title="hide or show in all charts")
            )
        options = joined(tag("option", title, value=axis) for axis, title in self.axes.items())
        choices = [
            tag("label", "over ", tag("select", options, id="axis")),
            tag("label", Html("<input type=checkbox id=log>"), " logarithmic losses"),
            tag("label", "smoothing ", Html("<input type=range id=smooth min=0 max=0.98 step=0.02 value=0>")),
        ]
        return tag("nav", tag("span", *buttons, class_="series"), tag("span", *choices, class_="choices"))

    def data(self) -> Html:
        """What the script draws."""
        series = [
            {"name": name, "colour": _colour(i), "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
            for i, name in enumerate(self.series)
        ]
        most = most_points(len(self.series))
        charts = [
            asdict(replace(c, curves=tuple(curve.thinned(most).rounded() for curve in c.curves))) for c in self.charts
        ]
        return embed("charts", {"series": series, "axes": self.axes, "charts": charts})


def most_points(num_series: int) -> int:
    """How many points a curve is drawn by."""
    return max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_A_CHART // num_series))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int) -> str:
    return ("solid", "dashed", "dotted", "double")[number // len(COLOURS) % 4]


def scripts() -> list[str]:
    """The scripts of a page with charts. Raises `UserError` where plotly, which has the first, isn't installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            "the charts need plotly, which is not installed",
            where="--out",
            remedy='pip install "opentau_train[report]" (or: pip install plotly)',
        ) from error
    return [get_plotlyjs(), SCRIPT]
