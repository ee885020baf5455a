"""Doors to label sets: their pages and fragments, the gestures on them, and what is classified with them.

A gesture answers scripts with {"message", "undo", …} and forms with a redirect and a toast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode, urlsplit
from uuid import UUID

from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from django.views.decorators.http import require_GET, require_POST, require_safe

from webapp import trash
from webapp.jobs.services import wake
from webapp.labelsets import cards, exports, services
from webapp.labelsets.forms import MOST_TOP_K, CreateForm, NameForm, ThresholdForm, TopKForm, checked
from webapp.labelsets.models import Classification, Example, Label, LabelSet, QueryImage
from webapp.labelsets.results import read_evidence, read_results
from webapp.labelsets.services import LabelSetError
from webapp.library.doors import Opening, describe_import, json_door, person, read_json, read_opening
from webapp.library.models import Category, Collection, Import, Photo
from webapp.library.services import UploadError, add_to_manifest, take_form_files
from webapp.training.models import Model

Door = Callable[..., HttpResponse]

PAGE = 48
PICKED = 60  # photos of a page of the dialog that picks from a collection
MOST_PICKED = 500


def gesture(view: Door) -> Door:
    """A POST by a form or a script; what cannot be done is said where it was tried."""

    @require_POST
    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except (LabelSetError, UploadError) as error:
            if _is_script(request):
                return JsonResponse({"error": str(error)}, status=HTTPStatus.BAD_REQUEST)
            messages.error(request, str(error))
            return redirect(_back(request))

    return guarded


def sentences(view: Door) -> Door:
    """For doors for scripts alone: what cannot be done is a sentence, as for uploads."""

    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except LabelSetError as error:
            raise UploadError(str(error)) from error

    return guarded


# Pages and their fragments ------------------------------------------------------------------------


@require_safe
def label_sets(request: HttpRequest) -> HttpResponse:
    page = Paginator(cards.with_counts(person(request)), PAGE).get_page(request.GET.get("page"))
    context = {
        "page": page,
        "covers": cards.read_covers(list(page.object_list)),
        "form": CreateForm(user=person(request), auto_id="new-%s"),
        "models": Model.objects.usable_by(person(request)).built_in_first(),
        "put_away": trash.put_away_label_sets(person(request)),
    }
    return render(request, "labelsets/list.html", context)


@require_safe
def label_set(request: HttpRequest, pk: UUID) -> HttpResponse:
    return render(request, "labelsets/label_set.html", _page(request, _own_set(request, pk)))


@require_safe
def classification(request: HttpRequest, pk: UUID, batch_id: UUID) -> HttpResponse:
    batch = _own_batch(request, batch_id)
    if batch.label_set_id != pk:
        raise Http404
    context = _page(request, batch.label_set) | _results(request, batch)
    if photo_id := request.GET.get("photo"):
        context["evidence"] = read_evidence(_query(batch, _uuid(photo_id)))
    return render(request, "labelsets/label_set.html", context)


@require_safe
def labels(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The labels column, and the chips of the page's header."""
    one = _own_set(request, pk)
    context = {"set": one, "board": cards.read_board(one, first=_number(request, "labels"))}
    return render(request, "labelsets/_labels.html", context)


@require_safe
def results(request: HttpRequest, pk: UUID) -> HttpResponse:
    return render(request, "labelsets/_results_update.html", _results(request, _own_batch(request, pk)))


@require_safe
def evidence(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    batch = _own_batch(request, pk)
    context = {"batch": batch, "evidence": read_evidence(_query(batch, photo_id))}
    return render(request, "labelsets/_evidence.html", context)


@require_safe
def pick(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Where examples of a label come from: a collection's photos, and on the page without a script files as well."""
    label = _own_label(request, pk)
    collections = Collection.objects.of(person(request)).shown().order_by("name")
    chosen = request.GET.get("collection")
    collection = get_object_or_404(collections, pk=_uuid(chosen)) if chosen else collections.first()
    context: dict[str, Any] = {"label": label, "collections": collections, "collection": collection}
    if replaced := _replaced(label, request.GET):
        context["replaces"] = replaced.pk
    if collection is not None:
        context |= _photos_to_pick(request, collection)
    if _is_script(request):
        return render(request, "labelsets/_picker.html", context)
    context["form_mb"] = settings.MAX_FORM_BYTES // 1024**2
    return render(request, "labelsets/add_examples.html", context)


@require_GET
def export(request: HttpRequest, pk: UUID, kind: str) -> HttpResponseBase:
    if kind not in exports.KINDS:
        raise Http404
    batch = _own_batch(request, pk)
    name = exports.file_name(batch, kind)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingHttpResponse(exports.stream(batch, kind), content_type=exports.KINDS[kind], headers=headers)


# Gestures on a label set --------------------------------------------------------------------------


@gesture
def create(request: HttpRequest) -> HttpResponse:
    values = checked(CreateForm(request.POST, user=person(request)))
    one = services.create_label_set(person(request), values["name"], values.get("model"))
    return _done(request, one.get_absolute_url(), "")


@gesture
def rename(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own_set(request, pk)
    services.rename_label_set(one, checked(NameForm(request.POST))["name"])
    return _done(request, one.get_absolute_url(), _("Renamed."))


@gesture
def delete(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own_set(request, pk)
    trash.put_away(one)
    message = _("“%(name)s” is put away.") % {"name": one.name}
    return _done(request, reverse("labelsets:list"), message, undo=reverse("labelsets:restore", args=[pk]))


@gesture
def restore(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = get_object_or_404(LabelSet, pk=pk, owner=person(request))
    if not trash.bring_back(one):
        raise LabelSetError(_("It is too late: “%(name)s” is being deleted.") % {"name": one.name})
    return _done(request, one.get_absolute_url(), _("“%(name)s” is back.") % {"name": one.name})


@gesture
def delete_for_good(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Of what is put away alone; it is done in a moment, until when it can be undone."""
    one = get_object_or_404(LabelSet, pk=pk, owner=person(request), deleted_at__isnull=False)
    trash.delete_soon(one)
    undo = reverse("labelsets:restore", args=[pk])
    return _done(request, reverse("labelsets:list"), trash.said_of(one), undo=undo)


@gesture
def use_model(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own_set(request, pk)
    model = get_object_or_404(Model.objects.usable_by(person(request)), pk=_uuid(request.POST.get("model")))
    if model.pk != one.model_id:
        services.use_model(one, model)
    return _done(request, one.get_absolute_url(), _("It learns with “%(name)s” now.") % {"name": model.name})


@gesture
def threshold(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own_set(request, pk)
    services.set_reject_above(one, checked(ThresholdForm(request.POST))["reject_above"])
    return _done(request, _back(request), "")


@gesture
def add_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = services.add_label(_own_set(request, pk), request.POST.get("name", ""))
    message = _("Added the label “%(name)s”. Give it a photo or more.") % {"name": label.name}
    return _done(
        request, _page_of(label), message, undo=reverse("labelsets:remove-label", args=[label.pk]), label=label
    )


@gesture
def rename_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = _own_label(request, pk)
    services.rename_label(label, request.POST.get("name", ""))
    return _done(request, _page_of(label), _("Renamed."))


@gesture
def remove_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = _own_label(request, pk)
    services.remove_label(label)
    message = _("The label “%(name)s” was removed.") % {"name": label.name}
    return _done(request, _page_of(label), message, undo=reverse("labelsets:restore-label", args=[pk]))


@gesture
def restore_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = _own_label(request, pk)
    services.restore_label(label)
    return _done(request, _page_of(label), _("“%(name)s” is back.") % {"name": label.name}, label=label)


@gesture
def add_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Photos that are there already become examples."""
    label = _own_label(request, pk)
    said = read_json(request) if request.content_type == "application/json" else {}
    ids = said.get("photos") if said else request.POST.getlist("photos")
    added = services.add_examples(label, _own_photos(request, ids), instead_of=_replaced(label, said or request.POST))
    message = ngettext("%(n)d photo added to %(name)s.", "%(n)d photos added to %(name)s.", len(added))
    return _done(request, _page_of(label), message % {"n": len(added), "name": label.name}, label=label)


@gesture
def upload_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Photos in a plain form, all in one request, become examples: the way of browsers without a script."""
    label = _own_label(request, pk)
    files = request.FILES.getlist("photos")
    if not files:
        raise LabelSetError(_("Choose one photo or more."))
    batch = services.open_example_intake(label, instead_of=_replaced(label, request.POST))
    take_form_files(batch, files)
    message = ngettext(
        "%(n)d photo is being looked at; Activity says what became of it.",
        "%(n)d photos are being looked at; Activity says what became of them.",
        len(files),
    )
    return _done(request, _page_of(label), message % {"n": len(files)}, label=label)


@gesture
def remove_example(request: HttpRequest, pk: UUID) -> HttpResponse:
    example = _own_example(request, pk)
    services.remove_example(example)
    message = _("One photo was taken out of %(name)s.") % {"name": example.label.name}
    return _done(request, _page_of(example.label), message, undo=reverse("labelsets:restore-example", args=[pk]))


@gesture
def restore_example(request: HttpRequest, pk: UUID) -> HttpResponse:
    example = _own_example(request, pk)
    services.restore_example(example)
    return _done(request, _page_of(example.label), _("The photo is back in %(name)s.") % {"name": example.label.name})


@json_door("POST")
@sentences
def label_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Begin an upload whose photos become examples of the label."""
    label = _own_label(request, pk)
    opening, replaced = _opening(request), _replaced(label, read_json(request))
    archive = (opening.archive_name, opening.archive_size)
    batch = services.open_example_intake(label, instead_of=replaced, archive=archive)
    return JsonResponse(_opened(batch, opening), status=HTTPStatus.CREATED)


# Classifying --------------------------------------------------------------------------------------


@json_door("POST")
@sentences
def classify_drop(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Begin an upload whose photos are classified as they come: into a new batch, or into one that is named."""
    one, opening, said = _own_set(request, pk), _opening(request), read_json(request)
    if said.get("batch"):
        batch = _own_batch(request, _uuid(said["batch"]))
    else:
        batch = services.classify_drop(one, top_k=checked(TopKForm({"top_k": said.get("topK", 3)}))["top_k"])
    archive = (opening.archive_name, opening.archive_size)
    answer = _opened(services.open_query_intake(batch, archive=archive), opening)
    answer |= {"pageUrl": batch.get_absolute_url(), "resultsUrl": reverse("labelsets:results", args=[batch.pk])}
    answer |= {"classificationJob": str(batch.job_id), "batch": str(batch.pk)}
    return JsonResponse(answer, status=HTTPStatus.CREATED)


@gesture
def classify_collection(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own_set(request, pk)
    collections = Collection.objects.of(person(request)).shown()
    collection = get_object_or_404(collections, pk=_uuid(request.POST.get("collection")))
    batch = services.classify_collection(one, collection, top_k=checked(TopKForm(request.POST))["top_k"])
    return _done(request, batch.get_absolute_url(), "")


@gesture
def answer(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    """A person says what a photo is: a label's id, or nothing for "none of these"."""
    batch = _own_batch(request, pk)
    query = _query(batch, photo_id)
    is_json = request.content_type == "application/json"
    said: Any = read_json(request) if is_json else request.POST
    if "label" not in said:
        raise LabelSetError(_("Say which label it is, or that it is none of these."))
    label = get_object_or_404(batch.label_set.labels, pk=_uuid(said["label"])) if said["label"] else None
    becomes_example = said.get("becomesExample") in (True, "on", "true", "1")
    services.answer(query, label, becomes_example=becomes_example)
    message = _("It is %(name)s.") % {"name": label.name} if label else _("It is none of these.")
    return _done(
        request, batch.get_absolute_url(), message, undo=reverse("labelsets:take-answer-back", args=[pk, photo_id])
    )


@gesture
def take_answer_back(request: HttpRequest, pk: UUID, photo_id: UUID) -> HttpResponse:
    batch = _own_batch(request, pk)
    services.take_answer_back(_query(batch, photo_id))
    return _done(request, batch.get_absolute_url(), _("Your answer was taken back."))


@gesture
def top_k(request: HttpRequest, pk: UUID) -> HttpResponse:
    batch = _own_batch(request, pk)
    services.set_top_k(batch, checked(TopKForm(request.POST))["top_k"])
    return _done(request, batch.get_absolute_url(), "")


@gesture
def sort_again(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Answer an older batch by what the label set knows now."""
    batch = _own_batch(request, pk)
    wake(batch.job_id)
    return _done(request, batch.get_absolute_url(), "")


# What the doors have in common --------------------------------------------------------------------


def _page(request: HttpRequest, one: LabelSet) -> dict[str, Any]:
    return {
        "set": one,
        "board": cards.read_board(one, first=_number(request, "labels")),
        "batches": cards.recent_batches(one),
        "models": Model.objects.usable_by(person(request)).built_in_first(),
        "collections": Collection.objects.of(person(request)).shown().order_by("name"),
        "top_ks": range(1, MOST_TOP_K + 1),
        "shown_top_k": 3,
        "threshold_percent": round(100 * one.reject_above),
        "state": {
            "job": str(one.job_id),
            "lastEvent": one.job.last_event,
            "labelsUrl": reverse("labelsets:labels", args=[one.pk]),
            "classifyUrl": reverse("labelsets:classify-drop", args=[one.pk]),
            "thresholdUrl": reverse("labelsets:threshold", args=[one.pk]),
        },
    }


def _results(request: HttpRequest, batch: Classification) -> dict[str, Any]:
    group, after = request.GET.get("group", ""), _number(request, "after")
    found = read_results(batch, first=_number(request, "from"), shown_group=group, after=after or None)
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


def _photos_to_pick(request: HttpRequest, collection: Collection) -> dict[str, Any]:
    photos = collection.photos.order_by("serial", "pk")
    categories = Category.objects.filter(collection=collection, photos__isnull=False).distinct()[:2000]
    category = request.GET.get("category", "")
    if category.isdecimal():
        photos = photos.filter(category=get_object_or_404(Category, pk=category, collection=collection))
    page = Paginator(photos, PICKED).get_page(request.GET.get("page"))
    query = {"collection": collection.pk, "category": category, "replaces": request.GET.get("replaces", "")}
    return {"categories": categories, "category": category, "page": page, "query": urlencode(query)}


def _opening(request: HttpRequest) -> Opening:
    opening = read_opening(request)
    if not opening.entries and not opening.archive_name:
        raise UploadError(_("No photos were chosen."))
    return opening


def _opened(batch: Import, opening: Opening) -> dict[str, Any]:
    return describe_import(batch, add_to_manifest(batch, opening.entries) if opening.entries else [])


def _own_set(request: HttpRequest, pk: UUID) -> LabelSet:
    own: LabelSet = get_object_or_404(LabelSet.objects.of(person(request)).select_related("model", "job"), pk=pk)
    return own


def _own_label(request: HttpRequest, pk: UUID) -> Label:
    sets = LabelSet.objects.of(person(request))
    own: Label = get_object_or_404(Label.objects.select_related("label_set__owner"), pk=pk, label_set__in=sets)
    return own


def _own_example(request: HttpRequest, pk: UUID) -> Example:
    sets = LabelSet.objects.of(person(request))
    examples = Example.objects.select_related("label__label_set", "photo")
    own: Example = get_object_or_404(examples, pk=pk, label__label_set__in=sets)
    return own


def _own_batch(request: HttpRequest, pk: UUID) -> Classification:
    sets = LabelSet.objects.of(person(request))
    batches = Classification.objects.select_related("job", "label_set__model", "label_set__job")
    return get_object_or_404(batches, pk=pk, label_set__in=sets)


def _query(batch: Classification, photo_id: UUID) -> QueryImage:
    """The batch's query image of a photo, with all that belongs to it."""
    query = get_object_or_404(batch.query_images.select_related("photo__category", "answer"), photo=photo_id)
    query.classification = batch
    return query


def _own_photos(request: HttpRequest, ids: Any) -> list[Photo]:
    """These photos, all of them the person's own; one that is not is as good as one that does not exist."""
    if not isinstance(ids, list) or not ids:
        raise LabelSetError(_("Choose one photo or more."))
    if len(ids) > MOST_PICKED:
        raise LabelSetError(_("At most %(n)d photos can be added at once.") % {"n": MOST_PICKED})
    wanted = {_uuid(one) for one in ids}
    found = list(Photo.objects.of(person(request)).filter(pk__in=wanted))
    if len(found) < len(wanted):
        raise Http404
    return found


def _replaced(label: Label, said: Any) -> Example | None:
    """The example that what comes shall take the place of, if any was named."""
    if not said.get("replaces"):
        return None
    own: Example = get_object_or_404(Example, pk=_uuid(said["replaces"]), label=label)
    return own


def _uuid(text: Any) -> UUID:
    try:
        return UUID(str(text))
    except ValueError as error:
        raise Http404 from error


def _number(request: HttpRequest, name: str) -> int:
    text = request.GET.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 12 else 0


def _page_of(label: Label) -> str:
    return label.label_set.get_absolute_url()


def _is_script(request: HttpRequest) -> bool:
    return request.headers.get("X-Requested-With") == "fetch"


def _back(request: HttpRequest) -> str:
    """Where the person came from, if that was a page of label sets; else the list of them."""
    came_from = request.headers.get("Referer", "")
    if url_has_allowed_host_and_scheme(came_from, {request.get_host()}, require_https=request.is_secure()):
        parts = urlsplit(came_from)
        return parts.path + (f"?{parts.query}" if parts.query else "")
    return reverse("labelsets:list")


def _done(
    request: HttpRequest, to: str, message: str, *, undo: str | None = None, label: Label | None = None
) -> HttpResponse:
    if _is_script(request):
        return JsonResponse({"message": message, "undo": undo, "url": to, "label": label and str(label.pk)})
    if message:
        messages.success(request, message, extra_tags=f"undo={undo}" if undo else "")
    return redirect(to + (f"#label-{label.pk}" if label else ""))
