"""Doors to training: the list of runs, a new one, and the one page that a run keeps for ever."""

from __future__ import annotations

from typing import Any, cast
from uuid import UUID

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.jobs.services import request_cancel
from webapp.labelsets.models import LabelSet
from webapp.library.models import Collection
from webapp.training import services
from webapp.training.forms import RunForm
from webapp.training.models import TrainingRun
from webapp.training.report import Outlook, RunReport, outlook
from webapp.training.services import TrainingError

RUNS_A_PAGE = 25


@require_safe
@never_cache
def runs(request: HttpRequest) -> HttpResponse:
    page = Paginator(TrainingRun.objects.of(_user(request)), RUNS_A_PAGE).get_page(request.GET.get("page"))
    reports = [RunReport(run) for run in page.object_list]
    return render(request, "training/list.html", {"page": page, "reports": reports})


@require_http_methods(["GET", "HEAD", "POST"])
@never_cache
def new(request: HttpRequest) -> HttpResponse:
    chosen = request.POST.get("collection") or request.GET.get("collection")
    if not chosen:
        return _choose(request)
    collection = _collection(request, chosen)
    form = _form(request, collection)
    if request.method == "POST" and form.is_valid() and form.config is not None:
        try:
            run = services.start_run(
                _user(request),
                collection,
                form.config,
                name=form.cleaned_data["name"],
                key=form.cleaned_data["key"],
            )
            return redirect(run)
        except TrainingError as error:
            form.add_error(None, str(error))
    sizes = [n for _path, n in services.class_sizes(collection).values()]
    context = {
        "form": form,
        "collection": collection,
        "readiness": services.readiness(sizes),
        "outlook": None if form.errors else _outlook(collection, form),
    }
    return render(
        request, "training/new.html", context, status=400 if form.errors and request.method == "POST" else 200
    )


@require_safe
@never_cache
def notes(request: HttpRequest) -> HttpResponse:
    """What the numbers in the form would mean, as a fragment: the page asks while they change."""
    collection = _collection(request, request.GET.get("collection", ""))
    form = RunForm(request.GET)
    form.is_valid()
    return render(request, "training/_outlook.html", {"form": form, "outlook": _outlook(collection, form)})


@require_safe
@never_cache
def run(request: HttpRequest, pk: UUID) -> HttpResponse:
    return render(request, "training/run.html", _run_context(request, pk))


@require_safe
@never_cache
def panel(request: HttpRequest, pk: UUID) -> HttpResponse:
    return render(request, "training/_panel.html", _run_context(request, pk))


@require_safe
@never_cache
def curves(request: HttpRequest, pk: UUID) -> HttpResponse:
    return JsonResponse(services.curves(_run(request, pk)))


@require_POST
def cancel(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _run(request, pk)
    request_cancel(one.job)
    return redirect(one)


@require_POST
def go_on(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _run(request, pk)
    try:
        services.continue_run(one)
    except TrainingError as error:
        messages.info(request, str(error))
    return redirect(one)


@require_POST
def rename(request: HttpRequest, pk: UUID) -> HttpResponse:
    one = _run(request, pk)
    try:
        services.rename_run(one, request.POST.get("name", ""))
    except TrainingError as error:
        messages.error(request, str(error))
    return redirect(one)


def _user(request: HttpRequest) -> User:
    return cast(User, request.user)  # LoginRequiredMiddleware lets nobody else in


def _run(request: HttpRequest, pk: UUID) -> TrainingRun:
    return get_object_or_404(TrainingRun.objects.of(_user(request)), pk=pk)


def _collection(request: HttpRequest, pk: str) -> Collection:
    try:
        wanted = UUID(pk)
    except ValueError:
        wanted = UUID(int=0)
    return get_object_or_404(Collection.objects.of(_user(request)).shown(), pk=wanted)


def _choose(request: HttpRequest) -> HttpResponse:
    collections = list(Collection.objects.of(_user(request)).shown().order_by("-created")[:200])
    sizes = services.sizes_of(collections)
    rows = [(collection, services.readiness(sizes[collection.pk])) for collection in collections]
    return render(request, "training/choose.html", {"rows": rows})


def _form(request: HttpRequest, collection: Collection) -> RunForm:
    if request.method == "POST":
        return RunForm(request.POST)
    if "kind" in request.GET:  # the numbers are being tried without a script
        return RunForm(request.GET)
    return RunForm(initial={"name": collection.name})


def _outlook(collection: Collection, form: RunForm) -> Outlook | None:
    if form.is_bound:
        return outlook(collection, form.config) if form.config else None
    return outlook(collection, None)


def _run_context(request: HttpRequest, pk: UUID) -> dict[str, Any]:
    one = _run(request, pk)
    is_done = one.job.state == Job.State.SUCCEEDED
    label_sets = LabelSet.objects.of(_user(request)).order_by("name")[:100] if is_done and one.model_id else []
    return {"run": one, "job": one.job, "report": RunReport(one), "label_sets": label_sets}
