# SPDX-License-Identifier: Apache-2.0
"""A trainer whose upload is that of `thinkfusion push`: the export alone, measured, private, with a card of its own."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from peft import PeftModel

from thinkfusion.card_facts import RECIPE, save_recipe
from thinkfusion.digests import weight_files
from thinkfusion.exporting import export_checkpoint
from thinkfusion.publishing import check_repo_name, push_checkpoint, require_token
from thinkfusion.row_report import RowReport
from thinkfusion.safe_training import SafeTrainer

logger = logging.getLogger(__name__)


class HubTrainer(SafeTrainer):
    """`SafeTrainer` that uploads with `push_to_hub` alone, what `publishing` lets pass.

    With `push_to_hub=True` in its settings, name and token are checked before the training begins; nothing is uploaded
    until the method is called. `row_report` tells of the training rows.
    """

    row_report: RowReport
    _trained_at = 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; an export is one of this training if it is newer than its end."""
        result = super().train(*args, **kwargs)
        self._trained_at = time.time()
        return result

    def push_to_hub(
        self,
        commit_message: str = "Upload a model with two modes, by thinkfusion",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        without_report: bool = False,
        license: str | None = None,
        base_model: str | None = None,
    ) -> str | None:
        """Upload the trained model as `push_checkpoint` does, to `hub_model_id`; its address, in the first process.

        What is uploaded is the export in `output_dir`. Without one that is newer than the end of the training, the
        model is exported there first, and adapters are merged into it. Its mode report must be there too: save it with
        `save_report(evaluate_modes(…), output_dir, checkpoint=output_dir)`; or say `without_report`. Private unless
        `private`, or `hub_private_repo`, is False.

        Raises as `push_checkpoint`, and ValueError for `blocking=False`, another branch, or no `hub_model_id`.
        """
        if not blocking or (revision or self.args.hub_revision or "main") != "main":
            raise ValueError("push_to_hub: it waits for the upload, to main; leave blocking and hub_revision unset.")
        self._check_hub(token)
        folder = Path(self.args.output_dir)
        written = [path.stat().st_mtime for path in weight_files(folder)]
        if not written or min(written) < self._trained_at:
            self._export(folder)
        if not self.is_world_process_zero():
            return None
        if not (folder / RECIPE).is_file():
            model = self.accelerator.unwrap_model(self.model)
            adapted = isinstance(model, PeftModel)
            save_recipe(
                folder,
                self.args,
                base_model=getattr(model.config, "_name_or_path", None) or None,
                revision=getattr(model.config, "_commit_hash", None),
                method="LoRA" if adapted else "full fine-tuning",
                datasets=[name for name in self.row_report.formats if name != "rows"],
                steps=self.state.global_step,
                control_tokens=getattr(self, "control_tokens", None),
            )
        private = self.args.hub_private_repo if private is None else private
        return push_checkpoint(
            folder,
            self.args.hub_model_id,
            public=private is False,
            without_report=without_report,
            license=license,
            base_model=base_model,
            message=commit_message,
            token=token or self.args.hub_token,
        )

    def _check_hub(self, token: str | None = None) -> None:
        if not self.args.hub_model_id:
            raise ValueError("hub_model_id: missing; set it to owner/name (--hub_model_id).")
        check_repo_name(self.args.hub_model_id, "hub_model_id")
        require_token(token or self.args.hub_token)

    def _export(self, folder: Path) -> None:
        if self._sharded():
            self.save_model(str(folder))
        elif self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            export_checkpoint(model, self.processing_class, folder, dtype="bfloat16" if self.args.bf16 else None)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check name and token before the training; transformers would make the repository now, and a public one."""
        self._check_hub(token)
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does; uploading, with its checks, is `push_to_hub`'s alone."""
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here: transformers would upload all of output_dir, reports with excerpts of rows too."""
        logger.info("%s is not uploaded; push_to_hub uploads the finished model.", checkpoint_folder)
