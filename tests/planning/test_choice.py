"""The choice of a budget as arithmetic: on machines and texts of any size, without one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.config import recipe
from minimind.config.budget import BUDGET_OPTIONS, Budget
from minimind.config.options import PretrainConfig
from minimind.errors import ConfigError
from minimind.evaluation.scaling_law import Difficulty, Forecast, packaged_law
from minimind.formats.huggingface import save_model
from minimind.modeling.config import MiniMindConfig
from minimind.modeling.transformer import MiniMindForCausalLM
from minimind.planning import budget as budget_module
from minimind.planning.budget_report import BudgetPlan
from minimind.planning.candidates import (
    BatchChoice,
    Candidate,
    Machine,
    TextSize,
    TokenizerChoice,
    chosen_options,
)
from minimind.planning.choice import LOADED_BYTES, USABLE, Chooser, search

GPU = Machine("cuda", "a GPU", 1, matmul_flops=6e14, memory=80e9, precision="bf16", fused=True)
CPU = Machine("cpu", "CPU", 1, matmul_flops=8e10, memory=8e9, precision="no")
PACKAGED, TRAINED = TokenizerChoice(6400, 3.0), TokenizerChoice(8192, 3.6, trained=True)
TEXT = TextSize(160e6, Difficulty(2.7, 0.07), (PACKAGED, TRAINED))
ENDLESS = dataclasses.replace(TEXT, num_bytes=160e9)


def chooser(budget: Budget, machine: Machine = GPU, text: TextSize = TEXT, **kept: Any) -> Chooser:
    return Chooser(budget, text, machine, packaged_law(), kept)


def options(of: Chooser) -> dict[str, Any]:
    best = of.ranked()[0]
    return chosen_options(best, of.text, of.budget, of.kept, processes=of.machine.processes)


def test_more_time_buys_a_larger_model_more_tokens_and_fewer_bits() -> None:
    best = [chooser(Budget(seconds=s), text=ENDLESS).ranked()[0] for s in (20, 60, 180, 1800, 4 * 3600)]
    tokens = [candidate.tokens for candidate in best]
    assert tokens == sorted(tokens)
    assert best[0].batch_tokens < best[-1].batch_tokens
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


def test_a_large_model_that_sees_a_small_text_often_has_longer_sequences() -> None:
    small = dataclasses.replace(TEXT, num_bytes=2e6, tokenizers=(PACKAGED,))

    def length(width: int, epochs: int) -> int:
        kept = {"hidden_size": width, "num_hidden_layers": 4, "epochs": epochs}
        (best, *_) = chooser(Budget(seconds=1e6), text=small, **kept).ranked()
        return best.seq_len

    assert [length(256, 4), length(256, 1), length(64, 4)] == [256, 128, 128]


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
        text = TextSize(
            10 ** draw.uniform(6, 11),
            Difficulty(draw.uniform(2, 4), draw.uniform(0.02, 0.1)),
            (PACKAGED, TRAINED),
        )
        kept = {"max_seq_len": draw.choice([128, 512, 2048, 8192])} if draw.random() < 0.6 else {}
        cases.append((budget, text, kept, draw.choice([6e9, 12e9, 24e9, 80e9]), draw.choice([1, 1, 2, 8])))
    return cases


@pytest.mark.parametrize(("budget", "text", "kept", "memory", "processes"), random_cases())
def test_the_estimate_of_memory_never_exceeds_the_limit(
    budget: Budget, text: TextSize, kept: dict[str, Any], memory: float, processes: int
) -> None:
    machine = dataclasses.replace(GPU, memory=memory, processes=processes)
    for candidate in chooser(budget, machine, text, **kept).ranked():
        assert candidate.memory + LOADED_BYTES <= USABLE * memory
        assert candidate.steps >= 1
        assert candidate.global_batch_size % (candidate.micro_batch_size * processes) == 0
        assert candidate.seq_len == kept.get("max_seq_len", candidate.seq_len)


def test_a_machine_on_which_nothing_fits_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(ConfigError, match="lower --max-seq-len"):
        chooser(Budget(seconds=60), dataclasses.replace(GPU, memory=4e8)).ranked()


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


def measured(found: Chooser, factor: Callable[[Candidate], float]) -> tuple[list[Candidate], Candidate]:
    """Return what a search asks to measure, and its choice, if a step takes `factor` times as expected."""
    asked: list[Candidate] = []
    running = search(found, lambda: 1e9)
    answer: float | None = None
    try:
        while True:
            asked.append(running.send(answer))
            last = asked[-1]
            expected = found._expected_step_seconds(last.shape, last.tokenizer, last)
            answer = expected * factor(last)
    except StopIteration as end:
        return asked, end.value[0]


def test_a_shape_or_a_batch_that_is_faster_than_expected_is_found() -> None:
    first = chooser(Budget(seconds=60)).ranked()[0]

    def larger_is_faster(candidate: Candidate) -> float:
        return 0.5 if candidate.shape.hidden_size > first.shape.hidden_size else 1.0

    asked, best = measured(chooser(Budget(seconds=60)), larger_is_faster)
    assert asked[0] == first
    assert best.measured
    assert best.shape.hidden_size > first.shape.hidden_size

    def other_batch_is_faster(candidate: Candidate) -> float:
        return 1.0 if candidate.batch_tokens == first.batch_tokens else 0.7

    asked, best = measured(chooser(Budget(seconds=60)), other_batch_is_faster)
    assert best.measured
    assert best.batch_tokens != first.batch_tokens
    assert len({candidate.key for candidate in asked}) == len(asked) < 20


def test_one_measurement_is_enough_where_speed_decides_nothing() -> None:
    asked, best = measured(chooser(Budget(tokens=50e6)), lambda candidate: 3.0)
    assert [candidate.shape for candidate in asked] == [best.shape]


def test_a_search_without_time_measures_one() -> None:
    running = search(chooser(Budget(seconds=120)), lambda: -1.0)
    first = running.send(None)
    with pytest.raises(StopIteration) as end:
        # So slow that another would be best now.
        running.send(first.step_seconds * 100)
    assert not end.value.value[0].measured


def candidate(**changes: Any) -> Candidate:
    """Return a candidate of 4000 steps of 16k tokens, 0.05 s each."""
    best = chooser(Budget(seconds=200)).ranked()[0]
    sizes = {"batch_tokens": 16384, "seq_len": 512, "micro_batch_size": 8, "global_batch_size": 32}
    times = {"steps": 4000, "epochs": 1.4, "step_seconds": 0.05, "shape": recipe.ModelShape.of(512, 8)}
    return dataclasses.replace(best, tokenizer=PACKAGED, **{**sizes, **times, **changes})


def test_options_follow_from_the_candidate_and_the_budget() -> None:
    chosen = chosen_options(candidate(), TEXT, Budget(seconds=240), {})
    assert chosen["learning_rate"] == pytest.approx(4e-3, rel=0.05)
    assert chosen["learning_rate"] * chosen["weight_decay"] * 4000 == pytest.approx(1.5 * 1.4, rel=0.05)
    assert chosen == {
        **recipe.ModelShape.of(512, 8).options(),
        "max_seq_len": 512,
        "batch_size": 8,
        "global_batch_size": 32,
        "epochs": 8,  # the clock ends the run
        "learning_rate": chosen["learning_rate"],
        "lr_schedule": "wsd",
        "warmup_steps": 80,  # 2% of the steps
        "min_lr_ratio": 0.0,
        "decay_ratio": 0.6,
        "decay_shape": "linear",
        "weight_decay": chosen["weight_decay"],
        "val_fraction": 0.0031,  # 500 kB
        "log_interval": 30,  # 1.5 s
        "eval_interval": 666,  # six evaluations
        # 0.7% of the time, at a third of the time that a step takes for its tokens.
        "eval_batches": None,
        "save_interval": 480,  # a tenth of the time
    }


@pytest.mark.parametrize(
    ("changes", "seconds", "expected"),
    [
        # Limits of the intervals in seconds: 1.5 to 30 between log lines, 20 to 600 between checkpoints.
        ({"steps": 10**6}, 86_400, {"log_interval": 600, "save_interval": 12_000, "warmup_steps": 1000}),
        ({"steps": 10**6}, 400, {"log_interval": 40, "save_interval": 800}),
        ({"steps": 10**6}, 20, {"log_interval": 30, "save_interval": 400}),
        # Every step where a step takes longer.
        ({"step_seconds": 100.0}, 400, {"log_interval": 1, "save_interval": 1}),
        # No longer than the run.
        ({"steps": 1}, 400, {"log_interval": 1, "save_interval": 1, "eval_interval": 1, "warmup_steps": 1}),
        # Of 20 s, 0.14 s are for an evaluation: 137k tokens at 1 us each, in batches of 4096.
        ({"step_seconds": 0.049152, "steps": 400}, 20, {"eval_batches": 34}),
        ({"step_seconds": 49.152, "steps": 400}, 20, {"eval_batches": 4}),
        # Without a budget in seconds the epochs are those of the tokens.
        ({"epochs": 1.4}, None, {"epochs": 2}),
        # 2M tokens of text for 24M parameters.
        ({"epochs": 30.0}, None, {"epochs": 3}),
        ({"steps": 40_000}, None, {"log_interval": 200, "save_interval": 4000}),
    ],
)
def test_intervals_are_shares_of_the_budget_within_limits(
    changes: dict[str, Any], seconds: float | None, expected: dict[str, int]
) -> None:
    budget = Budget(tokens=1e9) if seconds is None else Budget(seconds=seconds)
    chosen = chosen_options(candidate(**changes), TEXT, budget, {})
    assert {name: chosen[name] for name in expected} == expected


@pytest.mark.parametrize(("num_bytes", "fraction"), [(1e6, 0.05), (20e6, 0.025), (1e12, 0.001)])
def test_half_a_megabyte_is_held_out_within_limits(num_bytes: float, fraction: float) -> None:
    text = dataclasses.replace(TEXT, num_bytes=num_bytes)
    assert chosen_options(candidate(), text, Budget(seconds=240), {})["val_fraction"] == fraction


def test_processes_share_the_batches_of_an_evaluation() -> None:
    slow = candidate(step_seconds=0.049152, steps=400)
    alone, four = (chosen_options(slow, TEXT, Budget(seconds=20), {}, processes=n) for n in (1, 4))
    assert (alone["eval_batches"], four["eval_batches"]) == (34, 8)


def test_a_batch_larger_than_that_of_the_rule_costs_tokens() -> None:
    found, shape = chooser(Budget(seconds=200), text=ENDLESS), recipe.ModelShape.of(512, 8)
    batch = recipe.global_batch_tokens(61e6)
    assert recipe.useful_tokens(61e6, batch // 2) == recipe.useful_tokens(61e6, batch) == 61e6
    assert recipe.useful_tokens(61e6, 4 * batch) == pytest.approx(61e6 * 13 / 16)
    bits = [found._forecast(shape, PACKAGED, 61e6, m * batch).bits_per_byte for m in (1, 2, 4)]
    assert bits[0] < bits[1] < bits[2] < 1.05 * bits[0]


def test_a_text_too_small_for_any_model_is_tried_with_the_three_smallest() -> None:
    tiny = dataclasses.replace(TEXT, num_bytes=3e4, tokenizers=(PACKAGED,))
    shapes = {c.shape for c in chooser(Budget(seconds=200), text=tiny).ranked()}
    assert shapes == set(recipe.LADDER[:3])


def test_the_search_ends_where_the_time_left_is_shorter_than_a_measurement() -> None:
    left = iter([40.0, 30.0, 9.0])  # before and after the first, which takes 10 s; before the second
    running = search(chooser(Budget(seconds=120)), lambda: next(left))
    first = running.send(None)
    with pytest.raises(StopIteration) as end:
        running.send(first.step_seconds * 100)
    assert not end.value.value[0].measured


def test_the_plan_says_why_the_choice_is_neither_larger_nor_smaller() -> None:
    def expected(bits: float) -> Forecast:
        return Forecast(bits, bits - 0.05, bits + 0.05)

    best = candidate(forecast=expected(0.9), memory=4 * 10**9, measured=True)
    larger = candidate(shape=recipe.ModelShape.of(768, 12), steps=1000, forecast=expected(0.912))
    smaller = candidate(shape=recipe.ModelShape.of(256, 4), steps=9000, forecast=expected(0.95))

    def rows(*others: Candidate, machine: Machine = GPU, **changes: Any) -> dict[str, str]:
        rates = {"learning_rate": 4e-3, "weight_decay": 0.1}
        config = PretrainConfig(budget="200s", **rates, lr_schedule="wsd", decay_ratio=0.6)
        chosen = dataclasses.replace(best, **changes)
        plan = BudgetPlan(config, Budget(seconds=200), TEXT, machine, (chosen, *others), ("batch_size",))
        return dict(plan.rows())

    assert rows(larger)["why"] == "a larger model would see only 16.4M tokens"
    assert rows(smaller)["why"] == "a smaller one would learn less from its 147M"
    assert rows(larger, smaller)["why"].count(";") == 1
    assert rows(candidate(steps=1))["why"] == "no other choice comes near"
    screen = rows(larger, smaller)
    assert screen == {
        "budget": "200s of training on a GPU",
        "model": "26.9M parameters: 8 layers, hidden size 512, 4 heads",
        "tokenizer": "6,400 entries, given, or of the package; 3.00 bytes each",
        "batch": "16.4k tokens (8 sequences x 512 tokens x accumulation 4)",
        "training": "4,000 steps, 65.5M tokens, 1.4 epochs of 160 MB; normuon at 0.004, weight decay 0.1, "
        "linear decay over the last 60%",
        "kept": "--batch-size, as set",
        "expected": "0.900 (0.85 to 0.95) bits/byte on held-out text, with 90% probability",
        "time": "3m20s of training (328k tokens/s measured), plus preparing the data",
        "memory": "4.00 GB estimated, of 80.0 GB free",
        "why": "a larger model would see only 16.4M tokens; a smaller one would learn less from its 147M",
        "next best": "82.8M parameters: 12 layers, hidden size 768, 6 heads, vocabulary 6,400: 16.4M tokens, "
        "+0.012 bits/byte",
        "then": "4.59M parameters: 4 layers, hidden size 256, 4 heads, vocabulary 6,400: 147M tokens, "
        "+0.050 bits/byte",
    }
    four = rows(larger, machine=dataclasses.replace(GPU, processes=4))
    assert four["batch"] == "16.4k tokens (8 sequences x 512 tokens x 4)"
    changed = rows(
        *(larger, smaller), machine=dataclasses.replace(GPU, processes=2), measured=False, limited=True,
        steps=3000, tokenizer=TRAINED,
    )  # fmt: skip
    assert {name: text for name, text in changed.items() if screen[name] != text} == {
        "budget": "200s of training on a GPU x 2",
        "model": "27.8M parameters: 8 layers, hidden size 512, 4 heads",
        "tokenizer": "8,192 entries, trained on a sample of the text; 3.60 bytes each",
        "batch": "16.4k tokens (8 sequences x 512 tokens x accumulation 2 x 2)",
        "training": screen["training"].replace("4,000 steps, 65.5M", "3,000 steps, 49.2M"),
        # A run that the text limits takes the time of its steps.
        "time": "2m30s of training (328k tokens/s estimated), plus preparing the data; the text is too small "
        "for more: further epochs would add nothing",
    }


def test_an_alternative_of_another_shape_is_shown_if_there_is_one() -> None:
    small, large = recipe.ModelShape.of(256, 4), recipe.ModelShape.of(768, 12)
    a1, a2, a3, b, c = (candidate(shape=shape, steps=n) for n, shape in enumerate(
        [small, small, small, large, recipe.ModelShape.of(64, 4)], start=1
    ))  # fmt: skip
    for ranked, shown in (
        ([a1, a2, a3, b, c], (a1, a2, b)),
        ([a1, a2, b, a3], (a1, a2, b)),
        ([a1, b, c, a2], (a1, b, c)),
        ([a1, a2, a3], (a1, a2, a3)),
        ([a1, b], (a1, b)),
        ([a1], (a1,)),
    ):
        assert budget_module._with_alternatives(ranked) == shown


def planned(config: PretrainConfig, seconds: float, machine: Machine = GPU, **kept: Any) -> PretrainConfig:
    """Return the options of a budget of time, with what is kept besides those of the configuration."""
    outcome = budget_module._Outcome((candidate(),), TEXT, machine)
    sample: Any = None
    kept = {name: getattr(config, name) for name in config.budget_keeps} | kept
    return budget_module._plan(config, Budget(seconds=seconds), kept, outcome, sample).config


UNFUSED = dataclasses.replace(GPU, fused=False)


@pytest.mark.parametrize(
    ("machine", "seconds", "compiled"),
    [
        (GPU, 1200, False),
        (GPU, 1201, True),
        (dataclasses.replace(GPU, processes=2), 1200, False),
        # Without CUDA graphs compiling gains more.
        (UNFUSED, 300, False),
        (UNFUSED, 301, True),
        (CPU, 10**6, None),
    ],
)
def test_only_a_long_run_on_a_gpu_compiles(machine: Machine, seconds: float, compiled: bool | None) -> None:
    assert planned(PretrainConfig(budget="1h"), seconds, machine).compile is compiled
    # Unless the user has decided.
    assert planned(PretrainConfig(budget="1h", compile=True), seconds, machine, compile=True).compile is True


def test_what_the_user_has_set_changes_what_goes_with_it() -> None:
    plain = planned(PretrainConfig(budget="1h"), 600)
    assert (plain.lr_schedule, plain.decay_ratio, plain.val_fraction) == ("wsd", 0.6, 0.0031)
    tuned = planned(PretrainConfig(budget="1h", from_weight="model"), 600)
    assert tuned.learning_rate == pytest.approx(0.3 * plain.learning_rate)
    given = planned(PretrainConfig(budget="1h", data=("a",), val_data=("v",)), 600)
    assert given.val_fraction == PretrainConfig().val_fraction
    cosine = planned(PretrainConfig(budget="1h", lr_schedule="cosine"), 600)
    assert (cosine.lr_schedule, cosine.decay_ratio) == ("cosine", PretrainConfig().decay_ratio)
    assert cosine.learning_rate == plain.learning_rate


def test_the_sizes_of_given_weights_are_kept(tmp_path: Path) -> None:
    sizes = {
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 6, "intermediate_size": 24, "vocab_size": 40},
    }
    save_model(MiniMindForCausalLM(MiniMindConfig(**sizes)), tmp_path)
    # What the budget never chooses.
    free = {"dropout": 0.0, "router_aux_loss_coef": 0.01}
    kept = budget_module._kept_options(PretrainConfig(budget="1h", from_weight=str(tmp_path)))
    assert kept == {**sizes, **free, "from_weight": str(tmp_path), "tokenizer": None}
    given = {"head_dim": 32, "accumulation_steps": 4, "epochs": 2}
    found = budget_module._kept_options(PretrainConfig(budget="1h", **given))
    assert {name: found[name] for name in given} == given
    assert not found.keys() & {"hidden_size", "batch_size", "learning_rate", "tokenizer", "vocab_size"}


def test_depths_are_compared_where_the_width_is_set_and_widths_where_the_depth_is() -> None:
    def shapes(**kept: Any) -> set[tuple[int, int]]:
        found = chooser(
            Budget(seconds=86400), dataclasses.replace(GPU, memory=1e12), ENDLESS, **kept
        ).ranked()
        return {(c.shape.hidden_size, c.shape.num_hidden_layers) for c in found}

    widths = {shape.hidden_size for shape in recipe.LADDER}
    assert shapes(hidden_size=512) == {(512, layers) for layers in (2, 4, 6, 8, 12, 16, 24, 32)}
    assert shapes(num_hidden_layers=6) == {(width, 6) for width in widths}
    assert shapes(hidden_size=512, num_hidden_layers=6) == {(512, 6)}
    # Heads that divide the width.
    assert shapes(num_attention_heads=5, num_key_value_heads=1) == {(w, w // 64) for w in (640, 1280, 2560)}


def test_a_step_has_the_micro_batches_that_are_set() -> None:
    two = dataclasses.replace(GPU, processes=2)

    def sizes(**kept: Any) -> set[tuple[int, int]]:
        found = chooser(Budget(seconds=600), two, ENDLESS, **kept).ranked()
        return {(c.global_batch_size, c.micro_batch_size) for c in found}

    assert sizes(batch_size=4, accumulation_steps=3) == {(4 * 3 * 2, 4)}
    assert sizes(batch_size=2, accumulation_steps=1) == {(2 * 1 * 2, 2)}
    assert all(whole % (3 * 2) == 0 for whole, _ in sizes(accumulation_steps=3))
    assert all((whole % 10, micro) == (0, 5) for whole, micro in sizes(batch_size=5))
    assert {whole for whole, _ in sizes(global_batch_size=64)} == {64}
    # On CPUs micro-batches are small.
    assert all(
        c.micro_batch_size * c.seq_len <= 8192
        for c in chooser(Budget(seconds=1e6), dataclasses.replace(CPU, memory=1e12), ENDLESS).ranked()
    )


def test_a_step_is_expected_to_take_its_arithmetic_and_its_launches() -> None:
    shape = recipe.ModelShape.of(512, 8)
    plan = BatchChoice(16384, 512, 8, 0)  # four micro-batches
    model = MiniMindConfig(**shape.options(), vocab_size=6400)
    flops = 16384 * model.flops_per_token(512)

    def seconds(machine: Machine, optimizer: str) -> float:
        found = dataclasses.replace(chooser(Budget(seconds=60), machine), optimizer=optimizer)
        return found._expected_step_seconds(shape, PACKAGED, plan)

    # 60% of the speed of a large product, and 0.2 ms a layer.
    assert seconds(CPU, "adamw") == pytest.approx(flops / (0.6 * 8e10) + 2e-4 * 8 * 4)
    # Less on a GPU where the model is narrow.
    speed = 0.75 * 512 / (512 + 150) * 6e14
    assert seconds(GPU, "adamw") == pytest.approx(flops / speed + 4e-4 * 8 * 4)
    # As much as ten products of each matrix with a square one.
    muon = 20 * 512 * shape.block_parameters
    for optimizer in ("muon", "normuon"):
        assert seconds(GPU, optimizer) == pytest.approx((flops + muon) / speed + 4e-4 * 8 * 4)
    # Each of two processes computes half of the step.
    two = dataclasses.replace(GPU, processes=2)
    assert seconds(two, "adamw") == pytest.approx(flops / 2 / speed + 4e-4 * 8 * 2)
