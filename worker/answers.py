"""From examples to prototypes, and from prototypes to answers: both are matrix products over kept embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fewshot_engine import inference
from fewshot_engine.config import ENGINE_VERSION
from webapp.jobs.models import Job
from webapp.jobs.services import finish, wake
from webapp.labelsets.models import Classification, Label, LabelSet, Prediction, PrototypeSet, QueryImage
from webapp.labelsets.services import (
    current_prototypes,
    current_support,
    open_queries,
    save_predictions,
    save_prototypes,
    save_resorted,
)
from webapp.library.models import Blob
from worker import runtime, vectors
from worker.intake import embed_missing
from worker.leases import Lease

AT_ONCE = 256


def learn_labels(lease: Lease) -> None:
    """Make the prototypes of the label set's current version, unless they are there."""
    label_set = LabelSet.objects.select_related("model").get(job_id=lease.claim.job_id)
    if current_prototypes(label_set) is None:
        version, labels, rows = current_support(label_set)
        model = label_set.model
        blob_ids = [blob_id for _photo, blob_id, _label in rows]
        embed_missing(lease.claim, list(Blob.objects.filter(pk__in=blob_ids)), model.backbone)
        there, raw = vectors.read(model.backbone, blob_ids)
        index = {label.pk: n for n, label in enumerate(labels)}
        support = [row for row, is_there in zip(rows, there, strict=True) if is_there]
        data, health = b"", _health(None, labels, [])
        if support:
            targets = np.array([index[label_id] for _photo, _blob, label_id in support], dtype=np.int64)
            familiarity = runtime.familiarity(model, raw)
            seen = runtime.as_seen_by(model, raw, familiarity)
            lent = runtime.likeness(model, raw, familiarity)
            fitted = inference.fit(seen, targets, len(labels), likeness=lent, rule=runtime.rule(model))
            data, health = fitted.to_bytes(), _health(fitted, labels, [photo for photo, _b, _l in support])
            health["familiarity"] = familiarity
        prototypes = PrototypeSet(
            label_set=label_set,
            version=version,
            model=model,
            engine_version=ENGINE_VERSION,
            labels=[str(label.pk) for label in labels],
            examples=[str(photo) for photo, _blob, _label in support],
            data=data,
            health=health,
        )
        save_prototypes(lease.claim, prototypes)
    finish(lease.claim, Job.State.IDLE)


def classify(lease: Lease) -> None:
    """Answer the open query images of a classification; all of them again when the prototypes are new."""
    batch = Classification.objects.select_related("label_set__model").get(job_id=lease.claim.job_id)
    prototypes = current_prototypes(batch.label_set)
    if prototypes is None:  # its job wakes this one when they are made
        wake(batch.label_set.job_id)
        finish(lease.claim, Job.State.IDLE)
        return
    if not prototypes.data:  # the last example was taken out: the answers that there are stay
        finish(lease.claim, Job.State.IDLE)
        return
    fitted = inference.PrototypeModel.from_bytes(bytes(prototypes.data))
    is_resort, queries = open_queries(lease.claim, batch, prototypes)
    resorted: list[Prediction] = []
    for start in range(0, len(queries), AT_ONCE):
        predictions = _answer(lease, batch, prototypes, fitted, queries[start : start + AT_ONCE])
        if is_resort:
            resorted += predictions
        else:
            done = start + len(queries[start : start + AT_ONCE])
            save_predictions(lease.claim, batch, predictions, done=done, total=len(queries))
        if lease.is_lost:
            return
    if is_resort:
        save_resorted(lease.claim, batch, prototypes, resorted)
    finish(lease.claim, Job.State.IDLE)


def _answer(
    lease: Lease,
    batch: Classification,
    prototypes: PrototypeSet,
    fitted: inference.PrototypeModel,
    queries: Sequence[QueryImage],
) -> list[Prediction]:
    model = prototypes.model
    blobs = [query.photo.blob for query in queries]
    embed_missing(lease.claim, blobs, model.backbone)
    there, raw = vectors.read(model.backbone, [blob.pk for blob in blobs])
    known = [query for query, is_there in zip(queries, there, strict=True) if is_there]
    if not known:
        return []
    seen = runtime.as_seen_by(model, raw, prototypes.health.get("familiarity"))
    found = inference.classify(fitted, seen, top_k=max(2, batch.top_k))
    return [_prediction(query, n, found, prototypes, fitted) for n, query in enumerate(known)]


def _prediction(
    query: QueryImage,
    n: int,
    found: inference.Predictions,
    prototypes: PrototypeSet,
    fitted: inference.PrototypeModel,
) -> Prediction:
    names = prototypes.labels
    best = [
        [names[label], round(float(confidence), 6), round(float(distance), 6)]
        for label, confidence, distance in zip(found.labels[n], found.confidences[n], found.distances[n], strict=True)
    ]
    evidence = [
        [prototypes.examples[row], names[fitted.support_labels[row]], round(float(similarity), 4)]
        for row, similarity in zip(found.nearest[n], found.nearest_similarities[n], strict=True)
        if row >= 0
    ]
    return Prediction(
        query=query,
        label_id=best[0][0],
        confidence=best[0][1],
        distance=best[0][2],
        stranger=float(found.stranger[n]),
        top_k=best,
        evidence=evidence,
    )


def _health(
    fitted: inference.PrototypeModel | None, labels: Sequence[Label], photos: Sequence[object]
) -> dict[str, Any]:
    """What the page says of a label set: expected accuracy, and of each label its own, its rival, its outlier.

    `learn_labels` adds how familiar the model is with the photos, by which the query images are seen, too.
    """
    if fitted is None:
        return {"expected": None, "ci": None, "labels": {}}
    names = [str(label.pk) for label in labels]
    return {
        "expected": _number(fitted.expected_accuracy),
        "ci": _number(fitted.expected_accuracy_ci),
        "labels": {
            names[n]: {
                "examples": health.examples,
                "expected": _number(health.expected),
                "confused_with": None if health.confused_with is None else names[health.confused_with],
                "outlier": None if health.outlier is None else str(photos[health.outlier]),
            }
            for n, health in enumerate(fitted.per_label)
        },
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)
