"""Transformers' processor beside an export makes the inputs that we make."""

import numpy as np
import pytest
import transformers
from PIL import Image

from mole_jax.data.conversation import VICUNA_SYSTEM
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, to_hf, vicuna_jinja
from mole_jax.training import base as base_lib
from tests.interop import random_run, torch_models


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processor")
  random_run.write(folder / "run", "mole3")
  to_hf.convert(
    folder / "run", folder / "hf", format="mole", max_shard_bytes=10**9
  )
  processor = transformers.AutoProcessor.from_pretrained(folder / "hf")
  return pretrained.load(folder / "run"), processor


def make_picture():
  rng = np.random.default_rng(0)
  return Image.fromarray(rng.integers(0, 256, (20, 31, 3), np.uint8))


def test_ids_and_pixels_are_those_of_our_model(exported):
  ours, processor = exported
  picture = make_picture()
  turns = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "Three"},
    {"from": "human", "value": "Why?"},
  ]
  text = lambda value: {"type": "text", "text": value}
  chat = [
    {
      "role": "user",
      "content": [{"type": "image", "image": picture}, text("What is it?")],
    },
    {"role": "assistant", "content": [text("Three")]},
    {"role": "user", "content": [text("Why?")]},
  ]
  theirs = processor.apply_chat_template(
    chat,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="np",
  )
  pixels = ours.pixel_values([picture])
  wanted = ours.encode_prompt(turns, np.zeros((1, 8, 8, 3), np.uint8))
  assert theirs["input_ids"][0].tolist() == wanted.input_ids.tolist()
  np.testing.assert_allclose(
    theirs["pixel_values"].transpose(0, 2, 3, 1), pixels, atol=1e-6
  )


@pytest.mark.parametrize("system", ["", VICUNA_SYSTEM, 'it\'s "so"\n{{ x }}'])
@pytest.mark.parametrize("use_bos", [True, False])
def test_vicuna_s_template_is_read_back(system, use_bos):
  source = vicuna_jinja.write(system, use_bos)
  assert vicuna_jinja.read(source) == (system, use_bos)
  assert vicuna_jinja.read(source + " ") is None
  assert vicuna_jinja.read("{{ messages }}") is None


def test_a_decoder_s_own_template_and_tokens_come_along(tmp_path):
  torch_models.save_smollm2(tmp_path / "llm")
  torch_models.save_dinov2(tmp_path / "tower")
  from_hf.convert(
    tmp_path / "llm", tmp_path / "base", vision=tmp_path / "tower"
  )
  about = base_lib.BaseReader(tmp_path / "base").about
  data = about["config"]["data"]
  assert (data["template"], data["system"]) == ("tokenizer", "")
  assert data["image_mean"] == [0.485, 0.456, 0.406]
  # Pictures as large as the processor makes them, positions as learned.
  assert about["model"]["vision"]["image_size"] == 56
  assert about["model"]["vision"]["position_grid"] == 5
  # 259 tokens and <image>; the table grew to a multiple of 64.
  assert about["model"]["image_token_id"] == 259
  assert about["model"]["decoder"]["vocab_size"] == 320
  ours = pretrained.load(tmp_path / "base")
  table = np.asarray(ours.params["decoder"]["embed_tokens"])
  np.testing.assert_allclose(
    table[259:], np.tile(table[:259].mean(0), (61, 1)), atol=1e-6
  )
  prompt = ours.encode_prompt(
    [{"from": "human", "value": "<image>\nHi"}],
    np.zeros((1, 56, 56, 3), np.uint8),
  )
  text = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm")
  chat = [{"role": "user", "content": "\nHi"}]
  wanted = text.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True
  )["input_ids"]
  ids = prompt.input_ids.tolist()
  assert ids.count(259) == ours.num_image_tokens == 16
  assert [i for i in ids if i != 259] == wanted
  assert ours.generator._eos_id == text.convert_tokens_to_ids("<|im_end|>")
