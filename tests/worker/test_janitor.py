"""What the janitor takes, and what it leaves."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.utils import timezone

from tests.factories import make_collection
from webapp.accounts.models import User
from webapp.library import services
from webapp.library.models import Import
from worker import janitor

pytestmark = pytest.mark.django_db


def half_written(name: str, *, hours_ago: float) -> Path:
    path = Path(default_storage.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    then = time.time() - hours_ago * 3600
    os.utime(path, (then, then))
    return path


def test_old_halves_go_and_young_ones_stay(db: None) -> None:
    old = half_written("incoming/x/.a.part", hours_ago=25)
    young = half_written("incoming/x/.b.part", hours_ago=1)
    whole = half_written("blobs/x/whole", hours_ago=100)
    janitor.sweep()
    assert not old.exists()
    assert young.exists()
    assert whole.exists()


def test_a_zip_is_kept_while_it_may_be_gone_on_with(owner: User) -> None:
    batch = services.open_import(make_collection(owner), archive_name="a.zip", archive_size=10)
    services.put_chunk(batch, 0, [b"0123456789"], sha256="")
    janitor.sweep()
    assert default_storage.exists(batch.chunk_name(0))
    Import.objects.filter(pk=batch.pk).update(created=timezone.now() - timedelta(days=15))
    janitor.sweep()
    assert not default_storage.exists(batch.chunk_name(0))
