"""Cached, batched, padded generation against recomputing every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.inference import generate
from mole_jax.inference import generator as generator_lib
from mole_jax.models import llava
from mole_jax.training import state, step
from tests.inference import tiny
from tests.models import small

IMAGE = small.VALUES["image_token_id"]
EOS, PAD = 2, 0
BANNED = [IMAGE, PAD, 38, 39]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
GREEDY = generate.GREEDY


def make_generator(config, params, is_unrolled=None):
  return generator_lib.Generator(
    config,
    params,
    eos_id=EOS,
    pad_id=PAD,
    banned_ids=BANNED,
    image_mean=MEAN,
    image_std=STD,
    is_unrolled=is_unrolled,
  )


@functools.cache
def make(num_experts, moe_layers="none", is_unrolled=False):
  mole = dict(num_experts=num_experts, rank=2, alpha=4.0)
  moe = dict(layers=moe_layers, num_experts=4, capacity_factor=0.0)
  values = small.VALUES | {"mole": mole, "moe": moe}
  config = llava.make_config(values)
  params = state.unflatten(tiny.make_params(config))
  # Strong attention, so that answers depend on what was asked, and where.
  params["decoder"]["embed_tokens"] *= 4
  for projection in params["decoder"]["layers"]["self_attn"].values():
    projection["kernel"] *= 3
  return config, params, make_generator(config, params, is_unrolled)


def make_prompts():
  """Five lengths, with no, one and two images."""
  rng = np.random.default_rng(0)
  prompts = []
  for num_text, num_images in ((3, 0), (5, 1), (2, 1), (9, 2), (30, 0)):
    ids = [1, *[IMAGE] * 6 * num_images, *rng.integers(4, 38, num_text)]
    pixels = rng.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    prompts.append(generator_lib.Prompt(np.array(ids, np.int32), pixels))
  return prompts


@functools.partial(jax.jit, static_argnums=0)
def last_logits(config, params, input_ids, pixels, length):
  """Logits after `length` tokens, by the training path, one row, no cache."""
  is_token = jnp.arange(input_ids.shape[0])[None] < length
  pixels = step.normalise(pixels[None], MEAN, STD, "float32")
  model = llava.Llava(config)
  hidden = model.apply(
    {"params": params},
    input_ids[None],
    pixels,
    jnp.arange(input_ids.shape[0])[None],
    is_token.astype(jnp.int32),
    1,
  ).hidden
  return model.apply({"params": params}, hidden, method="unembed")[
    0, length - 1
  ]


def recompute(config, params, prompt, num_tokens, penalty=1.0):
  """Greedy answer: the whole sequence anew for each token."""
  ids = np.zeros(64, np.int32)
  length = len(prompt.input_ids)
  ids[:length] = prompt.input_ids
  pixels = np.zeros((2, 8, 8, 3), np.uint8)
  pixels[: len(prompt.images)] = prompt.images
  said = []
  for _ in range(num_tokens):
    logits = np.array(last_logits(config, params, ids, pixels, length))
    for token in set(said):
      logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    logits[BANNED] = -np.inf
    token = int(logits.argmax())
    if token == EOS:
      break
    said.append(token)
    ids[length] = token
    length += 1
  return said


def answer(generator, prompts, lengths=(48,), **options):
  answers = generator(prompts, max_new_tokens=7, lengths=lengths, **options)
  return [a.tokens.tolist() for a in answers]


@pytest.mark.parametrize(
  "num_experts, moe_layers", [(0, "none"), (3, "none"), (3, "sparse")]
)
def test_layers_one_by_one_say_what_scanned_ones_say(num_experts, moe_layers):
  prompts = make_prompts()
  scanned, unrolled = (
    make(num_experts, moe_layers, is_unrolled)[2](prompts, max_new_tokens=7)
    for is_unrolled in (False, True)
  )
  for one, other in zip(scanned, unrolled, strict=True):
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_array_equal(one.prompt_experts, other.prompt_experts)
    np.testing.assert_array_equal(one.token_experts, other.token_experts)
  assert len({tuple(one.tokens) for one in scanned}) > 3


def test_large_layers_are_taken_apart_for_a_batch_where_they_fit(monkeypatch):
  _, _, given = make(3)
  config, params = given._config, given._params
  size = sum(
    leaf.nbytes for leaf in jax.tree.leaves(params["decoder"]["layers"])
  )
  asked = tiny.spy_on_layers(monkeypatch)

  def ask(at_least, free):
    monkeypatch.setattr(generator_lib, "_CPU_BYTES", at_least)
    monkeypatch.setattr(generator_lib, "_free_memory", lambda: free)
    generator = make_generator(config, params)
    asked.clear()
    for prompts in (make_prompts(), make_prompts()[:1]):
      generator(prompts, max_new_tokens=2)
    return asked

  assert ask(size, 2 * size + 1) == [True, False]
  assert ask(size + 1, 2 * size + 1) == [False, False]
  assert ask(size, 2 * size) == [False, False]


@pytest.mark.parametrize("num_experts", [0, 1, 3])
def test_cached_generation_equals_recomputing(num_experts):
  config, params, generator = make(num_experts)
  prompts = make_prompts()
  wanted = [recompute(config, params, p, 7) for p in prompts]
  assert len({tuple(w) for w in wanted}) > 3
  assert max(len(set(w)) for w in wanted) > 2  # Not one token for ever.
  assert answer(generator, prompts) == wanted


def test_the_company_of_a_prompt_does_not_change_its_answer():
  _, _, generator = make(3)
  prompts = make_prompts()
  together = answer(generator, prompts)
  assert answer(generator, prompts[::-1])[::-1] == together
  assert answer(generator, prompts, lengths=(40,), batch_size=2) == together


def test_a_drawn_answer_depends_on_seed_and_number_only():
  _, _, generator = make(3)
  prompts = make_prompts()
  draw = functools.partial(
    answer, generator, sampling=generate.Sampling(temperature=1.5)
  )
  once = draw(prompts)
  assert draw(prompts[:-1], batch_size=8) == once[:-1]
  assert draw(prompts, seed=1) != once
  twice = draw([prompts[3]] * 5)
  assert twice[0] != twice[1]


def test_the_end_token_stops_a_row_and_is_not_returned():
  _, _, generator = make(3)
  prompts = make_prompts()
  free = [row for row in answer(generator, prompts) if len(row) == 7]
  # Taken as the end, a later token must cut each answer where it stands.
  end = next(row[3] for row in free if row[3] not in row[:3])
  wanted = [row[: row.index(end)] if end in row else row for row in free]
  ended = [row for row in answer(generator, prompts, eos_id=end) if row]
  assert all(row in ended for row in wanted if row)
  assert end not in sum(ended, [])
  assert 3 in map(len, ended)


def test_decoding_stops_when_every_row_has_ended():
  config, params, _ = make(3)
  prompt = make_prompts()[0]
  first = recompute(config, params, prompt, 1)[0]
  is_banned = np.zeros(40, bool)
  is_banned[BANNED] = True
  length = len(prompt.input_ids)
  compiled = jax.jit(generate.generate, static_argnums=(0, 10))
  result = compiled(
    config,
    params,
    jnp.asarray(prompt.input_ids)[None],
    jnp.array([length]),
    None,
    jnp.asarray(is_banned),
    jax.random.key(0),
    jnp.arange(1),
    jnp.int32(first),
    jnp.int32(PAD),
    5,
  )
  assert result.tokens.tolist() == [[first, PAD, PAD, PAD, PAD]]
  # No token was fed back: there is no expert to tell.
  assert np.all(np.asarray(result.token_experts) == -1)
  assert result.prompt_experts.shape == (2, 1, length, 1)


def test_experts_of_an_answer_are_those_of_the_whole_sequence():
  config, params, generator = make(3)
  prompts = make_prompts()
  answers = generator(prompts, max_new_tokens=7, lengths=(48,))
  index = max((1, 2, 3), key=lambda i: len(answers[i].tokens))
  prompt, said = prompts[index], answers[index]
  ids = np.concatenate([prompt.input_ids, said.tokens])
  routing = (
    llava.Llava(config)
    .apply(
      {"params": params},
      jnp.asarray(ids)[None],
      step.normalise(jnp.asarray(prompt.images)[None], MEAN, STD, "float32"),
      jnp.arange(len(ids))[None],
      jnp.ones((1, len(ids)), jnp.int32),
      1,
    )
    .routing
  )
  wanted = np.asarray(routing.chosen)[:, 0]
  num_prompt = len(prompt.input_ids)
  assert len(said.tokens) == 7  # Cut off: the last one was not routed.
  np.testing.assert_array_equal(said.prompt_experts, wanted[:, :num_prompt])
  np.testing.assert_array_equal(
    said.token_experts[:, :-1], wanted[:, num_prompt:-1]
  )
  assert np.all(said.token_experts[:, -1] == -1)


def test_repetition_penalty_equals_recomputing():
  config, params, generator = make(3)
  prompts = make_prompts()
  sampling = generate.Sampling(repetition_penalty=10.0)
  wanted = [recompute(config, params, p, 7, penalty=10.0) for p in prompts]
  assert wanted != answer(generator, prompts)
  assert answer(generator, prompts, sampling=sampling) == wanted


def draw_many(logits, sampling, count=400):
  keys = jax.random.split(jax.random.key(0), count)
  rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1))
  seen = jnp.zeros(rows.shape, bool)
  tokens = generate.choose_tokens(
    rows, seen, jnp.zeros(len(logits), bool), keys, 0, sampling
  )
  return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


LOGITS = np.log([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
  ("options", "wanted"),
  [
    (dict(), [0.1, 0.4, 0.2, 0.3]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=9), [0.1, 0.4, 0.2, 0.3]),
    (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(top_p=0.01), [0, 1, 0, 0]),
  ],
)
def test_tokens_are_drawn_with_the_wanted_probabilities(options, wanted):
  shares = draw_many(LOGITS, generate.Sampling(temperature=1.0, **options))
  np.testing.assert_allclose(shares, wanted, atol=0.07)
  assert np.all(shares[np.array(wanted) == 0] == 0)


def test_temperature_divides_logits():
  shares = draw_many(LOGITS, generate.Sampling(temperature=0.5))
  wanted = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
  np.testing.assert_allclose(shares, wanted, atol=0.07)


@pytest.mark.parametrize(
  ("length", "lengths", "wanted"),
  [
    (1, (), 32),
    (33, (), 48),
    (49, (), 64),
    (65, (), 96),
    (97, (), 128),
    (10, (16, 24), 16),
    (17, (16, 24), 24),
    (25, (16, 24), 32),
  ],
)
def test_buckets(length, lengths, wanted):
  assert generator_lib.bucket(length, lengths) == wanted


@pytest.mark.parametrize(
  "options",
  [
    dict(temperature=-1),
    dict(top_k=-1),
    dict(top_p=0),
    dict(top_p=1.5),
    dict(repetition_penalty=0),
  ],
)
def test_impossible_options_are_named(options):
  with pytest.raises(ValueError, match=f"{next(iter(options))}=.*; wanted"):
    generate.Sampling(**options)
