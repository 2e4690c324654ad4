from collections.abc import Iterator

import pytest

from tests.fault.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as running:
        yield running
