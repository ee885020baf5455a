"""Both encoders are there from the start: the one of three fused networks, and the one that was alone so far."""

from django.db import migrations


def create(apps, schema_editor):
    built_in = apps.get_model("training", "Model").objects
    built_in.get_or_create(kind="built-in", backbone="accurate", defaults={"name": "Accurate"})
    built_in.filter(kind="built-in", backbone="efficientnet-lite0").update(name="Fast")


class Migration(migrations.Migration):
    dependencies = [("training", "0003_checkpoint")]
    operations = [migrations.RunPython(create, migrations.RunPython.noop)]
