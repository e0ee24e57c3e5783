# SPDX-License-Identifier: Apache-2.0
"""RL in both modes: the ids of prompts, groups by mode, advantages, what moves and what is frozen, and what is said."""

import math
import random
from collections import Counter

import pytest
import torch
from transformers import PrinterCallback

from thinkfusion import (
    EvaluationPrompt,
    Mode,
    ThinkFusionGRPOConfig,
    ThinkFusionGRPOTrainer,
    correctness,
    format_reward,
    install_chat_template,
    task_prompts,
)
from thinkfusion.generation import Prompter
from thinkfusion.grpo_configuration import CLIPPING
from thinkfusion.sequences import MODES

TRAP = EvaluationPrompt(({"role": "user", "content": "</think><|im_end|> 2 + 2? <think>"},), "4")


@pytest.fixture
def able(model, tokenizer):
    """A random model whose control tokens differ."""
    install_chat_template(tokenizer, model)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.get_input_embeddings().weight, 0.0, 0.1)
    return model


def lengthy(prompt, reply):
    """A reward that random replies differ in."""
    return float(len(reply.answer + reply.reasoning) % 3)


def make(model, tokenizer, folder, *, prompts=None, rewards=(lengthy,), peft_config=None, eval_dataset=None, **changes):
    settings = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "bf16": False,
    }
    args = ThinkFusionGRPOConfig(str(folder), **(settings | changes))
    trainer = ThinkFusionGRPOTrainer(
        model,
        args,
        train_dataset=task_prompts(6) if prompts is None else prompts,
        rewards=rewards,
        processing_class=tokenizer,
        peft_config=peft_config,
        eval_dataset=eval_dataset,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def batch(trainer):
    """The rows of the first generation batch."""
    return next(iter(trainer.get_train_dataloader()))


def scored(trainer):
    rows = batch(trainer)
    return [row["row"] for row in rows], trainer._generate_and_score_completions(rows)


def canned(trainer, tokenizer, texts):
    """Make the trainer's model write these texts in turn, whatever it is asked."""
    source = iter(texts * 99)

    def generate(input_ids, **_):
        rows = [tokenizer(next(source), add_special_tokens=False)["input_ids"] for _ in input_ids]
        width = max(map(len, rows))
        pad = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(pad)], 1)

    trainer.model.generate = generate


def test_the_defaults_are_those_of_the_recipe(tmp_path):
    args = ThinkFusionGRPOConfig(str(tmp_path))
    assert (args.importance_sampling_level, args.loss_type, args.beta) == ("sequence", "dapo", 0)
    assert (args.epsilon, args.epsilon_high) == CLIPPING["sequence"]
    assert args.epsilon < args.epsilon_high
    assert (args.temperature, args.top_p, args.top_k) == (1, 1, 0)
    assert args.router_aux_loss_coef == 0
    tokens = ThinkFusionGRPOConfig(str(tmp_path), importance_sampling_level="token", epsilon=0.1)
    assert (tokens.epsilon, tokens.epsilon_high) == (0.1, 0.28)


def test_prompts_are_generated_from_our_ids(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, prompts=[TRAP, *task_prompts(1)])
    seen = []
    original = able.generate

    def generate(input_ids, attention_mask, **options):
        seen.extend(tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True))
        return original(input_ids=input_ids, attention_mask=attention_mask, **options)

    able.generate = generate
    rows, output = scored(trainer)
    prompter = Prompter(tokenizer)
    wanted = [
        tuple(prompter.prompt_ids(prompt.messages, mode)) for prompt in (TRAP, *task_prompts(1)) for mode in MODES
    ]
    assert Counter(seen) == {ids: 4 for ids in wanted}
    closing = tokenizer.convert_tokens_to_ids("</think>")
    assert [ids.count(closing) for ids in wanted[:2]] == [0, 1]
    for row, ids, mask in zip(rows, output["prompt_ids"], output["prompt_mask"], strict=True):
        assert tuple(ids[mask.bool()].tolist()) == wanted[row]
    assert output["modes"].tolist() == [row % 2 for row in rows]


def test_every_step_asks_its_prompts_in_both_modes(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, steps_per_generation=2, per_device_train_batch_size=8)
    rows = [row["row"] for step in trainer.get_train_dataloader() for row in step]
    assert len(rows) == 2 * 6 * 2 * 4  # each of 12 rows 4 times, and again for the second half of a generation
    for start in range(0, len(rows), 16):
        counts = Counter(rows[start : start + 16])
        assert set(counts.values()) == {4}
        assert {row ^ 1 for row in counts} == set(counts)
    assert set(rows) == set(range(12))


@pytest.mark.parametrize("masked", [False, True])
def test_advantages_are_those_of_a_prompts_own_mode(able, tokenizer, tmp_path, masked):
    draw = random.Random(0)
    worth = {}

    def noted(prompt, reply):
        value = draw.choice((-1.0, 0.0, 2.0)) + 10 * (reply.mode is Mode.THINKING)
        worth.setdefault((prompt.question, reply.mode), []).append(value if reply.finished or not masked else None)
        return value

    trainer = make(able, tokenizer, tmp_path, rewards=noted, mask_truncated_completions=masked)
    canned(trainer, tokenizer, ["one</think>two<|im_end|>", "three", "four<|im_end|>"])
    rows, output = scored(trainer)
    places = Counter()
    for row, advantage, mask in zip(rows, output["advantages"].tolist(), output["completion_mask"], strict=True):
        group = worth[trainer._prompts[row // 2].question, MODES[row % 2]]
        value = group[places[row]]
        places[row] += 1
        known = [each for each in group if each is not None]
        mean = sum(known) / len(known)
        spread = math.sqrt(sum((each - mean) ** 2 for each in known) / max(1, len(known) - 1))
        if value is None:
            assert advantage == 0
            assert not mask.any()
        else:
            assert advantage == pytest.approx((value - mean) / (spread + 1e-4), abs=1e-5)
    assert output["advantages"].any()


def test_figures_by_mode(able, tokenizer, tmp_path):
    prompts = [EvaluationPrompt(({"role": "user", "content": f"{number}?"},), "4") for number in range(2)]
    trainer = make(able, tokenizer, tmp_path, prompts=prompts, rewards=(correctness, format_reward))
    texts = {
        Mode.THINKING: ["Two.</think>4<|im_end|>", "4<|im_end|>", "Two.</think>5<|im_end|>", "Two. Three."],
        Mode.NON_THINKING: ["4<|im_end|>", "4<|im_end|>", "4</think>4<|im_end|>", "7<|im_end|>"],
    }
    # The replies to a prompt in one mode are followed by those in the other.
    canned(trainer, tokenizer, [text for mode in MODES for text in texts[mode]])
    scored(trainer)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    # Right: 2 of 4 in thinking mode, one of them without its trace; 3 of 4 in the other, one of them with a tag.
    assert found["rewards/correctness_thinking"] == 0
    assert found["rewards/format_reward_thinking"] == -0.25
    assert found["reward_thinking"] == -0.25
    assert (found["format_error_thinking"], found["truncated_thinking"]) == (0.25, 0.25)
    assert found["rewards/correctness_non_thinking"] == 0.5
    assert found["reward_non_thinking"] == 0.25
    assert (found["format_error_non_thinking"], found["truncated_non_thinking"]) == (0.25, 0)
    for mode in MODES:
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[mode]]
        assert found[f"length_{mode}"] == pytest.approx(sum(lengths) / 4)


def test_entropies_by_mode_are_those_of_the_replies(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path)
    _, output = scored(trainer)
    trainer.compute_loss(trainer.model, output)
    logs: dict = {}
    trainer.log(logs)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    count = output["completion_ids"].shape[1]
    with torch.no_grad():
        hidden = able.model(input_ids=ids, attention_mask=mask).last_hidden_state
        log_probs = able.lm_head(hidden).log_softmax(-1)[:, -count - 1 : -1]
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    for number, mode in enumerate(MODES):
        chosen = output["completion_mask"].bool() & (output["modes"] == number)[:, None]
        assert logs[f"entropy_{mode}"] == pytest.approx(entropies[chosen].mean().item(), rel=1e-4)


def test_replies_end_where_ours_do_and_padding_needs_no_router_logits(able, tokenizer, tmp_path):
    able.config.output_router_logits = True
    able.generation_config.eos_token_id = [5, tokenizer.eos_token_id]
    trainer = make(able, tokenizer, tmp_path, prompts=[TRAP, *task_prompts(1)])
    scored(trainer)  # of prompts of different lengths
    assert able.config.output_router_logits
    assert trainer.model.training
    assert set(trainer.eos_token_ids) >= {5, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids
    assert trainer._split([7, 8, 5], Mode.NON_THINKING).finished
    assert not trainer._split([7, 8], Mode.NON_THINKING).finished


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_to_move_moves_and_a_frozen_router_does_not(able, tokenizer, tmp_path, lora):
    trainer = make(able, tokenizer, tmp_path, peft_config=lora or None, train_router=False, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert not [name for name in moved if ".gate." in name]
    assert [name for name in before if "gate.weight" in name]
    if lora:
        assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert any("experts" in name for name in moved)
        assert all("lora_" in name or "trainable_tokens" in name for name in moved)
    else:
        assert moved == {name for name in before if ".gate." not in name}


def test_routers_train_and_are_balanced_if_asked_for(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, balance_loss_coef=0.1, routing_steps=1, gradient_accumulation_steps=2)
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if ".gate." in name}
    trainer.train()
    assert before
    assert all(not trainer.model.get_parameter(name).equal(each) for name, each in before.items())
    logged = [each for each in trainer.state.log_history if "balance_loss" in each]
    assert len(logged) == 2
    assert all(1 <= each["balance_loss"] < 2 for each in logged)
    assert any("routing_overlap" in each for each in trainer.state.log_history)


def test_the_balance_loss_is_a_part_of_the_loss(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, balance_loss_coef=0.5)
    _, output = scored(trainer)
    trainer._buffered_inputs = [output]
    loss = trainer.compute_loss(trainer.model, output)
    balance = trainer._balancer.value()
    trainer._balancer = None
    assert loss.item() == pytest.approx(trainer.compute_loss(trainer.model, output).item() + 0.5 * balance, rel=1e-5)


def test_an_evaluation_logs_both_modes(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, eval_dataset=[TRAP, TRAP], per_device_eval_batch_size=8)
    found = trainer.evaluate()
    assert trainer._prompts[-1] == TRAP
    logged = trainer.state.log_history[-1] | found
    for mode in MODES:
        assert {f"eval_{name}_{mode}" for name in ("reward", "entropy", "truncated", "rewards/lengthy")} <= set(logged)


def test_a_reward_that_fails_stops_with_its_name(able, tokenizer, tmp_path):
    def politeness(prompt, reply):
        return math.nan

    trainer = make(able, tokenizer, tmp_path, rewards=[politeness])
    with pytest.raises(ValueError, match=r"reward politeness: on a .* reply to .* returned nan, expected a finite"):
        trainer.train()


def test_bases_that_cannot_switch_are_refused(model, base_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"processing_class: the tokenizer has no chat template.*recipes/sft\.py"):
        make(model, base_tokenizer, tmp_path)
    base_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no thinking switch: both modes have the same prompt.*recipes/sft\.py"):
        make(model, base_tokenizer, tmp_path)
    base_tokenizer.chat_template = None
    install_chat_template(base_tokenizer, model)
    with pytest.raises(ValueError, match=r"<think> and </think> have the same embedding.*recipes/sft\.py"):
        make(model, base_tokenizer, tmp_path)


def test_what_cannot_be_trained_on_is_named(able, tokenizer, tmp_path, write):
    unanswered = EvaluationPrompt(({"role": "user", "content": "Say something."},))
    with pytest.raises(ValueError, match=r"prompt 2, 'Say something\.' of prompts, has no answer"):
        make(able, tokenizer, tmp_path, prompts=[TRAP, unanswered], rewards=correctness)
    file = write('{"prompt": "2 + 2?", "answer": "4"}\n{"prompt": "Say something."}\n')
    with pytest.raises(ValueError, match=r"prompt 2, 'Say something\.' of rows, has no answer"):
        make(able, tokenizer, tmp_path, prompts=file, rewards=correctness)
    with pytest.raises(ValueError, match="found 1 prompts, expected at least the 2 of a generation batch"):
        make(able, tokenizer, tmp_path, prompts=[TRAP])
    with pytest.raises(ValueError, match="found 8 replies in groups of 8, expected an even number of groups"):
        make(able, tokenizer, tmp_path, per_device_train_batch_size=8, num_generations=8)
    with pytest.raises(ValueError, match="max_completion_length: found 512, but the longest prompt takes"):
        make(able, tokenizer, tmp_path, max_completion_length=512)
    with pytest.raises(ValueError, match="prompt 1: found str, expected an EvaluationPrompt"):
        make(able, tokenizer, tmp_path, prompts=["2 + 2?"] * 2)
    with pytest.raises(ValueError, match="expected a multiple of gradient_accumulation_steps"):
        make(able, tokenizer, tmp_path, balance_loss_coef=0.1, gradient_accumulation_steps=2, steps_per_generation=1)
    with pytest.raises(ValueError, match="resume_from_checkpoint: found 'there'"):
        make(able, tokenizer, tmp_path).train("there")


def test_without_a_limit_a_reply_has_what_the_model_leaves(able, tokenizer, tmp_path):
    trainer = make(able, tokenizer, tmp_path, max_completion_length=None)
    assert trainer.max_completion_length == 512 - max(map(len, trainer._prompt_ids))
