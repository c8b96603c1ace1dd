"""Ranks of one node share what they fetch from a server."""

import pytest

from tests.lerobot_writer import Camera, Dataset, write
from tests.object_server import object_server, upload
from tests.program import TINY_POLICY, metrics, run

pytestmark = pytest.mark.distributed


def test_each_byte_is_read_once_for_all_ranks_of_a_node(tmp_path):
    cameras = {"observation.images.front": Camera(episodes_per_file=1)}
    root = write(tmp_path / "set", Dataset(lengths=(11, 7, 13, 9, 5, 12), cameras=cameras, episodes_per_data_file=1))
    given = ["+recipe=lerobot", *TINY_POLICY, "data.num_workers=2", "trainer.global_batch_size=4", "trainer.steps=8"]
    given += ["data.sources.main.val_split_ratio=0.3", "trainer.log_every=1", f"paths.cache_dir={tmp_path / 'cache'}"]
    with object_server() as proxy:
        url = upload(proxy, root, "set")
        given += [f"data.sources.main.root={url}", f"paths.run_dir={tmp_path / 'run'}"]
        done = run(given, ranks=2)
        assert done.returncode == 0, done.stderr
        files = {p.relative_to(root): p.stat().st_size for p in root.rglob("*") if p.suffix in (".parquet", ".mp4")}
        sizes = {f"/bucket/set/{name.as_posix()}": size for name, size in files.items() if "meta" not in name.parts}
        served = proxy.data_bytes()
    assert len(served) == len(sizes) and served == sizes
    assert max(metrics(tmp_path / "run")) == 8
