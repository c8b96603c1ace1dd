"""The packages of the distribution: those of opentau_train/ by pattern, and conf/ as `opentau_train.conf`.

All else stands in pyproject.toml, which can say one or the other but not both.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["opentau_train", "opentau_train.*"]), "opentau_train.conf"])
