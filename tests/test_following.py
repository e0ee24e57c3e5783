# SPDX-License-Identifier: Apache-2.0
"""Processes of a pool end with the one that started them, even where that is killed and can tell them nothing."""

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.forked import FORKS, ROOT
from thinkfusion.following import follow_parent

FILE = "THINKFUSION_TEST_WORKING"


def work(*_):
    """A job that no one would wait for."""
    Path(os.environ[FILE]).touch()
    time.sleep(600)


class Maker:
    batches, model = 2, None
    make = staticmethod(work)


def in_a_pool(method):
    with ProcessPoolExecutor(2, multiprocessing.get_context(method), follow_parent) as pool:
        list(pool.map(work, range(2)))


def preparing_rows():
    from transformers import AutoTokenizer

    from thinkfusion import install_chat_template, preparing
    from thinkfusion.checkpointing import tiny_base_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer)
    preparing._make = work
    preparing.prepare([{"question": "a", "reasoning": "b", "answer": "c"}], tokenizer, processes=2)


def generating_pairs():
    import torch

    from thinkfusion import self_distillation

    Maker.model = torch.nn.Linear(1, 1)
    list(self_distillation._in_order(Maker(), 0, 2))


def running_the_ablation():
    import ablation

    ablation.run = work
    sys.argv = ["ablation.py", "--quick", "--processes", "2", "--output", str(Path(os.environ[FILE]).parent / "out")]
    ablation.main()


def comparing():
    import compare

    compare.run = work
    compare.in_a_process(None)


def begin(function, arguments, file):
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "examples" / "real_language")]
    os.environ[FILE] = str(file)
    function(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        *[(in_a_pool, (method,)) for method in multiprocessing.get_all_start_methods()],
        (preparing_rows, ()),
        (generating_pairs, ()),
        (running_the_ablation, ()),
        (comparing, ()),
    ],
)
def test_the_processes_of_a_pool_end_with_a_killed_parent(function, arguments, tmp_path):
    file = tmp_path / "working"
    parent = FORKS.Process(target=begin, args=(function, arguments, file))
    parent.start()
    try:
        until = time.monotonic() + 120
        while not file.exists():
            assert parent.is_alive()
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        children = psutil.Process(parent.pid).children(recursive=True) if parent.is_alive() else []
        parent.kill()
        parent.join()
        _, left = psutil.wait_procs(children, timeout=20)
        for process in left:
            process.kill()
    assert children
    assert not left


def test_a_process_that_no_pool_started_goes_on():
    follow_parent()
    assert "follow_parent" not in {thread.name for thread in threading.enumerate()}
