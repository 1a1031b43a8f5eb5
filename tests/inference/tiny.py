"""A model with a tokenizer and made-up records, without any training."""

import io

import jax.numpy as jnp
import numpy as np
from PIL import Image

from mole_jax.inference import generator, pretrained
from mole_jax.training import state
from tests.training import small_run


def make_params(model_config):
  """Random parameters, flat: answers of different kinds come from these."""
  rng = np.random.default_rng(0)
  return {
    name: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
    for name, leaf in state.parameter_shapes(model_config).items()
  }


def make_model(folder, num_experts=3, template="vicuna"):
  """Two layers, 16 wide, images of 2 x 2 patches, one id a character."""
  config = small_run.make_config()
  config["model"]["mole"]["num_experts"] = num_experts
  config["data"]["template"] = template
  params = make_params(state.model_config(config, "mole"))
  text = small_run.make_tokenizer(folder)
  return pretrained.Model(config, "mole", 6, params, text)


def make_moe_model(folder, num_experts=4, change=lambda params: params):
  """Three layers, full-FFN experts in the first and last, top-2.

  `change` gets the flat parameters and returns those to use.
  """
  config = small_run.make_config("moe_llava")
  config["model"]["decoder"]["num_layers"] = 3
  config["model"]["moe"]["num_experts"] = num_experts
  params = make_params(state.model_config(config, "experts"))
  text = small_run.make_tokenizer(folder)
  return pretrained.Model(config, "experts", 6, change(params), text)


def spy_on_layers(monkeypatch):
  """A list that gets, for each batch answered, whether layers lay apart."""
  asked = []
  compiled = generator._compiled

  def answers(*args, **kwargs):
    asked.append(kwargs["is_unrolled"])
    return compiled(*args, **kwargs)

  monkeypatch.setattr(generator, "_compiled", answers)
  return asked


def make_pixels(number):
  """uint8[8, 8, 3] of noise."""
  rng = np.random.default_rng(number)
  return rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encode(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def make_record(number, domain, questions, has_image=True):
  """A record; `questions` are (question, answer, kind)."""
  turns = []
  for question, answer, kind in questions:
    marker = "<image>\n" if has_image and not turns else ""
    turns += [
      {"from": "human", "value": marker + question, "kind": kind},
      {"from": "gpt", "value": answer, "kind": kind},
    ]
  return {
    "id": f"{domain}-{number}",
    "domain": domain,
    "caption": "",
    "source": "unit",
    "images": [encode(make_pixels(number))] if has_image else [],
    "turns": turns,
  }
