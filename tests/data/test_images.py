"""Bytes become the pixels that Transformers makes of them, or an error."""

import io
import pickle
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps

from mole_jax.data.images import (
  BACKGROUND,
  Preparation,
  background_of,
  decode_image,
  open_image,
  pad_to_square,
  preparation_of,
  prepare_image,
)
from mole_jax.training.step import normalise

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
  expected[:] = (1, 2, 3)
  expected[top : top + height, left : left + width] = pixels
  square = pad_to_square(Image.fromarray(pixels), (1, 2, 3))
  np.testing.assert_array_equal(np.asarray(square), expected)


def test_image_of_the_right_size_keeps_its_pixels():
  pixels = np.resize(NOISE, (24, 24, 3))
  decoded = decode_image(encoded(Image.fromarray(pixels)), Preparation(24))
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
  decoded = decode_image(encoded(Image.fromarray(pixels)), Preparation(size))
  assert decoded.shape == (size, size, 3)
  np.testing.assert_array_equal(decoded, expected)


def test_transparent_parts_show_white_whatever_the_padding():
  pixels = np.zeros((2, 4, 4), np.uint8)
  pixels[:, :2] = (10, 20, 30, 255)
  image = encoded(Image.fromarray(pixels))
  decoded = decode_image(image, Preparation(4, (1, 2, 3)))
  assert (decoded[[0, 3]] == (1, 2, 3)).all()
  assert (decoded[1:3, :2] == (10, 20, 30)).all()
  assert (decoded[1:3, 2:] == 255).all()


def test_transparent_palette_entry_shows_white():
  image = Image.new("P", (4, 4), 1)
  image.putpalette([255, 0, 0, 0, 255, 0])
  decoded = decode_image(encoded(image, transparency=1), Preparation(4))
  assert (decoded == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
  white = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
  format = "TIFF" if mode == "CMYK" else "PNG"
  assert (decode_image(encoded(white, format), Preparation(4)) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
  pixels = np.full((4, 4), 0x4000, np.uint16)
  decoded = decode_image(encoded(Image.fromarray(pixels)), Preparation(4))
  assert (decoded == 0x40).all()


def test_float_pixels_are_refused():
  data = encoded(Image.new("F", (4, 4), 0.5), "TIFF")
  with pytest.raises(ValueError, match="wanted 8 or 16 bits a channel"):
    decode_image(data, Preparation(4))


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
    decode_image(data[:end], Preparation(16))


@pytest.mark.parametrize(
  ("width", "height"), [(5000, 5000), (12000, 12000), (60000, 60000)]
)
def test_bombs_are_refused_by_their_header(width, height):
  # There is no pixel in the file: an error about pixels proves that nothing
  # was decoded. Pillow's own warning and error come first for the larger.
  with pytest.raises(ValueError, match="pixels"):
    decode_image(png_header_only(width, height), Preparation(16))


def test_the_limit_is_on_pixels_and_can_be_raised():
  data = encoded(Image.new("RGB", (40, 30)))
  small = Preparation(8)
  assert decode_image(data, small, max_pixels=1200).shape == (8, 8, 3)
  with pytest.raises(ValueError, match="40 x 30 = 1200 pixels; wanted at"):
    decode_image(data, small, max_pixels=1199)


def test_webp_may_hold_half_as_many_pixels():
  data = encoded(Image.new("RGB", (40, 30)), "WEBP")
  small = Preparation(8)
  assert decode_image(data, small, max_pixels=2400).shape == (8, 8, 3)
  with pytest.raises(ValueError, match="wanted at most 1199"):
    decode_image(data, small, max_pixels=2399)


@pytest.mark.parametrize("format", ["EPS", "PPM"])
def test_formats_outside_the_list_are_not_opened(format):
  data = encoded(Image.new("RGB", (4, 4)), format)
  with pytest.raises(ValueError, match="wanted a whole file of one of JPEG"):
    decode_image(data, Preparation(4))


def picture(mode="RGB", size=(45, 28)):
  """Noise."""
  if mode in ("1", "P"):
    return picture("RGB", size).convert(mode)
  num_bytes = size[0] * size[1] * len(Image.new(mode, (1, 1)).getbands())
  return Image.frombytes(mode, size, np.random.RandomState(1).bytes(num_bytes))


def every_opacity():
  """256 x 256 RGBA: each value on each opacity."""
  value, alpha = np.meshgrid(np.arange(256), np.arange(256))
  channels = [value, 255 - value, value[::-1], alpha]
  return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


FILES = {
  "PNG RGB": encoded(picture()),
  "PNG L": encoded(picture("L")),
  "PNG 1": encoded(picture("1")),
  "PNG P": encoded(picture("P")),
  "PNG LA": encoded(picture("LA")),
  "PNG RGBA": encoded(picture("RGBA")),
  "PNG RGBA, every opacity": encoded(every_opacity()),
  "PNG P, one colour transparent": encoded(picture("P"), transparency=3),
  "PNG P, opacities": encoded(picture("P"), transparency=bytes(range(256))),
  "PNG L, one value transparent": encoded(picture("L"), transparency=77),
  "PNG RGB, one colour transparent": encoded(
    picture(), transparency=picture().getpixel((5, 5))
  ),
  "GIF": encoded(picture("P"), "GIF"),
  "GIF, one colour transparent": encoded(picture("P"), "GIF", transparency=3),
  "JPEG RGB": encoded(picture(), "JPEG"),
  "JPEG L": encoded(picture("L"), "JPEG"),
  "JPEG CMYK": encoded(picture("CMYK"), "JPEG"),
  "TIFF CMYK": encoded(picture("CMYK"), "TIFF"),
  "TIFF RGBA": encoded(picture("RGBA"), "TIFF"),
  "WEBP RGB": encoded(picture(), "WEBP"),
  "WEBP RGBA": encoded(picture("RGBA"), "WEBP"),
  "BMP RGB": encoded(picture(), "BMP"),
}
SHAPES = [  # Width and height.
  (45, 28),
  (28, 45),
  (31, 30),
  (40, 40),
  (23, 23),
  (1, 50),
  (50, 1),
  (1, 1),
  (2, 333),
  (5461, 3),  # The longest side that is prepared exactly.
]


def by_llava(image, size, mean=CLIP_MEAN, resample="bicubic", **options):
  """What Transformers' own processor of LLaVA makes of a picture or path."""
  processor = transformers.LlavaImageProcessorPil(
    do_pad=True,
    size={"shortest_edge": size},
    crop_size={"height": size, "width": size},
    image_mean=mean,
    resample=Image.Resampling[resample.upper()],
    **{"do_rescale": False, "do_normalize": False, **options},
  )
  made = processor(image, return_tensors="np")["pixel_values"]
  return made[0].transpose(1, 2, 0)


def by_clip(image, size, mean=CLIP_MEAN, resample="bicubic"):
  """What the processor of the tower makes of a picture padded here."""
  processor = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": size},
    crop_size={"height": size, "width": size},
    resample=Image.Resampling[resample.upper()],
    do_rescale=False,
    do_normalize=False,
  )
  pixels = processor.process_image(image, do_convert_rgb=True)
  _, height, width = pixels.shape
  before = max(0, width - height) // 2, max(0, height - width) // 2
  after = max(width - height, 0) - before[0], max(height - width, 0) - before[1]
  padding = list(zip(before, after, strict=True))
  padded = [
    np.pad(channel, padding, constant_values=int(255 * colour))
    for channel, colour in zip(pixels, mean, strict=True)
  ]
  made = processor(
    np.stack(padded),
    do_convert_rgb=False,
    input_data_format="channels_first",
    return_tensors="np",
  )
  return made["pixel_values"][0].transpose(1, 2, 0)


def assert_identical(ours, *theirs):
  assert ours.dtype == np.uint8
  for other in theirs:
    assert other.dtype == np.uint8
    np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("size", [20, 45, 97])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_as_in_transformers(name, size):
  image = Image.open(io.BytesIO(FILES[name]))
  ours = decode_image(FILES[name], Preparation(size))
  assert_identical(ours, by_llava(image, size), by_clip(image, size))


@pytest.mark.parametrize("size", [8, 23, 57])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
  ("mean", "resample"),
  [
    (CLIP_MEAN, "bicubic"),
    ((0.5, 0.5, 0.5), "bilinear"),  # SigLIP's mean.
    ((0.485, 0.456, 0.406), "bicubic"),  # DINOv2's.
    ((0.0, 0.0, 1.0), "bilinear"),
  ],
)
def test_every_shape_is_as_in_transformers(shape, size, mean, resample):
  image = picture(size=shape)
  preparation = Preparation(size, background_of(mean), resample)
  assert_identical(
    decode_image(encoded(image), preparation),
    by_llava(image, size, mean, resample),
    by_clip(image, size, mean, resample),
  )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_as_in_transformers_when_it_reads_files(
  format, orientation, tmp_path
):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(picture(), format, exif=exif)
  path = tmp_path / "picture"
  path.write_bytes(data)
  ours = decode_image(data, Preparation(20))
  upright = ImageOps.exif_transpose(Image.open(path))
  assert_identical(ours, by_llava(str(path), 20), by_clip(upright, 20))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_turned_transparent_picture_is_as_in_transformers(mode):
  exif = Image.Exif()
  exif[0x0112] = 6
  opacities = {"transparency": bytes(range(256))} if mode == "P" else {}
  data = encoded(picture(mode), exif=exif, **opacities)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  ours = decode_image(data, Preparation(20))
  assert_identical(ours, by_llava(upright, 20), by_clip(upright, 20))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK"])
def test_pictures_in_memory_are_as_in_transformers(mode):
  image = picture(mode)
  ours = prepare_image(image, Preparation(20))
  assert_identical(ours, by_llava(image, 20), by_clip(image, 20))


def test_a_palette_with_opacities_is_as_in_transformers():
  # Quantised in memory it has no "transparency": Transformers sees none.
  image = picture("RGBA").quantize(16)
  assert image.palette.mode == "RGBA"
  ours = prepare_image(image, Preparation(20))
  assert_identical(ours, by_llava(image, 20), by_clip(image, 20))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA"])
def test_a_long_strip_is_made_smaller_before_it_is_padded(mode):
  data = encoded(picture(mode, (11000, 5)))
  strip = open_image(data)
  assert strip.size == (11000, 5)
  expected = prepare_image(strip.reduce(3), Preparation(33))
  np.testing.assert_array_equal(decode_image(data, Preparation(33)), expected)


@pytest.mark.parametrize("name", ["JPEG RGB", "PNG RGBA", "PNG L"])
def test_normalised_pixels_are_as_in_transformers(name):
  image = Image.open(io.BytesIO(FILES[name]))
  pixels = decode_image(FILES[name], Preparation(20))
  batch = jnp.asarray(pixels)[None, None]
  ours = normalise(batch, CLIP_MEAN, CLIP_STD, "float32")[0, 0]
  theirs = by_llava(
    image, 20, image_std=CLIP_STD, do_rescale=True, do_normalize=True
  )
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def make_config(**changes):
  data = {"image_mean": [0.5, 0.25, 1.0], "image_resample": "bilinear"}
  return {"model": {"vision": {"image_size": 8}}, "data": {**data, **changes}}


def test_a_configuration_says_how_pictures_are_prepared():
  preparation = preparation_of(make_config())
  assert preparation == Preparation(8, (127, 63, 255), "bilinear")
  assert background_of(CLIP_MEAN) == BACKGROUND == Preparation(8).background
  assert pickle.loads(pickle.dumps(preparation)) == preparation


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"image_resample": "nearest"},
      r"config.data.image_resample is 'nearest'; wanted one of "
      r"\['bicubic', 'bilinear'\]",
    ),
    ({"image_mean": [0.5]}, r"image_mean is \(0.5,\); wanted three numbers"),
    ({"image_mean": [122.0, 0.0, 0.0]}, "wanted three numbers from 0 to 1"),
  ],
)
def test_a_setting_that_cannot_be_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    preparation_of(make_config(**changes))
