"""The local stand-in for a dataset on a server: a directory whose metadata are all there, and whose other files come
when they are asked for.

Its name follows from the listing, so that a dataset that was changed has another one, and none of its old files.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from typing import BinaryIO, TypeVar

from opentau_train import rng
from opentau_train.data.decode.opening import Opener, open_here
from opentau_train.data.remote.cache import KEPT, Cache, TooLarge
from opentau_train.data.remote.server import BLOCK, THREADS, Entry, Server
from opentau_train.errors import Fault, UserError, check_machine

T = TypeVar("T")

LISTING = f"{KEPT}/.mirror.json"
"""The file of a mirror that says what it mirrors. It is written last: without it the metadata may not be whole."""
REOPENINGS = 16
"""How often a file that is removed between its coming and its opening is fetched again."""


def is_url(root: str) -> bool:
    return "://" in root


@dataclass(frozen=True)
class Mirror:
    """The directory `root` stands for that of the server, whose files are `entries` {path below it: entry}. For any
    thread, and for the process that called `mirror_at`."""

    root: Path
    server: Server
    cache: Cache
    entries: Mapping[str, Entry]

    def open(self, path: Path, open: Callable[[Path], T]) -> T:
        """See `Opener`. Raises as `fetch` does."""
        for _ in range(REOPENINGS):
            self.fetch(path)
            try:
                return open(path)
            except FileNotFoundError:
                continue  # other readers' files have taken its room
        raise Fault(
            f"{path} was removed from the cache {REOPENINGS} times before it could be opened",
            where="data.cache_gb",
            remedy="raise data.cache_gb: it must hold the files that all lanes of a node read at a time",
        )

    def fetch(self, path: Path) -> None:
        """Bring the file `path` below `root` here, unless it is here.

        Raises FileNotFoundError where the server has none, `UserError` where it doesn't fit into the cache, and `Fault`
        where the server doesn't give it or the cache can't be written.
        """
        name = path.relative_to(self.root).as_posix()
        size = self._entry(name).size
        self._fill(path, size, lambda file: file.writelines(self.server.read(name, size)))

    def fetch_metadata(self) -> None:
        """Bring all metadata here, unless they are. Raises as `fetch` does."""
        listing = _to_json(self.server, self.entries)
        if (self.root / LISTING).is_file():
            return
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self.fetch, [self.root / name for name in self.entries if _is_metadata(name)]))
        self._fill(self.root / LISTING, len(listing), lambda file: file.write(listing))

    def _fill(self, path: Path, size: int, write: Callable[[BinaryIO], object]) -> None:
        try:
            self.cache.fill(path, size, write)
        except FileNotFoundError:
            raise
        except TooLarge as error:
            metadata = sum(entry.size for name, entry in self.entries.items() if _is_metadata(name))
            least = 1.1 * (error.num_bytes + metadata) / 1e9
            raise UserError(
                f"{path.relative_to(self.root)} of {self.server.url} has {size / 1e9:.3g} GB, too much for the cache",
                where="data.cache_gb",
                remedy=f"set data.cache_gb={least:.3g} or more, better to what all lanes of a node read at a time",
            ) from error
        except OSError as error:
            raise Fault(
                f"the cache can't be written: {error}",
                where=str(self.cache.folder),
                remedy="set data.cache_gb to less than the disk has free, or paths.cache_dir to another disk",
            ) from error

    def stats(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(bytes, a number that changes with the content) of each file; (-1, -1) for one that the server hasn't."""
        found = (self.entries.get(name) for name in names)
        return [(-1, -1) if e is None else (e.size, rng.key(e.version)) for e in found]

    def ends(self, names: Sequence[str], num_bytes: int) -> list[bytes]:
        """The last bytes of each file, `num_bytes` at most; none of one that the server hasn't. Raises as `fetch`."""

        def end(name: str) -> bytes:
            entry = self.entries.get(name)
            if entry is None:
                return b""
            start = max(0, entry.size - num_bytes)
            if entry.size <= BLOCK:  # one request brings it all
                return self.open(self.root / name, Path.read_bytes)[start:]
            return self.server.piece(name, start, entry.size, entry.size)

        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(end, names))

    def __contains__(self, path: Path) -> bool:
        """Whether the server has the file `path` below `root`."""
        return path.relative_to(self.root).as_posix() in self.entries

    def size(self, path: Path) -> int:
        """The file's bytes; 0 for one that the server hasn't."""
        entry = self.entries.get(path.relative_to(self.root).as_posix())
        return entry.size if entry else 0

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise FileNotFoundError(ENOENT, "the server has no such file", f"{self.server.url}/{name}")
        return self.entries[name]


def make_mirror(url: str, folder: Path, capacity: int) -> Path:
    """The root of the mirror of the directory `url` in the cache `folder`, which may hold `capacity` bytes; its
    metadata are fetched unless they are there. For every process of a node that wants it. Raises `UserError` for a URL
    that leads to no files, and as `Mirror.fetch` does."""
    server, cache = Server(url.rstrip("/")), Cache(folder)
    entries = server.list()
    identity = hashlib.blake2b(_to_json(server, entries), digest_size=7).hexdigest()
    mirror = Mirror(folder / identity / server.url.rpartition("/")[2], server, cache, entries)
    try:
        cache.resize(capacity)
    except OSError as error:
        check_machine(error, folder)
        raise UserError(
            f"the cache can't be written: {error}",
            where=str(folder),
            remedy="set paths.cache_dir to a directory that you can write, on a disk of each node",
        ) from error
    mirror.fetch_metadata()
    return mirror.root


def mirror_at(root: Path) -> Mirror | None:
    """The mirror whose directory `root` is; None for any other directory."""
    path = root / LISTING
    return _read(root, path.stat().st_mtime_ns) if path.is_file() else None


def opener_at(root: Path) -> Opener:
    """What opens the files below `root`, whether they lie there or on a server."""
    mirror = mirror_at(root)
    return open_here if mirror is None else mirror.open


@functools.lru_cache(maxsize=16)
def _read(root: Path, modified: int) -> Mirror:
    listing = json.loads((root / LISTING).read_bytes())
    entries = {name: Entry(*entry) for name, entry in listing["files"].items()}
    return Mirror(root, Server(listing["url"]), Cache(root.parent.parent), entries)


def _to_json(server: Server, entries: Mapping[str, Entry]) -> bytes:
    return json.dumps({"url": server.url, "files": entries}).encode()


def _is_metadata(name: str) -> bool:
    return name.startswith(f"{KEPT}/")
