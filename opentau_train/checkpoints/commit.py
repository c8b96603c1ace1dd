"""The commit protocol: a checkpoint is whole or absent, and the newest whole one is always found.

    checkpoints/{step:08d}.tmp/   every rank writes, every rank acknowledges; then sealed: files.json, and all on disk
    checkpoints/{step:08d}/       renamed: now it is a checkpoint
    checkpoints/last -> {step}    moved after that; only then older ones are pruned

A checkpoint that is whole is never moved to make room for another of its step, so that at every moment the newest one
can be read. Whatever is interrupted leaves a `.tmp` directory, which nothing reads; one that is sealed is committed by
the run that goes on. `files.json` (`manifest`) names every file, so that a directory which lost some of it otherwise (a
full disk, a copy cut short) isn't taken for whole.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from opentau_train.checkpoints import manifest
from opentau_train.checkpoints.manifest import MANIFEST, flush
from opentau_train.errors import UserError

log = logging.getLogger(__name__)

PARTIAL = ".tmp"
"""What the name of a directory ends with that is being written."""
RETIRED = f".old{PARTIAL}"
"""What the name of a directory ends with that is being deleted."""
DAMAGED = ".damaged"
"""What the name of a checkpoint ends with whose bytes are others than were written: it is kept for its owner."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last` (None = all), and every one whose step is a multiple of
    `keep_every`. What a link names (`last`, `best`, `lowest`) stays too: see `publish`."""

    keep_last: int | None = None
    keep_every: int | None = None

    def obsolete(self, names: Collection[str]) -> list[str]:
        """Those of the step-named checkpoints `names` that may go, oldest first."""
        if self.keep_last is None:
            return []
        old = sorted(names, key=int)[: -self.keep_last]
        return [n for n in old if not (self.keep_every and int(n) % self.keep_every == 0)]


def seal(partial: Path, described: Mapping[str, manifest.File] = MappingProxyType({})) -> None:
    """Write the manifest of a directory that all ranks have written, and flush it all to the disk: a rename must not
    survive a power cut that its content did not. `described`: the files whose writers have described them."""
    files = {p.relative_to(partial).as_posix(): p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST}
    rest = manifest.describe(partial, (path for name, path in files.items() if name not in described))
    (partial / MANIFEST).write_text(manifest.to_text({**described, **rest}))
    for path in [*partial.rglob("*"), partial]:
        flush(path)


def publish(partial: Path, retention: Retention) -> list[Path]:
    """Make the sealed directory `{step}.tmp` the last checkpoint, then retire those that `retention` doesn't keep.
    Where the step has a whole checkpoint already, that one stays and the new directory goes.

    Returns what is to be deleted, which `sweep` does: nothing reads it any more. A kill between any two of these
    operations leaves the former checkpoint, or the new one, whole and found.
    """
    folder, final = partial.parent, partial.with_suffix("")
    if flaw(final) is not None:
        if final.exists():  # something else has torn it
            _retire(final)
        partial.rename(final)
        flush(folder)
    point(folder / "last", final.name)
    named = {os.readlink(link) for link in folder.iterdir() if link.is_symlink()}  # last, best, lowest
    for name in retention.obsolete([p.name for p in complete(folder)]):
        if name not in named:
            _retire(folder / name)
    return list(folder.glob(f"[0-9]*{PARTIAL}"))  # of kills too, now that nothing is being written


def take_up(folder: Path) -> None:
    """Commit the newest checkpoint of a `checkpoints/` directory that a run had written and sealed when it was killed,
    before it could commit it. For who holds the run's lock: nobody else writes there."""
    if (partial := _sealed(folder)) is not None:
        publish(partial, Retention())
        log.warning("%s was written when the run was killed, and is committed now", partial.with_suffix(""))


def _sealed(folder: Path) -> Path | None:
    """The newest directory that is sealed, where it is newer than all whole checkpoints."""
    whole = complete(folder)
    newer = int(whole[-1].name) + 1 if whole else 0
    partials = [p for p in folder.glob(f"[0-9]*{PARTIAL}") if p.stem.isdigit() and int(p.stem) >= newer]
    sealed = [p for p in partials if manifest.loss(p) is None]
    return max(sealed, key=lambda p: int(p.stem), default=None)


def amend(checkpoint: Path, name: str, text: str) -> None:
    """Replace the small file `name` of a whole checkpoint. A kill leaves it whole, with the old file or the new one."""
    others = {file: entry for file, entry in manifest.read(checkpoint).items() if file != name}
    _replace(checkpoint / MANIFEST, manifest.to_text(others))
    _replace(checkpoint / name, text)
    _replace(checkpoint / MANIFEST, manifest.to_text(others | manifest.describe(checkpoint, [checkpoint / name])))


def sweep(paths: Collection[Path]) -> None:
    """Delete what `publish` left over. It may take seconds for large files, and a thread may do it."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def point(link: Path, target: str) -> None:
    """Move the relative symlink `link` to its sibling `target` in one operation."""
    fresh = link.with_name(link.name + PARTIAL)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _retire(path: Path) -> None:
    """A kill in the middle of the deletion must not leave half a checkpoint with a good name."""
    doomed = path.with_name(path.name + RETIRED)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)


def _replace(path: Path, text: str) -> None:
    """Give the file `path` another content in one operation, when that content is on the disk."""
    fresh = path.with_name(path.name + PARTIAL)
    fresh.write_text(text)
    flush(fresh)
    os.replace(fresh, path)
    flush(path.parent)


# -- which one -------------------------------------------------------------------------------------------------------


def flaw(path: Path) -> str | None:
    """Why the directory `path` is no whole checkpoint; None when it is one."""
    if path.name.endswith(RETIRED):
        return "it was being deleted"
    loss = manifest.loss(path)
    if not path.name.endswith(PARTIAL):
        return loss
    if loss is not None:
        return "its save did not finish"
    return f"its save was stopped just before the end; all is there, so rename it to {path.stem} to use it"


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a `checkpoints/` directory, oldest first."""
    whole = [p for p in folder.glob("[0-9]*") if p.name.isdigit() and flaw(p) is None]
    return sorted(whole, key=lambda p: int(p.name))


def last_good(folder: Path) -> str:
    """In words, what a run goes on from after an error."""
    whole = complete(folder)
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for whole; returns where it is now."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    return aside


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a `checkpoints/` directory; what is newer and isn't whole is logged."""
    whole = complete(folder)
    step = int(whole[-1].name) if whole else -1
    for path in sorted(folder.glob("[0-9]*")):
        number = path.name.split(".")[0]
        if number.isdigit() and int(number) > step and not path.name.endswith(DAMAGED):
            log.warning("skipped %s: %s", path, flaw(path))
    return whole[-1] if whole else None


def resolve(resume: str, run_dir: Path | None) -> Path | None:
    """The checkpoint that `resume` names: never -> None, auto -> the newest whole one of `run_dir` (or None), else a
    checkpoint's or a run's path.

    Raises `UserError` where there is none at a given path, and where going on from it would write over newer ones: two
    histories in one directory, of which resume=auto would take the wrong one.
    """
    if resume == "auto":
        return newest(run_dir / "checkpoints") if run_dir is not None else None
    checkpoint = None if resume == "never" else at(resume, ", auto or never")
    if run_dir is None and checkpoint is not None:
        run_dir = checkpoint.parent.parent
    existing = complete(run_dir / "checkpoints") if run_dir is not None else []
    if existing and (checkpoint is None or existing[-1].resolve() != checkpoint):
        raise UserError(
            f"the run directory already has a checkpoint of step {int(existing[-1].name)}",
            where=f"paths.run_dir={run_dir}",
            remedy="add resume=auto to continue it, or choose another paths.run_dir",
        )
    return checkpoint


def at(given: str, others: str = "") -> Path:
    """The whole checkpoint that a path names: its own, or the newest one of a run. Raises `UserError`; its remedy names
    the `others` that may be given, too."""
    path = Path(given).expanduser().resolve()
    if (path / "run.json").is_file():
        if (why := flaw(path)) is not None:
            raise UserError(
                f"the checkpoint is not whole: {why}",
                where=given,
                remedy="give its run directory, whose newest whole one is taken",
            )
        return path
    if (inside := newest(path / "checkpoints")) is not None:
        return inside
    raise UserError(
        "no complete checkpoint there",
        where=given,
        remedy=f"give a run directory, a checkpoint directory RUN/checkpoints/STEP{others}",
    )
