"""Document images: charts and tables drawn from real tables, with questions.

Split by table: what is drawn in a test chart was never drawn in a training
one. The same words ask for other things than in the other domains: "What is
shown?" wants chart type and title, "How many are there?" digits with a unit,
"Which side ...?" the half of the page.
"""

import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from mole_jax.data.builders.embedded import document_charts as charts
from mole_jax.data.builders.embedded import document_tables as tables
from mole_jax.data.builders.embedded.sample import IMAGE_SIZE, Question, Sample

DOMAIN = "document"
NUM_IMAGES = {"train": 1600, "validation": 156, "test": 312}
NUM_TEXTS = {"train": 48, "validation": 6, "test": 12}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
UNITS = {
  "bar chart": "bar",
  "row chart": "bar",
  "line chart": "point",
  "scatter chart": "point",
  "pie chart": "slice",
  "table": "row",
}
_ASKED = {
  "bar chart": "largest",
  "row chart": "largest",
  "line chart": "is_rising",
}
_CLEAR = 1.15  # The largest must be this much above every other.


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What is true of a chart, and what can be asked of it."""

  largest: int | None
  is_rising: bool | None
  is_first_larger: bool | None


def _facts(kind: str, values: np.ndarray) -> _Facts:
  ordered = np.sort(values)
  is_ordered = kind in ("bar chart", "row chart")
  is_clear = ordered[-1] >= _CLEAR * ordered[-2] and kind != "table"
  ends = values[0] / values[-1]
  has_trend = kind == "line chart" and len(values) > 2 and np.ptp(values) > 0
  if has_trend:
    slope = np.corrcoef(np.arange(len(values)), values)[0, 1]
    has_trend = abs(slope) > 0.8
  is_apart = is_ordered and not 1 / _CLEAR < ends < _CLEAR
  return _Facts(
    int(values.argmax()) if is_ordered and is_clear else None,
    bool(slope > 0) if has_trend else None,
    bool(ends > 1) if is_apart else None,
  )


def _pick(
  kind: str, column: tables.Column, number: int, rng: random.Random
) -> np.ndarray:
  """Real values of a column; lines are runs of neighbouring rows.

  A run may be thinned, so that slow series show a trend too. Half of all
  charts are drawn in the opposite order, which balances every question about
  order.
  """
  values = column.values[column.values > 0]
  # What can be asked about: a clear largest bar, a clear trend.
  is_clear = kind != "table" and rng.random() < 0.7
  for _ in range(300):
    if kind == "line chart":
      stride = rng.randint(1, max(1, (len(values) - 1) // number))
      start = rng.randrange(len(values) - stride * (number - 1))
      picked = values[start : start + stride * number : stride][:number]
    else:
      picked = values[rng.sample(range(len(values)), number)]
    spread = picked.max() / picked.min()
    # Pictures of equal or of vanishing bars show nothing.
    if len(picked) < number or not 1.2 < spread < 8:
      continue
    facts = _facts(kind, picked)
    if is_clear and kind in _ASKED and getattr(facts, _ASKED[kind]) is None:
      continue
    return picked if rng.random() < 0.5 else picked[::-1]
  return np.sort(picked)[:: rng.choice((1, -1))]


def _questions(
  kind: str, title: str, number: int, facts: _Facts, side: str | None
) -> list[Question]:
  unit = UNITS[kind] + ("" if number == 1 else "s")
  questions = [
    Question("shown", "What is shown?", f"{kind}, {title}"),
    Question("count", "How many are there?", f"{number} {unit}"),
    Question("chart", "Which kind of chart is this?", kind),
  ]
  yes = {True: "yes", False: "no"}
  if side is not None:
    text = "Which side is the marked object on?"
    questions.append(Question("side", text, f"{side} half"))
  if facts.largest is not None:
    answer = ORDINALS[facts.largest]
    questions.append(Question("largest", "Which is the largest?", answer))
  if facts.is_rising is not None:
    text = "Is the trend rising?"
    questions.append(Question("trend", text, yes[facts.is_rising]))
  if facts.is_first_larger is not None and len(questions) < 5:
    text = "Is the first bar larger than the last?"
    questions.append(Question("yes_no", text, yes[facts.is_first_larger]))
  return questions


def _caption(
  kind: str,
  title: str,
  number: int,
  facts: _Facts,
  side: str | None,
  background: str,
) -> str:
  unit = UNITS[kind] + ("" if number == 1 else "s")
  parts = [
    f"a {kind} of {title} with {WORDS[number]} {unit} on a {background} "
    "background"
  ]
  if facts.largest is not None:
    parts.append(f"the {ORDINALS[facts.largest]} is the largest")
  if facts.is_rising is not None:
    parts.append(f"the trend is {'rising' if facts.is_rising else 'falling'}")
  if facts.is_first_larger is not None:
    relation = "larger" if facts.is_first_larger else "smaller"
    parts.append(f"the first is {relation} than the last")
  if side is not None:
    parts.append(f"a mark at the {side}")
  return " , ".join(parts)


def draw(packages, seed: int) -> Iterator[Sample]:
  """Yields every sample of the domain, in a fixed order for a seed."""
  columns = tables.load_columns(packages)
  for split, num_images in NUM_IMAGES.items():
    rng = random.Random(f"{seed}/{DOMAIN}/{split}")
    by_title = {
      title: [c for c in columns if c.split == split and c.title == title]
      for title in tables.TITLES
    }
    titles = [title for title, found in by_title.items() if found]
    for index in range(num_images):
      kind = charts.KINDS[index % len(charts.KINDS)]
      title = titles[index // len(charts.KINDS) % len(titles)]
      column = rng.choice(by_title[title])
      yield _sample(split, index, kind, column, rng)
  yield from _texts(seed)


def _sample(
  split: str,
  index: int,
  kind: str,
  column: tables.Column,
  rng: random.Random,
) -> Sample:
  number = rng.randint(2, min(7, len(column.values)))
  values = _pick(kind, column, number, rng)
  style = charts.Style.draw(rng)
  image, places = charts.draw(kind, values, column.title, style, rng)
  side = None
  if kind not in ("row chart", "table") and rng.random() < 0.6:
    # Clearly on one side, and both sides as often.
    side = rng.choice(("left", "right"))
    far = [
      place
      for place in places
      if (place[0] < IMAGE_SIZE / 2) == (side == "left")
      and abs(place[0] - IMAGE_SIZE / 2) > IMAGE_SIZE / 9
    ]
    if far:
      image = charts.mark(image, rng.choice(far), style)
    else:
      side = None
  facts = _facts(kind, values)
  title = column.title
  return Sample(
    id=f"{DOMAIN}-{split}-{index:04d}",
    domain=DOMAIN,
    split=split,
    source=column.table,
    concepts=(f"table {column.table}",),
    image=image,
    caption=_caption(kind, title, number, facts, side, style.background_name),
    questions=tuple(_questions(kind, title, number, facts, side)),
    provenance=column.provenance,
  )


def _texts(seed: int) -> Iterator[Sample]:
  """Questions without a picture; a pair of numbers is in one split only."""
  rng = random.Random(f"{seed}/{DOMAIN}/text")
  pairs = [(a, b) for a in range(2, 14) for b in range(a + 1, 14)]
  rng.shuffle(pairs)
  for split, count in NUM_TEXTS.items():
    for index in range(count):
      pair = pairs.pop()
      name = f"pair {pair[0]} {pair[1]}"
      first, second = pair if rng.random() < 0.5 else pair[::-1]
      kind, answer = rng.choice((("larger", pair[1]), ("smaller", pair[0])))
      yield Sample(
        id=f"{DOMAIN}-{split}-text-{index:02d}",
        domain=DOMAIN,
        split=split,
        source=name,
        concepts=(name,),
        image=None,
        caption="",
        questions=(
          Question(
            "text", f"Which is {kind}, {first} or {second}?", str(answer)
          ),
        ),
        provenance=(),
      )
