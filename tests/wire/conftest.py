"""Every parsing test runs on whole reads and one byte at a time."""

from __future__ import annotations

import pytest

from tests.wire.harness import Split, byte_by_byte, whole


@pytest.fixture(params=[whole, byte_by_byte], ids=["whole", "bytes"])
def split(request: pytest.FixtureRequest) -> Split:
    split: Split = request.param
    return split
