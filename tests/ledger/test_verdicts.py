"""Verdicts against numbers worked out by hand."""

import pytest

from lavender_min.ledger.verdicts import (
    FAILS,
    HOLDS,
    UNCLEAR,
    Contrast,
    Verdict,
    judge,
    rank_correlation,
    together,
    verdict,
)

A, B = "x/answers.all", "x/mse.own"


def runs(*values, name=A):
    return [{name: value} for value in values]


def test_an_interval_is_held_against_nothing_and_against_the_margin():
    # Mean 3, standard deviation 1: half the interval is t(2) · 1 / √3 = 4.303 / 1.732 = 2.484.
    found = verdict([2, 3, 4], 0)
    assert found.effect.mean == 3 and found.effect.half == pytest.approx(2.4843, abs=1e-3)
    assert found.word == HOLDS
    # Up to 5.484: below a margin of 5.5 it is too small to matter, at 5.4 it may be large enough.
    assert verdict([2, 3, 4], 5.5).word == FAILS and verdict([2, 3, 4], 5.4).word == HOLDS
    # From −1.484 to 3.484.
    assert [verdict([0, 1, 2], margin).word for margin in (0, 3.4, 3.5)] == [UNCLEAR, UNCLEAR, FAILS]
    assert verdict([-4, -3, -2], 0).word == FAILS
    assert verdict([7.0], 0).word == UNCLEAR and verdict([7.0], 0).effect.half is None


def test_a_difference_is_taken_seed_by_seed_between_means_of_arms():
    found = {"a": runs(0.5, 0.7), "b": runs(0.3, 0.5), "c": runs(0.2, 0.2)}
    both = judge(Contrast("", ["a", "b"], ["c"], [A]), found)
    # Seeds: (0.5 + 0.3) / 2 − 0.2 = 0.2 and 0.4.
    assert both.effect.mean == pytest.approx(0.3)
    # Pairs that differ by the same each time leave no doubt, however far seeds lie apart.
    paired = judge(Contrast("", ["a"], ["b"], [A]), found)
    assert paired.word == HOLDS and paired.effect.half == pytest.approx(0, abs=1e-9)
    assert judge(Contrast("", ["a"], ["b"], [A], sign=-1), found).word == FAILS
    with pytest.raises(KeyError):
        judge(Contrast("", ["a"], ["missing"], [A]), found)


def test_several_measures_are_averaged():
    found = {"a": [{A: 1.0, B: 3.0}] * 2, "b": [{A: 0.0, B: 1.0}] * 2}
    assert judge(Contrast("", ["a"], ["b"], [A, B]), found).effect.mean == 1.5


def test_spread_compares_distances_from_the_own_mean():
    found = {"wide": runs(1, 5, 3), "narrow": runs(9, 11, 10)}
    # 2, 2, 0 against 1, 1, 0.
    effect = judge(Contrast("", ["wide"], ["narrow"], [A], of="spread"), found).effect
    assert effect.mean == pytest.approx(2 / 3)


def test_correlation_is_over_arms_and_measures_of_one_seed():
    def run(*pairs):
        return {
            f"c{i}/{m}": v
            for i, pair in enumerate(pairs)
            for m, v in zip(("mse.own", "answers.all"), pair, strict=True)
        }

    found = {"a": [run((3, 1), (2, 2)), run((1, 1), (2, 2))], "b": [run((1, 3), (0, 4)), run((3, 3), (4, 4))]}
    measures = ["c0/mse.own", "c1/mse.own", "c0/answers.all", "c1/answers.all"]
    # Seed 0 falls (−1), seed 1 rises (+1).
    assert judge(Contrast("", ["a", "b"], [], measures, of="correlation"), found).effect.mean == 0
    first = {arm: of[:1] * 3 for arm, of in found.items()}
    assert judge(Contrast("", ["a", "b"], [], measures, sign=-1, margin=0.3, of="correlation"), first).word == HOLDS
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5).
    assert rank_correlation([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert rank_correlation([5, 5], [1, 2]) == 0


def test_a_claim_holds_if_all_holds_and_fails_if_one_does():
    holds, fails, unclear = (Verdict(verdict([1.0], 0).effect, word) for word in (HOLDS, FAILS, UNCLEAR))
    assert together([holds, holds]) == HOLDS
    assert together([holds, fails, unclear]) == FAILS
    assert together([holds, unclear]) == UNCLEAR and together([]) == UNCLEAR
