"""The page that people see first."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.http import require_safe

from webapp.home import read_home
from webapp.labelsets.cards import label_choices
from webapp.library.doors import person
from webapp.library.shelf import collections_of

OFFERED = 100  # collections that a drop can be added to


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    user = person(request)
    context = {
        "home": read_home(user),
        "greeting": _greeting(),
        "collections": collections_of(user)[:OFFERED],
        **label_choices(user),
    }
    return render(request, "home.html", context)


def _greeting() -> str:
    hour = timezone.localtime().hour
    if 5 <= hour < 12:
        return _("Good morning")
    return _("Good afternoon") if 12 <= hour < 18 else _("Good evening")
