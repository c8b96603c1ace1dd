"""Whether what a parquet file's footer says of its column chunks can be looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file; the last where a column's name or its own message is garbled."""


def check_chunks(metadata: pq.FileMetaData, groups: Sequence[int], places: Sequence[int]) -> None:
    """Raises one of `UNREADABLE` where the footer's words on the column chunks at `places` of `groups` can't be taken:
    `RowGroupMetaData.column` would end the process there.

    That method isn't declared to let an exception of C++ through, and some footers bring one: counts of levels that
    aren't the schema's, an encrypted column. A reader is. It looks at each chunk that it is to buffer ahead before it
    asks for the first byte, of which this file has none.
    """
    data = _NoData()
    try:
        reader = pq.ParquetFile(data, metadata=metadata, pre_buffer=True).reader
        reader.read_row_groups(list(groups), column_indices=list(places), use_threads=False)
    except UNREADABLE:
        if not data.asked:
            raise


class _NoData(io.RawIOBase):
    """A file that says it is larger than any, so that no chunk is too far behind, and ends at its first byte."""

    SIZE = 2**62

    def __init__(self) -> None:
        self.asked, self._at = False, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.SIZE}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        # Nothing is raised: pyarrow would keep that exception, and with it the frames and files of who calls here.
        self.asked = True
        return b""
