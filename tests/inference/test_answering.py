"""Records become questions."""

import numpy as np

from mole_jax.data.images import Preparation
from mole_jax.inference import answering
from tests.inference import tiny


def test_every_question_of_a_record_is_asked_by_itself():
  asked = [("Which side?", "left", "side"), ("How many?", "two", "count")]
  records = [
    tiny.make_record(0, "general", asked),
    tiny.make_record(1, "general", asked[1:], has_image=False),
  ]
  questions = answering.read_questions("general", records, Preparation(8))
  rows = [(q.id, q.kind, q.text, q.answer, len(q.pixels)) for q in questions]
  assert rows == [
    ("general-0", "side", "Which side?", "left", 1),
    ("general-0", "count", "How many?", "two", 1),
    ("general-1", "count", "How many?", "two", 0),
  ]
  np.testing.assert_array_equal(questions[1].pixels[0], tiny.make_pixels(0))
