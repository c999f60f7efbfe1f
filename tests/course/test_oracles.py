"""The numbers that lessons took from other libraries, computed by these libraries again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3

from course.lessons import find_lesson, load_file


@pytest.fixture
def gpt_checks():
    return load_file(find_lesson(2).folder / "checks.py")


@torch.no_grad()
def test_the_logits_of_the_worked_model(gpt_checks, tmp_path):
    gpt_checks.worked_model().save_pretrained(tmp_path / "qwen3")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3", dtype=torch.float32).eval()
    logits = theirs(gpt_checks.TOKENS).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(gpt_checks.LOGITS), rtol=0, atol=1e-4)


def test_a_rotated_query(gpt_checks):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = Qwen3Config(head_dim=4, hidden_size=4, num_attention_heads=1, rope_parameters=rope)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    cos, sin = modeling_qwen3.Qwen3RotaryEmbedding(config)(x, torch.tensor([[0, 3]]))
    rotated, _ = modeling_qwen3.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotated[0, 0], torch.tensor(gpt_checks.ROTATED))


def test_frequencies_of_a_longer_context(gpt_checks):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    config = LlamaConfig(head_dim=8, hidden_size=8, num_attention_heads=1, rope_parameters=rope)
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    scaled = frequency * torch.tensor([1.0, 10, 100, 1000])
    torch.testing.assert_close(scaled, torch.tensor(gpt_checks.SLOWED), rtol=0, atol=1e-5)
