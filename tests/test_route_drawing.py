# SPDX-License-Identifier: Apache-2.0
"""Routes over a data set, in words, as a picture, on a page, and `thinkfusion routes`."""

import builtins
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_model
from tests.tiny_models import tiny_random_model
from thinkfusion import install_chat_template, load_checkpoint, prepare
from thinkfusion.chat_templates import add_embedding_rows
from thinkfusion.cli import main
from thinkfusion.mixture import MixtureOptions
from thinkfusion.moe import moe_layers
from thinkfusion.route_counting import CountedRoutes, count_routes, draw_conversations, embedded_rows, measure_routes
from thinkfusion.route_drawing import (
    DEPENDENCY,
    Picture,
    difference_class,
    labelled,
    palette,
    panels,
    routes_fragment,
    routes_page,
    save_png,
    share_class,
)
from thinkfusion.route_verdict import routes_table, verdict
from thinkfusion.routing import LayerRoutes, RouteCounter, RoutingReport
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import Plan

HOSTILE = "<script>alert('x')</script> & $\\frac{1}$ \x1b[2J"


def even(index=0, experts=4, count=100):
    return LayerRoutes(index, 2, ((count,) * experts, (count,) * experts))


def counted(*layers, name="runs/tiny", remarks=()):
    report = RoutingReport(layers)
    return CountedRoutes(report, name, "qwen3_moe", ("rows.jsonl",), 3, 5, (3, 3), RowReport(read=6, kept=5), remarks)


class Page(HTMLParser):
    """The tags of a page, each closed in the order of its opening; and its text."""

    VOID = ("meta", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.cells = [], Counter(), "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.cells[-1].append(data)


# --- counting ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
    install_chat_template(tokenizer, model)
    return model, tokenizer


def by_hand(model, sequences):
    """Choices by layer, mode and expert, from the logits of all routers, sequence by sequence and token by token."""
    layers = moe_layers(model)
    found = [[Counter(), Counter()] for _ in layers]
    for row in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), output_router_logits=True).router_logits
        for place, layer in enumerate(layers):
            for token, label in enumerate(row["labels"]):
                if label != -100:
                    ordered = sorted(range(layer.num_experts), key=lambda expert: -logits[place][token][expert])
                    found[place][row["mode"]].update(ordered[: layer.top_k])
    return [
        tuple(tuple(counts[expert] for expert in range(layer.num_experts)) for counts in modes)
        for layer, modes in zip(layers, found, strict=True)
    ]


def test_counts_are_those_of_the_logits(tiny):
    model, tokenizer = tiny
    sequences, _ = prepare(embedded_rows(6), tokenizer)
    expected = by_hand(model, sequences)
    model.train()
    for batch_size in (1, 5, 64):
        report = count_routes(model, tokenizer, sequences, batch_size=batch_size)
        assert [layer.counts for layer in report.layers] == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "jetmoe", "llama4_text", "longcat_flash"])
def test_counts_do_not_depend_on_batches_or_the_head(family, tiny):
    model, counter = tiny_random_model(family), RouteCounter(tiny_random_model(family).eval())
    rows = [{"input_ids": list(range(size, 3 * size)), "mode": size % 2} for size in (9, 4, 12, 9)]
    rows = [{**row, "labels": [-100] * 3 + row["input_ids"][3:]} for row in rows]
    for row in rows:
        modes, labels = torch.full((1, len(row["labels"])), row["mode"]), torch.tensor([row["labels"]])
        with torch.no_grad(), counter.watch(modes, labels >= 0):
            counter.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    assert count_routes(model, tiny[1], rows, batch_size=3) == counter.report()


def test_all_sequences_of_the_conversations_are_counted_in_both_modes(tiny):
    model, tokenizer = tiny
    found = measure_routes(model, tokenizer, embedded_rows(20), samples=8, batch_size=4)
    assert (found.conversations, found.of, found.sequences) == (8, 20, (8, 8))
    sequences, _ = prepare(embedded_rows(20), tokenizer)
    drawn, _ = draw_conversations(sequences, 8, 0)
    trained = [sum(label != -100 for row in drawn if row["mode"] == mode for label in row["labels"]) for mode in (0, 1)]
    assert [found.report.tokens(0), found.report.tokens(1)] == trained
    assert len({row["conversation"] for row in drawn}) == 8
    other, _ = draw_conversations(sequences, 8, 1)
    assert set(other["conversation"]) != set(drawn["conversation"])
    again = json.loads(json.dumps(found.to_dict()))
    assert again["layers"][0]["thinking"]["counts"] == list(found.report.layers[0].counts[0])
    assert again["tokens"] == {"thinking": trained[0], "non_thinking": trained[1]}
    assert again["layers"][0]["experts"] == 8


def test_what_is_left_out_or_shortened_is_counted(tiny):
    model, tokenizer = tiny
    long = {"question": "Long?", "reasoning": "And so on. " * 400, "answer": "Yes"}
    rows = [*embedded_rows(3), long]
    dropped = measure_routes(model, tokenizer, rows, Plan(on_long_row="drop")).to_dict()
    assert dropped["rows"]["skipped"] == {"too_long": 1}
    assert dropped["conversations"] == {"counted": 3, "of": 3}
    shortened = measure_routes(model, tokenizer, rows, Plan(on_long_row="shorten_reasoning"))
    assert shortened.rows.altered == {"shortened_to_fit": 1}
    assert shortened.conversations == 4
    assert "altered: 1 " in routes_table(shortened)
    sequences, _ = prepare([long], tokenizer)
    with pytest.raises(ValueError, match=r"a sequence has [\d,]+ tokens, and the model 2,048 positions"):
        count_routes(model, tokenizer, sequences)


def test_nothing_is_kept_but_counts(tiny):
    model, tokenizer = tiny
    counter, kept = RouteCounter(model), []

    def hooks():
        return [len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    for repeats in (1, 40):
        ids = [5] * repeats
        count_routes(model, tokenizer, [{"input_ids": ids, "labels": ids, "mode": 0}], counter=counter)
        with counter.watch(torch.zeros(1, repeats, dtype=torch.long), torch.ones(1, repeats, dtype=torch.bool)):
            kept.append({name: value.shape for name, value in vars(counter).items() if torch.is_tensor(value)})
        counter.report()
    assert kept == [{"_counts": (4, 16)}] * 2
    assert hooks() == before


def test_one_mode_alone_is_a_remark(tiny):
    model, tokenizer = tiny
    rows = [{"question": "Hi?", "answer": f"Yes {number}"} for number in range(30)]
    found = measure_routes(model, tokenizer, rows)
    assert found.report.seen == [1]
    assert "No row is trained in thinking mode, so there is no overlap and no difference." in found.remarks[0]
    assert len(panels(found.report)) == 1
    text = routes_table(found)
    assert "only non-thinking was seen" in " ".join(text.split())
    assert "overlap  " not in text
    with pytest.raises(ValueError, match="no row is trained in thinking mode"):
        prepare(rows, tokenizer)
    combined = measure_routes(model, tokenizer, embedded_rows(9), Plan(mixture=MixtureOptions("combined")))
    assert combined.report.seen == [0]


def test_few_tokens_are_no_verdict(tiny):
    model, tokenizer = tiny
    found = measure_routes(model, tokenizer, embedded_rows(1))
    assert verdict(found.report).headline.startswith("Too few reply tokens for a verdict. So far ")
    assert any("dead experts and differences may be chance" in remark for remark in found.remarks)
    many = measure_routes(model, tokenizer, embedded_rows(60))
    assert not many.remarks
    assert "Too few" not in verdict(many.report).headline


# --- in words ---------------------------------------------------------------------------------------------------


def test_an_even_model_is_good():
    found = verdict(RoutingReport((even(0), even(1))))
    assert found.level == "good"
    assert found.headline == (
        "No router is collapsing; every expert is used in both modes; the modes use nearly the same experts (100% of "
        "their choices are shared)."
    )
    assert "as if 4.0 of 4 were chosen alike" in found.findings[0]


def test_dead_and_collapsing_and_separate_are_said():
    dead = LayerRoutes(3, 1, ((100, 0, 100, 100), (100, 0, 0, 100)))
    found = verdict(RoutingReport((even(0), dead)))
    assert found.level == "warning"
    assert "1 of 8 experts is dead: no reply token chose it" in found.headline
    assert "Dead experts: layer 3: 1." in found.findings
    collapsing = LayerRoutes(5, 1, ((0, 0, 900, 0), (900, 0, 0, 0)))
    found = verdict(RoutingReport((even(0), collapsing)))
    assert found.level == "bad"
    assert found.headline.startswith("1 of 2 layers collapses onto a few experts; 2 of 8 experts are dead")
    assert "partly different experts (50% of" in found.headline
    assert "least in layer 5 (0%)" in found.findings[-1]
    assert "2 of layer 5 in thinking: 100% of the tokens choose it, 4.0 times its even share" in found.findings[1]
    leaning = LayerRoutes(1, 1, ((900, 30, 30, 30), (100, 100, 100, 100)))
    assert verdict(RoutingReport((even(0), leaning))).headline.startswith("1 of 2 layers leans on a few experts")
    single = LayerRoutes(0, 1, ((100, 100), (200, 0)))
    assert "every expert is used, but 1 not in non-thinking" in verdict(RoutingReport((single,))).headline


def test_the_table_shows_the_least_even_of_many_layers():
    odd = LayerRoutes(17, 1, ((900, 10, 10, 10), (100, 100, 100, 100)))
    text = routes_table(counted(*(even(index) for index in range(17)), odd))
    shown = [int(line.split()[0]) for line in text.splitlines() if re.match(r" +\d+  +[\d.]{5} ", line)]
    assert len(shown) == 8
    assert 17 in shown
    assert "The 8 least even of 18 layers are shown." in text
    short = routes_table(counted(even(3), remarks=("mind this",)))
    assert "    3    1.000   50.0% (1.0×)     0    1.000   50.0% (1.0×)     0     1.00" in short
    assert short.endswith("- mind this")
    assert "3 of 5 conversations counted; reply tokens: 200 thinking, 200 non-thinking" in short
    assert "\x1b" not in routes_table(counted(even(0), name=HOSTILE))


# --- as a picture -----------------------------------------------------------------------------------------------


def test_classes_are_multiples_of_the_even_share():
    assert [share_class(0, value) for value in (0, 0.1, 0.25, 0.74, 0.75, 1, 1.25, 8)] == (
        ["dead", "t1", "t2", "t3", "t4", "t4", "t5", "t8"]
    )
    assert share_class(1, 1) == "n4"
    assert [difference_class(value) for value in (-3, -0.3, -0.1, 0, 0.2, 0.25, 2)] == (
        ["d-4", "d-1", "d0", "d0", "d0", "d1", "d4"]
    )


@pytest.mark.parametrize("dark", [False, True])
def test_every_class_has_a_colour_of_its_own(dark):
    colours = palette(dark)
    assert len(colours) == 26
    assert len(set(colours.values())) == 26
    brightness = [sum(int(colours[f"t{level}"][at : at + 2], 16) for at in (1, 3, 5)) for level in range(1, 9)]
    assert all((first < second) is dark for first, second in pairwise(brightness))


def test_labels_are_round_and_have_room():
    assert list(labelled(range(3, 97), 5, 13)) == [(number - 3, number) for number in range(5, 97, 5)]
    assert [number for _, number in labelled(range(4), 26, 13)] == [0, 1, 2, 3]


def rgb(colour):
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


@pytest.mark.parametrize("shape", [(2, 4), (5, 64)])
def test_the_png_has_the_colours_of_its_cells(tmp_path, shape):
    from matplotlib.image import imread

    layers, experts = shape
    routes = [even(index, experts) for index in range(layers)]
    routes[1] = LayerRoutes(1, 2, ((100,) * (experts - 1) + (0,), (0, 200, *(100,) * (experts - 2))))
    routes = counted(*routes, name=HOSTILE)
    save_png(routes, tmp_path / "routes.png")
    image = (imread(tmp_path / "routes.png")[..., :3] * 255).round().astype(int)
    picture, colours = Picture(routes.report), palette()
    assert image.shape[:2] == (picture.height, picture.width)
    expected = {(0, 0, 0): "t4", (0, 1, experts - 1): "dead", (1, 0, 1): "n4", (1, 1, 0): "dead", (1, 1, 1): "n6"}
    expected |= {(2, 0, 0): "d0", (2, 1, 0): "d3", (2, 1, experts - 1): "d-3"}
    for place, kind in expected.items():
        x, y = picture.centre(*place)
        assert tuple(image[y, x]) == rgb(colours[kind]), (place, kind)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=re.escape(DEPENDENCY)):
        save_png(counted(even()), tmp_path / "routes.png")


# --- on a page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (24, 32), (94, 256)])
def test_the_page_has_all_layers_and_needs_nothing_else(shape):
    layers, experts = shape
    text = routes_page(counted(*(even(index + 3, experts) for index in range(layers)), remarks=(HOSTILE,)))
    page = Page(text)
    assert page.tags["svg"] == 3
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == 0
    assert not re.search(r"https?:|//|url\(|@import|src=", text)
    rows = [cells for cells in page.cells if cells]
    assert [int(cells[0]) for cells in rows] == list(range(3, layers + 3))
    assert rows[0][1] == "1.000"
    assert page.text.index("No router is collapsing") < page.text.index("Thinking: ")
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 1_000_000


def test_every_cell_is_drawn_once():
    layer = LayerRoutes(0, 1, ((100, 100, 0, 100, 300, 0, 0, 100), (100, 200, 100, 0, 100, 100, 0, 100)))
    small = RoutingReport((layer,))
    large = RoutingReport((LayerRoutes(0, 1, tuple(counts * 20 for counts in layer.counts)),))  # type: ignore[arg-type]
    for report, experts in ((small, 8), (large, 160)):
        for panel in re.findall(r"<svg.*?</svg>", routes_fragment(report), re.DOTALL):
            drawn = Counter()
            for start, wide in re.findall(r"M(\d+) 0h([\d.]+)v", panel):
                drawn.update(range(int(start), int(start) + max(1, round(float(wide)))))
            assert drawn == dict.fromkeys(range(experts), 1)
    first = re.search(r"<svg.*?</svg>", routes_fragment(small), re.DOTALL).group(0)
    assert '<path class="dead" d="M2 0' in first
    assert "layer 0, expert 4: 3.43×" in first
    assert "layer 0, expert 2: dead" in first


def test_names_are_escaped():
    text = routes_page(counted(even(), name=HOSTILE))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    Page(text)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def routes(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; returns the exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["routes", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_the_command_writes_three_files(routes):
    status, out, _ = routes("tiny-base", "--samples", 40, "--output", "found/here")
    assert status == 0
    assert "tiny-base: qwen3_moe, 4 layers of 8 experts, top-2" in out
    assert "the embedded tasks: 40 rows read = 40 kept + 0 skipped" in out
    assert "is given one, as training begins with" in out
    assert sorted(path.name for path in Path("found/here").iterdir()) == ["routes.html", "routes.json", "routes.png"]
    written = json.loads(Path("found/here/routes.json").read_text())
    assert len(written["layers"]) == 4
    assert Path("found/here/routes.png").read_bytes()[:4] == b"\x89PNG"
    status, out, _ = routes("tiny-base", "--samples", 40, "--json")
    assert (status, json.loads(out)) == (0, written)
    assert Path("routes.html").is_file()


def test_rows_of_ones_own_are_read_as_in_training(routes):
    rows = [{"q": f"{number}?", "answer": f"So it is. #### {number}"} for number in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"q": "", "answer": ""}])))
    flags = ("--dataset", "rows.jsonl", "--question_column", "q", "--answer_separator", "####")
    status, out, _ = routes("tiny-base", *flags, "--batch-size", 3)
    assert status == 0
    assert "rows.jsonl: 13 rows read = 12 kept + 1 skipped (1 " in out
    assert "12 of 12 conversations counted" in out


def test_a_checkpoint_folder_gets_its_own_files(routes, tokenizer):
    model = tiny_model()
    model.save_pretrained("checkpoint")
    tokenizer.save_pretrained("checkpoint")
    status, _, err = routes("checkpoint")
    assert status == 1
    assert "the tokenizer has 1,028 tokens, and the model embeddings for 1,024" in err
    add_embedding_rows(model, tokenizer, [], 1024)
    model.save_pretrained("checkpoint")
    status, out, _ = routes("checkpoint", "--samples", 4)
    assert status == 0
    assert "is given one" not in out
    assert Path("checkpoint/routes.json").is_file()


def test_the_picture_alone_is_missing_without_matplotlib(routes, monkeypatch):
    def absent(*_):
        raise ValueError(DEPENDENCY)

    monkeypatch.setattr("thinkfusion.route_drawing.save_png", absent)
    status, out, err = routes("tiny-base", "--samples", 4)
    assert status == 1
    assert "layer  entropy" in out
    assert err == f"thinkfusion routes: {DEPENDENCY}\n"
    assert Path("routes.json").is_file()
    assert Path("routes.html").is_file()


def test_what_cannot_be_is_one_clear_error(routes, tokenizer):
    tiny_random_model("llama", vocab_size=1088).save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    Path("empty.jsonl").write_text("")
    cases = {
        ("dense",): "LlamaForCausalLM has no Mixture-of-Experts layer",
        ("nowhere",): "nowhere: there is no such checkpoint folder",
        ("tiny-base", "--dataset", "none.jsonl"): "none.jsonl: there is no such file",
        ("tiny-base", "--dataset", "empty.jsonl"): "empty.jsonl: nothing to train on",
        ("tiny-base", "--dataset", "dense"): "dense: this is a directory; name a file in it, or a pattern",
        ("tiny-base", "--weights", "2"): "weights: only with --dataset",
        ("tiny-base", "--scheme", "other"): "other",
    }
    for arguments, message in cases.items():
        status, out, err = routes(*arguments, "--json")
        assert (status, out) == (1, ""), arguments
        assert err.startswith("thinkfusion routes: ")
        assert message in err
    assert not Path("routes.json").exists()
    with pytest.raises(SystemExit) as stopped:
        routes("tiny-base", "--samples", "0")
    assert stopped.value.code == 2


def test_an_adapter_is_counted_on_its_base(routes, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    add_embedding_rows(model, tokenizer, [], 1024)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    found = {}
    for name in ("base", "adapter"):
        status, out, err = routes(name, "--samples", 8, "--json")
        assert status == 0, err
        found[name] = json.loads(out)["layers"]
    assert len(found["adapter"]) == 2
    assert found["adapter"] != found["base"]
