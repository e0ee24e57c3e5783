# SPDX-License-Identifier: Apache-2.0
"""How the two modes are combined: which rows and exchanges are trained in which mode, how often, in which order.

Every random choice is a hash of the seed and of the row's place in its source, so that it is the same under
streaming, in any number of processes and in any order of the sources.
"""

from __future__ import annotations

import hashlib
import os.path
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from thinkfusion.conversations import Conversation, DataError, Exchange
from thinkfusion.modes import Mode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_SHARE = 0.05
"""Of the sequences, for each mode; `ratio` may ask for less."""
ONE_MODE: dict[str, tuple[Mode, ...]] = {"thinking": (Mode.THINKING,), "non_thinking": (Mode.NON_THINKING,)}
"""Mixtures for a checkpoint of one mode, to be fused with one of the other."""
MIXTURES = ("paired", "combined", "ratio", "sequential", *ONE_MODE)
RATIO_UNITS = ("tokens", "samples")
BOTH: tuple[Mode, ...] = (Mode.THINKING, Mode.NON_THINKING)
LARGEST_DENOMINATOR = 10**9


@dataclass(frozen=True)
class MixtureOptions:
    """How modes are combined. Our own runs and KRAFTON's (arXiv 2601.09200) agree on the default.

    mixture: `paired` trains an exchange with reasoning in both modes, the non-thinking answer being the thinking one
        without its reasoning (or a given one). The control token is then the only thing that tells the modes apart:
        format errors in thinking mode fall from 96 % to 0.4 % (KRAFTON). `combined` trains every exchange in its own
        mode; `ratio` does, and thins the too frequent mode; `sequential` does, all of thinking first (100 % format
        errors in thinking mode there; for comparison). `thinking` trains exchanges with reasoning, in thinking mode
        alone, `non_thinking` trains all, in non-thinking mode alone: for two checkpoints that are fused.
    pair_fraction: share of the rows with reasoning that `paired` trains in both modes; each other one is trained in
        one mode, drawn evenly. Different questions per mode leak less reasoning into non-thinking answers
        ("Demystifying Hybrid Thinking", arXiv 2510.12680).
    ratio: share of thinking in (0, 1), or thinking : non-thinking as text, such as "1.5:1" (EXAONE 4.0). Stored as
        the share. Only for the mixture `ratio`, which needs it.
    ratio_unit: what the ratio counts: trained "tokens", or sequences ("samples").
    max_rows_per_source, max_tokens_per_source: caps on what is kept of each source, by rows and by trained tokens.
    seed: of all draws.
    """

    mixture: str = "paired"
    pair_fraction: float = 1.0
    ratio: float | str | None = None
    ratio_unit: str = "tokens"
    max_rows_per_source: int | None = None
    max_tokens_per_source: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mixture", self.mixture, MIXTURES),
            ("ratio_unit", self.ratio_unit, RATIO_UNITS),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)} (--{name}).")
        check_share("pair_fraction", self.pair_fraction)
        for name in ("max_rows_per_source", "max_tokens_per_source"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("seed", self.seed, smallest=0)
        if self.mixture != "paired" and self.pair_fraction != 1:
            raise ValueError(
                f"pair_fraction: found {self.pair_fraction}, but only the mixture 'paired' makes pairs. Leave "
                "--pair_fraction out, or use --mixture paired."
            )
        if self.mixture == "ratio" and self.ratio is None:
            raise ValueError(
                "ratio: the mixture 'ratio' needs the share of thinking, e.g. --ratio 0.6, or --ratio 1.5:1 for "
                "thinking : non-thinking."
            )
        if self.mixture != "ratio" and (self.ratio is not None or self.ratio_unit != "tokens"):
            raise ValueError(
                f"ratio: it has no effect on the mixture {self.mixture!r}. Use --mixture ratio, or leave --ratio and "
                "--ratio_unit out."
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", _thinking_share(self.ratio))


def check_share(name: str, value: Any) -> None:
    """Raise ValueError, naming the field and its flag, unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: found {value!r}, expected a share from 0 to 1 (--{name}).")


def check_count(name: str, value: Any, smallest: int = 1) -> None:
    """Raise ValueError, naming the field and its flag, unless `value` is a whole number of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}: found {value!r}, expected a whole number of at least {smallest} (--{name}).")


def _thinking_share(given: Any) -> float:
    try:
        if isinstance(given, str) and ":" in given:
            thinking, non_thinking = (float(part) for part in given.split(":"))
            share = thinking / (thinking + non_thinking) if thinking > 0 and non_thinking > 0 else 0.0
        else:
            share = 0.0 if isinstance(given, bool) else float(given)
        if 0 < Fraction(share).limit_denominator(LARGEST_DENOMINATOR) < 1:
            return share
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(
        f"ratio: found {given!r}, expected the share of thinking, between 0 and 1 (--ratio 0.6), or thinking : "
        "non-thinking (--ratio 1.5:1)."
    )


def draw(seed: int, purpose: str, conversation: Conversation) -> float:
    """A number in [0, 1) that depends on the seed, the purpose and the row's place alone.

    The place is the base name of the source and the line, so that a moved file is drawn alike; a conversation that
    was read from nowhere is told by its texts.
    """
    if conversation.line is None:
        place = repr((conversation.system, conversation.exchanges))
    else:
        place = f"{os.path.basename(conversation.source)}\0{conversation.line}"
    key = f"{seed}\0{purpose}\0{place}".encode("utf-8", "surrogatepass")
    # 53 bits are what a float holds exactly, so that the result stays below 1.
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


def assign_modes(conversation: Conversation, options: MixtureOptions) -> Conversation:
    """The conversation with the modes that each of its exchanges is trained in.

    Exchanges without modes are context and stay so; a pre-paired one is trained in both modes in any mixture.
    Raises DataError `unexpected_reasoning` for a row that is marked as non-thinking and has reasoning, which a
    mixture other than `paired` would have to throw away.
    """
    modes = BOTH
    paired, one_mode = options.mixture == "paired", ONE_MODE.get(options.mixture)
    if paired and options.pair_fraction < 1 and draw(options.seed, "pair", conversation) >= options.pair_fraction:
        modes = BOTH[:1] if draw(options.seed, "pair_mode", conversation) < 0.5 else BOTH[1:]
    exchanges = []
    for exchange in conversation.exchanges:
        wanted = exchange.modes
        if not wanted:
            pass
        elif one_mode is not None:
            wanted = one_mode if _teaches(exchange, one_mode) else ()
        elif exchange.ends_only:
            pass
        elif exchange.alternative:
            wanted = BOTH
        elif exchange.has_reasoning:
            if paired:
                wanted = modes
            elif wanted == BOTH[1:]:
                raise _unexpected_reasoning(conversation)
        if wanted is not exchange.modes:
            # Written out, since `replace` takes three times as long, and this runs for every row.
            exchange = Exchange(exchange.user, exchange.steps, wanted, exchange.alternative, exchange.ends_only)  # noqa: PLW2901
        exchanges.append(exchange)
    return Conversation(
        tuple(exchanges),
        conversation.system,
        conversation.tools,
        conversation.source,
        conversation.line,
        conversation.language,
    )


def _teaches(exchange: Exchange, modes: tuple[Mode, ...]) -> bool:
    """Whether an exchange is trained by a mixture of one mode: reasoning can be left out, and not made up."""
    return exchange.has_reasoning or exchange.ends_only if modes == BOTH[:1] else not exchange.ends_only


def _unexpected_reasoning(conversation: Conversation) -> DataError:
    return DataError(
        "unexpected_reasoning",
        "mode: the row is marked as non-thinking and has reasoning. Remove one of the two, or use the mixture "
        "'paired'.",
        source=conversation.source,
        line=conversation.line,
    )


def copies(conversation: Conversation, weight: float, options: MixtureOptions) -> int:
    """How often a row of a source with this weight is used: 2 means twice, 0.5 a random half of the rows once."""
    whole = int(weight)
    rest = weight - whole
    return whole + (rest > 0 and draw(options.seed, "weight", conversation) < rest)


def both_modes_check(counts: Mapping[Mode, int]) -> None:
    """Raise ValueError unless a twentieth is trained in each mode: a switch cannot be learned from one side."""
    total = sum(counts.values())
    for mode in Mode:
        found = counts.get(mode, 0)
        if found >= LEAST_SHARE * total > 0:
            continue
        remedy = (
            "Paired training needs rows with reasoning"
            if mode is Mode.THINKING
            else "Use the mixture 'paired' (--mixture paired), which trains rows with reasoning in both modes: all, or "
            "a larger pair_fraction of them"
        )
        few = f"only {found:,} of {total:,} ({found / total:.1%}) are" if found else "no row is"
        least = f", expected {LEAST_SHARE:.0%} at least" if found else ""
        raise ValueError(f"{few} trained in {mode} mode{least}, so the switch cannot be learned. {remedy}.")


def mix(conversations: Sequence[Conversation], mixture: str | MixtureOptions = "paired") -> list[Conversation]:
    """The conversations with the modes that each exchange is trained in; `mixture` is a name or all the options.

    Raises ValueError when one mode gets under a twentieth of the exchanges, for an unknown mixture, and for what only
    `prepare` can do, since it takes rendered sequences and their tokens: `ratio`, `sequential` and caps. DataError as
    `assign_modes`.
    """
    named = mixture.mixture if isinstance(mixture, MixtureOptions) else mixture
    capped = isinstance(mixture, MixtureOptions) and (mixture.max_rows_per_source or mixture.max_tokens_per_source)
    if named in ("ratio", "sequential") or capped:
        what = "a cap per source" if capped else f"the mixture {named!r}"
        raise ValueError(f"mixture: {what} chooses and orders sequences by their tokens; use prepare(…) for it.")
    options = mixture if isinstance(mixture, MixtureOptions) else MixtureOptions(mixture)
    mixed = [assign_modes(conversation, options) for conversation in conversations]
    if options.mixture not in ONE_MODE:
        both_modes_check(Counter(mode for each in mixed for exchange in each.exchanges for mode in exchange.modes))
    return mixed


@dataclass(frozen=True)
class SequenceTable:
    """Training sequences in the order of their files, one array each of equal length, one element a sequence.

    row: number of the row it comes from; copies of a row have numbers of their own.
    mode: index into `tuple(Mode)`: 0 thinking, 1 non-thinking.
    source: number of its source.
    tokens: its trained tokens.
    draw: `draw(seed, "select", conversation)` of its row.
    """

    row: NDArray[np.int64]
    mode: NDArray[np.int8]
    source: NDArray[np.int32]
    tokens: NDArray[np.int64]
    draw: NDArray[np.float64]


def select(table: SequenceTable, options: MixtureOptions, *, both_modes: bool = True) -> NDArray[np.int64]:
    """Indices of the sequences that are trained on, in the order of training.

    Caps keep whole rows, so that pairs stay pairs: those of smallest draw of each source, up to the first that goes
    over. `ratio` then thins the too frequent mode, keeping the sequences of smallest draw, as near to the share as
    whole sequences allow. `sequential` puts thinking first; a trainer that shuffles undoes it ("Fusion Training for
    Mathematical Generalization", ACL 2026). The result depends on no order but that of rows of equal draw.

    Raises ValueError if a cap leaves nothing of a source, and, unless `both_modes` is off, if a mode has under a
    twentieth of the sequences.
    """
    import numpy as np

    kept = _within_caps(table, options)
    if (both_modes and options.mixture not in ONE_MODE) or options.mixture == "ratio":
        modes = table.mode[kept]
        both_modes_check({mode: int(np.count_nonzero(modes == index)) for index, mode in enumerate(Mode)})
    if options.mixture == "ratio":
        kept = _to_ratio(table, kept, options)
    if options.mixture == "sequential":
        kept = kept[np.argsort(table.mode[kept], kind="stable")]
    return kept


def _within_caps(table: SequenceTable, options: MixtureOptions) -> NDArray[np.int64]:
    import numpy as np

    if not len(table.row) or options.max_rows_per_source is options.max_tokens_per_source is None:
        return np.arange(len(table.row), dtype=np.int64)
    rows, first, row_of = np.unique(table.row, return_index=True, return_inverse=True)
    tokens = np.zeros(len(rows), dtype=np.int64)
    np.add.at(tokens, row_of, table.tokens)
    # A stable sort, and rows rise: of equal draws, the smaller row comes first.
    order = np.lexsort((table.draw[first], table.source[first]))
    sources = table.source[first][order]
    starts = np.flatnonzero(np.r_[True, sources[1:] != sources[:-1]])
    sizes = np.diff(np.r_[starts, len(sources)])
    total = np.cumsum(tokens[order])
    before = np.repeat(total[starts] - tokens[order][starts], sizes)
    within = np.ones(len(rows), dtype=bool)
    if options.max_rows_per_source is not None:
        within &= np.arange(len(rows)) - np.repeat(starts, sizes) < options.max_rows_per_source
    if options.max_tokens_per_source is not None:
        within &= total - before <= options.max_tokens_per_source
        if not within[starts].all():
            needed = int(tokens[order][starts[np.flatnonzero(~within[starts])[0]]])
            raise ValueError(
                f"max_tokens_per_source: found {options.max_tokens_per_source:,}, but the first row drawn of a source "
                f"has {needed:,} trained tokens, so that nothing of it is left. Raise --max_tokens_per_source."
            )
    keep = np.empty(len(rows), dtype=bool)
    keep[order] = within
    return np.flatnonzero(keep[row_of])


def _to_ratio(table: SequenceTable, kept: NDArray[np.int64], options: MixtureOptions) -> NDArray[np.int64]:
    import numpy as np

    thinking = table.mode[kept] == 0
    amounts = table.tokens[kept] if options.ratio_unit == "tokens" else np.ones(len(kept), dtype=np.int64)
    share = Fraction(float(options.ratio or 0)).limit_denominator(LARGEST_DENOMINATOR)
    amount = {True: int(amounts[thinking].sum()), False: int(amounts[~thinking].sum())}
    # Fractions and whole numbers, since a rounding error could tip the choice between two equally near cuts.
    targets = {True: amount[False] * share / (1 - share), False: amount[True] * (1 - share) / share}
    frequent = amount[True] > targets[True]
    candidates = np.flatnonzero(thinking == frequent)
    order = np.lexsort((table.row[kept[candidates]], table.draw[kept[candidates]]))
    total = np.cumsum(amounts[candidates][order])
    target = targets[frequent]
    count = int(np.searchsorted(total, target.numerator // target.denominator, side="right"))
    reached = int(total[count - 1]) if count else 0
    if count < len(total) and (not count or int(total[count]) - target < target - reached):
        count += 1
    keep = thinking != frequent
    keep[candidates[order[:count]]] = True
    thinned: NDArray[np.int64] = kept[keep]
    return thinned


STAGES = ("before", "after")


COUNTS = ("rows_before", "rows_after", "tokens_before", "tokens_after")


class TokenAccount:
    """Rows and trained tokens by source, mode and language, before and after the mixture.

    A row that is trained in both modes counts as a row of each. Partial accounts, of worker processes, are merged.
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], list[int]] = {}
        """By (source, mode, language): rows before, rows after, trained tokens before, trained tokens after."""

    def add(
        self, source: str, mode: Mode | str, language: str, tokens: int, *, stage: str = "before", rows: int = 1
    ) -> None:
        """Count `rows` rows that have `tokens` trained tokens together, at the stage "before" or "after"."""
        if stage not in STAGES:
            raise ValueError(f"stage: {stage!r} is unknown; choose one of {', '.join(STAGES)}.")
        after = STAGES.index(stage)
        cell = self.cells.setdefault((source, Mode(mode).value, language), [0, 0, 0, 0])
        cell[after] += rows
        cell[2 + after] += tokens

    def merge(self, other: TokenAccount) -> None:
        """Add what another account has counted."""
        for key, counts in other.cells.items():
            mine = self.cells.setdefault(key, [0, 0, 0, 0])
            mine[:] = [ours + theirs for ours, theirs in zip(mine, counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `by`, one record per source, mode and language in sorted order, and `total`."""
        records = [
            {"source": source, "mode": mode, "language": language} | _named(counts)
            for (source, mode, language), counts in sorted(self.cells.items())
        ]
        return {"by": records, "total": _named(self._total())}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TokenAccount:
        """The account that `to_dict` gave."""
        account = cls()
        for record in given["by"]:
            key = (record["source"], record["mode"], record["language"])
            account.cells[key] = [record[name] for name in COUNTS]
        return account

    def __str__(self) -> str:
        header = ["source", "mode", "language", "rows before", "rows after", "tokens before", "tokens after"]
        lines = [[*key, *(f"{count:,}" for count in counts)] for key, counts in sorted(self.cells.items())]
        lines = [header, *lines, ["total", "", "", *(f"{count:,}" for count in self._total())]]
        # A name that comes from the data may hold terminal escapes.
        table = [["".join(c if c.isprintable() else "?" for c in text) for text in line] for line in lines]
        widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
        return "\n".join(_aligned(line, widths) for line in table)

    def _total(self) -> list[int]:
        return [sum(counts[index] for counts in self.cells.values()) for index in range(4)]


def _named(counts: Iterable[int]) -> dict[str, int]:
    return dict(zip(COUNTS, counts, strict=True))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    gaps = [" " * (width - _width(text)) for text, width in zip(line, widths, strict=True)]
    names = [text + gap for text, gap in zip(line[:3], gaps[:3], strict=True)]
    numbers = [gap + text for text, gap in zip(line[3:], gaps[3:], strict=True)]
    return "  ".join([*names, *numbers])


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes: East Asian characters are two wide, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


SAMPLE_FROM, SAMPLE = 2000, 500
SYLLABIC = {"hangul": 3, "cjk": 3, "kana": 3}
LANGUAGES = {"hangul": "ko", "kana": "ja", "cjk": "zh", "thai": "th"}
SCRIPTS = {*LANGUAGES, "latin", "cyrillic", "arabic", "hebrew", "devanagari", "greek"}
KANA_SHARE = 0.05


def language_of(text: str) -> str:
    """The language of a text as far as its script tells it: ko, ja, zh, th, or the name of the script.

    The scripts are latin, cyrillic, arabic, hebrew, devanagari and greek; else "other". Languages of one script are
    not told apart: English, Vietnamese and plain code are all "latin". A row that names its language is not guessed:
    use `conversation.language or language_of(…)`. Looked at are up to 500 characters spread over the first 2,000. A
    Korean, Japanese or Chinese character counts as much as three letters, about what it says, so that formulas and
    code do not outweigh the prose.
    """
    head = text[:SAMPLE_FROM]
    if head.isascii():
        return "latin"
    weights: Counter[str] = Counter()
    for character, count in Counter(head[:: max(1, len(head) // SAMPLE)]).items():
        script = _script(character)
        weights[script] += count * SYLLABIC.get(script, 1)
    del weights[""]
    if weights["kana"] > KANA_SHARE * (weights["kana"] + weights["cjk"]):
        weights["kana"] += weights.pop("cjk", 0)
    script, weight = max(weights.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    return LANGUAGES.get(script, script) if weight else "other"


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    """The script of a letter by its Unicode name, or nothing for what is no letter of these scripts."""
    if not character.isalpha():
        return ""
    words = unicodedata.name(character, "").lower().replace("-", " ").split()
    script = next((word for word in words[:2] if word not in ("halfwidth", "fullwidth")), "")
    script = "kana" if script in ("hiragana", "katakana") else script
    return script if script in SCRIPTS else ""
