"""Encoded image bytes to square uint8 pixels, as LLaVA prepares them.

Bit for bit what Transformers 5.23 and 5.24 make of the upright picture:
LlavaImageProcessorPil with do_pad, which pads and then does the same as
CLIPImageProcessorPil. Exceptions: 16-bit grey and sides above 5461 pixels.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# LLaVA's padding: `background_of` CLIP's mean.
BACKGROUND = (122, 116, 104)
# Values of config.data.image_resample; Pillow's filters are antialiased.
FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}
# Decoding takes up to 12 bytes a pixel, WebP's decoder 20: about 200 MB.
MAX_PIXELS = 2**24
# Refuse the formats that run other programs (EPS) or few ever test.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Longest side that is padded to a square as it is: the square takes 120 MB,
# and every photo of 16:9 or less within MAX_PIXELS is prepared exactly.
_MAX_SIDE = 5461


@dataclasses.dataclass(frozen=True)
class Preparation:
  """What a vision tower wants of pictures; LLaVA-1.5's but for the size.

  image_size: height and width, pixels.
  background: colour of the padding, RGB from 0 to 255.
  resample: filter of resizing, a key of `FILTERS`; ValueError for another.
  """

  image_size: int
  background: tuple[int, int, int] = BACKGROUND
  resample: str = "bicubic"

  def __post_init__(self):
    if self.resample not in FILTERS:
      raise ValueError(
        f"config.data.image_resample is {self.resample!r}; wanted one of "
        f"{list(FILTERS)}."
      )


def preparation_of(config: Mapping[str, Any]) -> Preparation:
  """What the tower of a configuration wants.

  Raises ValueError where config.data has another filter than `FILTERS`, or
  no mean of RGB.
  """
  data = config["data"]
  return Preparation(
    config["model"]["vision"]["image_size"],
    background_of(data["image_mean"]),
    data["image_resample"],
  )


def background_of(image_mean: Sequence[float]) -> tuple[int, int, int]:
  """The colour of padding that is invisible once the image is normalised.

  haotian-liu/LLaVA, llava/mm_utils.py: process_images; rounded down.
  """
  if len(image_mean) != 3 or not all(0 <= x <= 1 for x in image_mean):
    raise ValueError(
      f"config.data.image_mean is {tuple(image_mean)}; wanted three numbers "
      "from 0 to 1."
    )
  red, green, blue = (int(255 * x) for x in image_mean)
  return red, green, blue


def decode_image(
  data: bytes, preparation: Preparation, *, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Encoded bytes to the pixels of a tower.

  Raises ValueError for bytes that are no image, are cut short, or hold more
  than `max_pixels` (WebP: half of that); the size is read before any pixel is
  decoded.
  """
  return prepare_image(open_image(data, max_pixels=max_pixels), preparation)


def prepare_image(
  image: Image.Image, preparation: Preparation
) -> UInt8[np.ndarray, "H W 3"]:
  """A picture to the pixels of a tower: RGB, padded to a square, resized.

  Sides above 5461 are halved (or more) by box averaging first: Transformers
  pads whatever comes, and a strip of 2**24 x 1 pixels to 1 PB.

  Raises ValueError for pixels of more than 16 bits.
  """
  image = _to_rgb(image)
  factor = -(-max(image.size) // _MAX_SIDE)
  if factor > 1:
    image = image.reduce(factor)
  square = pad_to_square(image, preparation.background)
  size = preparation.image_size
  if square.width != size:
    square = square.resize((size, size), FILTERS[preparation.resample])
  return np.array(square)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """Encoded bytes to an upright RGB picture of its own size.

  Transparent parts show white; of a moving picture the first frame is taken.
  Upright as Transformers' load_image; the original LLaVA ignores EXIF.

  Raises ValueError as `decode_image` does.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      _check_size(
        image.size, max_pixels // 2 if image.format == "WEBP" else max_pixels
      )
      image.load()
      ImageOps.exif_transpose(image, in_place=True)
      return _to_rgb(image)
  except _TooLarge:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise _TooLarge(f"image refused before decoding: {e}") from e
  except Exception as error:  # Decoders raise a dozen types on bad bytes.
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # Which names an address.
      cause = f"it begins with {bytes(data[:16])!r}"
    raise ValueError(
      f"cannot decode image ({len(data)} bytes): {cause}; wanted a whole file "
      f"of one of {', '.join(FORMATS)}."
    ) from error


def pad_to_square(
  image: Image.Image, background: tuple[int, int, int] = BACKGROUND
) -> Image.Image:
  """Centres an RGB picture on a square of the padding colour.

  haotian-liu/LLaVA, llava/mm_utils.py: expand2square; the offset is
  floor((longer - shorter) / 2).
  """
  width, height = image.size
  if width == height:
    return image
  side = max(width, height)
  square = Image.new("RGB", (side, side), background)
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
  """RGB, what is transparent on white.

  Transformers, image_transforms.py: convert_to_rgb, whatever the colour of
  the padding. (Its load_image, which reads paths, and the original LLaVA drop
  the transparency: hidden colours show, black text on black in the worst
  case.)
  """
  if image.mode.startswith("I;16"):
    # Pillow, and so Transformers, clips 16-bit grey: all above 255 is white.
    grey = (np.asarray(image) >> 8).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if image.mode in ("I", "F"):
    raise ValueError(f"mode {image.mode}: wanted 8 or 16 bits a channel")
  # Not Pillow's has_transparency_data: it knows palettes of RGBA besides.
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    if image.mode != "RGBA":  # convert() would copy.
      image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, (255, 255, 255))
    opaque.paste(image, mask=image)
    return opaque
  return image if image.mode == "RGB" else image.convert("RGB")
