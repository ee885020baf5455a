"""What every page knows of jobs: those running now, for the pill in its header."""

from typing import Any

from django.http import HttpRequest

from webapp.jobs.models import Job


def running(request: HttpRequest) -> dict[str, Any]:
    user = getattr(request, "user", None)
    if user is None or not user.is_authenticated:
        return {}
    return {"running_jobs": Job.objects.of(user).active().order_by("created")[:20]}
