"""The method, exactly: what each policy may and must do to the active set."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from study.config.models import POLICY_PARAMETERS
from study.training.policies import POLICIES, Dynamic, Policy, decide, exchange, make_policy
from study.training.rng import generator

unhurried = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no fault of the code."""


def policy_of(name: str, set_up: dict[str, Any]) -> Policy:
    """The policy with those of the parameters that mean something to it."""
    keys = ("total", "seed", *POLICY_PARAMETERS[name])
    return make_policy(name, **{key: set_up[key] for key in keys if key in set_up})


def test_every_policy_of_the_config_exists() -> None:
    assert POLICY_PARAMETERS.keys() == POLICIES.keys()


@st.composite
def set_ups(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 300))
    return {
        "total": total,
        "alpha": draw(st.integers(1, total)),
        "seed": draw(st.integers(0, 2**31)),
        "beta": draw(st.floats(0.01, 1.0)),
        "delta": draw(st.sampled_from([0.0, 0.01, 0.1])),
        "gamma": draw(st.sampled_from([1.0, 0.97, 0.5])),
        "decay": draw(st.sampled_from(["type2", "both"])),
    }


accuracies = st.lists(st.integers(0, 100).map(lambda correct: correct / 100), min_size=1, max_size=25)


def members(policy: Policy) -> set[int]:
    return set(policy.active.tolist())


@pytest.mark.parametrize("name", POLICIES)
@given(set_up=set_ups(), curve=accuracies)
@unhurried(max_examples=60)
def test_active_set_always_has_alpha_images_none_twice(name: str, set_up: dict[str, Any], curve: list[float]) -> None:
    policy = policy_of(name, set_up)
    size = set_up["total"] if name in ("full", "infobatch", "el2n") else set_up["alpha"]
    for epoch, accuracy in enumerate(curve, 1):
        assert len(policy.active) == len(members(policy)) == size
        assert members(policy) <= set(range(set_up["total"]))
        done = policy.update(epoch, accuracy)
        if name == "infobatch" or (name == "el2n" and done.kind == "soft"):
            size = set_up["total"] - done.k
    assert len(policy.active) == len(members(policy)) == size


def test_el2n_keeps_the_images_with_the_longest_errors() -> None:
    policy = make_policy("el2n", 6, 0, alpha=2, score_epochs=2)
    for epoch, errors in enumerate(([0.9, 0.1, 0.1, 0.1, 0.1, 0.8], [0.1, 0.9, 0.2, 0.7, 0.3, 0.1]), 1):
        for index in (torch.tensor([5, 3, 1]), torch.tensor([0, 2, 4])):
            policy.observe(index, torch.tensor(errors)[index])
        done = policy.update(epoch, 0.5)
    assert policy.active.tolist() == [1, 3]
    assert (done.kind, done.k) == ("soft", 4)
    assert policy.update(3, 0.4).kind == "keep"


@given(set_up=set_ups(), curve=accuracies)
@unhurried(max_examples=200)
def test_dynamic_follows_section_3(set_up: dict[str, Any], curve: list[float]) -> None:
    """Against the method's text, with the state kept here anew: branch, base, k, beta."""
    policy = policy_of("dynamic", set_up)
    alpha, outside = set_up["alpha"], set_up["total"] - set_up["alpha"]
    previous, best, best_set = float("-inf"), float("-inf"), members(policy)
    for epoch, accuracy in enumerate(curve, 1):
        before = members(policy)
        if accuracy > best:
            best, best_set = accuracy, before
        done = policy.update(epoch, accuracy)
        correct_gain = round(100 * (accuracy - previous)) if previous >= 0 else 10**6
        if correct_gain <= 0:
            kind, base = "type1", before
        elif correct_gain <= round(100 * set_up["delta"]):
            kind, base = "type2", best_set
        else:
            kind, base = "keep", before
        assert done.kind == kind
        if kind == "keep":
            assert members(policy) == before
            assert (done.k, done.beta) == (0, 0.0)
        else:
            decays = kind == "type2" or set_up["decay"] == "both"
            beta = set_up["beta"] * set_up["gamma"] ** epoch if decays else set_up["beta"]
            assert done.beta == beta
            assert done.k == min(round(beta * alpha), outside)
            assert len(members(policy) & base) == alpha - done.k
            assert len(members(policy) - base) == done.k
        previous = accuracy


@pytest.mark.parametrize(
    ("accuracy", "kind"),
    [
        (0.49, "type1"),
        (0.50, "type1"),  # equal is no gain
        (0.505, "type2"),
        (0.51, "type2"),  # 0.51 - 0.50 is 0.010000000000000009 in floats, and still a gain of just delta
        (0.5102, "keep"),
    ],
)
def test_branches_at_their_edges(accuracy: float, kind: str) -> None:
    assert decide(accuracy, 0.50, 0.01) == kind


def test_first_epoch_counts_as_an_improvement() -> None:
    policy = make_policy("dynamic", 100, 0, alpha=10, delta=1.0)
    assert policy.update(1, 0.0).kind == "keep"


def test_type_2_starts_from_the_best_set_even_after_others() -> None:
    policy = make_policy("dynamic", 1000, 0, alpha=100, beta=0.5, delta=0.05, gamma=1.0)
    best = members(policy)
    policy.update(1, 0.80)
    for epoch, accuracy in enumerate([0.30, 0.20, 0.10], 2):  # three type I: far from the best set
        policy.update(epoch, accuracy)
    assert len(members(policy) & best) < 50
    assert policy.update(5, 0.12).kind == "type2"
    assert len(members(policy) & best) == 50


def test_ties_keep_the_earlier_best_set() -> None:
    policy = make_policy("dynamic", 100, 0, alpha=10)
    assert isinstance(policy, Dynamic)
    first = policy.active
    policy.update(1, 0.5)
    policy.update(2, 0.4)
    policy.update(3, 0.5)
    assert torch.equal(policy.best_active, first)


def test_k_is_capped_by_what_is_left_outside() -> None:
    policy = make_policy("dynamic", 12, 0, alpha=10, beta=1.0)
    policy.update(1, 0.5)
    assert policy.update(2, 0.5).k == 2


def test_beta_decays_with_the_epoch_only_where_equation_3_says() -> None:
    curve = [0.5, 0.505, 0.4, 0.405]
    for decay, betas in (
        ("type2", [0, 0.5 * 0.9**2, 0.5, 0.5 * 0.9**4]),
        ("both", [0, 0.405, 0.5 * 0.9**3, 0.5 * 0.9**4]),
    ):
        policy = make_policy("dynamic", 100, 0, alpha=50, beta=0.5, gamma=0.9, decay=decay)
        assert [policy.update(n, p).beta for n, p in enumerate(curve, 1)] == pytest.approx(betas)


@pytest.mark.parametrize("name", POLICIES)
@given(set_up=set_ups(), before=accuracies, after=accuracies)
@unhurried(max_examples=40)
def test_a_restored_policy_draws_the_same(
    name: str, set_up: dict[str, Any], before: list[float], after: list[float]
) -> None:
    original = policy_of(name, set_up)
    losses = torch.linspace(0, 3, set_up["total"])
    for epoch, accuracy in enumerate(before, 1):
        original.observe(original.active, losses[original.active])
        original.update(epoch, accuracy)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    # Another seed: everything must come from the state.
    restored = policy_of(name, set_up | {"seed": set_up["seed"] + 1})
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for epoch, accuracy in enumerate(after, len(before) + 1):
        assert original.update(epoch, accuracy) == restored.update(epoch, accuracy)
        assert torch.equal(original.active, restored.active)
        assert (original.weights is None) == (restored.weights is None)
        if original.weights is not None and restored.weights is not None:
            assert torch.equal(original.weights, restored.weights)


@given(total=st.integers(2, 300), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
@unhurried(max_examples=60)
def test_infobatch_leaves_out_a_part_of_the_easy_images_and_weighs_the_rest(
    total: int, ratio: float, seed: int
) -> None:
    policy = make_policy("infobatch", total, seed, ratio=ratio, anneal=0.8)
    losses = torch.rand(total, generator=generator(seed, "test"))
    assert members(policy) == set(range(total))
    policy.observe(torch.arange(total), losses)
    easy = set((losses < losses.mean()).nonzero().squeeze(1).tolist())
    done = policy.update(1, 0.5, 0.5)
    left_out = set(range(total)) - members(policy)
    assert (done.kind, done.k) == ("soft", round(ratio * len(easy)))
    assert left_out <= easy
    assert len(left_out) == done.k
    assert policy.weights is not None
    for image, weight in zip(policy.active.tolist(), policy.weights.tolist(), strict=True):
        assert weight == pytest.approx(1 / (1 - ratio) if image in easy else 1.0)
    assert policy.update(2, 0.5, 0.8).kind == "keep"  # the end of the run: everything, unweighted
    assert members(policy) == set(range(total))
    assert policy.weights.tolist() == [1.0] * total


def test_infobatch_keeps_the_expected_gradient() -> None:
    """Mean over many epochs of the sum of weights, for every image: 1, as if nothing were left out."""
    policy, rounds = make_policy("infobatch", 40, 0, ratio=0.5), 4000
    policy.observe(torch.arange(40), torch.linspace(0, 1, 40))
    weight = torch.zeros(40)
    for epoch in range(1, rounds + 1):
        policy.update(epoch, 0.5)
        assert policy.weights is not None
        weight[policy.active] += policy.weights
    assert torch.allclose(weight / rounds, torch.ones(40), atol=0.08)  # 5 standard deviations


def test_draws_are_uniform() -> None:
    """Every image outside is added, and every image inside dropped, equally often (chi-squared, 1e-4)."""
    draws, base = generator(0, "policy"), torch.arange(20)
    added, dropped, rounds = torch.zeros(30), torch.zeros(20), 3000
    for _ in range(rounds):
        after = exchange(base, 50, 5, draws)
        added += torch.bincount(after[after >= 20] - 20, minlength=30)
        dropped += 1 - torch.bincount(after[after < 20], minlength=20)
    for counts, expected, limit in ((added, rounds * 5 / 30, 66.2), (dropped, rounds * 5 / 20, 50.8)):
        assert float(((counts - expected) ** 2 / expected).sum()) < limit


def test_exchange_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot exchange 3 of 8"):
        exchange(torch.arange(8), 10, 3, generator(0, "policy"))


def test_same_seed_same_first_subset_whatever_the_policy() -> None:
    subsets = [make_policy(name, 1000, 7, alpha=100).active for name in ("static", "fresh", "dynamic")]
    assert torch.equal(subsets[0], subsets[1])
    assert torch.equal(subsets[0], subsets[2])
    assert not torch.equal(subsets[0], make_policy("static", 1000, 8, alpha=100).active)


def test_static_never_changes_and_fresh_always_does() -> None:
    static, fresh = make_policy("static", 1000, 0, alpha=100), make_policy("fresh", 1000, 0, alpha=100)
    start = members(static)
    overlaps = []
    for epoch in range(1, 50):
        static.update(epoch, 0.1)
        before = members(fresh)
        done = fresh.update(epoch, 0.1)
        overlaps.append(len(members(fresh) & before))
        assert (done.kind, done.k) == ("fresh", 100 - overlaps[-1])
    assert members(static) == start
    assert 8 < sum(overlaps) / len(overlaps) < 12  # a tenth of a fresh hundred was there before


@pytest.mark.parametrize("alpha", [0, 101])
def test_alpha_outside_the_data_is_refused(alpha: int) -> None:
    with pytest.raises(ValueError, match="alpha must be from 1 to the 100 training images"):
        make_policy("dynamic", 100, 0, alpha=alpha)
