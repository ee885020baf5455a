"""What all tests share: the cast (owner, outsider, administrator), and a clean cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.cache import cache
from django.test import Client

from tests import factories
from webapp.accounts.models import User


@pytest.fixture(autouse=True)
def _clean_cache() -> Iterator[None]:
    yield
    cache.clear()


@pytest.fixture
def owner(db: None) -> User:
    return factories.make_user("owner@example.org")


@pytest.fixture
def outsider(db: None) -> User:
    return factories.make_user("outsider@example.org")


@pytest.fixture
def owner_client(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


@pytest.fixture
def outsider_client(outsider: User) -> Client:
    client = Client()
    client.force_login(outsider)
    return client
