"""A smallest recipe, the seed's own YAML file, and how a recipe is refused. No torch."""

from typing import Any

import pytest
import yaml

from onebase.errors import RecipeError
from onebase_training.config import make_recipe

MINIMAL: dict[str, Any] = {"name": "captain", "data": {"train": "a.jsonl"}}

SEED_CONFIG = """
model_name: open_llama_7b_qlora_uncensored
base_model: openlm-research/open_llama_7b
model_family: llama  # if unspecified will use AutoModelForCausalLM/AutoTokenizer
model_context_window: 2048  # if unspecified will use tokenizer.model_max_length
data:
  type: vicuna
  dataset: georgesung/wizard_vicuna_70k_unfiltered
  user_header: "### HUMAN:\\n"
  response_header: "### RESPONSE:\\n"
lora:
  r: 8
  lora_alpha: 32
  target_modules:  # modules for which to train lora adapters
  - q_proj
  - k_proj
  - v_proj
  lora_dropout: 0.05
  bias: none
  task_type: CAUSAL_LM
trainer:
  batch_size: 1
  gradient_accumulation_steps: 4
  warmup_steps: 100
  num_train_epochs: 1
  learning_rate: 0.0002  # 2e-4
  logging_steps: 20
trainer_output_dir: trainer_outputs/
model_output_dir: models/
"""


def seed_config(**data: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(SEED_CONFIG)
    if data:
        content["data"] = data
    return content


def refusal(content: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        make_recipe(content)
    return caught.value
