"""The keep-ranges filter: both public forms, keys and rules, the report, and the tool that makes one."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data import keep_ranges
from opentau_train.data.mixture.open import open_source
from opentau_train.errors import UserError
from opentau_train.tools import keep_ranges as tool
from opentau_train.tools.keep_ranges import nonidle_ranges
from tests.droid_datasets import published_filter, write_droid
from tests.lerobot_writer import Dataset, vector, write
from tests.program import DATA, REPO

LENGTHS = (11, 7, 13, 9, 5)
FOLDERS = [f"gs://raw/lab/{e}" for e in range(5)]
FILES = [f"/nfs/{e}.h5" for e in range(5)]
KEYS = [f"{a}--{b}" for a, b in zip(FOLDERS, FILES)]
RANGES = [[[0, 4], [6, 9]], [[0, 7]], [[2, 99]], []]  # the fifth episode is not in the file
ROWS_ONLY = Dataset(lengths=LENGTHS, cameras={})
IN_META = {"recording_folderpath": FOLDERS, "file_path": FILES}


def text(values):
    return {"dtype": "string", "shape": [1], "names": None}, lambda e, f: values[e]


LAYOUTS = {
    "v30_meta": replace(ROWS_ONLY, episode_columns=IN_META),
    "v21_meta": replace(ROWS_ONLY, version="v2.1", episode_columns=IN_META),
    "v30_rows": replace(
        ROWS_ONLY,
        columns={
            "observation.state": vector(4),
            "action": vector(3, 0.5),
            "recording_folderpath": text(FOLDERS),
            "file_path": text(FILES),
        },
    ),
}


def filter_file(tmp_path, tree):
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(tree))
    return str(path)


def open_filtered(root, path, **settings):
    chosen = {"root": str(root), "use_filter_dict": True, "filter_dict_path": path, **settings}
    return open_source("main", build(SourceSettings, chosen, "data.sources.main"))


def kept(source):
    return [tuple(map(int, row)) for row in source.get_shuffle_blocks()]


START = [(0, 0, 4), (0, 6, 3), (1, 0, 7), (2, 2, 11)]
"""What RANGES leave with the rule `start`: (episode, first frame, windows)."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_both_forms_match_episodes_by_their_droid_key(layout, form, tmp_path):
    flat = dict(zip(KEYS, RANGES))
    tree = flat if form == "flat" else {"metadata": {"note": 1}, "keep_ranges": flat}
    root = write(tmp_path / "set", LAYOUTS[layout])
    assert kept(open_filtered(root, filter_file(tmp_path, tree))) == START


def test_plain_episode_numbers_are_keys(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    path = filter_file(tmp_path, {str(e): r for e, r in enumerate(RANGES)})
    assert kept(open_filtered(root, path)) == START
    # positions are those of the chosen episodes, the keys stay the dataset's numbers
    assert kept(open_filtered(root, path, episodes=(1, 2))) == [(0, 0, 7), (1, 2, 11)]


def test_a_template_that_is_given_wins_over_keys_that_look_like_episode_numbers(tmp_path):
    ids = [f"0{4 - e}" for e in range(5)]
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns={"episode_id": ids}))
    path = filter_file(tmp_path, {i: r for i, r in zip(ids, RANGES)})
    assert kept(open_filtered(root, path, filter_key="{episode_id}")) == START
    assert kept(open_filtered(root, path)) != START


def test_numbers_are_episodes_under_a_template_that_never_makes_one(tmp_path):
    """As droid_cosmos's, whose dataset may also have a file that tools.keep_ranges has computed."""
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns={"episode_id": [str(e) for e in range(5)]}))
    path = filter_file(tmp_path, {str(e): r for e, r in enumerate(RANGES)})
    assert kept(open_filtered(root, path, filter_key="gs://x/{episode_id}/y")) == START
    with pytest.raises(UserError, match="lacks the key '700'"):
        open_filtered(root, path, filter_key="70{episode_id}")


def test_a_template_makes_the_key_of_an_episode_id(tmp_path):
    ids = [f"lab+{e}" for e in range(5)]
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns={"episode_id": ids}))
    path = filter_file(tmp_path, {f"gs://x/{i}--y": r for i, r in zip(ids, RANGES)})
    assert kept(open_filtered(root, path, filter_key="gs://x/{episode_id}--y")) == START


def test_a_dataset_that_the_published_keys_cannot_match_is_told_to_compute_its_own(tmp_path):
    """lerobot/droid_1.0.1 has neither of the two paths; the file that the remedy computes is read."""
    root = write_droid(tmp_path / "set", lengths=(60, 40))
    with pytest.raises(UserError, match="'recording_folderpath' is no column") as refused:
        open_filtered(root, str(published_filter(tmp_path / "published.json", [[[0, 9]]])))
    command = refused.value.remedy.rpartition("python -m opentau_train.tools.keep_ranges ")[2]
    own = str(tmp_path / "own.json")
    assert tool.main([str(root) if w == "ROOT" else own if w == "FILE" else w for w in command.split()]) == 0
    assert kept(open_filtered(root, own)) == [(0, 0, 50), (1, 0, 30)]


def test_rule_whole_keeps_windows_whose_chunk_lies_inside_a_range(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    path = filter_file(tmp_path, {str(e): r for e, r in enumerate(RANGES)})
    found = kept(open_filtered(root, path, filter_rule="whole", chunk_length=4))
    assert found == [(0, 0, 1), (1, 0, 4), (2, 2, 8)]
    # at half the dataset's rate a chunk of 4 reaches over 7 rows
    found = kept(open_filtered(root, path, filter_rule="whole", chunk_length=4, fps=15.0))
    assert found == [(1, 0, 1), (2, 2, 5)]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(["start", "whole"]),
)
def test_windows_are_those_that_the_rule_names_one_by_one(pairs, length, rows, rule):
    """Against the definition, frame by frame; overlapping and touching ranges count as one."""
    ranges = keep_ranges._clean("k", [(a, a + n) for a, n in pairs], 0, None)
    inside = {f for a, n in pairs for f in range(a, a + n) if f < length}
    reach = rows if rule == "whole" else 1
    wanted = {f for f in inside if all(g in inside for g in range(f, f + reach))}
    filter = keep_ranges.KeepRanges(None, {"k": ranges}, 0, False, "")
    blocks, report = keep_ranges.apply(filter, ["k"], np.array([length], np.int32), rule=rule, rows=rows)
    found = [f for _, start, n in blocks.tolist() for f in range(start, start + n)]
    assert sorted(found) == sorted(wanted) and len(set(found)) == len(found)
    assert report.num_windows == length == report.num_kept + sum(report.lost.values())


def test_metadata_say_how_much_of_each_range_s_end_is_left_out(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    tree = {"metadata": {"filter_last_n_in_ranges": 3}, "keep_ranges": {str(e): r for e, r in enumerate(RANGES)}}
    path = filter_file(tmp_path, tree)
    assert kept(open_filtered(root, path)) == [(0, 0, 1), (1, 0, 4), (2, 2, 11)]
    assert kept(open_filtered(root, path, filter_trim_tail=0)) == START


def test_the_start_reports_keys_episodes_and_windows_lost_per_cause(tmp_path, caplog):
    caplog.set_level("INFO", "opentau_train")
    root = write(tmp_path / "set", ROWS_ONLY)
    open_filtered(
        root, filter_file(tmp_path, {str(e): r for e, r in enumerate(RANGES)}), filter_rule="whole", chunk_length=4
    )
    said = caplog.text
    assert "4 of 5 found among 4 keys, 2 dropped" in said
    assert "13 of 45 kept (28.9%)" in said
    assert "5 in episodes that the file doesn't name" in said
    assert "15 outside the ranges" in said  # 11 - 7, 13 - 11 and 9
    assert "12 whose chunk leaves its range" in said
    assert "1 ranges reach past their episode's end" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "doesn't exist"),
        ("{", "can't be read"),
        ("[1]", "holds no mapping"),
        ("{}", "has no key"),
        ('{"0": [[5, 2]]}', r"key '0' has the range \[5, 2\]"),
        ('{"0": [3]}', "holds no list of"),
        ('{"0": 3}', "holds no list of"),
        ('{"0": ["12"]}', "the bound '1', not a whole number"),
        ('{"0": [[0, Infinity]]}', "key '0' has the bound inf, not a whole number"),
        ('{"0": [[NaN, 4]]}', "the bound nan, not a whole number"),
        ('{"0": [[0, 3.7]]}', "the bound 3.7, not a whole number"),
        ('{"0": [[0, 4], [false, true]]}', "the bound False, not a whole number"),
        ('{"metadata": {"filter_last_n_in_ranges": true}, "keep_ranges": {"0": []}}', "not a number of frames"),
        ('{"metadata": {"filter_last_n_in_ranges": "x"}, "keep_ranges": {"0": []}}', "not a number of frames"),
        ('{"77": [[0, 1]]}', "only 0 of 5 episodes are in the filter file"),
        ('{"0": [[0, 1]], "1": [[0, 1]]}', "only 2 of 5 episodes"),
        ('{"0": [], "1": [], "2": []}', "the filter leaves no window"),
        ('{"some--key": [[0, 1]]}', "'recording_folderpath' is no column"),
    ],
)
def test_a_file_that_can_not_be_meant_is_an_error_that_says_so(content, message, tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    if content is not None:
        (tmp_path / "ranges.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_filtered(root, str(tmp_path / "ranges.json"))


def test_a_poor_match_names_keys_that_do_not_match(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    with pytest.raises(UserError, match=r"only 2 of 5 .* it lacks the key '2', and its key '7' is no episode's\n"):
        open_filtered(root, filter_file(tmp_path, {"0": [[0, 1]], "1": [[0, 1]], "7": []}))
    with pytest.raises(UserError, match=r"only 1 of 5 .* it lacks the key '0'\n"):
        open_filtered(root, filter_file(tmp_path, {"1": [[0, 1]]}))


def test_whole_numbers_are_bounds_however_they_are_written(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    path = filter_file(tmp_path, {"0": [[0.0, 4], [6, 1e3]], "1": [[0, 10**400]], "2": [[2, 99]]})
    assert kept(open_filtered(root, path)) == [(0, 0, 4), (0, 6, 5), (1, 0, 7), (2, 2, 11)]


@pytest.mark.parametrize("template", ["fixed", "{}", "{task!r}", "{length:03d}", "{open"])
def test_a_template_of_anything_but_names_is_refused(template, tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    with pytest.raises(UserError, match="key template"):
        open_filtered(root, filter_file(tmp_path, {"a": []}), filter_key=template)


def test_a_key_that_two_episodes_share_is_refused(tmp_path):
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns={"day": ["mon", "tue", "mon", "wed", "thu"]}))
    path = filter_file(tmp_path, {"mon": [[0, 1]], "tue": [], "wed": [], "thu": []})
    with pytest.raises(UserError, match="several episodes have the filter key 'mon'"):
        open_filtered(root, path, filter_key="{day}")


@pytest.mark.slow
def test_a_file_of_a_hundred_thousand_keys_filters_the_few_that_are_there(tmp_path):
    root = write(tmp_path / "set", ROWS_ONLY)
    path = filter_file(tmp_path, {str(e): [[0, 3], [4, 6]] for e in range(100_000)})
    assert len(kept(open_filtered(root, path))) == 10


# -- making one ------------------------------------------------------------------------------------------------------


def slow_ranges(actions, threshold, idle_run, kept_run, trim_tail):
    """The rule frame by frame."""
    idle = [False] + [all(abs(b - a) < threshold for a, b in zip(p, q)) for p, q in itertools.pairwise(actions)]

    def runs(mask):
        out, start = [], None
        for place, value in enumerate([*mask, False]):
            if value and start is None:
                start = place
            elif not value and start is not None:
                out.append((start, place))
                start = None
        return out

    drop = {f for a, b in runs(idle) if b - a >= idle_run for f in range(a, b)}
    left = runs([f not in drop for f in range(len(actions))])
    return [(a, b - trim_tail) for a, b in left if b - a >= kept_run and b - trim_tail > a]


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0005, 1.0]), min_size=1, max_size=120),
    st.integers(1, 8),
    st.integers(1, 20),
    st.integers(0, 12),
)
def test_ranges_are_those_of_the_rule_one_by_one(changes, idle_run, kept_run, trim_tail):
    actions = np.stack([np.cumsum(changes), np.zeros(len(changes))], axis=1)
    rule = {"threshold": 1e-3, "idle_run": idle_run, "kept_run": kept_run, "trim_tail": trim_tail}
    assert nonidle_ranges(actions, **rule) == slow_ranges(actions.tolist(), **rule)


def test_idle_stretches_go_and_tails_are_trimmed_with_the_public_defaults():
    moving = [True] * 40 + [False] * 8 + [True] * 12 + [False] * 6 + [True] * 30 + [False] * 20 + [True] * 5
    actions = np.cumsum(moving)[:, None] * 0.01
    # 8 idle frames go, 6 stay; of the last 5 frames fewer than 16 are left; each range loses 10
    assert nonidle_ranges(actions) == [(0, 30), (48, 86)]
    assert nonidle_ranges(np.zeros((50, 2))) == []


def test_the_tool_s_file_filters_the_dataset_it_was_made_of(tmp_path, capsys):
    still = {20: range(5, 15), 12: range(0)}  # frames that repeat the one before

    def action(e, f):
        length = lengths[e]
        return [float(sum(g not in still[length] for g in range(f + 1)))] * 2

    lengths = (20, 12)
    feature = {"dtype": "float32", "shape": [2], "names": None}
    root = write(tmp_path / "set", Dataset(lengths=lengths, cameras={}, columns={"action": (feature, action)}))
    out = tmp_path / "out" / "ranges.json"
    assert tool.main([str(root), "--out", str(out), "--kept-run", "4", "--trim-tail", "1"]) == 0
    tree = json.loads(out.read_text())
    assert tree["keep_ranges"] == {"0": [[0, 4], [15, 19]], "1": [[0, 11]]}
    assert tree["metadata"]["threshold"] == 1e-3 and "2 episodes (0 wholly idle), 19 of 32" in capsys.readouterr().out
    assert kept(open_filtered(root, str(out))) == [(0, 0, 4), (0, 15, 4), (1, 0, 11)]


@pytest.mark.slow
def test_the_tool_names_a_wrong_column_and_needs_neither_torch_nor_tensorflow(tmp_path):
    code = (
        "import sys; from opentau_train.tools.keep_ranges import main\n"
        f"code = main([{str(DATA / 'lerobot_v30')!r}, '--out', {str(tmp_path / 'f.json')!r}, '--actions', 'acton'])\n"
        "assert code == 2 and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "did you mean 'action'" in done.stderr, done.stderr
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--trim-tail", "-3"], "--trim-tail must be at least 0, got -3"),
        (["--idle-run", "0"], "--idle-run must be at least 1, got 0"),
        (["--kept-run", "0"], "--kept-run must be at least 1, got 0"),
        (["--threshold", "-1"], "--threshold must be greater than 0, got -1"),
        (["--threshold", "nan"], "--threshold must be greater than 0, got nan"),
    ],
)
def test_the_tool_refuses_a_rule_that_can_not_be_meant(option, said, tmp_path, capsys):
    assert tool.main([str(DATA / "lerobot_v30"), "--out", str(tmp_path / "out/f.json"), *option]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/f.json", "folder"])
def test_the_tool_names_a_file_that_can_not_be_written(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert tool.main([str(DATA / "lerobot_v30"), "--out", str(tmp_path / place)]) == 2
    said = capsys.readouterr().err
    assert f"can't write {tmp_path / place}: " in said and "where:  --out" in said and "remedy: " in said


def _without(root, feature):
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"][feature]
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("spoil", "texts"),
    [
        (shutil.rmtree, ["{root} doesn't exist", "where:  {root}\n", "remedy: give the directory that holds meta/"]),
        (
            lambda r: (r / "meta/info.json").unlink(),
            ["not a LeRobot dataset", "where:  {root}\n", "give the dir"],
        ),
        (lambda r: _without(r, "action"), ["has no actions", "meta/info.json", "remedy: name them: --actions COLUMN"]),
        (
            lambda r: next(r.glob("data/**/*.parquet")).unlink(),
            ["the rows of episode 4 are missing", "restore the file\n"],
        ),
    ],
    ids=["no_root", "no_info", "no_actions", "no_rows"],
)
def test_the_tool_s_remedies_are_those_of_its_own_arguments(spoil, texts, tmp_path, capsys):
    root = write(tmp_path / "set", ROWS_ONLY)
    spoil(root)
    assert tool.main([str(root), "--out", str(tmp_path / "f.json")]) == 2
    said = capsys.readouterr().err
    assert "data.sources" not in said and not (tmp_path / "f.json").exists()
    for text in texts:
        assert text.format(root=root) in said


def test_the_tool_names_the_option_of_a_wrong_column(tmp_path, capsys):
    root = write(tmp_path / "set", ROWS_ONLY)
    assert tool.main([str(root), "--out", str(tmp_path / "f.json"), "--actions", "acton"]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'action'" in said and "where:  --actions\n" in said and "data.sources" not in said


def test_the_tool_needs_the_actions_only(tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    root = write(tmp_path / "set", Dataset(lengths=LENGTHS, columns={"action": vector(3)}))
    _without(root, "timestamp")
    assert tool.main([str(root), "--out", str(tmp_path / "f.json")]) == 0
    assert not caplog.records, "neither its missing state nor its video is the tool's affair"
