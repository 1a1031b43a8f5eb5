"""The images of a sample: their bytes, and whether these can be decoded."""

import base64
import binascii
import io
import pathlib
import re
from typing import Any, NamedTuple

from PIL import Image as PillowImage

from mole_jax.data import images
from mole_jax.data.builders.llava_json.paths import ImageFolder
from mole_jax.data.builders.llava_json.problems import EntryError, shown

MAX_IMAGE_BYTES = 2**26  # Encoded.
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


class Image(NamedTuple):
  """A file inside the image folder, or encoded bytes: one of the two."""

  path: pathlib.Path | None
  data: bytes | None


def load_image(image: Image, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
  """The encoded bytes of an image.

  Raises EntryError with the reason "image_unreadable", or "image_too_large"
  for more than `max_bytes`.
  """
  if image.path is None:
    data = image.data
  else:
    try:
      with open(image.path, "rb") as file:
        data = file.read(max_bytes + 1)
    except OSError as error:
      raise EntryError(
        "image_unreadable",
        f"image {str(image.path)!r} cannot be read: {error.strerror}; wanted "
        "a readable file.",
      ) from error
  if len(data) > max_bytes:
    raise EntryError(
      "image_too_large",
      f"{describe(image)} has more than {max_bytes:,} bytes; store it smaller.",
    )
  return data


def check_image(
  data: bytes, max_pixels: int = images.MAX_PIXELS
) -> tuple[int, int, str]:
  """(width, height, format) of an image that can be decoded, which it is.

  Width and height are those of the upright picture, in pixels; the format is
  Pillow's name, "JPEG". The size is read before a pixel is decoded. Flipped
  bytes inside a JPEG's data decode to other pixels: nobody can tell.

  Raises EntryError with the reason "image_too_large" (above `max_pixels`) or
  "image_broken" (empty, no image, cut short).
  """
  if not data:
    raise EntryError("image_broken", "it has no bytes; wanted an image file.")
  try:
    # Only the header is read.
    with PillowImage.open(io.BytesIO(data), formats=images.FORMATS) as header:
      name = str(header.format)
      (width, height) = header.size
  except (PillowImage.DecompressionBombError, Warning) as error:
    raise EntryError("image_too_large", f"{error}; store it smaller.") from None
  except Exception as error:  # Decoders raise a dozen types on bad bytes.
    if isinstance(error, PillowImage.UnidentifiedImageError):
      # Often the page of an error, saved under the image's name.
      raise _broken(f"it begins with {shown(data[:24])}") from error
    raise _broken(f"{type(error).__name__}: {error}") from error
  # As images.open_image has it: the decoder of WebP takes twice the memory.
  limit = max_pixels // 2 if name == "WEBP" else max_pixels
  if width * height > limit:
    raise EntryError(
      "image_too_large",
      f"{width} x {height} pixels; wanted at most {limit:,}. Store it smaller.",
    )
  try:
    picture = images.open_image(data, max_pixels=max_pixels)
  except ValueError as error:
    raise _broken(str(error.__cause__ or error)) from error
  return picture.width, picture.height, name


def _broken(cause: str) -> EntryError:
  # Pillow names the buffer by its address, another one each time.
  cause = re.sub(r" <_io\.BytesIO[^>]*>", "", cause)
  return EntryError(
    "image_broken",
    f"it cannot be decoded ({cause[:120]}); wanted a whole file of one of "
    f"{', '.join(images.FORMATS)}.",
  )


def describe(image: Image) -> str:
  """The image for a message."""
  return f"image {str(image.path)!r}" if image.path else "an image of the entry"


def read_images(
  value: Any, folder: ImageFolder | None
) -> tuple[list[Image], str]:
  """The images that an entry names, and a name for the first ("" for none).

  Args:
    value: None, "" or one image or a list of them; an image is a path, a
      `data:image/...;base64,` text, bytes, or {"bytes": ..., "path": ...}.
    folder: what paths are relative to.

  Raises EntryError, as `ImageFolder.find` and with "no_image_folder" or
  "bad_image".
  """
  if value is None or value == "":
    return [], ""
  values = value if isinstance(value, list) else [value]
  read = [_read_image(each, folder) for each in values]
  return [image for image, _ in read], read[0][1] if read else ""


def _read_image(value: Any, folder: ImageFolder | None) -> tuple[Image, str]:
  name = ""
  if isinstance(value, dict) and ("bytes" in value or "path" in value):
    path = value.get("path")
    name = path if isinstance(path, str) else ""
    value = path if value.get("bytes") is None else value["bytes"]
  if isinstance(value, bytes | bytearray):
    return Image(None, bytes(value)), name
  if not isinstance(value, str):
    raise EntryError(
      "bad_image",
      f"the image is {shown(value)}; wanted a path, or (of parquet) bytes.",
    )
  match = _DATA_URI.match(value)
  if match:
    return Image(None, _from_base64(value[match.end() :])), name
  if folder is None:
    raise EntryError(
      "no_image_folder",
      f"the entry names the image {shown(value)}, but no folder was given; "
      "add --images DIR.",
    )
  return Image(folder.find(value), None), value


def _from_base64(text: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise EntryError(
      "bad_image", f"the image is no base64: {error}; encode it again."
    ) from error
