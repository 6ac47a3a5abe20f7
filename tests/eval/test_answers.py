"""Reading answers: exact ones are exact, nothing is guessed, metrics against independent implementations."""

from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import precision_recall_fscore_support

from fvlm_core.eval.answers import anls, levenshtein, parse_choice, parse_yes_no, same_number, score, vqa_accuracy, vqa_plain
from fvlm_core.eval.benchmark_result import yes_no_scores

CHOICES = ["a cat", "A dog.", "U.S. flag", "none of the above"]
short = st.text("abc d", max_size=7)


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C) U.S. flag", 2),
        ("D) none", 3),
        ("The best answer is: B", 1),
        ("the answer is (c).", 2),
        ("Option D", 3),
        ("OPTION: b", 1),
        ("The answer is a dog", None),
        ("Answer: a cat, I think", None),
        ("a dog", 1),
        ("U.S. flag", 2),
        ("A dog runs over the grass", None),
        ("U", None),
        ("E", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_a_choice_is_named_by_its_letter_or_its_words(said: str, place: int | None):
    assert parse_choice(said, CHOICES) == place


@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=6, unique=True), st.data())
def test_a_letter_in_any_usual_form_is_read(choices: list[str], data: st.DataObject):
    place = data.draw(st.integers(0, len(choices) - 1))
    form = data.draw(st.sampled_from(["({})", "{}.", "{})", "Answer: {}", "The correct option is {}."]))
    found = parse_choice(form.format("ABCDEF"[place]), [f"option text {number} {choice}" for number, choice in enumerate(choices)])
    assert found == place


def test_a_longer_answer_is_not_the_answer():
    for kind in ("exact", "number", "vqa", "anls"):
        assert score("5285123", ["528"], kind, {}) == 0
        assert score("528", ["528"] * 10, kind, {}) == 1


@pytest.mark.parametrize(
    ("said", "answer", "precision", "right"),
    [
        ("The answer is 1,234.", "1234", None, True),
        ("12", "1", None, False),
        ("It is 0.333", "0.33", "2", True),
        ("It is 0.34", "0.33", "2", False),
        ("3 of them, so 7", "7", "0", True),
        ("-2", "2", None, False),
        ("5%", "5", None, True),
        ("seven", "7", None, False),
        ("Blue", "blue", None, True),
        ("light blue", "blue", None, False),
        ("[1, 2]", "[1, 2]", None, True),
    ],
)
def test_numbers_are_compared_at_the_precision_asked_for(said: str, answer: str, precision: str | None, right: bool):
    assert same_number(said, answer, precision) == right


def test_yes_and_no():
    assert [parse_yes_no(said) for said in ("Yes, it is", "no.", " NO", "not really", "")] == [0, 1, 1, None, None]


@given(short, short)
def test_levenshtein_is_the_recursive_definition(a: str, b: str):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert levenshtein(a, b) == distance(len(a), len(b))


def test_anls_is_the_best_similarity_and_none_below_a_half():
    assert anls("January 8, 1993", ["january  8, 1993", "1/8/93"]) == 1
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("kitten", ["dog"]) == 0
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("", ["a"]) == 0


@given(st.lists(st.sampled_from(["nokia", "toshiba", "sony"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_subsets_of_nine(answers: list[str]):
    """Against the definition: for each of the ten subsets of nine annotators, min(1, agreeing / 3)."""
    subsets = [answers[:left_out] + answers[left_out + 1 :] for left_out in range(10)]
    expected = np.mean([min(1, subset.count("nokia") / 3) for subset in subsets])
    assert vqa_accuracy("Nokia", answers) == pytest.approx(expected)


def test_vqa_accuracy_by_the_number_that_agree():
    """The published shortcut for ten annotators: 0, 0.3, 0.6, 0.9, 1."""
    found = [vqa_accuracy("yes", ["yes"] * n + ["no"] * (10 - n)) for n in range(5)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # by the rules of the VQA evaluation (visualqa.org/evaluation.html), worked out by hand
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("a red, white & blue flag", "red white & blue flag"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("john's car", "john 's car"),
        ("none", "0"),
        ("T-shirt", "t shirt"),
        ("yes/no", "yes no"),
        ("stop!", "stop"),
        ("5:30 p.m.", "5:30 pm"),
    ],
)
def test_answers_are_compared_as_the_vqa_evaluation_compares_them(text: str, expected: str):
    assert vqa_plain(text) == expected


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_precision_recall_and_f1_are_scikit_learns(pairs: list[tuple[int, int]]):
    predicted, gold = [a for a, _ in pairs], [b for _, b in pairs]
    precision, recall, f1, _ = precision_recall_fscore_support(gold, predicted, pos_label=0, average="binary", zero_division=0)
    found = yes_no_scores(predicted, gold, len(pairs))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((precision, recall, f1), abs=1e-6)
    assert found["yes_share"] == pytest.approx(predicted.count(0) / len(pairs), abs=1e-6), "of the predictions"
