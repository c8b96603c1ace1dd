"""A validation pass as a table: a line a group, its losses with their errors and changes, its action errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

VALIDATION, ACTION = "Validation/", "Validation-Action/"
NORM_HEAD = "::"
"""Stands in the names of norm heads, `robot::control_mode`."""
SHOWN = (VALIDATION, ACTION)
"""What the tags begin with that a table shows."""
MIXTURE, CHANCE = "mixture", "by chance"
"""What the lines of the mixture and of guessing are called."""
LOSS = "Loss"
GAP, DECIMALS = 2, 5
"""Spaces between columns, and the most digits behind a point."""

Column = list[str]
"""A title and a cell a line; the last lines' may be left out."""


@dataclass(frozen=True)
class Score:
    """One number of a validation pass: `group` is `dataset/control_mode`, "" for the mixture; `num` and `stderr` are
    None where the row doesn't tell them."""

    group: str
    term: str
    value: float
    num: float | None
    stderr: float | None

    @property
    def tag(self) -> str:
        """Its tag without the prefix."""
        return f"{self.group}/{self.term}" if self.group else self.term


def read_scores(row: Mapping[str, float]) -> list[Score]:
    """The losses among the tags of a row, in its order; `/N` and `/StdErr` tags belong to the score before them."""
    scores = []
    for tag, value in row.items():
        if tag.startswith(VALIDATION) and not tag.endswith(("/N", "/StdErr")):
            group, _, term = tag.removeprefix(VALIDATION).rpartition("/")
            scores.append(Score(group, term, value, row.get(f"{tag}/N"), row.get(f"{tag}/StdErr")))
    return scores


def headline(row: Mapping[str, float], before: Mapping[str, float] = {}, changes: Mapping[str, float] = {}) -> str:
    """The loss of a pass over the whole mixture, and its change as `table` has it; "" where it wasn't measured."""
    loss = next((s for s in read_scores(row) if (s.group, s.term) == ("", LOSS)), None)
    if loss is None:
        return ""
    change = _change_of(loss, before, changes)
    return f"loss {_digits(loss.value)}{change and f', change {change}'}"


def table(
    row: Mapping[str, float],
    before: Mapping[str, float] = {},
    changes: Mapping[str, float] = {},
    chance: Mapping[str, float] = {},
    width: int = 80,
) -> str:
    """An aligned table, one line a group and the mixture last, whose loss is the `headline`'s: N, each term with its
    standard error and its change against `before` (the row of the last pass), then the mean action errors by unit.
    Columns that don't fit in `width` stand below, beside the groups' names again.

    `changes` {tag: change, tag/StdErr: its standard error} have these from paired differences; `chance` {term: what
    guessing costs}. A norm head has a line where it is of several groups: that of a single one would say the same
    again.
    """
    scores, actions = [s for s in read_scores(row) if (s.group, s.term) != ("", LOSS)], _actions(row)
    groups = _groups(scores, actions)
    sections = [_num_column(scores, groups)] if any(s.num is not None for s in scores) else []
    known = {(s.group, s.term): s for s in scores}
    chance = {term: cost for term, cost in chance.items() if any(s.term == term for s in scores)}
    for term in dict.fromkeys(s.term for s in scores):
        cells = [known.get((group, term)) for group in groups]
        sections.append(_term_columns(term, cells, (before, changes), chance))
    last = _actions(before)
    for title in dict.fromkeys(title for of in actions.values() for title in of):
        own = [(actions.get(group, {}).get(title), last.get(group, {}).get(title)) for group in groups]
        sections.append(_action_columns(title, own))
    names = ["group", *(group or MIXTURE for group in groups), CHANCE]
    return "\n".join(_lines(names, sections, width))


def _groups(scores: Sequence[Score], actions: Mapping[str, object]) -> list[str]:
    """The groups that have a line, the mixture last."""
    numbers: dict[str, list[tuple[str, float, float | None]]] = {}
    for s in scores:
        numbers.setdefault(s.group, []).append((s.term, s.value, s.stderr))
    own = [one for group, one in numbers.items() if NORM_HEAD not in group]
    told = [group for group, one in numbers.items() if NORM_HEAD not in group or one not in own]
    return sorted({*told, *actions}, key=lambda group: (group == "", group))


def _actions(row: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{group: {title: number}} of the action errors: the mean error a unit, and the share of steps at which the
    grippers agree."""
    found: dict[str, dict[str, float]] = {}
    agree: dict[str, list[float]] = {}
    for tag, value in row.items():
        parts = tag.removeprefix(ACTION).split("/")
        if not tag.startswith(ACTION) or value is None:
            continue
        if parts[-1] == "Agreement":
            agree.setdefault("/".join(parts[:-2]), []).append(value)
        elif parts[-1].startswith("MAE") and f"{tag}/First" in row and parts[-1] != "MAE_gripper":
            unit = parts[-1].partition("_")[2].replace("_s", "/s")
            found.setdefault("/".join(parts[:-1]), {})[f"error, {unit}" if unit else "action error"] = value
    for group, shares in agree.items():
        found.setdefault(group, {})["gripper agrees"] = sum(shares) / len(shares)
    return found


def _num_column(scores: Sequence[Score], groups: Sequence[str]) -> list[Column]:
    nums = {group: [s.num for s in scores if s.group == group and s.num is not None] for group in groups}
    return [["N", *(f"{max(of):.0f}" if (of := nums[group]) else "" for group in groups)]]


def _term_columns(
    term: str, cells: Sequence[Score | None], earlier: tuple[Mapping[str, float], Mapping[str, float]],
    chance: Mapping[str, float],
) -> list[Column]:  # fmt: skip
    values = ["" if s is None else _with_error(_digits(s.value), s.stderr) for s in cells]
    changed = ["" if s is None else _change_of(s, *earlier) for s in cells]
    guessed = [_digits(chance[term])] if term in chance else []
    return [[term, *values, *guessed], *([["change", *changed]] if any(changed) else [])]


def _change_of(score: Score, before: Mapping[str, float], changes: Mapping[str, float]) -> str:
    tag = VALIDATION + score.tag
    paired, last = changes.get(f"{tag}/StdErr"), before.get(tag)
    if paired is not None:
        return _with_error(_signed(changes[tag], paired), paired)
    return "" if last is None else _signed(score.value - last)


def _action_columns(title: str, cells: Sequence[tuple[float | None, float | None]]) -> list[Column]:
    form = (lambda x: f"{x:.1%}") if title == "gripper agrees" else _digits
    values = [title, *("" if now is None else form(now) for now, _ in cells)]
    changed = ["change", *("" if None in pair else _signed(pair[0] - pair[1]) for pair in cells)]  # type: ignore[operator]
    return [values, changed] if any(changed[1:]) else [values]


def _digits(value: float) -> str:
    """Four significant digits, zeros at the end included."""
    return f"{value:#.4g}".removesuffix(".") if math.isfinite(value) else str(value)


def _places(value: float, digits: int) -> int:
    """How many places behind the point show so many significant digits of `value`, `DECIMALS` at most."""
    if not math.isfinite(value) or value == 0:
        return DECIMALS
    return min(DECIMALS, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def _with_error(text: str, error: float | None) -> str:
    return text if error is None else f"{text}±{error:.{_places(error, 2)}f}"


def _signed(value: float, error: float | None = None) -> str:
    """A change, as exact as its error, or to three digits."""
    return f"{value:+.{_places(value, 3) if error is None else _places(error, 2)}f}"


def _lines(names: Column, sections: Sequence[Sequence[Column]], width: int) -> Iterator[str]:
    """Blocks of lines, in each as many of the sections as fit, one at least."""
    block: list[Column] = []
    for section in sections:
        if block and sum(GAP + max(map(len, c)) for c in [names, *block, *section]) - GAP > width:
            yield from _aligned([names, *block])
            block = []
        block += section
    yield from _aligned([names, *block])


def _aligned(columns: Sequence[Column]) -> Iterator[str]:
    """The lines that have any cell, the titles' first."""
    widths = [max(map(len, column)) for column in columns]
    columns = [[*column, *[""] * (len(columns[0]) - len(column))] for column in columns]
    for name, *cells in zip(*columns, strict=True):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        if any(cells):
            yield (" " * GAP).join([name.ljust(widths[0]), *padded]).rstrip()
