"""What people type about collections."""

from django import forms
from django.utils.translation import gettext_lazy as _


class CollectionForm(forms.Form):
    name = forms.CharField(
        label=_("Name"), max_length=120, strip=True, widget=forms.TextInput(attrs={"autocomplete": "off"})
    )
