"""What a training would read, before it starts: one HTML page of a mixture's shares, episodes, rows and pictures.

    python -m opentau_train.tools.inspect +recipe=droid_policy data/augment=droid_cosmos [--out FILE.html] [--force]
    python -m opentau_train.tools.inspect +recipe=lerobot data.sources.main.root=ROOT --out sheet.png --samples 4

Takes the arguments of `python -m opentau_train`. The page has shares of sources, lengths of episodes, histograms of
every dimension raw and normalised with what is far from the rest, what the rows say of the declared conventions, the
split, tasks, duplicates, clips of some episodes, and what the policy sees, as validation and as training do. It needs
no server, no network and no script. A file that ends in .png gets the last of these only.

Of each source it reads the rows of --episodes episodes, of the first dozen sources; the page says what was read.
--rerun FILE.rrd writes the filmed episodes as a recording for the Rerun viewer (pip install "opentau_train[rerun]").
Exit codes: 0, or 2 for a mistake in what was given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from opentau_train import cli
from opentau_train.config.bounds import at_least
from opentau_train.errors import EXIT_OK
from opentau_train.tools.options import Parser
from opentau_train.tools.out import check_absent, check_format, check_page, make_directory, writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("inspect", __doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("inspect.html"), help="the file: .html, or .png (inspect.html)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--samples", type=int, default=4, help="samples to show as the policy sees them (4)")
    parser.add_argument("--episodes", type=int, default=200, help="episodes of each source whose rows are read (200)")
    parser.add_argument("--clips", type=int, default=3, help="episodes of each source that are shown as clips (3)")
    parser.add_argument("--rerun", type=Path, metavar="FILE.rrd", help="write a Rerun recording of those episodes, too")

    def work() -> int:
        write(*parser.parse_known_args(arguments))
        return EXIT_OK

    return cli.answer(work)


def write(options: argparse.Namespace, composed: Sequence[str]) -> None:
    """Write the files that `options` ask for, and say where they are. Raises `UserError`."""
    out, is_page = options.out, options.out.suffix.lower() in (".html", ".htm")
    at_least("--samples", options.samples, 1)
    at_least("--episodes", options.episodes, 1)
    at_least("--clips", options.clips, 0)
    if out.suffix.lower() in (".html", ".htm", ""):
        check_page(out)
    else:
        check_format(out)
    for path, argument in ((out, "--out"), (options.rerun, "--rerun")):
        if path is not None:
            check_absent(path, options.force, argument)
    settings = cli.checked(cli.compose(composed))
    make_directory(out)

    from opentau_train.tools.inspecting import looking
    from opentau_train.tools.inspecting.page import page

    mixture = looking.opened(settings)
    if options.rerun is not None:
        from opentau_train.tools.inspecting.rerun import record

        with writing(options.rerun, "--rerun"):
            options.rerun.parent.mkdir(parents=True, exist_ok=True)
            num = record(mixture, options.clips, options.rerun)
        print(f"{options.rerun.absolute()}  ({num} episodes; open it with: rerun {options.rerun})")
    if is_page:
        text = page(looking.look(settings, mixture, options.samples, options.episodes, options.clips))
        with writing(out):
            out.write_text(text, encoding="utf-8")
        print(f"{out.absolute()}  ({len(text.encode()) / 2**20:.1f} MiB)")
        return
    sheet = looking.sheet(mixture, settings.trainer.global_batch_size, options.samples)
    with writing(out):
        sheet.save(out)
    print(out.absolute())


if __name__ == "__main__":
    cli.end(main())
