"""The real tables behind the charts: which columns, called what, which split.

A column's title is one word out of TITLES that names what it measures; a
title stands for columns of several tables, so that reading it in a chart of a
table never seen is a fair question.
"""

import collections
import csv
import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from mole_jax.data.builders.embedded.sample import Provenance

TITLES = ("price", "count", "heat", "weight", "size", "age", "power")
_VEGA = "vega-datasets"
_SKLEARN = "scikit-learn"
_REQUIREMENTS = {_VEGA: "vega-datasets==0.9.0", _SKLEARN: "scikit-learn==1.7.2"}
_FOLDERS = {_VEGA: "vega_datasets/_data", _SKLEARN: "sklearn/datasets/data"}


@dataclasses.dataclass(frozen=True)
class Column:
  """Numbers of one column, in the table's order; `title` is one of TITLES."""

  table: str
  split: str
  title: str
  values: Float64[np.ndarray, " N"]
  provenance: tuple[Provenance, ...]


Read = Callable[[list[list[str]]], Sequence[float]]


def _number(name: str) -> Read:
  """The numbers of a named column; rows without one are left out."""

  def read(rows):
    index = rows[0].index(name)
    return [float(row[index]) for row in rows[1:] if row[index] != ""]

  return read


def _nth(index: int) -> Read:
  """The numbers of a column by place, in a file whose header says sizes."""
  return lambda rows: [float(row[index]) for row in rows[1:]]


def _counts(name: str) -> Read:
  """How many rows share each value of a named column, commonest first."""

  def read(rows):
    index = rows[0].index(name)
    counted = collections.Counter(row[index] for row in rows[1:])
    return [count for _, count in sorted(counted.items()) if count > 1]

  return read


# Table, split, package, file, its columns by title. Iris is in both packages
# and read from one of them only.
_TABLES = (
  (
    "cars",
    "train",
    _VEGA,
    "cars.json",
    {
      "power": (_number("Horsepower"),),
      "weight": (_number("Weight_in_lbs"),),
      "size": (_number("Displacement"),),
    },
  ),
  ("airports", "train", _VEGA, "airports.csv", {"count": (_counts("state"),)}),
  ("stocks", "train", _VEGA, "stocks.csv", {"price": (_number("price"),)}),
  (
    "seattle-temps",
    "train",
    _VEGA,
    "seattle-temps.csv",
    {
      "heat": (_number("temp"),),
    },
  ),
  ("barley", "train", _VEGA, "barley.json", {"weight": (_number("yield"),)}),
  (
    "crimea",
    "train",
    _VEGA,
    "crimea.json",
    {
      "count": (_number("disease"), _number("other")),
    },
  ),
  (
    "iris",
    "train",
    _VEGA,
    "iris.json",
    {
      "size": (_number("sepalWidth"), _number("petalLength")),
    },
  ),
  (
    "us-employment",
    "train",
    _VEGA,
    "us-employment.csv",
    {
      "count": (_number("private"), _number("government")),
    },
  ),
  ("driving", "train", _VEGA, "driving.json", {"price": (_number("gas"),)}),
  (
    "breast-cancer",
    "train",
    _SKLEARN,
    "breast_cancer.csv",
    {
      "size": (_nth(0), _nth(2)),
    },
  ),
  ("wine", "train", _SKLEARN, "wine_data.csv", {"weight": (_nth(4),)}),
  (
    "diabetes",
    "train",
    _SKLEARN,
    "diabetes_data_raw.csv.gz",
    {
      "age": (lambda rows: [float(row[0]) for row in rows],),
    },
  ),
  ("ohlc", "validation", _VEGA, "ohlc.json", {"price": (_number("close"),)}),
  (
    "iowa",
    "validation",
    _VEGA,
    "iowa-electricity.csv",
    {
      "power": (_number("net_generation"),),
    },
  ),
  (
    "linnerud-exercise",
    "validation",
    _SKLEARN,
    "linnerud_exercise.csv",
    {
      "count": (_nth(0), _nth(1)),
    },
  ),
  (
    "seattle-weather",
    "validation",
    _VEGA,
    "seattle-weather.csv",
    {
      "heat": (_number("temp_max"),),
    },
  ),
  ("sf-temps", "test", _VEGA, "sf-temps.csv", {"heat": (_number("temp"),)}),
  ("wheat", "test", _VEGA, "wheat.json", {"price": (_number("wheat"),)}),
  (
    "la-riots",
    "test",
    _VEGA,
    "la-riots.csv",
    {
      "age": (_number("age"),),
      "count": (_counts("neighborhood"),),
    },
  ),
  (
    "linnerud-physiology",
    "test",
    _SKLEARN,
    "linnerud_physiological.csv",
    {
      "weight": (_nth(0),),
      "size": (_nth(1),),
    },
  ),
)


def _rows(path: pathlib.Path) -> list[list[str]]:
  """A CSV (also zipped or with blanks) or JSON file as rows of text."""
  if path.suffix == ".json":
    records = json.loads(path.read_text())
    names = list(dict.fromkeys(name for record in records for name in record))
    cell = lambda value: "" if value is None else str(value)
    return [names] + [
      [cell(record.get(name)) for name in names] for record in records
    ]
  data = path.read_bytes()
  text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
  if "," not in text:
    return [line.split() for line in text.splitlines() if line.strip()]
  return [row for row in csv.reader(text.splitlines()) if row]


def load_columns(packages) -> list[Column]:
  """Every column of every table, in the order written here."""
  columns = []
  for table, split, package, name, titles in _TABLES:
    folder = packages.pypi(_REQUIREMENTS[package])
    path = f"{_FOLDERS[package]}/{name}"
    rows = _rows(folder / path)
    origin = (packages.provenance(package, path),)
    for title, reads in titles.items():
      for read in reads:
        values = np.array(read(rows), np.float64)
        columns.append(Column(table, split, title, values, origin))
  return columns
