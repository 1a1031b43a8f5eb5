"""Prompts of any number and length to answers, through a few programs.

Axes: see generate.py.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32, UInt8

from mole_jax.inference import generate
from mole_jax.models import llava
from mole_jax.training import step


class Prompt(NamedTuple):
  """One row to answer: token ids, image tokens expanded, and its images."""

  input_ids: Int32[np.ndarray, " T"]
  images: UInt8[np.ndarray, "M Y X 3"]


class Answer(NamedTuple):
  """New tokens, without the end-of-sequence id; experts of prompt and answer.

  Experts are None without a mixture. The last token of an answer that was cut
  off at `max_new_tokens` was never routed and is -1.
  """

  tokens: Int32[np.ndarray, " I"]
  prompt_experts: Int[np.ndarray, "L T topk"] | None
  token_experts: Int[np.ndarray, "L I topk"] | None


class Generator:
  """Batches and pads prompts, and keeps the compiled programs.

  Programs are kept by shape for the life of the process, for all generators
  of equal configuration.
  """

  def __init__(
    self,
    config: llava.LlavaConfig,
    params: Mapping[str, Any],
    *,
    eos_id: int,
    pad_id: int,
    banned_ids: Sequence[int],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    is_unrolled: bool | None = None,
  ):
    """Keeps what every call needs.

    Args:
      config: the model.
      params: its parameters, nested.
      eos_id: ends an answer.
      pad_id: pads prompts.
      banned_ids: ids that are never generated, such as the image's.
      image_mean: mean of the normalisation, by channel, of values 0 to 1.
      image_std: its standard deviation.
      is_unrolled: see `generate`; None does so where it pays and fits.
    """
    if is_unrolled is None:
      self._unrolled_from = _rows_that_pay(params["decoder"]["layers"])
    else:
      self._unrolled_from = 1.0 if is_unrolled else math.inf
    self._config = config
    self._params = params
    self._eos_id = eos_id
    self._pad_id = pad_id
    is_banned = np.zeros(config.decoder.vocab_size, bool)
    is_banned[list(banned_ids)] = True
    self._is_banned = is_banned
    self._normalisation = (tuple(image_mean), tuple(image_std))

  def __call__(
    self,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: generate.Sampling = generate.GREEDY,
    seed: int = 0,
    eos_id: int | None = None,
    batch_size: int = 32,
    lengths: Sequence[int] = (),
    on_batch: Callable[[int], None] = lambda num_prompts: None,
  ) -> list[Answer]:
    """Answers in the order of the prompts.

    Args:
      prompts: what to answer.
      max_new_tokens: longest answer, in tokens.
      sampling: how tokens are chosen.
      seed: of drawing; the i-th prompt draws the same in any batch.
      eos_id: another end than the generator's.
      batch_size: rows of a batch; fewer prompts use a smaller power of two.
      lengths: prompt lengths to pad to, rising; by default powers of two and
        their halves between (32, 48, 64, 96 ...).
      on_batch: called with the number of prompts just answered.
    """
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={max_new_tokens}; wanted at least 1.")
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}; wanted at least 1.")
    eos_id = self._eos_id if eos_id is None else eos_id
    is_banned = self._is_banned.copy()
    is_banned[eos_id] = False
    num_images = max((len(p.images) for p in prompts), default=0)
    num_images = _power_of_two(num_images) if num_images else 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    # The same for a last batch that is not full: it needs no other program.
    height = min(batch_size, _power_of_two(max(1, len(prompts))))
    answers: dict[int, Answer] = {}
    for rows in _batches(order, prompts, lengths, batch_size):
      width = bucket(len(prompts[rows[-1]].input_ids), lengths)
      self._config.decoder.check_length(
        width + max_new_tokens, "a padded prompt with max_new_tokens"
      )
      arrays = self._arrays(
        [prompts[i] for i in rows], height, width, num_images
      )
      result = _compiled(
        self._config,
        self._params,
        *arrays,
        is_banned,
        jax.random.key(seed),
        np.array([*rows, *[0] * (height - len(rows))], np.int32),
        np.int32(eos_id),
        np.int32(self._pad_id),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        is_unrolled=height >= self._unrolled_from,
        normalisation=self._normalisation,
      )
      result = jax.device_get(result)
      for row, index in enumerate(rows):
        num_prompt = len(prompts[index].input_ids)
        answers[index] = _answer(result, row, num_prompt, eos_id)
      on_batch(len(rows))
    return [answers[i] for i in range(len(prompts))]

  def _arrays(
    self, prompts: Sequence[Prompt], height: int, width: int, num_images: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Padded ids, lengths and images; rows without a prompt are padding."""
    input_ids = np.full((height, width), self._pad_id, np.int32)
    lengths = np.ones(height, np.int32)
    size = self._config.vision.image_size
    images = np.zeros((height, num_images, size, size, 3), np.uint8)
    for row, prompt in enumerate(prompts):
      lengths[row] = len(prompt.input_ids)
      input_ids[row, : lengths[row]] = prompt.input_ids
      images[row, : len(prompt.images)] = prompt.images
    return input_ids, lengths, images if num_images else None


# A CPU copies a scanned layer's weights, too. With 8 rows that took two fifths
# of a token of SmolLM2's shape, with one a tenth; and apart its layers compile
# for 14 s instead of 4. Below this size weights stay in a cache.
_CPU_ROWS = 8.0
_CPU_BYTES = 64 * 2**20


def _rows_that_pay(layers: Mapping[str, Any]) -> float:
  """Rows from which generation takes the layers' weights apart; inf for never.

  A GPU copies a scanned layer's weights before it multiplies by them, several
  times the cost of the products of one token. A call holds a second copy of
  the weights: there has to be room for it.
  """
  leaves = jax.tree.leaves(layers)
  size = sum(leaf.nbytes for leaf in leaves)
  device = jax.devices()[0]
  if isinstance(leaves[0], jax.Array):
    device = min(leaves[0].devices(), key=lambda d: d.id)
  if device.platform == "gpu":
    memory = device.memory_stats()
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    return 1.0 if 2 * size < free else math.inf
  if device.platform == "cpu" and size >= _CPU_BYTES:
    return _CPU_ROWS if 2 * size < _free_memory() else math.inf
  return math.inf


def _free_memory() -> int:
  """Bytes of the host's that nothing uses; 0 where it does not say."""
  if "SC_AVPHYS_PAGES" not in os.sysconf_names:
    return 0
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bucket(length: int, lengths: Sequence[int] = ()) -> int:
  """The padded length of a prompt: the first of `lengths` that holds it.

  Without one: 32, 48, 64, 96, 128 ...
  """
  for candidate in lengths:
    if length <= candidate:
      return candidate
  size = max(32, _power_of_two(length))
  middle = size * 3 // 4
  return middle if size > 32 and length <= middle else size


def _power_of_two(count: int) -> int:
  return 1 << (count - 1).bit_length()


def _batches(
  order: Sequence[int],
  prompts: Sequence[Prompt],
  lengths: Sequence[int],
  batch_size: int,
) -> list[list[int]]:
  """Cuts prompts, shortest first, into batches of one padded length."""
  batches: list[list[int]] = []
  previous = -1
  for index in order:
    width = bucket(len(prompts[index].input_ids), lengths)
    if width != previous or len(batches[-1]) == batch_size:
      batches.append([])
    batches[-1].append(index)
    previous = width
  return batches


def _answer(
  result: generate.Generated, row: int, num_prompt: int, eos_id: int
) -> Answer:
  """One row of a batch on the host, without padding."""
  tokens = result.tokens[row]
  ends = np.flatnonzero(tokens == eos_id)
  tokens = tokens[: ends[0]] if len(ends) else tokens
  if result.prompt_experts is None:
    return Answer(tokens, None, None)
  return Answer(
    tokens,
    result.prompt_experts[:, row, :num_prompt],
    result.token_experts[:, row, : len(tokens)],
  )


def _generate_from_bytes(
  config, params, input_ids, lengths, images, *rest, normalisation, **static
) -> generate.Generated:
  """`generate` with uint8 images, normalised on the device."""
  pixels = None
  if images is not None:
    pixels = step.normalise(images, *normalisation, config.dtype)
  return generate.generate(
    config, params, input_ids, lengths, pixels, *rest, **static
  )


_compiled = jax.jit(
  _generate_from_bytes,
  static_argnums=0,
  static_argnames=(
    "max_new_tokens",
    "sampling",
    "is_unrolled",
    "normalisation",
  ),
)
