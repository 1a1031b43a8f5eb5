"""Samples of the domains -> encoded records and their manifest."""

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from mole_jax.data.builders.embedded import duplicates
from mole_jax.data.builders.embedded.fetch import LICENSES, Packages
from mole_jax.data.builders.embedded.sample import IMAGE_SIZE, SPLITS, Sample

DOMAINS = ("general", "document", "biomedical")
MAX_QUESTIONS = 5  # In one record.
_WEBP_QUALITY = 80
_MAX_COLORS = 1024  # A drawing has fewer, a photograph more.
# How much larger a lossless file may be before the lossy one is taken.
_LOSSLESS_WORTH = 1.2

Draw = Callable[[Packages, int], Iterator[Sample]]


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A sample with its stored bytes (None without an image) and their hash."""

  sample: Sample
  image: bytes | None
  hash: int | None


def encode_image(image: Image.Image) -> bytes:
  """The smallest good encoding: PNG or WebP without loss, or lossy WebP.

  Raises ValueError for a picture of another size or mode than stored ones.
  """
  if image.size != (IMAGE_SIZE, IMAGE_SIZE) or image.mode != "RGB":
    raise ValueError(
      f"image: got {image.size} {image.mode}, want {IMAGE_SIZE} pixels square "
      "in RGB; resize and convert it where it is drawn"
    )
  lossy = _bytes(image, "WEBP", quality=_WEBP_QUALITY, method=6)
  if image.getcolors(_MAX_COLORS) is None:
    return lossy  # A photograph: lossless is slow to try and never smaller.
  exact = [_bytes(image, "WEBP", lossless=True, quality=60, method=4)]
  colors = image.getcolors(256)
  if colors:
    palette = image.convert(
      "P", palette=Image.Palette.ADAPTIVE, colors=len(colors)
    )
    if np.array_equal(np.asarray(palette.convert("RGB")), np.asarray(image)):
      exact.append(_bytes(palette, "PNG", optimize=True))
  smallest = min(exact, key=len)
  return smallest if len(smallest) <= _LOSSLESS_WORTH * len(lossy) else lossy


def encode(samples: Iterable[Sample]) -> list[Encoded]:
  """Encodes pictures; the hash is that of the bytes as a reader sees them."""
  encoded = []
  for sample in samples:
    if sample.image is None:
      encoded.append(Encoded(sample, None, None))
      continue
    data = encode_image(sample.image)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    hashed = duplicates.perceptual_hash(picture)
    encoded.append(Encoded(sample, data, hashed))
  return encoded


def without_near_duplicates(encoded: Sequence[Encoded]) -> list[Encoded]:
  """Leaves out pictures whose near-duplicate is in a later split."""
  rows = [i for i, item in enumerate(encoded) if item.hash is not None]
  dropped = duplicates.to_drop(
    [encoded[i].hash for i in rows], [encoded[i].sample.split for i in rows]
  )
  gone = {rows[i] for i in dropped}
  return [item for i, item in enumerate(encoded) if i not in gone]


def check(encoded: Sequence[Encoded]) -> None:
  """Raises ValueError where samples break what the set promises.

  Ids are unique, splits are known, no source and no concept is in two splits,
  each picture has an origin and each record 1 to MAX_QUESTIONS questions.
  """
  seen: dict[tuple[str, str, str], str] = {}
  ids = set()
  for item in encoded:
    sample = item.sample
    if sample.id in ids:
      raise ValueError(f"id: {sample.id!r} stands for two samples")
    ids.add(sample.id)
    if sample.split not in SPLITS:
      raise ValueError(
        f"split: {sample.id} is in {sample.split!r}, want one of {SPLITS}"
      )
    if not 1 <= len(sample.questions) <= MAX_QUESTIONS:
      raise ValueError(
        f"questions: {sample.id} has {len(sample.questions)}, want 1 to "
        f"{MAX_QUESTIONS}"
      )
    if item.image is not None and not sample.provenance:
      raise ValueError(f"provenance: {sample.id} names no file it came from")
    units = [("source", sample.source)]
    units += [("concept", concept) for concept in sample.concepts]
    for kind, name in units:
      split = seen.setdefault((sample.domain, kind, name), sample.split)
      if split != sample.split:
        raise ValueError(
          f"{kind}: {name!r} of {sample.domain} is in {split} and in "
          f"{sample.split} ({sample.id}); draw it in one of them only"
        )


def to_record(item: Encoded) -> dict:
  """The sample as a LLaVA conversation, questions in a shuffled order.

  The order depends on the id alone, so other samples never move it.
  """
  sample = item.sample
  rng = np.random.default_rng(zlib.crc32(sample.id.encode()))
  turns = []
  for index in rng.permutation(len(sample.questions)):
    question = sample.questions[index]
    marker = "<image>\n" if item.image is not None and not turns else ""
    for role, text in (
      ("human", marker + question.question),
      ("gpt", question.answer),
    ):
      turns.append({"from": role, "value": text, "kind": question.kind})
  return {
    "id": sample.id,
    "domain": sample.domain,
    "caption": sample.caption,
    "source": sample.source,
    "images": [] if item.image is None else [item.image],
    "turns": turns,
  }


def write_manifest(encoded: Sequence[Encoded], path: pathlib.Path) -> None:
  """One JSON line an image, in the order of ids; same bytes every time."""
  lines = []
  for item in sorted(encoded, key=lambda item: item.sample.id):
    if item.image is None:
      continue
    sample = item.sample
    line = {
      "id": sample.id,
      "domain": sample.domain,
      "split": sample.split,
      "source": sample.source,
      "concepts": list(sample.concepts),
      "perceptual_hash": f"{item.hash:016x}",
      "sha256": hashlib.sha256(item.image).hexdigest(),
      "origins": [dataclasses.asdict(origin) for origin in sample.provenance],
    }
    lines.append(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
  # No time in the header: it would change the bytes.
  path.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))


def write_licenses(
  encoded: Sequence[Encoded], packages: Packages, path: pathlib.Path
) -> None:
  """The licence texts of every package that a stored picture came from.

  BSD, MIT and OFL ask that their notice goes wherever the work goes.
  """
  used = {
    (origin.package, origin.license)
    for item in encoded
    for origin in item.sample.provenance
  }
  parts = []
  for row in LICENSES:
    if (row.package, row.license) not in used:
      continue
    title = f"{row.package} {row.version}, {row.prefix}: {row.license}"
    # Some read-in files are source code whose docstring says it: the note does.
    is_text = not row.read_in.endswith(".py")
    text = packages.license_text(row).strip() if is_text else ""
    body = "\n\n".join(filter(None, [row.note, f"({row.read_in})", text]))
    parts.append(f"{'=' * 78}\n{title}\n{'=' * 78}\n{body}\n")
  path.write_text("\n".join(parts))


def _bytes(image: Image.Image, file_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()
