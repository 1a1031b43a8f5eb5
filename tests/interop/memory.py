"""How much memory a conversion takes, on a synthetic LLaVA of any size.

Imports no jax: a process that measures others is small.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mole_jax.interop import names, tensors

ROOT = pathlib.Path(__file__).parents[2]
MB = 10**6
BOUND_FACTOR = 1.5  # Times the largest parameter, all its layers stacked,
BOUND_EXTRA = 500 * MB  # and this: the interpreter, jax, one tensor.

# Runs a program as `python -m` would, and says what it took. The peak is
# counted from the end of the imports on: it may be lower than theirs.
_PROGRAM = """
import importlib, json, pathlib, sys, time
def status(key):
  for line in open("/proc/self/status"):
    if line.startswith(key):
      return 1024 * int(line.split()[1])
def count(key):
  for line in open("/proc/self/io"):
    if line.startswith(key):
      return int(line.split()[1])
module = importlib.import_module(sys.argv[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")
imports, began, read = status("VmRSS"), time.perf_counter(), count("rchar")
code = module.main(sys.argv[3:])
pathlib.Path(sys.argv[2]).write_text(json.dumps({
  "code": code, "imports": imports, "peak": status("VmHWM"),
  "seconds": time.perf_counter() - began, "read": count("rchar") - read,
}))
"""


class Measured(NamedTuple):
  """What a program took, in bytes and seconds.

  Pages of files mapped into memory are in `imports` and `peak`, though the
  system can take them back at any time. `read` is without them.
  """

  imports: int
  peak: int
  read: int
  seconds: float


def run(
  arguments: Sequence[str],
  scratch: pathlib.Path,
  module: str = "mole_jax.convert",
) -> Measured:
  """Runs `python -m module arguments` and measures it.

  Raises RuntimeError with its output where it fails.
  """
  figures = scratch / "figures.json"
  figures.unlink(missing_ok=True)
  command = [sys.executable, "-c", _PROGRAM, module, str(figures), *arguments]
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  values = json.loads(figures.read_text()) if figures.exists() else {}
  if values.pop("code", 1):
    raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
  return Measured(**values)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a LLaVA-1.5 with a small CLIP tower."""

  hidden: int = 2048
  ffn: int = 5632
  layers: int = 8
  vocab: int = 32064
  dtype: str = "float32"

  @property
  def largest(self) -> int:
    """Bytes of the largest parameter with its layer axis."""
    stacked = self.layers * self.hidden * max(self.ffn, self.hidden)
    size = max(stacked, self.vocab * self.hidden)
    return size * tensors.DTYPES[self.code].itemsize

  @property
  def bound(self) -> int:
    return int(BOUND_FACTOR * self.largest + BOUND_EXTRA)

  @property
  def code(self) -> str:
    """The type in words of safetensors."""
    return {"float32": "F32", "bfloat16": "BF16"}[self.dtype]

  def config(self) -> dict:
    return {
      "model_type": "llava",
      "image_token_index": self.vocab - 64,
      "vision_feature_layer": -2,
      "vision_feature_select_strategy": "default",
      "text_config": {
        "model_type": "llama",
        "hidden_size": self.hidden,
        "intermediate_size": self.ffn,
        "num_hidden_layers": self.layers,
        "num_attention_heads": self.hidden // 64,
        "vocab_size": self.vocab,
        "rms_norm_eps": 1e-5,
      },
      "vision_config": {"model_type": "clip_vision_model", **_VISION},
    }

  def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as stock LLaVA is stored."""
    counts = {"decoder": self.layers, "vision": 2, "projector": 0}
    llama = [
      row
      for row in names.DECODER
      if not row.path.endswith("bias") and "/fc" not in row.path
    ]
    for row in (*llama, *names.VISION["clip"], *names.PROJECTION):
      shape = self._shape(row)
      for name in names.layer_names(row, counts[row.path.split("/")[0]]):
        yield name, shape

  def _shape(self, row: names.Name) -> tuple[int, ...]:
    part, *_, module, kind = ("", *row.path.split("/"))[-4:]
    part = row.path.split("/")[0]
    width, inner = self.hidden, self.ffn
    if part == "vision":
      width, inner = _VISION["hidden_size"], _VISION["intermediate_size"]
    fan_in = {"down_proj": inner, "fc2": inner}.get(module, width)
    fan_out = {"gate_proj": inner, "up_proj": inner, "fc1": inner}.get(
      module, width
    )
    if module == "linear_1":
      fan_in = _VISION["hidden_size"]
    if kind in ("embed_tokens", "lm_head"):
      return self.vocab, width
    if kind == "position_embedding":
      side = _VISION["image_size"] // _VISION["patch_size"]
      return side**2 + 1, width
    if module == "patch_embedding":
      return width, 3, _VISION["patch_size"], _VISION["patch_size"]
    return (fan_out, fan_in) if kind == "kernel" else (fan_out,)


_VISION = {
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "image_size": 56,
  "patch_size": 14,
}


def write_llava(
  folder: pathlib.Path, shape: Shape, shard_bytes: int = 500 * MB
) -> int:
  """Writes a checkpoint of random values, a row at a time; its bytes."""
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  sizes = [0]
  itemsize = tensors.DTYPES[shape.code].itemsize
  for name, sides in shape.tensors():
    num_bytes = itemsize * int(np.prod(sides))
    if sizes[-1] and sizes[-1] + num_bytes > shard_bytes:
      shards.append({})
      sizes.append(0)
    shards[-1][name] = sides
    sizes[-1] += num_bytes
  folder.mkdir(parents=True)
  weight_map = {}
  rng = np.random.default_rng(0)
  for number, shard in enumerate(shards):
    file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    _write_shard(folder / file, shard, shape.code, rng)
    weight_map |= dict.fromkeys(shard, file)
  index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
  (folder / tensors.INDEX_FILE).write_text(json.dumps(index))
  (folder / "config.json").write_text(json.dumps(shape.config()))
  return sum(sizes)


def _write_shard(
  path: pathlib.Path,
  shard: dict[str, tuple[int, ...]],
  code: str,
  rng: np.random.Generator,
) -> None:
  dtype = tensors.DTYPES[code]
  header, at = {}, 0
  for name, sides in shard.items():
    end = at + dtype.itemsize * int(np.prod(sides))
    header[name] = {"dtype": code, "shape": sides, "data_offsets": [at, end]}
    at = end
  text = json.dumps(header).encode()
  with path.open("wb") as opened:
    opened.write(len(text).to_bytes(8, "little") + text)
    for sides in shard.values():
      for size in _pieces(int(np.prod(sides)), 2**20):
        values = rng.random(size, np.float32) - 0.5
        opened.write(values.astype(dtype).tobytes())


def _pieces(count: int, most: int) -> Iterator[int]:
  for at in range(0, count, most):
    yield min(most, count - at)
