"""Addresses of training."""

from django.urls import path

from webapp.training import views

app_name = "training"
urlpatterns = [
    path("training/", views.runs, name="list"),
    path("training/new/", views.new, name="new"),
    path("training/new/notes/", views.notes, name="notes"),
    path("training/<uuid:pk>/", views.run, name="run"),
    path("training/<uuid:pk>/panel/", views.panel, name="panel"),
    path("training/<uuid:pk>/curves/", views.curves, name="curves"),
    path("training/<uuid:pk>/cancel/", views.cancel, name="cancel"),
    path("training/<uuid:pk>/continue/", views.go_on, name="continue"),
    path("training/<uuid:pk>/rename/", views.rename, name="rename"),
]
