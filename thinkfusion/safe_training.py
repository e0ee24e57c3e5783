# SPDX-License-Identifier: Apache-2.0
"""A trainer whose checkpoints survive a crash, and whose resumed runs are those never stopped.

`saving` makes the folders; here is what goes into them, what is compared at a resume, and when a run must end.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from types import FrameType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from thinkfusion.packing import set_epoch
from thinkfusion.saving import (
    ORDER_SETTINGS,
    STEP_SETTINGS,
    SavingError,
    check_place,
    checkpoints,
    describe_data,
    describe_model,
    differences,
    last_checkpoint,
    load_state,
    plain,
    put_in_place,
    random_state,
    read_manifest,
    remove_unfinished,
    rotate,
    save_state,
    set_random_state,
    why_incomplete,
    write_manifest,
)

logger = logging.getLogger(__name__)

OPTIMIZER, SCHEDULER, SCALER = "optimizer.safetensors", "scheduler.safetensors", "scaler.safetensors"
ARGUMENTS = "training_args.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SafeTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, whose checkpoints survive a crash and whose resumed runs are those never stopped.

    A folder that is named as a checkpoint is whole. Model, optimizer, schedule, random states and the figures between
    two logs are kept as safetensors and JSON; FSDP and DeepSpeed write model and optimizer in formats of their own.
    SIGTERM saves and ends: `train` raises SystemExit(143). Several machines need a common file system.

    Raises SavingError if a checkpoint cannot be written, or two would not fit; ValueError if output_dir holds another
    run, at a loss that is not finite, before it reaches the
    weights, and at a resume from a checkpoint that is not whole, or of another model, other rows or another order.
    """

    _temporary: Path | None = None
    _error: Exception | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint: SIGTERM saves and ends without it; leave it unset.")
        self._guard = Guard(self)
        self.add_callback(self._guard)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` is a folder, or True for the last whole checkpoint in output_dir."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: found no whole checkpoint to go on from.")
        # Described before anything wraps the model and renames its parameters.
        self._run = self.describe_run()
        if resume_from_checkpoint:
            self._check_resume(Path(resume_from_checkpoint))
        elif self.args.process_index == 0:
            check_place(Path(self.args.output_dir), self._checkpoint_bytes())
        self._guard.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self._guard.listening():
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    # What a checkpoint belongs to

    def describe_run(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint is compared with at a resume, by subject."""

        def settings(names: tuple[str, ...]) -> dict[str, Any]:
            return {name: plain(getattr(self.args, name)) for name in names}

        return {
            "model": describe_model(self.accelerator.unwrap_model(self.model)),
            "order": {**settings(ORDER_SETTINGS), "sequence_layout": getattr(self, "sequence_layout", "padded")},
            "data": self._described_data,
            "steps": settings(STEP_SETTINGS),
        }

    @cached_property
    def _described_data(self) -> dict[str, Any]:
        described = [describe_data(self.train_dataset) if self.args.process_index == 0 else None]
        return dict(broadcast_object_list(described)[0])

    def _check_resume(self, folder: Path) -> None:
        reason = why_incomplete(folder)
        if reason is not None:
            raise ValueError(f"{folder}: this checkpoint is not whole: {reason}. Go on from another one.")
        saved = read_manifest(folder)["run"]
        other = {subject: differences(saved.get(subject, {}), given) for subject, given in self._run.items()}
        if other["model"]:
            raise ValueError(f"{folder}: this is a checkpoint of another model. {'; '.join(other['model'])}.")
        if other["steps"]:
            logger.warning("%s: from here on with other settings. %s.", folder, "; ".join(other["steps"]))
        rows = other["data"] + other["order"]
        if rows and not self.args.ignore_data_skip:
            raise ValueError(
                f"{folder}: this checkpoint was trained on other rows, or in another order. {'; '.join(rows)}. Give "
                "the data and settings that it had, or begin with these from their first row: ignore_data_skip=True "
                "(--ignore_data_skip true)."
            )

    # Writing

    def _checkpoint_bytes(self) -> int:
        """What a checkpoint takes: the model, or its adapter, and two figures for each trained one (Adam's)."""
        if self.args.save_strategy == "no":
            return 0
        trained: int = sum(each.nbytes for each in self.model.parameters() if each.requires_grad)
        kept: int = (
            trained if isinstance(self.model, PeftModel) else sum(each.nbytes for each in self.model.parameters())
        )
        return kept + (0 if self.args.save_only_model else 2 * trained)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._temporary or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' own saving, into a folder of another name, which is renamed when all is on the disk."""
        step, self._error = self.state.global_step, None
        place = Path(self._get_output_dir(trial), f"checkpoint-{step}")
        self._noting(remove_unfinished, place.parent)
        self.accelerator.wait_for_everyone()
        # transformers would delete older checkpoints, and copy this one to the Hub, before it is in its place.
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._temporary = place.with_name(f"unfinished-{step}")
        temporary = self._temporary / place.name
        try:
            self._noting(super()._save_checkpoint, model, trial, everywhere=True)
            self._raise_error(place)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(place)
            self._noting(self._finish, temporary, place)
            self._raise_error(place)
        finally:
            self._temporary, self.args.push_to_hub = None, push
        if push:
            self._push_from_checkpoint(str(place))

    def _finish(self, temporary: Path, place: Path) -> None:
        if self.state.best_global_step == self.state.global_step:  # it was written under the other name
            self.state.save_to_json(str(temporary / "trainer_state.json"))
        write_manifest(temporary, self.state.global_step, self._run)
        put_in_place(temporary, place)
        rmtree(temporary.parent, ignore_errors=True)
        best = self.state.best_model_checkpoint
        rotate(place.parent, self.args.save_total_limit, {place, *([Path(best)] if best else [])})

    def _noting(self, function: Callable[..., Any], *args: Any, everywhere: bool = False) -> None:
        """Call it, where files are written unless `everywhere`; an error waits until all processes know of it."""
        if not everywhere and (self._error is not None or not self.args.should_save):
            return
        try:
            function(*args)
        except Exception as error:
            self._error = self._error or error

    def _raise_error(self, place: Path) -> None:
        """Raise in every process if any of them has failed, and leave nothing half-written."""
        own = self._error and f"{type(self._error).__name__}: {self._error}"
        found = next(filter(None, gather_object([own])), None)
        if found is None:
            return
        if self.args.should_save and self._temporary is not None:
            rmtree(self._temporary, ignore_errors=True)
        last = next((path for path in reversed(checkpoints(place.parent)) if why_incomplete(path) is None), None)
        full = getattr(self._error, "errno", None) in _FULL or "os error 28" in found or "No space left" in found
        raise SavingError(
            f"{place}: the checkpoint could not be written, "
            + (f"the disk is full ({found}). Make room" if full else f"{found}. Mend that")
            + (f", and go on from {last}, which is whole." if last else ", and start again; there is no earlier one.")
        ) from self._error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card of the model; while a checkpoint is written, an error waits for all processes."""
        if self._temporary is None:
            super().create_model_card(*args, **kwargs)
        else:
            self._noting(lambda: super(SafeTrainer, self).create_model_card(*args, **kwargs))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, tokenizer and settings; transformers' own would pickle the settings, secrets included."""
        if self._temporary is None:
            self._write_model(output_dir or self.args.output_dir, state_dict)
        else:
            self._noting(self._write_model, output_dir, state_dict, everywhere=True)

    def _write_model(self, output_dir: str, state_dict: Any) -> None:
        writes = self.args.should_save
        if not writes and not self.is_distributed_loading_by_transformers:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=writes)
        if writes:
            self.processing_class.save_pretrained(output_dir)
            Path(output_dir, ARGUMENTS).write_text(self.args.to_json_string(), encoding="utf-8")

    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self._noting(save_state, Path(output_dir, OPTIMIZER), self.optimizer.state_dict())
        self._noting(save_state, Path(output_dir, SCHEDULER), self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:
            self._noting(save_state, Path(output_dir, SCALER), self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"random": random_state(self.args.n_gpu > 1), "figures": self.figures()}

        def write() -> None:
            # Another process than the first may come here before there is a folder.
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_state(self._process_file(output_dir), state)

        self._noting(write, everywhere=True)

    def _process_file(self, folder: str | Path) -> Path:
        return Path(folder, f"process_{self.args.process_index}.safetensors")

    # Going on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load all weights at a resume.

        transformers 5.23 saves experts one by one, and knows how to join them in `from_pretrained` only: its own resume
        leaves every expert as it was at the start, with a warning (a test tells when that is mended).
        """
        model = model or self.model
        if not self._holds_whole_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, found = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, output_loading_info=True)
        if found["missing_keys"] or found["mismatched_keys"]:
            raise ValueError(
                f"{resume_from_checkpoint}: the checkpoint does not fit the model; missing: "
                f"{sorted(found['missing_keys'])}, of another shape: {sorted(map(str, found['mismatched_keys']))}."
            )
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self._holds_whole_model():
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_whole_model(self) -> bool:
        """Whether a checkpoint is the model alone: no adapter, nothing sharded over processes."""
        return not (isinstance(self.model, PeftModel) or self._sharded())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._sharded():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for name, into in ((OPTIMIZER, self.optimizer), (SCHEDULER, self.lr_scheduler)):
            if not Path(checkpoint, name).is_file():
                raise ValueError(f"{checkpoint}: it holds no {name}, so nothing can go on from it (save_only_model).")
            into.load_state_dict(load_state(Path(checkpoint, name)))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and Path(checkpoint, SCALER).is_file():
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint, SCALER)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._process_file(checkpoint).is_file():
            set_random_state(load_state(self._process_file(checkpoint))["random"])
        else:
            logger.warning("%s: no random state of process %d; it draws anew.", checkpoint, self.args.process_index)

    def figures(self) -> dict[str, Any]:
        """What is summed up since the last log, of this process."""
        return {
            "loss": self._tr_loss,
            "logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
        }

    def set_figures(self, figures: dict[str, Any]) -> None:
        """Go on from what `figures` gave."""
        self._tr_loss += figures["loss"].to(self._tr_loss.device)
        # The mean that the training ends with is that of the steps it has made itself.
        self._total_loss_scalar -= self._tr_loss.item()
        self._globalstep_last_logged = figures["logged"]
        self._metrics["train"].update(figures["metrics"])
        self._total_train_tokens = figures["tokens"]

    # Ending

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """An epoch; none where a resumed run is at its end, and transformers would make one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        set_epoch(train_dataloader, epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step forward and backward, whose loss is looked at before the optimizer's step."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._guard.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._guard.norm = super()._get_grad_norm(*args, **kwargs)
        return self._guard.norm

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._guard.stopping:
            self._guard.end()
        return super()._finalize_training(*args, **kwargs)


class Guard(TrainerCallback):
    """Stops a training: after a SIGTERM, with a checkpoint; at a loss that is not finite, before it does harm.

    All processes decide alike, whichever of them saw it.
    """

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.norm: Any = None
        self.resumed: Path | None = None
        self.stopping = False
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM while this lasts, in place of any other handler; only Python's main thread can."""
        self.losses, self.stopping, self._signalled = [], False, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a worker of a data loader, which has inherited this
                os._exit(128 + number)
            if not self._signalled:
                logger.warning("SIGTERM: saving after this step, and ending.")
            self._signalled = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.resumed is None:
            return
        file = self.trainer._process_file(self.resumed)
        if file.is_file():
            self.trainer.set_figures(load_state(file)["figures"])

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator, losses = self.trainer.accelerator, self.losses
        loss, self.losses = torch.stack(losses).sum().float(), []
        # The scaler of float16 skips steps whose gradient overflows.
        norm: Any = None if getattr(accelerator, "scaler", None) is not None else self.norm
        if hasattr(norm, "full_tensor"):  # of sharded weights
            norm = norm.full_tensor()
        norm = torch.as_tensor(0.0 if norm is None else norm).to(loss)
        flags = torch.stack([~loss.isfinite(), ~norm.isfinite(), torch.full_like(loss, self._signalled).bool()])
        bad_loss, bad_norm, signalled = accelerator.reduce(flags.float(), reduction="sum").tolist()
        if bad_loss or bad_norm:
            what = f"loss is {loss.item()}" if bad_loss else f"norm of the gradient is {norm.item()}"
            raise ValueError(
                f"step {state.global_step + 1}: the {what}, expected a finite number; the step was not made. Lower "
                "learning_rate (or max_grad_norm), or look at the rows of this step."
            )
        self.stopping = bool(signalled)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.stopping:
            control.should_save = control.should_evaluate = False
        return control

    def end(self) -> None:
        """Leave the process, the checkpoint being written; what would follow a whole training must not."""
        place = Path(self.trainer.args.output_dir, f"checkpoint-{self.trainer.state.global_step}")
        logger.warning("Stopped by SIGTERM. %s is whole; go on from it.", place)
        self.trainer.accelerator.end_training()
        raise SystemExit(128 + signal.SIGTERM)
