"""Write docs/licences.md: the licence of every package that pyproject.toml names, from its own metadata.

    python -m tests.licences

A package that isn't installed here keeps its row; one that never had a row needs it by hand.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "licences.md"
HEAD = """# Licences of dependencies

opentau_train is under Apache-2.0. It contains no code of these packages; they are installed beside it, each under its
own licence. `python -m tests.licences` writes this page from the packages' own metadata; `uv.lock` lists what they
bring in turn.

| package | licence | for |
| --- | --- | --- |
"""


def direct() -> dict[str, list[str]]:
    """{package: the extras that name it}, none for what always comes."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    named: dict[str, list[str]] = {}
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for text in texts:
            name = re.split(r"[<>=!~\[; ]", text)[0]
            if name != "opentau_train":
                named.setdefault(name, []).append(extra)
    return {
        name: [] if "" in extras else extras for name, extras in sorted(named.items(), key=lambda row: row[0].lower())
    }


def licence(name: str) -> str | None:
    """What the package's metadata say, in a few words; None where it isn't installed, or says nothing."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    short = (about["License"] or "").strip()
    return about["License-Expression"] or (short if 0 < len(short) < 40 else None) or ", ".join(classified) or None


def rows() -> dict[str, str]:
    """{package: licence} as the page has it."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", PAGE.read_text() if PAGE.exists() else "", flags=re.M))


def main() -> None:
    known = rows()
    lines = []
    for name, extras in direct().items():
        text = licence(name) or known.get(name, "?")
        lines.append(f"| `{name}` | {text} | {', '.join(extras)} |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
