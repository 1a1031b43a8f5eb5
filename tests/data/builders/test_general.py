"""The general domain: balance, splits by concept, colours and pictures.

Cut-outs are drawn here, so that no package is needed.
"""

import collections
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mole_jax.data.builders.embedded import general, general_scenes
from mole_jax.data.builders.embedded.general_catalogue import (
  CATALOGUE,
  PLURALS,
)
from mole_jax.data.builders.embedded.general_things import (
  Thing,
  colour_word,
  dominant_colour,
  plain_name,
  split_concepts,
)
from mole_jax.data.builders.embedded.sample import Provenance

INK = {
  "red": (220, 20, 20),
  "green": (30, 150, 40),
  "blue": (20, 60, 220),
  "black": (10, 10, 10),
}
ORIGIN = Provenance("package", "1", "file", "OFL-1.1", "0" * 64)


def disc(colour: str, size: int = 100) -> Image.Image:
  picture = Image.new("RGBA", (size, size))
  box = (0, 0, size - 1, size - 1)
  ImageDraw.Draw(picture).ellipse(box, fill=(*INK[colour], 255))
  return picture


@pytest.fixture(scope="module")
def things():
  """Two variants of each of 12 concepts of each class."""
  inks = list(INK)
  return [
    Thing(
      kind,
      f"{kind} {number}",
      f"{kind} {number} {variant}",
      inks[(number + variant) % len(inks)],
      disc(inks[(number + variant) % len(inks)]),
      (ORIGIN,),
    )
    for kind in CATALOGUE
    for number in range(12)
    for variant in range(2)
  ]


@pytest.fixture
def drawn(things, monkeypatch):
  """A function from a seed to all samples of a small domain."""
  monkeypatch.setattr(general, "load_things", lambda packages: things)
  sizes = {"train": 240, "validation": 60, "test": 120}
  monkeypatch.setattr(general, "NUM_IMAGES", sizes)
  return lambda seed: list(general.draw(None, seed))


def content(sample):
  picture = sample.image and sample.image.tobytes()
  return (sample.id, sample.caption, sample.questions, picture)


def num_blobs(image: Image.Image, fill) -> int:
  """Connected regions that differ from the background, by flood filling."""
  away = np.abs(np.asarray(image, int) - np.asarray(fill)).max(-1) > 60
  todo = {(int(y), int(x)) for y, x in np.argwhere(away)}
  blobs = 0
  while todo:
    blobs += 1
    edge = [todo.pop()]
    while edge:
      y, x = edge.pop()
      around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
      near = [place for place in around if place in todo]
      todo.difference_update(near)
      edge += near
  return blobs


def test_same_seed_same_samples_and_another_seed_others(drawn):
  first, again, other = drawn(0), drawn(0), drawn(1)
  assert [content(x) for x in first] == [content(x) for x in again]
  assert [content(x) for x in first] != [content(x) for x in other]
  assert len({x.id for x in first}) == len(first)


def test_no_concept_and_no_source_is_in_two_splits(drawn):
  splits = collections.defaultdict(set)
  for sample in drawn(0):
    for name in (*sample.concepts, sample.source):
      splits[name].add(sample.split)
  assert len(splits) > 100
  assert all(len(found) == 1 for found in splits.values())


def test_a_concept_of_two_classes_has_one_split(things):
  double = [
    Thing(kind, "chicken", kind, None, disc("red"), (ORIGIN,))
    for kind in ("animal", "food")
  ]
  splits = split_concepts(things + double, 0)
  assert splits["chicken"] in ("train", "validation", "test")
  for kind in CATALOGUE:
    found = {splits[f"{kind} {number}"] for number in range(12)}
    assert found == {"train", "validation", "test"}


def test_answers_are_balanced_in_each_split(drawn):
  answers = collections.defaultdict(collections.Counter)
  for sample in drawn(0):
    for question in sample.questions:
      answers[sample.split, question.kind][question.answer] += 1
  # The largest share that rounds of a shuffled deck can leave in a split.
  most = {
    "side": 0.55,
    "shown": 0.14,
    "count": 0.25,
    "yes_no": 0.55,
    "colour": 0.35,  # Four colours.
    "background": 0.25,
  }
  for (split, kind), counts in answers.items():
    if kind in most:
      share = max(counts.values()) / counts.total()
      assert share <= most[kind], (split, kind, counts)


def test_classes_are_as_often_there_as_not(drawn):
  answers = collections.defaultdict(collections.Counter)
  for sample in drawn(0):
    for question in sample.questions:
      if question.kind == "yes_no" and sample.split == "train":
        answers[question.question][question.answer] += 1
  assert len(answers) == len(PLURALS)
  for counts in answers.values():
    assert 0.3 < counts["yes"] / counts.total() < 0.7


def test_wordings_are_those_of_the_other_domains(drawn):
  wordings = collections.defaultdict(set)
  for sample in drawn(0):
    assert 1 <= len(sample.questions) <= 5
    for question in sample.questions:
      wordings[question.kind].add(question.question)
  assert wordings["side"] == {"Which side is the marked object on?"}
  assert wordings["shown"] == {"What is shown?"}
  assert wordings["count"] == {"How many are there?"}
  assert "Is there a plant?" in wordings["yes_no"]
  assert "Is there an animal?" in wordings["yes_no"]
  assert "Is there food?" in wordings["yes_no"]


def test_captions_state_what_questions_ask(drawn):
  for sample in drawn(0):
    words = sample.caption.split()
    for question in sample.questions:
      if question.kind in ("side", "count", "background", "colour"):
        assert question.answer in words, sample
      if question.kind == "shown":
        plural = PLURALS[question.answer]
        assert {question.answer, plural} & set(words), sample


@pytest.mark.parametrize("count", range(1, 7))
def test_counted_copies_stand_apart(things, count):
  rng = random.Random(count)
  fill = general_scenes.BACKGROUNDS["white"]
  for _ in range(5):
    image = general_scenes.draw_count(rng, things[0], count, fill)
    assert num_blobs(image, fill) == count


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_marked_thing_stands_on_its_side(things, side, number):
  """The marker is the only saturated colour: the discs are black."""
  black = next(x for x in things if x.colour == "black")
  rng = random.Random(0)
  for _ in range(10):
    image = general_scenes.draw_side(
      rng, [black] * number, 0, side, general_scenes.BACKGROUNDS["white"]
    )
    pixels = np.asarray(image, int)
    is_marker = pixels.max(-1) - pixels.min(-1) > 100
    columns = np.flatnonzero(is_marker.any(0))
    centre = (columns.min() + columns.max()) / 2 / image.width
    assert centre < 0.35 if side == "left" else centre > 0.65
    dark = pixels.max(-1) < 60
    # A single large thing may reach a little over the middle.
    halves = [dark[:, :40].any(), dark[:, 56:].any()]
    assert sum(halves) == number
    if number == 2:  # The marker leaves the other thing's half alone.
      half = slice(0, 47) if side == "right" else slice(49, None)
      assert not is_marker[:, half].any()


@pytest.mark.parametrize(
  "rgb,word",
  [
    ((230, 30, 30), "red"),
    ((245, 130, 10), "orange"),
    ((252, 210, 40), "yellow"),
    ((60, 170, 60), "green"),
    ((30, 90, 220), "blue"),
    ((140, 40, 190), "purple"),
    ((245, 120, 180), "pink"),
    ((120, 70, 35), "brown"),
    ((15, 15, 15), "black"),
    ((130, 130, 130), "grey"),
    ((250, 250, 250), "white"),
  ],
)
def test_colour_words(rgb, word):
  assert colour_word(np.array([rgb], np.uint8)).tolist() == [word]


def test_a_colour_is_named_only_where_it_dominates():
  picture = disc("red")
  assert dominant_colour(picture) == "red"
  half = np.array(picture)
  half[50:, :, :3] = INK["blue"]
  assert dominant_colour(Image.fromarray(half)) is None


@pytest.mark.parametrize(
  "name,plain",
  [
    ("waving hand: dark skin tone", "waving hand"),
    ("woman cook: medium-light skin tone", "cook"),
    ("man: light skin tone, beard", "beard"),
    ("person in lotus position", "in lotus position"),
    ("woman", "woman"),
    ("flag: Japan", "flag: Japan"),
  ],
)
def test_plain_names_drop_skin_tone_and_gender(name, plain):
  assert plain_name(name) == plain


def test_a_background_that_hides_a_thing_is_not_chosen(things):
  white = Image.new("RGBA", (50, 50), (255, 255, 255, 255))
  thing = Thing("food", "rice", "rice", "white", white, (ORIGIN,))
  assert general_scenes.contrast(thing, "white") == 0
  assert general_scenes.contrast(thing, "blue") == 1
