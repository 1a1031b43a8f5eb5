"""Paths of images, none of which leaves the image folder."""

import functools
import os
import pathlib
import stat

from mole_jax.data.builders.llava_json.problems import EntryError, shown


class ImageFolder:
  """The folder that the image paths of a file are relative to."""

  def __init__(self, folder: pathlib.Path):
    """Raises ValueError where there is no such folder."""
    if not folder.is_dir():
      raise ValueError(
        f"--images={str(folder)!r} is no folder; wanted the one that the "
        "image paths of the file are relative to."
      )
    self._folder = folder
    self._real = os.path.realpath(folder)
    # Most images share few folders: three calls of the system less for each.
    self._is_inside = functools.lru_cache(4096)(self._resolves_inside)

  def find(self, name: str) -> pathlib.Path:
    """The file that `name` means: regular, readable, inside the folder.

    Raises EntryError with the reason "image_path" (empty, NUL, absolute),
    "image_outside" (`..` or a link that leads out), "image_missing",
    "image_is_folder" or "image_unreadable".
    """
    _check_name(name)
    path = os.path.join(self._folder, name)
    try:
      state = os.lstat(path)
      # A link is looked into by itself, anything else by its folder.
      is_link = stat.S_ISLNK(state.st_mode)
      if not self._is_inside(path if is_link else os.path.dirname(path)):
        raise EntryError(
          "image_outside",
          f"image {shown(name)} leads out of {str(self._folder)!r} by a "
          "symbolic link; copy the file into the folder.",
        )
      if is_link:
        state = os.stat(path)
    except FileNotFoundError as error:
      is_link = os.path.islink(path)
      what = "is a link to no file, in" if is_link else "is not in"
      raise EntryError(
        "image_missing",
        f"image {shown(name)} {what} {str(self._folder)!r}; {_hint(name)}.",
      ) from error
    except OSError as error:
      raise _unreadable(name, error) from error
    if stat.S_ISDIR(state.st_mode):
      raise EntryError(
        "image_is_folder",
        f"image {shown(name)} is a folder; wanted an image file.",
      )
    if not stat.S_ISREG(state.st_mode):
      raise EntryError(
        "image_unreadable",
        f"image {shown(name)} is a device, pipe or socket; wanted a file.",
      )
    if not os.access(path, os.R_OK):
      raise _unreadable(name, "permission denied")
    return pathlib.Path(path)

  def _resolves_inside(self, path: str) -> bool:
    real = os.path.realpath(path)
    return real == self._real or real.startswith(
      self._real.rstrip(os.sep) + os.sep
    )


def _check_name(name: str) -> None:
  if not name or "\0" in name:
    what = "holds the character NUL" if name else "is empty"
    raise EntryError(
      "image_path",
      f"the image path {shown(name)} {what}; wanted a path inside --images.",
    )
  if name[0] in "/\\" or name[1:3] in (":/", ":\\"):  # Or Windows's.
    raise EntryError(
      "image_path",
      f"the image path {shown(name)} is absolute; wanted one relative to "
      "--images. Take the folder's part off and name it there.",
    )
  if ".." in name.replace("\\", "/").split("/"):
    raise EntryError(
      "image_outside",
      f"the image path {shown(name)} holds '..'; wanted one inside --images. "
      "Set --images to a folder above.",
    )


def _unreadable(name: str, error: OSError | str) -> EntryError:
  cause = (error.strerror or "") if isinstance(error, OSError) else error
  return EntryError(
    "image_unreadable",
    f"image {shown(name)} cannot be read: {cause}; wanted a readable file.",
  )


def _hint(name: str) -> str:
  if name.startswith(("http://", "https://")):
    return "nothing is downloaded, so fetch it there and write its path"
  if "\\" in name:
    return "write / for each backslash"
  return "copy it there, or correct the path or --images"
