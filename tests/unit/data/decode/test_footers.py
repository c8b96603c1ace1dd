"""A parquet file's footer: whatever it says, the process that reads it lives on."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from opentau_train.data.decode.parquet import RowError, RowReader
from tests import warm

COLUMNS = ["action", "index", "task"]
TABLE = pa.table({"action": [[1.0, 2.0]] * 40, "index": np.arange(40), "task": ["x"] * 40})

READ_EACH = """
import sys
from pathlib import Path
from opentau_train.data.decode.parquet import RowError, RowReader

path, ended = Path(sys.argv[1]), {"read": 0, "refused": 0}
whole = path.read_bytes()
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for place in range(begin, len(whole) - 8):
    for value in {whole[place] ^ 1, whole[place] ^ 16, (whole[place] + 2) % 256}:
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1:])
        reader = RowReader(sys.argv[2:])
        for read in (lambda: reader.slice(path, 0, 40), lambda: reader.whole(path, ["index"])):
            try:
                read()
                ended["read"] += 1
            except RowError:
                ended["refused"] += 1
        reader.close()
print(ended["read"], ended["refused"])
"""


@pytest.mark.slow
def test_no_byte_of_a_footer_ends_the_process(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(TABLE, path)
    ended = warm.run([sys.executable, "-c", READ_EACH, str(path), *COLUMNS], timeout=120)
    assert ended.returncode == 0, ended.stderr
    read, refused = map(int, ended.stdout.split())
    assert read > 100 and refused > 100


class Keys(pe.KmsClient):
    """Wraps a key by nothing."""

    def __init__(self, config: pe.KmsConnectionConfig):
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return key_bytes.hex().encode()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key)


@pytest.mark.parametrize("encrypted", ["action", "index"])
def test_an_encrypted_column_is_refused_and_the_others_are_read(tmp_path, encrypted):
    path, root = tmp_path / "rows.parquet", {"action": "action.list.element"}.get(encrypted, encrypted)
    to = pe.EncryptionConfiguration(footer_key="foot", column_keys={"key": [root]}, plaintext_footer=True)
    properties = pe.CryptoFactory(Keys).file_encryption_properties(pe.KmsConnectionConfig(), to)
    with pq.ParquetWriter(path, TABLE.schema, encryption_properties=properties) as writer:
        writer.write_table(TABLE)
    others = [column for column in COLUMNS if column != encrypted]
    assert RowReader(others).slice(path, 0, 40) == TABLE.select(others)
    with pytest.raises(RowError, match=r"rows\.parquet.*[Dd]ecrypt"):
        RowReader(COLUMNS).slice(path, 0, 40)
    gc.collect()
    assert str(path) not in [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
