# SPDX-License-Identifier: Apache-2.0
"""Build the embedded base checkpoint: a Mixture of Experts of about a million parameters, and its tokenizer.

    python recipes/tiny_base.py --output_dir thinkfusion/tiny_base

The base has read lines of the embedded tasks, `question`, `reasoning`, `answer`, without any chat markup: it can
reason, and it knows neither turns nor modes. Its tokenizer has one special token, `<|endoftext|>`. What turns it
into a chat model with a switch is the ordinary path of `recipes/sft.py`, as for any other checkpoint.

The sizes are ones that vLLM and llama.cpp take too: heads of 32, widths that are multiples of 32, experts in
every layer, a vocabulary that is a multiple of 64. It takes a quarter of an hour on one core; one seed on one machine
gives one checkpoint, byte for byte.
"""

import argparse
import math
import time
from collections.abc import Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from thinkfusion.tasks import generate_samples, grade

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
# How Qwen2 and Qwen3 split text before byte-pair encoding; a digit is always a token of its own.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Common words, so that text other than the tasks does not fall apart into single bytes.
ENGLISH_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her she there would their we him been has when who will no more if out so up said what its
about than into them can only other time new some could these two may first then do any like my now over such
our man me even most made after also well must back through years where much your way down should because long
each just state people those too mr how little good world make very year still see work men day get here old
life both between being under three never know same last another while us off might great go come since against
right came take used himself few house use place during high without again home around small however found mrs
part school thought went say general once upon every left number four five six seven eight nine ten twenty
thirty forty fifty hundred thousand half third quarter times total many how much per cost costs price dollars
dollar cents cent money pays paid pay buy buys bought sell sells sold spend spent save saved earn earns worth
bill change minutes minute hours hour days week weeks months month miles mile feet foot inches pounds ounces
gallons apples oranges eggs books pages boxes box bags cars students children friends brother sister mother
father each altogether remaining left needs gives gave takes took eats ate read reads walks runs drives twice
double more less fewer than equal answer question write list name sentence following word words explain describe
give example story how why what when where
""".split()  # noqa: SIM905
KOREAN_WORDS = """
그리고 그러나 그래서 하지만 있습니다 없습니다 합니다 입니다 됩니다 무엇 어떤 얼마 모두 각각 하나 다섯
여섯 일곱 사람 학생 친구 시간 분 동안 오늘 내일 어제 매일 처음 마지막 다음 이전 나머지 전체 합계 가격
돈 원 개 명 권 장 마리 사과 책 상자 학교 집 가게 물건 숫자 문제 답 질문 설명 생각 먼저 그다음
따라서 계산 더하면 빼면 곱하면 나누면 남은 구하세요 쓰세요 말해 주세요 알려 주세요 입니까 습니까 몇 더
많은 적은 두 배 절반
""".split()  # noqa: SIM905


def corpus(count: int, seed: int) -> list[str]:
    """`count` lines of the tasks; the text of one sample is its question, reasoning and answer, a line each."""
    samples = generate_samples(count, seed=seed)
    return [f"{sample.question}\n{sample.reasoning}\n{sample.answer}" for sample in samples]


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The task lines come often enough that all of their words become tokens before the word lists are used up.
    words = [f"{word} {word}" for word in ENGLISH_WORDS + KOREAN_WORDS for _ in range(8)]
    tokenizer.train_from_iterator(corpus(2000, seed=1) + words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # the fastest at this size on a CPU
    return model


def batches(tokenizer, *, steps: int, rows: int, length: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` batches of ids and labels (rows, length): samples end to end, as bases read text, each seen once.

    The digits of a question are random; a loss on them would be noise only.
    """
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    ids: list[int] = []
    labels: list[int] = []
    for step in range(steps):
        drawn = 0
        while len(ids) < rows * length:
            samples = generate_samples(64, seed=seed + 1000 * step + drawn)
            drawn += 1
            questions = tokenizer([sample.question + "\n" for sample in samples])["input_ids"]
            solutions = tokenizer([f"{sample.reasoning}\n{sample.answer}" for sample in samples])["input_ids"]
            for question, solution in zip(questions, solutions, strict=True):
                ids += [*question, *solution, tokenizer.eos_token_id]
                labels += [-100 if token in digits else token for token in question]
                labels += [*solution, tokenizer.eos_token_id]
        taken = rows * length
        yield torch.tensor(ids[:taken]).view(rows, length), torch.tensor(labels[:taken]).view(rows, length)
        ids, labels = ids[taken:], labels[taken:]


def continuation_accuracy(model, tokenizer, count: int) -> dict[str, float]:
    """Share of held-out questions that the base answers right, by task.

    The end of another text stands before each question, as in training: without it a first digit would be the
    first token of all, which models use as a place to attend to nothing.
    """
    samples = generate_samples(count, seed=7, split="evaluation")
    model.eval()
    model.config.output_router_logits = False
    encoded = tokenizer(
        [f"{END_OF_TEXT}{sample.question}\n" for sample in samples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model.generate(**encoded, max_new_tokens=120, do_sample=False)
    texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    right: dict[str, list[bool]] = {}
    for sample, text in zip(samples, texts, strict=True):
        right.setdefault(sample.name, []).append(grade(text, sample.solution))
    model.config.output_router_logits = True
    model.train()
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="thinkfusion/tiny_base")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums are then taken in one order, and the same seed gives the same bytes
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens")

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    started, tokens = time.monotonic(), 0
    data = batches(tokenizer, steps=arguments.steps, rows=arguments.rows, length=arguments.length, seed=10**6)
    for step, (ids, labels) in enumerate(data, start=1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        if step % 100 == 0:
            speed = tokens / (time.monotonic() - started)
            print(f"step {step:5d}  loss {loss.item():.4f}  {speed:,.0f} tokens/s", flush=True)
        if step % 500 == 0:
            print({name: round(rate, 2) for name, rate in continuation_accuracy(model, tokenizer, 160).items()})
    print(continuation_accuracy(model, tokenizer, 800))

    # What is published is an ordinary base: the settings of this run's loss do not belong to it.
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
