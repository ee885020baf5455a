"""What people do with label sets: every gesture is one new version, and wakes the job that learns it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from django.db import transaction
from django.db.models import F
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from fewshot_engine.config import ENGINE_VERSION
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.jobs.services import Claim, create_job, fenced, record, wake
from webapp.labelsets.models import (
    TONES,
    Classification,
    Example,
    Intake,
    Label,
    LabelSet,
    Prediction,
    PrototypeSet,
    QueryImage,
)
from webapp.library.models import Collection, Import, Photo
from webapp.library.services import create_collection, open_import
from webapp.training.models import Model

T = TypeVar("T")

KEPT_REVISIONS = 3
MAX_LABELS = 1000
IN_HAND = timedelta(minutes=10)  # a batch that was corrected as lately follows what its corrections teach


class LabelSetError(Exception):
    """Something that cannot be done to a label set; the text is meant for the person."""


def create_label_set(owner: User, name: str, model: Model | None = None) -> LabelSet:
    name = " ".join(name.split())[:120] or _("Untitled label set")
    with transaction.atomic():
        label_set = LabelSet(owner=owner, name=name, model=model or Model.objects.default())
        label_set.drops = create_collection(owner, name, purpose=Collection.Purpose.DROPS)
        label_set.job = create_job(
            owner,
            Job.Kind.PROTOTYPES,
            queue=Job.Queue.INTERACTIVE,
            title=_("Learning %(name)s") % {"name": name},
            url=label_set.get_absolute_url(),
        )
        label_set.save()
    return label_set


def rename_label_set(label_set: LabelSet, name: str) -> None:
    name = " ".join(name.split())[:120]
    if not name:
        raise LabelSetError(_("A label set needs a name."))
    LabelSet.objects.filter(pk=label_set.pk).update(name=name)


def use_model(label_set: LabelSet, model: Model) -> None:
    """Put the label set on another model; its prototypes and open batches follow."""

    def change(version: int) -> None:
        LabelSet.objects.filter(pk=label_set.pk).update(model=model)

    _new_version(label_set, change)


def add_label(label_set: LabelSet, name: str) -> Label:
    """A new label without examples.

    Raises:
        LabelSetError: no name, or one that is there already (in any case of letters).
    """
    name = _label_name(label_set, name)

    def change(version: int) -> Label:
        count = label_set.labels.count()
        if count >= MAX_LABELS:
            raise LabelSetError(_("A label set holds at most %(n)d labels.") % {"n": MAX_LABELS})
        return Label.objects.create(label_set=label_set, name=name, tone=count % TONES + 1, from_version=version)

    return _new_version(label_set, change)


def rename_label(label: Label, name: str) -> None:
    """Names are no part of what was learned, so a rename makes no new version."""
    Label.objects.filter(pk=label.pk).update(name=_label_name(label.label_set, name, apart_from=label))


def remove_label(label: Label) -> None:
    """Take a label and its examples out from the next version on; `restore_label` undoes it."""

    def change(version: int) -> None:
        Label.objects.filter(pk=label.pk, to_version=None).update(to_version=version)

    if label.to_version is not None:
        return
    _new_version(label.label_set, change)


def restore_label(label: Label) -> None:
    if label.to_version is None:
        return
    _label_name(label.label_set, label.name, apart_from=label)

    def change(version: int) -> None:
        Label.objects.filter(pk=label.pk).update(to_version=None)

    _new_version(label.label_set, change)


def add_examples(label: Label, photos: Iterable[Photo], *, instead_of: Example | None = None) -> list[Example]:
    """Make photos examples of a label; those that are already stay as they are, another label's move here.

    `instead_of` goes out in the same version.
    """
    chosen = {photo.pk: photo for photo in photos}

    def change(version: int) -> list[Example]:
        if instead_of is not None and instead_of.photo_id not in chosen:
            Example.objects.filter(pk=instead_of.pk, to_version=None).update(to_version=version)
        here = Example.objects.current().filter(label__label_set=label.label_set, photo__in=chosen)
        kept = set(here.filter(label=label).values_list("photo_id", flat=True))
        here.exclude(label=label).update(to_version=version)
        return Example.objects.bulk_create(
            Example(label=label, photo=photo, from_version=version) for pk, photo in chosen.items() if pk not in kept
        )

    if label.to_version is not None:
        raise LabelSetError(_("The label “%(name)s” was removed; bring it back first.") % {"name": label.name})
    return _new_version(label.label_set, change)


def remove_example(example: Example) -> None:
    def change(version: int) -> None:
        Example.objects.filter(pk=example.pk, to_version=None).update(to_version=version)

    if example.to_version is not None:
        return
    _new_version(example.label.label_set, change)


def restore_example(example: Example) -> None:
    if example.photo is None:
        raise LabelSetError(_("The photo “%(name)s” was deleted for good.") % {"name": example.gap})
    add_examples(example.label, [example.photo])


def set_reject_above(label_set: LabelSet, value: float) -> None:
    """From which probability of a stranger on "none of these" is said; applied when read, so nothing is re-learned."""
    if not 0 < value <= 1:
        raise LabelSetError(_("The threshold is a share above 0 and up to 1, not %(v)s.") % {"v": value})
    LabelSet.objects.filter(pk=label_set.pk).update(reject_above=value)


def open_example_intake(
    label: Label, *, instead_of: Example | None = None, archive: tuple[str, int] = ("", 0)
) -> Import:
    """An upload whose photos become examples of a label, once they are taken in, in one new version.

    `archive` is the name and the size in bytes of a zip that they come in.
    """
    if label.to_version is not None:
        raise LabelSetError(_("The label “%(name)s” was removed; bring it back first.") % {"name": label.name})
    title = _("Examples of %(name)s") % {"name": label.name}
    return _open_intake(label.label_set, archive, title=title, label=label, replaces=instead_of)


def open_query_intake(classification: Classification, *, archive: tuple[str, int] = ("", 0)) -> Import:
    """An upload whose photos are classified as they come."""
    return _open_intake(classification.label_set, archive, title=classification.name, classification=classification)


def classify_drop(label_set: LabelSet, *, top_k: int = 3) -> Classification:
    """A new batch for photos that are about to be dropped."""
    _require_examples(label_set)
    name = _("Dropped photos, %(when)s") % {"when": timezone.localtime().strftime("%d %b %H:%M")}
    return _create_classification(label_set, name, Classification.Source.DROP, label_set.drops, top_k)


def classify_collection(label_set: LabelSet, collection: Collection, *, top_k: int = 3) -> Classification:
    """A new batch of all the photos of a collection."""
    _require_examples(label_set)
    if not collection.photos.exists():
        raise LabelSetError(
            _("The collection “%(name)s” has no photos yet: upload some first.") % {"name": collection.name}
        )
    with transaction.atomic():
        batch = _create_classification(label_set, collection.name, Classification.Source.COLLECTION, collection, top_k)
        wake(batch.job_id)
    return batch


def set_top_k(classification: Classification, top_k: int) -> None:
    """Show another number of best labels; where more are wanted than are there, the batch is answered anew."""
    _require_top_k(top_k)
    with transaction.atomic():
        batch = Classification.objects.select_for_update().get(pk=classification.pk)
        is_more = top_k > batch.top_k
        batch.top_k = top_k
        if is_more and batch.revision:
            batch.prototypes = None
        batch.save(update_fields=["top_k", "prototypes"])
        if is_more:
            wake(batch.job_id)


def answer(query: QueryImage, label: Label | None, *, becomes_example: bool) -> None:
    """Pin what a person says of a query image: a label, or None for "none of these"; others re-sort if it teaches.

    A second answer takes the place of the first, and of what the first had taught.
    """
    teaches = label is not None and becomes_example
    if label is not None and label.to_version is not None:
        raise LabelSetError(_("The label “%(name)s” was removed; bring it back first.") % {"name": label.name})
    with transaction.atomic():
        if not teaches:
            _unlearn_answer(query)
        QueryImage.objects.filter(pk=query.pk).update(is_answered=True, answer=label, answered_at=timezone.now())
        record(query.classification.job_id, "answered", photo=str(query.photo_id))
        if label is not None and teaches:
            add_examples(label, [query.photo])
            wake(query.classification.job_id)


def take_answer_back(query: QueryImage) -> None:
    """Unpin an answer, and take the photo out of the examples if the answer had made it one."""
    if not query.is_answered:
        return
    with transaction.atomic():
        _unlearn_answer(query)
        QueryImage.objects.filter(pk=query.pk).update(is_answered=False, answer=None, answered_at=None)
        record(query.classification.job_id, "answered", photo=str(query.photo_id))
        wake(query.classification.job_id)


# What the worker brings back ----------------------------------------------------------------------


def photos_ready(batch: Import, photos: Sequence[Photo], *, is_last: bool) -> None:
    """Photos of a drop are taken in and embedded: hand them to what they were dropped for."""
    intake = Intake.objects.select_related("label__label_set", "classification", "replaces").filter(batch=batch).first()
    if intake is None:
        return
    if intake.classification is not None:
        with transaction.atomic():
            QueryImage.objects.bulk_create(
                [QueryImage(classification=intake.classification, photo=photo) for photo in photos],
                ignore_conflicts=True,
            )
            wake(intake.classification.job_id)
    elif is_last and intake.label is not None and intake.label.to_version is None:
        taken = Photo.objects.filter(pk__in=batch.files.exclude(photo=None).values("photo"))
        if taken:
            add_examples(intake.label, taken, instead_of=intake.replaces)


def current_support(label_set: LabelSet) -> tuple[int, list[Label], list[tuple[UUID, UUID, UUID]]]:
    """The version, its labels that have examples, and (photo, blob, label) ids of the examples, in a stable order."""
    with transaction.atomic():
        version = LabelSet.objects.values_list("version", flat=True).get(pk=label_set.pk)
        rows = list(
            Example.objects.current()
            .filter(label__label_set=label_set, label__to_version=None)
            .order_by("label__created", "label_id", "created", "id")
            .values_list("photo_id", "photo__blob_id", "label_id")
        )
        labels = list(Label.objects.current().filter(label_set=label_set, pk__in={row[2] for row in rows}))
    labels.sort(key=lambda label: (label.created, label.pk))
    return version, labels, rows


def save_prototypes(claim: Claim, prototypes: PrototypeSet) -> None:
    """Keep what was learned of a version, tell the page, and let the batches follow that somebody is looking at."""
    with fenced(claim):
        PrototypeSet.objects.filter(label_set_id=prototypes.label_set_id, version=prototypes.version).delete()
        prototypes.save()
        PrototypeSet.objects.filter(
            label_set_id=prototypes.label_set_id, version__lt=prototypes.version - KEPT_REVISIONS
        ).delete()
        record(claim.job_id, "prototypes", version=prototypes.version, health=prototypes.health)
        batches = Classification.objects.filter(label_set_id=prototypes.label_set_id).order_by("-created")
        latest = list(batches.values_list("job_id", flat=True)[:1])
        unanswered = list(batches.filter(revision=0).values_list("job_id", flat=True))
        recently = timezone.now() - IN_HAND
        in_hand = list(batches.filter(query_images__answered_at__gte=recently).values_list("job_id", flat=True))
        for job_id in dict.fromkeys(latest + unanswered + in_hand):
            wake(job_id)


def current_prototypes(label_set: LabelSet) -> PrototypeSet | None:
    """What was learned of the label set as it is now, or None while that is still to be done."""
    return PrototypeSet.objects.filter(
        label_set=label_set, version=label_set.version, model_id=label_set.model_id, engine_version=ENGINE_VERSION
    ).first()


def open_queries(
    claim: Claim, classification: Classification, prototypes: PrototypeSet
) -> tuple[bool, list[QueryImage]]:
    """What is to be answered, and whether that is a re-sorting: every query image anew, for the prototypes are."""
    with fenced(claim):
        if classification.source == Classification.Source.COLLECTION:
            _adopt_photos(classification)
        if classification.revision == 0:
            classification.revision, classification.prototypes = 1, prototypes
            classification.save(update_fields=["prototypes", "revision"])
        queries = classification.query_images.select_related("photo__blob").order_by("id")
        is_resort = classification.prototypes_id != prototypes.pk
        if not is_resort:
            queries = queries.exclude(predictions__revision=classification.revision)
        return is_resort, list(queries)


def save_predictions(
    claim: Claim, classification: Classification, predictions: Sequence[Prediction], *, done: int, total: int
) -> None:
    """Add predictions to the current revision, and tell the page how far it is."""
    with fenced(claim, done=done, total=total):
        for prediction in predictions:
            prediction.revision = classification.revision
        Prediction.objects.bulk_create(predictions, batch_size=200, ignore_conflicts=True)
        record(claim.job_id, "predictions", done=done, total=total, revision=classification.revision)


def save_resorted(
    claim: Claim, classification: Classification, prototypes: PrototypeSet, predictions: Sequence[Prediction]
) -> None:
    """Put a whole new revision in the place of the last one, at once; a few old ones are kept."""
    n = len(predictions)
    with fenced(claim, done=n, total=n):
        classification.prototypes = prototypes
        classification.revision += 1
        classification.save(update_fields=["prototypes", "revision"])
        save_predictions(claim, classification, predictions, done=n, total=n)
        old = classification.revision - KEPT_REVISIONS
        Prediction.objects.filter(query__classification=classification, revision__lte=old).delete()


def _adopt_photos(classification: Classification) -> None:
    photos = classification.collection.photos.exclude(
        pk__in=QueryImage.objects.filter(classification=classification).values("photo")
    )
    rows = [QueryImage(classification=classification, photo_id=pk) for pk in photos.values_list("pk", flat=True)]
    QueryImage.objects.bulk_create(rows, batch_size=500, ignore_conflicts=True)


def _create_classification(
    label_set: LabelSet, name: str, source: Classification.Source, collection: Collection, top_k: int
) -> Classification:
    _require_top_k(top_k)
    with transaction.atomic():
        batch = Classification(label_set=label_set, name=name[:120], source=source, collection=collection, top_k=top_k)
        batch.job = create_job(
            label_set.owner,
            Job.Kind.CLASSIFY,
            queue=Job.Queue.INTERACTIVE,
            title=_("Classifying %(name)s") % {"name": name},
            url=batch.get_absolute_url(),
        )
        batch.save()
    return batch


def _open_intake(label_set: LabelSet, archive: tuple[str, int], *, title: str, **aim: Any) -> Import:
    name, size = archive
    with transaction.atomic():
        batch = open_import(
            label_set.drops,
            title=title,
            url=label_set.get_absolute_url(),
            queue=Job.Queue.INTERACTIVE,
            archive_name=name,
            archive_size=size,
        )
        Intake.objects.create(batch=batch, label_set=label_set, **aim)
    return batch


def _require_top_k(top_k: int) -> None:
    if not 1 <= top_k <= 20:
        raise LabelSetError(_("Between 1 and 20 best labels can be shown, not %(k)s.") % {"k": top_k})


def _unlearn_answer(query: QueryImage) -> None:
    """Take the photo out of the examples that its answer had made it one of."""
    if query.answer_id is None or query.answered_at is None:
        return
    taught = Example.objects.current().filter(
        label_id=query.answer_id, photo=query.photo_id, created__gte=query.answered_at
    )
    for example in taught.select_related("label__label_set"):
        remove_example(example)


def _require_examples(label_set: LabelSet) -> None:
    labels = Label.objects.current().filter(label_set=label_set)
    if not labels.exists():
        raise LabelSetError(
            _("“%(name)s” has no labels yet. Add a label and give it one example or more, then classify.")
            % {"name": label_set.name}
        )
    filled = labels.filter(examples__to_version=None, examples__isnull=False).distinct().count()
    if not filled:
        n = labels.count()
        raise LabelSetError(
            ngettext(
                "The label of “%(name)s” has no example yet. Give it one photo or more, then classify.",
                "None of the %(n)d labels of “%(name)s” has an example yet. "
                "Give one photo or more to each, then classify.",
                n,
            )
            % {"n": n, "name": label_set.name}
        )


def _label_name(label_set: LabelSet, name: str, *, apart_from: Label | None = None) -> str:
    name = " ".join(name.split())[:80]
    if not name:
        raise LabelSetError(_("A label needs a name."))
    others = Label.objects.current().filter(label_set=label_set, name__iexact=name)
    if apart_from is not None:
        others = others.exclude(pk=apart_from.pk)
    if others.exists():
        raise LabelSetError(_("There is a label “%(name)s” already; choose another name.") % {"name": name})
    return name


def _new_version(label_set: LabelSet, change: Callable[[int], T]) -> T:
    """Make a change as one new version, and wake the job that learns it."""
    with transaction.atomic():
        LabelSet.objects.filter(pk=label_set.pk).update(version=F("version") + 1)
        label_set.version = LabelSet.objects.values_list("version", flat=True).get(pk=label_set.pk)
        result = change(label_set.version)
        record(label_set.job_id, "version", version=label_set.version)
        wake(label_set.job_id)
    return result
