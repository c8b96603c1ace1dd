"""The promises of SECURITY.md, each with a malicious file: the mark that its code would leave isn't there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from opentau_train import load_policy, strangers, validate
from opentau_train.checkpoints import contents, manifest, shards
from opentau_train.checkpoints.card import PARTS
from opentau_train.config import trust, typed
from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.images import ImageError, decode_image
from opentau_train.data.decode.video import VideoPool
from opentau_train.data.decode.video_file import VideoError
from opentau_train.errors import EXIT_USER, UserError
from opentau_train.tools import curate, why
from opentau_train.tools.export import ExportSettings, export
from opentau_train.tools.export import main as export_main
from tests import warm
from tests.program import TOY, environment, train_here
from tests.unit.data.lerobot.test_layout import copy, open_source, sets  # noqa: F401  (fixtures)


class Payload:
    """A pickle of it makes the file `mark` when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of the program; copied by those who change it."""
    folder = tmp_path_factory.mktemp("trained")
    quiet = ["trainer.steps=1", "validation.every=0", f"paths.cache_dir={folder / 'cache'}"]
    return train_here([*TOY, *quiet], folder / "run") / "checkpoints" / "00000001"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    return export(ExportSettings(str(trained), str(tmp_path_factory.mktemp("exported") / "policy.safetensors")))[0]


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run" / "checkpoints" / "00000001")


def reseal(checkpoint: Path) -> None:
    """Let the manifest be right: whoever writes a file can write its hash."""
    (checkpoint / "files.json").unlink()
    files = [p for p in checkpoint.rglob("*") if p.is_file()]
    (checkpoint / "files.json").write_text(manifest.to_text(manifest.describe(checkpoint, files)))


# ---------------------------------------------------------------- checkpoints


def test_a_pickle_in_place_of_the_table_of_tensors_is_refused_with_code_2(checkpoint, tmp_path, capsys):
    (checkpoint / "state/.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    reseal(checkpoint)
    with pytest.raises(UserError, match=r"it names posix\.mkdir, which is no part of such metadata"):
        shards.kinds(checkpoint)
    assert export_main([f"checkpoint={checkpoint}", f"out={tmp_path / 'out.safetensors'}"]) == EXIT_USER
    assert len(capsys.readouterr().err.splitlines()) <= 3
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["eval", "setattr", "exec", "__import__"])
def test_no_builtin_is_called_by_the_table(name, checkpoint):
    (checkpoint / "state/.metadata").write_bytes(b"\x80\x04cbuiltins\n" + name.encode() + b"\n(\x8c\x011tR.")
    with pytest.raises(UserError, match=f"it names builtins.{name}"):
        shards.kinds(checkpoint)


@pytest.mark.parametrize(
    "asked", [(Path, "home"), (TensorProperties, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")], ids=str
)
def test_an_enums_member_is_all_that_getattr_gives_to_the_table(asked, checkpoint):
    """As Python 3.11.2, Debian's, writes members."""

    class Asks:
        def __init__(self, *given):
            self.given = given

        def __reduce__(self):
            return getattr, self.given

    member = pickle.dumps(Asks(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"), 4)
    assert shards._Unpickler(io.BytesIO(member)).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    (checkpoint / "state/.metadata").write_bytes(pickle.dumps(Asks(*asked), 4))
    with pytest.raises(UserError, match="it names"):
        shards.kinds(checkpoint)


def test_the_end_of_an_archive_is_at_its_place():
    """What new releases of zipfile compare: where an archive says that its directory ends, and where that is."""
    written = io.BytesIO()
    torch.save(torch.zeros(100_000), written)
    whole = written.getvalue()
    end = shards.End(whole[-9000:], len(whole))
    locator = whole.rindex(b"PK\x06\x07")
    told = int.from_bytes(whole[locator + 8 : locator + 16], "little")
    assert end.seek(told) == end.tell() == told and end.read(4) == b"PK\x06\x06"
    assert end.seek(-22, io.SEEK_END) == len(whole) - 22 and end.read() == whole[-22:]
    with pytest.raises(ValueError):
        end.seek(100)


DEEP = 1_000_000
NESTS = {
    "a tuple": b"\x80\x04})" + b"\x85" * DEEP + b"Ns.",
    "a tuple with marks": b"\x80\x04}" + b"(" * DEEP + b"t" * DEEP + b"Ns.",
    "a tuple that is kept in the memo": b"\x80\x04})" + b"\x85\x94" * DEEP + b"Ns.",
    "two and three": b"\x80\x04})" + b"N\x86NN\x87" * DEEP + b"Ns.",
}


@pytest.mark.parametrize("kind", NESTS)
def test_a_table_nested_a_million_deep_is_refused_and_the_process_lives(kind, checkpoint):
    """Its hash would overflow the C stack: in a process of its own, which may die."""
    (checkpoint / "state/.metadata").write_bytes(NESTS[kind])
    reseal(checkpoint)
    command = [sys.executable, "-m", "opentau_train.tools.export", f"checkpoint={checkpoint}", "out=policy.safetensors"]
    ended = warm.run(command, cwd=checkpoint, env=environment(), timeout=250)
    assert ended.returncode == EXIT_USER, ended.stderr
    assert "nests deeper than" in ended.stderr and len(ended.stderr.splitlines()) <= 3


@pytest.mark.parametrize("data", [{(("w", 0), (1, (2, 3))): [{"a": (1,)}] * 500}, list(range(5000)), {1: {2, 3}}])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_long_and_shallow_tables_are_not_deep(data, protocol):
    shards.check_nesting(pickle.dumps(data, protocol))
    one_by_one = b"\x80\x04]" + b"Na" * 5000 + b"."
    shards.check_nesting(one_by_one)


@pytest.mark.parametrize("data", [b"\x85.", b"t.", b"h\x05.", b"\x94.", b"s.", b"\x80\x04", b""])
def test_a_table_whose_stack_runs_dry_is_refused(data, checkpoint):
    (checkpoint / "state/.metadata").write_bytes(data)
    with pytest.raises(UserError, match="can't be read"):
        shards.kinds(checkpoint)


def test_a_pickle_in_place_of_a_moment_is_not_loaded(tmp_path):
    state, mark = tmp_path / "state", tmp_path / "mark"
    dcp.save({"optimizer": {"state": {"w": {"step": Payload(mark)}}}}, checkpoint_id=state, no_dist=True)
    there = dcp.FileSystemReader(state).read_metadata().state_dict_metadata
    assert isinstance(there["optimizer.state.w.step"], BytesStorageMetadata)
    wanted = {"optimizer": {"state": {"w": {"step": torch.zeros(())}}}}
    with pytest.raises(UserError, match="is no tensor there"):
        shards.read(tmp_path, wanted, alone=True)
    assert not mark.exists()
    dcp.load(wanted, checkpoint_id=state, no_dist=True)  # the payload is a real one
    assert mark.exists()


def test_a_tensor_is_read_as_a_tensor_alone(tmp_path):
    state, mark = tmp_path / "state", tmp_path / "mark"
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=state, no_dist=True)
    table = dcp.FileSystemReader(state).read_metadata()
    out = io.BytesIO()
    torch.save(Payload(mark), out)
    (state / "__0_0.distcp").write_bytes(out.getvalue())
    place = table.storage_data[MetadataIndex("model.w", [0])]
    place.offset, place.length = 0, len(out.getvalue())
    write_table(state, table)
    with pytest.raises(UserError, match="can't be read"):
        shards.read(tmp_path, {"model": {"w": torch.zeros(3)}}, alone=True)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["../../elsewhere.distcp", "/etc/passwd", "sub/file.distcp"])
def test_tensors_come_from_the_checkpoints_own_files(path, tmp_path):
    state = tmp_path / "state"
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=state, no_dist=True)
    table = dcp.FileSystemReader(state).read_metadata()
    table.storage_data[MetadataIndex("model.w", [0])].relative_path = path
    write_table(state, table)
    with pytest.raises(UserError, match="is no file beside it"):
        shards.kinds(tmp_path)


def write_table(state: Path, table: Metadata) -> None:
    with open(state / ".metadata", "wb") as file:
        pickle.dump(table, file)


def test_a_fifo_in_a_checkpoint_is_an_error_and_no_wait(checkpoint):
    for name in ("state/.metadata", "run.json"):
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
    listed = json.loads((checkpoint / "files.json").read_text())
    for name in ("state/.metadata", "run.json"):
        listed[name]["size"] = 0
    (checkpoint / "files.json").write_text(json.dumps(listed))
    assert in_time(lambda: manifest.loss(checkpoint)) is not None
    for read in (lambda: shards.kinds(checkpoint), lambda: contents.read_run(checkpoint)):
        with pytest.raises(UserError, match="no plain file"):
            in_time(read)


def in_time(call):
    """What `call()` gives; fails where it is still waiting after a minute."""
    ended = []

    def work():
        try:
            ended.append((call(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert ended, "it waits"
    if ended[0][1] is not None:
        raise ended[0][1]
    return ended[0][0]


# ---------------------------------------------------------------- classes that a file names

STRANGE = (
    "sympy.simplify",
    "torch.hub.load",
    "os.system",
    "opentau_train.checkpoints.commit.sweep",
    "subprocess.Popen",
)


def with_parts(path: Path, out: Path, **parts) -> Path:
    with safe_open(path, framework="pt") as opened:
        texts = opened.metadata()
    save_file(load_file(path), out, metadata={**texts, **{n: json.dumps(tree) for n, tree in parts.items()}})
    return out


def part_of(path: Path, name: str) -> dict:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[name])


@pytest.mark.parametrize("target", STRANGE)
@pytest.mark.parametrize("place", ["model", "transforms"])
def test_an_exported_file_names_no_code(place, target, exported, tmp_path):
    entry = {"_target_": target, "paths": [str(tmp_path / "kept")], "command": f"mkdir {tmp_path / 'mark'}"}
    (tmp_path / "kept").mkdir()
    config, policy = part_of(exported, "config"), part_of(exported, "policy")
    if place == "model":
        config["model"] = entry
    else:
        name = next(iter(policy["transforms"]))
        policy["transforms"][name].append({"name": "more", **entry})
    spoiled = with_parts(exported, tmp_path / "policy.safetensors", config=config, policy=policy)
    with pytest.raises(UserError, match="which a file of others may not have called"):
        load_policy(spoiled)
    assert (tmp_path / "kept").exists() and not (tmp_path / "mark").exists()


OWN_POLICY = """
import pathlib
from opentau_train.models.flow import FlowPolicy

pathlib.Path(__file__).with_name("mark").touch()


class Own(FlowPolicy):
    pass
"""


def test_a_module_is_imported_where_its_user_trusts_it(exported, tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = part_of(exported, "config")
    config["model"]["_target_"] = "their_models.Own"
    given = with_parts(exported, tmp_path / "policy.safetensors", config=config)
    with pytest.raises(UserError, match=r"add trust=\[their_models\]"):
        load_policy(given)
    assert not (tmp_path / "mark").exists()
    assert type(load_policy(given, trust=["their_models"]).loaded.policy).__name__ == "Own"


def test_an_installed_plugin_is_trusted_and_this_package_as_a_whole_is_not(monkeypatch):
    class Entry:
        module = "fake_plugin.policies"

    monkeypatch.setattr(trust, "entry_points", lambda group: [Entry] if group == "opentau_train.plugins" else [])
    trust.check_targets({"_target_": "fake_plugin.policies.Own"}, "file")
    for target in ("fake_plugin.policiesque.Own", "fake_plugin.other.Own"):
        with pytest.raises(UserError):
            trust.check_targets({"_target_": target}, "file")
    with pytest.raises(UserError):
        trust.check_targets({"_target_": "opentau_train.checkpoints.commit.sweep"}, "file", ["opentau_train"])


def test_a_validation_builds_nothing_strange_of_a_checkpoints_settings(checkpoint, tmp_path):
    path = checkpoint / "pretrained_model/config.json"
    config = json.loads(path.read_text())
    config["validation"]["evaluator"]["loss"] = {"_target_": "os.mkdir", "path": str(tmp_path / "mark")}
    path.write_text(json.dumps(config))
    reseal(checkpoint)
    with pytest.raises(UserError, match=r"validation.loss._target_ names 'os.mkdir'"):
        validate.run([f"checkpoint={checkpoint}"])
    assert not (tmp_path / "mark").exists()


def test_a_runs_own_settings_name_no_code_that_a_tool_then_calls(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained.parent.parent, tmp_path / "run"))
    config, mark = yaml.safe_load((run / "config.yaml").read_text()), tmp_path / "mark"
    config["data"]["sources"]["main"] = {"_target_": "os.mkdir", "path": str(mark), "val_split_ratio": 0.3}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"main\._target_ names 'os\.mkdir'"):
        why.read_settings(run, [])
    assert curate.main([str(run)]) == EXIT_USER and "names 'os.mkdir'" in capsys.readouterr().err
    assert not mark.exists()
    (run / "config.yaml").write_text("seed: ${oc.env:HOME}\n")
    with pytest.raises(UserError, match="interpolation"):
        why.read_settings(run, [])


def test_settings_of_a_checkpoint_tell_nothing_of_the_machine(checkpoint):
    path = checkpoint / "pretrained_model/config.json"
    config = json.loads(path.read_text())
    config["data"]["sources"]["main"]["root"] = "http://127.0.0.1:9/${oc.env:HOME}"
    path.write_text(json.dumps(config))
    reseal(checkpoint)
    with pytest.raises(UserError, match="interpolation"):
        validate.run([f"checkpoint={checkpoint}"])


def test_comparing_settings_imports_no_module_that_only_the_checkpoint_names(tmp_path, monkeypatch):
    (tmp_path / "named_by_a_checkpoint.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert typed.defaults("named_by_a_checkpoint.Own") == {}
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"model": 3}', '{"a": "\\ud800"}', ""])
def test_a_card_that_is_none_is_told_in_three_lines(part, text, exported, tmp_path):
    with safe_open(exported, framework="pt") as opened:
        texts = opened.metadata()
    save_file(load_file(exported), tmp_path / "policy.safetensors", metadata={**texts, part: text})
    with pytest.raises(UserError) as caught:
        load_policy(tmp_path / "policy.safetensors")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("text", ["[]", '{"model": 3}', '{"spec": {"cameras": 3}}'])
@pytest.mark.parametrize("part", ["config", "policy"])
def test_a_checkpoints_card_that_is_none_is_told_in_three_lines(part, text, checkpoint, tmp_path, capsys):
    (checkpoint / f"pretrained_model/{part}.json").write_text(text)
    reseal(checkpoint)
    assert export_main([f"checkpoint={checkpoint}", f"out={tmp_path / 'out.safetensors'}"]) == EXIT_USER
    assert len(capsys.readouterr().err.splitlines()) <= 3


@pytest.mark.parametrize("name", ["../mark", "/tmp/mark", "..", "", "a\0b"])
def test_files_that_a_policy_brings_along_stay_in_their_directory(name, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    policy = part_of(exported, "policy") | {"assets": {"tokenizer": {name: "text"}}}
    spoiled = with_parts(exported, tmp_path / "policy.safetensors", policy=policy)
    with pytest.raises(UserError, match="is no plain name"):
        load_policy(spoiled)


# ---------------------------------------------------------------- datasets


def set_info(root: Path, **changes) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "template",
    [
        "{chunk_index.__class__}",
        "{chunk_index:999999999d}",
        "{chunk_index!r}",
        "{0}",
        "{secret}",
        "{chunk_index:{file_index}}",
        "../other/file-{file_index}.parquet",
        "/etc/passwd",
        "data/../../x-{file_index}",
        "a\0b",
        "",
        7,
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_paths_of_files_have_whole_numbers_and_stay_below_the_root(key, template, copy):  # noqa: F811
    root = copy("v3.0")
    set_info(root, **{key: template})
    with pytest.raises(UserError, match=key):
        open_source(root)


PLACES = ["meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["fifo", "device"])
@pytest.mark.parametrize("place", [*PLACES, "data/chunk-000/file-000.parquet"])
def test_a_fifo_or_a_device_in_a_dataset_is_an_error_and_no_wait(place, make, copy):  # noqa: F811
    root = copy("v3.0")
    (root / place).unlink()
    make(root / place)
    with pytest.raises(UserError) as caught:
        in_time(lambda: open_source(root))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "text", ["[" * 500_000, '{"a": ' * 5000, "{" + '"a": 1,' * 10_000_000, "\0", '{"fps": "\\ud800"}']
)
def test_a_hostile_info_json_is_told_in_three_lines(text, copy):  # noqa: F811
    root = copy("v3.0")
    (root / "meta/info.json").write_text(text)
    with pytest.raises(UserError) as caught:
        open_source(root)
    assert len(str(caught.value).splitlines()) <= 3 and len(str(caught.value)) < 2000


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch):
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    assert len(out.getvalue()) < 50_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="9000 x 9000 pixels"):
        decode_image(out.getvalue())


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(mark) (w) file closefile showpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ImageError, match="cannot identify"):
        decode_image(eps)


def test_a_video_of_more_pixels_is_refused(copy):  # noqa: F811
    path = next(copy("v3.0").glob("videos/*/*/*.mp4"))
    with pytest.raises(VideoError, match="16 x 16 pixels"):
        VideoPool(decoding=Decoding(max_pixels=100)).cursor().read(path, 0.0, 1.0)


def listening() -> tuple[socket.socket, int]:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    return server, server.getsockname()[1]


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.mp4\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}/a.mp4'\n",
    "dash": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period><AdaptationSet>"
    "<Representation id='0'><BaseURL>{url}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "url": "{url}/a.mp4",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_video_reaches_no_network_and_no_other_file(kind, tmp_path, copy):  # noqa: F811
    server, port = listening()
    path = tmp_path / "video.mp4"
    path.write_text(PLAYLISTS[kind].format(url=f"http://127.0.0.1:{port}", port=port))
    with server, pytest.raises(VideoError):
        VideoPool().cursor().read(path, 0.0, 1.0)
        server.accept()
    other = next(copy("v3.0").glob("videos/*/*/*.mp4"))
    path.write_text(PLAYLISTS[kind].replace("{url}/a.mp4", str(other)).format(port=port))
    with pytest.raises(VideoError):
        VideoPool().cursor().read(path, 0.0, 1.0)


def test_a_demuxer_reaches_no_address_that_an_mp4_refers_to(copy, tmp_path):  # noqa: F811
    """The movie's data reference becomes an address, as QuickTime allows."""
    server, _ = listening()
    path = next(copy("v3.0").glob("videos/*/*/*.mp4"))
    content = path.read_bytes()
    assert b"url \0\0\0\1" in content  # "in this file"
    path.write_bytes(content.replace(b"url \0\0\0\1", b"url \0\0\0\0"))
    with server:
        with contextlib.suppress(VideoError):
            VideoPool().cursor().read(path, 0.0, 1.0)
        with pytest.raises(TimeoutError):
            server.accept()


def test_only_so_many_bytes_and_values_are_read(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text('"' + "x" * 1000 + '"')
    with pytest.raises(strangers.Refused, match="more than 1,000 bytes"):
        strangers.read_json(path, 1000)
    monkeypatch.setattr(strangers, "MOST_VALUES", 3)
    assert strangers.parse("[1, 2]") == [1, 2]
    with pytest.raises(strangers.Refused, match="values"):
        strangers.parse(b"[1, 2, 3, 4]")
    assert np.isnan(strangers.parse("NaN"))


def test_names_in_a_file_do_nothing_to_the_terminal_and_add_no_lines(copy):  # noqa: F811
    root = copy("v3.0")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] = {"a\nb\x1b[2J\u202e": {"dtype": 3}}
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError) as caught:
        open_source(root)
    text = str(caught.value)
    assert "\x1b" not in text and "\u202e" not in text and len(text.splitlines()) == 3


def test_a_count_of_episodes_costs_no_memory(copy, caplog):  # noqa: F811
    root = copy("v3.0")
    set_info(root, total_episodes=10**15)
    assert len(open_source(root).episodes) == 4
    assert (
        "missing in the episodes' metadata: episodes 4, 5, 6, 7, 8, 9, 10, 11 and 999999999999988 more" in caplog.text
    )


def test_repeated_rows_cost_no_memory_before_they_are_counted(copy):  # noqa: F811
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = copy("v3.0")
    path = root / "meta/tasks.parquet"
    with pq.ParquetWriter(path, pa.schema([("task_index", pa.int64()), ("task", pa.string())])) as writer:
        table = pa.table(
            {"task_index": np.zeros(10**6, np.int64), "task": pa.array(["x"]).take(np.zeros(10**6, np.int64))}
        )
        for _ in range(11):
            writer.write_table(table)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="11,000,000 rows"):
        open_source(root)


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_damaged_page_is_told_in_three_lines(place, copy):  # noqa: F811
    """Fuzzing found Arrow's own messages in it, which have several lines."""
    path = copy("v3.0") / place
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 24 + content[28:])
    with pytest.raises(UserError) as caught:
        open_source(path.parents[place.count("/")])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_a_torn_picture_is_an_error_of_the_picture_in_every_format(form):
    """Fuzzing found a RuntimeError of AVIF's plugin."""
    out = io.BytesIO()
    Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(out, form)
    whole = out.getvalue()
    assert decode_image(whole).shape == (32, 48, 3)
    for end in range(0, len(whole), max(1, len(whole) // 40)):
        with contextlib.suppress(ImageError):
            decode_image(whole[:end] + bytes(8))
