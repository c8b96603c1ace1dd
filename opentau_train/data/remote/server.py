"""A directory on a server, as fsspec sees it: its files listed, and read in pieces with patience."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from opentau_train.errors import Explained, Fault, UserError
from opentau_train.threads import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Pauses before a request that failed is made again."""
BLOCK = 16 * 2**20
"""Bytes of one request: what a cut connection loses at most."""
THREADS = 8
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "updated", "mtime")
"""What the file systems call that which changes with a file's content."""


class Entry(NamedTuple):
    """A file of the listing: its bytes, and what changes with its content, where the server says that."""

    size: int
    version: str


@dataclass(frozen=True)
class Server:
    """The directory at `url`, for any thread and process: connections are each process's own."""

    url: str

    def list(self) -> dict[str, Entry]:
        """{path below the directory: entry} of all its files, hidden ones left out.

        Raises `UserError` where the directory isn't there or its kind of URL can't be read, and as `_patiently` does.
        """
        fs, base = self._file_system()
        fs.invalidate_cache()
        try:
            infos = self._patiently(lambda: fs.find(base, detail=True), self.url)
        except FileNotFoundError:
            infos = {}
        found = {info["name"][len(base) :].lstrip("/"): info for info in infos.values()}
        named = {name: info for name, info in sorted(found.items()) if not any(p[:1] == "." for p in name.split("/"))}
        if not named:
            raise UserError(f"{self.url} lists no files", remedy="correct the URL: a directory with meta/ and data/")
        with ThreadPoolExecutor(THREADS) as threads:  # a web server's pages name the files and no more
            return dict(zip(named, threads.map(self._entry, named.values())))

    def read(self, name: str, size: int) -> Iterator[bytes]:
        """The `size` bytes of a file in pieces. Raises FileNotFoundError, and as `_patiently` does."""
        start = 0
        while start < size:
            piece = self.piece(name, start, min(start + BLOCK, size), size)
            start += len(piece)
            yield piece

    def piece(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes `start` to `stop` of a file of `size` bytes; all from `start` on where the server knows no ranges.
        Raises as `read` does."""
        fs, base = self._file_system()
        url = f"{base.rstrip('/')}/{name}"

        def ask() -> bytes:
            got = fs.cat_file(url, start=start, end=stop)
            if len(got) == size > stop - start:
                return got[start:]
            if len(got) != stop - start:
                raise EOFError(f"{len(got)} bytes came instead of {stop - start}")
            return got

        return self._patiently(ask, f"{self.url}/{name}") if stop > start else b""

    def _entry(self, info: dict[str, Any]) -> Entry:
        if info.get("size") is None:
            fs, name = self._file_system()[0], info["name"]

            def ask() -> dict[str, Any]:
                try:
                    return fs.info(name)
                except FileNotFoundError as error:  # the listing has named it; fsspec's http says so of any failure
                    raise ConnectionError(str(error)) from error

            info = self._patiently(ask, name)
        if info.get("size") is None:
            raise UserError(f"{info['name']}: the server doesn't say the file's size", remedy="copy the dataset first")
        return Entry(int(info["size"]), "\x1f".join(str(info[key]) for key in VERSIONS if info.get(key) is not None))

    def _file_system(self) -> tuple[Any, str]:
        """(fsspec's file system, the directory's name in it). fsspec keeps one a process."""
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{self.url} can't be read: {first_line(error)}",
                remedy='pip install "opentau_train[remote]" for s3:// and http(s)://, else the file system\'s package',
            ) from error

    def _patiently(self, call: Callable[[], T], what: str) -> T:
        """What `call()` gives, asked again after each of `DELAYS_S` while the server fails. Raises FileNotFoundError at
        once, and `Fault` where there is no answer or no permission."""
        for number, delay in enumerate((*DELAYS_S, None), start=1):
            try:
                return call()
            except (FileNotFoundError, Explained):
                raise
            except Exception as error:
                # Broad: the file systems' libraries (botocore, aiohttp, httpx, ...) have errors of their own for a
                # server that fails, without a common base.
                cause = f"{type(error).__name__}: {first_line(error)}"
                if delay is None or isinstance(error, PermissionError):
                    raise Fault(
                        f"{what} can't be read, tried {number} times: {cause}",
                        where=self.url,
                        remedy="check the network, the server and the credentials; go on with resume=auto",
                    ) from error
                log.warning("%s: %s; trying again in %g s", what, cause, delay)
                time.sleep(delay)
        raise AssertionError("the last try returns or raises")
