# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness in both modes, on a task of two rows from a file."""

import json

import pytest

from thinkfusion import Mode, install_chat_template, run_harness
from thinkfusion.harness import harness_tasks
from thinkfusion.intervals import wilson_interval

TASK = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<|im_end|>"]
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} + 0?", "answer": str(n)}) + "\n" for n in (4, 5)))
    path = tmp_path / "sums.yaml"
    path.write_text(TASK.format(data=data))
    return str(path)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("thinkfusion.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install lm-eval, or the extra harness"):
        harness_tasks(["gsm8k"])


def test_both_modes_are_run(task, model, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval")
    install_chat_template(tokenizer, model)
    prompts = []

    def write(input_ids, **options):
        """The right answer to one question of two, after a trace where the prompt opens one."""
        import torch

        made = []
        for row in input_ids.tolist():
            text = tokenizer.decode(row)
            prompts.append(text)
            trace = "5 + 5</think>" if text.endswith("<think>") else ""
            made.append(row + tokenizer(f"{trace}4<|im_end|>", add_special_tokens=False)["input_ids"])
        longest = max(map(len, made))
        return torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in made])

    monkeypatch.setattr(model, "generate", write)
    found = run_harness(model, tokenizer, [task], max_new_tokens=8, batch_size=1)
    values = found["sums"]["exact_match"]
    assert {mode: values[mode] for mode in ("thinking", "non_thinking")} == {"thinking": 0.5, "non_thinking": 0.5}
    assert values["thinking_interval"] == list(wilson_interval(1, 2))
    assert [text.endswith("<think>") for text in prompts] == [True, True, False, False]
    assert prompts[-1].endswith("</think>")
    assert len(Mode) == 2


def test_an_unknown_task_is_told(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="'no_such_task' is unknown to the harness"):
        harness_tasks(["no_such_task"])
    with pytest.raises(ValueError, match=r"none\.yaml: there is no such file"):
        harness_tasks([str(tmp_path / "none.yaml")])
