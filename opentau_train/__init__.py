"""Train robot policies on mixtures of LeRobot-format datasets.

    python -m opentau_train +recipe=droid_policy

Importing the package imports nothing else, so that `--help` answers at once.
"""

__version__ = "0.1.0"
