"""The look, held to account: contrast of the tokens, no inline style or script, the same page in both themes."""

import re
from itertools import product
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.template.loader import get_template
from django.test import Client
from django.urls import reverse

from webapp.accounts import services
from webapp.accounts.models import User

CSS = (Path(django_settings.BASE_DIR) / "static/css/studio.css").read_text()
TOKEN = re.compile(r"--([a-z0-9-]+):\s*light-dark\(#([0-9a-f]{6}),\s*#([0-9a-f]{6})\)")
TOKENS = {name: (light, dark) for name, light, dark in TOKEN.findall(CSS)}
SURFACES = ["surface-page", "surface-card", "surface-sunken", "surface-raised"]
TEXT = [
    *product(["ink", "ink-soft", "ink-faint"], SURFACES),
    *product(["accent", "good", "warn", "bad"], ["surface-page", "surface-card"]),
    *((name, f"{name}-wash") for name in ("accent", "good", "warn", "bad")),
    *product(["ink"], ["accent-wash", "good-wash", "warn-wash", "bad-wash"]),
    ("accent-ink", "accent"),
    ("accent-ink", "accent-strong"),
    ("ink-inverse", "surface-inverse"),
]
SHAPES = [
    *product([f"tone-{n}" for n in range(1, 9)], SURFACES),
    *product(["line-field", "accent"], ["surface-page", "surface-card"]),
]


@pytest.fixture(autouse=True)
def _plain_parts(settings, tmp_path):
    settings.STATIC_ROOT = tmp_path
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }


@pytest.fixture
def administrator():
    return User.objects.create_superuser("ada@example.org", "a heron by the weir", name="Ada")


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_by_hand():
    assert contrast("000000", "ffffff") == pytest.approx(21)
    assert contrast("777777", "ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("ink", "surface"), TEXT)
def test_text_is_readable(theme, ink, surface):
    at = ["light", "dark"].index(theme)

    assert contrast(TOKENS[ink][at], TOKENS[surface][at]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("shape", "surface"), SHAPES)
def test_shapes_are_visible(theme, shape, surface):
    at = ["light", "dark"].index(theme)

    assert contrast(TOKENS[shape][at], TOKENS[surface][at]) >= 3


def test_caption_is_readable_on_a_white_photo():
    opacity = int(re.search(r"--caption: #000000([0-9a-f]{2});", CSS)[1], 16) / 255
    grey = f"{round(255 * (1 - opacity)):02x}" * 3

    assert contrast("ffffff", grey) >= 4.5


def test_every_token_used_is_defined():
    defined = set(re.findall(r"(?<![\w-])--([a-z0-9-]+)\s*:", CSS))
    used = set(re.findall(r"var\(--([a-z0-9-]+)\s*\)", CSS))

    assert used <= defined


@pytest.mark.django_db
def test_styleguide_is_for_administrators_and_development(administrator, settings):
    member = User.objects.create_user("grace@example.org", "a heron by the weir")
    client = Client()
    url = reverse("styleguide")
    settings.DEBUG = False
    assert client.get(url).status_code == 404
    client.force_login(member)
    assert client.get(url).status_code == 404
    client.force_login(administrator)
    assert client.get(url).status_code == 200
    settings.DEBUG = True
    assert Client().get(url).status_code == 200


def pages(administrator):
    inside, outside, invited = Client(), Client(), Client()
    inside.force_login(administrator)
    _, token = services.invite(administrator)
    for name in ("styleguide", "account", "account_change_password", "people"):
        yield name, inside.get(reverse(name)).text
    yield "people, with a link", inside.post(reverse("invite"), follow=True).text
    yield "not here", inside.get("/nothing/of/the/sort/").text
    for name in ("account_login", "account_signup", "account_reset_password", "account_inactive"):
        yield name, outside.get(reverse(name)).text
    yield "invited", invited.get(reverse("invitation", args=[token]), follow=True).text
    yield "closed invitation", outside.get(reverse("invitation", args=["gone"])).text
    yield "void link", outside.get(reverse("account_reset_password_from_key", args=["abc", "void-link"])).text
    for name in ("500.html", "403_csrf.html", "429.html"):
        yield name, get_template(name).render({})


@pytest.mark.django_db
def test_no_page_has_inline_style_or_script(administrator):
    for name, text in pages(administrator):
        assert "</html>" in text, name
        assert not re.search(r"<[^>]+\sstyle\s*=", text), name
        assert "<style" not in text, name
        assert not re.search(r"<[^>]+\son[a-z]+\s*=", text), name
        assert all("src=" in tag for tag in re.findall(r"<script\b[^>]*>", text)), name


@pytest.mark.django_db
def test_pages_have_the_parts_that_readers_need(administrator):
    for name, text in pages(administrator):
        assert re.search(r'<html lang="[a-z-]+"', text), name
        assert '<main id="main"' in text, name
        assert text.count("<h1") == (2 if name == "styleguide" else 1), name
        ids = re.findall(r'\sid="([^"]+)"', text)
        assert len(ids) == len(set(ids)), (name, [i for i in ids if ids.count(i) > 1])
        for label in re.findall(r'<label[^>]*\sfor="([^"]+)"', text):
            assert label in ids, (name, label)
        assert not re.search(r"<img(?![^>]*\salt=)[^>]*>", re.sub(r"<pre.*?</pre>", "", text, flags=re.S)), name


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("cookie", "attribute"), [("dark", ' data-theme="dark"'), ("light", ' data-theme="light"'), ('x">', ""), ("", "")]
)
def test_theme_is_there_before_the_first_paint(cookie, attribute):
    client = Client()
    client.cookies["fewshot_theme"] = cookie

    head = re.search(r"<html[^>]*>", client.get(reverse("account_login")).text)[0]

    assert head == f'<html lang="en"{attribute}>'


@pytest.mark.django_db
def test_policy_forbids_inline(client):
    policy = client.get(reverse("account_login")).headers["Content-Security-Policy"]

    assert "unsafe-inline" not in policy
    assert "frame-ancestors 'none'" in policy


def test_every_icon_named_in_a_template_is_drawn():
    root = Path(django_settings.BASE_DIR)
    drawn = set(re.findall(r'<symbol id="([^"]+)"', (root / "static/img/icons.svg").read_text()))
    named = {
        name
        for path in (root / "templates").rglob("*.html")
        for name in re.findall(r'_icon\.html" with name="([a-z-]+)"', path.read_text())
    }

    assert named <= drawn, named - drawn
