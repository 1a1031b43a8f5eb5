"""General images: emoji and clip art on plain backgrounds, with questions.

A test picture shows only concepts that no training picture shows, so every
question asks for something that can be seen in a thing never seen before: its
class, colour, number, side. "Which side ...", "What is shown?" and "How many
are there?" are asked in the other domains too, where they want other answers.
"""

import collections
import random
from collections.abc import Iterator, Sequence

from mole_jax.data.builders.embedded import general_scenes as scenes
from mole_jax.data.builders.embedded.general_catalogue import PLURALS
from mole_jax.data.builders.embedded.general_things import (
  Thing,
  load_things,
  split_concepts,
)
from mole_jax.data.builders.embedded.general_words import (
  NUMBERS,
  text_samples,
)
from mole_jax.data.builders.embedded.sample import Question, Sample

NUM_IMAGES = {"train": 1900, "validation": 190, "test": 360}
# How often each scene comes in 20. "colour" is a single thing chosen by its
# colour; in the others a thing is chosen by its class.
_SCENES = (
  ("single",) * 5
  + ("colour",) * 4
  + ("pair",) * 4
  + ("side",) * 2
  + ("count",) * 5
)
_CONTRAST = 0.7  # Share of a thing's pixels that a background must not hide.


class _Deck:
  """Draws options in shuffled rounds, so that each comes equally often."""

  def __init__(self, rng: random.Random, options: Sequence):
    self._rng, self._options, self._left = rng, list(options), []

  def draw(self, wanted=lambda option: True):
    """The next option that `wanted` accepts; others keep their turn."""
    for _ in range(2):
      for index, option in enumerate(self._left):
        if wanted(option):
          return self._left.pop(index)
      fresh = list(self._options)
      self._rng.shuffle(fresh)
      self._left += fresh
    raise ValueError(f"no option of {self._options!r} fits")


class _Split:
  """Draws the pictures of one split out of the things that belong to it."""

  def __init__(self, things: list[Thing], split: str, seed: int):
    self.rng = random.Random(f"{seed}/general/{split}")
    self.split = split
    kinds = sorted({thing.kind for thing in things})
    self._kinds = {x: _Deck(self.rng, kinds) for x in set(_SCENES)}
    self._yes, self._no = _Deck(self.rng, kinds), _Deck(self.rng, kinds)
    self._things: dict[str, _Deck] = {}
    self._variants: dict[tuple[str, str], _Deck] = {}
    groups = collections.defaultdict(list)
    for thing in things:
      groups[thing.kind, thing.concept].append(thing)
    for kind in kinds:
      concepts = [concept for k, concept in groups if k == kind]
      self._things[kind] = _Deck(self.rng, concepts)
    colours = sorted({thing.colour for thing in things} - {None})
    self._colours = _Deck(self.rng, colours)
    self._coloured = {
      colour: _Deck(self.rng, [x for x in things if x.colour == colour])
      for colour in colours
    }
    for key, members in groups.items():
      self._variants[key] = _Deck(self.rng, members)
    self._backgrounds = _Deck(self.rng, tuple(scenes.BACKGROUNDS))
    self._counts = _Deck(self.rng, range(1, len(NUMBERS) + 1))
    self._sides = {
      x: _Deck(self.rng, ("left", "right")) for x in ("pair", "side")
    }
    self._scene = _Deck(self.rng, _SCENES)

  def _thing(self, kind: str) -> Thing:
    concept = self._things[kind].draw()
    return self._variants[kind, concept].draw()

  def _background(self, things: list[Thing]) -> str:
    scores = {
      word: min(scenes.contrast(thing, word) for thing in things)
      for word in scenes.BACKGROUNDS
    }
    # Two things may have no background that suits both well.
    enough = min(_CONTRAST, max(scores.values()))
    return self._backgrounds.draw(lambda word: scores[word] >= enough)

  def _presence(self, shown: set[str]) -> list[Question]:
    """One question with yes and one with no, about different classes."""
    asked = [
      (self._yes.draw(lambda x: x in shown), "yes"),
      (self._no.draw(lambda x: x not in shown), "no"),
    ]
    self.rng.shuffle(asked)
    return [
      Question("yes_no", presence_question(kind), answer)
      for kind, answer in asked
    ]

  def sample(self, index: int) -> Sample:
    """The next picture with caption and questions."""
    rng, scene = self.rng, self._scene.draw()
    if scene == "colour":
      things = [self._coloured[self._colours.draw()].draw()]
    else:
      things = [self._thing(self._kinds[scene].draw())]
    first = things[0].kind
    if scene == "pair":
      other = self._kinds[scene].draw(lambda x: x != first)
      things.append(self._thing(other))
    word = self._background(things)
    fill = scenes.background(rng, word)
    questions = []
    if scene in ("pair", "side"):
      side = self._sides[scene].draw()
      image = scenes.draw_side(rng, things, 0, side, fill)
      caption = side_caption(things, side, word)
      questions.append(
        Question("side", "Which side is the marked object on?", side)
      )
    elif scene == "count":
      count = self._counts.draw()
      image = scenes.draw_count(rng, things[0], count, fill)
      caption = f"{counted(things[0], count)} on a {word} background"
      questions.append(
        Question("count", "How many are there?", NUMBERS[count - 1])
      )
    else:
      image = scenes.draw_single(rng, things[0], fill)
      caption = f"one large {described(things[0])} on a {word} background"
    if scene == "colour":
      questions.append(
        Question("colour", "What colour is the object?", things[0].colour)
      )
    elif scene != "pair":
      questions.append(Question("shown", "What is shown?", first))
    if scene != "colour":
      presence = self._presence({thing.kind for thing in things})
      is_asked_twice = scene in ("pair", "single")
      questions += presence if is_asked_twice else presence[:1]
    if scene in ("single", "colour") or rng.random() < 0.4:
      questions.append(
        Question("background", "What colour is the background?", word)
      )
    rng.shuffle(questions)
    return Sample(
      id=f"general-{self.split}-{index:04d}",
      domain="general",
      split=self.split,
      source=things[0].concept,
      concepts=tuple(thing.concept for thing in things),
      image=image,
      caption=caption,
      questions=tuple(questions),
      provenance=tuple(
        dict.fromkeys(x for thing in things for x in thing.provenance)
      ),
    )


def article(word: str) -> str:
  """a or an."""
  return "an" if word[0] in "aeiou" else "a"


def presence_question(kind: str) -> str:
  """Such as "Is there a plant?" and "Is there food?"."""
  if PLURALS[kind] == kind:
    return f"Is there {kind}?"
  return f"Is there {article(kind)} {kind}?"


def described(thing: Thing) -> str:
  """A thing as captions name it: its colour if it has one, and its class."""
  return f"{thing.colour} {thing.kind}" if thing.colour else thing.kind


def counted(thing: Thing, count: int) -> str:
  """Such as "four green plants"."""
  name = thing.kind if count == 1 else PLURALS[thing.kind]
  words = [NUMBERS[count - 1], thing.colour, name]
  return " ".join(word for word in words if word)


def side_caption(things: list[Thing], side: str, word: str) -> str:
  """Caption of one or two things of which the first is marked."""
  if len(things) == 1:
    return (
      f"one {described(things[0])} on the {side} of a {word} background ; "
      f"it is marked and on the {side} side"
    )
  left, right = things if side == "left" else things[::-1]
  return (
    f"two objects on a {word} background : "
    f"{article(described(left))} {described(left)} on the left , "
    f"{article(described(right))} {described(right)} on the right ; "
    f"the {side} one is marked"
  )


def draw(packages, seed: int) -> Iterator[Sample]:
  """Samples of the general domain; the same for the same seed.

  `packages` unpacks the Debian packages fonts-noto-color-emoji, unicode-data
  and openclipart-png and knows the licence of their files (fetch.py).
  """
  things = load_things(packages)
  splits = split_concepts(things, seed)
  for split, count in NUM_IMAGES.items():
    members = [x for x in things if splits[x.concept] == split]
    drawn = _Split(members, split, seed)
    yield from (drawn.sample(index) for index in range(count))
  yield from text_samples(seed)
