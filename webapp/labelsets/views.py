"""Doors to label sets: their pages and fragments, the gestures on them, their labels and their examples."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from django.conf import settings
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from django.views.decorators.http import require_safe

from webapp import trash
from webapp.labelsets import cards, services
from webapp.labelsets.doors import (
    done,
    gesture,
    is_script,
    number_from,
    opened,
    opening_of,
    own_example,
    own_label,
    own_set,
    sentences,
    uuid_or_404,
    where_from,
)
from webapp.labelsets.forms import MOST_TOP_K, CreateForm, NameForm, ThresholdForm, checked
from webapp.labelsets.models import Example, Label, LabelSet
from webapp.labelsets.services import LabelSetError
from webapp.library.doors import json_door, person, read_json
from webapp.library.models import Category, Collection, Photo
from webapp.library.services import take_form_files
from webapp.training.models import Model

PAGE = 48
PICKED = 60  # photos of a page of the dialog that picks from a collection
MOST_PICKED = 500


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
    return render(request, "labelsets/label_set.html", set_page(request, own_set(request, pk)))


@require_safe
def labels(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The labels column, and the chips of the page's header."""
    one = own_set(request, pk)
    context = {"set": one, "board": cards.read_board(one, first=number_from(request, "labels"))}
    return render(request, "labelsets/_labels.html", context)


@require_safe
def pick(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Where examples of a label come from: a collection's photos, and on the page without a script files as well."""
    label = own_label(request, pk)
    collections = Collection.objects.of(person(request)).shown().order_by("name")
    chosen = request.GET.get("collection")
    offered = collections.with_photos()
    collection = get_object_or_404(collections, pk=uuid_or_404(chosen)) if chosen else offered.first()
    context: dict[str, Any] = {"label": label, "collections": offered, "collection": collection}
    if replaced := _replaced(label, request.GET):
        context["replaces"] = replaced.pk
    if collection is not None:
        context |= _photos_to_pick(request, collection)
    if is_script(request):
        return render(request, "labelsets/_picker.html", context)
    context["form_mb"] = settings.MAX_FORM_BYTES // 1024**2
    return render(request, "labelsets/add_examples.html", context)


def set_page(request: HttpRequest, one: LabelSet) -> dict[str, Any]:
    """What the page of a label set shows, with a batch beside it or without."""
    return {
        "set": one,
        "board": cards.read_board(one, first=number_from(request, "labels")),
        "batches": cards.recent_batches(one),
        "models": Model.objects.usable_by(person(request)).built_in_first(),
        "collections": Collection.objects.of(person(request)).shown().with_photos().order_by("name"),
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


def _photos_to_pick(request: HttpRequest, collection: Collection) -> dict[str, Any]:
    photos = collection.photos.order_by("serial", "pk")
    categories = Category.objects.filter(collection=collection, photos__isnull=False).distinct()[:2000]
    category = request.GET.get("category", "")
    if category.isdecimal():
        photos = photos.filter(category=get_object_or_404(Category, pk=category, collection=collection))
    page = Paginator(photos, PICKED).get_page(request.GET.get("page"))
    query = {"collection": collection.pk, "category": category, "replaces": request.GET.get("replaces", "")}
    return {"categories": categories, "category": category, "page": page, "query": urlencode(query)}


# Gestures on a label set --------------------------------------------------------------------------


@gesture
def create(request: HttpRequest) -> HttpResponse:
    values = checked(CreateForm(request.POST, user=person(request)))
    one = services.create_label_set(person(request), values["name"], values.get("model"))
    return done(request, one.get_absolute_url(), "")


@gesture
def rename(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = own_set(request, pk)
    services.rename_label_set(one, checked(NameForm(request.POST))["name"])
    return done(request, one.get_absolute_url(), _("Renamed."))


@gesture
def delete(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = own_set(request, pk)
    trash.put_away(one)
    message = _("“%(name)s” is put away.") % {"name": one.name}
    return done(request, reverse("labelsets:list"), message, undo=reverse("labelsets:restore", args=[pk]))


@gesture
def restore(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = get_object_or_404(LabelSet, pk=pk, owner=person(request))
    if not trash.bring_back(one):
        raise LabelSetError(_("It is too late: “%(name)s” is being deleted.") % {"name": one.name})
    return done(request, one.get_absolute_url(), _("“%(name)s” is back.") % {"name": one.name})


@gesture
def delete_for_good(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Of what is put away alone; it is done in a moment, until when it can be undone."""
    one = get_object_or_404(LabelSet, pk=pk, owner=person(request), deleted_at__isnull=False)
    trash.delete_soon(one)
    undo = reverse("labelsets:restore", args=[pk])
    return done(request, reverse("labelsets:list"), trash.said_of(one), undo=undo)


@gesture
def use_model(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = own_set(request, pk)
    model = get_object_or_404(Model.objects.usable_by(person(request)), pk=uuid_or_404(request.POST.get("model")))
    if model.pk != one.model_id:
        services.use_model(one, model)
    return done(request, one.get_absolute_url(), _("It learns with “%(name)s” now.") % {"name": model.name})


@gesture
def threshold(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = own_set(request, pk)
    services.set_reject_above(one, checked(ThresholdForm(request.POST))["reject_above"])
    return done(request, where_from(request), "")


# On its labels ------------------------------------------------------------------------------------


@gesture
def add_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = services.add_label(own_set(request, pk), request.POST.get("name", ""))
    message = _("Added the label “%(name)s”. Give it a photo or more.") % {"name": label.name}
    return done(request, _page_of(label), message, undo=reverse("labelsets:remove-label", args=[label.pk]), label=label)


@gesture
def rename_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = own_label(request, pk)
    services.rename_label(label, request.POST.get("name", ""))
    return done(request, _page_of(label), _("Renamed."))


@gesture
def remove_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = own_label(request, pk)
    services.remove_label(label)
    message = _("The label “%(name)s” was removed.") % {"name": label.name}
    return done(request, _page_of(label), message, undo=reverse("labelsets:restore-label", args=[pk]))


@gesture
def restore_label(request: HttpRequest, pk: UUID) -> HttpResponse:
    label = own_label(request, pk)
    services.restore_label(label)
    return done(request, _page_of(label), _("“%(name)s” is back.") % {"name": label.name}, label=label)


def _page_of(label: Label) -> str:
    return label.label_set.get_absolute_url()


# On their examples --------------------------------------------------------------------------------


@gesture
def add_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Photos that are there already become examples."""
    label = own_label(request, pk)
    said = read_json(request) if request.content_type == "application/json" else {}
    ids = said.get("photos") if said else request.POST.getlist("photos")
    added = services.add_examples(label, _own_photos(request, ids), instead_of=_replaced(label, said or request.POST))
    message = ngettext("%(n)d photo added to %(name)s.", "%(n)d photos added to %(name)s.", len(added))
    return done(request, _page_of(label), message % {"n": len(added), "name": label.name}, label=label)


@gesture
def upload_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Photos in a plain form, all in one request, become examples: the way of browsers without a script."""
    label = own_label(request, pk)
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
    return done(request, _page_of(label), message % {"n": len(files)}, label=label)


@json_door("POST")
@sentences
def label_examples(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Begin an upload whose photos become examples of the label."""
    label = own_label(request, pk)
    opening, replaced = opening_of(request), _replaced(label, read_json(request))
    archive = (opening.archive_name, opening.archive_size)
    batch = services.open_example_intake(label, instead_of=replaced, archive=archive)
    return JsonResponse(opened(batch, opening), status=HTTPStatus.CREATED)


@gesture
def remove_example(request: HttpRequest, pk: UUID) -> HttpResponse:
    example = own_example(request, pk)
    services.remove_example(example)
    message = _("One photo was taken out of %(name)s.") % {"name": example.label.name}
    return done(request, _page_of(example.label), message, undo=reverse("labelsets:restore-example", args=[pk]))


@gesture
def restore_example(request: HttpRequest, pk: UUID) -> HttpResponse:
    example = own_example(request, pk)
    services.restore_example(example)
    return done(request, _page_of(example.label), _("The photo is back in %(name)s.") % {"name": example.label.name})


def _own_photos(request: HttpRequest, ids: Any) -> list[Photo]:
    """These photos, all of them the person's own; one that is not is as good as one that does not exist."""
    if not isinstance(ids, list) or not ids:
        raise LabelSetError(_("Choose one photo or more."))
    if len(ids) > MOST_PICKED:
        raise LabelSetError(_("At most %(n)d photos can be added at once.") % {"n": MOST_PICKED})
    wanted = {uuid_or_404(one) for one in ids}
    found = list(Photo.objects.of(person(request)).filter(pk__in=wanted))
    if len(found) < len(wanted):
        raise Http404
    return found


def _replaced(label: Label, said: Any) -> Example | None:
    """The example that what comes shall take the place of, if any was named."""
    if not said.get("replaces"):
        return None
    own: Example = get_object_or_404(Example, pk=uuid_or_404(said["replaces"]), label=label)
    return own
