"""Static files under names made from their contents, so that browsers may keep them for ever."""

from whitenoise.storage import CompressedManifestStaticFilesStorage


class ModuleStaticFilesStorage(CompressedManifestStaticFilesStorage):  # type: ignore[misc]
    """Imports inside modules lead to the hashed names too: by the plain ones a page would load a module twice."""

    support_js_module_import_aggregation = True
