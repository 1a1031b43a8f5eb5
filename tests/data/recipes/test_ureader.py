import pytest

from mole_jax.data.builders.llava_json.samples import Image
from mole_jax.data.recipes import ureader

# Made up, in the words and the nesting that doc_processor.py quotes.
BAR = {
  "image": ["ChartQA/train/png/8127.png"],
  "prompt": "",
  "text": "<image>Human: Which bar is longest? AI: Nigeria",
  "system_instruction": "",
  "conversations": [
    {"from": "user", "value": "<image>"},
    {"from": "user", "value": "Which bar is longest?"},
    {"from": "assistant", "value": "Nigeria"},
  ],
  "task_type": "qa_sft",
}
FORM = {
  **BAR,
  "image": ["DUE_Benchmark/DeepForm/pngs/1.png"],
  "system_instruction": ["Read the form.", "Look at the form."],
  "conversations": [
    *BAR["conversations"][:1],
    {"from": "user", "value": "Who paid?"},
    {"from": "assistant", "value": "ACME"},
    {"from": "user", "value": "How much?"},
    {"from": "user", "value": "In dollars."},
    {"from": "assistant", "value": "12"},
  ],
}
NAMES = [*BAR["image"], *FORM["image"]]


def test_turns_of_the_user_that_follow_each_other_become_one(read, said):
  bar, form = read(ureader.LAYOUT, [BAR, FORM], on_disk=NAMES)
  assert said(bar) == [
    ("human", "<image>\nWhich bar is longest?"),
    ("gpt", "Nigeria"),
  ]
  assert bar.images == [Image(read.folder / NAMES[0], None)]
  assert (bar.id, bar.source) == ("file:1", NAMES[0])
  assert said(form) == [
    ("system", "Read the form."),
    ("human", "<image>\nWho paid?"),
    ("gpt", "ACME"),
    ("human", "How much?\nIn dollars."),
    ("gpt", "12"),
  ]


@pytest.mark.parametrize(
  ("change", "reason", "words"),
  [
    ({"conversations": "q"}, "layout", "wanted 'conversations', a list"),
    ({"conversations": BAR["conversations"][:2]}, "turn_order", "no answer"),
    (
      {"conversations": [*BAR["conversations"], BAR["conversations"][2]]},
      "turn_order",
      "wanted 'human'",
    ),
    ({"conversations": [{"from": "user"}]}, "bad_turn", "the value of turn 1"),
    ({"image": []}, "image_count", "1 <image> marker but 0 images"),
    ({"image": ["scan.tiff.2"]}, "image_missing", "'scan.tiff.2'"),
    ({"system_instruction": 5}, "bad_turn", "'system' is 5"),
  ],
)
def test_a_wrong_row_is_a_problem(read, change, reason, words):
  problem, form = read(ureader.LAYOUT, [{**BAR, **change}, FORM], on_disk=NAMES)
  assert (problem.reason, problem.line) == (reason, 1)
  assert words in problem.message
  assert form.turns
