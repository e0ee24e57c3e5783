# SPDX-License-Identifier: Apache-2.0
"""Which replies share a batch: their order and what they say do not depend on it."""

import pytest

from thinkfusion import Mode, install_chat_template, replying
from thinkfusion.generation import Sampling
from thinkfusion.replying import Replier

QUESTIONS = ("What is 2 + 2?", "Add 4, 5 and 6, then take away 7.", "Hi")


@pytest.fixture
def switchable(model, base_tokenizer):
    """A model with the control tokens, and its tokenizer."""
    install_chat_template(base_tokenizer, model)
    return model, base_tokenizer


@pytest.fixture
def batches(monkeypatch):
    """The modes of each batch that is generated."""
    found, generate = [], replying.generate

    def noted(model, tokenizer, ids, modes, *given, **options):
        found.append(modes)
        return generate(model, tokenizer, ids, modes, *given, **options)

    monkeypatch.setattr(replying, "generate", noted)
    return found


def test_both_modes_share_a_batch_that_holds_them_all(switchable, batches):
    model, _ = switchable
    model.double()  # in float32 tokens of a random model may tie but for rounding
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    replier = Replier(*switchable, Sampling(8), batch_size=6, progress=False)
    jobs = [replier.job([{"role": "user", "content": asked}], mode) for asked in QUESTIONS for mode in Mode]
    shared = replier.replies(jobs)
    assert batches == [[job.mode for job in sorted(jobs, key=lambda job: len(job.ids))]]
    assert set(batches.pop()) == set(Mode)
    apart, seconds = replier.timed(jobs)
    assert batches == [[mode] * 3 for mode in Mode]
    assert shared == apart
    assert [reply.mode for reply in shared] == [job.mode for job in jobs]
    assert len({str(reply) for reply in shared}) > 2
    assert all(taken > 0 for taken in seconds.values())


def test_more_than_a_batch_is_replied_to_by_mode(switchable, batches):
    replier = Replier(*switchable, Sampling(2), batch_size=2, progress=False)
    jobs = [replier.job([{"role": "user", "content": asked}], mode) for asked in QUESTIONS for mode in Mode]
    assert [reply.mode for reply in replier.replies(jobs)] == [job.mode for job in jobs]
    assert batches == [[mode] * size for mode in Mode for size in (2, 1)]


def test_nothing_asked_is_nothing_replied(switchable, batches):
    replier = Replier(*switchable, Sampling(2), progress=False)
    assert replier.replies([]) == []
    assert batches == []
