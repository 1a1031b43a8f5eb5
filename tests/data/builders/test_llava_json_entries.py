"""Every form gives the same entries; nothing is lost in silence."""

import gzip
import json
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from mole_jax.data.builders.llava_json import (
  entries,
  json_array,
  json_lines,
  samples,
)
from tests.data.builders import llava_files
from tests.data.builders.llava_files import entry

_WORDS = st.text(
  st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=9
)
_ANSWERS = _WORDS.filter(str.strip)
_ENTRIES = st.lists(
  st.builds(entry, _WORDS, _WORDS, _ANSWERS), min_size=1, max_size=4
)
GOOD = json.dumps(entry("good")).encode()


def read(path, **options):
  return list(samples.read_samples(path, None, **options))


def split(items):
  """Samples, and the problems, which end the list if they are fatal."""
  found = [x for x in items if isinstance(x, samples.Sample)]
  problems = [x for x in items if isinstance(x, samples.Problem)]
  assert len(found) + len(problems) == len(items)
  assert not any(problem.is_fatal for problem in problems[:-1])
  return found, problems


def meaning(items):
  return [(x.id, x.turns, x.images, x.source) for x in split(items)[0]]


@hypothesis.given(rows=_ENTRIES)
def test_every_form_gives_the_same_samples(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("forms") / "file"
  for number, row in enumerate(rows):
    row["id"] += f"-{number}"
  want = [
    (
      row["id"],
      [turn | {"kind": ""} for turn in row["conversations"]],
      [],
      row["id"],
    )
    for row in rows
  ]
  for form in (*llava_files.FORMS, "parquet"):
    assert meaning(read(llava_files.write(path, rows, form))) == want, form


def test_a_place_is_the_line_where_the_entry_begins(tmp_path):
  rows = [entry(f"{i}") for i in range(3)]
  step = len(json.dumps(rows[0], indent=2).splitlines())
  lines = {
    "array": [1, 1, 1],
    "indented array": [2, 2 + step, 2 + 2 * step],
    "array after a BOM": [2, 2, 2],
    "lines": [1, 2, 3],
    "lines of Windows": [1, 3, 5],
    "parquet": [1, 2, 3],
  }
  for form, want in lines.items():
    items = read(llava_files.write(tmp_path / "file", rows, form))
    assert [item.line for item in items] == want, form


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_buffer_can_end_anywhere(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_array, "_CHUNK", chunk)
  monkeypatch.setattr(json_lines, "_CHUNK", chunk)
  row = entry("ä", 'q"\\\U0001f600\n', "€ \U0001f600 ]}", n=[1, -2.5e-7, True])
  for form in ("array", "indented array", "lines"):
    # One time with characters as they are, one time as escapes.
    path = llava_files.write(tmp_path / "file", [row, row | {"id": 2}], form)
    (first, second), problems = split(read(path))
    assert not problems
    assert first.turns == second.turns
    assert first.turns[1]["value"] == "€ \U0001f600 ]}"
    assert (first.id, second.id) == ("ä", "2")


@pytest.mark.parametrize("form", [*llava_files.FORMS, "parquet"])
def test_the_bytes_told_add_up_to_the_size(tmp_path, form):
  path = llava_files.write(
    tmp_path / "f", [entry(str(i)) for i in range(99)], form
  )
  counts = []
  read(path, on_bytes=counts.append)
  assert sum(counts) == path.stat().st_size


@pytest.mark.parametrize("form", [*llava_files.FORMS, "parquet"])
def test_a_file_cut_at_any_byte_is_told_and_loses_only_its_end(tmp_path, form):
  rows = [entry(f"id {i}", answer="ä" * i + "]") for i in range(4)]
  path = llava_files.write(tmp_path / "file", rows, form)
  whole, data = meaning(read(path)), path.read_bytes()
  assert len(whole) == 4
  # A line less is a shorter file, as good as any.
  ends = {len(data)}
  if "lines" in form and "gzip" not in form:
    at = [i for i in range(len(data)) if data[i : i + 1] in b"\r\n"]
    ends |= {i for i in at} | {i + 1 for i in at}
  if form == "array after a BOM":
    ends.add(len(data) - 1)  # The line's end after the ].
  for size in range(0, len(data), 5 if form == "parquet" else 1):
    path.write_bytes(data[:size])
    found, problems = split(read(path))
    assert meaning(found) == whole[: len(found)], size
    if size not in ends:
      assert problems, size
      assert len(problems) == 1, size


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=300)
def test_no_flipped_byte_ends_in_a_crash(tmp_path_factory, data):
  path = tmp_path_factory.mktemp("flipped") / "file"
  form = data.draw(st.sampled_from([*llava_files.FORMS, "parquet"]))
  rows = [entry(f"id {i}", answer="ä" * i + "]") for i in range(3)]
  content = bytearray(llava_files.write(path, rows, form).read_bytes())
  content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(
    st.integers(1, 255)
  )
  path.write_bytes(content)
  found, problems = split(read(path))
  is_fatal = bool(problems) and problems[-1].is_fatal
  assert is_fatal or len(found) + len(problems) >= 3


@hypothesis.given(st.binary(max_size=40))
def test_no_file_ends_in_a_crash(tmp_path_factory, content):
  path = tmp_path_factory.mktemp("any") / "file"
  path.write_bytes(content)
  assert split(read(path))[1]


def deep(levels):
  return b'{"id": ' + b"[" * levels + b"]" * levels + b"}"


HUGE = b'{"id": "' + b"x" * 50_000_000 + b'"}'

# Name: (the second of three entries, its reason). Costs that entry only.
ONE = {
  "nan": (GOOD.replace(b'"good"', b"NaN"), "nan"),
  "infinity": (GOOD.replace(b'"good"', b"-Infinity"), "nan"),
  "key twice": (GOOD.replace(b"{", b'{"id": "b", ', 1), "duplicate_key"),
  "key twice inside": (
    GOOD.replace(b'{"from"', b'{"value": 1, "from"', 1),
    "duplicate_key",
  ),
  "latin-1": (GOOD.replace(b'"x"', b'"\xe4"'), "bad_utf8"),
  "bytes in a key": (GOOD.replace(b"{", b'{"\xff": 1, ', 1), "bad_utf8"),
  "surrogate as bytes": (GOOD.replace(b'"x"', b'"\xed\xa0\x80"'), "bad_utf8"),
  "half a pair": (GOOD.replace(b'"x"', b'"\\ud83d"'), "lone_surrogate"),
  "half in the id": (GOOD.replace(b"good", b"\\udc80"), "lone_surrogate"),
  "number": (b"12", "not_an_object"),
  "text": (b'"x"', "not_an_object"),
  "null": (b"null", "not_an_object"),
  "array": (b"[{}]", "not_an_object"),
}
# Costs the line, in lines; in an array nobody knows where it ends.
REST = {
  "cut": (GOOD[:-1], "bad_json"),
  "no colon": (GOOD.replace(b'"id":', b'"id"'), "bad_json"),
  "no quote": (GOOD.replace(b'"good"', b'"good'), "bad_json"),
  "single quotes": (GOOD.replace(b'"', b"'"), "bad_json"),
  "bare control character": (GOOD.replace(b'"x"', b'"\x01"'), "bad_json"),
  "trailing comma": (GOOD.replace(b"]", b",]"), "bad_json"),
  "bad escape": (GOOD.replace(b'"x"', b'"\\x"'), "bad_json"),
  "digits": (GOOD.replace(b'"good"', b"1" * 5000), "bad_json"),
  "deep": (deep(100_000), "too_deep"),
  "huge": (HUGE, "entry_too_long"),
}


@pytest.mark.parametrize("name", ONE)
def test_an_entry_with_a_sure_end_costs_itself_only(tmp_path, name):
  bad, reason = ONE[name]
  rows = [json.dumps(entry("1")).encode(), bad, json.dumps(entry("3")).encode()]
  path = tmp_path / "file"
  for text in (b"[" + b",\n".join(rows) + b"]", b"\n".join(rows)):
    path.write_bytes(text)
    found, (problem,) = split(read(path))
    assert [sample.id for sample in found] == ["1", "3"]
    assert (problem.reason, problem.line) == (reason, 2)
    assert problem.message.startswith("file line 2, entry 2")
    assert problem.message.isprintable()


@pytest.mark.parametrize("name", REST)
def test_a_bad_line_costs_itself_only(tmp_path, name):
  bad, reason = REST[name]
  rows = [json.dumps(entry("1")).encode(), bad, json.dumps(entry("3")).encode()]
  path = tmp_path / "file"
  path.write_bytes(b"\n".join(rows))
  found, (problem,) = split(read(path))
  assert [sample.id for sample in found] == ["1", "3"]
  assert (problem.reason, problem.line) == (reason, 2)
  assert not problem.is_fatal
  assert len(problem.message) < 400 and problem.message.isprintable()


@pytest.mark.parametrize("name", REST)
def test_broken_grammar_in_an_array_ends_it_at_the_line(tmp_path, name):
  bad, reason = REST[name]
  rows = [json.dumps(entry("1")).encode(), bad, json.dumps(entry("3")).encode()]
  path = tmp_path / "file"
  path.write_bytes(b"[" + b",\n".join(rows) + b"]")
  found, (problem,) = split(read(path))
  assert [sample.id for sample in found] == ["1"]
  assert problem.is_fatal
  assert problem.reason == reason
  assert problem.line in (2, 3)  # An entry that is cut ends on the next one.
  assert len(problem.message) < 400 and problem.message.isprintable()


@pytest.mark.parametrize(
  "name", [name for name, (_, reason) in REST.items() if reason == "bad_json"]
)
@pytest.mark.parametrize("end", [b"]", b"\n]\n"])
def test_a_mistake_in_the_last_entry_is_not_taken_for_a_cut_file(
  tmp_path, name, end
):
  path = tmp_path / "file"
  path.write_bytes(b"[" + REST[name][0] + end)
  _, (problem,) = split(read(path))
  assert problem.is_fatal
  assert problem.reason == "bad_json"


@pytest.mark.parametrize(
  ("text", "way_out"),
  [
    ('{"id": "a",}', "remove the comma before the }"),
    ('{"id": ["a", ]}', "remove the comma before the ]"),
    ("{'id': 1}", "write \" for each '"),
    ('{"id": 1 "image": 2}', "put the comma or the closing bracket"),
  ],
)
def test_what_people_mistype_is_named_with_the_way_out(tmp_path, text, way_out):
  path = tmp_path / "file"
  for content in (text + "\n", f"[{text}]"):
    path.write_text(content)
    _, (problem,) = split(read(path))
    assert way_out in problem.message


WHOLE = {
  "empty": (b"", "empty"),
  "blank": (b" \n\n", "empty"),
  "empty array": (b"[ ]", "empty"),
  "trailing comma": (b"[\n" + GOOD + b",\n]", "bad_json"),
  "no comma": (b"[\n" + GOOD + b"\n" + GOOD + b"]", "bad_json"),
  "no end": (b"[\n" + GOOD, "truncated"),
  "no quote": (b'[{"id": "x}]', "truncated"),
  "two arrays": (b"[" + GOOD + b"]\n[" + GOOD + b"]", "after_the_end"),
  "text": (b'"a"', "wrong_top_level"),
  "number": (b"12", "wrong_top_level"),
  "csv": (b"id,image\n", "wrong_top_level"),
  "indented object": (
    json.dumps({"data": [entry()]}, indent=1).encode(),
    "wrong_top_level",
  ),
  "zip": (b"PK\x03\x04abc", "unknown_format"),
  "zstd": (b"\x28\xb5\x2f\xfdabc", "unknown_format"),
  "utf-16": ("[]".encode("utf-16"), "unknown_format"),
  "gzip twice": (gzip.compress(gzip.compress(GOOD)), "unknown_format"),
  "parquet in gzip": (gzip.compress(b"PAR1"), "unknown_format"),
  "no parquet": (b"PAR1abc", "unreadable_file"),
  "gzip of bad sum": (gzip.compress(GOOD)[:-8] + bytes(8), "unreadable_file"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_wrong_file_ends_in_one_fatal_problem(tmp_path, name):
  content, reason = WHOLE[name]
  path = tmp_path / "file"
  path.write_bytes(content)
  _, (problem,) = split(read(path))
  assert problem.is_fatal
  assert problem.reason == reason
  assert problem.message.startswith(f"file {'row' * ('no par' in name)}"[:5])


def test_one_object_on_one_line_names_what_it_holds(tmp_path):
  path = tmp_path / "file"
  path.write_text(json.dumps({"data": [entry()]}))
  (problem,) = read(path)
  assert problem.reason == "no_turns" and "'data'" in problem.message


@pytest.mark.parametrize("form", ["array", "lines", "lines in gzip"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, form):
  monkeypatch.setattr(json_array, "_CHUNK", 2**14)
  monkeypatch.setattr(entries, "_BUFFER", 2**14)
  peaks = []
  for count in (500, 4000):
    rows = [entry(str(i), answer="word " * 200) for i in range(count)]
    path = llava_files.write(tmp_path / "file", rows, form)
    del rows
    tracemalloc.start()
    for _ in entries.read_entries(path):
      pass
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # The files have 0.6 and 4.5 MB.
  assert peaks[1] < peaks[0] + 500_000


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  path = llava_files.write(tmp_path / "file", [entry()], "parquet")
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"pip install 'mole_jax\[data\]'"):
    read(path)


def test_a_parquet_row_that_is_no_utf8_costs_itself_only(tmp_path):
  import pyarrow
  from pyarrow import parquet

  rows = [entry(str(i)) for i in range(3)]
  table = pyarrow.Table.from_pylist(rows)
  bad = pyarrow.array([b"1", b"\xff", b"3"], pyarrow.binary()).view(
    pyarrow.string()
  )
  parquet.write_table(table.set_column(0, "id", bad), tmp_path / "file")
  found, (problem,) = split(read(tmp_path / "file"))
  assert [sample.id for sample in found] == ["1", "3"]
  assert (problem.reason, problem.line) == ("bad_utf8", 2)
  assert problem.message.startswith("file row 2:")


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path, what):
  path = tmp_path if what == "folder" else tmp_path / "missing"
  with pytest.raises(ValueError, match="--json="):
    samples.read_samples(path, None)
