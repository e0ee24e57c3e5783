# SPDX-License-Identifier: Apache-2.0
"""Batches whose ended rows leave: the replies are those of one call, whatever the cache looks like."""

from copy import deepcopy
from functools import wraps

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from tests.tiny_models import BRANCHING, WINDOWED, tiny_random_model
from thinkfusion import EvaluationPrompt, Mode, install_chat_template
from thinkfusion import shrinking as shrinking_module
from thinkfusion.generation import Prompter, Sampling, generate
from thinkfusion.shrinking import SMALLEST, GrowingLayer, can_shrink, generate_shrinking, prefill_in_pieces

ROWS, NEW = 2 * SMALLEST + 3, 24
ENDS = list(range(1, 60))
"""About every tenth token of the tiny vocabulary."""


def left_padded(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of 1 to 9 tokens."""
    torch.manual_seed(1)
    lengths = torch.randint(1, 10, (rows, 1))
    mask = (torch.arange(9) >= 9 - lengths).long()
    return torch.randint(60, 600, (rows, 9)) * mask, mask


def in_one_call(model, ids, mask, ends, **arguments) -> list[list[int]]:
    out = model.generate(
        input_ids=ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, max_new_tokens=NEW, **arguments
    )
    return out[:, ids.shape[1] :].tolist()


def until_end(rows: list[list[int]], stops: list[int]) -> list[list[int]]:
    ends = [next((place for place, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def quiet(model):
    """As `ready_to_generate` makes it; in float64, since in float32 some tokens tie but for rounding."""
    model.config.output_router_logits = False
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model.eval().double()


CACHES = [(family, None) for family in BRANCHING] + [(family, 5) for family in WINDOWED]
GREEDY = {"do_sample": False, "repetition_penalty": 2.0}
"""Without a penalty some of the models repeat one token."""


def own_ends(model, ids, mask) -> list[int]:
    """Tokens by which each row has its own place to end at, if it has not ended before."""
    free = in_one_call(model, ids, mask, None, **GREEDY)
    return sorted({row[place % NEW] for place, row in enumerate(free)})


@pytest.mark.parametrize(("family", "window"), CACHES)
def test_the_replies_of_every_family_are_those_of_one_call(family, window, monkeypatch):
    monkeypatch.setattr(shrinking_module, "ROOM", 3)  # full many times
    model = quiet(tiny_random_model(family, window=window))
    assert can_shrink(model, ROWS)
    ids, mask = left_padded()
    ends = own_ends(model, ids, mask)
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: sizes.append(len(given["input_ids"])) or forward(**given))
    with torch.no_grad():
        shrinking = generate_shrinking(model, ids, mask, ends, NEW, pad_token_id=0, **GREEDY)
        shrunk = sorted(set(sizes))
        whole = until_end(in_one_call(model, ids, mask, ends, **GREEDY), ends)
    assert until_end(shrinking, ends) == whole
    assert len({len(row) for row in whole}) > 3
    assert len(shrunk) > 1
    assert shrunk[-1] == ROWS


@pytest.mark.parametrize(("family", "window"), CACHES)
def test_in_float32_replies_part_only_where_tokens_tie(family, window):
    """With the experts as transformers chooses them."""
    model = tiny_random_model(family, window=window).eval()
    model.config.output_router_logits = False
    ids, mask = left_padded()
    ends = own_ends(model, ids, mask)
    shrinking = until_end(generate_shrinking(model, ids, mask, ends, NEW, pad_token_id=0, **GREEDY), ends)
    scored = model.generate(
        input_ids=ids,
        attention_mask=mask,
        eos_token_id=ends,
        pad_token_id=0,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    whole = until_end(scored.sequences[:, ids.shape[1] :].tolist(), ends)
    for place, (ours, one_call) in enumerate(zip(shrinking, whole, strict=True)):
        pairs = enumerate(zip(ours, one_call, strict=False))
        parting = next(((step, *tokens) for step, tokens in pairs if tokens[0] != tokens[1]), None)
        if parting is None:
            assert ours == one_call
        else:
            step, first, second = parting
            scores = scored.scores[step][place]
            assert scores[first].item() == pytest.approx(scores[second].item(), abs=1e-4)


def test_a_growing_layer_holds_what_a_dynamic_one_does(monkeypatch):
    """Rows leave, are put in another order and repeated, and tokens are taken back, in any order; copies are alone."""
    monkeypatch.setattr(shrinking_module, "ROOM", 4)
    torch.manual_seed(0)
    growing, dynamic = GrowingLayer(), DynamicLayer()
    assert growing.get_seq_length() == 0
    rows, copied = 6, 0
    for step in range(60):
        states = [torch.randn(rows, 2, 5 if step == 0 else 1 + step % 3, 8) for _ in range(2)]
        held = growing.keys.data_ptr() if step else None
        for ours, theirs in zip(growing.update(*states), dynamic.update(*states), strict=True):
            assert torch.equal(ours, theirs)
        copied += growing.keys.data_ptr() != held
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert growing.get_mask_sizes(1) == dynamic.get_mask_sizes(1)
        for layer in (growing, dynamic):
            if step == 20:
                layer.batch_select_indices(torch.tensor([4, 0, 3]))
            elif step == 30:
                layer.reorder_cache(torch.tensor([2, 2, 0]))
            elif step == 40:
                layer.crop(-3)
            elif step == 50:
                layer.batch_repeat_interleave(2)
        rows = len(growing.keys)
        if step == 45:
            before, alone = growing.keys.clone(), deepcopy(growing)
            alone.update(*(torch.ones(rows, 2, 1, 8) for _ in range(2)))
            assert torch.equal(growing.keys, before)
    assert 20 < copied < 40
    growing.reset()
    assert growing.get_seq_length() == 0
    assert torch.equal(growing.update(*states)[1], states[1])


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "jamba", "nemotron_h"])
def test_a_state_that_is_more_than_keys_and_values_is_left_to_generate(family):
    assert not can_shrink(tiny_random_model(family), ROWS)


def test_a_batch_shrinks_by_a_quarter_and_not_below_the_smallest(monkeypatch):
    """Row i ends after i + 1 tokens."""
    model = quiet(tiny_random_model("qwen3_moe"))
    forward, sizes = model.forward, []

    def scripted(**given):
        out = forward(**given)
        sizes.append(len(given["input_ids"]))
        out.logits[:] = 0
        # A row is known by its prompt, which the mask tells: row i has i + 1 tokens, and ends with twice as many.
        written = given["attention_mask"].shape[1] - 64
        row = given["attention_mask"][:, :64].sum(1) - 1
        out.logits[torch.arange(len(row)), -1, torch.where(row == written, 1, 100)] = 1
        return out

    monkeypatch.setattr(model, "forward", scripted)
    mask = torch.ones(64, 64).tril().flip(1).long()
    with torch.no_grad():
        found = generate_shrinking(model, mask * 100, mask, [1], 64, pad_token_id=0, do_sample=False)
    assert [row.index(1) for row in found] == list(range(64))
    assert sizes == [64] * 16 + [48] * 12 + [36] * 9 + [27] * 7 + [20] * 5 + [15] * 15


def test_a_seed_gives_the_same_samples_with_the_models_probabilities():
    model = quiet(tiny_random_model("qwen3_moe"))
    ids, mask = (each[:1].repeat(512, 1) for each in left_padded())

    drawn = {"do_sample": True, "temperature": 0.5}

    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return generate_shrinking(model, ids, mask, ENDS, NEW, pad_token_id=0, **drawn)

    first = sampled(0)
    assert first == sampled(0) != sampled(1)
    shrinking, whole = (
        torch.tensor([float(len(row)) for row in until_end(rows, ENDS)])
        for rows in (first, in_one_call(model, ids, mask, ENDS, **drawn))
    )
    error = (shrinking.var() / 512 + whole.var() / 512).sqrt()
    assert abs(shrinking.mean() - whole.mean()) < 4 * error


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"repetition_penalty": 1.1}, True),
        ({"min_new_tokens": 5}, False),
        ({"cache_implementation": "static"}, False),
        ({"num_beams": 2}, False),
    ],
)
def test_settings_that_count_tokens_of_a_call_are_left_to_generate(setting, expected):
    model = tiny_random_model("qwen3_moe")
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    assert can_shrink(model, SMALLEST) is expected
    assert not can_shrink(model, SMALLEST - 1)


def test_processes_that_share_weights_make_the_same_steps(monkeypatch):
    model = tiny_random_model("qwen3_moe")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes, expected in ((1, True), (2, False)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda count=processes: count)
        assert can_shrink(model, ROWS) is expected


def test_replies_of_a_large_batch_are_those_of_small_ones(base_tokenizer, model):
    install_chat_template(base_tokenizer, model)
    quiet(model)
    prompter = Prompter(base_tokenizer)
    asked = [EvaluationPrompt([{"role": "user", "content": f"What is {number} + 2?"}]) for number in range(40)]
    modes = [Mode.THINKING if number % 2 else Mode.NON_THINKING for number in range(40)]
    prompts = [prompter.prompt_ids(prompt.messages, mode) for prompt, mode in zip(asked, modes, strict=True)]

    def replies(rows: int):
        cut = [slice(start, start + rows) for start in range(0, 40, rows)]
        parts = [generate(model, base_tokenizer, prompts[part], modes[part], Sampling(32)) for part in cut]
        return [each for part in parts for each in part]

    assert replies(40) == replies(8)


def of_many_lengths() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 2 tokens, and a few of up to 40, in no order."""
    torch.manual_seed(2)
    lengths = torch.where(torch.rand(ROWS, 1) < 0.7, torch.randint(2, 8, (ROWS, 1)), torch.randint(2, 41, (ROWS, 1)))
    lengths[ROWS // 2] = 40
    mask = (torch.arange(40) >= 40 - lengths).long()
    return torch.randint(60, 600, (ROWS, 40)) * mask, mask


OWN_SOFTMAX = ("gemma2", "granitemoe_swa")
"""In float32, where it makes NaN of the padding's mask in float64."""


@pytest.mark.parametrize(("family", "window"), [case for case in CACHES if case[0] not in OWN_SOFTMAX])
def test_prompts_prefilled_in_pieces_of_their_length_are_replied_to_alike(family, window, monkeypatch):
    monkeypatch.setattr("thinkfusion.shrinking.PIECE", 64)
    model = quiet(tiny_random_model(family, window=window))
    ids, mask = of_many_lengths()
    ends = own_ends(model, ids, mask)
    shapes, forward = [], model.forward

    @wraps(forward)
    def noted(**given):
        shapes.append(given["input_ids"].shape)
        return forward(**given)

    monkeypatch.setattr(model, "forward", noted)
    with torch.no_grad():
        in_pieces = generate_shrinking(model, ids, mask, ends, NEW, pad_token_id=0, **GREEDY)
        prefilled = [shape for shape in shapes if shape[1] > 1]
        whole = until_end(in_one_call(model, ids, mask, ends, **GREEDY), ends)
    assert until_end(in_pieces, ends) == whole
    assert sum(rows for rows, _ in prefilled) == ROWS
    assert len({length for _, length in prefilled}) > 3
    assert sum(rows * length for rows, length in prefilled) < 0.5 * ids.numel()


@pytest.mark.parametrize(("family", "window"), [case for case in CACHES if case[0] in OWN_SOFTMAX])
def test_the_cache_of_pieces_is_that_of_all_at_once(family, window, monkeypatch):
    monkeypatch.setattr("thinkfusion.shrinking.PIECE", 64)
    model = quiet(tiny_random_model(family, window=window)).float()
    ids, mask = of_many_lengths()
    with torch.no_grad():
        in_pieces = prefill_in_pieces(model, ids, mask, pad_token_id=0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        at_once = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
    for ours, theirs in zip(in_pieces.layers, at_once.past_key_values.layers, strict=True):
        shown = mask[:, None, :-1, None][:, :, -theirs.keys.shape[2] :]
        assert 0 < shown.float().mean() < 1
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(ours, name) * shown, getattr(theirs, name) * shown, atol=1e-4, rtol=1e-4)
        assert ours.get_seq_length() == theirs.get_seq_length() == 39


@pytest.mark.parametrize("shortest", [1, 30])
def test_a_prompt_of_one_token_or_little_padding_is_prefilled_at_once(shortest):
    model = quiet(tiny_random_model("qwen3_moe"))
    mask = (torch.arange(40) >= 40 - torch.randint(30, 41, (ROWS, 1))).long()
    mask[0] = torch.arange(40) >= 40 - shortest
    assert prefill_in_pieces(model, torch.full((ROWS, 40), 60) * mask, mask, pad_token_id=0) is None
