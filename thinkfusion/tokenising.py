# SPDX-License-Identifier: Apache-2.0
"""From text to token ids, fast: a tokenizer that knows no control token, and remembers the words it has seen.

Byte-level tokenizers cut a text into words by a regular expression, and merge within words only. So the ids of a text
are those of its words, one after another, and a word has to be merged but once. The cutting is done here, by the
tokenizer's own expression, for texts of characters on whose classes all engines of regular expressions agree (Latin,
Hangul, Han, kana and common punctuation); any other text, and any other kind of tokenizer, goes through the tokenizer
whole. Both give the same ids: tests compare them on arbitrary text.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_BYTES = 4
"""Ids travel as the bytes of 32-bit integers: they are joined and written without ever being Python objects."""
START, AFTER_CONTROL, AFTER_TEXT = range(3)
MAX_WORDS = 400_000
LONGEST_WORD = 200
REMEMBERED = 4
"""Tokenizers whose words are remembered: training, evaluation and replies of one run share them."""
# No control characters, no white space beyond ASCII's, no combining marks: what is left is read alike by every engine,
# and unchanged by NFC.
_UNCOMMON = re.compile(r"[^\t\n\r -~À-ÖØ-öø-ÿ‐-‧、-〃「-』가-힣一-鿿ぁ-ゖァ-ヺ]").search
_SPACE_INSIDE = re.compile(r"\S ")
_KINDS = "aZ1'./ \n가"
"""One character of each kind that the expressions of pre-tokenizers tell apart."""
# What the pre-tokenizer ByteLevel cuts by, where it is told to (the expression of GPT-2).
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TextEncoder:
    """Encodes text as ordinary text, whatever control strings it holds.

    Tokenizers that mark the beginning of a text with a space (SentencePiece) tell apart where a text stands: at the
    START of a sequence, AFTER_CONTROL tokens, or AFTER_TEXT, which it continues.
    """

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
        """The encoder of a tokenizer; one that was asked for before comes with all that it remembers."""
        return _of(tokenizer.backend_tokenizer.to_str())

    def __init__(self, description: dict[str, Any]) -> None:
        spaces = description["added_tokens"]
        self._whole = _build(description)
        scheme = _prefix_scheme(description)
        unmarked = _build(_without_prefix(description)) if scheme is not None else self._whole
        # "first" marks the text that begins a sequence, and not what follows a control token.
        self._at = (self._whole, unmarked if scheme == "first" else self._whole, unmarked)
        self._one_kind = scheme is None
        self._cut = None if spaces else _word_cutter(description)
        # Without the tokens before them these have other ids.
        self._moved = {self._whole.token_to_id(token["content"]): token["id"] for token in spaces}
        if self._cut is not None:
            self._words = _Words(description, self._cut)
            self._runs, self._firsts = _Runs(self._words, " "), _Runs(self._words, "")

    def kinds(self) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
        """Empty memories of texts for START, AFTER_CONTROL and AFTER_TEXT; one and the same if all are alike."""
        memory: dict[str, bytes] = {}
        return (memory, memory, memory) if self._one_kind else (memory, {}, {})

    def fill(self, kinds: Sequence[dict[str, bytes]]) -> None:
        """Set the ids of every text in the memories that `kinds` made."""
        for place, memory in enumerate(kinds[:1] if self._one_kind else kinds):
            memory.update(zip(memory, self.encode(list(memory), place), strict=True))

    def encode(self, texts: Sequence[str], place: int) -> list[bytes]:
        """The ids of each text at such a place, as the bytes of 32-bit integers in the machine's order."""
        tokenizer = self._at[place]
        if self._moved:
            whole = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [array("i", [self._moved.get(token, token) for token in each.ids]).tobytes() for each in whole]
        if self._cut is None:
            return _encode_whole(tokenizer, texts)
        words, runs, firsts, splits = self._words, self._runs, self._firsts, self._cut.splits_at_spaces
        encoded: list[bytes] = []
        others: list[int] = []
        for index, text in enumerate(texts):
            if _UNCOMMON(text) is not None:
                encoded.append(b"")
                others.append(index)
            elif splits and "  " not in text and "\n " not in text and " \n" not in text and not _odd_space(text):
                first, *rest = text.split(" ")
                encoded.append(firsts[first] + b"".join(map(runs.__getitem__, rest)))
            else:
                encoded.append(words.of(text))
        for memory in (words, runs, firsts):
            if len(memory) > MAX_WORDS:
                memory.clear()
        for index, ids in zip(others, _encode_whole(tokenizer, [texts[index] for index in others]), strict=True):
            encoded[index] = ids
        return encoded

    def token_ends(self, text: str) -> list[int]:
        """For each token of `text`, the character at which it ends."""
        return [end for _, end in self._whole.encode(text, add_special_tokens=False).offsets]


def _odd_space(text: str) -> bool:
    return "\t" in text or "\r" in text


def token_bytes(token: int) -> bytes:
    """One token as `TextEncoder` gives many."""
    return array("i", [token]).tobytes()


class _Cutter:
    """Cuts a text into words by one expression after another, as the pre-tokenizer does."""

    def __init__(self, patterns: Sequence[str]) -> None:
        import regex

        self._splitting = [regex.compile(f"({pattern})") for pattern in patterns]
        self._last = regex.compile(patterns[-1])
        if any(pattern.groups != 1 for pattern in self._splitting):
            raise regex.error("an expression with groups of its own")
        samples = [(text, self._isolated(text)) for text in map("".join, product(_KINDS, repeat=3))]
        self.splits_at_spaces = not any(_SPACE_INSIDE.search(word) for _, words in samples for word in words)
        """Whether no word holds a space behind another character, so that words never reach over a single space."""
        # Where one expression matches every character, finding its matches is all there is to do.
        if len(patterns) == 1 and all(self._last.findall(text) == words for text, words in samples):
            self.matches: Callable[[str], list[str]] = self._last.findall
        else:
            self.matches = self._isolated
        """The words of a text; what an expression does not match stands between its matches, and is a word too."""

    def _isolated(self, text: str) -> list[str]:
        pieces = [text]
        for pattern in self._splitting:
            pieces = [part for piece in pieces for part in pattern.split(piece) if part]
        return pieces


# Two memories: reading a large vocabulary takes longer than writing it, and what differs is often no matter here.
@lru_cache(maxsize=REMEMBERED)
def _of(whole: str) -> TextEncoder:
    description = json.loads(whole)
    # Runs of white space are tokens in some tokenizers (OLMoE's), and no markup.
    spaces = [token for token in description["added_tokens"] if not token["content"].strip()]
    description |= {"added_tokens": spaces, "post_processor": None, "truncation": None, "padding": None}
    return _remembered(json.dumps(description))


@lru_cache(maxsize=REMEMBERED)
def _remembered(description: str) -> TextEncoder:
    return TextEncoder(json.loads(description))


class _Words(dict[str, bytes]):
    """The ids of every word seen so far, as bytes."""

    def __init__(self, description: dict[str, Any], cut: _Cutter) -> None:
        super().__init__()
        self.cut = cut.matches
        # A word is not cut again: alone it might look different to an expression that looks ahead.
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        self._merge = _build({**description, "pre_tokenizer": byte_level})

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._merge.encode(word, add_special_tokens=False).ids).tobytes()
        if len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids

    def of(self, text: str) -> bytes:
        return b"".join(map(self.__getitem__, self.cut(text)))


class _Runs(dict[str, bytes]):
    """The ids of what stands between two spaces, with what is before it: a word and its punctuation, as a rule."""

    def __init__(self, words: _Words, before: str) -> None:
        super().__init__()
        self._cut, self._id_of, self._before = words.cut, words.__getitem__, before

    def __missing__(self, run: str) -> bytes:
        ids = b"".join(map(self._id_of, self._cut(self._before + run)))
        if len(run) <= LONGEST_WORD:
            self[run] = ids
        return ids


def _build(description: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(description))


def _encode_whole(tokenizer: Any, texts: Sequence[str]) -> list[bytes]:
    if not texts:
        return []
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [array("i", each.ids).tobytes() for each in encoded]


def _parts(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps."""
    if stage is None:
        return []
    if stage["type"] != "Sequence":
        return [stage]
    return [part for inner in stage[key] for part in _parts(inner, key)]


def _word_cutter(description: dict[str, Any]) -> _Cutter | None:
    """The tokenizer's own way to cut a text into words, or None if it has one that is not known here."""
    import regex

    normalizers = _parts(description["normalizer"], "normalizers")
    steps = _parts(description["pre_tokenizer"], "pretokenizers")
    known = description["model"]["type"] == "BPE" and all(step["type"] == "NFC" for step in normalizers)
    if not known or not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    patterns = []
    for step in steps[:-1]:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))
        else:
            return None
    patterns += [_BYTE_LEVEL] if steps[-1]["use_regex"] else []
    try:
        return _cutter(tuple(patterns)) if patterns else None
    except regex.error:
        return None


@cache
def _cutter(patterns: tuple[str, ...]) -> _Cutter:
    return _Cutter(patterns)


def _prefix_scheme(description: dict[str, Any]) -> str | None:
    """How the beginning of a text is marked by a space: "always", "first" (of a sequence), or None for not at all."""
    for step in _parts(description["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            return str(step["prepend_scheme"])
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            return "always"
    if any(step["type"] == "Prepend" for step in _parts(description["normalizer"], "normalizers")):
        return "always"
    return None


def _without_prefix(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, which marks no beginning."""
    changed: dict[str, Any] = json.loads(json.dumps(description))
    for step in _parts(changed["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    kept = [step for step in _parts(changed["normalizer"], "normalizers") if step["type"] != "Prepend"]
    changed["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return changed
