"""Hydra's compositions, each made once a process: half of what a small training in a test takes is composing.

The program's own YAML files are the same in all tests. What they come to depends on the choices of groups alone, of
which the tests have some dozens; the values of a command line are set in a copy of it, by Hydra itself. Where other
directories are searched (`--config-dir`, a plugin's), nothing is remembered.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource

OWN = ("pkg://hydra.conf", "pkg://opentau_train.conf", "structured://")

packaged = next(p for p in Plugins.instance().discover(ConfigSource) if p.__name__ == "ImportlibResourcesConfigSource")
_read, _list, _compose, _caching = (
    packaged._read_config,
    config_loader_impl.create_defaults_list,
    ConfigLoaderImpl._compose_config_from_defaults_list,
    CachingConfigRepository.__init__,
)
_is_there = {name: getattr(packaged, name) for name in ("is_config", "is_group")}
_parsed, _lists, _composed, _known = {}, {}, {}, {}


def read(source, file):
    """A YAML file of a package."""
    if str(file) not in _parsed:
        _parsed[str(file)] = pickle.dumps(_read(source, file))
    return pickle.loads(_parsed[str(file)])  # an eighth of what copy.deepcopy takes


def is_there(name):
    """Whether a package has a file or a directory of that name."""

    def asked(source, config_path):
        key = name, source.path, config_path
        if key not in _known:
            _known[key] = _is_there[name](source, config_path)
        return _known[key]

    return asked


def places(repo) -> tuple[str, ...]:
    """Where `repo` searches; nothing if that is more than packages whose files don't change."""
    found = tuple(f"{source.scheme()}://{source.path}" for source in repo.get_sources())
    return found if all(place.startswith(OWN) for place in found) else ()


def defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing):
    """The files that are merged, and the values to set."""
    arguments = {"prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    if not places(repo):
        return _list(repo=repo, config_name=config_name, overrides_list=overrides_list, **arguments)
    values = Overrides(repo, overrides_list).config_overrides
    sets = {id(value) for value in values}
    choices = tuple(override.input_line for override in overrides_list if id(override) not in sets)
    key = (places(repo), config_name, choices, *arguments.values())
    if key not in _lists:
        _lists[key] = _list(repo=repo, config_name=config_name, overrides_list=overrides_list, **arguments)
    return dataclasses.replace(_lists[key], config_overrides=values)


def merged(loader, defaults, repo):
    """These files merged."""
    if not places(repo):
        return _compose(loader, defaults, repo)
    key = (places(repo), repr(defaults))
    if key not in _composed:
        _composed[key] = pickle.dumps(_compose(loader, defaults, repo))
    return pickle.loads(_composed[key])


def caching(repo, delegate):
    """A repository that may be told to search elsewhere: that is a new list of its own, all else can be shared."""
    repo.delegate, repo.cache = copy.copy(delegate), {}


def remember() -> None:
    packaged._read_config = read
    for name in _is_there:
        setattr(packaged, name, is_there(name))
    config_loader_impl.create_defaults_list = defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = merged
    CachingConfigRepository.__init__ = caching


def forget() -> None:
    """Compose as Hydra does."""
    packaged._read_config = _read
    for name, own in _is_there.items():
        setattr(packaged, name, own)
    config_loader_impl.create_defaults_list = _list
    ConfigLoaderImpl._compose_config_from_defaults_list = _compose
    CachingConfigRepository.__init__ = _caching
