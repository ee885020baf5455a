"""The administrator's raw view; its login is the site's, with the site's limits on guessing."""

from allauth.account.decorators import secure_admin_login
from django.contrib import admin
from django.http import HttpRequest

from webapp.accounts.models import Invitation, User

admin.site.login = secure_admin_login(admin.site.login)  # type: ignore[method-assign]


@admin.register(User)
class UserAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["email", "name", "is_staff", "is_active", "date_joined", "last_login"]
    search_fields = ["email", "name"]
    list_filter = ["is_active", "is_staff"]
    readonly_fields = ["id", "date_joined", "last_login"]
    fields = ["id", "email", "name", "is_active", "is_staff", "is_superuser", "date_joined", "last_login"]


@admin.register(Invitation)
class InvitationAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["email", "invited_by", "created_at", "expires_at", "used_by", "revoked_at"]
    readonly_fields = ["id", "invited_by", "created_at", "used_at", "used_by"]
    fields = ["id", "email", "invited_by", "created_at", "expires_at", "revoked_at", "used_at", "used_by"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False
