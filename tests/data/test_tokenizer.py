import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mole_jax.data.tokenizer import Tokenizer, add_image_token
from tests.data import chat_files

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
  with pytest.raises(ValueError, match="<image>; convert .* from-hf"):
    Tokenizer(tmp_path / "tokenizer.json")


def write_tokens(folder, tokens, **names):
  """A tokenizer of these tokens, and a tokenizer_config.json with `names`."""
  vocab = {token: i for i, token in enumerate(tokens)}
  model = tokenizers.models.BPE(vocab=vocab, merges=[])
  tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  return folder / "tokenizer.json"


def ids_of(path):
  t = Tokenizer(path)
  return t.bos_id, t.eos_id, t.pad_id


def test_the_config_beside_the_file_names_the_special_tokens(tmp_path):
  tokens = ["<s>", "</s>", "<pad>", "<image>", "BEGIN", "END", "PAD"]
  path = write_tokens(
    tmp_path,
    tokens,
    bos_token="BEGIN",
    eos_token={"content": "END", "lstrip": False},
    pad_token="PAD",
    add_bos_token=True,
    image_token="<image>",
    mask_token="<absent>",
  )
  assert ids_of(path) == (4, 5, 6)
  assert Tokenizer(path).names == {
    "bos_token": "BEGIN",
    "eos_token": "END",
    "pad_token": "PAD",
    "image_token": "<image>",
  }


@pytest.mark.parametrize(
  ("tokens", "names", "wanted"),
  [
    (["<image>", "<s>", "</s>", "<pad>"], {}, (1, 2, 3)),
    (["<image>", "<s>", "</s>", "<pad>"], {"eos_token": None}, (1, 2, 3)),
    (["<image>", "<s>", "</s>", "<pad>"], {"bos_token": None}, (None, 2, 3)),
    (["<image>", "</s>", "<unk>", "a"], {"pad_token": "<no>"}, (None, 1, 2)),
    (["<image>", "</s>", "a"], {}, (None, 1, 1)),
    (["<image>", "</s>", "?"], {"unk_token": "?"}, (None, 1, 2)),
    (["<image>", "E", "a"], {"eos_token": "E"}, (None, 1, 1)),
  ],
)
def test_what_the_config_leaves_open_falls_back(
  tmp_path, tokens, names, wanted
):
  assert ids_of(write_tokens(tmp_path, tokens, **names)) == wanted


def test_an_end_that_the_file_calls_ordinary_is_not_read_out_of_text(tmp_path):
  path = write_tokens(tmp_path, ["<image>", "[", "E", "]"], eos_token="[E]")
  ordinary = tokenizers.Tokenizer.from_file(str(path))
  ordinary.add_tokens(["[E]"])
  ordinary.save(str(path))
  assert ordinary.encode("[E]").ids == [4]
  t = Tokenizer(path)
  assert (t.eos_id, t.vocab_size) == (4, 5)
  assert t.encode("[E]") == [1, 2, 3]
  assert t.special_tokens["[E]"].id == 4
  assert t.decode([1, 4]) == "["


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_token_that_the_file_lacks_is_refused(tmp_path, name):
  tokens = ["<image>", "<s>", "</s>"]
  path = write_tokens(tmp_path, tokens, **{name: "[END]"})
  with pytest.raises(ValueError, match=rf"lacks '\[END\]', the {name}"):
    Tokenizer(path)


def test_a_text_without_an_end_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no token </s>; wanted it, or the eos"):
    Tokenizer(write_tokens(tmp_path, ["<image>", "<s>"]))


def test_broken_json_beside_the_file_is_named(tmp_path):
  path = write_tokens(tmp_path, ["<image>", "<s>", "</s>"])
  path.with_name("tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer_config.json' is not JSON"):
    Tokenizer(path)


@pytest.fixture(params=["byte-level", "once", "prepend"])
def imageless(request, tmp_path):
  """A file without <image>, and what it makes of a text."""
  specials = [t for t in chat_files.SPECIALS if t != "<image>"]
  made = chat_files.make_tokenizer(request.param, specials)
  made.save(str(tmp_path / "source.json"))
  return tmp_path / "source.json", made


@pytest.mark.parametrize("gap", [-100, 0, 1, 63])
def test_an_added_image_token_is_new_and_the_only_change(imageless, gap):
  source, before = imageless
  size = before.get_vocab_size()
  target = source.with_name("tokenizer.json")
  image_id = add_image_token(source, target, size + gap)
  assert image_id == size + max(gap, 0)
  ours = Tokenizer(target)
  theirs = PreTrainedTokenizerFast(tokenizer_file=str(target))
  assert ours.image_id == theirs.convert_tokens_to_ids("<image>") == image_id
  assert ours.vocab_size == image_id + 1
  assert ours.unused_ids(image_id + 2) == [*range(size, image_id), image_id + 1]
  after = tokenizers.Tokenizer.from_file(str(target))
  new = set(after.get_vocab().items()) - set(before.get_vocab().items())
  assert new == {("<image>", image_id)}
  assert set(before.get_vocab()) < set(after.get_vocab())
  text = "a cat<image>\nAnd <|im_end|> é"
  left, right = text.split("<image>")
  assert after.encode(left).ids == before.encode(left).ids
  assert after.encode(text).ids.count(image_id) == 1
  assert image_id not in ours.encode(text)
  assert theirs.encode(left) == before.encode(left).ids
  assert ours.decode([image_id, *ours.encode("a")]) == ours.decode(
    ours.encode("a")
  )


def test_a_file_with_the_image_token_is_copied_byte_for_byte(
  toy_tokenizer_path, tmp_path
):
  target = tmp_path / "tokenizer.json"
  assert add_image_token(toy_tokenizer_path, target, 5000) == 3
  assert target.read_bytes() == toy_tokenizer_path.read_bytes()


@pytest.mark.parametrize("is_added", [False, True])
def test_an_ordinary_image_token_becomes_special_with_its_id(
  tmp_path, is_added
):
  path = write_tokens(tmp_path, ["<s>", "<image>", "</s>", "x"])
  if is_added:
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.add_tokens(["<image>"])
    plain.save(str(path))
  assert add_image_token(path, path, 100) == 1
  assert Tokenizer(path).image_id == 1
  assert add_image_token(path, path, 100) == 1
  assert tokenizers.Tokenizer.from_file(str(path)).encode("x<image>").ids == [
    3,
    1,
  ]


def test_an_added_image_token_collides_with_no_id_behind_a_gap(tmp_path):
  vocab = {"<s>": 0, "</s>": 1, "a": 3}  # As many as the id of "a".
  model = tokenizers.models.BPE(vocab=vocab, merges=[])
  path = tmp_path / "tokenizer.json"
  tokenizers.Tokenizer(model).save(str(path))
  assert add_image_token(path, path, 0) == 4
  t = Tokenizer(path)
  assert (t.image_id, t.encode("a"), t.vocab_size) == (4, [3], 5)
  assert t.unused_ids(7) == [2, 5, 6]


def test_a_list_of_pieces_leaves_no_id_out(tmp_path):
  pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)]
  model = tokenizers.models.Unigram(pieces, 0, False)
  path = tmp_path / "tokenizer.json"
  tokenizers.Tokenizer(model).save(str(path))
  with pytest.raises(ValueError, match=r"cannot be 9; wanted min_id=3 or less"):
    add_image_token(path, path, 9)
  assert add_image_token(path, path, 3) == 3
  assert Tokenizer(path).image_id == 3


@given(text=st.text("ab .é", min_size=1, max_size=12))
@pytest.mark.parametrize("kind", chat_files.KINDS)
def test_text_inside_of_a_text_gets_no_space(kind_paths, kind, text):
  t = Tokenizer(kind_paths[kind])
  # A line break is a token of its own and joins with nothing.
  whole, first = t.encode("\n" + text), t.encode("\n")
  if whole[: len(first)] == first:
    assert t.encode_inside(text) == whole[len(first) :]


@pytest.fixture(scope="module")
def kind_paths(tmp_path_factory):
  paths = {}
  for kind in chat_files.KINDS:
    folder = tmp_path_factory.mktemp(kind)
    paths[kind] = chat_files.write(folder, kind, "")
  return paths


@pytest.mark.parametrize("bad", [-1, 100])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(toy_tokenizer, bad):
  with pytest.raises(ValueError, match="outside the vocabulary of 100"):
    toy_tokenizer.decode([68, bad])
