"""What a domain's drawing code hands to the builder of the embedded set."""

import dataclasses

from PIL import Image

IMAGE_SIZE = 96  # Stored width and height, pixels.
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Provenance:
  """One file of one package that went into an image.

  `license` is the SPDX name found in the package itself, `path` the member
  inside the unpacked package, `sha256` that file's digest.
  """

  package: str
  version: str
  path: str
  license: str
  sha256: str


@dataclasses.dataclass(frozen=True)
class Question:
  """One question with its answer; `kind` is the question type."""

  kind: str
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """One image (or none) with a caption and a conversation about it.

  `source` is the unit that never crosses a split (a concept, a table, a block
  of slices); `concepts` are all the things drawn, for the same proof.
  `image` is RGB, IMAGE_SIZE square, or None for a text-only conversation.
  """

  id: str
  domain: str
  split: str
  source: str
  concepts: tuple[str, ...]
  image: Image.Image | None
  caption: str
  questions: tuple[Question, ...]
  provenance: tuple[Provenance, ...]
