"""In-tree PEP 517 and 660 backend: writes the wrappers, then leaves everything to setuptools."""

from typing import Any

from build_modules import emit
from setuptools import build_meta

get_requires_for_build_editable = build_meta.get_requires_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel


def build_editable(*args: Any, **kwargs: Any) -> str:
    """Build the extension in the tree, and the wheel that points to it."""
    emit()
    return build_meta.build_editable(*args, **kwargs)


def build_wheel(*args: Any, **kwargs: Any) -> str:
    """Build a wheel."""
    emit()
    return build_meta.build_wheel(*args, **kwargs)


def build_sdist(*args: Any, **kwargs: Any) -> str:
    """Build a source distribution; it carries the wrapper, too."""
    emit()
    return build_meta.build_sdist(*args, **kwargs)
