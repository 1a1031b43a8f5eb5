"""Small random models of Transformers, every parameter random."""

import shutil

import torch
import transformers

from mole_jax.data import tokenizer

VISION = dict(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=12,
  patch_size=4,
)
TEXT = dict(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  rms_norm_eps=1e-5,
  rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)
IMAGE_TOKEN = 49


def randomise(model, seed=0):
  """Draws every parameter, those that start as ones and zeros too."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0))
  return model.eval()


def make_llava(feature_layer=-2, **text):
  """A LLaVA of Transformers in float32."""
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**VISION),
    text_config=transformers.LlamaConfig(**(TEXT | text)),
    image_token_index=IMAGE_TOKEN,
    image_seq_length=9,
    vision_feature_layer=feature_layer,
  )
  config._attn_implementation = "eager"
  return randomise(transformers.LlavaForConditionalGeneration(config))


def save_for_embedded_data(folder):
  """A random LLaVA with the tokenizer of the embedded data."""
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**VISION),
    text_config=transformers.LlamaConfig(**(TEXT | {"vocab_size": 1152})),
    image_token_index=3,
  )
  model = transformers.LlavaForConditionalGeneration(config)
  randomise(model).save_pretrained(folder)
  shutil.copyfile(tokenizer.EMBEDDED_TOKENIZER, folder / "tokenizer.json")
