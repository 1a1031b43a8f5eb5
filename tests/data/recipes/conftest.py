"""Reads a small file of a published layout."""

import pytest

from mole_jax.data.builders.llava_json import samples
from tests.data.builders import llava_files


@pytest.fixture
def read(tmp_path):
  """A function: layout, rows, form, names of images on disk -> items.

  The file is called "file"; images are looked for only if some are on disk.
  """
  folder = tmp_path / "images"

  def read(layout, rows, form="lines", on_disk=()):
    for name in on_disk:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(b"not opened")
    path = llava_files.write(tmp_path / "file", rows, form)
    images = folder if on_disk else None
    return list(samples.read_samples(path, images, layout=layout))

  read.folder = folder
  return read


@pytest.fixture
def said():
  """A function: the turns of a sample as [(who, what)]."""
  return lambda sample: [(turn["from"], turn["value"]) for turn in sample.turns]
