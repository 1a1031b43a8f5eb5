import base64
import hashlib

import numpy as np
import pytest

from mole_jax.data import records
from mole_jax.data.builders.llava_json.samples import Image
from mole_jax.data.builders.prepared.build import build
from mole_jax.data.recipes import m3it
from tests.data.builders import llava_files
from tests.data.builders.prepared_input import encode

PICTURES = [
  encode(np.full((8, 8, 3), (red, 0, 0), np.uint8)) for red in (50, 100)
]
BASE64 = [base64.b64encode(data).decode() for data in PICTURES]
NAMES = [hashlib.sha256(data).hexdigest()[:32] for data in PICTURES]

# Made up, in the words and the nesting of the rows that M3IT.py makes.
QUESTION = {
  "instruction": "Answer the question about the image.",
  "inputs": "How many trees are there?",
  "image_base64_str": [BASE64[0]],
  "outputs": "three",
}
CAPTION = {
  "instruction": "Describe the image.",
  "inputs": "",
  "image_base64_str": BASE64[0],
  "outputs": " Three trees on a hill. ",
  "meta": {"source": "coco"},
}
PAIR = {
  "instruction": "Is the sentence true of both images?",
  "inputs": "There is a dog.",
  "image_base64_str": BASE64,
  "outputs": "no",
}
ROWS = [QUESTION, CAPTION, PAIR]


def test_questions_captions_and_several_images(read, said):
  question, caption, pair = read(m3it.LAYOUT, ROWS)
  assert said(question) == [
    (
      "human",
      "<image>\nAnswer the question about the image.\n"
      "How many trees are there?",
    ),
    ("gpt", "three"),
  ]
  assert question.images == [Image(None, PICTURES[0])]
  assert question.id == "file:1"
  assert said(caption) == [
    ("human", "<image>\nDescribe the image."),
    ("gpt", "Three trees on a hill."),
  ]
  assert caption.images == question.images
  assert said(pair)[0] == (
    "human",
    "<image>\n<image>\nIs the sentence true of both images?\nThere is a dog.",
  )
  assert pair.images == [Image(None, data) for data in PICTURES]
  # Records about one picture have one source, though it has no path.
  assert question.source == caption.source == NAMES[0]


def test_the_parquet_of_hugging_face_is_read_alike(read, said):
  row = {key: QUESTION[key] for key in ("instruction", "inputs", "outputs")}
  row["image"] = {"bytes": PICTURES[0], "path": None}
  (sample,) = read(m3it.LAYOUT, [row], "parquet")
  (want,) = read(m3it.LAYOUT, [QUESTION])
  assert said(sample) == said(want)
  assert (sample.images, sample.source) == (want.images, want.source)


@pytest.mark.parametrize(
  ("change", "reason", "words"),
  [
    ({"outputs": None}, "layout", "wanted 'outputs', text; it is None"),
    ({"instruction": 3}, "layout", "wanted 'instruction', text; it is 3"),
    ({"inputs": ["q"]}, "layout", "wanted 'inputs', text; it is a list of 1"),
    ({"image_base64_str": []}, "layout", "wanted 'image_base64_str', base64"),
    ({"image_base64_str": "?"}, "bad_image", "no base64"),
    ({"image_base64_str": [7]}, "bad_image", "the image is 7"),
  ],
)
def test_a_wrong_row_is_a_problem(read, change, reason, words):
  before, problem, behind = read(
    m3it.LAYOUT, [CAPTION, {**QUESTION, **change}, PAIR]
  )
  assert (problem.reason, problem.line) == (reason, 2)
  assert words in problem.message
  assert before.turns and behind.turns


def test_a_raw_line_of_one_task_says_what_is_missing(read):
  (problem,) = read(
    m3it.LAYOUT, [{"image_str": BASE64[0], "question": "q", "answer": "a"}]
  )
  assert problem.reason == "layout"
  assert "wanted 'image_base64_str'" in problem.message
  assert "keys 'image_str', 'question', 'answer'" in problem.message
  assert "--recipe" in problem.message


def test_it_is_built_with_the_bytes_of_its_images(tmp_path):
  file = llava_files.write(tmp_path / "m3it.jsonl", ROWS, "lines")
  about = build(
    file,
    None,
    name="m3it",
    out=tmp_path / "out",
    domain="general",
    layout=m3it.LAYOUT,
  )
  assert (about["read"], about["used"]) == (3, 3)
  assert about["records_by_domain"] == {"general": 3}
  rows = {
    row["id"]: row
    for row in records.Records(tmp_path / "out" / "m3it" / "1.0.0", "train")
  }
  question, caption, pair = (rows[f"m3it.jsonl:{i}"] for i in (1, 2, 3))
  assert question["images"] == [PICTURES[0]]
  assert pair["images"] == PICTURES
  assert caption["caption"] == "Three trees on a hill."
  assert question["source"] == caption["source"] == NAMES[0]
  assert [turn["value"] for turn in caption["turns"]] == [
    "<image>\nDescribe the image.",
    "Three trees on a hill.",
  ]
