"""Every entry is accounted for, and said what is wrong with it."""

import collections
import html.parser
import io
import json

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mole_jax.data import templates
from mole_jax.data.builders.llava_json import (
  decoding,
  findings,
  pictures,
  validate,
  validate_page,
)
from mole_jax.data.builders.llava_json.samples import Problem
from tests.data.builders.llava_files import entry

MARKED = "<image>\nq"


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
  """good.jpg (30 x 20), wide.png (9 x 3), cut.jpg, empty.jpg."""
  folder = tmp_path_factory.mktemp("pictures")
  PillowImage.new("RGB", (30, 20)).save(folder / "good.jpg")
  PillowImage.new("L", (9, 3)).save(folder / "wide.png")
  data = (folder / "good.jpg").read_bytes()
  (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
  (folder / "empty.jpg").write_bytes(b"")
  return folder


def check(tmp_path, rows, folder, end="]", **options):
  path = tmp_path / "file"
  path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + end)
  problems = []
  found = validate.validate(path, folder, on_problem=problems.append, **options)
  return found, problems


KINDS = {
  "text": (entry(), None),
  "good": (entry(question=MARKED, image="good.jpg"), None),
  "two": (
    entry(question=MARKED * 2, image=["good.jpg", "wide.png"]),
    None,
  ),
  "cut": (entry(question=MARKED, image="cut.jpg"), "image_broken"),
  "empty": (entry(question=MARKED, image="empty.jpg"), "image_broken"),
  "no": (entry(question=MARKED, image="no.jpg"), "image_missing"),
  "answer": (entry(answer=""), "empty_answer"),
  "markers": (entry(question=MARKED), "image_count"),
  "number": (7, "not_an_object"),
}


@hypothesis.given(
  names=st.lists(st.sampled_from([*KINDS]), min_size=1, max_size=60),
  is_cut=st.booleans(),
)
@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_read_is_used_and_skipped_by_reason_and_failed(
  tmp_path, pictures_folder, names, is_cut
):
  rows = [KINDS[name][0] for name in names]
  rows = [
    row | {"id": str(i)} if isinstance(row, dict) else row
    for i, row in enumerate(rows)
  ]
  end = "" if is_cut else "]"
  found, problems = check(tmp_path, rows, pictures_folder, end)
  want = collections.Counter(KINDS[name][1] for name in names)
  assert found.num_used == want.pop(None, 0)
  assert found.skipped == want
  assert found.failed == ({"truncated": 1} if is_cut else {})
  assert found.num_read == len(names) + is_cut
  assert found.has_problems == bool(want or is_cut)
  bad = [i for i, name in enumerate(names, 1) if KINDS[name][1]]
  lines = [problem.line for problem in problems]
  assert lines == bad + [len(names)] * is_cut
  used = [rows[i] for i, name in enumerate(names) if not KINDS[name][1]]
  assert found.num_images == sum("image" in row for row in used) + sum(
    isinstance(row.get("image"), list) for row in used
  )


def test_a_file_is_decoded_once_and_told_for_each_entry(
  tmp_path, pictures_folder, monkeypatch
):
  count = 3 * decoding.WINDOW
  rows = [
    entry(str(i), MARKED, image=("good.jpg", "cut.jpg")[i % 2])
    for i in range(count)
  ]
  loaded = []
  load = pictures.load_image
  monkeypatch.setattr(
    decoding, "load_image", lambda image: loaded.append(image) or load(image)
  )
  # So small a memory that both files are forgotten in between.
  monkeypatch.setattr(decoding, "_RECENT", 1)
  found, problems = check(tmp_path, rows, pictures_folder)
  assert len(loaded) == 2
  assert found.num_decoded == 1
  assert len(problems) == count // 2
  assert found.skipped == {"image_broken": count // 2}


@pytest.mark.parametrize(("limit", "want"), [(None, 2), (1, 1), (0, 0)])
def test_as_many_images_are_decoded_as_asked(
  tmp_path, pictures_folder, limit, want
):
  rows = [
    entry("1", MARKED, image="good.jpg"),
    entry("2", MARKED, image="good.jpg"),
    entry("3", MARKED, image="wide.png"),
  ]
  found, problems = check(tmp_path, rows, pictures_folder, num_decoded=limit)
  assert found.num_decoded == want
  assert found.num_used == 3 and not problems
  sizes = {30: 1, 9: 1}
  assert found.sides == dict(list(sizes.items())[:want])


def test_lengths_are_those_of_training(
  tmp_path, pictures_folder, toy_tokenizer
):
  rows = [
    entry("1", "ab", "xyz"),
    entry("2", "<image>\nab", "xyz", image="good.jpg"),
    entry("3", "ab", "xyz", system="s"),
  ]
  # One token a character, a space before each text; by hand:
  # BOS, " ", "USER: ab ASSISTANT:", " xyz", EOS.
  roles = templates.RoleTemplate(user="USER: ", assistant=" ASSISTANT:")
  measure = validate.measure_tokens(toy_tokenizer, roles, 10)
  found, _ = check(tmp_path, rows, pictures_folder, measure=measure)
  plain = 1 + 1 + len("USER: ab ASSISTANT:") + 4 + 1
  # The image's ten, a newline, and the text in two pieces.
  image = plain + 10 + 2
  assert found.lengths == {plain: 1, image: 1, plain + 2: 1}
  assert found.length_unit == "tokens"


def test_vicunas_words_come_before_a_chat_without_system(
  tmp_path, toy_tokenizer
):
  def length(template):
    measure = validate.measure_tokens(toy_tokenizer, template, 1)
    found, _ = check(tmp_path, [entry()], None, measure=measure)
    return next(iter(found.lengths))

  bare = templates.RoleTemplate("USER: ", " ASSISTANT:")
  more = length(templates.VICUNA) - length(bare)
  # Equal templates are equal: the words belong to the object VICUNA.
  assert more == len(validate.conversation.VICUNA_SYSTEM) + 1


@hypothesis.given(
  st.dictionaries(st.integers(0, 5000), st.integers(1, 9), min_size=1)
)
def test_histograms_and_quantiles_count_everything(counts):
  bins = findings.histogram(counts)
  assert sum(count for _, _, count in bins) == sum(counts.values())
  for low, high, count in bins:
    inside = (n for value, n in counts.items() if low <= value <= high)
    assert sum(inside) == count
  for (_, high, _), (low, _, _) in zip(bins, bins[1:], strict=False):
    assert low == high + 1
  values = sorted(v for v, n in counts.items() for _ in range(n))
  median, largest = findings.quantiles(counts, (0.5, 1.0))
  assert median == values[(len(values) - 1) // 2]
  assert largest == values[-1]


class _Rows(html.parser.HTMLParser):
  """Tags, and the text of the last table's rows."""

  def __init__(self):
    super().__init__()
    self.tags, self.rows, self.links = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k in ("src", "href")]
    if tag == "table":
      self.rows = []
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_data(self, data):
    if self.rows and self.rows[-1]:
      self.rows[-1][-1] += data.strip("\n")


def test_the_page_holds_every_problem_and_none_of_their_markup(tmp_path):
  found = findings.Findings()
  path = tmp_path / "page.html"
  page = validate_page.Page(path)
  evil = "<script>alert(1)</script>&lt;\"'\ud800"
  for line in range(100):
    problem = Problem("reason", line, evil, f"{line} {evil}", False)
    found.add_problem(problem)
    page.add(problem)
  found.same_ids.append(evil)
  assert not path.exists()  # Nothing half done under its name.
  page.write(evil, found, evil)
  parser = _Rows()
  parser.feed(path.read_text("utf-8"))
  assert "script" not in parser.tags and not parser.links
  shown = evil.replace("\ud800", "\\ud800")
  assert parser.rows[1:] == [
    [str(i), "reason", f"{i} {shown}"] for i in range(100)
  ]
  assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path):
  for path in (tmp_path, tmp_path / "missing" / "page.html"):
    with pytest.raises(ValueError, match="--report="):
      validate_page.Page(path)


def test_the_page_shows_a_bar_for_every_bin(tmp_path, pictures_folder):
  rows = [entry("1"), entry("2", MARKED, image="good.jpg")]
  found, _ = check(tmp_path, rows, pictures_folder)
  page = validate_page.Page(tmp_path / "page.html")
  page.write("title", found, "how")
  text = (tmp_path / "page.html").read_text()
  bins = findings.histogram(found.lengths) + findings.histogram(found.sides)
  assert text.count('<i style="width:') == len(bins)
  assert "None: every entry can be used." in text


def test_a_picture_in_parquet_is_decoded(tmp_path):
  from tests.data.builders import llava_files

  buffer = io.BytesIO()
  PillowImage.new("RGB", (5, 4)).save(buffer, "PNG")
  whole = buffer.getvalue()
  rows = [
    entry("1", MARKED, image={"bytes": whole, "path": "a.png"}),
    entry("2", MARKED, image={"bytes": whole[:-30], "path": "b.png"}),
  ]
  path = llava_files.write(tmp_path / "file", rows, "parquet")
  problems = []
  found = validate.validate(path, None, on_problem=problems.append)
  assert found.sides == {5: 1}
  (problem,) = problems
  assert problem.message.startswith("file row 2, id '2':")
