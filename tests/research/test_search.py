"""Optuna behind a search: minimises, remembers, prunes."""

import dataclasses

import pytest

from switchx.errors import UserError
from switchx.research.search import Proposals
from switchx.research.sweep import Search, Sweep

VALUES = {
    "LEARNING_RATE": ("log_uniform", 0.1, 10.0),
    "NUM_EXPERTS": ("integer", 2, 5),
    "router": ("choice", ["switch", "top_k"]),
    "DROPOUT_RATE": ("uniform", 0.0, 0.5),
}


def sweep(tmp_path, **options):
    return Sweep(base=[], search=Search(VALUES, **options), model_dir=str(tmp_path / "study"))


def ask(proposals):
    asked = proposals.ask()
    assert asked is not None
    return asked


def test_proposals_lie_in_their_spaces_and_end(tmp_path):
    proposals = Proposals(sweep(tmp_path, num_arms=6, sampler="random"))
    found = []
    for _ in range(6):
        number, settings = ask(proposals)
        assert list(settings) == list(VALUES)
        proposals.tell(number, settings["LEARNING_RATE"])
        found.append(settings)
    assert proposals.ask() is None
    assert all(0.1 <= each["LEARNING_RATE"] <= 10 for each in found)
    assert {each["NUM_EXPERTS"] for each in found} <= {2, 3, 4, 5}
    assert len({each["LEARNING_RATE"] for each in found}) == 6


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_every_sampler_goes_on_from_results(tmp_path, sampler):
    values = {"A": ("uniform", 0.0, 1.0), "B": ("log_uniform", 0.1, 1.0)}
    search = Search(values, num_arms=5, sampler=sampler)
    proposals = Proposals(Sweep(base=[], search=search, model_dir=str(tmp_path)))
    found = []
    for _ in range(5):
        number, settings = ask(proposals)
        proposals.tell(number, settings["A"])
        found.append(settings["A"])
    assert len(set(found)) == 5


def test_what_was_under_way_is_proposed_again_and_nothing_twice(tmp_path):
    first = Proposals(sweep(tmp_path, num_arms=3))
    number, done = ask(first)
    first.tell(number, 1.0)
    _, left = ask(first)
    del first  # as a kill -9 would
    second = Proposals(sweep(tmp_path, num_arms=3))
    number, again = ask(second)
    assert again == left
    second.tell(number, None)
    number, new = ask(second)
    assert new not in (done, left)
    second.tell(number, 2.0)
    assert second.ask() is None
    assert Proposals(sweep(tmp_path, num_arms=3)).ask() is None


def test_an_arm_far_behind_the_median_is_pruned(tmp_path):
    proposals = Proposals(sweep(tmp_path, num_arms=9))
    for value in (1.0, 1.1, 1.2, 1.3, 1.4):
        number, _ = ask(proposals)
        assert not proposals.report(number, 10, value)
        proposals.tell(number, value)
    number, _ = ask(proposals)
    assert not proposals.report(number, 10, 1.05)
    number, _ = ask(proposals)
    assert proposals.report(number, 10, 5.0)
    unpruned = Proposals(sweep(tmp_path / "other", num_arms=9, prune=False))
    number, _ = ask(unpruned)
    assert not unpruned.report(number, 10, 1e9)


def test_a_storage_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="Search.storage cannot be opened"):
        Proposals(sweep(tmp_path, storage="nosuch://x"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric": "accuracy"}, "'accuracy': the search in .* is by 'cross_entropy'"),
        ({"direction": "highest"}, "has the other one"),
    ],
)
def test_a_search_by_something_else_is_refused(tmp_path, changed, message):
    before = sweep(tmp_path)
    Proposals(before)
    with pytest.raises(UserError, match=message):
        Proposals(dataclasses.replace(before, **changed))


def test_other_choices_than_before_are_refused(tmp_path):
    before = Sweep(base=[], search=Search({"A": ("choice", [1, 2])}), model_dir=str(tmp_path))
    ask(Proposals(before))
    after = dataclasses.replace(before, search=Search({"A": ("choice", [1, 2, 3])}))
    with pytest.raises(UserError, match="Search.values differ"):
        proposals = Proposals(after)
        while proposals.ask():
            pass
