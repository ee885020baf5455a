"""Addresses of people. Ours come first: where allauth has the same, ours is met."""

from django.urls import include, path, re_path
from django.views.generic import RedirectView

from webapp.accounts import views

urlpatterns = [
    path("accounts/login/", views.LoginView.as_view(), name="account_login"),
    path("accounts/signup/", views.SignupView.as_view(), name="account_signup"),
    path("accounts/password/change/", views.PasswordChangeView.as_view(), name="account_change_password"),
    path("accounts/password/reset/", views.PasswordResetView.as_view(), name="account_reset_password"),
    re_path(
        r"^accounts/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$",
        views.PasswordResetFromKeyView.as_view(),
        name="account_reset_password_from_key",
    ),
    path("accounts/email/", RedirectView.as_view(pattern_name="account"), name="account_email"),
    path("accounts/", include("allauth.account.urls")),
    path("account/", views.account, name="account"),
    path("account/log-out-everywhere/", views.log_out_everywhere, name="log_out_everywhere"),
    path("invitations/<str:token>/", views.invitation, name="invitation"),
    path("people/", views.people, name="people"),
    path("people/invitations/", views.invite, name="invite"),
    path("people/invitations/<uuid:invitation_id>/revoke/", views.revoke_invitation, name="revoke_invitation"),
    path("people/invitations/<uuid:invitation_id>/restore/", views.restore_invitation, name="restore_invitation"),
    path("people/<uuid:user_id>/reset-link/", views.make_reset_link, name="make_reset_link"),
    path("people/<uuid:user_id>/deactivate/", views.deactivate, name="deactivate"),
    path("people/<uuid:user_id>/reactivate/", views.reactivate, name="reactivate"),
    path("styleguide/", views.styleguide, name="styleguide"),
]
