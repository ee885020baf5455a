"""What every door for uploads does alike: who may, what was said, what is answered. Label sets take drops by it too."""

from __future__ import annotations

import errno
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.db import OperationalError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.urls import reverse
from django.utils.translation import gettext as _

from webapp.accounts.models import User
from webapp.library.models import Import, ImportFile
from webapp.library.services import Entry, UploadError, add_to_manifest, missing_chunks
from webapp.library.storage import CHUNK

Door = Callable[..., HttpResponse]

MAX_ENTRIES = 500
MAX_SIZE = 2**53
SHA256 = re.compile(r"[0-9a-f]{64}")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Opening:
    """What the browser says when it begins an upload: photos one by one, or one zip."""

    name: str
    entries: tuple[Entry, ...] = ()
    archive_name: str = ""
    archive_size: int = 0


def json_door(*methods: str) -> Callable[[Door], Door]:
    """A door for scripts: whatever goes wrong is answered as {"error": sentence} with the status that says which."""

    def decorate(view: Door) -> Door:
        @login_not_required  # a redirect to the login page would be no answer to a script
        @functools.wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            if not request.user.is_authenticated:
                return _refusal(_("Log in first: your session has ended."), HTTPStatus.UNAUTHORIZED)
            if request.method not in methods:
                answer = _refusal(_("This address does not take that."), HTTPStatus.METHOD_NOT_ALLOWED)
                answer["Allow"] = ", ".join(methods)
                return answer
            return _answered(view, request, *args, **kwargs)

        return guarded

    return decorate


def person(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # the middleware or the door has seen to it
    return request.user


def read_opening(request: HttpRequest) -> Opening:
    """The first message of an upload.

    Raises:
        UploadError: it is no JSON, or not of that form.
    """
    said = read_json(request)
    name = _text(said.get("name", ""))
    archive = said.get("archive")
    if archive is None:
        return Opening(name, _entries(said.get("files", [])))
    if not isinstance(archive, dict) or not _text(archive.get("name")) or not _size(archive.get("size")):
        raise UploadError(_("A zip is announced by its name and its size in bytes, which is more than 0."))
    return Opening(name, archive_name=_text(archive["name"]), archive_size=archive["size"])


def read_manifest(request: HttpRequest) -> tuple[Entry, ...]:
    return _entries(read_json(request).get("files", []))


def read_json(request: HttpRequest) -> dict[str, Any]:
    try:
        said = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise UploadError(_("This is not readable JSON.")) from error
    if not isinstance(said, dict):
        raise UploadError(_("A JSON object is expected here."))
    return said


def body_of(request: HttpRequest) -> Iterator[bytes]:
    """The raw body piece by piece: it was spooled to the disk, and is never in memory as a whole."""
    while piece := request.read(CHUNK):
        yield piece


def begin_import(batch: Import, opening: Opening) -> dict[str, Any]:
    """Take the first manifest of a fresh import and answer all that the browser needs to send the rest."""
    files = add_to_manifest(batch, opening.entries) if opening.entries else []
    return describe_import(batch, files)


def describe_import(batch: Import, files: Iterable[ImportFile], *, page_url: str = "") -> dict[str, Any]:
    """Where to send what is still wanted, and where to hear what becomes of it."""
    return {
        "import": str(batch.pk),
        "job": str(batch.job_id),
        "lastEvent": batch.job.last_event,
        "manifestUrl": reverse("library:manifest", args=[batch.pk]),
        "closeUrl": reverse("library:close", args=[batch.pk]),
        "statusUrl": reverse("library:import", args=[batch.pk]),
        "pageUrl": page_url or batch.job.url,
        "files": [_describe_file(batch, file) for file in files],
        "chunks": _describe_chunks(batch),
    }


def _describe_file(batch: Import, file: ImportFile) -> dict[str, Any]:
    is_wanted = file.state == ImportFile.State.WANTED
    return {
        "path": file.path,
        "state": file.state,
        "reason": file.reason,
        "url": f"/imports/{batch.pk}/files/{file.pk}/" if is_wanted else None,  # reverse() costs 20 ms for 500 files
    }


def _describe_chunks(batch: Import) -> dict[str, Any] | None:
    if not batch.archive_chunks:
        return None
    first = reverse("library:chunk", args=[batch.pk, 0])
    return {
        "size": settings.ZIP_CHUNK_BYTES,
        "missing": missing_chunks(batch),
        "urlTemplate": first.removesuffix("0/") + "{n}/",
    }


def _answered(view: Door, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
    try:
        return view(request, *args, **kwargs)
    except UploadError as error:
        return _refusal(str(error), error.status)
    except Http404:
        return _refusal(_("That is not there, or no longer."), HTTPStatus.NOT_FOUND)
    except OperationalError:
        answer = _refusal(
            _("The database is busy or has no room. It will be tried again."), HTTPStatus.SERVICE_UNAVAILABLE
        )
        answer["Retry-After"] = "2"
        return answer
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        words = _("The disk is full. What was sent is kept; make room, or ask the administrator, and go on.")
        return _refusal(words, HTTPStatus.INSUFFICIENT_STORAGE)


def _refusal(sentence: str, status: int) -> JsonResponse:
    return JsonResponse({"error": sentence}, status=status)


def _entries(said: Any) -> tuple[Entry, ...]:
    if not isinstance(said, list):
        raise UploadError(_("The files of a manifest are a list."))
    if len(said) > MAX_ENTRIES:
        raise UploadError(
            _("At most %(n)d files are taken in one manifest; this one has %(all)d.")
            % {"n": MAX_ENTRIES, "all": len(said)},
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )
    return tuple(_entry(line) for line in said)


def _entry(line: Any) -> Entry:
    if not isinstance(line, dict) or not _text(line.get("path")) or not _is_size(line.get("size")):
        raise UploadError(_("Each file of a manifest has a path and a size in bytes."))
    sha256 = line.get("sha256") or ""
    if sha256 and not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise UploadError(_("A sha256 is 64 digits from 0 to f, in small letters."))
    return Entry(_text(line["path"]), line["size"], sha256)


def _text(said: Any) -> str:
    """A string that every database takes: no lone surrogates, which JSON can carry, and no zeros."""
    if not isinstance(said, str):
        return ""
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def _is_size(said: Any) -> bool:
    return isinstance(said, int) and not isinstance(said, bool) and 0 <= said < MAX_SIZE


def _size(said: Any) -> int:
    return said if _is_size(said) else 0
