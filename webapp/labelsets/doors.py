"""What every door to label sets does alike: how a gesture is answered, whose things they are, uploads into them.

A gesture answers scripts with {"message", "undo", …} and forms with a redirect and a toast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.views.decorators.http import require_POST

from webapp.labelsets.models import Classification, Example, Label, LabelSet, QueryImage
from webapp.labelsets.services import LabelSetError
from webapp.library.doors import Opening, describe_import, person, read_opening
from webapp.library.models import Import
from webapp.library.services import UploadError, add_to_manifest

Door = Callable[..., HttpResponse]


def gesture(view: Door) -> Door:
    """A POST by a form or a script; what cannot be done is said where it was tried."""

    @require_POST
    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except (LabelSetError, UploadError) as error:
            if is_script(request):
                return JsonResponse({"error": str(error)}, status=HTTPStatus.BAD_REQUEST)
            messages.error(request, str(error))
            return redirect(where_from(request))

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


def done(
    request: HttpRequest, to: str, message: str, *, undo: str | None = None, label: Label | None = None
) -> HttpResponse:
    """The gesture succeeded: a form goes on to the address `to`, at the label if there is one; a script is told so."""
    if is_script(request):
        return JsonResponse({"message": message, "undo": undo, "url": to, "label": label and str(label.pk)})
    if message:
        messages.success(request, message, extra_tags=f"undo={undo}" if undo else "")
    return redirect(to + (f"#label-{label.pk}" if label else ""))


def is_script(request: HttpRequest) -> bool:
    return request.headers.get("X-Requested-With") == "fetch"


def where_from(request: HttpRequest) -> str:
    """Where the person came from, if that was a page of label sets; else the list of them."""
    came_from = request.headers.get("Referer", "")
    if url_has_allowed_host_and_scheme(came_from, {request.get_host()}, require_https=request.is_secure()):
        parts = urlsplit(came_from)
        return parts.path + (f"?{parts.query}" if parts.query else "")
    return reverse("labelsets:list")


def own_set(request: HttpRequest, pk: UUID) -> LabelSet:
    own: LabelSet = get_object_or_404(LabelSet.objects.of(person(request)).select_related("model", "job"), pk=pk)
    return own


def own_label(request: HttpRequest, pk: UUID) -> Label:
    sets = LabelSet.objects.of(person(request))
    own: Label = get_object_or_404(Label.objects.select_related("label_set__owner"), pk=pk, label_set__in=sets)
    return own


def own_example(request: HttpRequest, pk: UUID) -> Example:
    sets = LabelSet.objects.of(person(request))
    examples = Example.objects.select_related("label__label_set", "photo")
    own: Example = get_object_or_404(examples, pk=pk, label__label_set__in=sets)
    return own


def own_batch(request: HttpRequest, pk: UUID) -> Classification:
    sets = LabelSet.objects.of(person(request))
    batches = Classification.objects.select_related("job", "label_set__model", "label_set__job")
    return get_object_or_404(batches, pk=pk, label_set__in=sets)


def query_of(batch: Classification, photo_id: UUID) -> QueryImage:
    """The batch's query image of a photo, with all that belongs to it."""
    query = get_object_or_404(batch.query_images.select_related("photo__category", "answer"), photo=photo_id)
    query.classification = batch
    return query


def opening_of(request: HttpRequest) -> Opening:
    """What the browser says when it begins an upload into a label set; it has to say of one photo at least."""
    opening = read_opening(request)
    if not opening.entries and not opening.archive_name:
        raise UploadError(_("No photos were chosen."))
    return opening


def opened(batch: Import, opening: Opening) -> dict[str, Any]:
    """What is answered to it."""
    return describe_import(batch, add_to_manifest(batch, opening.entries) if opening.entries else [])


def uuid_or_404(text: Any) -> UUID:
    try:
        return UUID(str(text))
    except ValueError as error:
        raise Http404 from error


def number_from(request: HttpRequest, name: str) -> int:
    """A number in the address; 0 where there is none, or something odd."""
    text = request.GET.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 12 else 0
