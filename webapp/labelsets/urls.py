"""Addresses of labelsets."""

from django.urls import URLPattern

app_name = "labelsets"
urlpatterns: list[URLPattern] = []
