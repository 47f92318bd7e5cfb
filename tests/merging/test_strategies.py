"""Strategies, against a few lines of NumPy each, and what must hold of every one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.cli.merge import merge_command
from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedValueError
from onthefly.merging import merge_state_dicts, strategies
from onthefly.merging.parents import held_parent
from onthefly.merging.plan import planned
from onthefly.merging.registry import STRATEGIES, strategy_named

unhurried = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def drawn(seed, count, shape=(7, 5), dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [{"weight": torch.randn(shape, generator=draw).to(dtype)} for _ in range(count)]


def needs(strategy, count, shape=(7, 5), seed=1):
    """What a strategy needs besides the parents."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    if "base" in strategy.needs:
        found["base"] = {"weight": torch.zeros(shape)}
    if "weights" in strategy.needs:
        found["weights"] = range(1, count + 1)
    if "fishers" in strategy.needs:
        found["statistics"] = [{"weight": torch.rand(shape, generator=draw)} for _ in range(count)]
    if "grams" in strategy.needs:
        inputs = [torch.randn(50, shape[1], generator=draw) for _ in range(count)]
        found["statistics"] = [{"weight": x.T @ x} for x in inputs]
    return found


def merged(states, name, options=None, **given):
    return merge_state_dicts(states, name, options, **given)["weight"]


def numpy_of(states):
    return [state["weight"].double().numpy() for state in states]


# -- of all ----------------------------------------------------------------------------------------------------


AVERAGES = ("swa", "weighted", "fisher", "adapter", "slerp", "regmean")


@unhurried
@given(seeds, st.integers(2, 5), st.sampled_from(AVERAGES))
def test_the_merge_of_equal_parents_is_the_parent(seed, count, name):
    strategy = strategy_named(name)
    count = strategy.parents or count
    (state,) = drawn(seed, 1)
    found = merged([state] * count, name, **needs(strategy, count))
    if name == "regmean":
        torch.testing.assert_close(found, state["weight"])
    else:
        assert torch.equal(found, state["weight"])


@unhurried
@given(seeds, st.permutations(range(4)), st.sampled_from(["swa", "weighted", "fisher", "task_arithmetic", "ties"]))
def test_the_order_of_the_parents_does_not_matter(seed, order, name):
    states, given = drawn(seed, 4), needs(strategy_named(name), 4)
    moved = {key: [given[key][i] for i in order] for key in ("weights", "statistics") if key in given}
    found = merged([states[i] for i in order], name, **{**given, **moved})
    torch.testing.assert_close(found, merged(states, name, **given), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strategy", [one for one in STRATEGIES if one.name != "lora"], ids=lambda one: one.name)
def test_the_result_has_the_dtype_of_the_parents_and_is_rounded_once(strategy, dtype):
    count = strategy.parents or 3
    states, given = drawn(3, count, dtype=dtype), needs(strategy, count)
    if "base" in given:
        given["base"] = {"weight": given["base"]["weight"].to(dtype)}
    found = merged(states, strategy.name, **given)
    assert found.dtype == dtype
    wide = [{"weight": state["weight"].double()} for state in states]
    if "base" in given:
        given["base"] = {"weight": given["base"]["weight"].double()}
    assert torch.equal(found.float(), merged(wide, strategy.name, **given).to(dtype).float())


def test_a_complex_tensor_is_merged_as_its_real_numbers():
    states = [{"weight": torch.randn(3, 4, dtype=torch.complex64)} for _ in range(2)]
    states[1]["weight"] = states[1]["weight"].conj()
    found = merged(states, "swa")
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, (states[0]["weight"] + states[1]["weight"]) / 2)
    with pytest.raises(UnsupportedValueError, match="weight"):
        merged(states, "fisher", statistics=[{"weight": torch.ones(3, 4)}] * 2)


@pytest.mark.parametrize("strategy", [one for one in STRATEGIES if one.reach != "whole"], ids=lambda one: one.name)
def test_slices_and_threads_do_not_matter(strategy):
    count, shape = strategy.parents or 3, (700, 300)
    given = needs(strategy, count, shape)
    parents = [held_parent(state, "parent") for state in drawn(5, count, shape)]
    base = held_parent(given.pop("base"), "base") if "base" in given else None
    statistics = [held_parent(one, "s") for one in given.pop("statistics")] if "statistics" in given else None

    def bits(size):
        plan = planned(parents, strategy.name, {}, base=base, statistics=statistics, **given)
        return torch.cat(list(plan.pieces("weight", size)))

    threads, wanted = torch.get_num_threads(), bits(strategies.SLICE)
    try:
        for number, size in ((1, 4099), (2, 2**17), (1, 10**9)):
            torch.set_num_threads(number)
            assert torch.equal(bits(size), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "base", "statistics"])
@pytest.mark.parametrize(
    "strategy", [one for one in STRATEGIES if one.name not in ("lora", "adapter")], ids=lambda one: one.name
)
def test_no_number_that_is_not_finite_goes_unnoticed(strategy, where, value):
    count = strategy.parents or 3
    states, given = drawn(3, count), needs(strategy, count)
    if where != "weight" and where not in given:
        return
    target = {"weight": states[1:], "base": [given.get("base")], "statistics": given.get("statistics", [])[1:]}[where]
    target[0]["weight"][3, 4] = value
    who = {"weight": "model 1", "base": "the base", "statistics": "the statistics of model 1"}[where]
    with pytest.raises(InvalidCommandError, match=f"^{who}: weight has numbers that are NaN or infinite"):
        merged(states, strategy.name, **given)


# -- one by one ------------------------------------------------------------------------------------------------


@unhurried
@given(seeds, st.lists(st.floats(0.01, 10), min_size=2, max_size=4))
def test_weighted(seed, weights):
    states = drawn(seed, len(weights))
    wanted = sum(w * x for w, x in zip(weights, numpy_of(states), strict=True)) / sum(weights)
    np.testing.assert_allclose(merged(states, "weighted", weights=weights).numpy(), wanted, rtol=2e-7, atol=1e-12)


@unhurried
@given(seeds, st.booleans())
def test_fisher(seed, normalize):
    states = drawn(seed, 3)
    fishers = [{"weight": state["weight"].square() * 10**i} for i, state in enumerate(drawn(seed + 1, 3))]
    fishers[0]["weight"][0] = 0
    shares = [np.maximum(f, 1e-6) / (np.linalg.norm(f) if normalize else 1) for f in numpy_of(fishers)]
    wanted = sum(f * x for f, x in zip(shares, numpy_of(states), strict=True)) / sum(shares)
    found = merged(states, "fisher", {"normalize": normalize}, statistics=fishers)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-9)


def reference_elected(deltas):
    elected = np.sign(sum(deltas))
    agree = [(np.sign(d) == elected) & (d != 0) for d in deltas]
    return sum(d * a for d, a in zip(deltas, agree, strict=True)) / np.maximum(sum(agree), 1)


@unhurried
@given(seeds, st.integers(2, 5), st.floats(0.01, 1), st.floats(0.1, 2))
def test_ties(seed, count, density, scale):
    states, (base,) = drawn(seed, count), drawn(seed + 1, 1)
    deltas = [x - base["weight"].double().numpy() for x in numpy_of(states)]
    kept = max(1, round(density * deltas[0].size))
    trimmed = [np.where(abs(d) >= np.sort(abs(d).ravel())[-kept] * (1 - 1e-7), d, 0) for d in deltas]
    wanted = base["weight"].double().numpy() + scale * reference_elected(trimmed)
    found = merged(states, "ties", {"density": density, "scale": scale}, base=base)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_dare_drops_at_its_rate_and_keeps_the_mean_and_its_mask_is_that_of_seed_name_and_parent():
    states, base = drawn(0, 2, (500, 400)), {"weight": torch.zeros(500, 400)}
    one = [states[0], {"weight": torch.zeros(500, 400)}]
    found = merged(one, "dare", {"drop": 0.8, "scale": 1}, base=base)
    kept = found != 0
    assert abs(float(kept.float().mean()) - 0.2) < 0.005
    torch.testing.assert_close(found[kept], states[0]["weight"][kept] / 0.2)
    assert torch.equal(found, merged(one, "dare", {"drop": 0.8, "scale": 1}, base=base))
    other = merged(one, "dare", {"drop": 0.8, "scale": 1, "seed": 1}, base=base)
    second = merged(one[::-1], "dare", {"drop": 0.8, "scale": 1}, base=base)
    for mask in (other != 0, second != 0):
        assert (
            abs(float((kept & mask).float().mean()) - 0.04) < 0.005
        )  # as often as two that know nothing of each other
    whole = merged(states, "dare", {"drop": 0, "scale": 0.7}, base=base)
    assert torch.equal(whole, merged(states, "task_arithmetic", {"scale": 0.7}, base=base))


@unhurried
@given(seeds)
def test_dare_ties_without_dropping_is_ties_without_trimming(seed):
    states, (base,) = drawn(seed, 3), drawn(seed + 1, 1)
    assert torch.equal(
        merged(states, "dare_ties", {"drop": 0}, base=base), merged(states, "ties", {"density": 1}, base=base)
    )


def test_random_bits_are_of_their_place():
    whole = strategies._random_bits("key", 0, 1000)
    for begin, count in ((0, 1), (1, 7), (8, 8), (13, 400), (999, 1)):
        assert np.array_equal(strategies._random_bits("key", begin, count), whole[begin : begin + count])


@unhurried
@given(seeds, st.floats(0, 1))
def test_slerp(seed, t):
    states = drawn(seed, 2)
    a, b = (x.ravel() for x in numpy_of(states))
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    wanted = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(merged(states, "slerp", {"t": t}).numpy().ravel(), wanted, rtol=1e-5, atol=1e-6)


def test_slerp_of_what_has_no_angle_is_a_line():
    (state,) = drawn(0, 1)
    for other in (state["weight"] * 2, state["weight"] * -1.5, torch.zeros(7, 5)):
        wanted = torch.lerp(state["weight"].double(), other.double(), 0.25).float()
        assert torch.equal(merged([state, {"weight": other}], "slerp", {"t": 0.25}), wanted)
    assert torch.isfinite(merged([{"weight": torch.zeros(3)}] * 2, "slerp")).all()


@unhurried
@given(seeds, st.booleans())
def test_regmean_of_least_squares_fits_is_the_fit_to_all_data(seed, convolution):
    draw = np.random.default_rng(seed)
    inputs = [draw.normal(size=(40, 12)) * draw.uniform(0.5, 2, 12) for _ in range(3)]
    outputs = [draw.normal(size=(40, 4)) for _ in inputs]
    fits = [np.linalg.lstsq(x, y, rcond=None)[0].T for x, y in zip(inputs, outputs, strict=True)]
    shape = (4, 3, 2, 2) if convolution else (4, 12)
    states = [{"weight": torch.from_numpy(fit).reshape(shape), "bias": torch.zeros(4)} for fit in fits]
    grams = [{"weight": torch.from_numpy(x.T @ x)} for x in inputs]
    joint = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0].T
    found = merged(states, "regmean", {"shrink": 1, "ridge": 0}, statistics=grams)
    np.testing.assert_allclose(found.reshape(4, 12).numpy(), joint, rtol=1e-8, atol=1e-10)
    near = merged(states, "regmean", {"shrink": 1}, statistics=grams)
    np.testing.assert_allclose(near.reshape(4, 12).numpy(), joint, rtol=1e-3, atol=1e-4)


def test_regmean_averages_where_the_inputs_are_always_zero_and_says_what_is_wrong():
    states, x = drawn(0, 2), torch.randn(50, 5)
    x[:, 2] = 0
    grams = [{"weight": x.T @ x}, {"weight": (2 * x).T @ (2 * x)}]
    found = merged(states, "regmean", statistics=grams)
    mean = (states[0]["weight"] + states[1]["weight"]) / 2
    torch.testing.assert_close(found[:, 2], mean[:, 2])
    torch.testing.assert_close(merged(states, "regmean", statistics=[{"weight": torch.zeros(5, 5)}] * 2), mean)
    with pytest.raises(InvalidCommandError, match="larger ridge"):
        merged(states, "regmean", {"ridge": 0}, statistics=grams)
    with pytest.raises(StateMismatchError, match=r"weight: its Gram matrix is \[5, 5\], not \[4, 4\]"):
        merged(states, "regmean", statistics=[{"weight": torch.eye(4)}] * 2)


# -- LoRA ------------------------------------------------------------------------------------------------------

A, B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"


def pairs(seed, ranks, out=6, width=9):
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            A: torch.randn(r, width, generator=draw),
            B: torch.randn(out, r, generator=draw),
            "head": torch.full((2,), float(i)),
        }
        for i, r in enumerate(ranks)
    ]


@unhurried
@given(seeds, st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_lora_merges_the_products(seed, ranks):
    states, alphas = pairs(seed, ranks), [8.0, 4.0, 2.0][: len(ranks)]
    wanted = sum(a / r * s[B] @ s[A] for a, r, s in zip(alphas, ranks, states, strict=True)) / len(ranks)
    rank = min(6, sum(ranks))
    found = merge_state_dicts(states, "lora", {"rank": rank, "alpha": alphas})
    assert (found[A].shape, found[B].shape) == ((rank, 9), (6, rank))
    torch.testing.assert_close(alphas[0] / rank * found[B] @ found[A], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["head"], torch.full((2,), (len(ranks) - 1) / 2))
    plain = merge_state_dicts(states, "lora", {"rank": 9})  # more than there is: the rest is zero
    wanted = sum(s[B] @ s[A] for s in states) / len(ranks)
    torch.testing.assert_close(plain[B] @ plain[A], wanted, rtol=1e-4, atol=1e-4)


def test_lora_of_a_lower_rank_is_the_nearest():
    states = pairs(0, [3, 3])
    found = merge_state_dicts(states, "lora")
    product = (states[0][B] @ states[0][A] + states[1][B] @ states[1][A]) / 2
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    torch.testing.assert_close(found[B] @ found[A], u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-4)


def test_lora_wants_pairs_and_other_strategies_warn_of_them():
    states = pairs(0, [2, 2])
    with pytest.warns(UserWarning, match="average of factors"):
        merge_state_dicts(states, "adapter")
    with pytest.raises(StateMismatchError, match=r"lora_A.*lora_B"):
        merge_state_dicts([{A: state[A]} for state in states], "lora")
    with pytest.raises(InvalidCommandError, match="no pairs"):
        merge_state_dicts(drawn(0, 2), "lora")
    with pytest.raises(InvalidCommandError, match="one for each of the 2"):
        merge_state_dicts(states, "lora", {"alpha": "1,2,3"})
    with pytest.raises(StateMismatchError, match=r"lora_A"):
        merge_state_dicts(pairs(0, [2, 3]), "swa")


@pytest.mark.parametrize("name", ["a.lora_A.weight", "lora_B", "x.lora_embedding_A", "lora_A.default.weight"])
def test_a_partner_has_a_partner(name):
    other = strategies.partner(name)
    assert other != name
    assert strategies.partner(other) == name


def test_what_is_no_factor_has_no_partner():
    assert {strategies.partner(name) for name in ("weight", "lora_alpha", "flora_A", "lora_Axis")} == {None}


# -- soup ------------------------------------------------------------------------------------------------------


def test_greedy_adds_what_does_not_lower_the_score():
    asked = []

    def evaluate(members):
        asked.append(members)
        return {(2, 0): 0.9, (2, 0, 1): 0.85}[members]

    assert strategies.greedy([0.8, 0.5, 0.9, float("nan")], evaluate) == (2, 0)
    assert asked == [(2, 0), (2, 0, 1)]
    with pytest.raises(InvalidCommandError):
        strategies.greedy([float("nan")], evaluate)


@unhurried
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), seeds)
def test_a_greedy_soup_is_never_below_its_best_parent(scores, seed):
    table = {}

    def evaluate(members):
        return table.setdefault(members, np.random.default_rng([seed, *members]).uniform(-1, 1))

    members = strategies.greedy(scores, evaluate)
    assert (table[members] if len(members) > 1 else scores[members[0]]) >= max(scores)


# -- registry --------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_or_option_names_the_nearest():
    with pytest.raises(InvalidCommandError, match="did you mean ties"):
        strategy_named("tie")
    with pytest.raises(InvalidCommandError, match="there are: swa"):
        strategy_named("xyz")
    with pytest.raises(InvalidCommandError, match="did you mean density"):
        strategy_named("ties").configured({"densty": 1})
    with pytest.raises(InvalidCommandError, match="there are: none"):
        strategy_named("swa").configured({"t": 1})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ties", {"density": 0}),
        ("ties", {"density": "1.5"}),
        ("ties", {"density": "much"}),
        ("ties", {"scale": "nan"}),
        ("dare", {"drop": 1}),
        ("dare", {"seed": 1.5}),
        ("fisher", {"normalize": "perhaps"}),
        ("fisher", {"floor": 0}),
        ("lora", {"alpha": "1,x"}),
        ("lora", {"rank": -1}),
        ("slerp", {"t": 2}),
    ],
)
def test_an_option_that_is_none_is_named(name, given):
    with pytest.raises(InvalidCommandError, match=next(iter(given))):
        strategy_named(name).configured(given)


def test_options_are_read_from_what_is_typed():
    assert strategy_named("fisher").configured({"normalize": "yes"}) == {"floor": 1e-6, "normalize": True}
    assert strategy_named("lora").configured({"alpha": "8,16"}) == {"rank": 0, "alpha": (8.0, 16.0)}
    assert strategy_named("dare").configured({"seed": "7"})["seed"] == 7


def test_every_strategy_is_on_its_page_and_in_the_help():
    page = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
    for strategy in STRATEGIES:
        assert f"`{strategy.name}`" in page
        assert strategy.name in merge_command.help
        for option in strategy.options:
            assert f"`{option.name}`" in page
