"""What every page knows of the person: the theme chosen, so that it is there before the first paint."""

from django.http import HttpRequest

THEME_COOKIE = "fewshot_theme"


def theme(request: HttpRequest) -> dict[str, str]:
    chosen = request.COOKIES.get(THEME_COOKIE, "")
    return {"theme": chosen if chosen in ("light", "dark") else ""}
