"""The page that people see first."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.http import require_safe

from webapp.home import read_home
from webapp.labelsets.cards import label_choices
from webapp.library.doors import person


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    user = person(request)
    return render(request, "home.html", {"home": read_home(user), "greeting": _greeting(), **label_choices(user)})


def _greeting() -> str:
    hour = timezone.localtime().hour
    if 5 <= hour < 12:
        return _("Good morning")
    return _("Good afternoon") if 12 <= hour < 18 else _("Good evening")
