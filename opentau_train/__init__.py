"""Train robot policies on mixtures of LeRobot-format datasets.

    python -m opentau_train +recipe=droid_policy

From Python: `compose`, `train` (`opentau_train.api`) and `load_policy`. Importing the package imports nothing else, so
that `--help` answers at once: each of these is imported when it is asked for.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "load_policy", "train"]
_API = {"compose": "api", "train": "api", "load_policy": "deploy.policy"}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_API[name]}"), name)
