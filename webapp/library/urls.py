"""Addresses of collections, of their photos, and of what is uploaded into them."""

from django.urls import path

from webapp.library import uploads

app_name = "library"
urlpatterns = [
    path("collections/imports/", uploads.start, name="start"),
    path("collections/<uuid:collection_id>/imports/", uploads.open_into, name="open-import"),
    path("imports/<uuid:import_id>/", uploads.report, name="import"),
    path("imports/<uuid:import_id>/manifest/", uploads.manifest, name="manifest"),
    path("imports/<uuid:import_id>/files/<int:file_id>/", uploads.put_file, name="file"),
    path("imports/<uuid:import_id>/chunks/<int:number>/", uploads.put_zip_chunk, name="chunk"),
    path("imports/<uuid:import_id>/close/", uploads.close, name="close"),
]
