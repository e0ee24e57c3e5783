# SPDX-License-Identifier: Apache-2.0
"""The fast way from text to ids gives the ids of the tokenizer, whatever the text and whatever the tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from thinkfusion.tokenising import AFTER_CONTROL, AFTER_TEXT, MAX_WORDS, START, TextEncoder

CORPUS = [
    "Don't you think so? It's 3.14, not 12345; we'll see.\n\nThe end.  Two spaces\tand a tab.\r\n",
    "def f(x):\n    return x + 1  # twice\n",
    "안녕하세요. 이것은 시험입니다! 漢字とかな。 Ça va? Ünïcode – “quoted” … 😀👍🏽",
    "http://a.b/c?d=e&f={g} <tool_call> <|im_end|> [1, 2, {'three': 4}]",
] * 3
# Written for these tests after the kinds of expression in use: one for all, words by case, thousands of digits first.
SPLITS = {
    "plain": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "cased": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+|\p{Lu}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "several": [r"\p{N}{1,3}", r"[一-龥ぁ-ゖァ-ヺ]+", r"[\r\n]| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "gaps": [r"\p{L}+|\s"],
    "over spaces": [r"\p{L}+ ?\p{N}*|[^\p{L}]+"],
}


def byte_level(steps, normalizer=None, *, use_regex=False, add_prefix_space=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def trained(tokenizer, alphabet=()):
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=list(alphabet), special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def splits(name):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]]


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(tokenizer)


def prepending():
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(tokenizer)


FAST = {
    **{name: (lambda name=name: byte_level(splits(name))) for name in SPLITS},
    "GPT-2": lambda: byte_level([], use_regex=True),
    "digits": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], use_regex=True),
    "NFC": lambda: byte_level(splits("plain"), normalizers.NFC()),
}
WHOLE = {
    "lower case": lambda: byte_level(splits("plain"), normalizers.Lowercase()),
    "NFD": lambda: byte_level(splits("plain"), normalizers.NFD()),
    "prefix space": lambda: byte_level([], use_regex=True, add_prefix_space=True),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Prepend": prepending,
}
MAKERS = {**FAST, **WHOLE}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request):
    tokenizer = MAKERS[request.param]()
    return tokenizer, TextEncoder.of(tokenizer)


def ids(encoded):
    return np.frombuffer(encoded, dtype=np.int32).tolist()


def plain_ids(tokenizer, text):
    description = json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
    return Tokenizer.from_str(json.dumps(description)).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", MAKERS)
def test_which_tokenizers_are_cut_here(name):
    assert (TextEncoder.of(MAKERS[name]())._cut is not None) == (name in FAST)


def test_an_expression_whose_words_reach_over_spaces_is_known():
    assert not TextEncoder.of(FAST["over spaces"]())._cut.splits_at_spaces
    assert all(TextEncoder.of(FAST[name]())._cut.splits_at_spaces for name in FAST if name != "over spaces")


COMMON = "aZéß1'./ \n\t\r가나漢かカー–“…_-{}\"\\"
TEXTS = st.one_of(st.text(COMMON, max_size=40), st.text(max_size=30), st.sampled_from(CORPUS))


def test_ids_are_those_of_the_tokenizer(pair):
    tokenizer, encoder = pair

    @settings(max_examples=150, deadline=None)
    @given(st.lists(TEXTS, min_size=1, max_size=5))
    def same(texts):
        encoded = encoder.encode(texts, START)
        assert [ids(each) for each in encoded] == [plain_ids(tokenizer, text) for text in texts]

    same()


@pytest.mark.parametrize(
    "text",
    ["a  b", "a b", " a", "a ", " ", "", "a \n b", "a\n\nb", "don't x's", "a\u00a0b", "e\u0301 é", "\u017fs it'\u017f"],
)
def test_spaces_at_edges_and_in_rows(pair, text):
    tokenizer, encoder = pair
    for _ in range(2):  # the second time from memory
        assert ids(encoder.encode([text], START)[0]) == plain_ids(tokenizer, text)


def test_what_is_forgotten_is_learned_again(monkeypatch):
    monkeypatch.setattr("thinkfusion.tokenising.MAX_WORDS", 3)
    tokenizer = FAST["plain"]()
    encoder = TextEncoder.of(tokenizer)
    for text in CORPUS:
        assert ids(encoder.encode([text], START)[0]) == plain_ids(tokenizer, text)
        assert len(encoder._words) + len(encoder._runs) == 0
    assert MAX_WORDS > 3


@pytest.mark.parametrize("name", MAKERS)
def test_text_around_a_control_token_is_encoded_as_in_the_whole(name):
    """What follows a control token, and what begins a sequence, as the tokenizer sees it in the whole text."""
    tokenizer, parts = MAKERS[name](), ("Hello there", " it's 3.14 so", "안녕 a")
    encoder = TextEncoder.of(tokenizer)
    whole = tokenizer("</s>".join(parts), add_special_tokens=False)["input_ids"]
    first = encoder.encode(parts[:1], START)[0]
    rest = encoder.encode(parts[1:], AFTER_CONTROL)
    expected = ids(first)
    for part in rest:
        expected += [tokenizer.convert_tokens_to_ids("</s>"), *ids(part)]
    assert whole == expected


@pytest.mark.parametrize("name", ["Metaspace always", "Metaspace first", "Prepend", "prefix space"])
def test_text_that_continues_text_has_no_mark_of_a_beginning(name):
    tokenizer = MAKERS[name]()
    encoder = TextEncoder.of(tokenizer)
    assert ids(encoder.encode(["you"], START)[0]) != ids(encoder.encode(["you"], AFTER_TEXT)[0])
    assert "".join(tokenizer.convert_ids_to_tokens(ids(encoder.encode(["you"], AFTER_TEXT)[0]))) == "you"


def test_token_ends_are_characters():
    tokenizer = FAST["plain"]()
    text = "안녕하세요. It's 3.14"
    ends = TextEncoder.of(tokenizer).token_ends(text)
    assert len(ends) == len(plain_ids(tokenizer, text))
    assert ends[-1] == len(text)
    assert ends == sorted(ends)


def test_control_strings_are_text(tokenizer):
    encoded = ids(TextEncoder.of(tokenizer).encode(["a</think>b<|im_end|>"], START)[0])
    assert tokenizer.convert_tokens_to_ids("</think>") not in encoded
    assert tokenizer.decode(encoded) == "a</think>b<|im_end|>"
