"""Small random models of Transformers, every parameter random."""

import json
import shutil

import numpy as np
import tokenizers
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
# Other decoders: configuration, model, and in what they differ from TEXT.
DECODERS = {
  "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {}),
  "qwen2": (
    transformers.Qwen2Config,
    transformers.Qwen2ForCausalLM,
    dict(rms_norm_eps=1e-6),
  ),
  "stablelm": (
    transformers.StableLmConfig,
    transformers.StableLmForCausalLM,
    dict(
      hidden_size=32,
      head_dim=None,
      layer_norm_eps=1e-5,
      use_qkv_bias=True,
      partial_rotary_factor=0.25,
    ),
  ),
  "phi": (
    transformers.PhiConfig,
    transformers.PhiForCausalLM,
    dict(
      hidden_size=40,
      head_dim=10,
      num_key_value_heads=4,
      layer_norm_eps=1e-5,
      partial_rotary_factor=0.4,
    ),
  ),
}
IMAGE_TOKEN = 49
DINOV2 = dict(
  hidden_size=16,
  mlp_ratio=2,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=20,
  patch_size=4,
)


def randomise(model, seed=0):
  """Draws every parameter, those that start as ones and zeros too."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0))
  return model.eval()


def tower_config(family, **changes):
  """A small tower of a family."""
  if family == "dinov2":
    return transformers.Dinov2Config(**(DINOV2 | changes))
  kinds = {
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
  }
  return kinds[family](**(VISION | changes))


def text_config(kind, **changes):
  """A small decoder's configuration: "llama", or one of DECODERS."""
  if kind == "llama":
    return transformers.LlamaConfig(**(TEXT | changes))
  make, _, own = DECODERS[kind]
  values = {k: v for k, v in (TEXT | own | changes).items() if v is not None}
  rope = dict(TEXT["rope_parameters"])
  share = values.pop("partial_rotary_factor", None)
  if share is not None:
    rope["partial_rotary_factor"] = share
    del values["rms_norm_eps"]
  return make(**(values | {"rope_parameters": rope}))


def make_llava(feature_layer=-2, family="clip", vision=None, **text):
  """A LLaVA of Transformers in float32; `vision` changes its tower."""
  config = transformers.LlavaConfig(
    vision_config=tower_config(family, **(vision or {})),
    text_config=transformers.LlamaConfig(**(TEXT | text)),
    image_token_index=IMAGE_TOKEN,
    image_seq_length=9,
    vision_feature_layer=feature_layer,
    vision_feature_select_strategy="full" if family == "siglip" else "default",
  )
  config._attn_implementation = "eager"
  return randomise(transformers.LlavaForConditionalGeneration(config))


def write_tokenizer(folder, has_image=True):
  """A tokenizer.json of 49 characters and, at IMAGE_TOKEN, `<image>`."""
  characters = [chr(i) for i in range(65, 65 + IMAGE_TOKEN - 4)]
  vocab = {
    token: i
    for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *characters])
  }
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  images = ["<image>"] if has_image else []
  made.add_special_tokens(["<unk>", "<s>", "</s>", *images])
  made.save(str(folder / "tokenizer.json"))


def save_for_embedded_data(folder):
  """A random LLaVA with the tokenizer of the embedded data."""
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**VISION),
    text_config=transformers.LlamaConfig(**(TEXT | {"vocab_size": 1152})),
    image_token_index=3,
  )
  model = transformers.LlavaForConditionalGeneration(config)
  randomise(model).save_pretrained(folder)
  copy_embedded_tokenizer(folder)


def copy_embedded_tokenizer(folder):
  """Of a vocabulary of 1,152, with `<image>`."""
  shutil.copyfile(tokenizer.EMBEDDED_TOKENIZER, folder / "tokenizer.json")


def make_batch(image_token=3, num_image_tokens=9, seed=0):
  """A row of text and one with an image, without padding: ids, pixels."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(4, 900, (2, num_image_tokens + 7))
  ids[1, 2 : 2 + num_image_tokens] = image_token
  side = VISION["image_size"]
  return ids, rng.normal(size=(1, side, side, 3)).astype(np.float32)


def logits_of(model, ids, pixels):
  """What a model of PyTorch answers to such a batch."""
  with torch.no_grad():
    return model(
      input_ids=torch.from_numpy(ids),
      pixel_values=to_torch(pixels),
    ).logits.numpy()


def to_torch(pixels):
  """[N, Y, X, 3] -> [N, 3, Y, X]."""
  return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def assert_close(ours, theirs, rtol=1e-4):
  """Relative to the largest value."""
  theirs = theirs.detach().numpy() if torch.is_tensor(theirs) else theirs
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
  "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_smollm2(folder):
  """A random decoder with a byte-level tokenizer and a chat template."""
  specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(specials)
  config = transformers.LlamaConfig(
    **(TEXT | {"vocab_size": len(vocab), "tie_word_embeddings": True})
  )
  randomise(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
  made.save(str(folder / "tokenizer.json"))
  names = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  (folder / "chat_template.jinja").write_text(CHATML)


def save_dinov2(folder):
  """A random tower with patches of 14 pixels, as the real one has."""
  config = transformers.Dinov2Config(
    **(DINOV2 | {"patch_size": 14, "image_size": 70})
  )
  randomise(transformers.Dinov2Model(config)).save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(
    json.dumps(
      {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
      }
    )
  )
