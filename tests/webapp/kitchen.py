"""A label set with a classified batch, as tests of label sets, their batches and exports use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from django.test import Client
from django.urls import reverse

from fewshot_engine.config import ENGINE_VERSION
from tests import factories
from webapp.accounts.models import User
from webapp.labelsets import services
from webapp.labelsets.models import (
    Label,
    LabelSet,
    Prediction,
    PrototypeSet,
    QueryImage,
)

SCRIPT = {"HTTP_X_REQUESTED_WITH": "fetch", "HTTP_ACCEPT": "application/json"}


class Kitchen:
    """A label set of mango and papaya with two examples each, and a classified batch of photos."""

    def __init__(self, owner: User) -> None:
        self.owner = owner
        self.collection = factories.make_collection(owner, "Groceries")
        self.set, (self.mango, self.papaya) = factories.make_label_set(owner, "Kitchen", ("Mango", "Papaya"))
        self.examples = [
            services.add_examples(label, [factories.make_photo(self.collection, str(label)) for _ in range(2)])
            for label in (self.mango, self.papaya)
        ]
        self.batch = services.classify_collection(self.set, self.collection, top_k=2)
        self.set.refresh_from_db()
        self.prototypes = learn(self.set)
        self.batch.revision, self.batch.prototypes = 1, self.prototypes
        self.batch.save()

    def add(self, label: Label, confidence: float, stranger: float, name: str = "query.jpg") -> QueryImage:
        photo = factories.make_photo(self.collection, "Market", name=name)
        query = QueryImage.objects.create(classification=self.batch, photo=photo)
        predict(query, label, confidence, stranger, self)
        return query

    def version(self) -> int:
        return LabelSet.objects.get(pk=self.set.pk).version

    def url(self, name: str, *args: object) -> str:
        return reverse(f"labelsets:{name}", args=args)

    @property
    def results_url(self) -> str:
        return self.url("results", self.batch.pk)


def learn(label_set: LabelSet, health: dict[str, Any] | None = None) -> PrototypeSet:
    labels = list(Label.objects.current().filter(label_set=label_set))
    told = {
        str(label.pk): {
            "examples": label.examples.current().count(),
            "expected": 0.95,
            "confused_with": None,
            "outlier": None,
        }
        for label in labels
    }
    return PrototypeSet.objects.create(
        label_set=label_set,
        version=label_set.version,
        model=label_set.model,
        engine_version=ENGINE_VERSION,
        labels=list(told),
        examples=[],
        data=b"x",
        health={"expected": 0.91, "ci": 0.03, "labels": told | (health or {})},
    )


def predict(query: QueryImage, label: Label, confidence: float, stranger: float, k: Kitchen, revision: int = 1) -> None:
    other = k.papaya if label == k.mango else k.mango
    Prediction.objects.create(
        query=query,
        revision=revision,
        label=label,
        confidence=confidence,
        distance=0.2,
        stranger=stranger,
        top_k=[[str(label.pk), confidence, 0.2], [str(other.pk), 1 - confidence, 0.6]],
        evidence=[
            [str(k.examples[0][0].photo_id), str(k.mango.pk), 0.9],
            [str(k.examples[1][0].photo_id), str(k.papaya.pk), 0.4],
        ],
    )


def many(k: Kitchen, n: int) -> Sequence[QueryImage]:
    photos = [factories.make_photo(k.collection, name=f"{i}.jpg") for i in range(n)]
    queries = QueryImage.objects.bulk_create([QueryImage(classification=k.batch, photo=photo) for photo in photos])
    for i, query in enumerate(queries):
        predict(query, k.mango, 0.7 + 0.2 * i / n, 0.1, k)
    return queries


def post_json(client: Client, url: str, said: Any) -> Any:
    return client.post(url, json.dumps(said), content_type="application/json", **SCRIPT)
