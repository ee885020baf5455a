"""Doors to jobs: what runs, what has run, one job's log, cancel, try again."""

from __future__ import annotations

from typing import cast
from uuid import UUID

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from webapp.accounts.models import User
from webapp.jobs import services
from webapp.jobs.models import Job
from webapp.jobs.story import tell

JOBS_A_PAGE = 25
EVENTS_A_PAGE = 100


@require_safe
@never_cache
def activity(request: HttpRequest) -> HttpResponse:
    jobs = Job.objects.of(cast(User, request.user)).shown()
    ended = jobs.filter(state__in=Job.ENDED).order_by(F("finished").desc(nulls_last=True), "-created")
    page = Paginator(ended, JOBS_A_PAGE).get_page(request.GET.get("page"))
    context = {"active": jobs.active().order_by("created")[:50], "page": page}
    is_fragment = request.headers.get("X-Requested-With") == "fetch"
    return render(request, "jobs/_activity.html" if is_fragment else "jobs/activity.html", context)


@require_safe
@never_cache
def running(request: HttpRequest) -> HttpResponse:
    """How the active jobs stand, for pages whose socket is away."""
    jobs = Job.objects.of(cast(User, request.user)).active().order_by("created")[:50]
    return JsonResponse({"active": [job.summary() for job in jobs]})


@require_safe
@never_cache
def job(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _own(request, pk)
    page = Paginator(one.events.exclude(type="step").order_by("-number"), EVENTS_A_PAGE).get_page(
        request.GET.get("page")
    )
    context = {"job": one, "page": page, "lines": tell(page.object_list)}
    is_fragment = request.headers.get("X-Requested-With") == "fetch"
    return render(request, "jobs/_job.html" if is_fragment else "jobs/job.html", context)


@require_POST
def cancel(request: HttpRequest, pk: UUID) -> HttpResponse:
    services.request_cancel(_own(request, pk))
    return _back(request, pk)


@require_POST
def retry(request: HttpRequest, pk: UUID) -> HttpResponse:
    if not services.retry(_own(request, pk)):
        messages.info(request, _("There is nothing to try again: it did not fail, or it runs already."))
    return _back(request, pk)


def _own(request: HttpRequest, pk: UUID) -> Job:
    return get_object_or_404(Job.objects.of(cast(User, request.user)), pk=pk)


def _back(request: HttpRequest, pk: UUID) -> HttpResponse:
    """To the page of this site that the button was on."""
    wanted = request.POST.get("next", "")
    is_ours = url_has_allowed_host_and_scheme(wanted, allowed_hosts=None) and wanted.startswith("/")
    return redirect(wanted if is_ours else reverse("jobs:job", args=[pk]))
