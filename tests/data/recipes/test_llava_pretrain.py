import copy

import pytest

from mole_jax.data.builders.llava_json.samples import Image
from mole_jax.data.recipes import llava_pretrain, sharegpt4v

# Made up, in the words and the nesting of blip_laion_cc_sbu_558k.json.
ROWS = [
  {
    "id": "004539375",
    "image": "00453/004539375.jpg",
    "conversations": [
      {"from": "human", "value": "Summarize the photo.\n<image>"},
      {"from": "gpt", "value": "a bed in a blue room"},
    ],
  },
  {
    "id": "002239345",
    "image": "00223/002239345.jpg",
    "conversations": [
      {"from": "human", "value": "<image>\nWhat is this?"},
      {"from": "gpt", "value": "a kettle on a stove"},
    ],
  },
]
NAMES = [row["image"] for row in ROWS]


def test_a_caption_has_its_marker_before_or_behind_what_is_asked(read, said):
  behind, before = read(llava_pretrain.LAYOUT, ROWS, "array", NAMES)
  assert said(behind) == [
    ("human", "Summarize the photo.\n<image>"),
    ("gpt", "a bed in a blue room"),
  ]
  assert said(before)[0] == ("human", "<image>\nWhat is this?")
  assert behind.id == "004539375"
  assert behind.source == "00453/004539375.jpg"
  assert behind.images == [Image(read.folder / "00453/004539375.jpg", None)]
  assert behind.domain is None


# ShareGPT4V-PT is laid out the same.
@pytest.mark.parametrize("layout", [llava_pretrain.LAYOUT, sharegpt4v.PRETRAIN])
def test_what_is_no_captioned_picture_is_a_problem(read, layout):
  rows = [copy.deepcopy(row) for row in ROWS * 2]
  del rows[0]["image"]
  rows[1]["conversations"] *= 2
  del rows[2]["conversations"]
  items = read(layout, rows, on_disk=NAMES)
  assert [item.reason for item in items[:3]] == ["layout"] * 3
  assert "wanted 'image', text; not there" in items[0].message
  assert "two turns, a question and a caption; it is a list of 4" in (
    items[1].message
  )
  assert "wanted 'conversations', a list of turns; not there" in (
    items[2].message
  )
  assert items[3].id == "002239345"
