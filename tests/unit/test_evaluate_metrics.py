"""Metrics of answers: equal to the libraries' own figures on the same predictions, and to ones made by hand."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import DataError
from launcher.evaluate.answers import as_jsonl
from launcher.evaluate.metrics import correct, score
from launcher.evaluate.metrics.classes import NONE_OF_THEM, class_figures
from launcher.evaluate.metrics.exact import number_of

WORDS = ("river", "stone", "clouds", "running", "amber", "lights", "north", "gardens")


def drawn(count: int, *words: str, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(words) for _ in range(count)]


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


def test_words_are_equal_however_they_are_spaced() -> None:
    answers = ["yes", " yes\n", "a  b", "Yes", "yes.", ""]
    references = ["yes", "yes", "a b", "yes", "yes", "yes"]
    assert score(["exact_match"], answers, references) == {"exact_match": 0.5}
    assert correct(["exact_match"], "72.0", "72") is False
    assert correct(["rouge", "numeric"], "it is $72.0", "so #### 72") is True


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -12 apples in 3 days", "-12"),
        ("first #### 6, no: #### 7", "7"),
        ("#### as said, 7", "7"),
        ("#### nothing after it, but 5 before: 4", "5"),
        ("5 and then #### nothing", "5"),
        ("It costs $1,234,567.50.", "1234567.50"),
        ("about 50%", "50"),
        ("it fell to -3", "-3"),
        ("it fell to −3.5 (from 2)", "2"),
        ("-$3", "-3"),
        ("10-5=5", "5"),
        ("between 3-4", "4"),
        ("a list: 1,2,3", "3"),
        ("12,34", "34"),
        (".5", "0.5"),
        ("the end is 7.", "7"),
        ("²", None),
        ("no number - none, $ %", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_comes_to(text: str, number: str | None) -> None:
    assert number_of(text) == (Decimal(number) if number is not None else None)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3), st.text(alphabet="ab \n", max_size=8))
def test_a_number_is_found_as_it_is_written(value: int, decimals: int, words: str) -> None:
    written = f"{Decimal(value) / 10**decimals:,.{decimals}f}"
    for text in (f"{words} {written}", f"3 {words} #### {written}", f"${written}", f"= {written} %"):
        assert number_of(text) == Decimal(value) / 10**decimals, text


def test_numbers_count_and_not_how_they_are_said() -> None:
    references = ["so\n#### 72", "#### 1,000", "#### 3", "#### -4"]
    answers = ["I think it is 72.00 dollars", "1000", "three", "4"]
    assert score(["numeric", "exact_match"], answers, references) == {"numeric": 0.5, "exact_match": 0.0}


def test_a_reference_without_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="numeric: there is no number in the reference 'Paris'") as caught:
        score(["numeric"], ["1", "2"], ["1", "Paris"])
    assert "leave such rows out" in str(caught.value.hint)


def test_classes_by_hand() -> None:
    references = ["cat"] * 4 + ["dog"] * 2
    answers = ["cat", "cat ", "dog", "a cat", "dog", "cat"]
    found = score(["classes"], answers, references)["classes"]
    assert found["of"] == {
        "cat": {"precision": pytest.approx(2 / 3), "recall": 0.5, "f1": pytest.approx(4 / 7), "rows": 4},
        "dog": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2},
    }
    assert found["accuracy"] == 0.5
    assert found["precision_macro"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert found["recall_macro"] == 0.5
    assert found["f1_macro"] == pytest.approx((4 / 7 + 0.5) / 2)


def test_classes_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score

    names = ("negative", "neutral", "positive")
    references, answers = drawn(300, *names), drawn(300, *names, "I do not know", seed=1)
    found = score(["classes"], answers, references)["classes"]
    said = [answer if answer in names else NONE_OF_THEM for answer in answers]
    assert said.count(NONE_OF_THEM) > 50
    assert found["accuracy"] == accuracy_score(references, said)
    means: dict[str, Any] = {"labels": names, "average": "macro", "zero_division": 0}
    assert found["f1_macro"] == f1_score(references, said, **means)
    assert found["precision_macro"] == precision_score(references, said, **means)
    assert found["recall_macro"] == recall_score(references, said, **means)
    report = classification_report(references, said, labels=names, output_dict=True, zero_division=0)
    for name in names:
        theirs = report[name]
        ours = found["of"][name]
        assert [ours["precision"], ours["recall"], ours["f1"], ours["rows"]] == [
            theirs["precision"],
            theirs["recall"],
            theirs["f1-score"],
            theirs["support"],
        ]


def test_a_heads_classes_are_taken_to_the_letter() -> None:
    """Two blanks in a name once made all its rows wrong, and left them out of the means."""
    for names in (("very  good", "bad"), (" good", "good"), ("a\nb", "a b")):
        figures = class_figures(names, names, names)
        assert [figures["accuracy"], figures["f1_macro"]] == [1, 1]
        assert [of["rows"] for of in figures["of"].values()] == [1, 1]


def test_a_line_of_answers_is_a_line_to_every_reader() -> None:
    said = {"text": "one\x85two\u2028three\u2029four\x0bfive\nsix \ud83d é 😀"}
    written = as_jsonl([said, said]).decode()
    assert [json.loads(line) for line in written.splitlines()] == [said, said]
    assert "é 😀" in written


def test_what_is_never_said_or_never_right_counts_as_nothing() -> None:
    found = score(["classes"], ["maybe", "maybe"], ["no", "yes"])["classes"]
    assert (found["accuracy"], found["f1_macro"]) == (0.0, 0.0)
    assert found["of"]["yes"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1}


def test_different_answers_to_every_row_are_no_classes() -> None:
    many = [str(i) for i in range(201)]
    with pytest.raises(DataError, match="classes: 201 different references are no classes") as caught:
        score(["classes"], many, many)
    assert "exact_match" in str(caught.value.hint)


def test_rouge_is_rouge_scores() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = sentences(40, 1), sentences(40, 2)
    found = score(["rouge"], answers, references)["rouge"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    theirs = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    for ours, name in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert found[ours] == pytest.approx(sum(each[name].fmeasure for each in theirs) / 40, rel=1e-12)
    by_hand = score(["rouge"], ["the garden runs"], ["the gardens are running"])["rouge"]
    assert by_hand["rouge_1"] == pytest.approx(2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4))
    assert by_hand["rouge_2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert score(["rouge"], ["für 3 €"], ["für 3 €"])["rouge"]["rouge_l"] == 1
    for foreign in ("東京", "в 2024 году", "—"):  # of which rouge-score would compare nothing, or the year alone
        with pytest.raises(DataError, match=f"reads Latin letters and digits, and no others: '{foreign}'") as caught:
            score(["rouge"], [foreign, "b"], [foreign, "b"])
        assert "bleu" in str(caught.value.hint)


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    answers, references = sentences(40, 1), sentences(40, 1)
    answers[::2] = sentences(20, 3)
    found = score(["bleu"], answers, references)["bleu"]
    assert found == sacrebleu.corpus_bleu(answers, [references]).score
    assert 10 < found < 90
    assert score(["bleu"], references, references)["bleu"] == pytest.approx(100)


OWN = '''
import numpy

def brevity(answers, references):
    """How short answers are beside their references."""
    assert isinstance(answers, list) and isinstance(references, list)
    return numpy.float32(sum(map(len, references)) / sum(map(len, answers)))

def several(answers, references):
    return {"first": len(answers), "second": 0.25}

def fails(answers, references):
    return 1 / 0

def wordy(answers, references):
    return "0.5"

def empty(answers, references):
    return {}

def lost(answers, references):
    return {"part": float("nan")}

def huge(answers, references):
    return 10**400

def nested(answers, references):
    return {"part": {"of": 1}}
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.py"
    file.write_text(OWN)
    return file


def test_a_function_of_the_users(own: Path) -> None:
    found = score([f"{own}:brevity", "exact_match", f"{own}:several"], ["ab", "c"], ["abcd", "cd"])
    assert found == {"brevity": 2.0, "exact_match": 0.0, "several": {"first": 2.0, "second": 0.25}}


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("fails", "fails of {file}:13 raised ZeroDivisionError: division by zero", "mend the function"),
        ("wordy", "wordy of {file} returned '0.5', which is no number", "return a finite number"),
        ("empty", "empty of {file} returned dict, which is no number", "return a finite number"),
        ("lost", "lost of {file} returned part: nan, which is no number", "return a finite number"),
        ("huge", "huge of {file} returned int, which is no number", "return a finite number"),
        ("nested", "nested of {file} returned part: dict, which is no number", "or a dictionary of them by name"),
        ("brevety", "{file}: no function 'brevety' in it", "did you mean brevity?"),
        ("x", "{file}: no function 'x' in it", "def brevity(answers, references)"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(own: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        score([f"{own}:{name}"], ["a"], ["b"])
    assert caught.value.message == message.format(file=own)
    assert hint in str(caught.value.hint)


def test_a_file_that_is_gone_or_no_python_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.py: No such file") as caught:
        score([f"{tmp_path}/gone.py:f"], ["a"], ["b"])
    assert caught.value.hint == "evaluate.generate.metrics is looked up beside the recipe"
    (tmp_path / "torn.py").write_text("def f(:\n")
    with pytest.raises(DataError, match=r"torn.py:1: cannot be loaded: SyntaxError"):
        score([f"{tmp_path}/torn.py:f"], ["a"], ["b"])
