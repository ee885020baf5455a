"""Every address of the site."""

from django.contrib import admin
from django.urls import include, path
from django.views.i18n import JavaScriptCatalog

from webapp import health, views
from webapp.accounts import urls as accounts_urls

urlpatterns = [
    path("", views.home, name="home"),
    path("healthz/", health.healthz, name="healthz"),
    path("jsi18n/", JavaScriptCatalog.as_view(), name="javascript-catalog"),
    path("", include(accounts_urls)),
    path("", include("webapp.library.urls")),
    path("", include("webapp.labelsets.urls")),
    path("", include("webapp.training.urls")),
    path("", include("webapp.jobs.urls")),
    path("admin/", admin.site.urls),
]
