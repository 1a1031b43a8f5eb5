"""The oracle is sentencepiece itself, on models trained here."""

import io
import random
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data.sentencepiece_file import convert_sentencepiece
from mole_jax.data.tokenizer import Tokenizer, add_image_token

WORDS = ["the", "there", "then", "an", "and", "banana", "aa", "aaa", "été"]
GAPS = [" ", " ", "  ", "\n", "\n\n", ", ", "    "]
# Every character, and many that the pieces are made of.
TEXTS = st.text(
  st.one_of(
    st.sampled_from("aan \n\tbdehtné<>s/▁0x🙂"),
    st.characters(exclude_categories=["Cs"]),
  ),
  max_size=40,
)


def train(path, **options):
  """A model of a few hundred pieces, as Llama's was made."""
  rng = random.Random(0)
  draw = lambda: "".join(
    rng.choice(WORDS) + rng.choice(GAPS) for _ in range(12)
  )
  settings = dict(
    model_type="bpe",
    vocab_size=380,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    control_symbols=["[INST]", "[/INST]"],
    hard_vocab_limit=False,
    minloglevel=2,
  )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(draw() for _ in range(300)),
    model_writer=model,
    **(settings | options),
  )
  path.write_bytes(model.getvalue())
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def convert(folder, **options):
  theirs = train(folder / "tokenizer.model", **options)
  convert_sentencepiece(folder / "tokenizer.model", folder / "tokenizer.json")
  ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  ours.encode_special_tokens = True
  return theirs, ours


@pytest.fixture(
  scope="module",
  params=[
    {},
    {"add_dummy_prefix": False},
    {"split_by_whitespace": False},
    {"byte_fallback": False},
  ],
  ids=["llama", "no prefix", "pieces over spaces", "no bytes"],
)
def pair(request, tmp_path_factory):
  return convert(tmp_path_factory.mktemp("model"), **request.param)


@given(text=TEXTS)
def test_ids_and_text_are_sentencepieces(pair, text):
  theirs, ours = pair
  ids = theirs.encode(text)
  assert ours.encode(text).ids == ids
  if theirs.unk_id() not in ids:  # It writes two question marks for unknown.
    assert ours.decode(ids) == theirs.decode(ids)


@given(text=st.text("a n\nb", max_size=200))
def test_long_runs_join_in_the_same_order(pair, text):
  theirs, ours = pair
  assert ours.encode(text).ids == theirs.encode(text)


def test_pieces_keep_their_ids_and_control_pieces_are_special(pair):
  theirs, ours = pair
  assert ours.get_vocab_size() == theirs.vocab_size()
  for i in range(theirs.vocab_size()):
    assert ours.id_to_token(i) == theirs.id_to_piece(i)
  special = ours.get_added_tokens_decoder()
  assert {i: special[i].content for i in special if special[i].special} == {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
  }


def test_a_converted_file_serves_once_it_has_the_image(tmp_path):
  theirs, _ = convert(tmp_path)
  path = tmp_path / "tokenizer.json"
  size = theirs.vocab_size()
  assert add_image_token(path, path, 0) == size
  text = Tokenizer(path)
  assert (text.pad_id, text.bos_id, text.eos_id) == (0, 1, 2)
  assert text.encode("the banana") == theirs.encode("the banana")


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    ({"model_type": "unigram", "vocab_size": 320}, "it is not a BPE model"),
    (
      {"normalization_rule_name": "nmt_nfkc"},
      "its texts are normalised",
    ),
    ({"remove_extra_whitespaces": True}, "extra white space is removed"),
    ({"treat_whitespace_as_suffix": True}, "spaces are suffixes"),
    ({"user_defined_symbols": ["<a>"]}, "it has user-defined pieces"),
  ],
)
def test_what_would_get_other_ids_is_refused(tmp_path, options, problem):
  train(tmp_path / "tokenizer.model", **options)
  with pytest.raises(ValueError, match=problem):
    convert_sentencepiece(tmp_path / "tokenizer.model", tmp_path / "out.json")


def test_missing_files_and_other_files_are_named(tmp_path):
  path = tmp_path / "tokenizer.model"
  with pytest.raises(ValueError, match=r"no sentencepiece model at .*\.model"):
    convert_sentencepiece(path, tmp_path / "out.json")
  path.write_bytes(b"no protocol buffer")
  with pytest.raises(ValueError, match="is not a sentencepiece model"):
    convert_sentencepiece(path, tmp_path / "out.json")


def test_the_way_to_the_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(ValueError, match=r"pip install 'mole_jax\[convert\]'"):
    convert_sentencepiece(tmp_path / "a.model", tmp_path / "out.json")
