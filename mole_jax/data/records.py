"""Records by index: of the data sets that ship with the package, and yours."""

import difflib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

_BUILT = pathlib.Path(__file__).parent / "built"
_VERSION = "1.0.0"
_INFO = "dataset_info.json"  # In every folder that TFDS reads.
# Data set name -> its folder, in the TFDS layout.
EMBEDDED = {
  f"embedded/{domain}": _BUILT / "embedded" / domain / _VERSION
  for domain in ("general", "document", "biomedical")
}
SPLITS = ("train", "validation", "test")

# "from" is a keyword, so this one cannot be written as a class.
Turn = TypedDict("Turn", {"from": str, "value": str, "kind": str})


class Record(TypedDict):
  """One conversation with its encoded images (none, one or several)."""

  id: str
  domain: str
  caption: str
  source: str
  images: list[bytes]
  turns: list[Turn]


class Records(Sequence[Record]):
  """Random access to one split of a data set in the TFDS layout.

  Opened anew in each worker process. TensorFlow is not needed: the set is
  stored as ArrayRecord.
  """

  def __init__(self, directory: str | pathlib.Path, split: str):
    self._directory = str(directory)
    self._split = split
    self._open()

  def _open(self):
    # Half a second that commands without data need not spend.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(self._directory)
    splits = sorted(builder.info.splits)
    if self._split not in splits:
      raise ValueError(
        f"split={self._split!r} is not in {self._directory!r}; "
        f"wanted one of {splits}."
      )
    self._source = builder.as_data_source(self._split)

  def __getstate__(self) -> dict[str, str]:
    return {"_directory": self._directory, "_split": self._split}

  def __setstate__(self, state: dict[str, str]):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    return _to_record(self._source[int(index) % len(self)])

  def __iter__(self) -> Iterator[Record]:
    return (self[i] for i in range(len(self)))


def open_records(name: str, split: str) -> Records:
  """Opens a split of an embedded data set or of a built one.

  Args:
    name: e.g. "embedded/general", or a path, OUT/NAME or OUT/NAME/1.0.0.
    split: e.g. "train".

  Raises:
    ValueError: for a name or split that does not exist, with the right ones.
  """
  if name not in EMBEDDED:
    # "embedded/..." is meant as a name, whatever lies in the current folder.
    if name.startswith("embedded/") or not _is_path(name):
      raise ValueError(_unknown(name))
    return Records(find_built(name), split)
  if not EMBEDDED[name].is_dir():
    raise ValueError(
      f"the embedded data set {name!r} is missing from this installation "
      f"(no {EMBEDDED[name]}); install the package again."
    )
  return Records(EMBEDDED[name], split)


def find_built(path: str | pathlib.Path) -> pathlib.Path:
  """The folder of a finished data set, given it or the one around it.

  Raises ValueError for a folder without one, or with several versions.
  """
  path = pathlib.Path(path)
  if (path / _INFO).is_file():
    return path
  found = sorted(info.parent for info in path.glob(f"*/{_INFO}"))
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(
      f"{path} holds {len(found)} data sets; name one of "
      f"{[str(folder) for folder in found]}."
    )
  if not path.is_dir():
    raise ValueError(
      f"there is no folder {str(path)!r} (seen from {pathlib.Path.cwd()}); "
      "wanted OUT/NAME of what python -m mole_jax.prepare build made, or one "
      f"of {sorted(EMBEDDED)}."
    )
  if path.name.endswith(".partial") or any(path.glob("*.partial")):
    raise ValueError(
      f"the data set in {path} is not finished; run the command that builds "
      "it again, it goes on where it was."
    )
  raise ValueError(
    f"{path} holds no data set (no {_INFO}, no folder of a version with one); "
    "wanted what python -m mole_jax.prepare build made, OUT/NAME."
  )


def _is_path(name: str) -> bool:
  return "/" in name or os.sep in name or pathlib.Path(name).is_dir()


def _unknown(name: str) -> str:
  near = difflib.get_close_matches(name, EMBEDDED, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return (
    f"no data set {name!r}; wanted one of {sorted(EMBEDDED)}, or the path of "
    f"one that python -m mole_jax.prepare build made.{hint}"
  )


def _text(value: bytes | str) -> str:
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _to_record(example: dict[str, Any]) -> Record:
  """A TFDS example (bytes, turns as columns or rows) as plain Python."""
  turns = example["turns"]
  if isinstance(turns, dict):  # TFDS may hand a sequence of dicts as columns.
    turns = [
      dict(zip(turns, row, strict=True))
      for row in zip(*turns.values(), strict=True)
    ]
  return Record(
    id=_text(example["id"]),
    domain=_text(example["domain"]),
    caption=_text(example["caption"]),
    source=_text(example["source"]),
    images=[bytes(image) for image in example["images"]],
    turns=[{key: _text(value) for key, value in t.items()} for t in turns],
  )
