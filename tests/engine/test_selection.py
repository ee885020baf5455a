import numpy as np
import pytest

from fewshot_engine.errors import ConfigError, DataError, EmptyClassError
from fewshot_engine.inference import fit
from fewshot_engine.prototypes import Rule
from fewshot_engine.selection import (
    PRIOR_BATCH_METHOD,
    Candidate,
    _walk,
    candidates,
    choose_batch_method,
    choose_rule,
)


def photos(n_way, shot, *, dim=32, noise=1.0, seed=0):
    directions = np.random.default_rng(99).normal(size=(n_way, dim))
    labels = np.repeat(np.arange(n_way), shot)
    return directions[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), dim)), labels


def test_a_better_view_is_chosen_beyond_noise_and_the_sentence_has_its_numbers():
    clear, labels = photos(5, 6, noise=0.5)
    blurred, _ = photos(5, 6, noise=4.0)
    choice = choose_rule([Candidate("whole", blurred), Candidate("crop", clear)], labels, 5)
    assert choice.candidate.name == "crop"
    assert choice.accuracies[1] == pytest.approx(fit(clear, labels, 5).expected_accuracy)
    assert "crop recognises 100 % of 30 examples" in choice.reason and "whole" in choice.reason


def test_the_simpler_stays_where_the_gain_is_noise():
    usual, labels = photos(5, 4, noise=2.4)
    other, _ = photos(5, 4, noise=2.4, seed=1)
    for pair in ((usual, other), (other, usual)):
        choice = choose_rule([Candidate("first", pair[0]), Candidate("second", pair[1])], labels, 5)
        assert choice.candidate.name == "first"
        assert "first recognises" in choice.reason


def test_noise_by_hand():
    first = np.array([1.0, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    one_more = first.copy()
    one_more[1] = 1  # a gain of 0.1 with a standard error of 0.1
    three_more = first.copy()
    three_more[[1, 3, 5]] = 1  # 0.3 with 0.153
    assert _walk(np.stack([first, one_more])) == 0
    assert _walk(np.stack([first, three_more])) == 1
    assert _walk(np.stack([first, three_more, three_more])) == 1
    assert _walk(np.stack([first, first])) == 0


def test_labels_of_two_kinds_get_several_prototypes():
    kinds, of_kind = photos(8, 10, noise=0.6)
    labels = of_kind // 2  # each label is of two kinds
    among = candidates({"whole": kinds}, labels)
    assert [one.name for one in among][-2:] == ["2 prototypes a label, whole", "3 prototypes a label, whole"]
    several = choose_rule([Candidate("means", kinds, Rule("cosine")), *among[-2:]], labels, 4)
    assert several.accuracies[1] >= several.accuracies[0]


def test_candidates_are_every_rule_in_every_view_the_usual_first():
    support, labels = photos(3, 2)
    among = candidates({"whole": support, "crop": 2 * support}, labels, centres={"crop": support[0]})
    assert [one.name for one in among[:3]] == ["ridge, whole", "ridge, crop", "class means, whole"]
    assert among[0].rule == Rule() and among[0].centre is None
    np.testing.assert_array_equal(among[1].centre, support[0])
    assert len(among) == 8  # too few examples for several prototypes
    assert {one.rule.metric for one in among} == {"ridge", "cosine", "euclidean"}


def test_with_one_example_a_label_what_was_measured_elsewhere_decides():
    support, labels = photos(4, 1)
    choice = choose_rule(candidates({"whole": support}, labels), labels, 4)
    assert (choice.candidate.name, choice.accuracies) == ("ridge, whole", ())
    assert "one example a label" in choice.reason
    assert "one label" in choose_rule([Candidate("a", support)], np.zeros(4, dtype=int), 1).reason
    batch = choose_batch_method(support, labels, 4)
    assert (batch.method, batch.gain) == (PRIOR_BATCH_METHOD, None)


def test_a_batch_is_answered_together_where_that_helps():
    embeddings, labels = photos(8, 4, dim=128, noise=2.2)
    choice = choose_batch_method(embeddings, labels, 8)
    assert choice.method == "ridge"
    assert choice.gain > 0.03
    assert "points" in choice.reason


def test_a_batch_is_not_answered_together_where_it_does_not_help():
    easy, labels = photos(4, 6, noise=0.1)
    choice = choose_batch_method(easy, labels, 4, draws=10)
    assert (choice.method, choice.gain) == (None, 0)
    noise = np.random.default_rng(0).normal(size=(24, 32))  # nothing in common within a label
    assert choose_batch_method(noise, labels, 4).method is None


def test_the_same_seed_draws_the_same_batches():
    embeddings, labels = photos(4, 8, noise=1.8)
    first, same = (choose_batch_method(embeddings, labels, 4, draws=10, seed=3) for _ in range(2))
    assert first == same


def test_mistakes_are_named():
    support, labels = photos(2, 2)
    with pytest.raises(ConfigError, match="no candidates"):
        choose_rule([], labels, 2)
    with pytest.raises(ConfigError, match="no embeddings"):
        candidates({}, labels)
    with pytest.raises(EmptyClassError):
        choose_rule([Candidate("a", support)], labels, 3)
    with pytest.raises(DataError, match="no labels"):
        choose_batch_method(support[:0], labels[:0], 0)
    for options in ({"methods": ()}, {"draws": 1}, {"alpha": 0}):
        with pytest.raises(ConfigError):
            choose_batch_method(support, labels, 2, **options)
