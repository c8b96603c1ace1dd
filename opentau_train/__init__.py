"""Train robot policies on mixtures of LeRobot-format datasets.

    python -m opentau_train +recipe=droid_policy

Importing the package imports nothing else, so that `--help` answers at once: `load_policy` is imported when it is asked
for.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    if name != "load_policy":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return import_module("opentau_train.deploy.policy").load_policy
