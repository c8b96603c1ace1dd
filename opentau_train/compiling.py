"""torch.compile of one function, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

from opentau_train.errors import UserError, did_you_mean


def compiled(forward: Callable, backend: str) -> Callable:
    """`forward`, compiled by `backend` when it is first called.

    Raises `UserError` for a backend that torch doesn't know and, in the call, where the backend fails: on CPU
    `inductor` needs a C++ compiler, and torch looks for it only then.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(
            f"torch has no compiler backend '{backend}'{did_you_mean(backend, known)}",
            where="trainer.compile_backend",
            remedy=f"set it to one of {', '.join(torch.compiler.list_backends())}",
        )
    inner = torch.compile(forward, backend=backend)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise UserError(
                f"the policy can't be compiled by '{backend}': {next(iter(str(error).splitlines()), '')}",
                where="trainer.compile",
                remedy="install a C++ compiler (apt-get install g++) or name it in CXX, or set trainer.compile=false; "
                "HYDRA_FULL_ERROR=1 shows all that the backend said",
            ) from error

    return call
