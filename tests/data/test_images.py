import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mole_jax.data.images import (
  BACKGROUND,
  decode_image,
  open_image,
  pad_to_square,
)

NOISE = np.random.RandomState(0).randint(0, 256, (20, 31, 3)).astype(np.uint8)


def encoded(image, format="PNG", **kwargs):
  buffer = io.BytesIO()
  image.save(buffer, format, **kwargs)
  return buffer.getvalue()


def png_header_only(width, height):
  """A PNG that claims a size and holds no pixels."""

  def chunk(kind, data):
    return (
      struct.pack(">I", len(data))
      + kind
      + data
      + struct.pack(">I", zlib.crc32(kind + data))
    )

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (20, 20), (1, 6)])
def test_padding_centres_at_the_floor_of_half_the_difference(shape):
  pixels = np.resize(NOISE, (*shape, 3))
  height, width = shape
  side = max(shape)
  expected = np.empty((side, side, 3), np.uint8)
  expected[:] = (122, 116, 104)
  top, left = (side - height) // 2, (side - width) // 2
  expected[top : top + height, left : left + width] = pixels
  square = pad_to_square(Image.fromarray(pixels))
  np.testing.assert_array_equal(np.asarray(square), expected)


def test_image_of_the_right_size_keeps_its_pixels():
  pixels = np.resize(NOISE, (24, 24, 3))
  decoded = decode_image(encoded(Image.fromarray(pixels)), 24)
  np.testing.assert_array_equal(decoded, pixels)
  assert decoded.dtype == np.uint8


def cubic(x):
  """Keys' kernel with a = -0.5, Pillow's bicubic."""
  x = np.abs(x)
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0))


@pytest.mark.parametrize("size", [12, 48])
def test_resize_is_antialiased_bicubic(size):
  pixels = np.resize(NOISE, (24, 24, 3))
  scale = 24 / size
  support = max(scale, 1)
  centre = (np.arange(size) + 0.5) * scale
  weights = cubic((np.arange(24) + 0.5 - centre[:, None]) / support)
  weights /= weights.sum(1, keepdims=True)
  # Pillow goes across first, with weights of 22 bits, and rounds each pass.
  weights = np.rint(weights * 2**22).astype(int)
  rows = np.einsum("wx,hxc->hwc", weights, pixels.astype(int))
  rows = np.clip((rows + 2**21) >> 22, 0, 255)
  columns = np.einsum("hy,ywc->hwc", weights, rows)
  expected = np.clip((columns + 2**21) >> 22, 0, 255)
  decoded = decode_image(encoded(Image.fromarray(pixels)), size)
  assert decoded.shape == (size, size, 3)
  np.testing.assert_array_equal(decoded, expected)


def test_transparent_parts_show_the_padding_colour():
  pixels = np.zeros((4, 4, 4), np.uint8)
  pixels[:2] = (10, 20, 30, 255)
  decoded = decode_image(encoded(Image.fromarray(pixels)), 4)
  assert (decoded[:2] == (10, 20, 30)).all()
  assert (decoded[2:] == BACKGROUND).all()


def test_transparent_palette_entry_shows_the_padding_colour():
  image = Image.new("P", (4, 4), 1)
  image.putpalette([255, 0, 0, 0, 255, 0])
  decoded = decode_image(encoded(image, transparency=1), 4)
  assert (decoded == BACKGROUND).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
  white = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
  format = "TIFF" if mode == "CMYK" else "PNG"
  assert (decode_image(encoded(white, format), 4) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
  pixels = np.full((4, 4), 0x4000, np.uint16)
  decoded = decode_image(encoded(Image.fromarray(pixels)), 4)
  assert (decoded == 0x40).all()


def test_float_pixels_are_refused():
  data = encoded(Image.new("F", (4, 4), 0.5), "TIFF")
  with pytest.raises(ValueError, match="wanted 8 or 16 bits a channel"):
    decode_image(data, 4)


def test_exif_orientation_is_applied():
  pixels = np.zeros((2, 4, 3), np.uint8)
  pixels[:, :2] = 255  # White on the left.
  exif = Image.Exif()
  exif[0x0112] = 6  # Stored turned; shown rotated by 90 degrees clockwise.
  upright = open_image(encoded(Image.fromarray(pixels), exif=exif))
  expected = np.rot90(pixels, k=-1)
  np.testing.assert_array_equal(np.asarray(upright), expected)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0, 3, 30, 0.5, 0.9])
def test_truncated_bytes_are_a_clear_error(format, kept):
  data = encoded(Image.fromarray(np.resize(NOISE, (64, 64, 3))), format)
  end = kept if isinstance(kept, int) else int(kept * len(data))
  with pytest.raises(ValueError, match="cannot decode image"):
    decode_image(data[:end], 16)


@pytest.mark.parametrize(
  ("width", "height"), [(5000, 5000), (12000, 12000), (60000, 60000)]
)
def test_bombs_are_refused_by_their_header(width, height):
  # There is no pixel in the file: an error about pixels proves that nothing
  # was decoded. Pillow's own warning and error come first for the larger.
  with pytest.raises(ValueError, match="pixels"):
    decode_image(png_header_only(width, height), 16)


def test_the_limit_is_on_pixels_and_can_be_raised():
  data = encoded(Image.new("RGB", (40, 30)))
  assert decode_image(data, 8, max_pixels=1200).shape == (8, 8, 3)
  with pytest.raises(ValueError, match="40 x 30 = 1200 pixels; wanted at"):
    decode_image(data, 8, max_pixels=1199)


def test_webp_may_hold_half_as_many_pixels():
  data = encoded(Image.new("RGB", (40, 30)), "WEBP")
  assert decode_image(data, 8, max_pixels=2400).shape == (8, 8, 3)
  with pytest.raises(ValueError, match="wanted at most 1199"):
    decode_image(data, 8, max_pixels=2399)


def test_a_long_strip_is_made_smaller_before_it_is_padded():
  strip = open_image(encoded(Image.new("L", (9000, 10), 200)))
  assert strip.size == (3000, 4)
  square = decode_image(encoded(Image.new("L", (9000, 90), 200)), 30)
  assert (square[0] == BACKGROUND).all()


@pytest.mark.parametrize("format", ["EPS", "PPM"])
def test_formats_outside_the_list_are_not_opened(format):
  data = encoded(Image.new("RGB", (4, 4)), format)
  with pytest.raises(ValueError, match="wanted a whole file of one of JPEG"):
    decode_image(data, 4)
