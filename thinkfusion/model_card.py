# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: what was measured, what it was made from, and how to switch, from its own files.

What no file tells is said to be not known. Text from outside, such as names of tasks and sources, is escaped, and rows
of the data are never quoted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion import __version__
from thinkfusion.card_facts import CheckpointFacts, Origin, embedded, last_part, read_facts
from thinkfusion.modes import UNJUDGED, Mode
from thinkfusion.reporting import MEANS, RATES
from thinkfusion.row_report import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

UNMEASURED = (
    "**Nothing was measured of this checkpoint: it is not known whether its switch between thinking and "
    "non-thinking works.**"
)
UNKNOWN = "not known"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NAMES = {
    "format_error": "Format error (share of finished replies outside their mode's format)",
    "truncated": "Truncated (share of replies that hit the token limit)",
    "leakage": "Leakage (share of finished replies that think in the answer)",
    "accuracy": "Accuracy",
    "reasoning_tokens": "Mean tokens of reasoning",
    "answer_tokens": "Mean tokens of the answer",
}


def make_card(
    folder: str | Path,
    repo: str,
    *,
    report: Mapping[str, Any] | None = None,
    license: str | Mapping[str, str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The model card of the checkpoint in `folder`, for the repository `repo` (`owner/name`).

    report: what `mode_report.json` holds; None makes a card that says in its first line that nothing was measured.
    license: an identifier of the Hub, "apache-2.0", or its metadata (`license`, `license_name`, `license_link`); left
    out of the metadata if None. base_model: the base's Hub id, where the files do not know it.

    Raises ValueError for a file of the folder that cannot be read, and for a licence that is no identifier.
    """
    from huggingface_hub import ModelCard

    facts = read_facts(folder, report=report, base_model=base_model)
    licence = {"license": license} if isinstance(license, str) else dict(license or {})
    if licence and not LICENSE.fullmatch(str(licence.get("license"))):
        raise ValueError(
            f"license: found {licence.get('license')!r}, expected an identifier of the Hub, such as apache-2.0, mit or "
            "other (--license)."
        )
    card = ModelCard(f"---\n{card_data(facts, repo, licence).to_yaml()}\n---\n\n{card_text(facts, repo, licence)}")
    # As the Hub reads it: whatever could not be parsed again must not be uploaded.
    ModelCard(str(card))
    return card


def card_data(facts: CheckpointFacts, repo: str, licence: Mapping[str, str]) -> ModelCardData:
    """The metadata in front of the card, as huggingface_hub checks it."""
    from huggingface_hub import ModelCardData

    bases = [base.name for base in facts.bases if base.on_hub]
    data = sorted({each.name for each in facts.data if each.on_hub})
    results = eval_results(facts)
    more: dict[str, Any] = dict(licence)
    if bases and facts.relation:
        more["base_model_relation"] = facts.relation
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=data or None,
        language=facts.languages or None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["thinkfusion", "mixture-of-experts", "reasoning", "hybrid-thinking", "conversational"],
        model_name=last_part(repo) if results else None,
        eval_results=results or None,
        **more,
    )


def eval_results(facts: CheckpointFacts) -> list[Any]:
    """`EvalResult`s for the metadata's `model-index`: a metric in a mode each; shares as they are, from 0 to 1."""
    from huggingface_hub import EvalResult

    if facts.report is None:
        return []
    settings = _measuring(facts.report)
    found = []
    for mode in Mode:
        values = facts.report["modes"][mode.value]
        for name in (*RATES, *MEANS):
            if values.get(name) is None:
                continue
            found.append(
                EvalResult(
                    task_type="text-generation",
                    task_name=f"Replies in {_spoken(mode)} mode",
                    dataset_type="thinkfusion-tasks" if settings.get("prompts") == "tasks" else "prompts",
                    dataset_name=_prompts(facts.report),
                    dataset_config=mode.value,
                    metric_type=name,
                    metric_name=_NAMES[name],
                    metric_value=round(float(values[name]), 6),
                    metric_args={
                        "replies": values.get("samples", facts.report["samples"]),
                        "interval_95": [round(float(end), 6) for end in values[f"{name}_interval"]],
                    },
                    verified=None,
                )
            )
    return found


def card_text(facts: CheckpointFacts, repo: str, licence: Mapping[str, str]) -> str:
    """The card below its metadata, in Markdown."""
    sections = [
        _heading(facts, repo),
        _measured(facts.report) if facts.report is not None else "",
        _switching(facts, repo),
        _origin(facts),
        _rows(facts),
        _licence(facts, licence),
        _limits(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# Sections ------------------------------------------------------------------------------------------


def _heading(facts: CheckpointFacts, repo: str) -> str:
    lines = [] if facts.report is not None else [UNMEASURED, ""]
    lines += [f"# {last_part(repo)}", ""]
    kind = "An adapter (LoRA) of a" if facts.adapter else "A"
    lines.append(
        f"{kind} Mixture-of-Experts chat model with two modes: *thinking* (it reasons, then answers) and "
        "*non-thinking* (it answers at once). The user switches."
        if _experts(facts.config) or facts.adapter
        else "A chat model with two modes: *thinking* (it reasons, then answers) and *non-thinking* (it answers at "
        "once). The user switches."
    )
    size = sum(facts.parameters.values())
    types = ", ".join(sorted(facts.parameters))
    found = [f"`{facts.config['model_type']}`"] if facts.config.get("model_type") else []
    found += [f"{_experts(facts.config)} experts a layer"] if _experts(facts.config) else []
    found += [f"{size:,} parameters in these files ({types})"] if size else []
    return "\n".join([*lines, "", f"{', '.join(found)}."] if found else lines)


def _measured(report: Mapping[str, Any]) -> str:
    replies, broken, cut = _broken(report)
    lines = [
        "## What was measured",
        "",
        f"Of {replies - cut:,} finished replies, {broken:,} broke their mode's format"
        + (f"; {cut:,} more were cut at the token limit." if cut else "."),
        "",
        f"| {report['samples']:,} prompts per mode | thinking | non-thinking |",
        "|---|---|---|",
    ]
    modes = [report["modes"][mode.value] for mode in Mode]
    for name in (*RATES, *MEANS):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(_figure(each, name) for each in modes) + " |")
        if name == "accuracy":
            lines += [
                f"| accuracy, {_escaped(task)} | "
                + " | ".join(_figure(each.get("tasks", {}).get(task, {}), "accuracy") for each in modes)
                + " |"
                for task, values in modes[0].get("tasks", {}).items()
                if values.get("accuracy") is not None
            ]
    settings = _measuring(report)
    how = ", ".join(
        f"{name.replace('_', ' ')} {settings[name]}"
        for name in ("max_new_tokens", "temperature", "top_p", "seed")
        if settings.get(name) is not None
    )
    return "\n".join([*lines, "", f"Brackets are 95 % intervals. Prompts: {_prompts(report)}; {how or UNKNOWN}."])


def _switching(facts: CheckpointFacts, repo: str) -> str:
    if facts.scheme is None:
        return (
            "## How to switch\n\nThe chat template is not one that thinkfusion made, so it is not known how it "
            "switches; most take `enable_thinking`."
        )
    default = facts.default_mode or Mode.THINKING
    text = f"""## How to switch

`enable_thinking` (or `thinking`) true or false, in every request; or `/think`, `/no_think` at the end of a user or \
system message, of which the latest wins, and the former over both. Without any: {_spoken(default)}. Scheme \
`{facts.scheme}`, markup `{facts.dialect}`; the template and its default mode are in `chat_template.jinja`.

**transformers**

{_in_transformers(facts, repo)}"""
    if facts.adapter:
        return text + "\n\nServers: merge it first (`thinkfusion.export_checkpoint`), and serve the result."
    return text + _served(facts, repo)


def _in_transformers(facts: CheckpointFacts, repo: str) -> str:
    if facts.adapter:
        loading = f"""from huggingface_hub import snapshot_download
from thinkfusion import load_checkpoint, reply

model, tokenizer = load_checkpoint(snapshot_download("{repo}"))  # onto its base, merged
print(reply(model, tokenizer, "How many legs have two cats?", mode="thinking"))"""
        return f"```python\n{loading}\n```"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "How many legs have two cats?"}}],
    add_generation_prompt=True, enable_thinking=True, return_tensors="pt", return_dict=True,
).to(model.device)
ids = model.generate(**prompt, max_new_tokens=512)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.parse_response(ids, prefix=prompt["input_ids"][0]))  # reasoning_content and content
```"""


def _served(facts: CheckpointFacts, repo: str) -> str:
    marked = facts.dialect != "gpt_oss"
    parser = " --reasoning-parser qwen3" if marked else ""
    split = (
        "The parser `qwen3` splits at `</think>`; send `enable_thinking` with every request, since it does not see "
        "other switches."
        if marked
        else "Replies of this markup have channels; choose the server's parser for gpt-oss."
    )
    return f"""

**vLLM**

```bash
vllm serve {repo}{parser}
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{{
  "model": "{repo}", "messages": [{{"role": "user", "content": "How many legs have two cats?"}}],
  "chat_template_kwargs": {{"enable_thinking": false}}}}'
```

**SGLang**

```bash
python -m sglang.launch_server --model-path {repo}{parser}
```

The request is the same, at port 30000. {split} Neither server was tried with this very checkpoint."""


def _origin(facts: CheckpointFacts) -> str:
    lines = ["## How it was made", "", f"Base: {_named(facts.bases)}."]
    if facts.fusion:
        shares = facts.fusion.get("ratio")
        lines.append(
            f"Fused from a thinking and a non-thinking checkpoint of one base, method `{facts.fusion.get('method')}`, "
            f"share of the thinking one {shares}"
            + (f", by kind of weights {_escaped(facts.fusion['groups'])}." if facts.fusion.get("groups") else ".")
        )
    if facts.recipe.get("method"):
        steps = facts.recipe.get("steps")
        lines.append(f"Trained by {facts.recipe['method']}" + (f", {steps:,} steps." if steps else "."))
    settings = facts.recipe.get("settings") or {}
    if not settings:
        return "\n".join([*lines, "" if facts.fusion else f"The recipe is {UNKNOWN}."]).rstrip()
    shown = {name: value for name, value in settings.items() if value not in (None, "", 0, -1, False)}
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(value)} |" for name, value in sorted(shown.items())]
    versions = facts.recipe.get("versions") or {}
    made = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n".join([*lines, "", f"Settings that are not named are off, or 0. Made with {made or UNKNOWN}."])


def _rows(facts: CheckpointFacts) -> str:
    lines = ["## Data", "", f"Data sets: {_named(facts.data, 'datasets/')}."]
    rows = facts.rows
    if rows is None:
        return "\n".join([*lines, f"What became of their rows is {UNKNOWN}."])
    skipped, altered = (sum((rows.get(name) or {}).values()) for name in ("skipped", "altered"))
    lines.append(
        f"{rows['rows_in']:,} rows read = {rows['rows_kept']:,} kept + {skipped:,} left out; {altered:,} were altered."
    )
    for name, title in (("skipped", "Left out"), ("altered", "Altered")):
        counts = rows.get(name) or {}
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{_escaped(why)} {n:,}" for why, n in sorted(counts.items())) + ".")
    records = (rows.get("account") or {}).get("by") or ()
    if records:
        lines += ["", "| source | mode | language or script | rows | trained tokens |", "|---|---|---|---|---|"]
        lines += [
            f"| {_escaped(_source(record['source'], facts.data))} | {record['mode'].replace('_', '-')} | "
            f"{_escaped(record['language'])} | {record['rows_after']:,} | {record['tokens_after']:,} |"
            for record in records
        ]
        lines += ["", "A row that is trained in both modes counts in each."]
    return "\n".join(lines)


def _licence(facts: CheckpointFacts, licence: Mapping[str, str]) -> str:
    if licence:
        named = licence.get("license_name") or licence["license"]
        link = f" ({licence['license_link']})" if licence.get("license_link") else ""
        text = f"`{_escaped(named)}`{_escaped(link)}."
    else:
        text = "Not stated: it was not given, and the base's card, where there is one, names none."
    return f"## Licence\n\n{text} The licences of the data were not looked up, and may bind too."


def _limits(facts: CheckpointFacts) -> str:
    lines = ["## Limits", ""]
    if facts.report is None:
        lines.append("- Nothing was measured: neither the switch nor any answer.")
    else:
        lines.append(
            f"- Measured is the switch on these prompts ({_prompts(facts.report)}), and answers to those that have a "
            "solution: not knowledge, not safety, not long conversations, no other language than theirs."
        )
    lines += [
        "- Servers turn control strings in a user's text (`</think>`, those of turns) into control tokens. "
        "Filter them.",
        f"- This card was made from the checkpoint's files by thinkfusion {__version__}; nobody has added to it.",
    ]
    return "\n".join(lines)


# Words ------------------------------------------------------------------------------------------


def _escaped(text: Any) -> str:
    """Text from outside as Markdown shows it, in one line; its marks have no effect."""
    line = printable(str(text)).replace("\n", " ").replace("\t", " ")
    return re.sub(r"([\\`*\[\]<>#|~])", r"\\\1", line)


def _spoken(mode: Mode) -> str:
    return mode.value.replace("_", "-")


def _figure(values: Mapping[str, Any], name: str) -> str:
    """A figure with its 95 % interval: percent for a share, one decimal for a mean."""
    value, interval = values.get(name), values.get(f"{name}_interval")
    if value is None or interval is None:
        return "-"
    if name in MEANS:
        return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _broken(report: Mapping[str, Any]) -> tuple[int, int, int]:
    """Replies of both modes, those finished that broke their format, and those that were cut."""
    classes = [report["modes"][mode.value]["classes"] for mode in Mode]
    replies, cut = (
        sum(sum(each.values()) for each in classes),
        sum(each.get(kind, 0) for each in classes for kind in UNJUDGED),
    )
    return replies, replies - cut - sum(each.get("ok", 0) for each in classes), cut


def _measuring(report: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = report.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _prompts(report: Mapping[str, Any]) -> str:
    if _measuring(report).get("prompts") == "tasks":
        return "the tasks embedded in thinkfusion, from problems kept for evaluation"
    tasks = report["modes"][Mode.THINKING.value].get("tasks") or {}
    return "prompts of the maker's own" + (f" ({', '.join(map(_escaped, tasks))})" if tasks else "")


def _experts(config: Mapping[str, Any]) -> int | None:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    return next((config[name] for name in names if config.get(name)), None)


def _named(origins: Sequence[Origin], kind: str = "") -> str:
    if not origins:
        return UNKNOWN
    return ", ".join(
        f"[{origin.name}](https://huggingface.co/{kind}{origin.name})"
        + (f" at `{origin.revision}`" if origin.revision else "")
        if origin.on_hub
        else "the base that is embedded in thinkfusion"
        if embedded(origin)
        else "the tasks that are embedded in thinkfusion"
        if kind and origin.name == "tasks"
        else f"{_escaped(origin.name)} (not on the Hub)"
        for origin in origins
    )


def _source(name: str, data: Sequence[Origin]) -> str:
    """A source of the account as it may be shown: the Hub id, or the last part of a path."""
    return name if any(each.on_hub and name.partition(":")[0] == each.name for each in data) else last_part(name)
