"""docs/configuration.md, made from the settings' own words: `python -m tests.docs.configuration` writes it."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from opentau_train import cli
from opentau_train.config.reference import Key, as_tables, groups, keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
CONF = PAGE.parents[1] / "conf"
HEAD = """\
# Configuration

All keys of a run with their types and defaults, as `python -m opentau_train --help` prints them. `--help data.sources`
narrows it, and other arguments count: `--help model model=pi0` shows that model's keys. A key is set by `KEY=VALUE`, a
group's option chosen by `GROUP=OPTION`, a recipe added by `+recipe=NAME`.

What comes later wins: a group's own file, then the recipe, then what the file of an option says that the command line
chooses in place of the recipe's, then the command line's values. So `validation=none` is no validation with any recipe,
and `optimizer=muon` has the rate of its own file; an option that the recipe has anyway keeps the recipe's numbers.

This page is made from the settings' own words by `python -m tests.docs.configuration`; a test compares it with them.

## Groups

```
{groups}
```
"""


def found(*words: str) -> list[Key]:
    tree = cli.compose(list(words))
    return keys({**tree, "paths": {}}, HydraConfig.get().runtime.choices)


def page() -> str:
    usual = found()
    text = HEAD.format(groups=groups()) + as_tables(usual)
    said = {key.path for key in usual}
    # Files of classes: the others have the keys of the file that they begin from. One of each group at a time.
    options = {
        group: sorted(file.stem for file in (CONF / group).glob("*.yaml") if "_target_" in file.read_text())
        for group in ("model", "optimizer", "scheduler", "logger")
    }
    besides = dict.fromkeys(options, "")
    for row in zip_longest(*options.values()):
        chosen = {group: option for group, option in zip(options, row, strict=True) if option is not None}
        now = found(*(f"{group}={option}" for group, option in chosen.items()))
        for group, option in chosen.items():
            others = [key for key in now if key.path not in said and key.path.startswith(f"{group}.")]
            if others:
                said |= {key.path for key in others}
                besides[group] += as_tables(others).replace(f"## {group}", f"## {group}={option}, besides")
    return text + "".join(besides.values()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
