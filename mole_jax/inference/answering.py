"""Questions of a benchmark and a model's answers, with and without sight."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import rich.console
import rich.progress
from jaxtyping import Int, UInt8

from mole_jax.data import conversation, images, records
from mole_jax.inference import generator, pretrained


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
  """One question of a record; `text` is without image markers."""

  id: str
  domain: str
  kind: str
  text: str
  answer: str
  pixels: UInt8[np.ndarray, "M H W 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """What a model said to a question, seeing the image and not seeing it.

  Ids are those of the prompt and of the answer that saw; `experts` those of
  both (N = T + I), the likeliest first, zeros without a mixture. -1 marks the
  last token of an answer that was cut off: it was never routed.
  """

  text: str
  blank_text: str
  prompt_ids: Int[np.ndarray, " T"]
  answer_ids: Int[np.ndarray, " I"]
  experts: Int[np.ndarray, "L N topk"]


def read_questions(
  domain: str,
  rows: Iterable[records.Record],
  preparation: images.Preparation,
) -> list[Question]:
  """Every question of the records; each image is decoded once."""
  size = preparation.image_size
  questions = []
  for record in rows:
    decoded = [images.decode_image(b, preparation) for b in record["images"]]
    shape = (len(decoded), size, size, 3)
    pixels = np.array(decoded, np.uint8).reshape(shape)
    turns = record["turns"]
    for asked, said in zip(turns[::2], turns[1::2], strict=True):
      text = asked["value"].replace(conversation.IMAGE_MARKER, "").strip()
      questions.append(
        Question(
          record["id"], domain, asked["kind"], text, said["value"], pixels
        )
      )
  return questions


def answer(
  model: pretrained.Model,
  questions: Sequence[Question],
  batch_size: int,
  max_new_tokens: int,
  console: rich.console.Console | None = None,
) -> list[Prediction]:
  """Answers to all questions, with and without sight, greedily."""
  prompts = [_prompt(model, q) for q in questions]
  seeing = [i for i, q in enumerate(questions) if len(q.pixels)]
  blank = [_blank(model, prompts[i]) for i in seeing]
  settings = dict(
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    lengths=_padded_lengths([len(p.input_ids) for p in prompts]),
  )
  with _Progress(console, len(prompts) + len(blank)) as advance:
    answers = model.generator(prompts, on_batch=advance, **settings)
    unseeing = model.generator(blank, on_batch=advance, **settings)
  blank_answers = list(answers)  # Without an image there is nothing to hide.
  for i, said in zip(seeing, unseeing, strict=True):
    blank_answers[i] = said
  text = lambda said: model.tokenizer.decode(said.tokens).strip()
  return [
    Prediction(
      text(said),
      text(blank_said),
      prompt.input_ids,
      said.tokens,
      _experts(model, prompt, said),
    )
    for prompt, said, blank_said in zip(
      prompts, answers, blank_answers, strict=True
    )
  ]


def _experts(
  model: pretrained.Model, prompt: generator.Prompt, said: generator.Answer
) -> Int[np.ndarray, "L N topk"]:
  if said.prompt_experts is None:
    num_tokens = len(prompt.input_ids) + len(said.tokens)
    return np.zeros((model.num_layers, num_tokens, 1), np.int32)
  return np.concatenate([said.prompt_experts, said.token_experts], axis=1)


def _prompt(model: pretrained.Model, question: Question) -> generator.Prompt:
  markers = f"{conversation.IMAGE_MARKER}\n" * len(question.pixels)
  turn = {"from": "human", "value": markers + question.text}
  return model.encode_prompt([turn], question.pixels)


def _blank(
  model: pretrained.Model, prompt: generator.Prompt
) -> generator.Prompt:
  """The same prompt, its images all of the normalisation's mean colour."""
  mean = np.array(model.config["data"]["image_mean"])
  colour = np.round(255 * mean).astype(np.uint8)
  return prompt._replace(
    images=np.broadcast_to(colour, prompt.images.shape).copy()
  )


def _padded_lengths(lengths: Sequence[int]) -> list[int]:
  """One or two lengths to pad to: each is a program to compile."""
  up = lambda length: -(-int(length) // 8) * 8
  return sorted({up(np.quantile(lengths, 0.9)), up(max(lengths))})


class _Progress:
  """A bar on a terminal; elsewhere one line at the end."""

  def __init__(self, console: rich.console.Console | None, total: int):
    self._console = console
    self._is_bar = console is not None and console.is_terminal
    self._total = total
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("evaluation"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("left"),
      rich.progress.TimeRemainingColumn(),
      console=console,
      disable=not self._is_bar,
    )

  def __enter__(self) -> Callable[[int], None]:
    self._began = time.perf_counter()
    self._bar.start()
    task = self._bar.add_task("", total=self._total)
    return lambda count: self._bar.advance(task, count)

  def __exit__(self, *_) -> None:
    self._bar.stop()
    if self._console is not None and not self._is_bar:
      seconds = time.perf_counter() - self._began
      self._console.print(
        f"evaluation: {self._total:,} prompts in {seconds:.0f} s"
      )
