"""From examples to prototypes to answers, through the real encoder and the real tasks."""

from __future__ import annotations

import numpy as np
import pytest

from fewshot_engine import inference
from tests.factories import make_collection, make_label_set, picture
from tests.worker.test_intake import take_in
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.labelsets import services
from webapp.labelsets.models import Classification, Intake, LabelSet, Prediction
from webapp.library.models import Collection, Photo
from webapp.training.models import ACCURATE, DEFAULT_ENCODER, FAST, Model
from worker import runtime, vectors
from worker.tasks import run_job

pytestmark = pytest.mark.django_db


@pytest.fixture
def shapes(owner: User) -> Collection:
    collection = make_collection(owner)
    take_in(collection, {f"class {k}/{n}.jpg": picture(k, n) for k in range(3) for n in range(5)})
    return collection


def taught(owner: User, shapes: Collection, *, examples: int = 2) -> LabelSet:
    """A label set of the three shapes, learned."""
    label_set, labels = make_label_set(owner, labels=("class 0", "class 1", "class 2"))
    for label in labels:
        services.add_examples(label, Photo.objects.filter(collection=shapes, category__name=label.name)[:examples])
    learn(label_set)
    return label_set


def learn(label_set: LabelSet) -> None:
    run_job(str(label_set.job_id))
    label_set.refresh_from_db()


def answers(batch: Classification) -> dict[str, str]:
    batch.refresh_from_db()
    rows = Prediction.objects.filter(query__classification=batch, revision=batch.revision)
    return {p.query.photo.name + "/" + p.query.photo.category.name: p.label.name for p in rows.select_related()}


def test_a_collection_is_sorted_by_its_likeness_to_the_examples(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    found = answers(batch)
    assert len(found) == 15
    right = sum(name.endswith(answer) for name, answer in found.items())
    assert right >= 13
    prediction = Prediction.objects.filter(query__classification=batch).first()
    assert prediction is not None
    assert 0 <= prediction.stranger <= 1
    assert 0 < prediction.confidence <= 1
    assert len(prediction.top_k) == 3
    assert prediction.evidence[0][1] == str(prediction.label_id)


def test_an_example_borrows_from_the_classes_that_its_encoder_knows(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes, examples=1)
    kept = services.current_prototypes(label_set)
    assert kept is not None
    fitted = inference.PrototypeModel.from_bytes(bytes(kept.data))
    blobs = [Photo.objects.get(pk=photo).blob_id for photo in kept.examples]
    _there, raw = vectors.read(label_set.model.backbone, blobs)
    lent = runtime.likeness(label_set.model, raw, None)
    assert lent is not None
    assert np.linalg.norm(lent, axis=1).min() > 0.05
    expected = inference.fit(raw, fitted.support_labels, 3, likeness=lent)
    np.testing.assert_allclose(fitted.prototypes, expected.prototypes, atol=1e-5)


def test_prototypes_belong_to_a_version_and_are_made_once(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    first = services.current_prototypes(label_set)
    assert first is not None and first.version == label_set.version
    services.wake(label_set.job_id)
    learn(label_set)
    assert services.current_prototypes(label_set) == first
    services.remove_example(label_set.labels.first().examples.first())
    label_set.refresh_from_db()
    assert services.current_prototypes(label_set) is None
    learn(label_set)
    second = services.current_prototypes(label_set)
    assert second is not None and len(second.examples) == 5


def test_a_correction_is_pinned_teaches_and_re_sorts(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    query = batch.query_images.get(photo__name="4.jpg", photo__category__name="class 0")
    other = label_set.labels.get(name="class 1")
    services.answer(query, other, becomes_example=True)
    learn(label_set)
    run_job(str(batch.job_id))
    batch.refresh_from_db()
    query.refresh_from_db()
    assert batch.revision == 2
    assert query.is_answered and query.answer == other
    assert Prediction.objects.filter(query__classification=batch, revision=2).count() == 15
    assert other.examples.filter(photo=query.photo, to_version=None).exists()


def test_undoing_a_correction_takes_the_example_out_again(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    query = batch.query_images.get(photo__name="4.jpg", photo__category__name="class 0")
    other = label_set.labels.get(name="class 1")
    services.answer(query, other, becomes_example=True)
    query.refresh_from_db()
    services.take_answer_back(query)
    query.refresh_from_db()
    assert not query.is_answered
    assert not other.examples.current().filter(photo=query.photo).exists()


def test_dropped_photos_are_answered_as_they_come(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_drop(label_set)
    drop = services.open_query_intake(batch)
    from tests.worker.test_intake import send

    send(drop, {"new.jpg": picture(1, 77)})
    run_job(str(drop.job_id))
    run_job(str(batch.job_id))
    prediction = Prediction.objects.get(query__classification=batch)
    assert prediction.label.name == "class 1"


def test_dropped_examples_make_one_version_when_all_are_there(owner: User) -> None:
    from tests.worker.test_intake import send
    from webapp.library.services import close_import

    label_set, (label,) = make_label_set(owner, labels=("thing",))
    before = label_set.version
    drop = services.open_example_intake(label)
    send(drop, {f"{n}.jpg": picture(0, n) for n in range(3)})
    close_import(drop)
    run_job(str(drop.job_id))
    label_set.refresh_from_db()
    assert label.examples.current().count() == 3
    assert label_set.version == before + 1
    assert Intake.objects.get(batch=drop).label == label


def test_one_label_with_one_example_answers(owner: User, shapes: Collection) -> None:
    label_set, (label,) = make_label_set(owner, labels=("only",))
    services.add_examples(label, Photo.objects.filter(collection=shapes)[:1])
    learn(label_set)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    assert set(answers(batch).values()) == {"only"}


def test_without_labels_or_examples_it_is_said_what_to_do(owner: User, shapes: Collection) -> None:
    label_set, _none = make_label_set(owner)
    with pytest.raises(services.LabelSetError, match="no labels yet"):
        services.classify_collection(label_set, shapes)
    services.add_label(label_set, "empty")
    with pytest.raises(services.LabelSetError, match="no example"):
        services.classify_collection(label_set, shapes)


def test_old_revisions_go(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    for n in range(4):
        services.add_examples(label_set.labels.first(), Photo.objects.filter(collection=shapes)[n + 5 : n + 6])
        learn(label_set)
        run_job(str(batch.job_id))
    batch.refresh_from_db()
    kept = Prediction.objects.filter(query__classification=batch).values_list("revision", flat=True).distinct()
    assert sorted(set(kept)) == [batch.revision - 2, batch.revision - 1, batch.revision]
    batch.job.refresh_from_db()
    assert batch.job.state == Job.State.IDLE


def test_a_label_set_goes_from_one_encoder_to_the_other_and_back(owner: User, shapes: Collection) -> None:
    label_set = taught(owner, shapes)
    batch = services.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    other = FAST if DEFAULT_ENCODER == ACCURATE else ACCURATE
    for backbone in (other, DEFAULT_ENCODER):
        services.use_model(label_set, Model.objects.get(backbone=backbone, kind=Model.Kind.BUILT_IN))
        learn(label_set)
        run_job(str(batch.job_id))
        batch.refresh_from_db()
        assert batch.prototypes is not None and batch.prototypes.model.backbone == backbone
        right = sum(name.endswith(answer) for name, answer in answers(batch).items())
        assert right >= 13
