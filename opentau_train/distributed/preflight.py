"""Are all ranks the same program with the same settings, each there once? Asked before anything is built on it.

A node with yesterday's checkout, another configuration or another copy of a dataset would train to the end and give
wrong numbers, and a rank that is started twice or not at all would leave the others waiting for half an hour.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import socket
import sysconfig
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistStoreError, PrefixStore, Store

from opentau_train.config.typed import TARGET
from opentau_train.errors import UserError

PACKAGE = Path(__file__).parents[1]

READ_SECONDS = 10.0
"""How long rank 0 stays for the others to read what is wrong: the store may live in its process."""

LOCAL_KEYS = ("root", "filter_dict_path")
"""Keys of a source that may differ: a node may have its own copy of the files. Their content is compared instead."""


def identity(tree: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all ranks: versions, hashes of the package's sources and of those that a `_target_` of
    `tree` names, one of every section of `tree`."""
    sections = {k: v for k, v in tree.items() if k != "paths"}
    data = dict(sections.get("data", {}))
    data["sources"] = {
        name: {k: v for k, v in source.items() if k not in LOCAL_KEYS}
        for name, source in (data.get("sources") or {}).items()
    }
    sections["data"] = data
    return {
        "the version of Python": platform.python_version(),
        "the version of torch": torch.__version__,
        "opentau_train's source code": source_hash(PACKAGE),
        **{f"the code of '{name}'": code for name in sorted(_named(tree)) if (code := code_of(name))},
        **{f"the configuration's '{name}'": _digest(section) for name, section in sections.items()},
    }


def source_hash(place: Path) -> str:
    """A hash of the Python files of a package's folder, or of one file, and of their names, wherever it lies."""
    state = hashlib.blake2b(digest_size=8)
    files, folder = ([place], place.parent) if place.is_file() else (place.rglob("*.py"), place)
    for path in sorted(files, key=lambda p: p.relative_to(folder).as_posix()):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def code_of(name: str) -> str:
    """The code of the top-level module `name`, which may be a user's: a hash of its file or, for a package, of all its
    files; the version of an installed distribution; "" where there is none of these, as for the standard library."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # "", or a module that came from no file
        spec = None
    if spec is None:
        return ""
    places = [Path(place) for place in spec.submodule_search_locations or filter(None, [spec.origin])]
    if any({"site-packages", "dist-packages"} & set(place.parts) for place in places):
        return ", ".join(metadata.version(d) for d in sorted(set(metadata.packages_distributions().get(name, []))))
    standard = Path(sysconfig.get_path("stdlib"))
    return " ".join(source_hash(place) for place in places if place.exists() and standard not in place.parents)


def _named(tree: Any) -> set[str]:
    """The top-level modules, besides the program's own, that a `_target_` anywhere in `tree` names."""
    inside = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    names = set().union(*map(_named, inside))
    target = tree.get(TARGET) if isinstance(tree, Mapping) else None
    return names | ({target.partition(".")[0]} - {PACKAGE.name} if isinstance(target, str) else set())


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def check_same(facts: Sequence[Mapping[str, str]], where: str, remedy: str) -> None:
    """Compare the ranks' facts, `facts[r]` being those of rank r. Raises `UserError` naming the ranks that differ from
    rank 0, and in what."""
    ranks = [r for r, own_facts in enumerate(facts) if own_facts != facts[0]]
    if not ranks:
        return
    first = facts[ranks[0]]
    names = [k for k in {**facts[0], **first} if facts[0].get(k) != first.get(k)]
    more = f" (and {len(ranks) - 1} more ranks)" if len(ranks) > 1 else ""
    raise UserError(f"rank {ranks[0]}{more} differs from rank 0 in: {', '.join(names[:4])}", where=where, remedy=remedy)


def check_in(store: Store, rank: int, size: int, facts: Mapping[str, str], timeout: float) -> None:
    """Every rank leaves its card in the store; rank 0 reads them and says whether the launch is sound.

    6 requests to the store a rank and 2 more a rank by rank 0, its polling apart. Raises `UserError` on every rank that
    is there when a rank is missing after `timeout` seconds, was started twice, or differs; RuntimeError when rank 0 is
    silent.
    """
    store = PrefixStore("preflight", store)
    place = f"{socket.gethostname()}, process {os.getpid()}"
    number = store.add(f"count/{rank}", 1)
    store.set(f"card/{rank}/{number}", json.dumps({"size": size, "place": place, "facts": dict(facts)}))
    arrived = store.add("arrived", 1)
    if rank == 0 and number == 1:
        problem = _check_cards(store, size, timeout)
        verdict = None if problem is None else [problem.what, problem.where, problem.remedy]
        store.set("verdict", json.dumps(verdict))
        if problem is not None:
            _until(lambda: store.add("read", 0) >= store.add("arrived", 0) - 1, READ_SECONDS)
            raise problem
        return
    try:
        store.wait(["verdict"], timedelta(seconds=timeout + READ_SECONDS))
    except DistStoreError as error:
        text = f"rank 0 of {size} said nothing in {timeout:g} s, {arrived} ranks are there: look at its log"
        raise RuntimeError(text) from error
    verdict = json.loads(store.get("verdict"))
    store.add("read", 1)
    if verdict is not None:
        raise UserError(verdict[0], where=verdict[1], remedy=verdict[2])


def _check_cards(store: Store, size: int, timeout: float) -> UserError | None:
    complete = _until(lambda: store.add("arrived", 0) >= size, timeout)
    counts = [store.add(f"count/{r}", 0) for r in range(size)]
    for r, count in enumerate(counts):
        if count > 1:
            places = " and ".join(_card(store, r, n)["place"] for n in range(1, count + 1))
            return UserError(
                f"rank {r} was started {count} times",
                where=places,
                remedy="give every node its own NODE_RANK (every process its own RANK)",
            )
    cards = [_card(store, r, 1) for r in range(size) if counts[r]]
    if not complete or not all(counts):
        missing = [str(r) for r, count in enumerate(counts) if not count]
        return UserError(
            f"{len(missing)} of {size} ranks did not arrive in {timeout:g} s: {', '.join(missing[:8])}",
            where="the rendezvous",
            remedy="look at these ranks' own logs; a node that waits for data may need a longer trainer.step_timeout",
        )
    for r, card in enumerate(cards):
        if card["size"] != size:
            return UserError(
                f"rank {r} was started for a world of {card['size']} ranks, rank 0 for {size}",
                where=card["place"],
                remedy="start every node with the same NNODES and NPROC_PER_NODE",
            )
    where = next((c["place"] for c in cards if c["facts"] != cards[0]["facts"]), "")
    try:
        check_same([c["facts"] for c in cards], where, "start the same code with the same settings on every node")
    except UserError as problem:
        return problem
    return None


def _card(store: Store, rank: int, number: int) -> dict[str, Any]:
    return json.loads(store.get(f"card/{rank}/{number}"))


def _until(holds, timeout: float) -> bool:
    """Ask until it holds, less and less often; False after `timeout` seconds."""
    end, pause = time.monotonic() + timeout, 0.01
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return True
