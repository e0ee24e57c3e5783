# SPDX-License-Identifier: Apache-2.0
"""Installing the chat template: control tokens, embeddings, switches, what is saved and how replies are parsed."""

import pytest
import torch
from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.families import EOS, bare_tokenizer, family_tokenizer
from thinkfusion import Mode, chat_template, install_chat_template
from thinkfusion.chat_templates import installed_template, recognise_dialect
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.dialects import DIALECTS

CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ASK = [{"role": "user", "content": "Hi"}]


def prompt(tokenizer, messages=ASK, **switches) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)


def test_missing_control_tokens_are_added_as_single_tokens(base_tokenizer):
    assert not set(CONTROL) & set(base_tokenizer.get_vocab())
    added = install_chat_template(base_tokenizer)
    assert base_tokenizer.convert_ids_to_tokens(added) == CONTROL
    assert base_tokenizer("a</think>b", add_special_tokens=False)["input_ids"].count(added[3]) == 1
    # Servers decode without special tokens and then look for the tags.
    assert base_tokenizer.decode([added[2], added[3], added[1]], skip_special_tokens=True) == "<think></think>"
    assert install_chat_template(base_tokenizer) == []


def test_tokens_that_are_there_are_kept(base_tokenizer):
    base_tokenizer.add_tokens(["<think>", "</think>"])
    before = base_tokenizer.convert_tokens_to_ids("</think>")
    added = install_chat_template(base_tokenizer)
    assert base_tokenizer.convert_ids_to_tokens(added) == CONTROL[:2]
    assert base_tokenizer.convert_tokens_to_ids("</think>") == before


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_and_begin_at_the_mean(base_tokenizer, tiny_models, tied):
    model = tiny_models(tied=tied)
    old = [model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()]
    added = install_chat_template(base_tokenizer, model)
    for before, layer in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert layer.weight.shape[0] == 1088
        assert torch.equal(layer.weight[:1024], before)
        torch.testing.assert_close(layer.weight[added], before.mean(0).expand(4, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 1088


def test_spare_rows_are_used_before_new_ones(base_tokenizer, model):
    model.resize_token_embeddings(1100)
    added = install_chat_template(base_tokenizer, model)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 1100
    torch.testing.assert_close(weight[added], weight[:1024].mean(0).expand(4, -1))


def test_end_of_turn_ends_a_generation_and_padding_is_another_token(base_tokenizer, model):
    install_chat_template(base_tokenizer, model)
    end, old = base_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert base_tokenizer.eos_token_id == end
    assert base_tokenizer.pad_token_id == old
    assert model.generation_config.eos_token_id == [end, old]
    assert model.config.eos_token_id == end
    assert model.generation_config.pad_token_id == model.config.pad_token_id == old


def test_a_padding_token_is_added_where_there_is_none(base_tokenizer):
    base_tokenizer.pad_token = None
    base_tokenizer.eos_token = None
    added = install_chat_template(base_tokenizer)
    assert base_tokenizer.pad_token == "<|pad|>"
    assert base_tokenizer.pad_token_id in added
    assert base_tokenizer.pad_token_id != base_tokenizer.eos_token_id


def test_hard_switch_and_its_other_name(tokenizer):
    for name in ("enable_thinking", "thinking"):
        for value in (True, "true", "True"):
            assert prompt(tokenizer, **{name: value}).endswith("<|im_start|>assistant\n<think>")
        for value in (False, "false", "False"):
            assert prompt(tokenizer, **{name: value}).endswith("<|im_start|>assistant\n</think>")
        assert prompt(tokenizer, **{name: None}) == prompt(tokenizer)
        with pytest.raises(TemplateError, match="enable_thinking must be true or false"):
            prompt(tokenizer, **{name: "maybe"})
    assert prompt(tokenizer, enable_thinking=False, thinking=True).endswith("</think>")


@pytest.mark.parametrize("default", list(Mode))
def test_the_default_mode_is_saved_with_the_template(base_tokenizer, tmp_path, default):
    install_chat_template(base_tokenizer, default_mode=default)
    base_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt(again).endswith("<think>" if default is Mode.THINKING else "</think>")
    assert prompt(again, enable_thinking=True).endswith("<think>")
    assert again.eos_token == "<|im_end|>"
    assert again.response_template == base_tokenizer.response_template


SOFT = [
    ([("user", "Hi /no_think")], "</think>"),
    ([("user", "Hi\n/no_think")], "</think>"),
    ([("user", "Hi\n/no_think\n")], "</think>"),
    ([("user", "/no_think")], "</think>"),
    ([("system", "Be brief.\n/no_think"), ("user", "Hi")], "</think>"),
    ([("system", "Be brief.\n/no_think"), ("user", "Hi /think")], "<think>"),
    ([("user", "Hi /no_think"), ("assistant", "Yo"), ("user", "And?")], "</think>"),
    ([("user", "Hi /no_think"), ("assistant", "Yo /think"), ("user", "And? /think")], "<think>"),
    ([("user", "Hi /no_think please")], "<think>"),
    ([("user", "a/no_think")], "<think>"),
    ([("user", "Hi"), ("assistant", "/no_think"), ("user", "Hi")], "<think>"),
]


@pytest.mark.parametrize(("turns", "ending"), SOFT)
def test_soft_switch(tokenizer, turns, ending):
    messages = [{"role": role, "content": text} for role, text in turns]
    assert prompt(tokenizer, messages).endswith(f"assistant\n{ending}")
    # The hard switch, when given, wins.
    assert prompt(tokenizer, messages, enable_thinking=True).endswith("<think>")
    assert prompt(tokenizer, messages, thinking=False).endswith("</think>")


def test_the_soft_switch_is_not_shown_to_the_model(tokenizer):
    bare = prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *ASK], enable_thinking=False)
    soft = [{"role": "system", "content": "Be brief. /think"}, {"role": "user", "content": "Hi \n /no_think "}]
    assert prompt(tokenizer, soft) == bare


def test_a_raw_reply_in_the_history_is_shown_without_its_reasoning(tokenizer):
    raw = [*ASK, {"role": "assistant", "content": "Let me see.</think>\n\nYo"}, *ASK]
    fields = [*ASK, {"role": "assistant", "content": "Yo", "reasoning_content": "Let me see."}, *ASK]
    plain = [*ASK, {"role": "assistant", "content": "Yo"}, *ASK]
    assert prompt(tokenizer, raw) == prompt(tokenizer, fields) == prompt(tokenizer, plain)
    assert "<|im_start|>assistant\n</think>Yo<|im_end|>" in prompt(tokenizer, raw)


def test_text_parts_are_joined(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert prompt(tokenizer, parts) == prompt(tokenizer)


def test_a_system_message_in_the_middle_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="role system"):
        prompt(tokenizer, [*ASK, {"role": "system", "content": "no"}])


@pytest.mark.parametrize(
    ("switch", "reply", "expected"),
    [
        (True, "Two and two.</think>Four.<|im_end|>", {"reasoning_content": "Two and two.", "content": "Four."}),
        (False, "Four.<|im_end|>", {"content": "Four."}),
        (
            False,
            'Look:\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        ),
    ],
)
def test_transformers_parses_replies(tokenizer, switch, reply, expected):
    parsed = tokenizer.parse_response(reply, prefix=prompt(tokenizer, enable_thinking=switch))
    assert parsed["role"] == "assistant"
    assert expected.items() <= parsed.items()
    assert switch or not parsed.get("reasoning_content")


def test_a_tokenizer_that_begins_texts_with_a_token_gets_it_in_the_template(base_tokenizer):
    base_tokenizer.bos_token = "<|endoftext|>"
    base_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    install_chat_template(base_tokenizer)
    assert prompt(base_tokenizer).startswith("<|endoftext|><|im_start|>user")
    install_chat_template(base_tokenizer)  # again, with the template's own token in place
    assert prompt(base_tokenizer).startswith("<|endoftext|><|im_start|>user")


def test_slow_tokenizers_and_unknown_names_are_refused(base_tokenizer):
    with pytest.raises(ValueError, match="unknown scheme 'suffix'; choose one of control, empty-block"):
        install_chat_template(base_tokenizer, scheme="suffix")
    with pytest.raises(ValueError, match="unknown mode"):
        chat_template(default_mode="sometimes")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="slow tokenizer"):
        install_chat_template(Slow())


def test_the_embedded_base_knows_no_control_token():
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    assert tokenizer.chat_template is None
    assert set(tokenizer.get_added_vocab()) == {"<|endoftext|>"}


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_checkpoint_is_given_its_own_familys_markup(name, tiny_models):
    tokenizer = bare_tokenizer(name)
    known = set(tokenizer.get_vocab())
    model = tiny_models()
    model.config.model_type = {"mixtral": "mixtral", "olmoe": "olmoe"}.get(name, "qwen3_moe")
    added = install_chat_template(tokenizer, model)
    dialect = installed_template(tokenizer).dialect
    assert dialect.name == name
    # No family's tokens but its own: what is new is think tags and padding.
    new = set(tokenizer.get_vocab()) - known
    assert new <= {"<think>", "</think>", "<|pad|>"}
    assert new == set(tokenizer.convert_ids_to_tokens(added))
    assert ("<think>" in tokenizer.get_vocab()) == (name != "gpt_oss")
    # Whatever ends a turn ends a generation, and so does what ended one before.
    stops = tokenizer.convert_tokens_to_ids(list(dialect.stops))
    ends = model.generation_config.eos_token_id
    assert ends[: len(stops)] == stops
    assert 0 in ends
    assert len(ends) == len(set(ends))
    assert tokenizer.convert_tokens_to_ids(EOS[name]) in ends
    assert model.config.eos_token_id == tokenizer.eos_token_id == stops[0]
    assert tokenizer.pad_token_id not in stops
    # Again, and after saving, it is the same.
    assert install_chat_template(tokenizer, model) == []
    assert installed_template(tokenizer).dialect == dialect


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ bos_token }}{% for m in messages %} [INST] {{ m.content }} [/INST]{% endfor %}", "mixtral"),
        ("{{ '<|user|>\n' + m.content }}{{ '<|assistant|>\n' + m.content + eos_token }}", "olmoe"),
        ("{{ '<|user|>\\n' + m.content }}{{ '<|assistant|>\\n' + m.content + eos_token }}", "olmoe"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "chatml"),
    ],
)
def test_a_template_tells_a_family_whose_markup_is_text(base_tokenizer, template, name):
    base_tokenizer.chat_template = template
    assert recognise_dialect(base_tokenizer).name == name
    # Tokens come first: a checkpoint that was given ChatML's is a ChatML one.
    base_tokenizer.add_tokens(["<|im_start|>"])
    assert recognise_dialect(base_tokenizer).name == "chatml"


def test_a_named_dialect_wins_and_adds_no_foreign_tokens(base_tokenizer):
    before = base_tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"does not know \[?<\|start_of_role\|>.* which the dialect granite needs"):
        install_chat_template(base_tokenizer, dialect="granite")
    with pytest.raises(ValueError, match="unknown dialect 'llama'; choose one of gpt_oss, minimax_m2"):
        install_chat_template(base_tokenizer, dialect="llama")
    assert base_tokenizer.get_vocab() == before
    assert base_tokenizer.chat_template is None
    install_chat_template(base_tokenizer, dialect="mixtral")
    assert prompt(base_tokenizer, enable_thinking=True) == " [INST] Hi [/INST]<think>"
    assert base_tokenizer.eos_token == "<|endoftext|>"
    base_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends a turn with the tokenizer's own end token, and this tokenizer has none"):
        install_chat_template(base_tokenizer, dialect="olmoe")


def test_a_scheme_that_a_family_does_not_have_is_refused():
    tokenizer = bare_tokenizer("gpt_oss")
    with pytest.raises(ValueError, match=r"scheme 'empty-block': the dialect gpt_oss has none.* use 'control'"):
        install_chat_template(tokenizer, scheme="empty-block")
    assert tokenizer.chat_template is None


PREFIXES = {
    ("chatml", "control"): ("<|im_start|>assistant\n<think>", "<|im_start|>assistant\n</think>"),
    ("chatml", "empty-block"): ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("deepseek_v3", "control"): ("<｜Assistant｜><think>", "<｜Assistant｜></think>"),
    ("glm4_moe", "control"): ("<|assistant|>\n<think>", "<|assistant|>\n</think>"),
    ("glm4_moe", "empty-block"): ("<|assistant|>", "<|assistant|>\n<think></think>\n"),
    ("gpt_oss", "control"): (
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ),
    ("mixtral", "control"): (" [/INST]<think>", " [/INST]</think>"),
    ("ernie4_5", "control"): ("Assistant: <think>", "Assistant: </think>"),
}


@pytest.mark.parametrize(("name", "scheme"), PREFIXES)
def test_what_prompts_end_in(name, scheme):
    tokenizer = family_tokenizer(name, scheme)
    for switch, ending in zip((True, False), PREFIXES[name, scheme], strict=True):
        assert prompt(tokenizer, enable_thinking=switch).endswith(ending)


HISTORY_ENDS = {"gpt_oss": ("<|end|>", "<|return|>"), "ernie4_5": ("<|end_of_sentence|>", "</s>")}


@pytest.mark.parametrize("name", HISTORY_ENDS)
def test_an_answer_ends_otherwise_as_history(name):
    tokenizer = family_tokenizer(name)
    shown, written = HISTORY_ENDS[name]
    messages = [*ASK, {"role": "assistant", "content": "Yo"}]
    assert f"Yo{shown}" in prompt(tokenizer, [*messages, *ASK])
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith(f"Yo{written}")
    # A prompt shows all of it as history.
    assert f"Yo{shown}" in prompt(tokenizer, messages)
