"""Doors through which photos come in: see `static/js/upload.js` for the other side."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from uuid import UUID

from django.core.paginator import Paginator
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse

from webapp.library.doors import (
    begin_import,
    body_of,
    describe_import,
    json_door,
    person,
    read_manifest,
    read_opening,
)
from webapp.library.models import Collection, Import, ImportFile
from webapp.library.services import (
    add_to_manifest,
    close_import,
    create_collection,
    open_import,
    put_chunk,
    store_photo,
)

REPORT_PAGE = 200
UNTAKEN = (ImportFile.State.REFUSED, ImportFile.State.DUPLICATE, ImportFile.State.SKIPPED)


@json_door("POST")
def start(request: HttpRequest) -> HttpResponse:
    """A new collection, and the upload that fills it."""
    opening = read_opening(request)
    with transaction.atomic():
        collection = create_collection(person(request), opening.name)
        batch = open_import(collection, archive_name=opening.archive_name, archive_size=opening.archive_size)
        more = {"openUrl": reverse("library:open-import", args=[collection.pk])}
        return JsonResponse(begin_import(batch, opening) | more, status=HTTPStatus.CREATED)


@json_door("POST")
def open_into(request: HttpRequest, collection_id: UUID) -> HttpResponse:
    """An upload into a collection that is there already."""
    collection = get_object_or_404(Collection.objects.of(person(request)).shown(), pk=collection_id)
    opening = read_opening(request)
    batch = open_import(collection, archive_name=opening.archive_name, archive_size=opening.archive_size)
    return JsonResponse(begin_import(batch, opening), status=HTTPStatus.CREATED)


@json_door("POST")
def manifest(request: HttpRequest, import_id: UUID) -> HttpResponse:
    batch = _own_import(request, import_id)
    return JsonResponse(describe_import(batch, add_to_manifest(batch, read_manifest(request))))


@json_door("PUT")
def put_file(request: HttpRequest, import_id: UUID, file_id: int) -> HttpResponse:
    files = ImportFile.objects.select_related("batch__collection")
    file = get_object_or_404(
        files, pk=file_id, batch=import_id, batch__collection__owner=person(request), batch__collection__deleted_at=None
    )
    file = store_photo(file, body_of(request))
    return JsonResponse({"state": file.state, "reason": file.reason})


@json_door("PUT")
def put_zip_chunk(request: HttpRequest, import_id: UUID, number: int) -> HttpResponse:
    batch = _own_import(request, import_id)
    put_chunk(batch, number, body_of(request), sha256=request.headers.get("X-Content-SHA256", ""))
    return JsonResponse({"chunk": number})


@json_door("POST")
def close(request: HttpRequest, import_id: UUID) -> HttpResponse:
    batch = _own_import(request, import_id)
    close_import(batch)
    return JsonResponse({"report": batch.report()})


@json_door("GET")
def report(request: HttpRequest, import_id: UUID) -> HttpResponse:
    """What became of an upload: its counts, and each file that made no new photo, with the reason."""
    batch = _own_import(request, import_id)
    state = request.GET.get("files", "")
    states = [state] if state in ImportFile.State.values else UNTAKEN
    files = batch.files.filter(state__in=states).order_by("pk").values("path", "state", "reason")
    page = Paginator(files, REPORT_PAGE).get_page(request.GET.get("page"))
    return JsonResponse(
        {
            "import": str(batch.pk),
            "job": batch.job.summary(),
            "lastEvent": batch.job.last_event,
            "report": batch.report(),
            "chunks": describe_import(batch, [])["chunks"] if batch.state == Import.State.OPEN else None,
            "files": list(page),
            "page": page.number,
            "pages": page.paginator.num_pages,
        }
    )


def _own_import(request: HttpRequest, import_id: UUID) -> Import:
    imports: Any = Import.objects.select_related("collection", "job")
    own: Import = get_object_or_404(
        imports, pk=import_id, collection__owner=person(request), collection__deleted_at=None
    )
    return own
