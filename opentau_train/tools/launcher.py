"""Copy the launchers, and the documentation, out of the installed package to a directory of your own.

    opentau-train launcher --copy DIR            DIR/launchers: torchrun, SLURM, Kubernetes, SkyPilot
    opentau-train launcher --copy DIR --docs     DIR/docs too

Files that are there already stay, and are named; --force replaces them. Exit codes: 0, or 2 for a mistake.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import opentau_train
from opentau_train import cli
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.tools.out import writing

PACKAGE = Path(opentau_train.__file__).parent
EXECUTABLE = (".sh", ".sbatch")


def shipped(name: str) -> Path:
    """The directory `name`, of the installed package or of the checkout that the package is used from."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def files_of(name: str) -> list[Path]:
    """The files below it, relative to it, sorted."""
    folder = shipped(name)
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def copy(name: str, into: Path, force: bool) -> list[Path]:
    """Copy the directory `name` to `into`/`name`; the files written. Raises `UserError` before it writes anything."""
    pairs = [(shipped(name) / file, into / name / file) for file in files_of(name)]
    differ = [new for old, new in pairs if new.exists() and new.read_bytes() != old.read_bytes()]
    if differ and not force:
        raise UserError(
            f"{differ[0]} is there and differs" + f", as do {len(differ) - 1} more" * (len(differ) > 1),
            where="--copy",
            remedy="name another directory, or replace them with --force",
        )
    for old, new in pairs:
        with writing(new, "--copy"):
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)
            if new.suffix in EXECUTABLE:
                new.chmod(new.stat().st_mode | 0o111)
    return [new for _, new in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="opentau-train launcher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copy", type=Path, required=True, metavar="DIR", help="the directory to copy into")
    parser.add_argument("--docs", action="store_true", help="copy the documentation too")
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    options = parser.parse_args(arguments)

    def work() -> int:
        for name in ("launchers", *(("docs",) if options.docs else ())):
            written = copy(name, options.copy, options.force)
            print(f"{options.copy / name}: {len(written)} files")
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
