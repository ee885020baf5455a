"""Addresses of collections, of their photos, and of what is uploaded into them."""

from django.urls import path

from webapp.library import uploads, views

app_name = "library"
urlpatterns = [
    path("collections/", views.collections, name="collections"),
    path("collections/new/", views.new, name="new"),
    path("collections/imports/", uploads.start, name="start"),
    path("collections/<uuid:collection_id>/", views.collection, name="collection"),
    path("collections/<uuid:collection_id>/overview/", views.overview, name="overview"),
    path("collections/<uuid:collection_id>/photos/", views.photos, name="photos"),
    path("collections/<uuid:collection_id>/rename/", views.rename, name="rename"),
    path("collections/<uuid:collection_id>/put-away/", views.put_away, name="put-away"),
    path("collections/<uuid:collection_id>/restore/", views.restore, name="restore"),
    path("collections/<uuid:collection_id>/delete-for-good/", views.delete_for_good, name="delete-for-good"),
    path("collections/<uuid:collection_id>/imports/", uploads.open_into, name="open-import"),
    path("imports/<uuid:import_id>/", uploads.report, name="import"),
    path("imports/<uuid:import_id>/manifest/", uploads.manifest, name="manifest"),
    path("imports/<uuid:import_id>/files/<int:file_id>/", uploads.put_file, name="file"),
    path("imports/<uuid:import_id>/chunks/<int:number>/", uploads.put_zip_chunk, name="chunk"),
    path("imports/<uuid:import_id>/close/", uploads.close, name="close"),
    path("imports/<uuid:import_id>/report/", views.import_report, name="import-report"),
    path("imports/<uuid:import_id>/dismiss/", views.dismiss, name="dismiss"),
    path("imports/<uuid:import_id>/give-up/", views.give_up, name="give-up"),
    path("photos/<uuid:photo_id>/<slug:what>/", views.photo_file, name="photo-file"),
]
