from django.apps import AppConfig


class LabelsetsConfig(AppConfig):
    name = "webapp.labelsets"
    label = "labelsets"
