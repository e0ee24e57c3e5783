# SPDX-License-Identifier: Apache-2.0
"""4-bit weights: what they take, what is refused, and experts that are quantised, trained on, merged and resumed."""

import re
from datetime import timedelta

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig

from tests.test_moe import SCORES, model_of
from tests.tiny_models import tiny_config, tiny_random_model
from thinkfusion import (
    ThinkFusionConfig,
    ThinkFusionTrainer,
    describe_moe,
    export_checkpoint,
    generate_samples,
    load_checkpoint,
    load_in_4bit,
    lora_config,
    qlora,
    quantising,
    reply,
)
from thinkfusion.activations import Setup
from thinkfusion.conversations import Conversation
from thinkfusion.exporting import difference
from thinkfusion.four_bit import CODEBOOKS, FourBit, packed_bytes
from thinkfusion.moe import meta_model, parameter_kinds
from thinkfusion.planning import plan_memory
from thinkfusion.quantising import (
    dequantise,
    is_quantised,
    measured_sizes,
    planned_sizes,
    quantisable,
    quantise,
    why_no_experts,
)
from thinkfusion.safe_training import describe_model
from thinkfusion.trainable import check_gradients

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe")
LARGE = {"num_hidden_layers": 48, "head_dim": 128}  # the rest of Qwen3-30B-A3B is Qwen3MoeConfig's default
NOTHING, NO_EXPERTS = "bitsandbytes is not installed", "the installed bitsandbytes cannot quantise them"


def rows():
    return torch.randint(1, 600, (8, 40), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=rows(), use_cache=False).logits.float()


def steps(model, number=5, autocast=False):
    """Losses of some LoRA steps, and the trained parameters that stayed as they were."""
    model.train()
    before = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    losses = []
    for step in range(number):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=rows(), labels=rows(), use_cache=False).loss
        loss.backward()
        if step == 0:
            check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [name for name, each in model.named_parameters() if name in before and each.equal(before[name])]


# Without bitsandbytes: figures and refusals


def test_what_four_bits_take_is_told_from_a_configuration():
    sizes = planned_sizes(meta_model(AutoConfig.for_model("qwen3_moe", **LARGE)))
    assert str(sizes) == (
        "4-bit: 29.9 B of 30.5 B parameters, 15.4 GB; bf16: 635 M, 1.27 GB (router, embeddings, norms)."
    )
    # 4 bits, and 8 for 64 values, and 32 for 64 * 256.
    assert sizes.quantised_bytes == pytest.approx(sizes.quantised * (4 + 8 / 64 + 32 / 64 / 256) / 8, rel=1e-4)
    assert sizes.bytes == sum(each.quantised_bytes + each.other_bytes for each in sizes.kinds.values())
    assert {kind for kind, each in sizes.kinds.items() if each.quantised} == {"attention", "experts"}
    assert packed_bytes(64) == 32 + 1 + 4 + CODEBOOKS


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_embeddings_are_never_quantised(family):
    model = tiny_random_model(family)
    matrices, experts = quantisable(model)
    kinds = parameter_kinds(model)
    assert {kinds[name] for name in matrices} <= {"attention", "shared_experts", "dense"}
    assert {kinds[name] for name in experts} == {"experts"}
    large = {name for name, each in model.named_parameters() if each.dim() > 1 and not name.endswith("_bias")}
    assert {kinds[name] for name in large - {*matrices, *experts}} == {"router", "embeddings"}


@pytest.mark.parametrize("missing", [NOTHING, NO_EXPERTS])
def test_a_model_that_stays_large_is_refused_with_figures(monkeypatch, missing):
    monkeypatch.setattr(qlora, "why_no_matrices", lambda: NOTHING if missing == NOTHING else None)
    monkeypatch.setattr(qlora, "why_no_experts", lambda: missing)
    config = AutoConfig.for_model("qwen3_moe", **{**LARGE, "num_hidden_layers": 4})
    stays = "all 3.11 B parameters" if missing == NOTHING else "the experts, 2.42 B of 3.11 B parameters,"
    with pytest.raises(ValueError, match=re.escape(f"asked for, 2.53 GB; but {stays} would stay in bf16")) as caught:
        qlora.check_4bit(meta_model(config), "some/model")
    message = str(caught.value)
    assert f"{6.23 if missing == NOTHING else 6.12} GB in all: {missing}" in message
    assert "pip install 'thinkfusion[quantise]'" in message
    assert "LoRA in bf16 with FSDP2, which takes one device of 80 GiB for rows of 4,096 tokens" in message
    assert "\n" not in message


def test_nothing_is_loaded_for_a_model_that_is_refused(monkeypatch):
    monkeypatch.setattr(quantising, "_bitsandbytes", lambda: None)
    monkeypatch.setattr(qlora, "load_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"tiny-base: 4 bits were asked for.*bitsandbytes is not installed"):
        load_in_4bit("tiny-base")


def test_a_dense_model_needs_bitsandbytes_too(monkeypatch):
    monkeypatch.setattr(quantising, "_bitsandbytes", lambda: None)
    with pytest.raises(ValueError, match=r"all 131 thousand parameters would stay in bf16"):
        qlora.check_4bit(meta_model(tiny_config("llama")), "tiny llama")


def test_sharding_and_quantised_checkpoints_are_refused(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP=true, and weights in 4 bits are not sharded"):
            load_in_4bit("tiny-base")
    config = tiny_config("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised already \(mxfp4\), expected one in bf16"):
        load_in_4bit(tmp_path)


def test_the_plan_names_what_four_bits_would_take():
    config = tiny_config("qwen3_moe")
    plan = plan_memory(config, Setup("lora", sequence_length=64))
    assert plan.four_bit_bytes == planned_sizes(meta_model(config)).bytes
    assert any("--load_in_4bit true, ddp only" in remark for remark in plan.remarks)
    assert plan_memory(config, Setup(sequence_length=64)).four_bit_bytes is None


def test_a_model_that_does_not_fit_is_placed_in_4_bits(monkeypatch, caplog):
    chosen = []
    monkeypatch.setattr(qlora, "quantise", lambda model, device: chosen.append(device))
    model, device = tiny_random_model("qwen3_moe"), torch.device("cpu")
    qlora.place(model, device)
    monkeypatch.setattr(qlora, "_free", lambda _: 600_000)
    assert not chosen
    qlora.place(model, device)
    assert chosen == [device]
    assert "take 0.626 MB and 0.6 MB are free" in caplog.text


# With bitsandbytes


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def test_bitsandbytes_alone_leaves_experts_as_they_are(bitsandbytes, tmp_path):
    """What makes all this necessary; once it fails, transformers quantises experts itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for family in ("qwen3_moe", "gpt_oss"):
        tiny_random_model(family).to(torch.bfloat16).save_pretrained(tmp_path / family)
        given = BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, quantization_config=given)
        parameters = dict(model.named_parameters())
        assert parameters["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
        assert parameters["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16


def test_the_installed_library_is_tried(bitsandbytes, monkeypatch):
    assert why_no_experts() is None

    def broken(values):
        raise TypeError("found 3 dimensions")

    given = FourBit.of
    monkeypatch.setattr(FourBit, "of", broken)
    assert why_no_experts() == "the installed bitsandbytes cannot quantise them (found 3 dimensions)"
    monkeypatch.setattr(FourBit, "of", lambda values: given(torch.zeros_like(values)))
    assert why_no_experts() == "the installed bitsandbytes does not give them back as they were"


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_trains_and_merges(bitsandbytes, family, dtype):
    model = tiny_random_model(family).to(dtype)
    described, whole = str(describe_moe(model)), logits(model)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    planned = planned_sizes(model, bf16=dtype == torch.bfloat16)
    wanted = lora_config(model, r=4, train_router=True)
    quantise(model)
    # What is in memory is what was planned, to the byte, and the model is described as before.
    assert measured_sizes(model) == planned
    assert str(describe_moe(model)) == described
    # Random weights, of which every bit counts: logits are off by 0.3 of their spread, in DeepSeek-V3 by 0.4.
    quantised = logits(model)
    assert float(difference(quantised, whole).median()) < 0.5
    assert torch.equal(logits(model), quantised)

    # The adapters are those of the model in full: the same parameters under the same names.
    config = lora_config(model, r=4, train_router=True)
    assert config == wanted
    adapted = get_peft_model(model, config)
    reference = get_peft_model(tiny_random_model(family), wanted)
    assert [(name, each.shape) for name, each in adapted.named_parameters() if each.requires_grad] == [
        (name, each.shape) for name, each in reference.named_parameters() if each.requires_grad
    ]
    # An adapter that has learned nothing changes nothing, however often it was put on and off.
    assert torch.equal(logits(adapted), quantised)
    losses, still = steps(adapted)
    assert not still
    assert losses[-1] < 0.9 * losses[0]

    expected = logits(adapted)
    assert torch.equal(logits(adapted), expected)
    dequantise(adapted)
    assert not is_quantised(adapted)
    assert torch.equal(logits(adapted), expected)
    merged = adapted.merge_and_unload()
    assert {name: tuple(each.shape) for name, each in merged.named_parameters()} == shapes
    off = difference(logits(merged), expected)
    assert float(off.max() if dtype == torch.float32 else off.median()) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("family", sorted(set(SCORES) - set(FAMILIES)))
def test_every_family_is_quantised_and_trains(bitsandbytes, family):
    model = model_of(family)
    planned = planned_sizes(model, bf16=False)
    quantise(model)
    assert measured_sizes(model).quantised == planned.quantised > 0
    adapted = get_peft_model(model, lora_config(model, r=2, train_router=True))
    losses, still = steps(adapted, 3)
    assert not still
    assert losses[-1] < losses[0]
    expected = logits(adapted)
    dequantise(adapted)
    assert float(difference(logits(adapted.merge_and_unload()), expected).max()) < 1e-3


def test_evaluation_between_steps_leaves_the_gradients(bitsandbytes):
    """On CPUs with AVX512-BF16, `Linear4bit` loses the gradient after a pass in evaluation."""
    model = tiny_random_model("qwen3_moe").to(torch.bfloat16)
    quantise(model)
    adapted = get_peft_model(model, lora_config(model, r=2))
    logits(adapted)
    assert not steps(adapted, autocast=True)[1]


def test_a_4bit_tensor_computes_as_its_values_do(bitsandbytes):
    values = torch.randn(6, 32, 64)
    tensor = FourBit.of(values)
    whole = tensor.whole()
    assert (tensor.shape, tensor.dtype, repr(tensor)) == (
        values.shape,
        values.dtype,
        "FourBit((6, 32, 64), torch.float32, cpu)",
    )
    assert all(torch.equal(tensor[index], whole[index]) for index in (0, 3, -1))
    # Experts whose values are no whole number of blocks.
    half = FourBit.of(torch.randn(5, 4, 7))
    assert torch.equal(half[3], half.whole()[3])
    # Rows that are no whole number of blocks: NF4 is off by 0.09 of the spread, whatever the shape.
    for shape in ((96, 96), (4, 48, 96), (30, 70), (64, 64)):
        drawn = torch.randn(shape)
        off = float((FourBit.of(drawn) - drawn).norm() / drawn.norm())
        assert off == pytest.approx(0.092, abs=0.01), shape
    inputs = torch.randn(5, 64, requires_grad=True)
    kept = []
    matrix = FourBit.of(torch.randn(32, 64))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        output = torch.nn.functional.linear(inputs, matrix)
    assert not kept
    output.sum().backward()
    assert torch.allclose(inputs.grad, matrix.whole().sum(0).expand(5, 64), atol=1e-5)
    for dtype in (torch.bfloat16, torch.float32):
        moved = tensor.to("cpu", dtype)
        assert isinstance(moved, FourBit)
        assert torch.equal(moved.whole(), whole.to(dtype))
    assert tensor.to("meta").packed.device.type == "meta"
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        tensor.add_(1)


def test_several_processes_keep_their_own(bitsandbytes):
    model = tiny_random_model("qwen3_moe")
    quantise(model)
    adapted = get_peft_model(model, lora_config(model, r=2))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1)
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(adapted)
        assert not steps(parallel, 2)[1]
        assert is_quantised(parallel)
    finally:
        torch.distributed.destroy_process_group()


def test_a_tensor_too_large_for_the_kernels_is_named(bitsandbytes, monkeypatch):
    monkeypatch.setattr(quantising, "MOST_VALUES", 8192)
    model = tiny_random_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"found 16,384 values in model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        quantise(model)
    assert not is_quantised(model)


def data(number):
    return [
        Conversation.from_messages(
            [
                {"role": "user", "content": each.question},
                {"role": "assistant", "reasoning_content": each.reasoning, "content": each.answer},
            ]
        )
        for each in generate_samples(number, seed=1)
    ]


def trainer_of(folder, **settings):
    model, tokenizer = load_in_4bit("tiny-base", dtype="float32")
    args = ThinkFusionConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        report_to="none",
        logging_steps=1,
        train_router=True,
        **settings,
    )
    return ThinkFusionTrainer(model, args, train_dataset=data(16), processing_class=tokenizer, peft_config=True)


def test_training_resumes_and_exports(bitsandbytes, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = trainer_of(tmp_path / "run", max_steps=4, save_steps=2)
    assert "tiny-base: 4-bit: " in caplog.text
    control = trainer.model.get_input_embeddings()
    assert describe_model(trainer.model)["4-bit"] is True
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not {each.dtype for each in control.parameters()} - {torch.float32}
    # A checkpoint of the trainer is the adapters alone.
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.startswith("model")]
    again = trainer_of(tmp_path / "run", max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses

    tokenizer, question = trainer.processing_class, data(1)[0].to_messages()[0]["content"]
    asked = {"mode": "thinking", "max_new_tokens": 24, "temperature": 0.0}
    said = reply(trainer.model, tokenizer, question, **asked)
    export_checkpoint(trainer.model, tokenizer, tmp_path / "adapters", adapters_only=True)
    assert is_quantised(trainer.model)
    with caplog.at_level("INFO"):
        export_checkpoint(trainer.model, tokenizer, tmp_path / "merged")
    merged, read = load_checkpoint(tmp_path / "merged")
    assert not is_quantised(merged)
    assert reply(merged, read, question, **asked) == said
    # On the base's own weights the adapters give another model.
    onto_base, _ = load_checkpoint(tmp_path / "adapters")
    weights = dict(onto_base.named_parameters())
    assert [name for name, each in merged.named_parameters() if each.dim() == 3 and not each.equal(weights[name])]


def test_four_bits_cannot_train_in_full(bitsandbytes, tmp_path):
    model, tokenizer = load_in_4bit("tiny-base", dtype="float32")
    args = ThinkFusionConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match=r"peft_config: missing; the model is in 4 bits.*--lora true"):
        ThinkFusionTrainer(model, args, train_dataset=data(2), processing_class=tokenizer)
