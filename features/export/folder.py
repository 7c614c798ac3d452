"""The folder that an export goes to: made, or refused where it holds anything that this export does not write.

The same export continues in a folder where it was stopped, so its own files are left alone.
"""

from pathlib import Path

from gsae.errors import IncompatibleError
from gsae.files import disk_errors


def make_export_folder(folder: Path) -> Path:
    """Make a folder and return it. Raises IncompatibleError where it, or a folder above it, is a file."""
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise IncompatibleError(
                f"{folder} is a file, or below one. Choose another folder for the export."
            ) from None
    return folder


def not_of_this_export(path: Path) -> IncompatibleError:
    """Return the error for a file that this export would overwrite, or that its reader would take for a part of it."""
    return IncompatibleError(f"{path} is not of this export. Choose another folder, or delete it.")
