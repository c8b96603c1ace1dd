"""One server for all tests of what it answers."""

import pytest

from tests.served import serving

RENAME = "rename={observation/image: front, observation/state: state, observation/extra: null}"


@pytest.fixture(scope="package")
def served(own_run):
    with serving(own_run, RENAME, "max_batch=4", "max_connections=24", "max_message_mb=2") as one:
        yield one
