"""mkdocs' hook: the documents at the repository's root become pages, links to files that are no pages become code."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

REPO = Path(__file__).parents[2]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files, config):
    """Add the pages that lie above docs/."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(REPO / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they stand in the repository, made those of the site."""
    source = page.file.src_uri
    here = REPO if source in ROOT_PAGES else (REPO / "docs" / source).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (here / target).resolve()
        if path.parent == REPO and path.name in ROOT_PAGES:
            name = path.name
        elif path.is_relative_to(REPO / "docs") and path.is_file():
            name = path.relative_to(REPO / "docs").as_posix()
        elif path.exists():
            return f"`{path.relative_to(REPO).as_posix()}`"
        else:
            return match[0]  # the strict build says that it leads nowhere
        up = "../" * source.count("/")
        return f"[{text}]({up}{name}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)", link, markdown)
