"""Images are refused before they are decoded, or decoded whole."""

import io
import struct
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mole_jax.data import images
from mole_jax.data.builders.llava_json import pictures
from mole_jax.data.builders.llava_json.pictures import Image
from mole_jax.data.builders.llava_json.problems import EntryError


def encoded(name, mode="RGB", size=(40, 24), **options):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  buffer = io.BytesIO()
  PillowImage.fromarray(noise).convert(mode).save(buffer, name, **options)
  return buffer.getvalue()


def bomb(side=9000):
  """A PNG of side x side zeros, compressed a thousandfold."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

  header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
  )


@pytest.mark.parametrize("name", images.FORMATS)
def test_size_and_format_of_every_kind(name):
  assert pictures.check_image(encoded(name)) == (40, 24, name)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_any_mode_is_taken(mode):
  name = "JPEG" if mode == "CMYK" else "PNG"
  assert pictures.check_image(encoded(name, mode)) == (40, 24, name)


def test_the_size_is_that_of_the_upright_picture():
  exif = PillowImage.Exif()
  exif[0x0112] = 6  # Turned by a quarter.
  assert pictures.check_image(encoded("JPEG", exif=exif)) == (24, 40, "JPEG")


def test_of_a_moving_picture_the_first_frame_counts():
  frames = [PillowImage.new("L", (40, 24), grey) for grey in (0, 255)]
  buffer = io.BytesIO()
  frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
  assert pictures.check_image(buffer.getvalue()) == (40, 24, "GIF")


def test_a_bomb_is_refused_without_decoding(monkeypatch):
  data = bomb()
  assert len(data) < 11_000  # 81 million pixels.

  def decode(*args, **kwargs):
    raise AssertionError("decoded")

  monkeypatch.setattr(images, "open_image", decode)
  monkeypatch.setattr(PillowImage.Image, "load", decode)
  with pytest.raises(EntryError, match="9000 x 9000") as caught:
    pictures.check_image(data)
  assert caught.value.reason == "image_too_large"


def test_a_bomb_that_pillow_knows_is_refused_too():
  with pytest.raises(EntryError) as caught:
    pictures.check_image(bomb(20_000))
  assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF"])
def test_every_image_cut_short_is_refused(name):
  data = encoded(name)
  # The last bytes say that there are no more, and nothing of the picture.
  for size in [*range(0, len(data) - 20, 7)]:
    with pytest.raises(EntryError) as caught:
      pictures.check_image(data[:size])
    assert caught.value.reason == "image_broken", size
    assert "0x" not in str(caught.value)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=300)
def test_flipped_bytes_are_decoded_or_refused(data):
  content = bytearray(encoded(data.draw(st.sampled_from(images.FORMATS))))
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
  try:
    width, height, _ = pictures.check_image(bytes(content))
  except EntryError as error:
    assert error.reason in ("image_broken", "image_too_large")
  else:
    assert 0 < width * height <= images.MAX_PIXELS


def test_bytes_of_a_file_are_read_up_to_a_limit(tmp_path):
  path = tmp_path / "a.jpg"
  path.write_bytes(b"12345")
  for image in (Image(path, None), Image(None, b"12345")):
    assert pictures.load_image(image, max_bytes=5) == b"12345"
    with pytest.raises(EntryError) as caught:
      pictures.load_image(image, max_bytes=4)
    assert caught.value.reason == "image_too_large"
  path.unlink()
  with pytest.raises(EntryError) as caught:
    pictures.load_image(Image(path, None))
  assert caught.value.reason == "image_unreadable"
