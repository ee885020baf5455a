"""The encoder that comes with its package is there from the start."""

from django.db import migrations


def create(apps, schema_editor):
    apps.get_model("training", "Model").objects.get_or_create(
        kind="built-in", backbone="efficientnet-lite0", defaults={"name": "EfficientNet-Lite0"}
    )


class Migration(migrations.Migration):
    dependencies = [("training", "0001_initial")]
    operations = [migrations.RunPython(create, migrations.RunPython.noop)]
