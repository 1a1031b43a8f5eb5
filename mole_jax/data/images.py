"""Encoded image bytes to square uint8 pixels, as LLaVA prepares them."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

# CLIP's mean times 255, rounded down: LLaVA's padding, invisible once the
# image is normalised.
BACKGROUND = (122, 116, 104)
# Decoding takes up to 12 bytes a pixel, WebP's decoder 20: below 200 MB.
MAX_PIXELS = 2**24
# Refuse the formats that run other programs (EPS) or few ever test.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_SIDE = 4096  # Longest side that is padded to a square as it is.


def decode_image(
  data: bytes, image_size: int, *, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Encoded bytes to `image_size` square RGB, padded and bicubic.

  Raises ValueError for bytes that are no image, are cut short, or hold more
  than `max_pixels` (WebP: half of that); the size is read before any pixel is
  decoded.
  """
  return prepare_image(open_image(data, max_pixels=max_pixels), image_size)


def prepare_image(
  image: Image.Image, image_size: int
) -> UInt8[np.ndarray, "H W 3"]:
  """An RGB picture padded to a square and resized to `image_size`."""
  square = pad_to_square(image)
  if square.width != image_size:
    square = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
  return np.array(square)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """Encoded bytes to an upright RGB picture of its own size.

  Transparent parts show the padding colour; of a moving picture the first
  frame is taken. Sides above 4096 are halved (or more) by box averaging, so
  that the padded square stays below 50 MB.

  Raises ValueError as `decode_image` does.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      _check_size(
        image.size, max_pixels // 2 if image.format == "WEBP" else max_pixels
      )
      image.load()
      factor = -(-max(image.size) // _MAX_SIDE)
      small = image.reduce(factor) if factor > 1 else image
      ImageOps.exif_transpose(small, in_place=True)
      return _to_rgb(small)
  except _TooLarge:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise _TooLarge(f"image refused before decoding: {e}") from e
  except Exception as error:  # Decoders raise a dozen types on bad bytes.
    raise ValueError(
      f"cannot decode image ({len(data)} bytes): "
      f"{type(error).__name__}: {error}; wanted a whole file of one of "
      f"{', '.join(FORMATS)}."
    ) from error


def pad_to_square(image: Image.Image) -> Image.Image:
  """Centres an RGB picture on a square of the padding colour.

  haotian-liu/LLaVA, llava/mm_utils.py: expand2square; the offset is
  floor((longer - shorter) / 2).
  """
  width, height = image.size
  if width == height:
    return image
  side = max(width, height)
  square = Image.new("RGB", (side, side), BACKGROUND)
  square.paste(image, ((side - width) // 2, (side - height) // 2))
  return square


class _TooLarge(ValueError):
  """A picture refused for its size; told apart from broken bytes."""


def _check_size(size: tuple[int, int], max_pixels: int):
  width, height = size
  if width * height > max_pixels:
    raise _TooLarge(
      f"image of {width} x {height} = {width * height} pixels; wanted at most "
      f"{max_pixels}. Store it smaller."
    )


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I;16"):
    # Pillow would clip 16-bit grey to white instead of scaling it.
    grey = (np.asarray(image) >> 8).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if image.mode in ("I", "F"):
    raise ValueError(f"mode {image.mode}: wanted 8 or 16 bits a channel")
  if image.has_transparency_data:
    if image.mode != "RGBA":  # convert() would copy.
      image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, BACKGROUND)
    opaque.paste(image, mask=image)
    return opaque
  return image if image.mode == "RGB" else image.convert("RGB")
