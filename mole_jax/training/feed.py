"""What a stage reads: its batches, whose data they are, what went wrong."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mole_jax.data import (
  encoding,
  features,
  images,
  mixture,
  pipeline,
  records,
  schedule,
  templates,
  tokenizer,
)
from mole_jax.parallel import processes
from mole_jax.training import files, rundir

# In a stage's folder.
DATA_FILE, FAILED_FILE = "data.json", "failed.jsonl"


def make_loader(
  config: Mapping[str, Any],
  stage_name: str,
  text: tokenizer.Tokenizer,
  num_image_tokens: int,
  report: Callable[[str, int, int], object] = lambda name, done, total: None,
  stores: Sequence[features.Store] | None = None,
) -> pipeline.Loader:
  """The batches of a stage, for this process.

  With `stores`, one a line of the mixture, they hold features, not pixels.
  `report` is called with the name of a data set, how many of its records were
  measured, and of how many. Raises ValueError where the data do not fit the
  config.
  """
  data, stage = config["data"], config["stages"][stage_name]
  sources = [mixture.Source(**source) for source in stage["mixture"].values()]
  datasets = mixture.load_mixture(
    sources,
    encoder_maker(config, stage_name, text, num_image_tokens),
    domains=data["domains"],
    max_skipped=data["max_skipped"],
    report=report,
  )
  return pipeline.make_loader(
    datasets,
    [source.weight for source in sources],
    seed=config["seed"],
    num_steps=stage["num_steps"],
    batch_size=stage["batch_size"],
    max_length=stage["max_length"],
    max_images=stage["max_images"],
    max_segments=stage["max_segments"],
    preparation=images.preparation_of(config),
    pad_id=text.pad_id,
    batching=data["batching"],
    stores=stores,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_workers=data["num_workers"],
  )


def encoder_maker(
  config: Mapping[str, Any],
  stage_name: str,
  text: tokenizer.Tokenizer,
  num_image_tokens: int,
) -> Callable[[str], encoding.Encoder]:
  """The function from a format, "chat" or "plain", to a stage's encoder."""
  data, stage = config["data"], config["stages"][stage_name]
  return functools.partial(
    encoding.Encoder,
    text,
    num_image_tokens=num_image_tokens,
    max_length=stage["max_length"],
    max_images=stage["max_images"],
    system=data["system"],
    use_bos=data["use_bos"],
    template=templates.read_template(data["template"], text),
  )


def accounting(
  loader: pipeline.Loader, mixture_keys: Mapping[str, Any]
) -> dict[str, dict[str, object]]:
  """What became of the records, by line of the mixture; it adds up.

  Of several processes all must call it.
  """
  accounts = loader.accounting(processes.union(loader.failed()))
  return dict(zip(mixture_keys, accounts, strict=True))


def check_failures(loader: pipeline.Loader, max_skipped: float | int) -> None:
  """Raises mixture.TooManySkipped, in all processes alike."""
  loader.check_failures(max_skipped, processes.union(loader.failed()))


def describe(
  config: Mapping[str, Any], stage_name: str, text: tokenizer.Tokenizer
) -> dict[str, Any]:
  """What the batches of a stage depend on besides its config."""
  lines = config["stages"][stage_name]["mixture"]
  return {
    "schedule": schedule.VERSION,
    "tokenizer": text.identity,
    "data": {
      key: records.identity(line["name"], line["split"])
      for key, line in lines.items()
    },
  }


def check_unchanged(
  folder: pathlib.Path,
  found: Mapping[str, Any],
  step: int,
  *,
  is_change_accepted: bool,
) -> None:
  """Compares the data of a stage with those it began with.

  Args:
    folder: of the stage; its data.json is written, or read.
    found: what `describe` says now.
    step: up to which the stage has been trained.
    is_change_accepted: whether another answer is written down, not refused.

  Raises:
    ValueError: with the changes.
  """
  path = folder / DATA_FILE
  if step and path.exists():
    lines = rundir.differences(files.read_json(path), found)
    if lines and not is_change_accepted:
      raise ValueError(
        f"the data of {folder} are not those of its first {step} steps "
        "(then -> now):\n  "
        + "\n  ".join(lines)
        + "\nPut the old data back, choose another --workdir, or go on with "
        "the new ones from here with --accept_data_change."
      )
    if lines:
      rundir.write_change(folder.parent, folder.name, step, lines)
  files.write_json(path, found)


class FailureLog:
  """failed.jsonl of a stage: each record once, with the reason.

  Every process writes of its own rows, the second to failed.1.jsonl.
  The loader of a resumed stage does not know what failed before, so the lines
  that are there are kept.
  """

  def __init__(self, folder: pathlib.Path):
    self._path = folder / FAILED_FILE
    if jax.process_index():
      self._path = self._path.with_suffix(f".{jax.process_index()}.jsonl")
    self._lines: dict[tuple[str, int], str] = {}
    if self._path.exists():
      text = self._path.read_text("utf-8")
      whole = text[: text.rfind("\n") + 1]
      if whole != text:  # A killed run may leave half a line.
        self._path.write_text(whole, "utf-8")
      for line in whole.splitlines():
        known = json.loads(line)
        self._lines[known["dataset"], known["record"]] = line

  def write(self, loader: pipeline.Loader) -> None:
    """Adds what failed since the last call."""
    new = {}
    for failure in loader.failures():
      key = (failure.dataset, failure.record)
      if key not in self._lines:
        new[key] = json.dumps(failure._asdict())
    if new:
      self._lines |= new
      with self._path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in new.values())


def tokenizer_path(config: Mapping[str, Any]) -> str | pathlib.Path:
  """Where the run's tokenizer is; "embedded" is the package's own."""
  name = config["data"]["tokenizer"]
  return tokenizer.EMBEDDED_TOKENIZER if name == "embedded" else name


def read_tokenizer(config: Mapping[str, Any]) -> tokenizer.Tokenizer:
  """The run's tokenizer; its size must fit the model."""
  text = tokenizer.Tokenizer(tokenizer_path(config))
  check_tokenizer(text, config["model"])
  return text


def check_tokenizer(
  text: tokenizer.Tokenizer, model: Mapping[str, Any]
) -> None:
  """Raises ValueError where ids of the tokenizer do not fit the model."""
  size = model["decoder"]["vocab_size"]
  if text.vocab_size > size:
    raise ValueError(
      f"config.model.decoder.vocab_size={size} is less than the tokenizer's "
      f"{text.vocab_size} entries; set it to {text.vocab_size} or more."
    )
  if text.image_id != model["image_token_id"]:
    raise ValueError(
      f"config.model.image_token_id={model['image_token_id']}, but the "
      f"tokenizer's <image> is {text.image_id}; set it to that."
    )
