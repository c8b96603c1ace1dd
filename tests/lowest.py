"""Print the lowest version that pyproject.toml states of each dependency, as pip's requirements."""

import re
import tomllib
from pathlib import Path


def lowest(requirement: str) -> str:
    """`name>=1.2,<3` as `name==1.2`; a requirement without a lower bound is a mistake."""
    name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)(?:,<.*)?", requirement).groups()
    return f"{name}=={version}"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print(*map(lowest, project["dependencies"]))
