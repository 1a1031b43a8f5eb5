"""PyTorch's checkpoint files, opened in a process of their own when asked to.

A pickle can run code. This process never opens one: a program of `with_torch`
turns it into safetensors, which are read from there.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import mole_jax
from mole_jax.interop.tensors import CheckpointError, Folder

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
ADAPTER_FILE = "adapter_model.bin"
PROGRAM = "mole_jax.interop.with_torch.unpickle"
# The program's exit code for a file that cannot be used. It is written again
# here since nothing imports the program; a test compares the two.
REFUSED = 3
NUM_LINES = 5  # Of what it said before it failed.


def find_pickles(folder: pathlib.Path) -> list[pathlib.Path]:
  """PyTorch's files in a folder of Hugging Face; [] if there are none.

  pytorch_model.bin, or the shards of its index, or adapter_model.bin. Raises
  CheckpointError where the index is broken or names a file that is not there.
  """
  if (folder / SINGLE_FILE).exists():
    return [folder / SINGLE_FILE]
  if (folder / INDEX_FILE).exists():
    return _shards(folder / INDEX_FILE)
  if (folder / ADAPTER_FILE).exists():
    return [folder / ADAPTER_FILE]
  return []


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    outside = [name for name in names if pathlib.PurePath(name).name != name]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(
      f"{index} is no index of shards: {type(error).__name__} {error}; wanted "
      "JSON with a weight_map."
    ) from None
  if outside:
    raise CheckpointError(
      f"{index} names files outside its folder: {outside[:3]}."
    )
  absent = [name for name in names if not (index.parent / name).is_file()]
  if absent or not names:
    raise CheckpointError(
      f"{index} names shards that are not there: {', '.join(absent) or 'none'}"
      "; download them."
    )
  return [index.parent / name for name in names]


@contextlib.contextmanager
def unpickled(
  paths: Sequence[pathlib.Path], allow: bool, scratch: pathlib.Path
) -> Iterator[Folder]:
  """The tensors of PyTorch's files, which together are one checkpoint.

  They are written as safetensors into a new folder in `scratch`, which takes
  as much room as the files, and is removed afterwards (unless this process is
  killed with SIGKILL). A tensor with two names is there under both. Raises
  CheckpointError where it is not allowed, and for a file that cannot be used.
  """
  files = ", ".join(map(str, paths))
  if not allow:
    raise CheckpointError(
      f"{files}: a PyTorch pickle, which was not opened, for a pickle can run "
      "any code. Take the model's safetensors; pass --allow-pickle only for "
      "files from a source that you trust."
    )
  absent = [str(path) for path in paths if not path.is_file()]
  if absent or not paths:
    raise CheckpointError(f"no such file: {', '.join(absent) or 'none named'}.")
  with tempfile.TemporaryDirectory(prefix="unpickled-", dir=scratch) as out:
    program = [sys.executable, "-m", PROGRAM]
    _run([*program, "--out", out, "--", *map(str, paths)], files)
    yield Folder(out)


def _run(command: Sequence[str], files: str) -> None:
  """Runs the program; CheckpointError with its message where it fails."""
  # It must find this package however this process found it.
  package = str(pathlib.Path(mole_jax.__file__).parents[1])
  paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
  done = subprocess.run(
    command,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    encoding="utf-8",
    errors="replace",
    env=os.environ
    | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
  )
  if done.returncode == REFUSED:
    raise CheckpointError(done.stdout.strip())
  if done.returncode != 0:
    said = done.stderr.strip().splitlines()[-NUM_LINES:]
    raise CheckpointError(
      f"{files}: PyTorch failed with exit code {done.returncode} when it read "
      "this; the file is damaged or an attack, or memory or disk ran out. It "
      "said:\n  " + "\n  ".join(said or ["nothing"])
    )
