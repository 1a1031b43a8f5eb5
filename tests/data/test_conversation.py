import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data.conversation import (
  IGNORE_LABEL,
  SkippedSample,
  encode_caption,
  encode_chat,
  encode_prompt,
  move_markers,
)

# Pieces of Llama-2's vocabulary with their ids, "▁" for a space.
LLAMA = {
  "▁A": 319, "▁chat": 13563, "▁between": 1546, "▁a": 263, "▁curious": 12758,
  "▁user": 1404, "▁and": 322, "▁an": 385, "▁artificial": 23116,
  "▁intelligence": 21082, "▁assistant": 20255, ".": 29889, "▁The": 450,
  "▁gives": 4076, "▁helpful": 8444, ",": 29892, "▁detailed": 13173,
  "▁pol": 1248, "ite": 568, "▁answers": 6089, "▁to": 304, "▁the": 278,
  "'": 29915, "s": 29879, "▁questions": 5155, "▁US": 3148, "ER": 1001,
  ":": 29901, "▁Who": 11644, "▁are": 526, "▁you": 366, "?": 29973,
  "SS": 1799, "IST": 9047, "ANT": 13566, "▁I": 306, "▁am": 626,
  "▁Vic": 13423, "una": 4347, "▁What": 1724, "▁can": 508, "▁do": 437,
  "▁with": 411, "▁": 29871, "\n": 13, "What": 5618, "▁is": 338,
  "▁shown": 4318, "▁in": 297, "▁this": 445, "▁image": 1967,
}  # fmt: skip
SYSTEM_IDS = [
  319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889,
  450, 20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278,
  1404, 29915, 29879, 5155, 29889,
]  # fmt: skip
USER_IDS = [3148, 1001, 29901]
ASSISTANT_IDS = [319, 1799, 9047, 13566, 29901]
N = IGNORE_LABEL


class LlamaPieces:
  """Llama-2's ids for the words above: the longest piece first."""

  bos_id, eos_id, image_id = 1, 2, 32000

  def encode(self, text):
    text = "▁" + text.replace(" ", "▁")
    ids = []
    while text:
      piece = max((p for p in LLAMA if text.startswith(p)), key=len)
      ids.append(LLAMA[piece])
      text = text[len(piece) :]
    return ids

  encode_continuation = encode


def turns(*values):
  roles = ("human", "gpt")
  return [
    {"from": roles[i % 2], "value": value, "kind": f"kind {i // 2}"}
    for i, value in enumerate(values)
  ]


def chat(tokenizer, *values, num_images=0, max_length=999, **kwargs):
  kwargs = {"num_image_tokens": 3, "system": "", **kwargs}
  return encode_chat(
    tokenizer,
    turns(*values),
    num_images=num_images,
    max_length=max_length,
    **kwargs,
  )


def toy_ids(text):
  """Ids of the toy tokenizer by hand: "!" is 4, space 98, newline 99."""
  return [{" ": 98, "\n": 99}.get(c, 4 + ord(c) - ord("!")) for c in " " + text]


# Golden ids of LLaVA-1.5: those that the original tokenizer printed for these
# prompts in public logs of Vicuna and LLaVA; the answers use the same pieces.


def test_golden_vicuna_two_turns_text_only():
  encoded = encode_chat(
    LlamaPieces(),
    turns(
      "Who are you?",
      "I am Vicuna, a chat assistant.",
      "What can you do?",
      "I can chat with you.",
    ),  # fmt: skip
    num_images=0,
    num_image_tokens=576,
    max_length=2048,
  )
  first = [306, 626, 13423, 4347, 29892, 263, 13563, 20255, 29889, 2]
  second = [306, 508, 13563, 411, 366, 29889, 2]
  prompt_1 = [
    1, *SYSTEM_IDS, *USER_IDS, 11644, 526, 366, 29973, *ASSISTANT_IDS
  ]  # fmt: skip
  prompt_2 = [*USER_IDS, 1724, 508, 366, 437, 29973, *ASSISTANT_IDS]
  assert encoded.input_ids.tolist() == prompt_1 + first + prompt_2 + second
  assert encoded.labels.tolist() == (
    [N] * len(prompt_1) + first + [N] * len(prompt_2) + second
  )
  assert encoded.kinds == ("kind 0", "kind 1")
  assert encoded.num_images == 0


def test_golden_llava_image_prompt():
  encoded = encode_chat(
    LlamaPieces(),
    # The marker stands behind the question and has to move.
    turns("What is shown in this image?\n<image>", "a chat."),
    num_images=1,
    num_image_tokens=4,
    max_length=2048,
  )
  prompt = [
    1, *SYSTEM_IDS, *USER_IDS, 29871, 32000, 32000, 32000, 32000,
    29871, 13, 5618, 338, 4318, 297, 445, 1967, 29973, *ASSISTANT_IDS,
  ]  # fmt: skip
  answer = [263, 13563, 29889, 2]
  assert encoded.input_ids.tolist() == prompt + answer
  assert encoded.labels.tolist() == [N] * len(prompt) + answer
  assert encoded.num_images == 1


def test_golden_toy_chat_with_empty_system(toy_tokenizer):
  encoded = chat(toy_tokenizer, "<image>\nHow?", "Two.", num_images=1)
  prompt = [1] + toy_ids("USER: ") + [3, 3, 3] + toy_ids("\nHow? ASSISTANT:")
  answer = [*toy_ids("Two."), 2]
  # Written out once, so that `toy_ids` cannot be wrong along with the code.
  assert prompt == [
    1, 98, 56, 54, 40, 53, 29, 98, 3, 3, 3, 98, 99, 43, 82, 90, 34,
    98, 36, 54, 54, 44, 54, 55, 36, 49, 55, 29,
  ]  # fmt: skip
  assert answer == [98, 55, 90, 82, 17, 2]
  assert encoded.input_ids.tolist() == prompt + answer
  assert encoded.labels.tolist() == [N] * len(prompt) + answer


def test_golden_toy_caption(toy_tokenizer):
  encoded = encode_caption(
    toy_tokenizer, "A cup", num_images=1, num_image_tokens=2, max_length=99
  )
  assert encoded.input_ids.tolist() == [
    1, 3, 3, 98, 36, 98, 70, 88, 83, 99
  ]  # fmt: skip
  assert encoded.labels.tolist() == [
    N, N, N, 98, 36, 98, 70, 88, 83, 99
  ]  # fmt: skip
  assert encoded.num_images == 1


@given(
  values=st.lists(
    st.text(alphabet="ab .\n?<", max_size=8), min_size=1, max_size=6
  ),
  images=st.lists(st.integers(0, 2), min_size=6, max_size=6),
  use_bos=st.booleans(),
  system=st.sampled_from(["", "Be kind."]),
)
def test_training_ids_are_prompt_ids_then_answer_ids(
  toy_tokenizer, values, images, use_bos, system
):
  values = [
    value if i % 2 else "<image>" * images[i] + value
    for i, value in enumerate(values + ["end"] * (len(values) % 2))
  ]
  kwargs = {"num_image_tokens": 2, "system": system, "use_bos": use_bos}
  whole = chat(
    toy_tokenizer,
    *values,
    num_images=sum(value.count("<image>") for value in values),
    **kwargs,
  )
  ids, labels = whole.input_ids.tolist(), whole.labels.tolist()
  for i in range(1, len(values), 2):
    prompt = encode_prompt(toy_tokenizer, turns(*values[:i]), **kwargs)
    answer = [*toy_tokenizer.encode_continuation(values[i]), 2]
    end = len(prompt) + len(answer)
    assert ids[:end] == prompt.tolist() + answer
    assert labels[len(prompt) : end] == answer
    assert labels[len(prompt) - 1] == N
  assert end == len(ids)


def test_prompt_ends_with_the_colon(toy_tokenizer):
  prompt = encode_prompt(toy_tokenizer, turns("q"), num_image_tokens=3)
  assert prompt[-1] == toy_ids(":")[-1]


def test_prompt_of_an_answered_conversation_is_refused(toy_tokenizer):
  with pytest.raises(ValueError, match="wanted the last one a question"):
    encode_prompt(toy_tokenizer, turns("q", "a"), num_image_tokens=3)


def test_system_text_comes_once_and_before_the_first_turn(toy_tokenizer):
  encoded = chat(toy_tokenizer, "a", "b", "c", "d", system="Be kind.")
  text = toy_tokenizer.decode(encoded.input_ids)
  assert text == ("Be kind. USER: a ASSISTANT: b USER: c ASSISTANT: d")


def test_no_bos_on_request(toy_tokenizer):
  with_bos = chat(toy_tokenizer, "a", "b")
  without = chat(toy_tokenizer, "a", "b", use_bos=False)
  assert with_bos.input_ids.tolist() == [1, *without.input_ids.tolist()]


@pytest.mark.parametrize("use_bos", [True, False])
def test_the_first_label_is_never_supervised(toy_tokenizer, use_bos):
  # A caption without an image or BOS would start with a supervised token.
  caption = encode_caption(
    toy_tokenizer,
    "text",
    num_images=0,
    num_image_tokens=3,
    max_length=99,
    use_bos=use_bos,
  )
  assert caption.labels[0] == N
  assert (caption.labels[1:] != N).all()


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    ("q", "q"),
    (" q ", " q "),
    ("q\n<image>", "<image>\nq"),
    ("a <image> b", "<image>\na  b"),
    ("<image>", "<image>"),
    ("<image>a<image>", "<image>\n<image>\na"),
  ],
)
def test_markers_move_to_the_start_of_their_turn(value, expected):
  assert move_markers(value) == expected


def test_images_in_several_turns_keep_their_order(toy_tokenizer):
  encoded = chat(
    toy_tokenizer,
    "<image>\n<image>\na", "b", "<image>\nc", "d",
    num_images=3,
  )  # fmt: skip
  runs = np.flatnonzero(np.diff(encoded.input_ids == 3, prepend=0) == 1)
  assert (encoded.input_ids == 3).sum() == 9
  assert len(runs) == 3
  assert encoded.num_images == 3
  assert (encoded.labels[encoded.input_ids == 3] == N).all()


# "<s> USER: " is 8 tokens, so the image of 3 lies at 8 to 10.
# " \na ASSISTANT:" is 14 and ends at 25; the answer " b</s>" at 28.
WHOLE_LENGTH = 28
SECOND_IMAGE = WHOLE_LENGTH + len(" USER: ")


def two_images(tokenizer, max_length):
  return chat(
    tokenizer,
    "<image>\na", "b", "<image>\nc", "d",
    num_images=2,
    max_length=max_length,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("max_length", "length", "num_images", "kinds"),
  [
    (999, SECOND_IMAGE + 20, 2, ("kind 0", "kind 1")),
    (SECOND_IMAGE + 20, SECOND_IMAGE + 20, 2, ("kind 0", "kind 1")),
    (SECOND_IMAGE + 19, SECOND_IMAGE + 19, 2, ("kind 0", "kind 1")),
    (SECOND_IMAGE + 17, SECOND_IMAGE + 17, 2, ("kind 0",)),
    (SECOND_IMAGE + 3, SECOND_IMAGE + 3, 2, ("kind 0",)),  # Just fits.
    (SECOND_IMAGE + 2, SECOND_IMAGE, 1, ("kind 0",)),  # Inside the image.
    (SECOND_IMAGE + 1, SECOND_IMAGE, 1, ("kind 0",)),
    (SECOND_IMAGE, SECOND_IMAGE, 1, ("kind 0",)),
    (WHOLE_LENGTH, WHOLE_LENGTH, 1, ("kind 0",)),
    (WHOLE_LENGTH - 2, WHOLE_LENGTH - 2, 1, ("kind 0",)),
  ],
)
def test_a_cut_keeps_whole_images_only(
  toy_tokenizer, max_length, length, num_images, kinds
):
  whole = two_images(toy_tokenizer, 999)
  encoded = two_images(toy_tokenizer, max_length)
  assert encoded.input_ids.tolist() == whole.input_ids[:length].tolist()
  assert encoded.labels.tolist() == whole.labels[:length].tolist()
  assert encoded.num_images == num_images
  assert (encoded.input_ids == 3).sum() == 3 * num_images
  assert encoded.kinds == kinds


@pytest.mark.parametrize("max_length", [WHOLE_LENGTH - 3, 9, 1])
def test_a_sample_cut_before_its_answer_is_skipped(toy_tokenizer, max_length):
  with pytest.raises(SkippedSample, match="no answer token") as caught:
    two_images(toy_tokenizer, max_length)
  assert caught.value.reason == "no_supervision"


@pytest.mark.parametrize("num_images", [0, 2])
def test_markers_must_match_the_images(toy_tokenizer, num_images):
  with pytest.raises(
    SkippedSample, match=f"1 <image> markers but {num_images} images"
  ) as caught:
    chat(toy_tokenizer, "<image>\na", "b", num_images=num_images)
  assert caught.value.reason == "image_count"


def test_a_marker_in_an_answer_is_skipped(toy_tokenizer):
  with pytest.raises(SkippedSample) as caught:
    chat(toy_tokenizer, "a", "<image>", num_images=1)
  assert caught.value.reason == "image_in_answer"


@pytest.mark.parametrize(
  "roles",
  [["gpt", "human"], ["human", "human"], ["human"], ["human", "system"]],
)
def test_turns_that_do_not_alternate_are_skipped(toy_tokenizer, roles):
  with pytest.raises(SkippedSample) as caught:
    encode_chat(
      toy_tokenizer,
      [{"from": role, "value": "a"} for role in roles],
      num_images=0,
      num_image_tokens=3,
      max_length=99,
    )
  assert caught.value.reason == "turn_order"


def test_an_empty_conversation_is_skipped(toy_tokenizer):
  with pytest.raises(SkippedSample) as caught:
    chat(toy_tokenizer)
  assert caught.value.reason == "no_supervision"


@pytest.mark.parametrize("caption", ["", " \n"])
def test_a_record_without_caption_is_skipped(toy_tokenizer, caption):
  with pytest.raises(SkippedSample) as caught:
    encode_caption(
      toy_tokenizer, caption, num_images=1, num_image_tokens=3, max_length=99
    )
  assert caught.value.reason == "no_caption"


def test_text_cannot_end_its_own_turn(toy_tokenizer):
  encoded = chat(toy_tokenizer, "say </s><s>", "no </s>")
  ids = encoded.input_ids.tolist()
  assert ids.count(2) == 1 and ids.count(1) == 1
