"""Text-only conversations: questions answered by reading, not by looking.

They use the answers of the image questions, so that a model learns that a
question with its answer in the text needs no picture.
"""

import random

from mole_jax.data.builders.embedded.sample import Question, Sample

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "brown", "white",
)  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six")
_SPLITS = (("train", 16), ("validation", 4), ("test", 6))
# None of them stands in the catalogue, so no drawn concept is named here.
WORDS = (
    "cup", "table", "box", "bag", "book", "lamp", "door", "chair", "bottle",
    "plate", "coin", "rope", "stone", "drum", "bell", "basket", "pillow",
    "curtain", "mirror", "candle", "carpet", "blanket", "ticket", "button",
    "window", "wheel",
)  # fmt: skip


def text_samples(seed: int):
  """Three conversations a word; a word and its neighbour share a split."""
  rng = random.Random(f"{seed}/general/words")
  words = list(WORDS)
  rng.shuffle(words)
  start = 0
  for split, count in _SPLITS:
    group = words[start : start + count]
    start += count
    numbers = [NUMBERS[i % len(NUMBERS)] for i in range(count)]
    sides = [("left", "right")[i % 2] for i in range(count)]
    colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
    for answers in (numbers, sides, colours):
      rng.shuffle(answers)
    for i, word in enumerate(group):
      other = group[(i + 1) % count]
      plural = "boxes" if word == "box" else f"{word}s"
      rest = rng.choice([x for x in COLOURS if x != colours[i]])
      far = "right" if sides[i] == "left" else "left"
      facts = [(word, colours[i]), (other, rest)]
      places = [(word, sides[i]), (other, far)]
      rng.shuffle(facts)
      rng.shuffle(places)
      for form, question, answer in (
        (
          "count",
          f"There are {numbers[i]} {plural}. How many {plural} are there?",
          numbers[i],
        ),
        (
          "side",
          "The {} is on the {} and the {} is on the {}. ".format(
            *places[0], *places[1]
          )
          + f"Which side is the {word} on?",
          sides[i],
        ),
        (
          "colour",
          "The {} is {} and the {} is {}. ".format(*facts[0], *facts[1])
          + f"What colour is the {word}?",
          colours[i],
        ),
      ):
        concepts = (word,) if form == "count" else (word, other)
        yield Sample(
          id=f"general-{split}-text-{word}-{form}",
          domain="general",
          split=split,
          source=f"word {word}",
          concepts=tuple(f"word {x}" for x in concepts),
          image=None,
          caption="",
          questions=(Question("text", question, answer),),
          provenance=(),
        )
