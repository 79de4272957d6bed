"""What the tests of whole regions share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import userfault


@pytest.fixture(scope="module")
def default_pager() -> Iterator[userfault.Pager]:
    """The default pager, once for all tests of a module: to start one takes a tenth of a second."""
    pager = userfault.default_pager()
    yield pager
    pager.close()
