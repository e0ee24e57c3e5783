# SPDX-License-Identifier: Apache-2.0
"""What a training imports, for `forked`: collecting garbage looks at every object that is imported, and finds none."""

import gc

gc.disable()

import accelerate
import datasets
import peft
import transformers.trainer
import trl.trainer.sft_trainer

import thinkfusion.training

__all__ = ["accelerate", "datasets", "peft", "thinkfusion", "transformers", "trl"]

gc.freeze()
gc.enable()
