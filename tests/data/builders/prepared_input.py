"""Files of conversations and pictures for the tests of building."""

import io
import json

import numpy as np
from PIL import Image


def encode(pixels, format="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format, **options)
  return buffer.getvalue()


def entry(number, image=None):
  """A question and an answer, of growing length, perhaps about a picture."""
  marker = "" if image is None else "<image>\n"
  turns = [
    {"from": "human", "value": f"{marker}{'q' * (1 + number % 5)}?"},
    {"from": "gpt", "value": "a" * (1 + number % 7)},
  ]
  made = {"id": f"id-{number}", "conversations": turns}
  return made if image is None else {**made, "image": image}


def write(folder, entries, images=None):
  """Writes train.json, and images by name; returns the two paths."""
  pictures = folder / "pictures"
  pictures.mkdir(parents=True, exist_ok=True)
  for name, data in (images or {}).items():
    (pictures / name).write_bytes(data)
  file = folder / "train.json"
  lines = ",\n".join(json.dumps(each) for each in entries)
  file.write_text(f"[{lines}]\n")
  return file, pictures


def sample_input(folder, count=12):
  """Every third entry is text alone; picture i is one colour, (i, 0, 0)."""
  names = [None if i % 3 == 2 else f"{i}.png" for i in range(count)]
  images = {
    name: encode(np.full((8, 8, 3), (i % 256, 0, 0)))
    for i, name in enumerate(names)
    if name
  }
  entries = [entry(i, name) for i, name in enumerate(names)]
  return *write(folder, entries, images), entries


def contents(folder):
  """Name -> bytes of each file of a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
