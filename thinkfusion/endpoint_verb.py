# SPDX-License-Identifier: Apache-2.0
"""`thinkfusion evaluate --endpoint`: its flags, and one run from a served model to a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.flags import positive

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from thinkfusion.endpoint_replying import EndpointReplier
    from thinkfusion.evaluation import EvaluationPrompt, ModeReport

_OWN = ("model", "preset", "thinking_body", "non_thinking_body", "efforts", "budget_field", "tokenizer", "stream")
_OF_CHECKPOINTS = {
    "probe": "the probe needs the model's probabilities",
    "routes": "routes need the model",
    "lm_eval": "lm-evaluation-harness has its own way of asking a server",
    "trust_remote_code": "no code of a checkpoint is run here",
}


def endpoint_flags(parser: argparse.ArgumentParser) -> None:
    served = parser.add_argument_group(
        "a served model, over the OpenAI-compatible protocol (the key is read from OPENAI_API_KEY)"
    )
    served.add_argument("--endpoint", metavar="URL", help="measure a server instead of a checkpoint: http://HOST/v1")
    served.add_argument("--model", metavar="NAME", help="the server's name for the model")
    served.add_argument("--preset", metavar="NAME", help="how it is switched: thinkfusion (default), qwen3, deepseek, "
                        "glm, axk1, granite, gpt-oss")  # fmt: skip
    served.add_argument(
        "--thinking_body", metavar="JSON", help="fields of a request in thinking mode, for the preset's"
    )
    served.add_argument("--non_thinking_body", metavar="JSON", help="the same in non-thinking mode")
    served.add_argument("--efforts", metavar="HIGH,LOW", help="levels of gpt-oss that are compared (default high,low)")
    served.add_argument("--budget_field", metavar="NAME", help="takes --budgets; vLLM's is thinking_token_budget")
    served.add_argument("--tokenizer", metavar="FOLDER", help="counts tokens (default: the server's usage)")
    served.add_argument("--stream", action="store_true", help="ask for streams, as chat clients do")
    served.add_argument("--concurrency", type=positive, default=64, help="requests at once (default 64)")
    served.add_argument("--retries", type=positive, default=5, help="of a request that failed (default 5)")
    served.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a reply (default 600)")


def check_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if options.endpoint is None:
        given = next((name for name in _OWN if getattr(options, name)), None)
        if given is not None:
            raise ValueError(f"{given}: only with --endpoint.")
        if options.checkpoint is None:
            raise ValueError("name a checkpoint, or a served model with --endpoint and --model.")
        return
    if options.checkpoint is not None:
        raise ValueError(f"found both the checkpoint {options.checkpoint} and --endpoint; measure one at a time.")
    if not options.model:
        raise ValueError("model: say which model the server is to be asked for, with --model NAME.")
    if not options.timeout > 0:
        raise ValueError(f"timeout: found {options.timeout:g}, expected a number of seconds above 0.")
    for name, why in _OF_CHECKPOINTS.items():
        if getattr(options, name):
            raise ValueError(f"{name.replace('_', '-')}: only of a checkpoint; {why}.")


def measure_endpoint(
    options: argparse.Namespace,
    prompts: Sequence[EvaluationPrompt] | None,
    output: Path,
    *,
    obedience: int,
    flip: int,
    budgets: Sequence[int],
) -> ModeReport:
    """Ask the server and count; what was answered before an error is written as a report of what there is.

    Raises ValueError (EndpointError) for a server that cannot be asked.
    """
    from thinkfusion.endpoint import Endpoint, EndpointError, sends_key_in_the_open
    from thinkfusion.endpoint_presets import switch_of
    from thinkfusion.endpoint_replying import JOURNAL_NAME, EndpointReplier, Journal
    from thinkfusion.prompts import task_prompts

    endpoint = Endpoint(options.endpoint, options.model, options.timeout, options.stream)
    switch = switch_of(
        options.preset or "thinkfusion",
        thinking_body=options.thinking_body,
        non_thinking_body=options.non_thinking_body,
        efforts=options.efforts,
    )
    if budgets and options.budget_field is None:
        raise EndpointError("budgets: say which field of a request takes one, e.g. --budget_field "
                            "thinking_token_budget of vLLM.")  # fmt: skip
    if switch.both_reason and (obedience or flip) and not options.full:
        raise EndpointError("obedience and flip: replies of both levels of effort reason, so that nothing tells them "
                            "apart. Leave these out.")  # fmt: skip
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    if sends_key_in_the_open(endpoint.url):
        print(f"Warning: the key goes to {endpoint.url} unencrypted.", file=sys.stderr)
    chosen = list(task_prompts(options.samples, seed=options.seed) if prompts is None else prompts[: options.samples])
    journal = Journal(output / JOURNAL_NAME)
    replier = EndpointReplier(
        endpoint,
        switch,
        journal,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        concurrency=options.concurrency,
        retries=options.retries,
        tokenizer=tokenizer,
        budget_field=options.budget_field,
    )
    if journal.found:
        print(f"{journal.path}: {journal.found:,} replies of an earlier run are there and not asked for again.")
    further = {} if switch.both_reason else {"obedience": obedience, "flip": flip}
    prompts_of = "tasks" if prompts is None else "given"
    try:
        report = _report(replier, chosen, prompts_of, **further, budgets=budgets)
    except (EndpointError, KeyboardInterrupt) as error:
        replier.offline = True
        partial = _report(replier, chosen, prompts_of)
        journal.close(remove=not journal.answers)
        got = sum(values["samples"] - values["classes"]["unanswered"] for values in partial.modes.values())
        if not got:
            raise
        _save(partial, options, output)
        raise type(error)(
            f"{error} {got:,} of {2 * len(chosen):,} replies are in the report in {output}; the same command goes on "
            "from there."
        ) from None
    # Prompts without a reply are asked again by the same command; else it measures anew.
    journal.close(remove=not report.measured["endpoint"]["unanswered"])
    return report


def _report(
    replier: EndpointReplier,
    prompts: Sequence[EvaluationPrompt],
    prompts_of: str,
    **further: Any,
) -> ModeReport:
    from thinkfusion.evaluation import measure_further, summarise
    from thinkfusion.replying import reply_in_both_modes

    replies, seconds = reply_in_both_modes(replier, prompts)
    measured, aside = measure_further(replier, prompts, **further)
    account = replier.account(replies)
    settings = {
        "max_new_tokens": replier.max_new_tokens,
        "temperature": replier.temperature,
        "top_p": replier.top_p,
        "seed": replier.seed,
        "prompts": prompts_of,
        "endpoint": replier.endpoint.url,
        "model": replier.endpoint.model,
        "switch": replier.switch.name,
    }
    return summarise(
        prompts, replies, settings, seconds=seconds, measured={"endpoint": account, **measured}, aside=aside
    )


def _save(report: ModeReport, options: argparse.Namespace, output: Path) -> None:
    from thinkfusion.report_page import save_page
    from thinkfusion.reporting import save_report

    save_report(report, output)
    save_page(report, output, title=options.model, limit=options.transcripts)


def _tokenizer(name: str) -> Tokenizer:
    from tokenizers import Tokenizer

    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer: {path}: no tokenizer can be read from it ({error}).") from None
