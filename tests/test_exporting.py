# SPDX-License-Identifier: Apache-2.0
"""What is exported is what was trained: every family merged, written, read again, and read as servers read it."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import FULL, tiny_random_model
from thinkfusion import Mode, generate_samples, install_chat_template, load_checkpoint, reply
from thinkfusion.checkpointing import add_embedding_rows
from thinkfusion.exporting import _FLOAT32_NAMES, export_checkpoint, logits_of

PLAIN = (
    *("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "axk1", "axk2", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    *("glm4_moe", "granitemoe", "granitemoeshared", "minimax_m2", "ernie4_5_moe", "dots1", "phimoe"),
    *("hunyuan_v1_moe", "exaone_moe", "afmoe", "qwen3_5_moe_text"),
)
FAMILIES: dict[str, dict] = {
    **{family: {} for family in PLAIN},
    "bailing_hybrid": {
        **{"first_k_dense_replace": 1, "layer_group_size": 2, "n_group": 1, "topk_group": 1, "head_dim": 16},
        **{"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    },
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
}
KEPT_SCORES = ("axk1", "deepseek_v3", "glm4_moe")


def adapted(model, seed=0):
    """LoRA on linear layers, routers and experts, with B drawn too, as if it had been trained."""
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not output]
    three = sorted({n.split(".", 3)[-1] for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n})
    three = [name for name in three if not name.endswith("bias")]
    routers = {n.split(".", 3)[-1] for n, p in model.named_parameters() if _is_router(n) and p.dim() == 2}
    routers -= {name.split(".", 3)[-1] + ".weight" for name in linear}
    config = LoraConfig(r=2, target_modules=linear, target_parameters=[*three, *sorted(routers)], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    torch.manual_seed(seed)
    moved = 0
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.05)
            moved += "experts" in name
    assert moved, "no LoRA on experts"
    return wrapped


def _is_router(name):
    return name.endswith(("mlp.gate.weight", "router.weight", "mlp.gate.wg.weight", "router.gate.weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_and_comes_back(tmp_path, tokenizer, family):
    model = tiny_random_model(family, vocab_size=1088, **FAMILIES[family])
    lora = adapted(model)
    ids = torch.randint(1024, (2, 17), generator=torch.Generator().manual_seed(1))
    plain = logits_of(tiny_random_model(family, vocab_size=1088, **FAMILIES[family]), ids)
    before = logits_of(lora, ids)
    assert (before - plain).abs().max() > 1e-2
    export_checkpoint(lora, tokenizer, tmp_path)
    assert (logits_of(model, ids) - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    # Read by transformers itself, without our loader.
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(logits_of(written, ids), before, rtol=0, atol=1e-5 * max(1.0, float(before.abs().max())))
    assert not any("lora" in name for name in _names(tmp_path))
    for name, buffer in model.named_buffers():
        if name.endswith(_FLOAT32_NAMES):
            assert torch.equal(dict(written.named_buffers())[name], buffer), name


def _names(folder):
    return [name for path in folder.glob("*.safetensors") for name in load_file(path)]


def trained(tokenizer):
    """The embedded base, its switch installed, with an adapter that trained a few steps on both modes."""
    model, _ = load_checkpoint("tiny-base", dtype="float32")
    install_chat_template(tokenizer, model)
    control = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|im_start|>", "<|im_end|>"])
    three = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=three,
        trainable_token_indices={"embed_tokens": control},
        task_type="CAUSAL_LM",
    )
    lora = get_peft_model(model, config)
    rows = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": each.question},
                {"role": "assistant", "content": each.answer, "reasoning_content": each.reasoning},
            ],
            enable_thinking=thinking,
            return_tensors="pt",
            return_dict=False,
        )
        for each in generate_samples(4, seed=0)
        for thinking in (True, False)
    ]
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    lora.train()
    for _ in range(5):
        sum(lora(input_ids=row, labels=row).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lora.eval()


def replies(model, tokenizer):
    questions = [each.question for each in generate_samples(3, seed=9)]
    return [reply(model, tokenizer, question, mode=mode, max_new_tokens=24) for question in questions for mode in Mode]


@pytest.mark.parametrize("adapters_only", [False, True])
def test_the_same_greedy_replies_in_both_modes(tmp_path, base_tokenizer, adapters_only):
    lora = trained(base_tokenizer)
    probe = torch.arange(60)[None]
    expected, logits = replies(lora, base_tokenizer), logits_of(lora, probe)
    export_checkpoint(lora, base_tokenizer, tmp_path / "out", adapters_only=adapters_only)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert (
        weights <= files if adapters_only else {"config.json", "generation_config.json", "model.safetensors"} <= files
    )
    assert not (weights & files) or adapters_only
    loaded, tokenizer = load_checkpoint(tmp_path / "out", dtype="float32")
    assert tokenizer.chat_template == base_tokenizer.chat_template
    assert tokenizer.response_template == base_tokenizer.response_template
    torch.testing.assert_close(logits_of(loaded, probe), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert replies(loaded, tokenizer) == expected
    assert len(set(map(str, expected))) > 1


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_another_precision(tmp_path, tokenizer, tiny_models, tied):
    model = tiny_models(tied=tied)
    export_checkpoint(model, tokenizer, tmp_path, dtype="bfloat16", max_shard_size="100KB")
    assert model.dtype == torch.float32
    assert (tmp_path / "model.safetensors.index.json").is_file()
    for path in tmp_path.glob("*.safetensors"):
        assert {weight.dtype for weight in load_file(path).values()} == {torch.bfloat16}
    assert ("lm_head.weight" in _names(tmp_path)) is not tied
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.dtype == torch.bfloat16
    expected = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    # In place of several parts, one: no part stays behind.
    export_checkpoint(model, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"float16 cannot hold model\.norm\.weight"):
        export_checkpoint(model, tokenizer, tmp_path, dtype="float16")
    assert load_checkpoint(tmp_path)[0].dtype == torch.float32


def test_correction_biases_stay_in_float32(tmp_path, tokenizer):
    for family in KEPT_SCORES:
        export_checkpoint(tiny_random_model(family, vocab_size=1088), tokenizer, tmp_path / family, dtype="bfloat16")
        weights = load_file(tmp_path / family / "model.safetensors")
        kept = {weight.dtype for name, weight in weights.items() if name.endswith("correction_bias")}
        assert kept == {torch.float32}, family


SERVERS_READ = {
    "qwen3_moe": {"num_experts": 4, "rope_theta": 10000.0, "torch_dtype": "float32"},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
    "axk1": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "first_k_dense_replace": 1, "moe_layer_freq": 1},
    "axk2": {"first_k_dense_replace": 1},
    "glm4_moe": {"num_nextn_predict_layers": 0},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "afmoe": {"n_group": 1, "topk_group": 1, "score_func": "sigmoid"},
    "gpt_oss": {"rope_theta": 150000.0},
}


@pytest.mark.parametrize("family", SERVERS_READ)
def test_settings_that_servers_read(tmp_path, tokenizer, family):
    model = tiny_random_model(family, vocab_size=1088)
    model.config.use_cache, model.config.output_router_logits = False, True
    model.generation_config.temperature = 0.6
    export_checkpoint(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config.get(name) for name in SERVERS_READ[family]} == SERVERS_READ[family]
    assert (config["use_cache"], config["output_router_logits"]) == (True, False)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"]) == (True, 0.6)
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    norms = [name for name in _names(tmp_path) if name.endswith("post_mlp_layernorm.weight")]
    if family == "axk1":
        assert sorted(norms) == [f"model.layers.{index}.post_mlp_layernorm.weight" for index in (0, 1)]
        assert (load_file(tmp_path / "model.safetensors")[norms[0]] == 1).all() or norms[0].startswith("model.layers.1")


def test_a_merge_that_changes_the_model_is_not_written(tmp_path, tokenizer, tiny_models, monkeypatch):
    lora = adapted(tiny_models())
    merge = type(lora.base_model).merge_and_unload

    def garbage(self, *arguments, **options):
        merged = merge(self, *arguments, **options)
        merged.model.layers[1].mlp.experts.down_proj.data[1] *= 1.5
        return merged

    monkeypatch.setattr(type(lora.base_model), "merge_and_unload", garbage)
    with pytest.raises(ValueError, match="merging the adapters changed the model: the largest difference"):
        export_checkpoint(lora, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_read_before_it_has_its_name(tmp_path, tokenizer, tiny_models, monkeypatch):
    model = tiny_models()
    export_checkpoint(model, tokenizer, tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    save = type(model).save_pretrained

    def broken(self, folder, **options):
        save(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] += 0.5 * torch.arange(len(weights["model.norm.weight"]))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def full(self, folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for fault, error, match in ((broken, ValueError, "another model"), (full, OSError, "the disk is full")):
        monkeypatch.setattr(type(model), "save_pretrained", fault)
        with pytest.raises(error, match=match):
            export_checkpoint(model, tokenizer, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "notes.txt"} == good
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_requests_that_make_no_sense(tmp_path, tokenizer, tiny_models):
    model = tiny_models()
    (tmp_path / "file").write_text("")
    for options, place, match in (
        ({"dtype": "int8"}, "a", "dtype: 'int8' is unknown; choose one of float32"),
        ({"adapters_only": True}, "a", "adapters_only: found Qwen3MoeForCausalLM, which has no adapters"),
        ({}, "file", "this is a file"),
    ):
        with pytest.raises(ValueError, match=match):
            export_checkpoint(model, tokenizer, tmp_path / place, **options)
    with pytest.raises(ValueError, match="the base was not loaded from anywhere"):
        export_checkpoint(adapted(tiny_models()), tokenizer, tmp_path / "a", adapters_only=True)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"the base is quantised \(bitsandbytes\)"):
        export_checkpoint(model, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def checkpoint(tmp_path, tokenizer, tiny_models):
    model = tiny_models(tied=False)
    install_chat_template(tokenizer, model)
    return export_checkpoint(model, tokenizer, tmp_path / "good", check=False)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_another_architecture(checkpoint, tokenizer):
    for changes, match in (
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            r"not those of MixtralForCausalLM \(mixtral\)",
        ),
        ({"num_hidden_layers": 3, "layer_types": None}, r"weights are missing \(model\.layers\.2\."),
        ({"hidden_size": 48}, r"have other shapes \(lm_head\.weight: found 1088 x 32, expected 1088 x 48\)"),
        ({"model_type": "nonesuch"}, "not a causal language model that the installed transformers can load"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "not a causal language model"),
    ):
        whole = (checkpoint / "config.json").read_text()
        edit_config(checkpoint, **changes)
        with pytest.raises(ValueError, match=match) as caught:
            load_checkpoint(checkpoint)
        assert str(caught.value).startswith(str(checkpoint))
        (checkpoint / "config.json").write_text(whole)
    load_checkpoint(checkpoint)


def test_an_adapter_of_another_base(tmp_path, base_tokenizer, checkpoint):
    export_checkpoint(trained(base_tokenizer), base_tokenizer, tmp_path / "adapter", adapters_only=True, check=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    described = json.loads(path.read_text())
    assert described["base_model_name_or_path"] == "tiny-base"
    path.write_text(json.dumps(described | {"base_model_name_or_path": str(checkpoint)}))
    with pytest.raises(ValueError, match="the adapter does not fit its base"):
        load_checkpoint(tmp_path / "adapter")
    path.write_text(json.dumps(described))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "experts" in name))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its weights are missing \(base_model"):
        load_checkpoint(tmp_path / "adapter")


def test_parts_and_pickles_are_no_checkpoint(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors missing"):
        load_checkpoint(checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="outside the folder"):
        load_checkpoint(checkpoint)
    index.unlink()
    os.rename(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"weights are pickled \(pytorch_model\.bin\)"):
        load_checkpoint(checkpoint)
    os.rename(checkpoint / "pytorch_model.bin", weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="its weights cannot be read"):
        load_checkpoint(checkpoint)


def test_revisions_are_pinned(checkpoint, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ValueError, match="this is a folder, and revision='main' is for the Hub"):
        load_checkpoint(checkpoint, revision="main")
    for revision in (None, "main", "0123456"):
        with pytest.raises(ValueError, match="trust_remote_code runs whatever the repository holds"):
            load_checkpoint("someone/model", revision=revision, trust_remote_code=True)
    asked = []

    def stored(kind, real):
        def load(source, *, revision=None, trust_remote_code=None, **options):
            asked.append((kind, source, revision, trust_remote_code))
            loaded = real(checkpoint, **options)
            if kind == "config" and source == "someone/model":
                loaded._commit_hash = commit
            return loaded

        return load

    from transformers import AutoConfig

    for kind, auto in (("config", AutoConfig), ("tokenizer", AutoTokenizer), ("model", AutoModelForCausalLM)):
        monkeypatch.setattr(auto, "from_pretrained", stored(kind, auto.from_pretrained))
    load_checkpoint("someone/model", revision="v1")
    ours = [each for each in asked if each[1] == "someone/model"]
    assert ours == [
        ("config", "someone/model", "v1", False),
        ("tokenizer", "someone/model", commit, False),
        ("model", "someone/model", commit, False),
    ]


def test_rows_of_new_tokens_are_those_of_the_installed_template(base_tokenizer):
    model, other = (load_checkpoint("tiny-base")[0] for _ in range(2))
    old_size = len(base_tokenizer)
    added = install_chat_template(base_tokenizer, model)
    add_embedding_rows(other, base_tokenizer, added, old_size)
    assert torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
