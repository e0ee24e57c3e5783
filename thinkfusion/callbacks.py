# SPDX-License-Identifier: Apache-2.0
"""What is watched on the way of a training: that all of it learns, and both modes, by generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from thinkfusion.evaluation import EvaluationPrompt, ModeReport, generate_replies, summarise, task_prompts
from thinkfusion.generation import Sampling
from thinkfusion.modes import Mode
from thinkfusion.probing import PROBED, Marks, Reference, probe_entry, probe_references
from thinkfusion.routing import RouteCounter, RoutingReport
from thinkfusion.trainable import check_gradients, trained_line

logger = logging.getLogger(__name__)


class ModeEvaluationCallback(TrainerCallback):
    """Measures both modes during training, by generation on held-out prompts, and logs what it finds.

    Logs `eval_format_error_<mode>`, `eval_accuracy_<mode>`, `eval_truncated_<mode>` every `every_steps` steps and
    at the end; `reports` keeps the reports by step. Greedy, with the random state left as it was, so that training
    goes on as it would have without it. Under several processes each replies to its share of the prompts.

    Raises ValueError for fewer than one step, or no prompts.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        prompts: Sequence[EvaluationPrompt] | None = None,
        *,
        every_steps: int,
        samples: int = 64,
        batch_size: int = 64,
        max_new_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps: found {every_steps}, expected at least 1.")
        self.trainer, self.every_steps = trainer, every_steps
        self.prompts = list(task_prompts(samples, seed=seed) if prompts is None else prompts[:samples])
        if not self.prompts:
            raise ValueError("prompts: found none, expected at least one prompt.")
        self.batch_size, self.seed = batch_size, seed
        self.sampling = Sampling(max_new_tokens)
        self.reports: dict[int, ModeReport] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step % self.every_steps == 0 or state.global_step >= state.max_steps:
            # A log marks the step as logged, and the trainer's own figures of this step are still to come.
            should_log = control.should_log
            self.measure(state.global_step)
            control.should_log = should_log
        return control

    def measure(self, step: int) -> ModeReport:
        """Reply to the prompts in both modes with the model as it is now, and log the figures."""
        accelerator = self.trainer.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        model = accelerator.unwrap_model(self.trainer.model)
        own = self.prompts[rank::world]
        given = (
            generate_replies(
                model,
                self.trainer.processing_class,
                own,
                self.sampling,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=False,
            )
            if own
            else {mode: [] for mode in Mode}
        )
        shares = gather_object([given]) if world > 1 else [given]
        replies = {
            mode: [shares[index % world][mode][index // world] for index in range(len(self.prompts))] for mode in Mode
        }
        report = summarise(self.prompts, replies, {**self.sampling._asdict(), "step": step})
        self.reports[step] = report
        figures = {
            f"eval_{name}_{mode}": values[name]
            for mode, values in report.modes.items()
            for name in ("format_error", "truncated", "accuracy")
            if values[name] is not None
        }
        # The trainer tells evaluation from training by the model's mode; the training figures wait for their own log.
        self.trainer.model.eval()
        self.trainer.log(figures)
        self.trainer.model.train()
        if getattr(self.trainer, "switch_probe", None) is not None:
            self.trainer.switch_probe.measure(step)
        return report


CLOSES_AT_LEAST = 0.05
"""The closing token's probability that is expected after a tenth of a training; a row that learns is far above it."""


class SwitchProbeCallback(TrainerCallback):
    """The switch probe (`thinkfusion.probing`) while training: at every evaluation, of either kind, and at a tenth.

    Logs `eval_probe_<name>` of each name of `thinkfusion.probing.PROBED`; `history` has them by step. After a tenth of
    the steps it warns if the model does not close its traces yet: by then it should. The random state is left as it
    was.
    """

    def __init__(self, trainer: SFTTrainer, references: Sequence[Reference], marks: Marks) -> None:
        self.trainer, self.references, self.marks = trainer, list(references), marks
        self.last: tuple[int, dict[str, Any]] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = None  # steps are counted anew

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step == max(1, -(-state.max_steps // 10)):
            should_log = control.should_log
            closes = self.measure(state.global_step).get("closes")
            control.should_log = should_log
            if closes is not None and closes < CLOSES_AT_LEAST and state.is_world_process_zero:
                logger.warning("%s", dead_closing_token(closes, state.global_step, state.max_steps))
        return control

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        should_log = control.should_log
        self.measure(state.global_step)
        control.should_log = should_log
        return control

    def measure(self, step: int) -> dict[str, Any]:
        """The probe of the model as it is now, logged; once for a step. Every process finds the same."""
        if self.last is not None and self.last[0] == step:
            return self.last[1]
        found = self.look()
        self.trainer.model.eval()
        self.trainer.log({f"eval_probe_{name}": found[name] for name in PROBE_NAMES if found[name] is not None})
        self.trainer.model.train()
        self.last = step, found
        return found

    def look(self) -> dict[str, Any]:
        """The probe of the model as it is now."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return probe_entry(probe_references(model, self.references, self.marks))

    @property
    def history(self) -> list[dict[str, Any]]:
        return probe_history(self.trainer.state.log_history)


PROBE_NAMES = tuple(name for names in PROBED.values() for name in names)


def probe_history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The probe by step, from a trainer's log: what a report's page draws as `probe/history`."""
    points = []
    for record in log_history:
        found = {name: record[f"eval_probe_{name}"] for name in PROBE_NAMES if f"eval_probe_{name}" in record}
        if found:
            points.append({"step": record["step"], **found})
    return points


def dead_closing_token(closes: float, step: int, steps: int) -> str:
    """What to do when the closing token does not come alive."""
    return (
        f"Switch probe: after {step:,} of {steps:,} steps the closing token has probability {closes:.3f} after a whole "
        f"trace, less than {CLOSES_AT_LEAST}: thinking replies would not close their traces, whatever the loss says. "
        "Stop, and set control_token_learning_rate (25 times learning_rate) and control_token_weight (15)."
    )


ENOUGH_STEPS = 50
"""Steps in which new control tokens part the modes (`examples/real_language`: 52 were enough on problems, 26 not)."""


class StepsCheck(TrainerCallback):
    """Where control tokens are new: warns before the first step if there are fewer than `ENOUGH_STEPS`."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.max_steps < ENOUGH_STEPS and state.is_world_process_zero:
            logger.warning(
                "%s optimizer steps are few for new control tokens: after 26, a fifth of the non-thinking replies of a "
                "model that we measured broke their mode, after 52 almost none. Train %s steps or more: with more "
                "rows, more epochs or smaller batches.",
                f"{state.max_steps:,}",
                ENOUGH_STEPS,
            )


class GradientCheck(TrainerCallback):
    """At the first optimizer step: stops if something that is meant to train got no gradient, and says what trains.

    Raises ValueError as `thinkfusion.trainable.check_gradients`. Weights that DeepSpeed shards keep their gradients
    elsewhere; then it says that nothing was checked.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.checked = False

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.checked:
            return
        self.checked = True
        model = self.accelerator.unwrap_model(model)
        if all(parameter.grad is None for parameter in model.parameters()):
            logger.warning("Gradients are kept by the engine that shards them: what trains was not checked.")
            return
        idle = check_gradients(model)
        if not state.is_world_process_zero:
            return
        logger.info("%s", trained_line(model))
        if idle:
            logger.info("Experts that no token of the first step was routed to: %s.", "; ".join(idle))


class RoutingCallback(TrainerCallback):
    """Logs how the tokens of replies were routed since the last time, by layer and by mode.

    Logs `routing_entropy_<mode>` (mean over layers) and `routing_entropy_min_<mode>`, `routing_busiest_<mode>` (the
    share of the tokens that chose the busiest expert of any layer), `routing_dead_<mode>` (experts without a token, all
    layers) and `routing_overlap` of the modes every `every_steps` steps; `reports` keeps all layers' figures by step.
    """

    def __init__(self, trainer: SFTTrainer, routes: RouteCounter, *, every_steps: int) -> None:
        self.trainer, self.routes, self.every_steps = trainer, routes, every_steps
        self.reports: dict[int, RoutingReport] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step % self.every_steps == 0 or state.global_step >= state.max_steps:
            report = self.routes.report(self.trainer.accelerator)
            if report is not None:
                self.reports[state.global_step] = report
                _log_aside(self.trainer, control, report.figures())
        return control


def _log_aside(trainer: SFTTrainer, control: TrainerControl, figures: dict[str, float]) -> None:
    """Log figures of a step whose own log is still to come; the trainer tells the two by the model's mode."""
    should_log = control.should_log
    trainer.model.eval()
    trainer.log(figures)
    trainer.model.train()
    control.should_log = should_log
