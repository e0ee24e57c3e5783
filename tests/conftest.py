# SPDX-License-Identifier: Apache-2.0
"""The world the tests live in, built in the process: tokenizers and models of two layers."""

import gc
import os

gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from thinkfusion import install_chat_template
from thinkfusion.checkpointing import tiny_base_path

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Look for garbage in what tests make only: every training does, for half a second in all that is imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def base_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded base's tokenizer, without any control token."""
    return AutoTokenizer.from_pretrained(tiny_base_path())


@pytest.fixture
def tokenizer(base_tokenizer) -> PreTrainedTokenizerFast:
    """The same with the `control` template installed."""
    install_chat_template(base_tokenizer)
    return base_tokenizer


def tiny_model(*, tied: bool = True, seed: int = 0) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE of two layers that fits the embedded tokenizer."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_models():
    """The maker of tiny models, for tests that need several."""
    return tiny_model


@pytest.fixture
def write(tmp_path):
    """Writes text or bytes into a file of the test's own folder, and returns its path."""

    def write(data, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write
