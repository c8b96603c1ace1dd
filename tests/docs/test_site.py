"""The site, the tables of other programs' keys, the licences: whole and true. `make site` builds it strictly."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from opentau_train import __version__, cli
from tests import licences
from tests.program import REPO

DOCS = REPO / "docs"


def pages(entry: Any) -> list[str]:
    """The files of a part of nav."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in pages(value)]


def test_every_page_has_its_place_in_the_navigation_once():
    nav = pages(yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"])
    root = {page for page in nav if (REPO / page).exists()}
    assert root == {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    assert sorted(set(nav) - root) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert len(nav) == len(set(nav))


def test_mkdocs_is_an_extra_that_setup_leaves_out():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(text.startswith("mkdocs-material") for text in extras["docs"])
    assert not any("docs" in text for text in extras["dev"])


def rows() -> list[tuple[str, str]]:
    """(key of another program, key here) of the tables of docs/migrating.md."""
    return re.findall(r"^\| `([^|]+)` [^|]*\| `([^`|]+)` \|", (DOCS / "migrating.md").read_text(), flags=re.M)


@pytest.fixture(scope="module")
def trees() -> list[dict[str, Any]]:
    """Compositions that have between them every key that the tables name."""
    extra = ["model.pretrained_path=x", "+recipe=lerobot"]
    return [cli.compose([*extra, *more]) for more in ((), ("finetune=lora",))]


GROUPS = ("recipe",)
"""Words that choose a file of conf/ and are no keys."""


def test_each_key_that_migrating_leads_to_exists(trees):
    assert len(rows()) > 100
    for _, key in rows():
        if key in GROUPS:
            assert (REPO / "conf" / key).is_dir()
            continue
        for tree in trees:
            value: Any = tree
            for part in key.replace("NAME", "main").split("."):
                assert isinstance(value, dict) and part in value, f"{key} has no {part}"
                value = value[part]


def test_a_key_stands_once_in_its_table():
    for table in (DOCS / "migrating.md").read_text().split("\n## ")[1:]:
        keys = re.findall(r"^\| `([^|]+)` ", table, flags=re.M)
        assert len(keys) == len(set(keys)) and len(keys) > 10


def test_the_licence_of_every_package_that_the_project_names_is_listed():
    listed = licences.rows()
    assert list(listed) == list(licences.direct())
    assert all(len(text) > 2 for text in listed.values())
    installed = {name: text for name in listed if (text := licences.licence(name)) is not None}
    assert len(installed) > 20 and installed == {name: listed[name] for name in installed}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "license"} <= set(citation)
