# SPDX-License-Identifier: Apache-2.0
"""thinkfusion: one Mixture-of-Experts chat model with two modes, thinking and non-thinking, and a switch that works.

The public names load when they are first used, so that `import thinkfusion` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Mode": "modes",
    "Reply": "modes",
    "Scheme": "modes",
    "split_reply": "modes",
    "TaskSample": "tasks",
    "generate_samples": "tasks",
    "grade": "tasks",
    "Conversation": "conversations",
    "DataError": "reading",
    "Exchange": "conversations",
    "Message": "messages",
    "RecordOptions": "formats",
    "RowReport": "row_report",
    "Source": "sources",
    "iterate_conversations": "records",
    "prompt_overlap": "records",
    "read_conversations": "records",
    "MixtureOptions": "mixture",
    "TokenAccount": "mixture",
    "mix": "mixture",
    "ReasoningOptions": "shortening",
    "chat_template": "chat_templates",
    "install_chat_template": "chat_templates",
    "Rendered": "rendering",
    "Renderer": "rendering",
    "render": "rendering",
    "FusionTree": "trees",
    "expand": "trees",
    "fusion_tree": "trees",
    "Layout": "packing",
    "PackedRows": "packing",
    "PaddingCollator": "packing",
    "RowCollator": "packing",
    "prepared_cache": "storing",
    "prepare": "preparing",
    "lora_config": "trainable",
    "set_trainable": "trainable",
    "describe_moe": "moe",
    "measure_routes": "route_counting",
    "routes_table": "route_verdict",
    "generation_defaults": "sampling_defaults",
    "set_generation_defaults": "sampling_defaults",
    "ThinkingBudget": "budget",
    "replies": "generation",
    "reply": "generation",
    "stream_reply": "generation",
    "EvaluationPrompt": "prompts",
    "ModeReport": "evaluation",
    "switch_probe": "probing",
    "evaluate_modes": "evaluation",
    "overlap_with_training": "prompts",
    "brevity": "rewards",
    "correctness": "rewards",
    "format_reward": "rewards",
    "total_reward": "rewards",
    "read_prompts": "prompts",
    "task_prompts": "prompts",
    "judge": "grading",
    "Verdict": "mode_verdict",
    "mode_table": "reporting",
    "save_report": "reporting",
    "compare": "comparing",
    "mcnemar_exact": "comparing",
    "save_page": "report_page",
    "run_harness": "harness",
    "PreferenceIds": "preferences",
    "read_preferences": "preferences",
    "PairAccount": "self_distillation",
    "PairOptions": "self_distillation",
    "generate_pairs": "self_distillation",
    "export_checkpoint": "exporting",
    "make_card": "model_card",
    "save_recipe": "card_facts",
    "plan_upload": "publishing",
    "push_checkpoint": "publishing",
    "load_checkpoint": "checkpointing",
    "load_in_4bit": "qlora",
    "FusionOptions": "fusing",
    "fuse_checkpoints": "fusing",
    "fuse_adapters": "adapter_fusing",
    "sweep_ratios": "sweeping",
    "sweep_and_fuse": "sweeping",
    "ensure_processes": "launching",
    "ModeEvaluationCallback": "callbacks",
    "ThinkFusionConfig": "configuration",
    "ThinkFusionTrainer": "training",
    "ThinkFusionGRPOConfig": "grpo_configuration",
    "ThinkFusionGRPOTrainer": "grpo",
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:
    from thinkfusion.adapter_fusing import fuse_adapters
    from thinkfusion.budget import ThinkingBudget
    from thinkfusion.callbacks import ModeEvaluationCallback
    from thinkfusion.card_facts import save_recipe
    from thinkfusion.chat_templates import chat_template, install_chat_template
    from thinkfusion.checkpointing import load_checkpoint
    from thinkfusion.comparing import compare, mcnemar_exact
    from thinkfusion.configuration import ThinkFusionConfig
    from thinkfusion.conversations import Conversation, Exchange
    from thinkfusion.evaluation import ModeReport, evaluate_modes
    from thinkfusion.exporting import export_checkpoint
    from thinkfusion.formats import RecordOptions
    from thinkfusion.fusing import FusionOptions, fuse_checkpoints
    from thinkfusion.generation import replies, reply, stream_reply
    from thinkfusion.grading import judge
    from thinkfusion.grpo import ThinkFusionGRPOTrainer
    from thinkfusion.grpo_configuration import ThinkFusionGRPOConfig
    from thinkfusion.harness import run_harness
    from thinkfusion.launching import ensure_processes
    from thinkfusion.messages import Message
    from thinkfusion.mixture import MixtureOptions, TokenAccount, mix
    from thinkfusion.mode_verdict import Verdict
    from thinkfusion.model_card import make_card
    from thinkfusion.modes import Mode, Reply, Scheme, split_reply
    from thinkfusion.moe import describe_moe
    from thinkfusion.packing import Layout, PackedRows, PaddingCollator, RowCollator
    from thinkfusion.preferences import PreferenceIds, read_preferences
    from thinkfusion.preparing import prepare
    from thinkfusion.probing import switch_probe
    from thinkfusion.prompts import EvaluationPrompt, overlap_with_training, read_prompts, task_prompts
    from thinkfusion.publishing import plan_upload, push_checkpoint
    from thinkfusion.qlora import load_in_4bit
    from thinkfusion.reading import DataError
    from thinkfusion.records import iterate_conversations, prompt_overlap, read_conversations
    from thinkfusion.rendering import Rendered, Renderer, render
    from thinkfusion.report_page import save_page
    from thinkfusion.reporting import mode_table, save_report
    from thinkfusion.rewards import brevity, correctness, format_reward, total_reward
    from thinkfusion.route_counting import measure_routes
    from thinkfusion.route_verdict import routes_table
    from thinkfusion.row_report import RowReport
    from thinkfusion.sampling_defaults import generation_defaults, set_generation_defaults
    from thinkfusion.self_distillation import PairAccount, PairOptions, generate_pairs
    from thinkfusion.shortening import ReasoningOptions
    from thinkfusion.sources import Source
    from thinkfusion.storing import prepared_cache
    from thinkfusion.sweeping import sweep_and_fuse, sweep_ratios
    from thinkfusion.tasks import TaskSample, generate_samples, grade
    from thinkfusion.trainable import lora_config, set_trainable
    from thinkfusion.training import ThinkFusionTrainer
    from thinkfusion.trees import FusionTree, expand, fusion_tree


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'thinkfusion' has no attribute {name!r}")
    return getattr(import_module(f"thinkfusion.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
