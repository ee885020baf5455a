"""What leaves the studio: every photo of a batch as CSV or JSON, harmless in a spreadsheet, streamed."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from tests.webapp.kitchen import Kitchen, many
from webapp.accounts.models import User
from webapp.labelsets import exports, services

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _no_manifest(settings: Any, tmp_path: Any) -> None:
    settings.STATIC_ROOT = tmp_path
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}


@pytest.fixture
def kitchen(owner: User) -> Kitchen:
    return Kitchen(owner)


def exported(kitchen: Kitchen, kind: str) -> str:
    async def collect() -> str:
        return "".join([piece async for piece in exports.stream(kitchen.batch, kind)])

    return async_to_sync(collect)()


def rows(kitchen: Kitchen) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(exported(kitchen, "csv"))))


def test_csv_tells_all_of_a_photo(kitchen: Kitchen) -> None:
    kitchen.add(kitchen.mango, 0.9, 0.1, name="a.jpg")
    (row,) = rows(kitchen)
    assert row == {
        "file": "a.jpg",
        "category": "Market",
        "verdict": "known",
        "label": "Mango",
        "confidence": "0.900000",
        "distance": "0.200000",
        "stranger": "0.100000",
        "answered_by_person": "no",
        "label_1": "Mango",
        "confidence_1": "0.900000",
        "distance_1": "0.200000",
        "label_2": "Papaya",
        "confidence_2": "0.100000",
        "distance_2": "0.600000",
    }


def test_verdicts_and_answers_are_told(kitchen: Kitchen) -> None:
    kitchen.add(kitchen.mango, 0.5, 0.1, name="a.jpg")
    kitchen.add(kitchen.mango, 0.9, 0.8, name="b.jpg")
    services.answer(kitchen.add(kitchen.mango, 0.9, 0.8, name="c.jpg"), kitchen.papaya, becomes_example=False)
    told = [(row["verdict"], row["label"], row["confidence"], row["answered_by_person"]) for row in rows(kitchen)]
    assert told[0] == ("unsure", "Mango", "0.500000", "no")
    assert told[1] == ("none", "", "", "no")
    assert told[2] == ("known", "Papaya", "0.100000", "yes")


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_cell_is_a_formula(kitchen: Kitchen, start: str) -> None:
    evil = f'{start}HYPERLINK("http://evil.example")'
    services.rename_label(kitchen.mango, evil)
    query = kitchen.add(kitchen.mango, 0.9, 0.1, name=evil)
    query.photo.category.name = query.photo.category.path = evil
    query.photo.category.save()
    (row,) = rows(kitchen)
    assert row["file"] == row["label"] == row["label_1"] == row["category"] == f"'{evil}"


def test_json_is_whole(kitchen: Kitchen) -> None:
    kitchen.add(kitchen.mango, 0.9, 0.1, name='a "quoted" ü.jpg')
    kitchen.add(kitchen.papaya, 0.9, 0.7, name="b.jpg")
    told: dict[str, Any] = json.loads(exported(kitchen, "json"))
    assert told["label_set"] == "Kitchen"
    assert [row["file"] for row in told["results"]] == ['a "quoted" ü.jpg', "b.jpg"]
    assert told["results"][0]["best"][0] == {"label": "Mango", "confidence": 0.9, "distance": 0.2}


def test_empty_batch_is_a_valid_file(kitchen: Kitchen) -> None:
    assert rows(kitchen) == []
    assert json.loads(exported(kitchen, "json"))["results"] == []


def test_length_costs_no_queries(kitchen: Kitchen) -> None:
    many(kitchen, 60)
    with CaptureQueriesContext(connection) as found:
        assert len(rows(kitchen)) == 60
    assert len(found) <= 3


def test_download_has_a_name(kitchen: Kitchen, owner_client: Client) -> None:
    url = kitchen.url("export", kitchen.batch.pk, "csv")
    answer = owner_client.get(url)
    assert answer["Content-Disposition"] == 'attachment; filename="groceries.csv"'
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    assert owner_client.get(kitchen.url("export", kitchen.batch.pk, "exe")).status_code == 404
