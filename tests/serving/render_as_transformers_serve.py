# SPDX-License-Identifier: Apache-2.0
"""The ids that `transformers serve` makes of requests, by its own functions; runs in that engine's environment.

Requests come as a JSON list on the standard input, ids go as one to the standard output.
"""

import json
import sys

from transformers import AutoTokenizer
from transformers.cli.serving.utils import BaseHandler, Modality

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rendered = [
    tokenizer.apply_chat_template(
        BaseHandler.get_processor_inputs_from_messages(request["messages"], Modality.LLM),
        add_generation_prompt=True,
        tools=request.get("tools"),
        return_dict=True,
        **request["chat_template_kwargs"],
    )["input_ids"]
    for request in json.load(sys.stdin)
]
print(json.dumps(rendered))
