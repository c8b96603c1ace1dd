"""The bugs: one changed expression each, of the kinds that a training run survives without a word."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """In the package's `file`, `before` (which it has once) becomes `after`: what is then wrong is its `name`."""

    file: str
    name: str
    before: str
    after: str


WINDOWS, NEAR = "data/order/windows.py", "data/lerobot/near_frames.py"
STEP, SUMS, TAPE, BLOCKS = "step.py", "metrics/sums.py", "data/order/tape.py", "data/order/blocks.py"
CHUNK, HEADS, NORMALIZE = "data/chunk.py", "data/mixture/heads.py", "data/mixture/normalize.py"
ENDS, STORED, TALLY = "data/mixture/ends.py", "data/mixture/stored.py", "data/mixture/tally.py"
AFFINE, SPLIT, SAMPLES = "data/transforms/normalize.py", "data/mixture/split.py", "data/load/samples.py"
SHAPE, INPUTS, COMMIT = "data/transforms/shape.py", "models/inputs.py", "checkpoints/commit.py"
LOSSES, PLAN, EVALUATOR = "validation/losses.py", "validation/plan.py", "validation/evaluator.py"
AVERAGE, OPTIM = "models/average.py", "optim.py"

MUTANTS = [
    Mutant(STEP, "gradients are averaged over ranks", "loss = world.data_size * sum(", "loss = sum("),
    Mutant(STEP, "a denominator off by one", "(counts[k] or 1.0) for", "(counts[k] + 1.0) for"),
    Mutant(STEP, "a term's weight is lost", "sum(weights[k] * terms[k][0]", "sum(terms[k][0]"),
    Mutant(STEP, "clipping is ignored", 'limit if limit is not None else float("inf"))', 'float("inf"))'),
    Mutant(
        STEP,
        "updates on infinite gradients",
        "_update(state, torch.isfinite(grad_norm), lr)",
        "_update(state, torch.ones_like(grad_norm, dtype=torch.bool), lr)",
    ),
    Mutant(STEP, "the schedule is ignored", "    set_lr(state.optimizer, lr)\n", "    set_lr(state.optimizer, 1e-4)\n"),
    Mutant(STEP, "sums are unweighted", "(sums * weight, count * weight)", "(sums, count * weight)"),
    Mutant(STEP, "micro-batches drop alike", "state.step, world.rank, i)", "state.step, world.rank)"),
    Mutant(STEP, "steps drop alike", '"ambient", state.step, world', '"ambient", 0, world'),
    Mutant(STEP, "gradients pile up", "    state.optimizer.zero_grad(set_to_none=True)\n", ""),
    Mutant(STEP, "skips in a row never end", "(in_a_row + 1) * skip", "in_a_row + skip"),
    Mutant(STEP, "the average takes what isn't finite", "state.policy, finite, step=", "state.policy, None, step="),
    Mutant(STEP, "one skipped step more", "in_a_row >= limit", "in_a_row > limit"),
    Mutant(STEP, "one bad window less", "bad > limits.grace and", "bad >= limits.grace and"),
    Mutant(STEP, "only the first micro-batch's losses", "        if not blank:\n", "        if i == 0:\n"),
    Mutant(SUMS, "totals depend on the order", "torch.round(sums.double() / QUANTUM) * QUANTUM", "sums.double()"),
    Mutant(SUMS, "the second term counts for the first", "pairs[:, k, column] =", "pairs[:, 0, column] ="),
    Mutant(SUMS, "a biased standard error", "num / (num - 1) * by_group", "num / num * by_group"),
    Mutant(SUMS, "residuals of means", "sums - mean[group_of] * counts", "sums - mean[group_of]"),
    Mutant(SUMS, "no error of two episodes", "np.where(num >= 2, error", "np.where(num >= 3, error"),
    Mutant(SUMS, "the loss shown is unweighted", "weights[term] * row.get(", "row.get("),
    Mutant(SUMS, "datasets weigh alike", "means.mean[has, k], weights=shares[has, k])", "means.mean[has, k])"),
    Mutant(SUMS, "a validation's loss is unweighted", "loss += weights[name] * overall", "loss += overall"),
    Mutant(SUMS, "shares of groups without the term", "* (means.count > 0)\n", "* (means.count >= 0)\n"),
    Mutant(
        SUMS,
        "windows of all datasets",
        'row[f"{tag}/N"] = float(means.windows[g, k])',
        'row[f"{tag}/N"] = float(means.windows[:, k].sum())',
    ),
    Mutant(WINDOWS, "several modes end a run of frames", "((step == 1) | (step == 0))", "(step == 1)"),
    Mutant(TAPE, "workers share slots", "((slot // size) % num_workers == worker)", "(slot % num_workers == worker)"),
    Mutant(TAPE, "stretches in their order", "start[stretch_of[column]] + before", "start[column] + before"),
    Mutant(TAPE, "a longer lane too many", "(column < longer_columns)", "(column <= longer_columns)"),
    Mutant(
        TAPE,
        "lanes reach into the next dataset",
        "of_lane = np.minimum(left[chosen], ends[d] - 1 - place[chosen])",
        "of_lane = left[chosen]",
    ),
    Mutant(
        TAPE,
        "phases lose windows",
        "low = phase * self.draws // self.num_phases",
        "low = phase * (self.draws // self.num_phases)",
    ),
    Mutant(TAPE, "the same order in each pass", '"order", blocks.name, k)', '"order", blocks.name)'),
    Mutant(TAPE, "the same order of all seeds", 'rng.key(self.seed, "order"', 'rng.key(0, "order"'),
    Mutant(TAPE, "a resume's offset is lost", "step * self.batch_size + self.offset", "step * self.batch_size"),
    Mutant(TAPE, "epochs of another length", "line = epoch * self.draws[d]", "line = epoch * self.sizes[d]"),
    Mutant(
        TAPE,
        "blocks begin a window late",
        "inside = offset - (ends[place] - blocks.length[block])",
        "inside = offset - (ends[place] - blocks.length[block]) + 1",
    ),
    Mutant(BLOCKS, "a window less with drop_tail", "table.length[episode] - rows + 1", "table.length[episode] - rows"),
    Mutant(BLOCKS, "the last strided window is lost", "length = -(-length // stride)", "length = length // stride"),
    Mutant(BLOCKS, "held-out episodes are trained on", "chosen = keep[episode] & (length > 0)", "chosen = length > 0"),
    Mutant(
        BLOCKS,
        "rounding the wrong way",
        "np.argsort(-(exact - np.floor(exact))",
        "np.argsort((exact - np.floor(exact))",
    ),
    Mutant(BLOCKS, "strides are ignored", "np.asarray(inside, np.int64) * self.stride", "np.asarray(inside, np.int64)"),
    Mutant(CHUNK, "the last row is padding", "is_pad = place > last", "is_pad = place >= last"),
    Mutant(CHUNK, "the first padded row is real", "np.arange(num) >= len(rows)", "np.arange(num) > len(rows)"),
    Mutant(CHUNK, "padding repeats the first row", "np.repeat(rows[-1:]", "np.repeat(rows[:1]"),
    Mutant(NEAR, "history wraps round", "return np.maximum(place, 0)", "return np.abs(place)"),
    Mutant(
        NEAR,
        "a frame's nearest neighbour",
        "np.floor(place + 0.5 + SNAP_ROWS), num - 1)",
        "np.floor(place + SNAP_ROWS), num - 1)",
    ),
    Mutant(
        CHUNK,
        "a chunk less",
        "np.maximum(np.floor(length - offsets), 0)",
        "np.maximum(np.floor(length - offsets) - 1, 0)",
    ),
    Mutant(HEADS, "statistics of held-out episodes", "& ~d.held_out & d.settings.trains", "& d.settings.trains"),
    Mutant(STORED, "stale statistics of another split", "repr(names), *positions]", "repr(names)]"),
    Mutant(NORMALIZE, "half the range", "(low + high) / 2, (high - low) / 2", "(low + high) / 2, (high - low)"),
    Mutant(NORMALIZE, "constants are divided", "return spread > _CONSTANT *", "return spread > 0 *"),
    Mutant(TALLY, "another variance", "s.squares / s.count", "s.squares / (s.count - 1)"),
    Mutant(TALLY, "the variance between parts is lost", "after.squares + between", "after.squares"),
    Mutant(TALLY, "extremes of the last part", "np.minimum(self.min, after.min)", "after.min"),
    Mutant(ENDS, "other quantiles", "[0.01, 0.99]", "[0.02, 0.98]"),
    Mutant(ENDS, "a value next to the quantile's", "<= wanted[..., None]", "< wanted[..., None]"),
    Mutant(ENDS, "too few values kept", "num_rows // stride // 99 + 3", "num_rows // stride // 200 + 3"),
    Mutant(AFFINE, "the inverse forgets the offset", "(z * inverse + offset)", "(z * inverse)"),
    Mutant(
        AFFINE,
        "all steps as the first",
        "np.minimum(np.arange(x.shape[-2]), len(self.offset) - 1)",
        "0 * np.arange(x.shape[-2])",
    ),
    Mutant(SPLIT, "the split is turned round", "held_out = draw < ratio", "held_out = draw > ratio"),
    Mutant(SPLIT, "nothing is held out", "held_out[np.argmin(draw)] = True", "held_out[np.argmin(draw)] = False"),
    Mutant(
        SPLIT, "nothing is left to train on", "held_out[np.argmax(draw)] = False", "held_out[np.argmax(draw)] = True"
    ),
    Mutant(SPLIT, "one split for all datasets", 'rng.key(seed, "split", name)', 'rng.key(seed, "split")'),
    Mutant(SPLIT, "another split goes unnoticed", "if name not in saved or saved[name] == held_out:", "if True:"),
    Mutant(
        SAMPLES,
        "held-out losses are weighted",
        'values.get("weight", 1.0) if self.training else 1.0',
        'values.get("weight", 1.0)',
    ),
    Mutant(
        SAMPLES,
        "the same noise in each pass",
        "number, address.frame, address.pass_index)",
        "number, address.frame, 0)",
    ),
    Mutant(
        SAMPLES,
        "noise by place, not by episode",
        "self.keys[d], number, address.frame",
        "self.keys[d], address.episode, address.frame",
    ),
    Mutant(
        SHAPE,
        "narrower actions are real",
        "_first(self.action_dim, action_dim)",
        "_first(self.action_dim, self.action_dim)",
    ),
    Mutant(SHAPE, "shorter chunks are real", "missing = np.ones(", "missing = np.zeros("),
    Mutant(
        INPUTS, "fillers are trained on", "~batch.action_is_pad & (batch.weight != 0)[:, None]", "~batch.action_is_pad"
    ),
    Mutant(
        INPUTS,
        "padded steps are trained on",
        "steps = ~batch.action_is_pad &",
        "steps = ~(batch.action_is_pad & False) &",
    ),
    Mutant(COMMIT, "a checkpoint too many goes", "[: -self.keep_last]", "[: -self.keep_last + 1 or None]"),
    Mutant(COMMIT, "keep_every keeps the others", "int(n) % self.keep_every == 0", "int(n) % self.keep_every != 0"),
    Mutant(COMMIT, "a whole checkpoint is written over", "    if flaw(final) is not None:\n", "    if True:\n"),
    Mutant(COMMIT, "the best one is pruned", "if name not in named:", "if name:"),
    Mutant(COMMIT, "torn ones are taken for whole", "p.name.isdigit() and flaw(p) is None]", "p.name.isdigit()]"),
    Mutant(
        COMMIT,
        "the oldest one is resumed",
        "    return whole[-1] if whole else None",
        "    return whole[0] if whole else None",
    ),
    Mutant(COMMIT, "hashes taken while writing are lost", "{**described, **rest}", "rest"),
    Mutant(LOSSES, "one draw of the noise", "for draw in range(settings.num_noise_draws)", "for draw in range(1)"),
    Mutant(LOSSES, "the same noise in all draws", "Draws(batch.key, draw)", "Draws(batch.key, 0)"),
    Mutant(LOSSES, "windows that count twice", "np.flatnonzero(counted != wanted)", "np.flatnonzero(counted < wanted)"),
    Mutant(
        PLAN, "only a group's first windows", "members[np.arange(num) * len(members) // num]", "members[np.arange(num)]"
    ),
    Mutant(
        PLAN,
        "uneven shares",
        "np.searchsorted(ends - cost / 2, total * np.arange(1, parts) / parts)",
        "np.searchsorted(ends, 0 * total * np.arange(1, parts) / parts)",
    ),
    Mutant(EVALUATOR, "dropout while validating", "    policy.eval()\n", "    policy.train()\n"),
    Mutant(EVALUATOR, "no dropout after a validation", "policy.train(was_training)", "policy.train(False)"),
    Mutant(AVERAGE, "the average stays in the policy", "torch._foreach_copy_(parameters, own)", "pass"),
    Mutant(AVERAGE, "the average forgets", "weight = 1.0 - self.decay(step)", "weight = self.decay(step)"),
    Mutant(
        OPTIM,
        "the cosine ends a step late",
        "(step - warmup) / max(1, steps - 1 - warmup)",
        "(step - warmup) / max(1, steps - warmup)",
    ),
    Mutant(OPTIM, "biases decay", "plain = parameter.ndim <= 1 or", "plain = parameter.ndim < 1 or"),
    Mutant(OPTIM, "groups' rates are ignored", 'group["lr"] = lr * group["lr_scale"]', 'group["lr"] = lr'),
    Mutant(
        OPTIM,
        "warm-up begins at 0",
        "return min(1.0, (step + 1) / max(1, self.warmup_steps))\n\n",
        "return min(1.0, step / max(1, self.warmup_steps))\n\n",
    ),
]
