"""A run that trains in seconds: coloured squares, one-character tokens."""

import importlib.util
import io
import pathlib

import jax
import numpy as np
import tokenizers
from PIL import Image

from mole_jax.data import encoding, images, pipeline
from mole_jax.data.templates import VICUNA
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import base as base_lib
from mole_jax.training import loop, rundir
from mole_jax.training import stage as stage_lib
from tests.data import in_memory
from tests.models import small

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
AXES = ("data", "fsdp", "expert", "tensor")
DOMAINS = ("general", "document", "biomedical")
COLOURS = ("red", "green", "blue")


def read_config(name, variant="tiny"):
  """The ConfigDict of configs/<name>.py."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def make_config(name="mole3", **stage_changes):
  """The plain config of a small model; changes go to both stages."""
  c = read_config(name)
  c.model.vision.update(small.VALUES["vision"])
  c.model.decoder.update(small.VALUES["decoder"])
  c.model.decoder.vocab_size = 128
  c.model.lora.dropout = c.model.mole.dropout = 0.1
  c.mesh = dict(data=1, fsdp=1, expert=1, tensor=1)
  for stage in c.stages.values():
    stage.update(
      dict(
        num_steps=6,
        batch_size=4,
        max_length=64,
        max_images=2,
        max_segments=3,
        checkpoint_every=3,
        log_every=2,
      )
    )
    stage.update(stage_changes)
  return rundir.plain(c)


def make_tokenizer(folder):
  """One id a character."""
  characters = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
  tokens = ["<unk>", "<s>", "</s>", "<image>", *characters]
  toy = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[],
      unk_token="<unk>",
    )
  )
  toy.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  toy.decoder = tokenizers.decoders.Metaspace()
  toy.add_special_tokens(tokens[:4])
  path = folder / "tokenizer.json"
  toy.save(str(path))
  return Tokenizer(path)


def make_records(domain, count=12):
  """Squares of one colour; what they are called depends on the domain."""
  records = []
  for i in range(count):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., i % 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    answer = COLOURS[i % 3][:: 1 if domain == "general" else -1]
    turns = [("human", "<image>\nWhat?"), ("gpt", answer)]
    records.append(
      {
        "id": f"{domain}{i}",
        "domain": domain,
        "caption": f"a {COLOURS[i % 3]} square",
        "source": str(i),
        "images": [buffer.getvalue()],
        "turns": [{"from": f, "value": v, "kind": "shown"} for f, v in turns],
      }
    )
  return records


def make_loader(config, stage_name, text, bad=(), stores=None):
  """The batches of a stage over the squares; pictures of `bad` are broken.

  `bad` are ids of records, such as "general3"; `stores` hold features.
  """
  stage = config["stages"][stage_name]
  sources = stage["mixture"].values()
  datasets = [
    in_memory.make_dataset(
      break_images(make_records(source["name"].split("/")[1]), bad),
      encoding.Encoder(
        text,
        source["format"],
        num_image_tokens=6,
        max_length=stage["max_length"],
        max_images=stage["max_images"],
        system="",
        use_bos=True,
        template=VICUNA,
      ),
      name=f"{source['name']} as {source['format']}",
      domains=DOMAINS,
    )
    for source in sources
  ]
  return pipeline.make_loader(
    datasets,
    [source["weight"] for source in sources],
    seed=config["seed"],
    num_steps=stage["num_steps"],
    batch_size=stage["batch_size"],
    max_length=stage["max_length"],
    max_images=stage["max_images"],
    max_segments=stage["max_segments"],
    preparation=images.Preparation(8),
    pad_id=text.pad_id,
    stores=stores,
  )


def leave_a_checkpoint(run, stage):
  """What stands after a stage's first step, as far as the run goes."""
  step = run / stage / "checkpoints" / "1"
  step.mkdir(parents=True)
  (step / "state").touch()


def break_images(records, bad):
  for record in records:
    if record["id"] in bad:
      record["images"] = [data[:40] for data in record["images"]]
  return records


def make_base(config):
  """A random base, as flat parameters."""
  return small.draw(base_lib.base_shapes(config), 7, scale=0.2)


def make_stage(config, name, num_devices=1):
  """A stage on the first devices."""
  devices = jax.devices()[:num_devices]
  return stage_lib.Stage(
    config, name, mesh_lib.make_mesh(config["mesh"], devices)
  )


def train(config, name, run, text, base=None, reference=None, **kwargs):
  """Runs a stage; returns its parameters and the rows that it logged."""
  num_devices = kwargs.pop("num_devices", 1)
  rows = {}
  params = loop.run_stage(
    config,
    make_stage(config, name, num_devices),
    make_loader(
      config, name, text, kwargs.pop("bad", ()), kwargs.pop("stores", None)
    ),
    run,
    base,
    reference,
    on_log=rows.__setitem__,
    on_step=kwargs.pop("on_step", lambda number: None),
    **kwargs,
  )
  return params, rows
