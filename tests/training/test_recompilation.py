"""A compiled run compiles what it needs up to its first evaluation, and nothing later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from minimind import PretrainConfig, pretrain
from support.compiling import compile_blocks_without_inductor
from support.cycle_corpus import write_corpus
from support.tiny_runs import tiny

EVALUATIONS = 10


class CountGraphs:
    """Notes how many graphs were compiled up to each evaluation."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_evaluation(self, *_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


def graphs_at_evaluations(folder: Path, **changes: Any) -> list[int]:
    """Return how many graphs a run of 28 layers has compiled at each of its evaluations, and at its end."""
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 28,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_seq_len": 32,
        "batch_size": 4,
        "log_interval": 10,
        "max_steps": EVALUATIONS,
        "eval_interval": 1,
        "eval_batches": 1,
        "tracker": ("none",),
    }
    corpus = write_corpus(folder / "corpus.jsonl")
    torch._dynamo.reset()
    counters.clear()
    counting = CountGraphs()
    config = PretrainConfig(
        **(options | changes),
        compile=True,
        data=(str(corpus),),
        val_fraction=0.1,
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
    )
    pretrain(config, callbacks=[counting])
    return [*counting.graphs, counters["stats"]["unique_graphs"]]


@pytest.mark.slow
def test_evaluations_of_many_layers_compile_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_blocks_without_inductor(monkeypatch)
    graphs = graphs_at_evaluations(tmp_path)
    assert len(graphs) > EVALUATIONS
    assert graphs[0] >= 3
    # The first is before the first step: training has compiled at the second.
    assert set(graphs[1:]) == {graphs[1]}


@pytest.mark.slow
def test_more_runs_than_dynamo_recompiles_train_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run of another width compiles the code of a block again, which Dynamo limits."""
    compile_blocks_without_inductor(monkeypatch)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    for run in range(4):
        sizes = {"hidden_size": 32 * (1 + run), "max_steps": 2, "val_fraction": 0.0}
        config = tiny(corpus, tmp_path / str(run), compile=True, **sizes)
        with torch._dynamo.config.patch(recompile_limit=3):
            assert len(pretrain(config).history.losses) > 0
