"""Cleaning: filters on a row alone, near duplicates against exact similarity, overlap with benchmarks."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.clean import contamination
from launcher.data.clean.filters import Dropped, Filters
from launcher.data.clean.language import _VARIANTS, FEWEST_BYTES, _identifier
from launcher.data.clean.near import NUM_VALUES, bands, first_wins, signatures
from launcher.data.clean.words import _WORD, exchange, ngrams, words
from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.errors import DataError
from launcher.recipe.check import LANGUAGES
from tests.plans import clean_plan

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the data that tests share is not here")
FIXED = settings(derandomize=True, max_examples=200, deadline=None, database=None)


def asking(question: str, answer: str = "Yes.") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def filtered(question: str, **clean: object) -> Conversation | Dropped:
    return Filters(clean_plan(**clean))(asking(question))


# Filters


@pytest.mark.parametrize(
    ("clean", "reason", "detail"),
    [
        ({"max_chars": 20}, "too many characters", "21 characters, and data.clean.max_chars is 20"),
        ({"include": "[?]"}, "not included by pattern", "nothing in it matches [?]"),
        ({"exclude": ("zzz", "(?i)HELLO,? w")}, "excluded by pattern", "'Hello, w' matches (?i)HELLO,? w"),
        ({"exclude": ("[.]\nYes",)}, "excluded by pattern", "'.\\nYes' matches [.]\nYes"),
    ],
)
def test_a_filter_says_what_it_found(clean: dict[str, object], reason: str, detail: str) -> None:
    row = "Hello, world...."
    assert filtered(row, **clean) == Dropped(reason, detail)


def test_a_row_that_passes_is_the_same_object() -> None:
    row = asking("What does a café cost?")
    clean = clean_plan(max_chars=27, include="caf", exclude=("tea",), languages=("en",), mend_encoding=True)
    assert Filters(clean)(row) is row
    assert pickle.loads(pickle.dumps(Filters(clean)))(row) is row


def test_what_a_tool_is_called_with_counts_as_characters() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("search", {"query": "x" * 1000}),))
    row = Conversation((Message("user", "Find it."), call))
    assert Filters(clean_plan(max_chars=1000))(row).reason == "too many characters"
    assert Filters(clean_plan(max_chars=1100))(row) is row


@pytest.mark.parametrize("pattern", ["(a", "a{99999999999999999999}", "[z-a]", "(" * 3000])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(DataError, match="data.clean.exclude.1: .* is no regular expression") as raised:
        Filters(clean_plan(exclude=("a", pattern)))
    assert raised.value.hint


def test_mended_are_all_texts_of_a_row_and_nothing_else() -> None:
    wrong, right = "cafÃ© “x” &amp; ﬁ Ａ\r\n", "café “x” &amp; ﬁ Ａ\r\n"
    decomposed, composed = "cafe\u0301", "café"

    def row(text: str, other: str) -> Conversation:
        return Conversation(
            messages=(
                Message("user", text),
                Message("assistant", other, text, (ToolCall("find", {"at": [text, 3, None]}, "id"),), learn=True),
                Message("tool", text, tool_call_id="id"),
                Message("assistant", "Yes."),
            ),
            where="a.jsonl:3",
            tools=({"function": {"description": text}},),
            parts=(("instruction", text),),
            label=other,
        )

    mend = Filters(clean_plan(mend_encoding=True))
    assert mend(row(wrong, decomposed)) == row(right, composed)
    assert mend(Conversation((), text=wrong)) == Conversation((), text=right)
    assert Filters(clean_plan())(row(wrong, decomposed)) == row(wrong, decomposed)


FOREIGN = {
    "de": "Der Zug nach Berlin fährt um acht Uhr ab und kommt am Nachmittag an.",
    "fr": "Combien de pommes reste-t-il si j'en mange deux sur les cinq ?",
    "es": "¿Cuántos libros leyó Juan si leyó dos cada semana durante un mes?",
    "pl": "Pociąg odjeżdża z Warszawy o ósmej i przyjeżdża po południu.",
    "ru": "Поезд отправляется из Москвы в восемь утра и прибывает вечером.",
    "zh": "火车早上八点从北京出发，下午到达上海，全程大约需要六个小时。",
    "ja": "電車は朝八時に東京を出発し、午後に大阪に到着します。",
    "ar": "يغادر القطار من القاهرة في الساعة الثامنة صباحا ويصل بعد الظهر.",
    "hi": "ट्रेन सुबह आठ बजे दिल्ली से निकलती है और दोपहर में पहुँचती है।",
    "tr": "Tren sabah sekizde İstanbul'dan kalkıyor ve öğleden sonra varıyor.",
}


@pytest.mark.parametrize("language", FOREIGN)
def test_languages(language: str) -> None:
    text = FOREIGN[language]
    assert filtered(text, languages=("en", "sv")) == Dropped("language", f"{language}, not en or sv")
    assert isinstance(filtered(text, languages=("en", language)), Conversation)


def test_the_recipe_takes_the_languages_that_the_library_tells() -> None:
    labels = _identifier().labels
    assert [code for code in sorted(labels) if len(code) == 2] == sorted(LANGUAGES)
    assert {variant for variants in _VARIANTS.values() for variant in variants} <= set(labels)


def test_what_has_no_language_is_kept_and_what_is_too_short_can_be_counted() -> None:
    english = Filters(clean_plan(languages=("en",)))
    short = asking("Ja, gerne doch, bitte!", "Ja")
    long = asking(FOREIGN["de"])
    code = asking("Explain this.", f"```python\n# {FOREIGN['de']}\nfor i in range(10):\n    print(i)\n```\nIt counts.")
    numbers = asking("3*4=12\n12+7=19\n19/2=9.5\n#### 9.5 <<3*4=12>><<12+7=19>>", "9.5")
    translation = asking(f"Translate this sentence into English, please: {FOREIGN['de']}", "The train leaves at eight.")
    for row in (short, code, numbers, translation):
        assert english(row) is row
    assert len(short.words.encode()) < FEWEST_BYTES
    assert [english.keeps_untold(row) for row in (short, code, numbers, long)] == [True, True, False, False]
    assert not Filters(clean_plan()).keeps_untold(short)


@needs_shared_data
def test_of_real_english_rows_none_is_taken_for_foreign_and_only_the_broken_are_mended() -> None:
    rows = [asking(item["question"], item["answer"]) for item in shared("gsm8k/test.jsonl")]
    rows += [asking(item["prompt"], item["completion"]) for item in shared("sentiment/imdb.jsonl")]
    clean = Filters(clean_plan(languages=("en",), mend_encoding=True))
    found = [clean(row) for row in rows]
    assert not [result for result in found if isinstance(result, Dropped)]
    changed = [row for result, row in zip(found, rows, strict=True) if result is not row]
    # Dashes of Windows-1252, read as Latin-1.
    assert changed == [row for row in rows if re.search("[\x80-\x9f]", row.words)]
    assert len(changed) == 9


# Words


@FIXED
@given(st.text(st.characters(max_codepoint=127)))
def test_plain_text_has_the_words_that_any_text_has(text: str) -> None:
    assert words(text) == _WORD.findall(text.lower())


def test_words_of_other_scripts() -> None:
    assert words("Don’t PANIC, snake_case! ﬁne") == ["don", "t", "panic", "snake", "case", "fine"]
    assert words("cafe\u0301 हिन्दी") == ["café", "हिन्दी"]
    assert words("使用Python编程。") == ["使", "用", "python", "编", "程"]
    assert words(" \n...!") == []


def test_hashes_are_the_same_for_ever() -> None:
    # Other numbers here would make other rows near duplicates than those of an earlier version.
    assert ngrams(words("The quick brown fox jumps over."), 5).tolist() == [8189267298377266199, 2247479744533809214]
    signature = signatures(["The quick brown fox jumps over."])[0]
    assert signature[:4].tolist() == [1146045012, 1782962249, 1772668303, 2254917594]


def test_a_run_is_hashed_by_its_words_in_their_order() -> None:
    one, two = ngrams(["x", *"abcde"], 5), ngrams([*"abcde", "y"], 5)
    assert one[1] == two[0]
    assert len(ngrams(list("ab"), 5)) == 1
    assert len(ngrams([], 5)) == 0
    assert len({int(ngrams(list(text), 5)[0]) for text in ("abcde", "edcba", "abced", "abcd", "bcde", "a")}) == 6


# Near duplicates


def jaccard(one: str, other: str) -> float:
    sets = [{tuple(row[i : i + 5]) for i in range(max(len(row) - 4, 1))} for row in (words(one), words(other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def perturbed_pairs(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 20 to 150 words, each with a copy in which a stretch of words, or words here and there, are others."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(3000)]
    pairs = []
    for _ in range(number):
        row = draw.choices(vocabulary, k=draw.randint(20, 150))
        copy = list(row)
        if draw.random() < 0.5:
            length = int(len(row) * draw.uniform(0, 0.8))
            start = draw.randint(0, len(row) - length)
            copy[start : start + length] = draw.choices(vocabulary, k=length)
        else:
            for place in draw.sample(range(len(row)), k=int(len(row) * draw.uniform(0, 0.1))):
                copy[place] = draw.choice(vocabulary)
        pairs.append((" ".join(row), " ".join(copy)))
    return pairs


@pytest.fixture(scope="module")
def perturbed() -> tuple[np.ndarray, np.ndarray]:
    """Signatures of 4,000 pairs, each row followed by its copy, and the exact similarity of each pair."""
    pairs = perturbed_pairs(4000)
    similarity = np.array([jaccard(*pair) for pair in pairs])
    return signatures(text for pair in pairs for text in pair), similarity


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_found_are_the_pairs_that_are_similar(threshold: float, perturbed: tuple[np.ndarray, np.ndarray]) -> None:
    of_all, similarity = perturbed
    earlier = first_wins(of_all, threshold)
    assert (earlier[::2] == -1).all()
    assert np.isin(earlier[1::2], [-1, *range(0, len(of_all), 2)]).all()
    found = earlier[1::2] == np.arange(0, len(of_all), 2)
    similar, different = similarity >= threshold + 0.1, similarity <= threshold - 0.15
    assert min(similar.sum(), different.sum()) > 200
    assert found[similar].mean() >= 0.95
    assert found[different].mean() <= 0.01


def test_an_estimate_is_unbiased(perturbed: tuple[np.ndarray, np.ndarray]) -> None:
    of_all, similarity = perturbed
    error = (of_all[::2] == of_all[1::2]).mean(axis=1) - similarity
    assert abs(error.mean()) < 0.005
    deviation = np.sqrt(similarity * (1 - similarity) / NUM_VALUES)
    assert 0.9 < error.std() / np.sqrt((deviation**2).mean()) < 1.1


def test_signatures_do_not_depend_on_how_rows_are_shared_out() -> None:
    texts = [text for pair in perturbed_pairs(100) for text in pair] + ["", "one", "!"]
    whole = signatures(texts)
    assert whole.dtype == np.uint32
    assert whole.shape == (203, NUM_VALUES)
    for size in (1, 7, 100):
        chunks = [signatures(texts[start : start + size]) for start in range(0, len(texts), size)]
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
    assert signatures([]).shape == (0, NUM_VALUES)


def with_similarity(*shares: float) -> np.ndarray:
    """Signatures of rows, each of which has that share of values in common with the one before it, from the front."""
    rows = [np.arange(NUM_VALUES, dtype=np.uint32)]
    for number, share in enumerate(shares, start=1):
        row = rows[-1].copy()
        row[int(share * NUM_VALUES) :] += np.uint32(1000 * number)
        rows.append(row)
    return np.stack(rows)


def test_a_row_is_left_out_only_because_of_one_that_is_kept() -> None:
    # b repeats a; c repeats b, but not a, which alone is kept: so c is kept, and d repeats c.
    of_all = with_similarity(0.9, 0.6, 1.0)
    of_all[2, int(0.9 * NUM_VALUES) :] = of_all[1, int(0.9 * NUM_VALUES) :]
    of_all[3] = of_all[2]
    assert first_wins(of_all, 0.65).tolist() == [-1, 0, -1, 2]
    alive = np.array([False, True, True, True])
    assert first_wins(of_all, 0.65, alive).tolist() == [-1, -1, 1, 1]


def test_held_out_rows_come_first_and_stay() -> None:
    of_all = np.repeat(with_similarity(), 4, axis=0)
    held_out = np.array([False, True, False, True])
    assert first_wins(of_all, 0.8, held_out=held_out).tolist() == [1, -1, 1, -1]
    assert first_wins(of_all, 0.8, np.array([True, False, True, True]), held_out).tolist() == [3, -1, 3, -1]


def test_rows_without_words_resemble_none_and_short_ones_only_their_like() -> None:
    of_all = signatures(["", "!!!", "\n", "Yes.", "yes", "No.", "Yes yes"])
    assert first_wins(of_all, 0.5).tolist() == [-1, -1, -1, -1, 3, -1, -1]
    assert first_wins(of_all[:0], 0.5).tolist() == []


def test_against_every_pair(perturbed: tuple[np.ndarray, np.ndarray]) -> None:
    """What the bands leave to compare is what comparing all pairs finds, where these are clear."""
    of_all = perturbed[0][np.random.default_rng(0).permutation(1200)]
    threshold, kept, expected = 0.5, [], []
    for row in of_all:
        equal = (of_all[kept] == row).mean(axis=1) if kept else np.empty(0)
        alike = np.flatnonzero(equal >= threshold)
        expected.append(kept[alike[0]] if len(alike) else -1)
        if not len(alike):
            kept.append(len(expected) - 1)
    found = first_wins(of_all, threshold)
    assert np.count_nonzero(np.array(expected) >= 0) > 300
    assert (found == expected).mean() > 0.995


def test_many_rows_of_one_template_take_no_quadratic_time() -> None:
    draw = np.random.default_rng(0)
    template = draw.integers(0, 1 << 31, NUM_VALUES, dtype=np.uint32)
    own = draw.integers(0, 1 << 31, (3000, NUM_VALUES), dtype=np.uint32)
    of_all = np.where(draw.random(own.shape) < 0.8, template, own)  # any two are 0.64 alike
    of_all = np.concatenate([of_all, of_all[:50]])
    earlier = first_wins(of_all, 0.8)
    assert (earlier[-50:] >= 0).mean() > 0.95
    assert (earlier[:-50] >= 0).mean() < 0.02


def test_bands_are_as_long_as_the_threshold_allows() -> None:
    assert [bands(threshold) for threshold in (0.3, 0.5, 0.8, 0.9)] == [(64, 2), (42, 3), (16, 8), (8, 16)]
    for threshold in np.arange(0.01, 1, 0.01):
        number, length = bands(float(threshold))
        assert number * length <= NUM_VALUES
        assert 1 - (1 - min(threshold + 0.05, 0.99) ** length) ** number >= 0.99 or length == 1


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "repeated", "nearly"),
    [("summarization/gigaword", 15, 16), ("summarization/cnn_dailymail", 5, 5), ("sentiment/imdb", 1, 1)],
)
def test_duplicates_of_real_data(name: str, repeated: int, nearly: int) -> None:
    prompts = [item["prompt"] for item in shared(f"{name}.jsonl")]
    assert len(prompts) - len(set(prompts)) == repeated
    earlier = first_wins(signatures(prompts), 0.8)
    first = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    assert all(earlier[i] == first[prompt] for i, prompt in enumerate(prompts) if first[prompt] < i)
    assert np.count_nonzero(earlier >= 0) == nearly


def test_a_system_prompt_that_all_rows_share_makes_them_not_alike() -> None:
    system = Message("system", " ".join(f"rule{i}" for i in range(500)))
    questions = ["How tall is the tower in the old town?", "When does the last train leave for the coast?"]
    rows = [Conversation((system, Message("user", text), Message("assistant", text[::-1]))) for text in questions]
    assert first_wins(signatures(row.words for row in rows), 0.8).tolist() == [-1, 0]
    assert first_wins(signatures(exchange(row) for row in rows), 0.8).tolist() == [-1, -1]


# Contamination

BENCHMARK = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"
)


def test_thirteen_words_in_a_row_are_found_whatever_their_dress() -> None:
    benchmarks = pickle.loads(pickle.dumps(contamination.build([BENCHMARK, "What is it?"])))
    text = "Once: NATALIA sold clips to 48 of her friends (in April)\nand then she -- left."
    assert benchmarks.shared(text) == "natalia sold clips to 48 of her friends in april and then she"
    assert benchmarks.shared("Once Natalia sold clips to 48 of her friends in April, and then he") is None


def test_short_texts_are_compared_as_a_whole() -> None:
    benchmarks = contamination.build(["What is the capital of France?", "", "..."])
    assert benchmarks.shared("what is the capital of france") == "what is the capital of france"
    assert benchmarks.shared("So what is the capital of France?") is None
    assert benchmarks.shared("") is None
    assert contamination.build([]).shared(BENCHMARK) is None


@FIXED
@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abc"), max_size=60))
def test_shared_is_the_first_run_that_a_set_of_runs_would_find(one: list[str], other: list[str]) -> None:
    # Few words, so that runs are shared often; each stands twice in turn, so that 13 letters come from 7.
    row, benchmark = [word for word in one for _ in "12"], [word for word in other for _ in "12"]

    def runs(text: list[str]) -> list[str]:
        return [" ".join(text[i : i + 13]) for i in range(max(len(text) - 12, 1))] if text else []

    expected = next((run for run in runs(row) if run in set(runs(benchmark))), None)
    assert contamination.build([" ".join(benchmark)]).shared(" ".join(row)) == expected


@needs_shared_data
def test_gsm8k_shares_few_runs_between_its_own_splits() -> None:
    test = [f"{item['question']}\n{item['answer']}" for item in shared("gsm8k/test.jsonl")]
    benchmarks = contamination.build(test)
    assert all(benchmarks.shared(f"Solve it. {text} Well done.") for text in test[:200])
    train = [f"{item['question']}\n{item['answer']}" for item in shared("gsm8k/train.jsonl")[:2000]]
    assert sum(benchmarks.shared(text) is not None for text in train) < 20


def shared(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]
