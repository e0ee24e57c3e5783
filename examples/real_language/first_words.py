# SPDX-License-Identifier: Apache-2.0
"""How likely is it, in each mode, that a reply begins as answers do? One forward pass a problem, no generation.

    python examples/real_language/first_words.py runs/real_language/models/default-0-512 --words "Answer: "

In thinking mode that is the probability of an answer without a trace, which generation counts as `never_closed`. It is
given word by word, too: modes whose replies begin with the same word part at the second one, which has fewer rows to be
learned from. The problems are those of the test file that `compare.py` asks first.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from compare import MODES
from data import ANSWER, DEFAULT, DataMissingError, read_data


def first_words(model: Any, tokenizer: Any, questions: list[str], words: str, temperature: float) -> dict[str, Any]:
    """By mode: `tokens`, the mean probability of each token of `words` after the former, and `all`, of them all.

    questions: one user turn each; the means are over them. temperature: divides the logits, above 0.
    """
    import torch

    from thinkfusion import Mode
    from thinkfusion.generation import Prompter

    prompter = Prompter(tokenizer)
    written = tokenizer(words, add_special_tokens=False)["input_ids"]
    found = {}
    for mode in MODES:
        rows = []
        for question in questions:
            prompt = prompter.prompt_ids([{"role": "user", "content": question}], Mode.parse(mode), None)
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *written]], device=model.device)).logits[0]
            shares = (logits[len(prompt) - 1 : -1].double() / temperature).softmax(-1)
            rows.append(shares[range(len(written)), written])
        each = torch.stack(rows)
        found[mode] = {
            "tokens": [round(value, 4) for value in each.mean(0).tolist()],
            "all": round(float(each.prod(1).mean()), 5),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of checkpoints")
    parser.add_argument("--words", default=ANSWER, help="how answers begin (default: %(default)r)")
    parser.add_argument("--data", type=Path, default=DEFAULT, help="folder of the data (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="problems (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the replies (default: %(default)s)")
    options = parser.parse_args()
    if options.samples < 1 or options.temperature <= 0:
        told = f"--samples {options.samples} --temperature {options.temperature:g}"
        sys.exit(f"first_words: found {told}, expected more than 0 of both.")
    if not options.words:
        sys.exit('first_words: --words is empty. Say how answers begin, as in --words "Answer: ".')
    try:
        data = read_data(options.data)
    except DataMissingError as error:
        sys.exit(f"first_words: {error}")
    from thinkfusion import load_checkpoint

    questions = [row["question"] for row in data.tests[: options.samples]]
    for checkpoint in options.checkpoints:
        model, tokenizer = load_checkpoint(checkpoint, dtype="float32")
        found = first_words(model, tokenizer, questions, options.words, options.temperature)
        print(json.dumps({"checkpoint": checkpoint.name, "words": options.words, **found}), flush=True)


if __name__ == "__main__":
    main()
