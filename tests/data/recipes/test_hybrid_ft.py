import pytest

from mole_jax.data.recipes import hybrid_ft

# Made up, in the words and the nesting of each file.
TUNE = {
  "id": 0,
  "image": ["mimicit_tune/LA/a.jpg", "mimicit_tune/LA/b.jpg"],
  "conversations": [
    {"from": "human", "value": "<image>\n<image>\nWhat differs?"},
    {"from": "gpt", "value": "The cat."},
  ],
}
NLP = {
  "id": 1,
  "conversations": [
    {"from": "human", "value": "Say hello."},
    {"from": "gpt", "value": "Hello."},
  ],
}
LVIS = {
  "id": "000000391895",
  "image": "coco/train2017/000000391895.jpg",
  "conversations": [
    {"from": "human", "value": "<image>\nWho rides?"},
    {"from": "gpt", "value": "A man in a red shirt."},
  ],
}
SVIT = {
  "image_id": 2317468,
  "conversations": [
    {
      "content": [
        {"from": "user", "value": "What are they doing?"},
        {"from": "gpt", "value": "Playing tennis."},
      ]
    },
    {
      "content": [
        {"from": "user", "value": "Where is the <st>ball<ed>?"},
        {"from": "gpt", "value": "<st>ball<ed> [0.1, 0.2, 0.3, 0.4]"},
      ]
    },
  ],
}
LRV = {
  "image_id": "2392588",
  "question": "Can you see a blue teapot?",
  "answer": "There is no teapot.",
  "task": "negative",
}
CHART = {
  "image_id": "12.png",
  "question": "Which year is highest?",
  "answer": "2019",
}


def test_entries_of_moe_llava_with_several_images_or_none(read, said):
  pair, text = read(
    hybrid_ft.LAYOUT, [TUNE, NLP], "array", on_disk=TUNE["image"]
  )
  assert said(pair) == [
    ("human", "<image>\n<image>\nWhat differs?"),
    ("gpt", "The cat."),
  ]
  assert [image.path for image in pair.images] == [
    read.folder / name for name in TUNE["image"]
  ]
  assert (pair.id, pair.source) == ("0", "mimicit_tune/LA/a.jpg")
  assert said(text) == [("human", "Say hello."), ("gpt", "Hello.")]
  assert (text.images, text.source) == ([], "1")


def test_an_entry_about_a_video_is_a_problem_not_a_text(read):
  problem, text = read(
    hybrid_ft.LAYOUT, [{**NLP, "video": "valley/1.mp4"}, NLP]
  )
  assert (problem.reason, problem.line) == ("layout", 1)
  assert "'video'" in problem.message
  assert text.turns


def test_lvis_instruct4v(read, said):
  (sample,) = read(hybrid_ft.LVIS_INSTRUCT4V, [LVIS], "array", [LVIS["image"]])
  assert said(sample) == [
    ("human", "<image>\nWho rides?"),
    ("gpt", "A man in a red shirt."),
  ]
  assert (sample.id, sample.source) == (LVIS["id"], LVIS["image"])
  (problem,) = read(
    hybrid_ft.LVIS_INSTRUCT4V, [{"id": "1", "image": "a"}], on_disk=["a"]
  )
  assert problem.reason == "layout"
  assert "wanted 'conversations', a list of turns" in problem.message


def test_the_conversations_of_svit_about_a_picture_become_one(read, said):
  (sample,) = read(hybrid_ft.SVIT, [SVIT], "array", ["2317468.jpg"])
  assert said(sample) == [
    ("human", "<image>\nWhat are they doing?"),
    ("gpt", "Playing tennis."),
    ("human", "Where is the <st>ball<ed>?"),
    ("gpt", "<st>ball<ed> [0.1, 0.2, 0.3, 0.4]"),
  ]
  assert (sample.id, sample.source) == ("2317468", "2317468.jpg")
  assert sample.images[0].path == read.folder / "2317468.jpg"


def test_a_question_of_lrv_and_one_about_a_chart(read, said):
  lrv, chart = read(
    hybrid_ft.LRV, [LRV, CHART], "array", ["2392588.jpg", "12.png"]
  )
  assert said(lrv) == [
    ("human", "<image>\nCan you see a blue teapot?"),
    ("gpt", "There is no teapot."),
  ]
  assert (lrv.id, lrv.source) == ("2392588", "2392588.jpg")
  assert (chart.id, chart.source) == ("12.png", "12.png")


@pytest.mark.parametrize(
  ("layout", "row", "words"),
  [
    (
      hybrid_ft.SVIT,
      {"conversations": SVIT["conversations"]},
      "wanted 'image_id', a number or text; not there",
    ),
    (
      hybrid_ft.SVIT,
      {"image_id": True, "conversations": SVIT["conversations"]},
      "wanted 'image_id'",
    ),
    (
      hybrid_ft.SVIT,
      # SVIT's own file in LLaVA's layout, svit_core_150K among them.
      {"image_id": 1, "conversations": LVIS["conversations"]},
      "wanted 'conversations', a list of {\"content\": [turns]}",
    ),
    (
      hybrid_ft.SVIT,
      {"image_id": 1, "conversations": [{"content": []}]},
      "wanted 'conversations', one turn at least",
    ),
    (
      hybrid_ft.SVIT,
      {"image_id": 1, "conversations": [{"content": [{"from": "user"}]}]},
      "wanted 'value', text",
    ),
    (
      hybrid_ft.LRV,
      {"image_id": "1", "question": "q"},
      "wanted 'answer', text; not there",
    ),
    (hybrid_ft.LRV, {"question": "q", "answer": "a"}, "wanted 'image_id'"),
  ],
)
def test_a_wrong_row_is_a_problem(read, layout, row, words):
  (problem,) = read(layout, [row], on_disk=["1.jpg"])
  assert problem.reason == "layout"
  assert words in problem.message
