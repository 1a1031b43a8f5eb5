"""Runs a checkpoint and its export side by side, and says where they differ.

The export runs in PyTorch, in a process of its own (`with_torch/run_model`),
this side in JAX; both in float32 on the same random inputs: a row of text, one
with an image, one with three, padded on the right.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mole_jax.interop import (
  hf,
  hf_json,
  mixtral,
  mole_folder,
  names,
  parity,
  peft,
  sources,
  write_hf,
)
from mole_jax.interop import opened as opened_lib
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import llava
from mole_jax.training import state

PROGRAM = "mole_jax.interop.with_torch.run_model"
NUM_TEXT_TOKENS = 12
NUM_NEW_TOKENS = 16
IMAGES_BY_ROW = (0, 1, 3)
NUM_ERROR_LINES = 5


@dataclasses.dataclass(frozen=True)
class _Pair:
  """A folder that PyTorch loads, and the model that it should be."""

  label: str
  folder: pathlib.Path
  model: dict[str, Any]
  params: Mapping[str, Any]


def verify(
  ckpt: pathlib.Path, folder: pathlib.Path, base: pathlib.Path | None = None
) -> parity.Parity:
  """Compares a checkpoint of ours with what `to-hf` wrote of it.

  Args:
    ckpt: a run, a stage, a step or a base.
    folder: the export: merged, native-moe, mole (with or without base) or
      experts.
    base: stock LLaVA, where the export does not hold its base.

  Raises CheckpointError where there is nothing to compare, or PyTorch fails.
  """
  opened = opened_lib.open_checkpoint(ckpt)
  format = _format(folder)
  needs_base = format in ("experts", "adapter") or _is_without_base(folder)
  if needs_base and base is None:
    raise CheckpointError(
      f"{folder} does not hold its base; name that folder with --llm."
    )
  if base is not None and not needs_base:
    raise CheckpointError(f"{folder} holds its base; leave --llm out.")
  flat = {
    row.path: opened.params[row.path] for row in sources.rows_of(opened.model)
  }
  rows, stored = _stored(opened.model, format, flat, needs_base)
  checks, tensors, is_rounded = _compare_tensors(opened, folder, rows, stored)
  model = opened.model
  if write_hf.drops_tokens(model):
    model = model | {"moe": model["moe"] | {"eval_capacity_factor": 0.0}}
    checks.append(
      parity.Check(
        "tokens are dropped at evaluation",
        1,
        None,
        "by the checkpoint, not by PyTorch, nor below",
      )
    )
  about = {}
  for pair in _pairs(model, format, folder, flat):
    inputs = _inputs(pair.model)
    theirs, about = _run_theirs(pair.folder, inputs, base)
    if format == "native-moe":  # Plain layers choose there, among copies.
      kinds = sources.experts_by_layer(model)
      layers = [i for i, kind in enumerate(kinds) if kind]
      for key in ("chosen", "probs"):
        theirs[key] = theirs[key][layers]
    ours = _run_ours(pair.model, pair.params, inputs)
    found = parity.compare_outputs(inputs, ours, theirs, about, is_rounded)
    checks += [
      dataclasses.replace(check, what=pair.label + check.what)
      for check in found
    ]
  versions = {
    "jax": jax.__version__,
    "torch": about["torch"],
    "transformers": about["transformers"],
  }
  return parity.Parity(
    opened.what, folder.name, format, versions, tuple(checks), tensors
  )


def _format(folder: pathlib.Path) -> str:
  if (folder / mole_folder.MIXTURE_FILE).exists():
    return "experts"
  if (folder / peft.CONFIG_FILE).exists():
    return "adapter"
  values = hf_json.read_json(folder / "config.json")
  kind = values.get("model_type")
  if kind == mole_folder.MODEL_TYPE:
    _check_code(folder)
    return "mole"
  if kind != "llava":
    raise CheckpointError(
      f"{folder} is of model_type {kind!r}; wanted what `to-hf` writes."
    )
  text = values.get("text_config", {})
  is_moe = text.get("model_type") == mixtral.MODEL_TYPE
  return "native-moe" if is_moe else "merged"


def _is_without_base(folder: pathlib.Path) -> bool:
  return (folder / mole_folder.BASE_TENSORS).exists()


def _check_code(folder: pathlib.Path) -> None:
  """Raises CheckpointError unless a folder's code is that of this package.

  It is run: nobody else's should be.
  """
  wanted = {p.name: p.read_bytes() for p in write_hf.TORCH_FILES.glob("*.py")}
  other = [
    path
    for path in folder.glob("*.py")
    if path.name not in wanted or path.read_bytes() != wanted[path.name]
  ]
  config = folder / "config.json"
  # It may name code elsewhere.
  if hf_json.read_json(config).get("auto_map") != mole_folder.AUTO_MAP:
    other.append(config)
  if other:
    raise CheckpointError(
      f"{other[0]} does not run the code that this version of mole_jax writes, "
      "so it was left alone. Export the checkpoint again."
    )


def _stored(
  model: Mapping[str, Any],
  format: str,
  flat: Mapping[str, Any],
  needs_base: bool,
) -> tuple[list[names.Name], write_hf.Reader]:
  """The parameters that a folder should hold, and as what."""
  rows = sources.rows_of(model)
  if format == "merged":
    rows = [row for row in rows if not names.is_adapter(row)]
    return rows, write_hf.merged_reader(flat, model)
  if format == "native-moe":
    dense = mixtral.as_dense(model)
    return sources.rows_of(dense), mixtral.reader(flat, model)
  if needs_base:
    rows = [row for row in rows if write_hf.is_added(row)]
  return rows, flat.__getitem__


def _pairs(
  model: dict[str, Any],
  format: str,
  folder: pathlib.Path,
  flat: Mapping[str, Any],
) -> list[_Pair]:
  """What is to be run beside what; parameters are never merged."""
  if format != "experts":
    return [_Pair("", folder, model, flat)]
  return [
    _expert(model, folder, flat, expert)
    for expert in range(model["mole"]["num_experts"])
  ]


def _expert(
  model: dict[str, Any],
  folder: pathlib.Path,
  flat: Mapping[str, Any],
  expert: int,
) -> _Pair:
  """One PEFT folder: that expert for every token, no visual tokens."""
  one = model | {
    "mole": model["mole"] | {"num_experts": 1, "top_k": 1, "gate": "none"},
    "use_visual_tokens": False,
  }
  rows = sources.rows_of(one)
  params = {
    row.path: flat[row.path][:, expert : expert + 1]
    if "/mlp/" in row.path and "/lora_" in row.path
    else flat[row.path]
    for row in rows
  }
  return _Pair(f"expert {expert}: ", folder / f"expert_{expert}", one, params)


def _compare_tensors(
  opened: opened_lib.Opened,
  folder: pathlib.Path,
  rows: list[names.Name],
  stored: write_hf.Reader,
) -> tuple[list[parity.Check], dict[str, dict[str, Any]], bool]:
  """Settings, names both ways, values; whether some were rounded when stored.

  A mixture's router counts here, whether or not PyTorch runs it.
  """
  model = opened.model
  with (
    tempfile.TemporaryDirectory() as scratch,
    hf.Opener(False, pathlib.Path(scratch)) as opener,
  ):
    source = opener.source(folder)
  family = model["vision"]["family"]
  there = {name for name in source.tensors if name not in names.unused(family)}
  is_tied = model["decoder"]["tie_word_embeddings"]
  there -= {names.HEAD} if is_tied else set()
  as_read = lambda path: np.dtype(stored(path).dtype)
  hashes, missing, different, is_rounded = {}, [], [], False
  for name, array in write_hf.tensors(model, rows, stored, as_read):
    if name not in there:
      missing.append(name)
      hashes[name] = {"sha256": None}
      continue
    there.discard(name)
    found = source.tensors[name].read()
    is_rounded |= found.dtype.itemsize < array.dtype.itemsize
    wanted = mole_folder.digest(array.astype(found.dtype))
    sha256 = mole_folder.digest(found)
    if sha256 != wanted:
      different.append(name)
    hashes[name] = {"sha256": sha256, "is_equal": sha256 == wanted}
  problems = {
    "tensors missing": missing,
    "tensors unknown": sorted(there),
    "tensors of other values": different,
  }
  # A mixture that says how it was trained; PEFT and Mixtral do not.
  if source.balance is not None and "mole" in source.model:
    ours = mole_folder.settings(model, opened.balance)
    theirs = mole_folder.settings(source.model, source.balance)
    problems["settings that differ"] = [
      k for k in ours if ours[k] != theirs.get(k)
    ]
  checks = [
    parity.Check(what, len(which), 0, ", ".join(which[:3]))
    for what, which in problems.items()
  ]
  return checks, hashes, is_rounded


def _inputs(model: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Random rows with 0, 1 and 3 images; right-padded with id 0."""
  rng = np.random.default_rng(0)
  config = llava.make_config(model)
  image_id, count = config.image_token_id, config.num_image_tokens
  candidates = np.setdiff1d(np.arange(config.decoder.vocab_size), [image_id])
  text = lambda: rng.choice(candidates, NUM_TEXT_TOKENS).tolist()
  rows = []
  for num_images in IMAGES_BY_ROW:
    row = text()
    for _ in range(num_images):
      row += [image_id] * count + text()
    rows.append(row)
  width = max(map(len, rows))
  ids = np.zeros((len(rows), width), np.int32)
  mask = np.zeros((len(rows), width), np.int32)
  for number, row in enumerate(rows):
    ids[number, : len(row)] = row
    mask[number, : len(row)] = 1
  size = config.vision.image_size
  shape = (sum(IMAGES_BY_ROW), 3, size, size)
  return {
    "input_ids": ids,
    "attention_mask": mask,
    "pixel_values": rng.normal(size=shape).astype(np.float32),
    # The row with one image, which is the first.
    "probe_ids": np.array(rows[IMAGES_BY_ROW.index(1)], np.int32),
    "num_new_tokens": np.array(NUM_NEW_TOKENS),
  }


def _run_theirs(
  folder: pathlib.Path,
  inputs: Mapping[str, np.ndarray],
  base: pathlib.Path | None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """What PyTorch computes, and what it says of itself."""
  with tempfile.TemporaryDirectory() as scratch:
    given, made = (pathlib.Path(scratch, f"{n}.npz") for n in ("in", "out"))
    np.savez(given, **inputs)
    command = [
      sys.executable,
      "-m",
      PROGRAM,
      str(folder),
      str(given),
      str(made),
    ]
    if base is not None:
      command += ["--base", str(base)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
      command, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
      lines = done.stderr.strip().splitlines()[-NUM_ERROR_LINES:]
      raise CheckpointError(
        f"PyTorch could not run {folder} (it needs torch and transformers, and "
        "peft for experts: pip install 'mole_jax[torch]'):\n  "
        + "\n  ".join(lines)
      )
    with np.load(made) as results:
      arrays = dict(results)
  return arrays, json.loads(str(arrays.pop("about")))


def _run_ours(
  model: Mapping[str, Any],
  params: Mapping[str, Any],
  inputs: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """What we compute; the same keys as PyTorch's."""
  config = llava.make_config(dict(model) | {"dtype": "float32"})
  tree = state.unflatten(
    {path: jnp.asarray(leaf, jnp.float32) for path, leaf in params.items()}
  )
  pixels = inputs["pixel_values"].transpose(0, 2, 3, 1)
  slots = np.zeros(
    (len(IMAGES_BY_ROW), max(IMAGES_BY_ROW), *pixels.shape[1:]), np.float32
  )
  first = 0
  for row, count in enumerate(IMAGES_BY_ROW):
    slots[row, :count] = pixels[first : first + count]
    first += count
  rows = _forward(
    config, tree, inputs["input_ids"], slots, inputs["attention_mask"]
  )
  probe = inputs["probe_ids"]
  num_new = int(inputs["num_new_tokens"])
  ids = np.pad(probe, (0, num_new))[None]
  is_token = np.zeros_like(ids)
  results = {
    "features": np.asarray(_features(config, tree, pixels[:, None]))[:, :],
    "logits": np.asarray(rows["logits"]),
  }
  if "chosen" in rows:
    results["chosen"] = np.asarray(rows["chosen"])
  for end in range(len(probe), len(probe) + num_new):
    is_token[0, :end] = 1
    row = _forward(config, tree, ids, pixels[None, :1], is_token)
    if end == len(probe):
      results["hidden"] = np.asarray(row["hidden"])[:, 0, :end]
    ids[0, end] = int(row["logits"][0, end - 1].argmax())
  results["greedy"] = ids[0, len(probe) :]
  return results


@functools.partial(jax.jit, static_argnums=0)
def _features(config, params, pixel_values) -> jax.Array:
  model = llava.Llava(config)
  return model.apply({"params": params}, pixel_values, method="encode_images")


@functools.partial(jax.jit, static_argnums=0)
def _forward(
  config, params, input_ids, pixel_values, mask
) -> dict[str, jax.Array]:
  """Logits, hidden states [L + 1, B, T, D] as Transformers counts them."""
  model = llava.Llava(config)
  positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  output = model.apply(
    {"params": params},
    input_ids,
    pixel_values,
    positions,
    mask,
    1,
    keep_inputs=True,
  )
  logits = model.apply({"params": params}, output.hidden, method="unembed")
  hidden = jnp.concatenate([output.layer_inputs, output.hidden[None]])
  results = {"logits": logits, "hidden": hidden}
  if output.routing is not None:
    results["chosen"] = output.routing.chosen
  return results
