"""Which of many parameters of a test run in `make quick`: some, so that every claim is tested there, and not all."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return values for `parametrize` or `fixture`, of which all but those in `quick` are marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
