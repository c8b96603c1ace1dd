"""Whether what a parquet file's footer says of its column chunks can be looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress

import pyarrow.parquet as pq


def check_chunks(metadata: pq.FileMetaData, groups: Sequence[int], places: Sequence[int]) -> None:
    """Raises what pyarrow raises for a damaged file where the footer's words on the column chunks at `places` of
    `groups` can't be taken: `RowGroupMetaData.column` would end the process there.

    That method isn't declared to let an exception of C++ through, and some footers bring one: counts of levels that
    aren't the schema's, an encrypted column. A reader is. It looks at each chunk that it is to buffer ahead before it
    asks for the first byte, which is where this one ends.
    """
    reader = pq.ParquetFile(_NoData(), metadata=metadata, pre_buffer=True).reader
    with suppress(_DataAskedFor):
        reader.read_row_groups(list(groups), column_indices=list(places), use_threads=False)


class _DataAskedFor(Exception):
    """Every chunk was looked at, and reading begins."""


class _NoData(io.RawIOBase):
    """A file that is larger than any, so that no chunk is too far behind, and can't be read."""

    SIZE = 2**62

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.SIZE}[whence] + offset
        return self._at

    def tell(self) -> int:
        return getattr(self, "_at", 0)

    def read(self, size: int = -1, /) -> bytes:
        raise _DataAskedFor
