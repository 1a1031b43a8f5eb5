import numpy as np

from mole_jax.data.builders.llava_json import samples
from mole_jax.data.recipes import llava_mix665k
from tests.data.builders import llava_files, prepared_input

# Made up, in the words and the nesting of llava_v1_5_mix665k.json.
COCO = {
  "id": "000000033471",
  "image": "coco/train2017/000000033471.jpg",
  "conversations": [
    {"from": "human", "value": "<image>\nWhat colour is the bus?"},
    {"from": "gpt", "value": "White and red."},
    {"from": "human", "value": "Is it driving?"},
    {"from": "gpt", "value": "It is pulled off."},
  ],
}
TEXT = {
  "id": "qpYsqXz_0",
  "model": "",
  "conversations": [
    {"from": "gpt", "value": "Goodbye."},
    {"from": "human", "value": "Count to two."},
    {"from": "gpt", "value": "1 2"},
  ],
}
BOOK = {
  "id": "1437717772",
  "image": "ocr_vqa/images/1437717772.jpg",
  "conversations": [
    {"from": "human", "value": "Who wrote it?\n<image>"},
    {"from": "gpt", "value": "Jane Doe."},
  ],
}


def test_a_picture_with_two_questions_and_a_text_alone(read, said):
  coco, text = read(
    llava_mix665k.LAYOUT, [COCO, TEXT], "array", [COCO["image"]]
  )
  assert said(coco) == [
    ("human", "<image>\nWhat colour is the bus?"),
    ("gpt", "White and red."),
    ("human", "Is it driving?"),
    ("gpt", "It is pulled off."),
  ]
  assert coco.source == "coco/train2017/000000033471.jpg"
  # As LLaVA does it, what comes before the first question is left out.
  assert said(text) == [("human", "Count to two."), ("gpt", "1 2")]
  assert (text.images, text.source) == ([], "qpYsqXz_0")


def test_a_gif_that_is_called_jpg_is_decoded(tmp_path):
  # What the docstring tells users to do with ocr_vqa.
  folder = tmp_path / "ocr_vqa" / "images"
  folder.mkdir(parents=True)
  gif = prepared_input.encode(np.zeros((4, 6, 3)), "GIF")
  (folder / "1437717772.jpg").write_bytes(gif)
  file = llava_files.write(tmp_path / "file", [BOOK], "array")
  (sample,) = samples.read_samples(file, tmp_path, layout=llava_mix665k.LAYOUT)
  data = samples.load_image(sample.images[0])
  assert samples.check_image(data) == (6, 4, "GIF")


def test_one_that_keeps_its_name_is_a_problem_that_names_it(read):
  (problem,) = read(
    llava_mix665k.LAYOUT, [BOOK], on_disk=["ocr_vqa/images/1437717772.gif"]
  )
  assert problem.reason == "image_missing"
  assert "'ocr_vqa/images/1437717772.jpg'" in problem.message


def test_turns_in_the_wrong_order_are_a_problem(read):
  row = {**TEXT, "conversations": TEXT["conversations"][1:] * 2}
  row["conversations"][1:3] = row["conversations"][2:0:-1]
  (problem,) = read(llava_mix665k.LAYOUT, [row])
  assert problem.reason == "turn_order"
