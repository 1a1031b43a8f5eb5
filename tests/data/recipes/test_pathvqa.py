import hashlib

import numpy as np
import pytest

from mole_jax.data import records
from mole_jax.data.builders.llava_json.samples import Image
from mole_jax.data.builders.prepared.build import build
from mole_jax.data.recipes import pathvqa
from tests.data.builders import llava_files
from tests.data.builders.prepared_input import encode

PICTURES = [
  encode(np.full((8, 8, 3), (0, green, 0), np.uint8), "JPEG")
  for green in (50, 100)
]
NAMES = [hashlib.sha256(data).hexdigest()[:32] for data in PICTURES]

# Made up, with the columns of the parquet files.
ROWS = [
  {
    "image": {"bytes": PICTURES[0], "path": None},
    "question": "where are liver stem cells located?",
    "answer": "in the canals of hering",
  },
  {
    "image": {"bytes": PICTURES[0], "path": None},
    "question": "is a nucleus seen?",
    "answer": "yes",
  },
  {
    "image": {"bytes": PICTURES[1], "path": None},
    "question": "is a nucleus seen?",
    "answer": "no",
  },
]


def test_a_question_about_an_embedded_picture(read, said):
  first, second, third = read(pathvqa.LAYOUT, ROWS, "parquet")
  assert said(first) == [
    ("human", "<image>\nwhere are liver stem cells located?"),
    ("gpt", "in the canals of hering"),
  ]
  assert first.images == [Image(None, PICTURES[0])]
  assert (first.id, first.line) == ("file:1", 1)
  # Two questions about one picture must not come into two splits.
  assert [x.source for x in (first, second, third)] == [
    NAMES[0],
    NAMES[0],
    NAMES[1],
  ]


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"answer": None}, "wanted 'answer', text; it is None"),
    ({"question": " "}, "wanted 'question', text; it is ' '"),
    ({"image": None}, 'wanted \'image\', {"bytes": ..., "path": ...}'),
  ],
)
def test_a_wrong_row_is_a_problem(read, change, words):
  good, problem = read(
    pathvqa.LAYOUT, [ROWS[0], {**ROWS[2], **change}], "parquet"
  )
  assert (problem.reason, problem.line) == ("layout", 2)
  assert words in problem.message
  assert good.turns


def test_it_is_built_with_the_bytes_of_its_images(tmp_path):
  file = llava_files.write(tmp_path / "pathvqa.parquet", ROWS, "parquet")
  about = build(
    file,
    None,
    name="pathvqa",
    out=tmp_path / "out",
    domain="biomedical",
    layout=pathvqa.LAYOUT,
  )
  assert about["used"] == 3
  assert about["records_by_domain"] == {"biomedical": 3}
  rows = {
    row["id"]: row
    for row in records.Records(tmp_path / "out" / "pathvqa" / "1.0.0", "train")
  }
  assert rows["pathvqa.parquet:1"]["images"] == [PICTURES[0]]
  assert rows["pathvqa.parquet:3"]["images"] == [PICTURES[1]]
  assert rows["pathvqa.parquet:2"]["source"] == NAMES[0]
  assert [turn["value"] for turn in rows["pathvqa.parquet:2"]["turns"]] == [
    "<image>\nis a nucleus seen?",
    "yes",
  ]


def test_the_weight_shows_each_training_record_twenty_times():
  num_training_records = 19_700  # As its page rounds them.
  assert round(pathvqa.MIXING_WEIGHT / num_training_records) == 20
