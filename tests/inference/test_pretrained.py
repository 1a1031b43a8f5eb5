"""The public object: what it takes, what it refuses, what padding may do."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mole_jax
from mole_jax.data import tokenizer
from mole_jax.data.images import Preparation
from mole_jax.inference import inputs, pretrained
from mole_jax.models import llava
from mole_jax.training import state
from tests.inference import tiny

IMAGE, SIZE = 3, 6  # Image token id; positions of one image.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return tiny.make_model(tmp_path_factory.mktemp("model"))


def make_rows():
  """Three rows of ids: one image, two images, none; and all images."""
  image = [IMAGE] * SIZE
  rows = [
    [1, 40, *image, 50, 60],
    [1, *image, 41, *image, 51, 61, 71],
    [1, 42, 52],
  ]
  return rows, [tiny.make_pixels(i) for i in range(3)]


def pad(rows, left, width):
  """Rows as arrays, `left` padding tokens before each, the rest behind."""
  ids = np.zeros((len(rows), width), np.int64)
  mask = np.zeros_like(ids)
  for index, row in enumerate(rows):
    span = slice(left[index], left[index] + len(row))
    ids[index, span] = row
    mask[index, span] = 1
  return ids, mask


def test_load_is_lazy_and_public():
  assert mole_jax.load is pretrained.load


def test_sizes_are_those_of_the_model(model):
  assert (model.image_token_id, model.num_image_tokens) == (IMAGE, SIZE)
  assert (model.num_layers, model.num_experts) == (2, 3)
  assert model.config["name"] == "mole3"


def test_logits_of_a_row_are_those_of_the_training_path(model):
  rows, pixels = make_rows()
  ids = np.array(rows[1:2])
  images = model.pixel_values(pixels[1:])
  tokens = ids.shape[1]
  network = llava.Llava(model.model_config)
  params = {"params": model.params}
  hidden = network.apply(
    params,
    jnp.asarray(ids),
    jnp.asarray(images)[None],
    jnp.arange(tokens)[None],
    jnp.ones(ids.shape, jnp.int32),
    1,
  ).hidden
  wanted = network.apply(params, hidden, method="unembed")
  logits = model.logits(ids, images)
  assert logits.shape == (1, tokens, 128) and logits.dtype == np.float32
  np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [(0, 0, 0), (13, 8, 20), (5, 8, 0)])
def test_padding_on_any_side_changes_no_logit(model, left):
  rows, pictures = make_rows()
  pixels = model.pixel_values(pictures)
  ids, mask = pad(rows, left, 25)
  logits = model.logits(ids, pixels, mask)
  first = 0
  for index, row in enumerate(rows):
    count = row.count(IMAGE) // SIZE
    alone = model.logits([row], pixels[first : first + count])[0]
    first += count
    padded = logits[index, left[index] : left[index] + len(row)]
    np.testing.assert_allclose(padded, alone, rtol=1e-4, atol=1e-4)


def test_images_go_to_rows_in_order_of_appearance(model):
  rows, pictures = make_rows()
  pixels = model.pixel_values(pictures)
  ids, mask = pad(rows, (0, 0, 0), 25)
  once = model.logits(ids, pixels, mask)
  other = model.logits(ids, pixels[[0, 2, 1]], mask)
  np.testing.assert_allclose(once[0, :10], other[0, :10], atol=1e-5)
  assert np.abs(once[1, 6] - other[1, 6]).max() > 1e-3


def test_pictures_are_normalised_with_the_run_s_numbers(model):
  picture = np.full((8, 8, 3), 51, np.uint8)
  wanted = (0.2 - 0.48145466) / 0.26862954
  assert model.pixel_values([picture])[0, 3, 4, 0] == pytest.approx(wanted)


IDS = np.array([[1, *[IMAGE] * SIZE, 5]])
PIXELS = np.zeros((1, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
  ("ids", "pixels", "mask", "message"),
  [
    (IDS[0], PIXELS, None, r"input_ids is int64\[8\]; wanted int\[B, T\]"),
    (IDS * 1.0, PIXELS, None, r"input_ids is float64"),
    (IDS + 200, None, None, "lie between 201 and 205; wanted 0 to 127"),
    (
      IDS[:, 1:-2],
      PIXELS,
      None,
      "row 0 has 5 image tokens on end; wanted a "
      "multiple of num_image_tokens=6",
    ),
    (np.insert(IDS, 4, 9, 1), PIXELS, None, "row 0 has 3 image tokens"),
    (IDS, None, None, "holds 1 images but pixel_values is None"),
    (IDS, PIXELS[:0], None, "pixel_values holds 0 images, input_ids 1"),
    (np.array([[1, 2]]), PIXELS, None, "holds 1 images, input_ids 0"),
    (
      IDS,
      PIXELS[:, :7],
      None,
      r"has the shape \(1, 7, 8, 3\); wanted "
      r"\(1, 8, 8, 3\)",
    ),
    (IDS, PIXELS.transpose(0, 3, 1, 2), None, "channels last"),
    (IDS, PIXELS.astype(np.uint8), None, "is uint8; wanted normalised"),
    (IDS, PIXELS, np.ones((1, 7)), r"attention_mask has the shape \(1, 7\)"),
    (IDS, PIXELS, 2 * np.ones((1, 8)), "other values than 0"),
    (IDS, PIXELS, np.zeros((1, 8)), "row 0: attention_mask hides image"),
  ],
)
def test_wrong_input_is_named(model, ids, pixels, mask, message):
  with pytest.raises(ValueError, match=message):
    model.logits(ids, pixels, mask)


def test_a_picture_may_come_in_any_form(model, tmp_path):
  pixels = tiny.make_pixels(0)
  path = tmp_path / "picture.png"
  path.write_bytes(tiny.encode(pixels))
  forms = [pixels, Image.fromarray(pixels), path, str(path), path.read_bytes()]
  for form in forms:
    stacked = inputs.stack([form], Preparation(8))
    np.testing.assert_array_equal(stacked, pixels[None])
  with pytest.raises(ValueError, match=r"float64\[8, 8, 3\]; wanted uint8"):
    inputs.stack([pixels / 255], Preparation(8))
  with pytest.raises(ValueError, match="is a int; wanted a PIL image"):
    inputs.stack([3], Preparation(8))


def test_pictures_are_prepared_as_the_config_says(model):
  data = {"image_mean": [0.5, 0.25, 0.75], "image_resample": "bilinear"}
  config = {**model.config, "data": {**model.config["data"], **data}}
  flat = state.flatten(model.params)
  other = pretrained.Model(config, "mole", 6, flat, model.tokenizer)
  picture = np.resize(tiny.make_pixels(0), (9, 17, 3))
  expected = inputs.stack([picture], Preparation(8, (127, 63, 191), "bilinear"))
  std = model.config["data"]["image_std"]
  pixels = other.pixel_values([picture]) * std + data["image_mean"]
  np.testing.assert_allclose(255 * pixels, expected, rtol=0, atol=1e-3)
  prompt = other._prompts("?", picture)[0]
  np.testing.assert_array_equal(prompt.images, expected)


def values(pairs):
  return [
    ([turn["value"] for turn in turns], pictures) for turns, pictures in pairs
  ]


def test_prompts_and_images_are_paired():
  a, b = b"a", b"b"
  talk = [
    {"from": "human", "value": "x"},
    {"from": "gpt", "value": "y"},
    {"from": "human", "value": "z"},
  ]
  for prompts, images, wanted in (
    ("q", None, [(["q"], [])]),
    ("q", a, [(["<image>\nq"], [a])]),
    ("q", [a, b], [(["<image>\n<image>\nq"], [a, b])]),
    ("q <image> r <image>", [a, b], [(["q <image> r <image>"], [a, b])]),
    (["q", "r"], None, [(["q"], []), (["r"], [])]),
    (["q", "r"], a, [(["<image>\nq"], [a]), (["<image>\nr"], [a])]),
    (["q", "r"], [a, None], [(["<image>\nq"], [a]), (["r"], [])]),
    (["q"], [[a, b]], [(["<image>\n<image>\nq"], [a, b])]),
    (talk, a, [(["<image>\nx", "y", "z"], [a])]),
    (
      [talk, "q"],
      [a, b],
      [(["<image>\nx", "y", "z"], [a]), (["<image>\nq"], [b])],
    ),
    ([], None, []),
  ):
    assert values(inputs.pair(prompts, images)) == wanted


@pytest.mark.parametrize(
  ("prompts", "images", "message"),
  [
    (["q", "r"], [b"a"], "2 prompts but 1 entries of images"),
    ("q <image>", None, "prompt 0 says <image> 1 times but has 0 images"),
    ("<image> q", [b"a", b"b"], "says <image> 1 times but has 2 images"),
    (
      [[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]],
      None,
      "the last turn of a prompt must be from 'human'",
    ),
    ([[{"from": "human"}]], None, "turn 0 has the keys"),
  ],
)
def test_prompts_and_images_that_disagree_are_refused(prompts, images, message):
  with pytest.raises(ValueError, match=message):
    inputs.pair(prompts, images)


def test_generate_gives_one_text_a_prompt(model):
  pixels = tiny.make_pixels(0)
  once = model.generate(["What?", "Who is it?"], [pixels, None], 5)
  assert len(once) == 2 and all(isinstance(text, str) for text in once)
  turns = [{"from": "human", "value": "<image>\nWhat?"}]
  again = model.generate([turns, "Who is it?"], [[pixels], []], 5)
  assert again == once
  assert model.generate([], max_new_tokens=5) == []
  with pytest.raises(ValueError, match="max_new_tokens=0; wanted at least 1"):
    model.generate("What?", max_new_tokens=0)


def test_layers_taken_apart_say_the_same(model, monkeypatch):
  asked = tiny.spy_on_layers(monkeypatch)
  apart = pretrained.Model(
    model.config,
    model.stage,
    model.step,
    state.flatten(model.params),
    model.tokenizer,
    is_unrolled=True,
  )
  said = [one.generate(["What?", "Why?"], None, 5) for one in (model, apart)]
  assert said[0] == said[1]
  assert asked == [False, True]


def test_routing_tells_the_experts_of_every_token(model):
  routing, other = model.routing(
    ["What?", "Why?"], [tiny.make_pixels(0), None], answers=["red", "so"]
  )
  count = len(routing.tokens)
  assert routing.is_image.sum() == SIZE and not other.is_image.any()
  assert routing.chosen.shape == (2, count, 1)
  assert set(np.unique(routing.chosen)) <= {0, 1, 2}
  assert routing.tokens[0] == "<s>"
  assert "".join(routing.tokens[1:]).startswith("USER: <image><image>")
  assert "".join(other.tokens[1:]) == "USER: Why? ASSISTANT: so"
  # Its own oracle: the routing that the training path returns.
  ids = [1, *model.tokenizer.encode("USER: Why? ASSISTANT:")]
  ids += model.tokenizer.encode_continuation("so")
  output = llava.Llava(model.model_config).apply(
    {"params": model.params},
    jnp.array([ids]),
    None,
    jnp.arange(len(ids))[None],
    jnp.ones((1, len(ids)), jnp.int32),
    1,
  )
  wanted = np.asarray(output.routing.chosen)[:, 0]
  np.testing.assert_array_equal(other.chosen, wanted)


def test_routing_without_a_mixture_is_expert_0(tmp_path):
  plain = tiny.make_model(tmp_path, num_experts=1)
  routing = plain.routing("What?", tiny.make_pixels(0))[0]
  assert routing.chosen.shape == (2, len(routing.tokens), 1)
  assert not routing.chosen.any()


TEMPLATE = """\
{{- bos_token }}
{%- for m in messages %}{{ m.role }}:{{ m.content }}<unk>{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def test_the_tokenizer_s_template_asks_and_its_end_ends(tmp_path, monkeypatch):
  made = []
  generator = pretrained.generator_lib.Generator
  monkeypatch.setattr(
    pretrained.generator_lib,
    "Generator",
    lambda *args, **kwargs: made.append(kwargs) or generator(*args, **kwargs),
  )
  tiny.make_model(tmp_path)
  (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
  model = tiny.make_model(tmp_path, template="tokenizer")
  assert [kwargs["eos_id"] for kwargs in made] == [2, 0]  # </s>, <unk>.
  routing = model.routing("What?", tiny.make_pixels(0), answers=["red"])[0]
  image = "<image>" * SIZE
  assert "".join(routing.tokens) == (
    f"<s>user:{image}\nWhat?<unk>assistant:red"
  )
  assert model.generate("What?", max_new_tokens=4) == model.generate(
    "What?", max_new_tokens=4, eos_id=0
  )


class Bytes(tokenizer.Tokenizer):
  """UTF-8 bytes, of which some share a character."""

  def __init__(self):
    names = ("<pad>", "<s>", "</s>", "<image>")
    self.special_tokens = {
      name: tokenizer.SpecialToken(256 + i, False, False)
      for i, name in enumerate(names)
    }

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_token_texts_add_up_to_the_text():
  text = "a é日本 b"
  ids = np.array([257, *text.encode(), 259, *b"c", 258])
  texts = inputs.token_texts(Bytes(), ids)
  assert "".join(texts) == f"<s>{text}<image>c</s>"
  assert len(texts) == len(ids)
