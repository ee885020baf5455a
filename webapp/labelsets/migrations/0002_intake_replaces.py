import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("labelsets", "0001_initial"),
    ]

    operations = [
        migrations.AddField(
            model_name="intake",
            name="replaces",
            field=models.ForeignKey(
                null=True, on_delete=django.db.models.deletion.SET_NULL, related_name="+", to="labelsets.example"
            ),
        ),
    ]
