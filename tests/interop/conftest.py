"""A LLaVA of Transformers, and its folder, for the tests of both directions."""

import pytest
import torch

from tests.interop import torch_models


@pytest.fixture(scope="module")
def model():
  torch.set_num_threads(1)
  return torch_models.make_llava()


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("hf") / "llava"
  model.save_pretrained(folder)
  torch_models.write_tokenizer(folder)
  return folder
