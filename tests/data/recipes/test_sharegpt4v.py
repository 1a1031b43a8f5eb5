from mole_jax.data.recipes import sharegpt4v

# Made up, in the words and the nesting of the two files.
CAPTION = {
  "id": "000000000009",
  "image": "coco/train2017/000000000009.jpg",
  "conversations": [
    {"from": "human", "value": "What do you see?\n<image>"},
    {"from": "gpt", "value": "The image shows four boxes of food."},
  ],
}
SAM = {
  "id": "sa_545504",
  "image": "sam/images/sa_545504.jpg",
  "conversations": [
    {"from": "human", "value": "<image>\nDescribe the scene."},
    {"from": "gpt", "value": "In the center stands a building."},
    {"from": "human", "value": "Of what?"},
    {"from": "gpt", "value": "Of brick."},
  ],
}
TEXT = {
  "id": "wgByO4Y_0",
  "conversations": [
    {"from": "human", "value": "Say hello."},
    {"from": "gpt", "value": "Hello."},
  ],
}


def test_a_caption_of_the_pretraining_file(read, said):
  (sample,) = read(sharegpt4v.PRETRAIN, [CAPTION], "array", [CAPTION["image"]])
  assert said(sample) == [
    ("human", "What do you see?\n<image>"),
    ("gpt", "The image shows four boxes of food."),
  ]
  assert sample.source == "coco/train2017/000000000009.jpg"


def test_conversations_and_texts_of_the_finetuning_file(read, said):
  about_sam, text = read(
    sharegpt4v.FINETUNE, [SAM, TEXT], "array", [SAM["image"]]
  )
  assert said(about_sam) == [
    ("human", "<image>\nDescribe the scene."),
    ("gpt", "In the center stands a building."),
    ("human", "Of what?"),
    ("gpt", "Of brick."),
  ]
  assert about_sam.images[0].path == read.folder / "sam/images/sa_545504.jpg"
  assert said(text) == [("human", "Say hello."), ("gpt", "Hello.")]
  assert (text.images, text.source) == ([], "wgByO4Y_0")


def test_a_picture_that_was_not_downloaded_is_a_problem(read):
  missing, text = read(
    sharegpt4v.FINETUNE, [SAM, TEXT], on_disk=["sam/images/other.jpg"]
  )
  assert missing.reason == "image_missing"
  assert "'sam/images/sa_545504.jpg' is not in" in missing.message
  assert text.id == "wgByO4Y_0"
