"""Addresses of label sets, of what is done to them, and of what is classified with them."""

from django.urls import path

from webapp.labelsets import batches, views

app_name = "labelsets"
urlpatterns = [
    path("label-sets/", views.label_sets, name="list"),
    path("label-sets/new/", views.create, name="create"),
    path("label-sets/<uuid:pk>/", views.label_set, name="label-set"),
    path("label-sets/<uuid:pk>/labels/", views.labels, name="labels"),
    path("label-sets/<uuid:pk>/rename/", views.rename, name="rename"),
    path("label-sets/<uuid:pk>/delete/", views.delete, name="delete"),
    path("label-sets/<uuid:pk>/restore/", views.restore, name="restore"),
    path("label-sets/<uuid:pk>/delete-for-good/", views.delete_for_good, name="delete-for-good"),
    path("label-sets/<uuid:pk>/model/", views.use_model, name="use-model"),
    path("label-sets/<uuid:pk>/threshold/", views.threshold, name="threshold"),
    path("label-sets/<uuid:pk>/labels/new/", views.add_label, name="add-label"),
    path("label-sets/<uuid:pk>/drop/", batches.classify_drop, name="classify-drop"),
    path("label-sets/<uuid:pk>/classify/", batches.classify_collection, name="classify-collection"),
    path("label-sets/<uuid:pk>/batches/<uuid:batch_id>/", batches.classification, name="classification"),
    path("labels/<uuid:pk>/examples/", views.label_examples, name="label-examples"),
    path("labels/<uuid:pk>/examples/add/", views.add_examples, name="add-examples"),
    path("labels/<uuid:pk>/examples/upload/", views.upload_examples, name="upload-examples"),
    path("labels/<uuid:pk>/pick/", views.pick, name="pick"),
    path("labels/<uuid:pk>/rename/", views.rename_label, name="rename-label"),
    path("labels/<uuid:pk>/remove/", views.remove_label, name="remove-label"),
    path("labels/<uuid:pk>/restore/", views.restore_label, name="restore-label"),
    path("examples/<uuid:pk>/remove/", views.remove_example, name="remove-example"),
    path("examples/<uuid:pk>/restore/", views.restore_example, name="restore-example"),
    path("batches/<uuid:pk>/results/", batches.results, name="results"),
    path("batches/<uuid:pk>/top-k/", batches.top_k, name="top-k"),
    path("batches/<uuid:pk>/sort/", batches.sort_again, name="sort-again"),
    path("batches/<uuid:pk>/photos/<uuid:photo_id>/", batches.evidence, name="evidence"),
    path("batches/<uuid:pk>/photos/<uuid:photo_id>/answer/", batches.answer, name="answer"),
    path("batches/<uuid:pk>/photos/<uuid:photo_id>/take-back/", batches.take_answer_back, name="take-answer-back"),
    path("batches/<uuid:pk>/export/<str:kind>/", batches.export, name="export"),
]
