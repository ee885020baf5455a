"""Addresses of jobs."""

from django.urls import path

from webapp.jobs import views

app_name = "jobs"
urlpatterns = [
    path("activity/", views.activity, name="activity"),
    path("activity/running/", views.running, name="running"),
    path("activity/<uuid:pk>/", views.job, name="job"),
    path("activity/<uuid:pk>/cancel/", views.cancel, name="cancel"),
    path("activity/<uuid:pk>/retry/", views.retry, name="retry"),
]
