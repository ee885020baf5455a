"""Pages of collections, and the files of photos."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from django.contrib import messages
from django.core.files.storage import default_storage
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import content_disposition_header
from django.utils.translation import gettext as _
from django.views.decorators.http import require_POST, require_safe

from webapp import trash
from webapp.labelsets.cards import label_choices
from webapp.library import services, shelf
from webapp.library.doors import person
from webapp.library.forms import CollectionForm
from webapp.library.models import Collection, Import, Photo

DISMISSED = "dismissed_imports"  # in the session: collection -> the import whose report was put aside
KEPT_DISMISSED = 50
LIST_PAGE = 24
REPORT_PAGE = 200

WHAT = {"thumb": "thumbnail_name", "work": "working_name", "original": "original_name"}
ORIGINAL_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "HEIF": "image/heif",
    "AVIF": "image/avif",
}


# All collections --------------------------------------------------------------------------------


@require_safe
def collections(request: HttpRequest) -> HttpResponse:
    page = Paginator(shelf.collections_of(person(request)), LIST_PAGE).get_page(request.GET.get("page"))
    context = {
        "page": page,
        "shelves": shelf.shelves(page.object_list),
        "put_away": trash.put_away_collections(person(request)),
        "form": CollectionForm(),
    }
    return render(request, "library/collections.html", context)


@require_POST
def new(request: HttpRequest) -> HttpResponse:
    form = CollectionForm(request.POST)
    if not form.is_valid():
        messages.error(request, _("A collection needs a name of at most 120 letters."))
        return redirect("library:collections")
    return redirect(services.create_collection(person(request), form.cleaned_data["name"]))


@require_POST
def rename(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    collection = _own(request, collection_id)
    form = CollectionForm(request.POST)
    if form.is_valid():
        services.rename_collection(collection, form.cleaned_data["name"])
    else:
        messages.error(request, _("A collection needs a name of at most 120 letters."))
    return redirect(collection)


@require_POST
def put_away(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    collection = _own(request, collection_id)
    trash.put_away(collection)
    words = _("“%(name)s” is put away.") % {"name": collection.name}
    messages.success(request, words, extra_tags=f"undo={reverse('library:restore', args=[collection.pk])}")
    return redirect("library:collections")


@require_POST
def restore(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    collection = _own_or_put_away(request, collection_id)
    if not trash.bring_back(collection):
        messages.error(request, _("It is too late: “%(name)s” is being deleted.") % {"name": collection.name})
        return redirect("library:collections")
    messages.success(request, _("“%(name)s” is back.") % {"name": collection.name})
    return redirect(collection)


@require_POST
def delete_for_good(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    """Of what is put away alone; it is done in a moment, until when it can be undone."""
    collection = _own_or_put_away(request, collection_id)
    if collection.deleted_at is None:
        raise Http404
    trash.delete_soon(collection)
    words = trash.said_of(collection)
    messages.warning(request, words, extra_tags=f"undo={reverse('library:restore', args=[collection.pk])}")
    return redirect("library:collections")


# One collection ---------------------------------------------------------------------------------


@require_safe
def collection(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    found = _own(request, collection_id)
    context = {
        **_overview(request, found),
        **_photos(request, found),
        **label_choices(person(request)),
        "form": CollectionForm(initial={"name": found.name}),
    }
    return render(request, "library/collection.html", context)


@require_safe
def overview(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    """The parts of the page that change while photos come in."""
    return render(request, "library/_overview.html", _overview(request, _own(request, collection_id)))


@require_safe
def photos(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    """The next photos of the grid."""
    return render(request, "library/_photos.html", _photos(request, _own(request, collection_id)))


@require_safe
def import_report(request: HttpRequest, import_id: UUID) -> HttpResponse:
    """Every file of an upload that something is to be said about."""
    batch = _own_import(request, import_id)
    page = Paginator(shelf.untaken(batch), REPORT_PAGE).get_page(request.GET.get("page"))
    context = {"collection": batch.collection, "batch": batch, "counts": batch.counts(), "page": page}
    return render(request, "library/import.html", context)


@require_POST
def dismiss(request: HttpRequest, import_id: UUID) -> HttpResponse:
    batch = _own_import(request, import_id)
    dismissed = {**request.session.get(DISMISSED, {}), str(batch.collection_id): str(batch.pk)}
    request.session[DISMISSED] = dict(list(dismissed.items())[-KEPT_DISMISSED:])
    return redirect(batch.collection)


@require_POST
def give_up(request: HttpRequest, import_id: UUID) -> HttpResponse:
    """End an upload that will not be finished: what came is taken in, the rest is named."""
    batch = _own_import(request, import_id)
    try:
        services.close_import(batch)
    except services.UploadError as error:
        messages.error(request, str(error))
    return redirect(batch.collection)


# Photos -----------------------------------------------------------------------------------------


@require_safe
def photo_file(request: HttpRequest, photo_id: UUID, what: str) -> HttpResponse:
    """The bytes of a photo: a derivative to be shown, or the original to be kept."""
    if what not in WHAT:
        raise Http404
    photo = get_object_or_404(Photo.objects.of(person(request)).select_related("blob"), pk=photo_id)
    etag = f'"{photo.blob.sha256[:32]}-{what}"'
    if request.headers.get("If-None-Match") == etag:
        return _guarded(HttpResponse(status=HTTPStatus.NOT_MODIFIED), etag)
    try:
        with default_storage.open(getattr(photo.blob, WHAT[what])) as data:
            answer = HttpResponse(data.read(), content_type="image/jpeg")
    except FileNotFoundError as error:
        raise Http404 from error
    if what == "original":
        answer["Content-Type"] = ORIGINAL_TYPES.get(photo.blob.format.upper(), "application/octet-stream")
        answer["Content-Disposition"] = content_disposition_header(as_attachment=True, filename=photo.name) or ""
    return _guarded(answer, etag)


def _guarded(answer: HttpResponse, etag: str) -> HttpResponse:
    answer["ETag"] = etag
    answer["Cache-Control"] = "private, max-age=31536000, immutable"
    answer["X-Content-Type-Options"] = "nosniff"
    answer["Content-Security-Policy"] = "default-src 'none'; sandbox"
    return answer


def _own(request: HttpRequest, collection_id: UUID) -> Collection:
    return get_object_or_404(Collection.objects.of(person(request)).shown(), pk=collection_id)


def _own_or_put_away(request: HttpRequest, collection_id: UUID) -> Collection:
    found: Collection = get_object_or_404(Collection.objects.filter(owner=person(request)).shown(), pk=collection_id)
    return found


def _own_import(request: HttpRequest, import_id: UUID) -> Import:
    found: Import = get_object_or_404(
        Import.objects.select_related("collection", "job"),
        pk=import_id,
        collection__owner=person(request),
        collection__deleted_at=None,
        collection__purpose=Collection.Purpose.LIBRARY,
    )
    return found


def _overview(request: HttpRequest, collection: Collection) -> dict[str, Any]:
    tree = shelf.read_tree(collection)
    classes = tree.classes
    batch = shelf.latest_import(collection)
    if batch is not None and request.session.get(DISMISSED, {}).get(str(collection.pk)) == str(batch.pk):
        batch = None
    return {
        "collection": collection,
        "tree": tree,
        "chosen": request.GET.get("category", ""),
        "readiness": shelf.readiness(
            [branch.own for branch in classes], photos=tree.photos, names=shelf.telling_names(classes)
        ),
        **(_report(batch) if batch else {}),
    }


def _report(batch: Import) -> dict[str, Any]:
    counts = batch.counts()
    total = sum(counts.values())
    waiting = counts["wanted"] + counts["stored"]
    is_over = batch.state == Import.State.DONE or batch.job.state in batch.job.ENDED
    files = list(shelf.untaken(batch)[: shelf.REPORTED + 1]) if is_over else []
    return {
        "batch": batch,
        "counts": counts,
        "total": total,
        "settled": total - waiting,
        "is_over": is_over,
        "files": files[: shelf.REPORTED],
        "has_more_files": len(files) > shelf.REPORTED,
    }


def _photos(request: HttpRequest, collection: Collection) -> dict[str, Any]:
    chosen = request.GET.get("category", "")
    after = request.GET.get("after", "")
    within, category = None, None
    if chosen and chosen != "none":
        category = get_object_or_404(collection.categories, pk=int(chosen) if chosen.isdecimal() else 0)
        below = collection.categories.filter(key__startswith=f"{category.key}/").values_list("pk", flat=True)
        within = [category.pk, *below]
    start = int(after) if after.isdecimal() and len(after) < 18 else 0
    page = shelf.read_photos(collection, within, unlabelled=chosen == "none", after=start)
    query = {key: value for key, value in (("category", chosen), ("after", page.last)) if value}
    return {
        "collection": collection,
        "category": category,
        "chosen": chosen,
        "page": page,
        "after": start,
        "more_query": urlencode(query),
        "fresh_query": urlencode({"category": chosen} if chosen else {}),
    }
