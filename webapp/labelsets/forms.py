"""What people send to label sets by forms; ids of things are looked up by the doors, which answer 404."""

from __future__ import annotations

from typing import Any

from django import forms
from django.utils.translation import gettext_lazy as _

from webapp.accounts.models import User
from webapp.labelsets.services import LabelSetError
from webapp.training.models import Model

MOST_TOP_K = 10


class CreateForm(forms.Form):
    name = forms.CharField(
        label=_("Name"),
        max_length=120,
        widget=forms.TextInput(attrs={"autocomplete": "off", "placeholder": _("Kitchen counter")}),
    )
    model = forms.ModelChoiceField(label=_("Model"), queryset=Model.objects.none(), required=False, empty_label=None)

    def __init__(self, *args: Any, user: User, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field: Any = self.fields["model"]
        field.queryset = Model.objects.usable_by(user)


class NameForm(forms.Form):
    name = forms.CharField(label=_("Name"), max_length=120)


class ThresholdForm(forms.Form):
    reject_above = forms.FloatField(label=_("Turn strangers away"), min_value=0.01, max_value=1, localize=False)


class TopKForm(forms.Form):
    top_k = forms.IntegerField(label=_("Best labels shown"), min_value=1, max_value=MOST_TOP_K)


def checked(form: forms.BaseForm) -> dict[str, Any]:
    """The form's values; what is wrong with it is said as one sentence."""
    if form.is_valid():
        values: dict[str, Any] = form.cleaned_data
        return values
    name, errors = next(iter(form.errors.items()))
    label = form.fields[name].label if name in form.fields else ""
    raise LabelSetError(f"{label}: {errors[0]}" if label else str(errors[0]))
