"""A sentencepiece `tokenizer.model` as a tokenizer.json for `tokenizers`."""

import pathlib
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

_SPACE = "\u2581"  # Sentencepiece's visible space.
# Kinds of piece, sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2


def convert_sentencepiece(model: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a tokenizer.json that gives the ids that sentencepiece gives.

  For BPE models as in Llama, Vicuna and Mistral. Control pieces become
  special tokens, with their ids. As in Llama's own files, a space is put
  before every text that follows a special token.

  Raises:
    ValueError: without the package `sentencepiece`, for a file of another
      kind, or for a model whose ids `tokenizers` would not give back.
  """
  proto = _read(model)
  _check(proto, model)
  pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  kinds = [piece.type for piece in proto.pieces]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=pieces,
      merges=list(_merges(proto.pieces)),
      unk_token=proto.pieces[kinds.index(_UNKNOWN)].piece,
      fuse_unk=True,
      byte_fallback=_BYTE in kinds,
    )
  )
  has_prefix = proto.normalizer_spec.add_dummy_prefix
  steps = [normalizers.Prepend(_SPACE)] if has_prefix else []
  steps.append(normalizers.Replace(" ", _SPACE))
  tokenizer.normalizer = normalizers.Sequence(steps)
  strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(piece.piece, normalized=False, special=True)
      for piece in proto.pieces
      if piece.type in (_UNKNOWN, _CONTROL)
    ]
  )
  tokenizer.save(str(target))


def _read(model: pathlib.Path) -> Any:
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise ValueError(
      f"{str(model)!r} is a sentencepiece model; to read it, "
      "`pip install 'mole_jax[convert]'`."
    ) from error
  if not model.is_file():
    raise ValueError(f"no sentencepiece model at {str(model)!r}.")
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(model.read_bytes())
  except Exception as error:  # Of a class that protobuf keeps to itself.
    raise ValueError(
      f"{str(model)!r} is not a sentencepiece model: {error}"
    ) from error
  return proto


def _check(proto: Any, model: pathlib.Path) -> None:
  """Raises ValueError for what `tokenizers` does otherwise."""
  spec = proto.normalizer_spec
  kinds = [piece.type for piece in proto.pieces]
  problems = {
    "it is not a BPE model": proto.trainer_spec.model_type != _BPE,
    "it has no unknown piece": _UNKNOWN not in kinds,
    "its texts are normalised": bool(spec.precompiled_charsmap),
    "extra white space is removed": spec.remove_extra_whitespaces,
    "spaces are not escaped": not spec.escape_whitespaces,
    "spaces are suffixes": proto.trainer_spec.treat_whitespace_as_suffix,
    "it has user-defined pieces": _USER_DEFINED in kinds,
    "it has unused pieces": _UNUSED in kinds,
  }
  found = [problem for problem, is_there in problems.items() if is_there]
  if found:
    raise ValueError(
      f"{str(model)!r} cannot become a tokenizer.json: {', '.join(found)}; "
      "wanted a BPE model such as Llama's. Put the model's own tokenizer.json "
      "there."
    )


def _merges(pieces: Any) -> Iterator[tuple[str, str]]:
  """Pairs of pieces to join, first to last.

  Sentencepiece joins the neighbours that make the piece of the highest score,
  the leftmost first. `tokenizers` ranks each way to split a piece apart.
  """
  normal = [piece for piece in pieces if piece.type == _NORMAL]
  names = {piece.piece for piece in normal}
  for piece in sorted(normal, key=lambda piece: -piece.score):
    name = piece.piece
    for end in range(1, len(name)):
      if name[:end] in names and name[end:] in names:
        yield name[:end], name[end:]
