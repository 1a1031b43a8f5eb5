"""The tokenizer of the embedded set: BPE in Llama's way, about 1,200 tokens."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mole_jax.data.conversation import IMAGE_MARKER, VICUNA, VICUNA_SYSTEM

SPECIALS = ("<unk>", "<s>", "</s>", "<image>")  # Ids 0 to 3; <unk> pads.
VOCAB_SIZE = 1200
_SPACE = "\u2581"  # Llama's visible space.


def train(records: Iterable[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Trains on the texts of `records` (the train split's) and saves JSON.

  Words carry their leading space and a text its first one, as in Llama.
  Digits, punctuation and newlines stand alone. A character that the
  training text lacks becomes its UTF-8 bytes (ids 4 to 259), so any text but
  U+2581 itself comes back from its ids.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIALS[0]))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(_SPACE, "merged_with_next"),
      pre_tokenizers.Split("\n", "isolated"),
      pre_tokenizers.Punctuation("isolated"),
      pre_tokenizers.Digits(individual_digits=True),
    ]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE - 256,
    special_tokens=list(SPECIALS),
    initial_alphabet=[chr(code) for code in range(33, 127)],
    show_progress=False,
  )
  tokenizer.train_from_iterator(_texts(records), trainer)
  description = _with_bytes(json.loads(tokenizer.to_str()))
  path.write_text(json.dumps(description, ensure_ascii=False, indent=1))


def _texts(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
  """The pieces that the pipeline tokenises (see `data/conversation.py`)."""
  for record in records:
    yield f"{VICUNA_SYSTEM} {VICUNA.user}"
    if record["caption"]:
      yield record["caption"] + "\n"
    for turn in record["turns"]:
      if turn["from"] == "gpt":
        yield turn["value"]
      else:
        text = turn["value"].removeprefix(IMAGE_MARKER)
        yield text + VICUNA.assistant
        yield VICUNA.user + text.strip()


def _with_bytes(description: dict[str, Any]) -> dict[str, Any]:
  """Puts the 256 byte tokens after the specials.

  The trainer can only add them as special tokens, which a reader would then
  leave out of decoded text.
  """
  model = description["model"]
  first = len(SPECIALS)
  vocab = {
    token: index if index < first else index + 256
    for token, index in model["vocab"].items()
  }
  vocab |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
  model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
  model["byte_fallback"] = True
  return description
