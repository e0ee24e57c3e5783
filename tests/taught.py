# SPDX-License-Identifier: Apache-2.0
"""A small model that was taught a few replies by heart, so that tests know what it says."""

from pathlib import Path

from transformers.utils import get_json_schema

from thinkfusion import Conversation, ThinkFusionConfig, ThinkFusionTrainer, export_checkpoint


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


TOOLS = [get_json_schema(add)]
SUM, SUM_THOUGHT, SUM_ANSWER = "What is 2 + 2?", "Two and two.\nThat makes four.", "It is 4."
KOREAN, KOREAN_THOUGHT, KOREAN_ANSWER = "3 더하기 4는?", "셋에 넷을 더합니다. 일곱입니다.", "답은 7입니다."
CALL, CALL_THOUGHT, CALL_ANSWER = "What is 1734 + 58? Use the tool.", "Large numbers; the tool adds them.", "1792"


def taught_conversations(tools=TOOLS) -> list[Conversation]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1734, "b": 58}}}
    return [
        *(
            Conversation.from_messages(
                [
                    {"role": "user", "content": question},
                    {"role": "assistant", "reasoning_content": thought, "content": answer},
                ]
            )
            for question, thought, answer in ((SUM, SUM_THOUGHT, SUM_ANSWER), (KOREAN, KOREAN_THOUGHT, KOREAN_ANSWER))
        ),
        Conversation.from_messages(
            [
                {"role": "user", "content": CALL},
                {"role": "assistant", "reasoning_content": CALL_THOUGHT, "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "1792"},
                {"role": "assistant", "reasoning_content": "There it is.", "content": CALL_ANSWER},
            ],
            tools=tools,
        ),
    ]


def teach(folder: Path, conversations: list[Conversation] | None = None, steps: int = 120, **settings) -> Path:
    """Train the embedded base on conversations (those above) until it knows them, and export it to `folder`."""
    config = ThinkFusionConfig(
        output_dir=str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_strategy="no",
        control_token_learning_rate=1e-2,
        control_token_weight=5.0,
        end_of_turn_weight=1.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
        **settings,
    )
    trainer = ThinkFusionTrainer("tiny-base", config, train_dataset=conversations or taught_conversations())
    trainer.train()
    return export_checkpoint(trainer.model, trainer.processing_class, folder / "checkpoint", check=False)
