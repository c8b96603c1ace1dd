"""The DROID recipe learns from its images: blanked, the same budget and seed leave a much larger action error."""

import pytest

from tests import warm
from tests.program import command, environment, metrics

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.long]


@pytest.mark.timeout(1500)
def test_held_out_action_error_is_at_least_thirty_percent_below_the_one_with_blanked_images(tmp_path):
    """Both runs are the recipe in 240 of its 400 steps, side by side, one thread each. The error is the mean absolute
    one of sampled chunks on held-out episodes: joint angles in radians and hand positions in metres."""
    recipe = [
        "+recipe=droid_policy",
        "trainer.steps=240",
        "validation.every=240",
        "validation.evaluator.action.max_samples_per_group=128",
        "data.num_workers=1",
    ]
    variants = {"seen": [], "blanked": ["data.blank_images=true"]}
    running = {}
    try:
        for name, extra in variants.items():
            words = command([*recipe, *extra, f"paths.run_dir={tmp_path / name}"])
            with open(tmp_path / f"{name}.log", "w") as log:
                running[name] = warm.Popen(words, env=environment(), stdout=log, stderr=log)
        for name, process in running.items():
            assert process.wait() == 0, (tmp_path / f"{name}.log").read_text()
    finally:
        for process in running.values():
            process.kill()
    errors = {name: metrics(tmp_path / name)[240] for name in variants}
    for tag in ("Validation-Action/droid/joint/MAE_rad", "Validation-Action/droid_ee/ee/MAE_m"):
        assert errors["seen"][tag] <= 0.7 * errors["blanked"][tag], {n: e[tag] for n, e in errors.items()}
