"""What people hand to a model, checked and brought into one form."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from mole_jax.data import conversation, images
from mole_jax.data import tokenizer as tokenizer_lib
from mole_jax.models import llava

_PICTURES = (Image.Image, str, os.PathLike, bytes, np.ndarray)


def check_inputs(
  config: llava.LlavaConfig,
  input_ids: Any,
  pixel_values: Any | None,
  attention_mask: Any | None,
) -> tuple[
  Int[np.ndarray, "B T"],
  Float[Array, "B M Y X 3"] | None,
  Bool[np.ndarray, "B T"],
]:
  """Ids, images in the slots of their rows, and the mask of tokens.

  Raises ValueError as `Model.logits` says.
  """
  ids = np.asarray(input_ids)
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"input_ids is {ids.dtype}{list(ids.shape)}; wanted int[B, T]."
    )
  if 0 in ids.shape:
    raise ValueError(f"input_ids is empty: its shape is {ids.shape}.")
  vocab_size = config.decoder.vocab_size
  limit = max(vocab_size, config.image_token_id + 1)
  if ids.min() < 0 or ids.max() >= limit:
    raise ValueError(
      f"input_ids lie between {ids.min()} and {ids.max()}; wanted 0 to "
      f"{vocab_size - 1}."
    )
  if attention_mask is None:
    is_token = np.ones(ids.shape, bool)
  else:
    mask = np.asarray(attention_mask)
    if mask.shape != ids.shape:
      raise ValueError(
        f"attention_mask has the shape {mask.shape}; wanted that of "
        f"input_ids, {ids.shape}."
      )
    if not np.isin(mask, (0, 1)).all():
      raise ValueError(
        "attention_mask holds other values than 0 (padding) and 1 (token)."
      )
    is_token = mask.astype(bool)
  is_image = ids == config.image_token_id
  if (is_image & ~is_token).any():
    row = int(np.argwhere(is_image & ~is_token)[0, 0])
    raise ValueError(
      f"row {row}: attention_mask hides image tokens; pad with another id "
      f"than the image's ({config.image_token_id})."
    )
  counts = count_images(is_image, config.num_image_tokens)
  pixels = _slots(config, pixel_values, counts)
  return ids.astype(np.int32), pixels, is_token


def count_images(
  is_image: Bool[np.ndarray, "B T"], num_image_tokens: int
) -> Int[np.ndarray, " B"]:
  """Images of each row; ValueError where one is not whole."""
  padded = np.pad(is_image.astype(np.int8), ((0, 0), (1, 1)))
  edges = np.diff(padded, axis=1)
  # Row by row, the n-th start of a run belongs to its n-th end.
  rows, starts = np.nonzero(edges == 1)
  _, ends = np.nonzero(edges == -1)
  for row, length in zip(rows, ends - starts, strict=True):
    if length % num_image_tokens:
      raise ValueError(
        f"row {row} has {length} image tokens on end; wanted a multiple of "
        f"num_image_tokens={num_image_tokens}."
      )
  return is_image.sum(axis=1) // num_image_tokens


def _slots(
  config: llava.LlavaConfig,
  pixel_values: Any | None,
  counts: Int[np.ndarray, " B"],
) -> Float[Array, "B M Y X 3"] | None:
  """Images of the whole batch, distributed over the rows they are in."""
  total = int(counts.sum())
  size = config.vision.image_size
  if pixel_values is None:
    if total:
      raise ValueError(
        f"input_ids holds {total} images but pixel_values is None; wanted "
        f"float[{total}, {size}, {size}, 3]."
      )
    return None
  pixels = jnp.asarray(pixel_values)
  wanted = (total, size, size, 3)
  if pixels.ndim != 4 or pixels.shape[1:] != wanted[1:]:
    raise ValueError(
      f"pixel_values has the shape {pixels.shape}; wanted {wanted}: channels "
      "last, resized with `Model.pixel_values`."
    )
  if not jnp.issubdtype(pixels.dtype, jnp.floating):
    raise ValueError(
      f"pixel_values is {pixels.dtype}; wanted normalised floats, as "
      "`Model.pixel_values` makes of pictures."
    )
  if len(pixels) != total:
    raise ValueError(
      f"pixel_values holds {len(pixels)} images, input_ids {total} (by row: "
      f"{counts.tolist()})."
    )
  if not total:
    return None
  rows = np.repeat(np.arange(len(counts)), counts)
  starts = np.cumsum(counts) - counts
  slots = np.arange(total) - np.repeat(starts, counts)
  shape = (len(counts), int(counts.max()), *wanted[1:])
  placed = jnp.zeros(shape, pixels.dtype).at[rows, slots].set(pixels)
  return placed


def pair(
  prompts: Any, pictures: Any | None
) -> list[tuple[list[dict[str, str]], list[Any]]]:
  """Prompts as `Model.generate` takes them -> turns and images of each.

  Turns then hold a marker for each image.
  """
  is_turns = not isinstance(prompts, str) and all(
    isinstance(turn, Mapping) for turn in prompts
  )
  if isinstance(prompts, str) or (is_turns and len(prompts)):
    return [_with_markers(0, _turns(prompts), _picture_list(pictures))]
  if pictures is None or isinstance(pictures, _PICTURES):
    rows = [_picture_list(pictures)] * len(prompts)
  else:
    rows = [_picture_list(entry) for entry in pictures]
  if len(rows) != len(prompts):
    raise ValueError(
      f"{len(prompts)} prompts but {len(rows)} entries of images; wanted one "
      "for each prompt (an image, a list of images, or None)."
    )
  return [
    _with_markers(i, _turns(prompt), row)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
  ]


def _picture_list(entry: Any | None) -> list[Any]:
  if entry is None:
    return []
  return [entry] if isinstance(entry, _PICTURES) else list(entry)


def _turns(prompt: Any) -> list[dict[str, str]]:
  if isinstance(prompt, str):
    return [{"from": "human", "value": prompt}]
  turns = [dict(turn) for turn in prompt]
  for index, turn in enumerate(turns):
    if not {"from", "value"} <= set(turn):
      raise ValueError(
        f"turn {index} has the keys {sorted(turn)}; wanted 'from' ('human' "
        "or 'gpt') and 'value'."
      )
  if not turns or turns[-1]["from"] != "human":
    raise ValueError("the last turn of a prompt must be from 'human'.")
  return turns


def _with_markers(
  index: int, turns: list[dict[str, str]], pictures: list[Any]
) -> tuple[list[dict[str, str]], list[Any]]:
  """Puts markers before the first turn where the prompt has none."""
  marker = conversation.IMAGE_MARKER
  count = sum(turn["value"].count(marker) for turn in turns)
  if count == 0 and pictures:
    opening = f"{marker}\n" * len(pictures)
    turns[0] = turns[0] | {"value": opening + turns[0]["value"]}
  elif count != len(pictures):
    raise ValueError(
      f"prompt {index} says {marker} {count} times but has {len(pictures)} "
      f"images; wanted one image for each, or no {marker} at all."
    )
  return turns, pictures


def stack(
  pictures: Sequence[Any], preparation: images.Preparation
) -> UInt8[np.ndarray, "M Y X 3"]:
  """Pictures padded to squares and resized."""
  size = preparation.image_size
  pixels = np.zeros((len(pictures), size, size, 3), np.uint8)
  for row, picture in zip(pixels, pictures, strict=True):
    row[:] = _pixels(picture, preparation)
  return pixels


def _pixels(
  picture: Any, preparation: images.Preparation
) -> UInt8[np.ndarray, "Y X 3"]:
  if isinstance(picture, (str, os.PathLike)):
    picture = pathlib.Path(picture).read_bytes()
  if isinstance(picture, bytes):
    return images.decode_image(picture, preparation)
  if isinstance(picture, Image.Image):
    return images.prepare_image(picture, preparation)
  if isinstance(picture, np.ndarray):
    is_rgb = picture.ndim == 3 and picture.shape[-1] == 3
    if not is_rgb or picture.dtype != np.uint8:
      raise ValueError(
        f"an image is {picture.dtype}{list(picture.shape)}; wanted "
        "uint8[H, W, 3]."
      )
    return images.prepare_image(Image.fromarray(picture), preparation)
  raise ValueError(
    f"an image is a {type(picture).__name__}; wanted a PIL image, a path, "
    "encoded bytes or uint8[H, W, 3]."
  )


def token_texts(
  tokenizer: tokenizer_lib.Tokenizer, ids: Int[np.ndarray, " T"]
) -> tuple[str, ...]:
  """The text of each token, such that they add up to the whole text.

  A token alone may decode to something else than within its text (leading
  spaces, parts of a character), so each is what it adds to those before it.
  """
  special = {token.id: text for text, token in tokenizer.special_tokens.items()}
  texts: list[str] = []
  piece: list[int] = []
  text = ""
  for token in ids.tolist():
    if token in special:
      texts.append(special[token])
      piece, text = [], ""
      continue
    piece.append(token)
    longer = tokenizer.decode(piece)
    # The bytes of an unfinished character decode to U+FFFD (and may spoil
    # those before it); its last byte shows it.
    whole = longer.rstrip("\ufffd")
    texts.append(whole[len(text) :])
    text = max(text, whole, key=len)
  return tuple(texts)
