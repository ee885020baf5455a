"""The forms by which people come in and say who they are."""

from typing import Any

from allauth.account.forms import SignupForm as AllauthSignupForm
from django import forms
from django.utils.translation import gettext_lazy as _

from webapp.accounts.models import Invitation, User


class SignupForm(AllauthSignupForm):  # type: ignore[misc]
    """Name, e-mail, password. An invitation made out to an address admits that address."""

    field_order = ["name", "email", "password1"]

    def __init__(self, *args: Any, invitation: Invitation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.invitation = invitation
        self.fields["name"] = forms.CharField(
            label=_("Name"),
            max_length=80,
            required=False,
            widget=forms.TextInput(attrs={"autocomplete": "name"}),
        )
        self.fields["email"].label = _("E-mail")
        self.fields["password1"].help_text = _("At least 10 characters; a few words together are easy to remember.")
        for field in self.fields.values():
            field.widget.attrs.pop("placeholder", None)
        self.order_fields(self.field_order)

    def clean_email(self) -> str:
        email: str = super().clean_email()
        if self.invitation is not None and self.invitation.email not in ("", email):
            raise forms.ValidationError(
                _("This invitation is for %(email)s. Sign up with that address, or ask for another invitation."),
                params={"email": self.invitation.email},
            )
        return email


class InvitationForm(forms.Form):
    email = forms.EmailField(
        label=_("E-mail"),
        required=False,
        help_text=_("Given an address, the link works for that address alone. It is not sent: you hand the link over."),
        widget=forms.EmailInput(attrs={"autocomplete": "off"}),
    )

    def clean_email(self) -> str:
        email: str = self.cleaned_data["email"].lower()
        if email and User.objects.filter(email=email).exists():
            raise forms.ValidationError(_("%(email)s has an account already."), params={"email": email})
        return email


class ProfileForm(forms.Form):
    """Name and e-mail; a new e-mail, which is a way in, asks for the password."""

    name = forms.CharField(
        label=_("Name"), max_length=80, required=False, widget=forms.TextInput(attrs={"autocomplete": "name"})
    )
    email = forms.EmailField(label=_("E-mail"), widget=forms.EmailInput(attrs={"autocomplete": "email"}))
    password = forms.CharField(
        label=_("Current password"),
        required=False,
        strip=False,
        help_text=_("Only needed to change the e-mail."),
        widget=forms.PasswordInput(attrs={"autocomplete": "current-password"}),
    )

    def __init__(self, *args: Any, user: User, **kwargs: Any) -> None:
        kwargs["initial"] = {"name": user.name, "email": user.email}
        super().__init__(*args, **kwargs)
        self.user = user

    def clean_email(self) -> str:
        email: str = self.cleaned_data["email"].lower()
        if User.objects.filter(email=email).exclude(pk=self.user.pk).exists():
            raise forms.ValidationError(_("Another account has this address."))
        return email

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        email = data.get("email", self.user.email)
        if email != self.user.email and not self.user.check_password(data.get("password", "")):
            self.add_error("password", _("To change the e-mail, type your current password."))
        return data
