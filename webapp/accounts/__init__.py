"""People: accounts, invitations, and the doors that let somebody in."""
