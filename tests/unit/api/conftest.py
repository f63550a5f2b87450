"""The checksum worker's model folder, for tests of the API over a real engine."""

from __future__ import annotations

from tests.unit.engine.conftest import model_folder

__all__ = ["model_folder"]
