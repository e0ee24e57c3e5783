# SPDX-License-Identifier: Apache-2.0
"""The report through an endpoint agrees with the report on the checkpoint that is served."""

import json

from thinkfusion.cli import main

SAMPLES = 200
WITHIN = 0.01
"""Of the prompts, for counts; of the figure, for means."""


def report(*arguments):
    assert main(["evaluate", *map(str, arguments), "--samples", str(SAMPLES), "--seed", "0"]) == 0


def test_the_report_through_an_endpoint(server, checkpoint, tmp_path, figures):
    report(checkpoint, "--output", tmp_path / "checkpoint")
    asked = ("--endpoint", f"{server.address}/v1", "--model", server.model, "--tokenizer", checkpoint)
    report(*asked, "--output", tmp_path / "endpoint")
    ours, theirs = (
        json.loads((tmp_path / name / "mode_report.json").read_text())["modes"] for name in ("checkpoint", "endpoint")
    )
    kept = {
        mode: [
            {name: each[mode][name] for name in ("classes", "accuracy", "reasoning_tokens", "answer_tokens")}
            for each in (ours, theirs)
        ]
        for mode in ours
    }
    figures.setdefault(server.engine, {})["report"] = kept
    for own, other in kept.values():
        for name, count in own["classes"].items():
            assert abs(count - other["classes"][name]) <= WITHIN * SAMPLES, kept
        assert abs(own["accuracy"] - other["accuracy"]) <= WITHIN, kept
        for name in ("reasoning_tokens", "answer_tokens"):
            assert abs(own[name] - other[name]) <= WITHIN * own[name], kept
