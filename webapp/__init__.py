"""The site: accounts, photos, label sets, training runs. It never imports torch or the worker."""
