import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data.tokenizer import Tokenizer

WORDS = st.text(
  alphabet=[chr(i) for i in range(33, 127)] + ["\n", " "], min_size=1
).filter(lambda text: not text.startswith(" "))


@given(text=WORDS)
def test_decode_gives_back_what_was_encoded(toy_tokenizer, text):
  assert toy_tokenizer.decode(toy_tokenizer.encode(text)) == text


def test_golden_ids_of_a_text(toy_tokenizer):
  # " " is 98; "!" is 4, so "a" is 4 + ord("a") - ord("!") = 68.
  assert toy_tokenizer.encode("ab\nA") == [98, 68, 69, 99, 36]


def test_special_ids_and_vocabulary_size(toy_tokenizer):
  t = toy_tokenizer
  assert (t.pad_id, t.bos_id, t.eos_id, t.image_id) == (0, 1, 2, 3)
  assert t.vocab_size == 100


@pytest.mark.parametrize("text", ["</s>", "a<image>b", "<s> <unk>"])
def test_special_tokens_are_never_read_out_of_text(toy_tokenizer, text):
  ids = toy_tokenizer.encode(text)
  assert min(ids) > 3
  assert toy_tokenizer.decode(ids) == text


def test_decode_leaves_special_tokens_out(toy_tokenizer):
  ids = [1, *toy_tokenizer.encode("yes"), 2, 0]
  assert toy_tokenizer.decode(ids) == "yes"


@pytest.mark.parametrize(
  "pre_tokenizer",
  [
    tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always"),
    tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never"),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
  ],
  ids=["always", "never", "byte-level"],
)
def test_continuation_equals_the_ids_in_context(
  toy_tokenizer_path, tmp_path, pre_tokenizer
):
  state = json.loads(toy_tokenizer_path.read_text())
  state["model"]["vocab"]["Ġ"] = 100  # The byte-level name of a space.
  other = tokenizers.Tokenizer.from_str(json.dumps(state))
  other.pre_tokenizer = pre_tokenizer
  other.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer(tmp_path / "tokenizer.json")
  whole = tokenizer.encode("USER: hi ASSISTANT: two words")
  prompt = tokenizer.encode("USER: hi ASSISTANT:")
  assert whole == prompt + tokenizer.encode_continuation("two words")


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no tokenizer file at .*absent\.json"):
    Tokenizer(tmp_path / "absent.json")


def test_file_of_another_kind_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text('{"a": 1}')
  with pytest.raises(ValueError, match="not a `tokenizers` JSON file"):
    Tokenizer(tmp_path / "tokenizer.json")


def test_missing_special_token_is_named(tmp_path):
  bare = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[]
    )
  )
  bare.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match="has no token <image>"):
    Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("bad", [-1, 100])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(toy_tokenizer, bad):
  with pytest.raises(ValueError, match="outside the vocabulary of 100"):
    toy_tokenizer.decode([68, bad])
