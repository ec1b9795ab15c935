import pytest

from switchx.report.statistics import Estimate, estimate, paired_differences, pareto_front


def test_mean_and_interval_by_hand():
    # Of 2, 3, 7: mean 4, s² = (4 + 1 + 9) / 2 = 7, t(0.975; 2) = 4.302653, / √3.
    found = estimate([2.0, 3.0, 7.0])
    assert found is not None and found.low is not None and found.high is not None
    assert (found.mean, found.n) == (4.0, 3)
    half = 4.302653 * 7**0.5 / 3**0.5
    assert found.low == pytest.approx(4 - half, rel=1e-6)
    assert found.high == pytest.approx(4 + half, rel=1e-6)


def test_one_number_has_no_interval_and_none_no_mean():
    assert estimate([2.5]) == Estimate(2.5, None, None, 1)
    assert estimate([]) is None


def test_only_what_both_have_is_paired():
    found = paired_differences({0: 5.0, 1: 7.0, 3: 1.0}, {0: 4.5, 1: 8.0, 2: 100.0})
    assert found == {0: 0.5, 1: -1.0}


def test_an_interval_of_pairs_is_narrower_than_that_of_seeds_far_apart():
    # The seeds differ by 10, the settings by about 1: only the pairs tell them apart.
    values, base = {0: 11.1, 1: 21.0, 2: 30.9}, {0: 10.0, 1: 20.0, 2: 30.0}
    pairs, alone = (
        estimate(list(paired_differences(values, base).values())),
        estimate([*values.values()]),
    )
    assert pairs and alone and pairs.low is not None and alone.low is not None
    assert pairs.mean == pytest.approx(1.0)
    assert pairs.low > 0 and alone.low < base[1]


@pytest.mark.parametrize(("best", "expected"), [("lowest", [3, 0, 2]), ("highest", [3, 1])])
def test_pareto_front(best, expected):
    points = [(2.0, 5.0), (3.0, 9.0), (4.0, 4.0), (1.0, 6.0), (5.0, 4.5)]
    assert pareto_front(points, best=best) == expected


def test_pareto_front_is_what_a_slow_loop_finds():
    points = [(float(x * 7 % 5), float(x * 11 % 7)) for x in range(20)]

    def beaten(point):
        return any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
        )

    expected = {i for i, point in enumerate(points) if not beaten(point)}
    assert set(pareto_front(points, best="lowest")) == expected
