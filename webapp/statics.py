"""Static files under names made from their contents, so that browsers may keep them for ever."""

from whitenoise.storage import CompressedManifestStaticFilesStorage


class ModuleStaticFilesStorage(CompressedManifestStaticFilesStorage):
    """`import "./app.js"` inside a module leads to the hashed name too: by the plain one a page would load app.js twice."""

    support_js_module_import_aggregation = True
