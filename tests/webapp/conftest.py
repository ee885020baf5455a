"""What tests of label sets and their batches begin with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webapp.kitchen import Kitchen
from webapp.accounts.models import User


@pytest.fixture
def plain_parts(settings: Any, tmp_path: Any) -> None:
    """Static files by their plain names: none is collected."""
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }


@pytest.fixture
def kitchen(owner: User) -> Kitchen:
    return Kitchen(owner)
