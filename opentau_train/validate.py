"""Validate a checkpoint by itself, on any number of processes and any mixture:

    python -m opentau_train.validate checkpoint=RUN [out=FILE] [data=NAME] [KEY=VALUE ...]
    torchrun --nproc-per-node 4 -m opentau_train.validate checkpoint=RUN/checkpoints/00001000

The checkpoint's own configuration says what is validated; `data=NAME` takes other sources, `KEY=VALUE` changes a
setting, for instance `validation.metrics=[action]`. The same passes as in training run; they write `validation.json` in
the checkpoint's directory, or to `out`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from opentau_train import cli, config
from opentau_train.errors import EXIT_OK, UserError

FIXED = ("model", "optimizer", "scheduler", "resume", "logger")
"""What the checkpoint alone decides, or what no validation uses."""


def main() -> None:
    """Parse the command line, validate, and end the process with the exit codes of `errors`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(EXIT_OK)
    cli.end(cli.answer(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Validate as the command line's `arguments` say. Raises `UserError` for mistakes, on all ranks alike."""
    own = dict(a.split("=", 1) for a in arguments if a.startswith(("checkpoint=", "out=")))
    others = [a for a in arguments if not a.startswith(("checkpoint=", "out="))]
    if "checkpoint" not in own:
        raise UserError("no checkpoint is given", remedy="add checkpoint=RUN or checkpoint=RUN/checkpoints/STEP")
    # They import torch: --help and a mistyped command don't wait for it.
    from opentau_train import commit, standalone
    from opentau_train.pretrained import FOLDER, read_card

    try:
        found = commit.resolve(own["checkpoint"], None)
        assert found is not None
    except UserError as error:
        remedy = "give a run directory or one of its checkpoints: checkpoint=RUN/checkpoints/STEP"
        raise UserError(error.what, where=f"checkpoint={own['checkpoint']}", remedy=remedy) from error
    card = read_card(found / FOLDER)
    tree = cli.recompose(card.config, others, FIXED)
    out = Path(own["out"]).expanduser() if "out" in own else found / "validation.json"
    standalone.validate_checkpoint(config.load(tree), tree, found, card, out)
    return EXIT_OK


if __name__ == "__main__":
    main()
