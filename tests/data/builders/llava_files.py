"""Small LLaVA files in every form that is read."""

import gzip
import json

import pyarrow
from pyarrow import parquet


def entry(id="a", question="q", answer="x", image=None, **more):
  """An entry with one question; the marker is up to the question."""
  turns = [
    {"from": "human", "value": question},
    {"from": "gpt", "value": answer},
  ]
  made = {"id": id, "conversations": turns, **more}
  return made if image is None else made | {"image": image}


def _lines(entries, end="\n"):
  return "".join(json.dumps(e) + end for e in entries).encode()


def _array(entries):
  return json.dumps(entries, ensure_ascii=False).encode()


# Form -> entries to the bytes of a file; parquet has a function of its own.
FORMS = {
  "array": _array,
  "indented array": lambda e: json.dumps(e, indent=2).encode(),
  "array after a BOM": lambda e: b"\xef\xbb\xbf\n " + _array(e) + b"\n",
  "lines": _lines,
  "lines without the last end": lambda e: _lines(e)[:-1],
  "lines of Windows": lambda e: _lines(e, "\r\n\r\n"),
  "array in gzip": lambda e: gzip.compress(_array(e), mtime=0),
  "lines in gzip": lambda e: gzip.compress(_lines(e), mtime=0),
}


def write_parquet(path, entries):
  """A row an entry, absent keys null."""
  keys = dict.fromkeys(key for row in entries for key in row)
  columns = {key: [row.get(key) for row in entries] for key in keys}
  parquet.write_table(pyarrow.table(columns), path)


def write(path, entries, form):
  """Writes the entries in a form, "parquet" included; returns the path."""
  if form == "parquet":
    write_parquet(path, entries)
  else:
    path.write_bytes(FORMS[form](entries))
  return path
