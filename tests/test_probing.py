# SPDX-License-Identifier: Apache-2.0
"""The switch probe: its figures against a plain computation, in batches, on any template, and on the way."""

import logging
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import trl
from transformers import TrainerState

from thinkfusion import (
    Conversation,
    DataError,
    Mode,
    ModeEvaluationCallback,
    ThinkFusionTrainer,
    install_chat_template,
    prepare,
    render,
    switch_probe,
    task_prompts,
)
from thinkfusion.callbacks import CLOSES_AT_LEAST, ENOUGH_STEPS, StepsCheck
from thinkfusion.probing import (
    Marks,
    Prober,
    as_reference,
    measure_probe,
    prepared_references,
    probe_references,
    task_pairs,
)
from thinkfusion.rendering import Renderer
from thinkfusion.report_page import report_page
from thinkfusion.reporting import measured_lines

from .test_training import config, conversations, logged

NAMES = {
    "thinking": ("closes", "closes_inside", "closes_again", "trace_begins", "trace_tagged"),
    "non_thinking": ("answer_begins", "answer_blank", "answer_tagged", "answer_closes"),
}


def by_hand(model, tokenizer, rows, scheme="control"):
    """Each row alone, each place by itself."""
    closing, end_of_turn = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    blank = {end_of_turn, tokenizer.eos_token_id, *tokenizer.encode("\n")}
    tags = set(tokenizer.convert_tokens_to_ids(["<think>", "</think>", *tokenizer.all_special_tokens])) - {end_of_turn}
    found = {name: [] for names in NAMES.values() for name in names}
    model.eval()
    for row in rows:
        for mode in Mode:
            rendered = render(row, tokenizer, mode)
            first = rendered.trained.index(True)

            def at(place, token, ids=rendered.ids):
                with torch.no_grad():
                    return float(model(torch.tensor([ids[:place]])).logits[0, -1].softmax(-1)[token])

            answered = rendered.ids.index(end_of_turn, first)
            tagged = sum(at(first, token) for token in tags - {rendered.ids[first]})
            found["trace_tagged" if mode is Mode.THINKING else "answer_tagged"].append(tagged)
            if mode is Mode.NON_THINKING:
                found["answer_begins"].append(at(first, rendered.ids[first]))
                found["answer_blank"].append(sum(at(first, token) for token in blank))
                found["answer_closes"].append(at(answered, closing))
                continue
            end = rendered.ids.index(closing, first)
            found["trace_begins"].append(at(first, rendered.ids[first]))
            found["closes"].append(at(end, closing))
            found["closes_again"].append(at(answered, closing))
            found["closes_inside"].append(sum(at(place, closing) for place in range(first, end)) / (end - first))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("scheme", ["control", "empty-block"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_probabilities_are_those_of_each_place_by_itself(model, base_tokenizer, scheme, batch_size):
    install_chat_template(base_tokenizer, model, scheme=scheme)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)  # far from even
    rows = task_pairs(5)
    expected = by_hand(model, base_tokenizer, rows)
    found = switch_probe(model, base_tokenizer, rows, batch_size=batch_size)
    assert found["samples"] == found["thinking"]["samples"] == found["non_thinking"]["samples"] == 5
    for mode, names in NAMES.items():
        for name in names:
            low, high = found[mode][f"{name}_interval"]
            assert low <= found[mode][name] <= high
            assert found[mode][name] == pytest.approx(expected[name], rel=1e-3), name
    assert max(expected.values()) > 2 * min(expected.values())  # or it would not matter which is which


def test_an_answer_that_begins_blank_is_told(model, tokenizer):
    """Whether its turn ends at once or a line break comes first; where the answer itself is so, nothing is told."""
    install_chat_template(tokenizer, model)
    line_break, end_of_turn = tokenizer.convert_tokens_to_ids(["Ċ", "<|im_end|>"])
    marks = Marks.of(tokenizer)
    assert marks.ends == {end_of_turn}
    assert {line_break, end_of_turn} <= marks.blank
    assert not marks.blank & {marks.closing, *tokenizer.encode("a b")}
    (reference,) = Prober(tokenizer).references(
        Conversation.from_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    )
    for token, expected in ((line_break, 1.0), (end_of_turn, 1.0), (reference.ids[reference.first], 0.0)):
        make_first(model, token, reference)
        found = probe_references(model, [reference], marks)["non_thinking"]
        assert (found["answer_blank"], found["answer_tagged"]) == pytest.approx((expected, 0.0), abs=1e-6)
    begins = reference._replace(ids=[*reference.ids[: reference.first], line_break], end=None)
    found = probe_references(model, [begins], marks)["non_thinking"]
    assert (found["answer_blank"], found["samples"]) == (None, 1)


def make_first(model, token, reference):
    """Output embeddings that give `token` a probability of 1 where what the model writes begins."""
    with torch.no_grad():
        states = model.model(torch.tensor([reference.ids])).last_hidden_state[0, reference.first - 1]
        rows = torch.zeros_like(model.get_input_embeddings().weight)
        rows[token] = 100 * states / states.square().sum()
        model.get_output_embeddings().weight = torch.nn.Parameter(rows)


@pytest.mark.parametrize("scheme", ["control", "empty-block"])
def test_a_reply_that_begins_with_a_control_token_is_told(model, base_tokenizer, scheme):
    """In either mode; the opening token where the template leaves it to the model is what should be there."""
    install_chat_template(base_tokenizer, model, scheme=scheme)
    marks = Marks.of(base_tokenizer)
    opening, closing = base_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert {opening, closing} <= marks.tags
    assert not marks.tags & marks.ends
    for reference in Prober(base_tokenizer).references(task_pairs(1)[0]):
        thinking = reference.mode is Mode.THINKING
        what = "trace" if thinking else "answer"
        for token in (opening, closing):
            make_first(model, token, reference)
            found = probe_references(model, [reference], marks)[reference.mode.value]
            right = float(thinking and scheme == "empty-block" and token == opening)
            assert found[f"{what}_begins"] == pytest.approx(right, abs=1e-6)
            assert found[f"{what}_tagged"] == pytest.approx(1 - right, abs=1e-6)


def test_a_vocabulary_is_read_once_for_all_rows(tokenizer, model, monkeypatch):
    install_chat_template(tokenizer, model)
    made = []
    monkeypatch.setattr(
        Renderer, "__init__", lambda self, *given, own=Renderer.__init__: (made.append(1), own(self, *given))[1]
    )
    prober = Prober(tokenizer)
    assert sum(len(list(prober.references(row))) for row in task_pairs(3)) == 6
    assert len(made) == 1


def test_the_model_is_left_as_it_was(model, tokenizer):
    install_chat_template(tokenizer, model)
    model.config.output_router_logits = True
    model.train()
    state = torch.random.get_rng_state()
    switch_probe(model, tokenizer, task_pairs(2))
    assert model.training
    assert model.config.output_router_logits
    assert torch.equal(state, torch.random.get_rng_state())


def test_rows_of_any_format_are_read(model, tokenizer):
    install_chat_template(tokenizer, model)
    rows = [
        {"question": "1 + 1?", "reasoning": "One more than one.", "answer": "2"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"prompt": "2 + 2?", "thinking": "<think>Twice two.</think>4", "non_thinking": "It is 4."},
    ]
    found = switch_probe(model, tokenizer, rows)
    assert (found["samples"], found["thinking"]["samples"], found["non_thinking"]["samples"]) == (3, 2, 3)
    with pytest.raises(DataError, match="pairs, row 2: "):
        switch_probe(model, tokenizer, [rows[0], {"messages": []}])


def test_without_rows_or_reasoning(model, tokenizer):
    install_chat_template(tokenizer, model)
    with pytest.raises(ValueError, match="there are no rows"):
        switch_probe(model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size: found 0"):
        switch_probe(model, tokenizer, task_pairs(1), batch_size=0)
    plain = Conversation.from_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    found = switch_probe(model, tokenizer, [plain])
    assert found["thinking"] == {
        "samples": 0,
        **{f"{name}{end}": None for name in NAMES["thinking"] for end in ("", "_interval")},
    }


def test_a_template_of_others_is_probed_by_its_own_prompts(model, base_tokenizer):
    """TRL's Qwen3 template: the same figures as our rendering of the same scheme, whose text is the same."""
    install_chat_template(base_tokenizer, model, scheme="empty-block")
    ours = switch_probe(model, base_tokenizer, task_pairs(3))
    base_tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    theirs = switch_probe(model, base_tokenizer, task_pairs(3))
    for mode, names in NAMES.items():
        for name in names:
            assert theirs[mode][name] == pytest.approx(ours[mode][name], rel=1e-3), name


def test_prepared_sequences_give_the_same_figures(model, tokenizer):
    install_chat_template(tokenizer, model)
    rows = task_pairs(6)
    marks = Marks.of(tokenizer)
    stream, _ = prepare(rows, tokenizer, streaming=True)
    for sequences in (prepare(rows, tokenizer)[0], stream):
        references = prepared_references(sequences, marks, samples=4)
        assert [reference.mode for reference in references] == [Mode.THINKING] * 4 + [Mode.NON_THINKING] * 4
        found = probe_references(model, references, marks)
        expected = switch_probe(model, tokenizer, rows[:4])
        for mode, names in NAMES.items():
            assert {name: found[mode][name] for name in names} == pytest.approx(
                {name: expected[mode][name] for name in names}
            )


def test_the_entry_of_a_report_has_all(model, tokenizer):
    install_chat_template(tokenizer, model)
    found = measure_probe(model, tokenizer, samples=2)
    assert set(found) == {"samples"} | {
        f"{name}{end}" for names in NAMES.values() for name in names for end in ("", "_interval")
    }


def trained(folder, model, tokenizer, **settings):
    trainer = ThinkFusionTrainer(
        model, config(folder, **settings), train_dataset=conversations(8), processing_class=tokenizer
    )
    trainer.train()
    return trainer


def test_a_dead_closing_token_is_warned_of_once(tmp_path, model, base_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="thinkfusion.callbacks"):
        trainer = trained(tmp_path, model, base_tokenizer, max_steps=12, learning_rate=1e-6)
    (record,) = [record for record in caplog.records if "Switch probe" in record.message]
    assert "after 2 of 12 steps the closing token has probability 0.00" in record.message
    assert "control_token_learning_rate (25 times" in record.message
    assert [point["step"] for point in trainer.switch_probe.history] == [2]
    assert trainer.switch_probe.history[0]["closes"] < CLOSES_AT_LEAST


def test_a_closing_token_that_lives_is_not_warned_of(tmp_path, model, base_tokenizer, caplog):
    more = {"max_steps": 20, "learning_rate": 3e-3, "control_token_learning_rate": 0.2, "control_token_weight": 300.0}
    with caplog.at_level(logging.WARNING, logger="thinkfusion.callbacks"):
        trainer = trained(tmp_path, model, base_tokenizer, **more, lr_scheduler_type="constant")
    (point,) = trainer.switch_probe.history
    assert (point["step"], point["closes"] > CLOSES_AT_LEAST) == (2, True), point
    assert "Switch probe" not in caplog.text


@pytest.mark.parametrize("probe_rows", [0, 8])
def test_few_steps_for_new_control_tokens_are_warned_of(tmp_path, model, base_tokenizer, caplog, probe_rows):
    with caplog.at_level(logging.WARNING, logger="thinkfusion.callbacks"):
        trained(tmp_path, model, base_tokenizer, max_steps=2, probe_rows=probe_rows)
        (record,) = [record for record in caplog.records if "optimizer steps" in record.message]
        assert record.message.startswith("2 optimizer steps are few for new control tokens")
        assert f"Train {ENOUGH_STEPS} steps or more" in record.message
        caplog.clear()
        # The model knows them now.
        trainer = trained(tmp_path / "again", model, base_tokenizer, max_steps=2, control_token_weight=2.0)
        assert trainer.control_tokens.new == {}
        assert "optimizer steps" not in caplog.text


@pytest.mark.parametrize(
    ("steps", "main_process", "warnings"),
    [(ENOUGH_STEPS - 1, True, 1), (ENOUGH_STEPS - 1, False, 0), (ENOUGH_STEPS, True, 0)],
)
def test_enough_steps_are_not_warned_of(steps, main_process, warnings, caplog):
    state = TrainerState(max_steps=steps, is_world_process_zero=main_process)
    with caplog.at_level(logging.WARNING, logger="thinkfusion.callbacks"):
        StepsCheck().on_train_begin(None, state, None)
    assert len(caplog.records) == warnings


def test_the_probe_is_logged_at_every_evaluation_of_either_kind(tmp_path, model, base_tokenizer):
    install_chat_template(base_tokenizer, model)
    trainer = ThinkFusionTrainer(
        model,
        config(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=conversations(8),
        eval_dataset=task_pairs(3),
        processing_class=base_tokenizer,
    )
    trainer.add_callback(
        ModeEvaluationCallback(trainer, task_prompts(2), every_steps=3, batch_size=2, max_new_tokens=2)
    )
    trainer.train()
    assert [point["step"] for point in trainer.switch_probe.history] == [1, 2, 3, 4]
    held_out = switch_probe(trainer.model, base_tokenizer, task_pairs(3))
    assert trainer.switch_probe.history[-1]["closes"] == pytest.approx(held_out["thinking"]["closes"], rel=1e-4)


def test_training_goes_on_as_without_the_probe(tmp_path, tiny_models, base_tokenizer):
    losses = []
    for rows in (0, 4):
        trainer = trained(tmp_path / str(rows), tiny_models(), deepcopy(base_tokenizer), probe_rows=rows)
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="probe_rows: found -1, expected at least 0"):
        config(tmp_path, probe_rows=-1)


def test_the_report_tells_and_draws_the_probe(model, tokenizer):
    from thinkfusion.evaluation import evaluate_modes

    install_chat_template(tokenizer, model)
    report = evaluate_modes(model, tokenizer, task_prompts(1), max_new_tokens=1, probe=2, progress=False)
    (line,) = [line for line in measured_lines(report) if line.startswith("probe:")]
    assert f"inside traces {report.measured['probe']['closes_inside']:.3f}" in line
    assert "<polyline" not in report_page(report)
    report.measured["probe"]["history"] = [
        {"step": step, "closes": step / 20, "closes_inside": 0.01, "trace_begins": 0.5, "answer_begins": 0.25}
        for step in (0, 10, 20)
    ]
    page = report_page(report)
    assert page.count('data-of="/probe/history/2/closes" data-value="1.0"') == 1
    assert page.count("<polyline") == 8  # four lines, and how each is drawn
    del report.measured["probe"]["closes_inside"]  # as in reports from before
    assert "inside traces" not in "".join(measured_lines(report))
    report_page(report)


@pytest.mark.parametrize(
    ("ids", "mode", "closing_id", "closing", "end", "kept"),
    [
        ([9, 1, 2, 7, 3, 8, 5], Mode.THINKING, 7, 3, 5, 6),
        ([9, 1, 2, 7, 3, 8, 5], Mode.NON_THINKING, 7, None, 5, 6),
        ([9, 1, 2, 8, 7, 3, 8], Mode.THINKING, 7, 4, 6, 7),  # what ends a turn inside the trace is not its end
        ([9, 1, 2, 7, 3], Mode.THINKING, 7, 3, None, 4),  # cut: the answer has no end
        ([9, 1, 2, 3, 8], Mode.THINKING, 7, None, None, 2),  # no trace is closed: nothing can close again
        ([9, 1, 2, 8, 3, 8], Mode.THINKING, 8, 3, None, 4),  # one token ends traces and turns: it is right there
        ([9, 1, 2, 8], Mode.NON_THINKING, 8, None, None, 2),
    ],
)
def test_the_places_that_are_looked_at(ids, mode, closing_id, closing, end, kept):
    marks = Marks(closing_id, frozenset({8}), frozenset({8}), frozenset({closing_id}))
    assert as_reference(ids, mode, 1, marks) == (ids[:kept], mode, 1, closing, end)
