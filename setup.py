"""The packages of the distribution: those of opentau_train/ by pattern; conf/, launchers/, docs/ below it by name.

All else stands in pyproject.toml, which can say one or the other but not both.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["opentau_train", "opentau_train.*"]),
        "opentau_train.conf",
        "opentau_train.launchers",
        "opentau_train.docs",
    ]
)
