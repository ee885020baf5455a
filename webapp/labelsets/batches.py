"""Doors to what is classified with a label set: batches, their pages and fragments, and a person's answers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from uuid import UUID

from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_safe

from webapp.jobs.services import wake
from webapp.labelsets import exports, services
from webapp.labelsets.doors import (
    done,
    gesture,
    number_from,
    opened,
    opening_of,
    own_batch,
    own_set,
    query_of,
    sentences,
    uuid_or_404,
)
from webapp.labelsets.forms import TopKForm, checked
from webapp.labelsets.models import Classification
from webapp.labelsets.results import read_evidence, read_results
from webapp.labelsets.services import LabelSetError
from webapp.labelsets.views import set_page
from webapp.library.doors import json_door, person, read_json
from webapp.library.models import Collection

# Pages and their fragments ------------------------------------------------------------------------


@require_safe
def classification(request: HttpRequest, pk: UUID, batch_id: UUID) -> HttpResponse:
    batch = own_batch(request, batch_id)
    if batch.label_set_id != pk:
        raise Http404
    context = set_page(request, batch.label_set) | _results(request, batch)
    if photo_id := request.GET.get("photo"):
        context["evidence"] = read_evidence(query_of(batch, uuid_or_404(photo_id)))
    return render(request, "labelsets/label_set.html", context)


@require_safe
def results(request: HttpRequest, pk: UUID) -> HttpResponse:
    return render(request, "labelsets/_results_update.html", _results(request, own_batch(request, pk)))


@require_safe
def evidence(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    batch = own_batch(request, pk)
    context = {"batch": batch, "evidence": read_evidence(query_of(batch, photo_id))}
    return render(request, "labelsets/_evidence.html", context)


@require_GET
def export(request: HttpRequest, pk: UUID, kind: str) -> HttpResponseBase:
    if kind not in exports.KINDS:
        raise Http404
    batch = own_batch(request, pk)
    name = exports.file_name(batch, kind)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingHttpResponse(exports.stream(batch, kind), content_type=exports.KINDS[kind], headers=headers)


# Gestures -----------------------------------------------------------------------------------------


@json_door("POST")
@sentences
def classify_drop(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Begin an upload whose photos are classified as they come: into a new batch, or into one that is named."""
    one, opening, said = own_set(request, pk), opening_of(request), read_json(request)
    if said.get("batch"):
        batch = own_batch(request, uuid_or_404(said["batch"]))
    else:
        batch = services.classify_drop(one, top_k=checked(TopKForm({"top_k": said.get("topK", 3)}))["top_k"])
    archive = (opening.archive_name, opening.archive_size)
    answer = opened(services.open_query_intake(batch, archive=archive), opening)
    answer |= {"pageUrl": batch.get_absolute_url(), "resultsUrl": reverse("labelsets:results", args=[batch.pk])}
    answer |= {"classificationJob": str(batch.job_id), "batch": str(batch.pk)}
    return JsonResponse(answer, status=HTTPStatus.CREATED)


@gesture
def classify_collection(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = own_set(request, pk)
    collections = Collection.objects.of(person(request)).shown()
    collection = get_object_or_404(collections, pk=uuid_or_404(request.POST.get("collection")))
    batch = services.classify_collection(one, collection, top_k=checked(TopKForm(request.POST))["top_k"])
    return done(request, batch.get_absolute_url(), "")


@gesture
def answer(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    """A person says what a photo is: a label's id, or nothing for "none of these"."""
    batch = own_batch(request, pk)
    query = query_of(batch, photo_id)
    is_json = request.content_type == "application/json"
    said: Any = read_json(request) if is_json else request.POST
    if "label" not in said:
        raise LabelSetError(_("Say which label it is, or that it is none of these."))
    label = get_object_or_404(batch.label_set.labels, pk=uuid_or_404(said["label"])) if said["label"] else None
    becomes_example = said.get("becomesExample") in (True, "on", "true", "1")
    services.answer(query, label, becomes_example=becomes_example)
    message = _("It is %(name)s.") % {"name": label.name} if label else _("It is none of these.")
    return done(
        request, batch.get_absolute_url(), message, undo=reverse("labelsets:take-answer-back", args=[pk, photo_id])
    )


@gesture
def take_answer_back(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    batch = own_batch(request, pk)
    services.take_answer_back(query_of(batch, photo_id))
    return done(request, batch.get_absolute_url(), _("Your answer was taken back."))


@gesture
def top_k(request: HttpRequest, pk: UUID) -> HttpResponse:
    batch = own_batch(request, pk)
    services.set_top_k(batch, checked(TopKForm(request.POST))["top_k"])
    return done(request, batch.get_absolute_url(), "")


@gesture
def sort_again(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Answer an older batch by what the label set knows now."""
    batch = own_batch(request, pk)
    wake(batch.job_id)
    return done(request, batch.get_absolute_url(), "")


def _results(request: HttpRequest, batch: Classification) -> dict[str, Any]:
    group, after = request.GET.get("group", ""), number_from(request, "after")
    found = read_results(batch, first=number_from(request, "from"), shown_group=group, after=after or None)
    state = {
        "job": str(batch.job_id),
        "lastEvent": batch.job.last_event,
        "resultsUrl": reverse("labelsets:results", args=[batch.pk]),
        "pageUrl": batch.get_absolute_url(),
        "photosUrl": reverse("labelsets:evidence", args=[batch.pk, batch.pk]).removesuffix(f"{batch.pk}/"),
        "query": request.GET.urlencode() if group or found.first else "",
        "done": found.done,
        "total": found.total,
        "isLive": found.is_live,
        "isResorting": found.is_live and found.done == found.total,
        "summary": found.summary,
    }
    return {"batch": batch, "results": found, "results_state": state, "shown_top_k": batch.top_k}
