"""PyTorch's checkpoint files to safetensors, in a process of its own.

python -m mole_jax.interop.with_torch.unpickle SRC... --out DIR

Nothing but tensors is unpickled. What a file may still do to PyTorch, it does
to this process, whose only work is to write DIR. Exit code 0 when all went
well; REFUSED with one message on standard output for a file that cannot be
used; anything else is a failure of the program.
"""

import argparse
import pathlib
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from mole_jax.interop.tensors import CheckpointError, ShardWriter

REFUSED = 3
MAX_SHARD_BYTES = 10**9
# Below it `weights_only` can be led to run code: CVE-2025-32434 (fixed in 2.6)
# and CVE-2026-24747 (fixed in 2.10).
TORCH = (2, 10)
# Where training programs put the state dict among other things.
WRAPPERS = ("state_dict", "model", "module")
DTYPES = (
  "float64",
  "float32",
  "float16",
  "bfloat16",
  "int64",
  "int32",
  "uint8",
  "bool",
)
MAX_LISTED = 10
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("sources", nargs="+", type=pathlib.Path)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  arguments = parser.parse_args(argv)
  try:
    unpickle(arguments.sources, arguments.out)
  except CheckpointError as error:
    print(error)
    return REFUSED
  return 0


def unpickle(sources: Sequence[pathlib.Path], out: pathlib.Path) -> None:
  """Writes the tensors of PyTorch's files into the folder `out`.

  A tensor with two names is written under both. Raises CheckpointError where
  a file is damaged, holds anything else that would have to be unpickled, or
  something in its state dict is no tensor.
  """
  torch = import_torch()
  found: dict[str, pathlib.Path] = {}
  with ShardWriter(out, MAX_SHARD_BYTES) as writer:
    for path in sources:
      state = find_state(torch, path, load(torch, path))
      check_state(torch, path, state)
      size = sum(tensor.nbytes for tensor in state.values())
      free = shutil.disk_usage(out).free
      if size > free:
        raise CheckpointError(
          f"{path} holds {size:,} bytes of tensors; {out} has room for "
          f"{free:,}. Make room, or convert on another disk."
        )
      for name, tensor in state.items():
        if name in found:
          raise CheckpointError(
            f"tensor {name!r} is in both {found[name]} and {path}; keep one."
          )
        found[name] = path
        writer.add(name, to_numpy(torch, tensor))


def import_torch() -> ModuleType:
  """PyTorch; CheckpointError where it is absent or too old to be safe."""
  wanted = ".".join(map(str, TORCH))
  try:
    import torch
  except ImportError as error:
    raise CheckpointError(
      f"a PyTorch pickle is opened with PyTorch {wanted} or newer, which is "
      f"not installed ({error}); run: pip install 'torch>={wanted}'"
    ) from None
  version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
  if version < TORCH:
    raise CheckpointError(
      f"a PyTorch pickle is opened with PyTorch {wanted} or newer (in older "
      f"ones it can run code); {torch.__version__} is installed. Run: pip "
      f"install 'torch>={wanted}'"
    )
  return torch


def load(torch: ModuleType, path: pathlib.Path) -> Any:
  """What a file holds, tensors mapped from it where its format allows."""
  with path.open("rb") as opened:
    magic = opened.read(len(ZIP))
  if magic == ZIP:
    check_archive(path)
  elif not magic.startswith(PICKLE):
    raise CheckpointError(
      f"{path} begins with {magic!r} and is no checkpoint of PyTorch, which "
      f"begins with {ZIP!r} or {PICKLE!r}; download it again, or name what it "
      "is."
    )
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return torch.load(
        path, map_location="cpu", mmap=magic == ZIP, weights_only=True
      )
  # A damaged file raises anything: KeyError, EOFError, RuntimeError, ...
  except Exception as error:
    raise CheckpointError(describe(path, error)) from None


def check_archive(path: pathlib.Path) -> None:
  """Raises CheckpointError where a zip archive cannot be mapped, or is damaged.

  PyTorch checks no sums when it maps a file.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      entries = archive.infolist()
      if any(e.filename.endswith("/constants.pkl") for e in entries):
        raise CheckpointError(
          f"{path} is a TorchScript archive, a program; wanted a state dict. "
          "Save its state_dict() as safetensors."
        )
      if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise CheckpointError(
          f"{path} is a compressed archive; PyTorch writes none. Unpack it, "
          "or download the original."
        )
      damaged = archive.testzip()
  except CheckpointError:
    raise
  # RuntimeError: encrypted, or an archive of a newer kind.
  except (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
  ) as error:
    raise CheckpointError(
      f"{path} ({path.stat().st_size:,} bytes) is no whole checkpoint of "
      f"PyTorch: {error}; download or copy it again."
    ) from None
  if damaged is not None:
    raise CheckpointError(
      f"{path}: {damaged} is not what was saved (its CRC-32 differs); download "
      "or copy it again."
    )


def describe(path: pathlib.Path, error: Exception) -> str:
  """A message; PyTorch's own advise to switch the protection off."""
  asked_for = re.search(r"GLOBAL (\S+)", str(error))
  if asked_for:
    return (
      f"{path} is not only tensors: it asks for {asked_for[1]!r}, which was "
      "not run. A harmless file can hold such things beside its tensors, and "
      "an attack looks the same; where you trust it, load it in PyTorch and "
      "save its state_dict() as safetensors."
    )
  if isinstance(error, pickle.UnpicklingError):
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    detail = reason[1] if reason else type(error).__name__
  else:
    first_line = "".join(str(error).splitlines()[:1])
    detail = f"{type(error).__name__} {first_line}".strip()
  return (
    f"{path} ({path.stat().st_size:,} bytes) is no whole state dict of "
    f"tensors: {detail}; download or copy it again."
  )


def find_state(
  torch: ModuleType, path: pathlib.Path, loaded: Any
) -> dict[str, Any]:
  """The state dict in what was loaded; what stands beside it is left out."""
  if not isinstance(loaded, dict):
    raise CheckpointError(
      f"{path} holds a {type(loaded).__name__}; wanted a state dict, a "
      "dictionary of tensors."
    )
  wrapped = [
    key
    for key in WRAPPERS
    if isinstance(loaded.get(key), dict)
    and any(isinstance(v, torch.Tensor) for v in loaded[key].values())
  ]
  if len(wrapped) > 1:
    raise CheckpointError(
      f"{path} holds more than one state dict: {', '.join(wrapped)}; save one "
      "of them alone."
    )
  return loaded[wrapped[0]] if wrapped else loaded


def check_state(
  torch: ModuleType, path: pathlib.Path, state: dict[str, Any]
) -> None:
  """Raises CheckpointError that lists all values which are no plain tensors."""
  file_bytes = path.stat().st_size
  problems = [] if state else ["there is none"]
  for name, value in state.items():
    if not isinstance(name, str):
      problems.append(f"{name!r} is no name")
    elif not isinstance(value, torch.Tensor):
      problems.append(f"{name!r} is of type {type(value).__name__}")
    elif value.layout != torch.strided or value.device.type != "cpu":
      problems.append(f"{name!r} is {value.layout} on {value.device}")
    elif str(value.dtype).removeprefix("torch.") not in DTYPES:
      problems.append(f"{name!r} has the type {value.dtype}")
    elif value.nbytes > file_bytes:  # A view that repeats its storage.
      problems.append(f"{name!r} is {value.nbytes:,} bytes, more than the file")
  if problems:
    rest = len(problems) - MAX_LISTED
    raise CheckpointError(
      f"{path}: wanted named tensors of {', '.join(DTYPES)}, but:\n  "
      + "\n  ".join(problems[:MAX_LISTED])
      + (f"\n  and {rest} more" if rest > 0 else "")
    )


def to_numpy(torch: ModuleType, tensor: Any) -> np.ndarray:
  """A tensor as it is, contiguous or not; NumPy's own types lack bfloat16."""
  tensor = tensor.detach().resolve_neg()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
