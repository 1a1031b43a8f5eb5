"""The document domain: real values, balanced questions, legible charts."""

import random

import numpy as np
import pytest

from mole_jax.data.builders.embedded import document, document_charts
from mole_jax.data.builders.embedded.document_tables import TITLES, Column
from mole_jax.data.builders.embedded.sample import IMAGE_SIZE, Provenance

ORIGIN = Provenance("package", "1", "file", "MIT", "0" * 64)


def make_column(values, split="train", title="price"):
  return Column("table", split, title, np.array(values, float), (ORIGIN,))


def draw(kind, values, seed=0, **style_changes):
  rng = random.Random(seed)
  style = document_charts.Style.draw(rng)
  for key, value in style_changes.items():
    object.__setattr__(style, key, value)
  values = np.array(values, float)
  image, places = document_charts.draw(kind, values, "price", style, rng)
  return image, places, style


@pytest.mark.parametrize("kind", document_charts.KINDS)
@pytest.mark.parametrize("number", [2, 7])
def test_every_value_has_one_place_inside_the_picture(kind, number):
  for seed in range(5):
    image, places, _ = draw(kind, range(1, number + 1), seed)
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
    assert len(places) == number
    assert all(0 < x < IMAGE_SIZE and 0 < y < IMAGE_SIZE for x, y in places)


def test_bars_are_as_high_as_their_values():
  image, places, style = draw(
    "bar chart", [1, 2, 4], is_one_ink=True, has_axes=False
  )
  pixels = np.asarray(image).astype(int)
  is_ink = np.abs(pixels - style.inks[0]).sum(-1) < 30
  heights = [is_ink[:, round(x)].sum() for x, _ in places]
  assert heights[2] == pytest.approx(2 * heights[1], abs=2)
  assert heights[1] == pytest.approx(2 * heights[0], abs=2)


def test_a_mark_is_where_it_was_put():
  image, places, style = draw("bar chart", [3, 2, 3, 2])
  marked = document_charts.mark(image, places[0], style)
  changed = np.abs(np.asarray(marked, int) - np.asarray(image, int)).sum(-1)
  columns = np.nonzero(changed.sum(0))[0]
  assert columns.max() < IMAGE_SIZE / 2


def test_lines_show_neighbouring_rows_and_charts_only_real_values():
  values = np.arange(10.0, 60.0)
  column = make_column(values)
  for seed in range(20):
    picked = document._pick("line chart", column, 5, random.Random(seed))
    assert set(picked) <= set(values)
    steps = np.diff(picked)
    assert np.all(steps == steps[0])
    bars = document._pick("bar chart", column, 5, random.Random(seed))
    assert set(bars) <= set(values) and len(set(bars)) == 5


@pytest.mark.parametrize(
  ("kind", "values", "largest", "is_rising", "is_first_larger"),
  [
    ("bar chart", [1, 3, 2], 1, None, False),
    ("bar chart", [3, 2.9, 1], None, None, True),
    ("row chart", [2, 5, 2], 1, None, None),
    ("line chart", [1, 2, 3], None, True, None),
    ("line chart", [3, 2, 1], None, False, None),
    ("line chart", [1, 9, 1], None, None, None),
    ("line chart", [2, 2, 2], None, None, None),
    ("pie chart", [1, 3], None, None, None),
    ("table", [1, 3], None, None, None),
  ],
)
def test_only_what_can_be_seen_is_asked(
  kind, values, largest, is_rising, is_first_larger
):
  facts = document._facts(kind, np.array(values, float))
  assert facts == document._Facts(largest, is_rising, is_first_larger)


def test_answers_are_in_the_words_of_a_document():
  facts = document._Facts(1, None, None)
  questions = document._questions("bar chart", "price", 5, facts, "left")
  answers = {q.kind: q.answer for q in questions}
  assert answers == {
    "shown": "bar chart, price",
    "count": "5 bars",
    "chart": "bar chart",
    "side": "left half",
    "largest": "second",
  }
  facts = document._Facts(None, True, None)
  caption = document._caption("line chart", "heat", 3, facts, None, "grey")
  assert caption == (
    "a line chart of heat with three points on a grey background , "
    "the trend is rising"
  )


def test_number_pairs_without_a_picture_are_in_one_split_and_right():
  samples = list(document._texts(0))
  assert len({s.source for s in samples}) == len(samples)
  for sample in samples:
    (question,) = sample.questions
    first, second = sorted(int(n) for n in sample.source.split()[1:])
    expected = second if "larger" in question.question else first
    assert question.answer == str(expected)


def test_the_mark_of_a_side_question_is_on_that_side():
  column = make_column(np.arange(10.0, 60.0))
  seen = set()
  for index in range(60):
    rng = random.Random(index)
    sample = document._sample("train", index, "bar chart", column, rng)
    sides = [q.answer for q in sample.questions if q.kind == "side"]
    for side in sides:
      seen.add(side)
      assert sample.caption.endswith(f"a mark at the {side.split()[0]}")
  assert seen == {"left half", "right half"}


def test_titles_are_short_enough_for_the_picture():
  # Letters are 12 pixels wide.
  assert max(map(len, TITLES)) * 12 < IMAGE_SIZE
