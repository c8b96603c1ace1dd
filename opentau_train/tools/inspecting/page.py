"""The page on a mixture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opentau_train.data.lint.finding import Finding
from opentau_train.data.lint.judge import Judged
from opentau_train.data.lint.report import QUIET
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.mixture.split import ranges
from opentau_train.data.order.tape import Tape
from opentau_train.pages.document import Html, document, facts, joined, paragraph, picture, section, table, tag
from opentau_train.tools.inspecting.clips import Episode
from opentau_train.tools.inspecting.figures import NAMED, of_dimensions, of_films, of_lengths
from opentau_train.tools.inspecting.rows import Read
from opentau_train.tools.plan import sources_table

MOST_TASKS = 40
_STYLE = """
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; } details { margin: 0 0 1rem; }
.share { height: .8rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.film { display: flex; gap: .5rem; align-items: flex-start; } .film img:last-child { min-width: 0; flex: 1 1 auto; }
.samples { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
"""
_ANSWERS = {"contradiction": "bad", "doubt": "doubt", "agree": "good", "note": "", "unknown": "doubt"}


@dataclass(frozen=True)
class Inspected:
    """What the page is of: the mixture and its tape, `epochs` that the training takes; by dataset what was `read` of
    its rows and the episodes that were `filmed`; what was `judged` of the conventions, or why nothing was; pictures of
    `samples` as the policy sees them, or why there are none; how values were normalised, and which datasets weren't
    read."""

    title: str
    mixture: Mixture
    tape: Tape
    epochs: float
    read: Mapping[str, Read]
    filmed: Mapping[str, Sequence[Episode]]
    judged: Mapping[str, Judged] | str
    samples: Sequence[NDArray[np.uint8]] | str
    normalised_by: str
    left_out: Sequence[str]


def page(of: Inspected) -> str:
    """The whole page."""
    datasets, method = of.mixture.datasets, of.mixture.settings.normalization
    films = [of_films(name, episodes) for name, episodes in of.filmed.items()]
    parts = [
        tag("h1", of.title),
        paragraph(
            "What a training would read: shares, episodes, rows, conventions and pictures, before it starts. Nothing "
            "here was trained; all of it was read from the dataset's files."
        ),
        facts(_what_was_read(of)),
        section("Sources", _sources(of), _groups(of)),
        section("Findings", _doubts(of), _findings(of.judged)),
        section("What the policy sees", _samples(of.samples)),
        section("Episodes", tag("div", joined(map(of_lengths, datasets)), class_="plots")),
        section("Split and frames in use", _split(datasets)),
        section("Tasks", _tasks(of.read)),
        section(
            "State and actions",
            paragraph(_DIMENSIONS),
            joined(of_dimensions(name, read, method) for name, read in of.read.items()),
        ),
        section("Clips", paragraph(_CLIPS), *films) if any(films) else "",
    ]
    return document(of.title, parts, style=_STYLE)


_DIMENSIONS = (
    "Left: in the dataset's units, after its transforms. Right: normalised, as the policy sees it, all on one scale; "
    "what is beyond stands at the ends. A dimension squeezed into the middle has few far values that set its scale. "
    "Red marks: values further from the middle 98 % than that is wide, by episode."
)
_CLIPS = (
    "Whole episodes, shortened to a few frames that are evenly over them, in their order; beside each some of them."
)


def _what_was_read(of: Inspected) -> dict[str, object]:
    told = {
        name: f"{read.num_rows:,} rows of {len(read.episodes):,} of "
        f"{len(_dataset(of, name).source.episodes):,} episodes, evenly over the dataset"
        for name, read in of.read.items()
    }
    rest = {"not read": ", ".join(of.left_out) + ": metadata only"} if of.left_out else {}
    return {**{f"rows of {name}": text for name, text in told.items()}, **rest, "normalised by": of.normalised_by}


def _dataset(of: Inspected, name: str) -> Dataset:
    return next(d for d in of.mixture.datasets if d.name == name)


def _sources(of: Inspected) -> Html:
    head, *rows = sources_table(of.mixture, of.tape, of.epochs)
    bars = [
        tag("div", class_="share", style=f"width:{100 * drawn / of.tape.epoch_size:.2f}%") for drawn in of.tape.draws
    ]
    cameras = [", ".join(d.source.cameras) or "none" for d in of.mixture.datasets]
    rates = [f"{d.settings.fps or d.source.fps:g} fps" for d in of.mixture.datasets]
    return table(
        [*head, "", "rate", "cameras"],
        [[*row, tag("div", bar, style="width:8rem"), *more] for row, bar, *more in zip(rows, bars, rates, cameras)],
    )


def _groups(of: Inspected) -> Html:
    """A row for each (dataset, control mode): what is trained and validated, and whose statistics normalise it."""
    rows = []
    for d in of.mixture.datasets:
        for g in np.unique(d.group_of).tolist():
            group, own = of.mixture.groups[g], d.group_of == g
            windows = int(d.train.length[own[d.train.episode]].sum())
            rows.append(
                [d.name, group.control_mode, group.norm_head, int(own.sum()), int((own & d.held_out).sum()), windows]
            )
    return table(["dataset", "control mode", "norm head", "episodes", "held out", "training windows"], rows)


def _doubts(of: Inspected) -> Html:
    """What was found in the rows that were read, as sentences; the worst first."""
    lines = []
    for name, read in of.read.items():
        if read.not_finite:
            lines.append(tag("p", f"{name}: NaN or infinities in episodes {ranges(read.not_finite)}", class_="bad"))
        for same in read.identical:
            lines.append(
                tag("p", f"{name}: the rows of episodes {', '.join(map(str, same))} are identical", class_="bad")
            )
        flat = [d.name for d in (*read.state, *read.actions) if d.is_constant]
        if flat:
            lines.append(tag("p", f"{name}: constant in all rows that were read: {', '.join(flat)}", class_="doubt"))
        far = Counter({o.episode: 0 for d in (*read.state, *read.actions) for o in d.outliers})
        far.update(o.episode for d in (*read.state, *read.actions) for o in d.outliers)
        if far:
            worst = "; ".join(f"episode {e}: {n} dimensions" for e, n in far.most_common(2 * NAMED))
            lines.append(tag("p", f"{name}: far from the rest: {worst}", class_="doubt"))
    return joined(lines)


def _findings(judged: Mapping[str, Judged] | str) -> Html:
    """What the rows say of the declared conventions: what contradicts them, and behind a fold what agrees."""
    if isinstance(judged, str):
        return tag("p", f"The rows couldn't be held against what is declared of them: {judged}", class_="bad")
    wrong, rest = [], []
    for name, of_source in judged.items():
        for verdict in of_source.verdicts:
            finding, answer = verdict.finding, verdict.answer
            if answer == "unknown" or (finding.value in QUIET and answer in ("agree", "note")):
                continue
            value = f"{'likely ' * (finding.confidence < 1)}{finding.value}"
            declared = "" if verdict.declared is None else str(verdict.declared)
            marked = tag("span", answer, class_=_ANSWERS[answer])
            row = [name, finding.name, _dims(finding), value, declared, marked, finding.evidence]
            if answer in ("contradiction", "doubt"):
                wrong.append((answer, [*row, verdict.remedy]))
            else:
                rest.append(row)
    if not wrong and not rest:
        return (
            paragraph("Too few rows were read to say anything of units, references and grippers.") if judged else Html()
        )
    head = ["source", "what", "of", "the rows say", "declared", "", "evidence"]
    wrong.sort(key=lambda pair: pair[0])
    parts = [table([*head, "remedy"], [row for _, row in wrong])] if wrong else []
    parts += [tag("p", "to declare: ", tag("code", j.declare)) for j in judged.values() if j.declare]
    if not wrong:
        parts.append(tag("p", "Nothing in the rows contradicts what is declared of them.", class_="good"))
    unknown = sum(v.answer == "unknown" for j in judged.values() for v in j.verdicts)
    told = f"{len(rest)} more: what agrees or is noted; {unknown} things can't be told from these rows"
    return joined([*parts, tag("details", tag("summary", told), table(head, rest))])


def _dims(finding: Finding) -> str:
    dims = finding.dims
    return ", ".join(dims) if len(dims) <= NAMED else f"{dims[0]} to {dims[-1]} ({len(dims)})"


def _samples(samples: Sequence[NDArray[np.uint8]] | str) -> Html:
    if isinstance(samples, str):
        return paragraph(samples)
    pictures = []
    for number, pixels in enumerate(samples):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "WEBP", lossless=True)
        pictures.append(picture(content.getvalue(), "webp", f"sample {number} of the run"))
    return joined(
        [
            paragraph(
                "The first samples of the run, a row for each camera: as validation sees them, and as training does."
            ),
            tag("div", *pictures, class_="samples"),
        ]
    )


def _split(datasets: Sequence[Dataset]) -> Html:
    """Which episodes are held out, and which part of the frames a keep-ranges filter leaves."""
    rows = []
    for d in datasets:
        table_ = d.source.episodes
        blocks = d.source.get_shuffle_blocks()
        kept = np.bincount(blocks[:, 0], weights=blocks[:, 2], minlength=len(table_))
        share = kept.sum() / max(1, table_.length.sum(dtype=np.int64))
        none = table_.episode_index[kept == 0]
        filtered = "all" if share == 1 else f"{share:.1%} in {len(blocks):,} runs"
        rows.append(
            [
                d.name,
                int((~d.held_out).sum()),
                int(d.held_out.sum()),
                _shortened(ranges(table_.episode_index[d.held_out].tolist()) or "none"),
                filtered,
                _shortened(ranges(none.tolist())) if len(none) else "none",
            ]
        )
    return table(["source", "training", "held out", "held-out episodes", "frames in use", "episodes without any"], rows)


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most].rpartition(',')[0]}, ..."


def _tasks(read: Mapping[str, Read]) -> Html:
    """The tasks of each source, the most frequent first."""
    rows, left = [], 0
    for name, own in read.items():
        told = sorted(own.tasks.items(), key=lambda pair: (-pair[1], pair[0]))
        rows += [[name, text, num] for text, num in told[:MOST_TASKS]]
        left += len(told[MOST_TASKS:])
    more = [paragraph(f"{left} more tasks are left out.")] if left else []
    return joined([table(["source", "task", "of the episodes read"], rows), *more]) if rows else Html()
