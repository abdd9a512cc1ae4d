"""The choice of a budget as arithmetic: on machines and texts of any size, without one."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.config import recipe
from minimind.config.budget import BUDGET_OPTIONS, Budget
from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.evaluation.scaling_law import packaged_law
from minimind.planning.candidates import Machine, TextSize, TokenizerChoice, chosen_options
from minimind.planning.choice import USABLE, Chooser, search

GPU = Machine("cuda", "a GPU", 1, matmul_flops=6e14, memory=80e9, precision="bf16", fused=True)
CPU = Machine("cpu", "CPU", 1, matmul_flops=8e10, memory=8e9, precision="no")
PACKAGED, TRAINED = TokenizerChoice(6400, 3.0), TokenizerChoice(8192, 3.6, trained=True)
TEXT = TextSize(160e6, 3.5, (PACKAGED, TRAINED))
ENDLESS = dataclasses.replace(TEXT, num_bytes=160e9)


def chooser(budget: Budget, machine: Machine = GPU, text: TextSize = TEXT, **kept: Any) -> Chooser:
    return Chooser(budget, text, machine, packaged_law(), kept)


def options(of: Chooser) -> dict[str, Any]:
    best = of.ranked()[0]
    return chosen_options(best, of.text, of.budget, of.kept, processes=of.machine.processes)


def test_more_time_buys_a_larger_model_more_tokens_and_fewer_bits() -> None:
    best = [chooser(Budget(seconds=s), text=ENDLESS).ranked()[0] for s in (20, 60, 180, 1800, 4 * 3600)]
    for name in ("tokens", "batch_tokens"):
        values = [getattr(candidate, name) for candidate in best]
        assert values == sorted(values)
    sizes = [candidate.shape.block_parameters for candidate in best]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    bits = [candidate.forecast.bits_per_byte for candidate in best]
    assert bits == sorted(bits, reverse=True)


def test_a_faster_machine_and_more_processes_buy_more_tokens() -> None:
    slow = chooser(Budget(seconds=180), CPU).ranked()[0]
    fast = chooser(Budget(seconds=180)).ranked()[0]
    many = chooser(Budget(seconds=180), dataclasses.replace(GPU, processes=8)).ranked()[0]
    assert slow.tokens < fast.tokens
    assert slow.shape.block_parameters < fast.shape.block_parameters
    assert fast.tokens * fast.shape.block_parameters < many.tokens * many.shape.block_parameters
    assert many.global_batch_size % (8 * many.micro_batch_size) == 0


def test_flops_are_spent_whatever_the_speed() -> None:
    budget = Budget(flops=1e18)
    first, second = (chooser(budget, machine, ENDLESS).ranked()[0] for machine in (GPU, CPU))
    assert first.shape == second.shape
    model = chooser(budget)._model(first.shape, first.tokenizer)
    spent = first.tokens * model.flops_per_token(first.seq_len)
    assert spent == pytest.approx(1e18, rel=0.05)


def test_tokens_are_spent_on_a_shape_for_which_they_are_not_too_many() -> None:
    few, many = (chooser(Budget(tokens=n)).ranked()[0] for n in (20e6, 400e6))
    assert few.tokens == pytest.approx(20e6, rel=0.01)
    assert few.shape.block_parameters < many.shape.block_parameters < recipe.LADDER[-1].block_parameters


def test_repetition_is_limited_and_the_rest_of_the_budget_not_spent() -> None:
    small = dataclasses.replace(TEXT, num_bytes=3e6, tokenizers=(PACKAGED,))
    best = chooser(Budget(seconds=1e6), text=small).ranked()[0]
    assert best.limited
    assert best.epochs <= recipe.MOST_EPOCHS
    # `epochs` is a limit of the user's then.
    kept = chooser(Budget(seconds=1e6), text=small, epochs=2).ranked()[0]
    assert kept.epochs <= 2


def test_a_small_text_on_a_large_machine_trains_a_small_model() -> None:
    small = dataclasses.replace(TEXT, num_bytes=3e6, tokenizers=(PACKAGED,))
    best = chooser(Budget(seconds=600), text=small).ranked()[0]
    assert 5e5 < best.shape.block_parameters <= 8e6
    # Unless the user wants a large one.
    assert chooser(Budget(seconds=600), text=small, hidden_size=1024).ranked()[0].shape.hidden_size == 1024


def test_a_trained_tokenizer_has_to_be_clearly_better() -> None:
    def vocabulary(bytes_per_token: float) -> int:
        trained = TokenizerChoice(6400, bytes_per_token, trained=True)
        text = dataclasses.replace(TEXT, tokenizers=(PACKAGED, trained))
        return chooser(Budget(seconds=60), text=text).ranked()[0].tokenizer.trained

    assert not vocabulary(3.0)
    assert not vocabulary(3.02)
    assert vocabulary(3.6)


SET = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 640,
    "max_seq_len": 192,
    "batch_size": 3,
    "global_batch_size": 24,
    "epochs": 3,
    "learning_rate": 0.0123,
    "lr_schedule": "cosine",
    "weight_decay": 0.07,
    "eval_interval": 17,
}


@pytest.mark.parametrize("name", SET)
def test_an_option_that_is_set_is_kept_and_the_others_are_chosen(name: str) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3} if name.startswith("num_") else {}
    kept = {name: SET[name], **({"hidden_size": 192} if heads else {}), **heads}
    found = chooser(Budget(seconds=100), CPU, **kept)
    chosen = options(found)
    assert not chosen.keys() & kept.keys()
    best = found.ranked()[0]
    facts = {
        **dataclasses.asdict(best.shape),
        "max_seq_len": best.seq_len,
        "batch_size": best.micro_batch_size,
    }
    facts["global_batch_size"] = best.global_batch_size
    assert facts.get(name, SET[name]) == SET[name]
    PretrainConfig(**chosen, **kept)  # raises for a conflict


def test_all_that_is_chosen_is_an_option_of_the_budget_and_valid() -> None:
    for seconds in (20, 300, 86400):
        for machine in (GPU, CPU):
            chosen = options(chooser(Budget(seconds=seconds), machine))
            assert chosen.keys() <= set(BUDGET_OPTIONS)
            PretrainConfig(**chosen)


def random_cases() -> list[tuple[Budget, TextSize, dict[str, Any], float, int]]:
    draw = random.Random(18)
    cases = []
    for _ in range(40):
        budget = draw.choice(
            [Budget(seconds=10 ** draw.uniform(1, 5)), Budget(tokens=10 ** draw.uniform(6, 10))]
        )
        text = TextSize(10 ** draw.uniform(6, 11), draw.uniform(2.5, 4.5), (PACKAGED, TRAINED))
        kept = {"max_seq_len": draw.choice([128, 512, 2048, 8192])} if draw.random() < 0.6 else {}
        cases.append((budget, text, kept, draw.choice([6e9, 12e9, 24e9, 80e9]), draw.choice([1, 1, 2, 8])))
    return cases


@pytest.mark.parametrize(("budget", "text", "kept", "memory", "processes"), random_cases())
def test_the_estimate_of_memory_never_exceeds_the_limit(
    budget: Budget, text: TextSize, kept: dict[str, Any], memory: float, processes: int
) -> None:
    machine = dataclasses.replace(GPU, memory=memory, processes=processes)
    for candidate in chooser(budget, machine, text, **kept).ranked():
        assert candidate.memory + (1 << 30) <= USABLE * memory
        assert candidate.steps >= 1
        assert candidate.global_batch_size % (candidate.micro_batch_size * processes) == 0
        assert candidate.seq_len == kept.get("max_seq_len", candidate.seq_len)


def test_a_machine_on_which_nothing_fits_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(ConfigError, match="lower --max-seq-len"):
        chooser(Budget(seconds=60), dataclasses.replace(GPU, memory=1e9)).ranked()


@settings(max_examples=5, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 3))
def test_the_search_measures_until_the_best_is_measured(slower: float, too_large: int) -> None:
    """The true speeds differ from those expected by an own factor for each width."""
    found = chooser(Budget(seconds=120))
    asked = []
    running = search(found, lambda: 1e9)
    answer: float | None = None
    try:
        while True:
            candidate = running.send(answer)
            asked.append(candidate)
            factor = slower if candidate.shape.hidden_size > 500 else 1.0
            answer = None if len(asked) <= too_large else candidate.step_seconds * factor
    except StopIteration as end:
        ranked = end.value
    assert ranked[0].measured
    assert len(asked) < 30
    refused = [(c.shape, c.tokenizer.vocab_size, c.micro_batch_size) for c in asked[:too_large]]
    assert (ranked[0].shape, ranked[0].tokenizer.vocab_size, ranked[0].micro_batch_size) not in refused


def test_a_search_without_time_measures_one() -> None:
    running = search(chooser(Budget(seconds=120)), lambda: -1.0)
    first = running.send(None)
    with pytest.raises(StopIteration) as end:
        # So slow that another would be best now.
        running.send(first.step_seconds * 100)
    assert not end.value.value[0].measured
