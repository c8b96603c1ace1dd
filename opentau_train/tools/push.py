"""Publish a trained policy on the Hugging Face Hub, where `load_policy("OWNER/NAME")` finds it.

    python -m opentau_train.tools.push checkpoint=runs/droid repo=me/droid_policy
    python -m opentau_train.tools.push checkpoint=runs/droid/checkpoints/best repo=me/droid weights=ema private=true

What is sent: policy.safetensors, one file as `tools.export` makes it, whose actions are compared with the checkpoint's
before anything leaves; README.md, a model card with the data, their shares, the normalisation, the convention and the
held-out losses; with state=true all of the checkpoint too, below `training_state/`, for whoever trains on. One commit.

    checkpoint=RUN     a run (its newest checkpoint), or one of its checkpoints
    repo=OWNER/NAME    made where it isn't there
    weights=model      or ema, the moving average
    private=false      who sees a repository that is made now
    state=false        send the checkpoint itself too: parameters, moments, the place in the data
    licence=NAME       an identifier of the Hub's list, such as apache-2.0; stands in the model card
    revision=BRANCH    another one than main; it must be there
    base=PATH          where frozen weights that the checkpoint leaves out lie now
    trust=[MODULE]     modules whose classes the checkpoint may name

The token is `hf auth login`'s, or the variable HF_TOKEN's. Exit codes: 0; 1 where the file's actions aren't the
checkpoint's; 2 for a mistake, and where the Hub refuses.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opentau_train.errors import EXIT_OK, UserError
from opentau_train.threads import first_line
from opentau_train.tools.options import answer, parse

POLICY = "policy.safetensors"


@dataclass(frozen=True)
class PushSettings:
    checkpoint: str
    repo: str
    weights: Literal["model", "ema"] = "model"
    private: bool = False
    state: bool = False
    licence: str = ""
    revision: str = "main"
    base: str | None = None
    trust: tuple[str, ...] = ()

    def check(self, path: str) -> None:
        if self.repo.count("/") != 1:
            raise UserError(f"'{self.repo}' names no repository", where="repo", remedy="give repo=OWNER/NAME")


def push(settings: PushSettings) -> str:
    """Make the files and send them in one commit; returns the commit's URL. Raises `UserError` where the checkpoint
    can't be read or the Hub refuses, RuntimeError where the file's policy predicts other actions."""
    from opentau_train import strangers
    from opentau_train.checkpoints import commit  # imports torch, as those below do: only once the settings hold
    from opentau_train.checkpoints.card import FOLDER, read_card
    from opentau_train.checkpoints.contents import RUN
    from opentau_train.checkpoints.pretrained import whole
    from opentau_train.deploy.model_card import model_card
    from opentau_train.deploy.policy import load_policy
    from opentau_train.tools.export import ExportSettings, export

    checkpoint = commit.at(settings.checkpoint)
    with tempfile.TemporaryDirectory(prefix="opentau_train_push_") as folder:
        file = Path(folder, POLICY)
        out = ExportSettings(
            str(checkpoint), str(file), "safetensors", settings.weights, None, settings.base, settings.trust
        )
        export(out)
        card = whole(read_card(checkpoint / FOLDER, settings.trust))
        policy = load_policy(file, trust=settings.trust)
        text = model_card(settings.repo, checkpoint, settings.weights, card, policy, settings.licence)
        Path(folder, "README.md").write_text(text, encoding="utf-8")
        return _send(settings, Path(folder), checkpoint, int(strangers.read_mapping(checkpoint / RUN)["step"]))


def _send(settings: PushSettings, folder: Path, checkpoint: Path, step: int) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub

    from opentau_train.checkpoints.weight_files import STATE

    files = {path.name: path for path in folder.iterdir()}
    if settings.state:
        inside = (path for path in checkpoint.rglob("*") if path.is_file())
        files |= {f"{STATE}/{path.relative_to(checkpoint).as_posix()}": path for path in inside}
    refusals = hub.HfHubHTTPError, hub.HFValidationError, hub.OfflineModeIsEnabled, hub.LocalTokenNotFoundError
    try:
        api = HfApi(library_name="opentau_train")
        repo = api.create_repo(settings.repo, private=settings.private, exist_ok=True).repo_id
        done = api.create_commit(
            repo,
            [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())],
            commit_message=f"Policy of step {step:,}, {settings.weights} weights",
            revision=settings.revision,
        )
    except (*refusals, OSError, ValueError, RuntimeError) as error:
        # RuntimeError and ValueError are what its client raises for a broken upload and an answer that is none.
        raise UserError(
            f"the Hugging Face Hub didn't take the policy: {first_line(error)}",
            where=f"repo={settings.repo}",
            remedy="check the name, the network, and the token: hf auth login, or HF_TOKEN",
        ) from error
    return str(done.commit_url)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""

    def work(given: Sequence[str]) -> int:
        settings = parse(given, PushSettings)
        url = push(settings)
        print(f"{url}\nload_policy({settings.repo!r}) finds it")
        return EXIT_OK

    return answer(__doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
