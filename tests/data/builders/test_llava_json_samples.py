"""What an entry means, and what is wrong with one."""

import base64
import json

import pytest

from mole_jax.data.builders.llava_json import samples
from mole_jax.data.builders.llava_json.samples import Problem, Sample
from tests.data.builders import llava_files
from tests.data.builders.llava_files import entry

MARKED = "<image>\nWhat is it?"


@pytest.fixture
def read(tmp_path):
  """A function: entries -> items; the folder holds a.jpg and b/c.jpg."""
  images = tmp_path / "images"
  (images / "b").mkdir(parents=True)
  for name in ("a.jpg", "b/c.jpg"):
    (images / name).write_bytes(b"not opened")

  def read(*rows, folder=images, **options):
    path = llava_files.write(tmp_path / "file", rows, "lines")
    return list(samples.read_samples(path, folder, **options))

  read.images = images
  return read


def turn(role, value, **more):
  return {"from": role, "value": value, **more}


def talk(*turns, **more):
  return {"id": "t", "conversations": list(turns), **more}


Q, A = turn("human", "q"), turn("gpt", "x")


def test_one_image_several_or_none(read):
  one, several, bare, null, blank, none = read(
    entry("1", MARKED, image="a.jpg"),
    entry("2", "<image> or <image>?", image=["b/c.jpg", "a.jpg"]),
    entry("3"),
    entry("4") | {"image": None},
    entry("5", image=""),
    entry("6", image=[]),
  )
  path = read.images / "a.jpg"
  assert one.images == [samples.Image(path, None)]
  assert several.images[0].path == read.images / "b" / "c.jpg"
  assert several.images[1].path == path
  for sample in (bare, null, blank, none):
    assert sample.images == []
  # Entries about one picture must not cross a split.
  assert [x.source for x in (one, several, bare)] == ["a.jpg", "b/c.jpg", "3"]


def test_a_marker_may_stand_anywhere_in_any_question(read):
  (sample,) = read(
    talk(
      turn("human", "Before <image> behind"),
      turn("gpt", "x"),
      turn("human", "and <image>"),
      turn("gpt", "y"),
      image=["a.jpg", "b/c.jpg"],
    )
  )
  assert sample.turns[0]["value"] == "Before <image> behind"
  assert len(sample.images) == 2


def test_images_as_bytes_in_json_and_parquet(read, tmp_path):
  data = b"\xff\xd8picture"
  uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
  (sample,) = read(entry("1", MARKED, image=uri))
  assert sample.images == [samples.Image(None, data)]
  rows = [
    entry("1", MARKED, image={"bytes": data, "path": "a.jpg"}),
    entry("2", MARKED, image={"bytes": None, "path": "a.jpg"}),
    entry("3"),
  ]
  path = llava_files.write(tmp_path / "file", rows, "parquet")
  inside, outside, none = samples.read_samples(path, read.images)
  assert inside.images == [samples.Image(None, data)]
  assert inside.source == outside.source == "a.jpg"
  assert outside.images == [samples.Image(read.images / "a.jpg", None)]
  assert none.images == []
  rows = [
    entry("1", "<image><image>") | {"images": [{"bytes": data}] * 2},
  ]
  llava_files.write(path, rows, "parquet")
  (several,) = samples.read_samples(path, None)
  assert several.images == [samples.Image(None, data)] * 2


def test_other_spellings_give_the_same_samples(read):
  want = read(
    talk(
      turn("system", "Be brief."),
      turn("human", MARKED),
      turn("gpt", "x"),
      image="a.jpg",
    )
  )[0][2:]
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": MARKED},
    {"role": "assistant", "content": "x"},
  ]
  mixed = talk(turn("user", MARKED), turn("assistant", "x"), image="a.jpg")
  for row in (
    {"id": "t", "messages": messages, "images": ["a.jpg"]},
    {"id": "t", "conversations": messages, "image": "a.jpg"},
    mixed | {"system": "Be brief."},
  ):
    assert read(row)[0][2:] == want


def test_a_table_may_hold_both_spellings_in_different_rows(read, tmp_path):
  rows = [
    talk(Q, A, id="1", images=None),
    {
      "id": "2",
      "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "x"},
      ],
    },
    {"id": "3", "conversations": [turn("human", MARKED), A]}
    | {"images": ["a.jpg"]},
  ]
  path = llava_files.write(tmp_path / "file", rows, "parquet")
  one, two, three = samples.read_samples(path, read.images)
  assert one.turns == two.turns
  assert len(three.images) == 1


def test_a_system_turn_comes_first_or_not_at_all(read):
  said, blank = read(
    talk(turn("system", "Be brief."), turn("human", "q"), turn("gpt", "x")),
    talk(turn("system", " "), turn("human", "q"), turn("gpt", "x"), id="2"),
  )
  assert [t["from"] for t in said.turns] == ["system", "human", "gpt"]
  assert [t["from"] for t in blank.turns] == ["human", "gpt"]
  (late,) = read(
    talk(turn("human", "q"), turn("system", "s"), turn("gpt", "x"))
  )
  assert late.reason == "turn_order"


def test_kind_and_domain_are_kept(read):
  row = talk(turn("human", "q"), turn("gpt", "x", kind="count"), domain="maps")
  (sample,) = read(row)
  assert sample.turns[1]["kind"] == "count"
  assert sample.turns[0]["kind"] == ""
  assert sample.domain == "maps"


BAD = {
  "no turns": ({"id": 1}, "no_turns"),
  "empty turns": (talk(), "no_turns"),
  "turns as text": ({"id": 1, "conversations": "q"}, "no_turns"),
  "turn as text": (talk("q", "x"), "bad_turn"),
  "number as value": (talk(Q, turn("gpt", 7)), "bad_turn"),
  "no value": (talk({"from": "human"}, A), "bad_turn"),
  "unknown role": (talk(turn("bing", "q"), A), "unknown_role"),
  "role of another type": (talk(turn(["human"], "q"), A), "unknown_role"),
  "no role": (talk({"value": "q"}, A), "unknown_role"),
  "no question": (talk(A), "no_question"),
  "only a system turn": (talk(turn("system", "s")), "no_question"),
  "only a blank system turn": (talk(turn("system", "")), "no_question"),
  "answer first": (talk(A, Q, A), "turn_order"),
  "two questions": (talk(Q, Q, A), "turn_order"),
  "no answer": (talk(Q, A, Q), "turn_order"),
  "empty answer": (talk(Q, turn("gpt", " \n")), "empty_answer"),
  "marker in an answer": (
    talk(Q, turn("gpt", "<image>"), image="a.jpg"),
    "image_in_answer",
  ),
  "two markers, one image": (
    entry(question="<image><image>", image="a.jpg"),
    "image_count",
  ),
  "one marker, no image": (entry(question=MARKED), "image_count"),
  "no marker, one image": (entry(image="a.jpg"), "image_count"),
  "image as number": (entry(question=MARKED, image=5), "bad_image"),
  "null among images": (entry(question=MARKED, image=[None]), "bad_image"),
  "no base64": (
    entry(question=MARKED, image="data:image/png;base64,?"),
    "bad_image",
  ),
  "id as list": (entry([]), "bad_id"),
  "id as truth": (entry(True), "bad_id"),
  "domain as number": (entry(domain=1), "bad_domain"),
  "both spellings": (entry(messages=[]), "layout"),
  "image missing": (entry(question=MARKED, image="no.jpg"), "image_missing"),
  "folder": (entry(question=MARKED, image="b"), "image_is_folder"),
  "half a character in a path": (
    entry(question=MARKED, image="\ud800.jpg"),
    "lone_surrogate",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_one_problem_with_its_line_and_id(read, name):
  row, reason = BAD[name]
  before, problem, behind = read(entry("1"), row, entry("3"))
  assert isinstance(before, Sample) and isinstance(behind, Sample)
  assert isinstance(problem, Problem)
  assert (problem.reason, problem.line) == (reason, 2)
  assert not problem.is_fatal
  assert problem.message.startswith("file line 2, entry 2")
  assert problem.message.isprintable()
  if isinstance(row["id"], str):
    assert problem.id == row["id"]
    assert repr(row["id"]) in problem.message


def test_turns_are_numbered_as_in_the_file(read):
  row = talk(turn("system", ""), Q, turn("gpt", ""))
  assert "turn 3, an answer" in read(row)[0].message
  row = talk(Q, turn("gpt", ""), system="s")
  assert "turn 2, an answer" in read(row)[0].message


def test_a_long_text_is_cut_in_the_message(read):
  (problem,) = read(entry("x" * 10**6, domain={"y" * 10**6: 1}))
  assert len(problem.message) < 400


def test_entries_without_an_id_get_one_each(read):
  rows = [entry(), entry(question="other")]
  for row in rows:
    del row["id"]
  first, second = read(*rows)
  assert (first.id, second.id) == ("file:1", "file:2")


def test_an_id_used_again_is_told_apart_and_a_copy_is_a_problem(read):
  # LLaVA-Instruct has one id for three conversations about one picture.
  one, other, copy, number = read(
    entry("7"), entry("7", "other"), entry("7"), entry(7, "third")
  )
  assert (one.id, one.same_id) == ("7", None)
  assert (other.id, other.same_id) == ("7#2", "7")
  assert (number.id, number.same_id) == ("7#4", "7")
  assert (copy.reason, copy.line, copy.id) == ("duplicate_entry", 3, "7")


def test_the_same_text_about_another_image_is_no_copy(read):
  items = read(
    entry("7", MARKED, image="a.jpg"), entry("7", MARKED, image="b/c.jpg")
  )
  assert all(isinstance(item, Sample) for item in items)


def test_image_paths_without_a_folder_end_the_reading(read):
  rows = [entry("1"), entry("2", MARKED, image="a.jpg"), entry("3")]
  first, problem = read(*rows, folder=None)
  assert isinstance(first, Sample)
  assert problem.is_fatal and problem.reason == "no_image_folder"
  assert "--images" in problem.message


def test_a_layout_says_how_its_entries_become_ours(read):
  def to_llava(row):
    return entry(row["key"], row["ask"], row["tell"])

  layout = samples.Layout("pairs", to_llava)
  good, bad = read(
    {"key": "k", "ask": "q", "tell": "x"}, {"key": "l"}, layout=layout
  )
  assert good.turns[0]["value"] == "q"
  assert bad.reason == "layout"
  assert "'pairs'" in bad.message and "ask" in bad.message


def test_a_sample_makes_problems_of_its_own_place(read):
  (sample,) = read(entry("7"))
  problem = sample.problem("image_broken", "cut short.")
  assert problem == Problem(
    "image_broken",
    1,
    "7",
    "file line 1, entry 1, id '7': cut short.",
    False,
  )


def test_a_missing_image_folder_is_refused_at_once(tmp_path):
  path = tmp_path / "file"
  path.write_text(json.dumps([entry()]))
  with pytest.raises(ValueError, match="--images=.*is no folder"):
    samples.read_samples(path, tmp_path / "missing")
