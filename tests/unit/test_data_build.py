"""Preparing in pieces: the same files from any number of processes and after any crash, every row accounted for."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.prepare import prepare
from launcher.data.prepare.report import Report
from launcher.data.store import Documents, Set, read_lists
from launcher.errors import DataError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan
from tests.plans import augment_plan, clean_plan, data_plan, held_out, model_plan, source_plan
from tests.unit.mutations import damaged_rows

ROOT = Path(__file__).parents[2]
WORDS = ("river", "stone", "candle", "garden", "window", "morning", "silver", "thunder", "basket", "meadow", "lantern")


def scratch_model(vocab_size: int = 300) -> ModelPlan:
    scratch = {"model_type": "llama", "vocab_size": vocab_size}
    return model_plan("/nowhere/base", source="scratch", scratch=scratch)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of about 20 words that share nothing but their vocabulary."""
    draw = random.Random(seed)

    def say(length: int) -> str:
        return " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(length))

    return [{"prompt": say(8), "completion": say(draw.randrange(4, 20))} for _ in range(count)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files, so five pieces at least."""
    for i in range(5):
        write(tmp_path / "rows" / f"{i}.jsonl", rows(40, seed=i))
    return tmp_path / "rows"


def report_of(facts: DataFacts) -> Report:
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    return report


def dropped(facts: DataFacts) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in (Path(facts.folder) / "dropped.jsonl").read_text().splitlines()]
    return [(line["where"], line["reason"]) for line in found]


def content(facts: DataFacts) -> dict[str, bytes]:
    """Every file of a prepared folder but those that say where it lies and how long it took."""
    files = [path for path in Path(facts.folder).rglob("*") if path.is_file()]
    names = {str(path.relative_to(facts.folder)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name not in ("facts.json", "report.json")}


def test_any_number_of_processes_makes_the_same_files(folder: Path, tmp_path: Path) -> None:
    data = data_plan(source_plan(folder), eval=held_out(0.1), clean=clean_plan(near_duplicates=0.8))
    one = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "one", workers=1)
    three = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "three", workers=3)
    assert one == three.model_copy(update={"folder": one.folder})
    assert content(one) == content(three)
    assert len(list((Path(one.folder) / "documents").iterdir())) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from launcher.data.prepare import prepare
from launcher.plan.plan import DataPlan, ModelPlan

def progress(what, done, total):
    if what == "tokenize" and done == 80:
        os.kill(os.getpid(), signal.SIGKILL)

model, data = ModelPlan.model_validate_json(sys.argv[1]), DataPlan.model_validate_json(sys.argv[2])
prepare(model, data, seed=1, cache_dir=Path(sys.argv[3]), progress=progress)
"""


def test_what_a_killed_preparation_has_done_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    data, cache = data_plan(source_plan(folder), eval=held_out(0.1)), tmp_path / "cache"
    arguments = [scratch_model().model_dump_json(), data.model_dump_json(), str(cache)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (staging,) = [path for path in cache.iterdir() if path.is_dir()]
    kept = {path.name: path.stat().st_mtime_ns for path in (staging / "documents").iterdir()}
    assert sorted(kept) == ["00000.arrow", "00001.arrow"]
    vocabulary = (staging / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    facts = prepare(scratch_model(), data, seed=1, cache_dir=cache)
    finished = Path(facts.folder)
    assert {name: (finished / "documents" / name).stat().st_mtime_ns for name in kept} == kept
    assert (finished / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == vocabulary
    fresh = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "fresh")
    assert content(facts) == content(fresh)
    assert not staging.exists()


def test_every_row_that_is_left_out_says_why(tmp_path: Path) -> None:
    good = rows(40)
    benchmark = [*rows(3, seed=99), {"prompt": "Who wrote it?", "completion": "Nobody knows."}]
    all_said = " ".join(row["prompt"] for row in rows(9, seed=77))
    bad: list[tuple[str, Any]] = [
        ("duplicate", good[3]),
        ("near duplicate", good[7] | {"prompt": good[7]["prompt"] + "!", "completion": good[7]["completion"] + " end"}),
        ("asks what a held-out row asks", {"prompt": "What is held out?", "completion": "Another answer."}),
        ("contamination", {"prompt": benchmark[1]["prompt"], "completion": benchmark[1]["completion"]}),
        ("contamination", {"prompt": "Who wrote it?", "completion": "Somebody else."}),
        ("excluded by pattern", {"prompt": "As an AI language model", "completion": "I cannot."}),
        ("too many characters", {"prompt": "long " * 500, "completion": "x"}),
        ("too short", {"prompt": "a", "completion": "b"}),
        ("too long", {"prompt": "Say it all.", "completion": all_said}),
        ("bad row", {"prompt": "Nothing?", "completion": "  "}),
    ]
    train = write(tmp_path / "train.jsonl", good + [row for _, row in bad])
    asked = write(tmp_path / "eval.jsonl", [{"prompt": "What is held out?", "completion": "This."}])
    data = data_plan(
        source_plan(train),
        eval=held_out(sources=(source_plan(asked),)),
        max_length=300,
        on_bad_row="drop",
        clean=clean_plan(
            near_duplicates=0.6,
            contamination=(source_plan(write(tmp_path / "benchmark.jsonl", benchmark)),),
            min_tokens=40,
            max_chars=2400,
            exclude=("language model",),
        ),
    )
    facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    assert dropped(facts) == [(f"{train}:{41 + i}", reason) for i, (reason, _) in enumerate(bad)]
    assert facts.dropped == dict(Counter(sorted(reason for reason, _ in bad)))
    assert (facts.train_documents, facts.eval_documents) == (40, 1)
    report = report_of(facts)
    training, evaluation = report.sources
    assert (training.rows, training.used, sum(training.dropped.values())) == (50, 40, 10)
    assert (evaluation.role, evaluation.rows, evaluation.used) == ("eval", 1, 1)
    found = report.duplicates
    assert (found.exact, found.near, found.overlap_with_held_out, found.contaminated) == (1, 1, 1, 2)


def test_repeats_are_counted_where_they_are_kept_and_stop_where_they_may_not_be(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*rows(10), rows(1)[0], {"prompt": "Why?", "completion": "So."}])
    asked = write(tmp_path / "eval.jsonl", [{"prompt": "Why?", "completion": "Because."}])
    changes: dict[str, Any] = {"eval": held_out(sources=(source_plan(asked),))}
    kept = data_plan(source_plan(train), clean=clean_plan(duplicates="keep", overlap="keep"), **changes)
    facts = prepare(scratch_model(), kept, seed=1, cache_dir=tmp_path / "cache")
    assert (facts.train_documents, facts.dropped) == (12, {})
    assert (report_of(facts).duplicates.exact, report_of(facts).duplicates.overlap_with_held_out) == (1, 1)
    stopping = data_plan(source_plan(train), clean=clean_plan(overlap="stop"), **changes)
    with pytest.raises(DataError, match=r"train.jsonl:12: asks what the held-out row .*eval.jsonl:1 asks"):
        prepare(scratch_model(), stopping, seed=1, cache_dir=tmp_path / "cache")


def reviews(counts: dict[str, int]) -> list[dict[str, Any]]:
    texts = rows(sum(counts.values()))
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [{"text": row["prompt"], "label": label} for row, label in zip(texts, labels, strict=True)]


@pytest.mark.parametrize(
    ("how", "copies", "weights"),
    [
        ("none", {"good": 90, "bad": 30}, {"good": 1.0, "bad": 1.0}),
        ("weights", {"good": 90, "bad": 30}, {"good": 120 / 180, "bad": 2.0}),
        ("oversample", {"good": 90, "bad": 90}, {"good": 1.0, "bad": 1.0}),
        ("undersample", {"good": 30, "bad": 30}, {"good": 1.0, "bad": 1.0}),
    ],
)
def test_balance(tmp_path: Path, how: str, copies: dict[str, int], weights: dict[str, float]) -> None:
    train = write(tmp_path / "train.jsonl", reviews({"good": 90, "bad": 30}))
    facts = prepare(scratch_model(), data_plan(source_plan(train), balance=how), seed=1, cache_dir=tmp_path / "cache")
    assert facts.train_documents == sum(copies.values())
    labels = report_of(facts).labels
    assert {name: label.copies for name, label in labels.items()} == copies
    assert {name: label.rows for name, label in labels.items()} == {"good": 90, "bad": 30}
    documents, packs = Documents(facts.folder), read_lists(Path(facts.folder) / "packs.arrow")
    times = Counter(int(number) for index in range(len(packs)) for number in packs[index])
    label_of = {f"{train}:{i + 1}": "good" if i < 90 else "bad" for i in range(120)}
    seen: Counter[str] = Counter()
    for number, count in times.items():
        label = label_of[documents.where(number)]
        seen[label] += count
        assert float(documents.weights[number]) == pytest.approx(weights[label])
    assert seen == copies
    assert facts.dropped == ({"undersampled": 60} if how == "undersample" else {})


def test_stratified_and_grouped_and_by_number(tmp_path: Path) -> None:
    labelled = [row | {"topic": f"t{i % 20}"} for i, row in enumerate(reviews({"good": 150, "bad": 50}))]
    train = write(tmp_path / "train.jsonl", labelled)
    where = {f"{train}:{i + 1}": row for i, row in enumerate(labelled)}

    def sets(**changes: Any) -> dict[Set, list[dict[str, Any]]]:
        facts = prepare(scratch_model(), data_plan(source_plan(train), **changes), seed=1, cache_dir=tmp_path / "cache")
        documents = Documents(facts.folder)
        found = {
            kind: [where[documents.where(i)] for i in np.flatnonzero(documents.sets == kind).tolist()]
            for kind in (Set.TRAIN, Set.EVAL)
        }
        tests = [json.loads(line) for line in (Path(facts.folder) / "test.jsonl").read_text().splitlines()]
        return found | {Set.TEST: [where[test["where"]] for test in tests]}

    stratified = sets(eval=held_out(0.2), test=held_out(0.1), stratify=True)
    for kind, share in ((Set.EVAL, 0.2), (Set.TEST, 0.1)):
        assert Counter(row["label"] for row in stratified[kind]) == {"good": 150 * share, "bad": 50 * share}
    grouped = sets(eval=held_out(0.3), test=held_out(0.2), group="topic")
    topics = {kind: {row["topic"] for row in found} for kind, found in grouped.items()}
    assert not topics[Set.TRAIN] & topics[Set.EVAL] | topics[Set.TRAIN] & topics[Set.TEST]
    assert all(topics.values())
    counted = sets(eval=held_out(rows=17), test=held_out(rows=5))
    assert [len(counted[kind]) for kind in (Set.TRAIN, Set.EVAL, Set.TEST)] == [178, 17, 5]


def test_what_is_too_long(tmp_path: Path) -> None:
    long = {"prompt": "Count.", "completion": " ".join(str(i) for i in range(300))}
    train = write(tmp_path / "train.jsonl", [*rows(20), long])

    def documents_of(too_long: str) -> tuple[list[list[int]], dict[str, int]]:
        data = data_plan(source_plan(train), max_length=256, too_long=too_long)
        facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
        documents = Documents(facts.folder)
        found = [i for i in range(len(documents)) if documents.where(i) == f"{train}:21"]
        return [documents.input_ids(i).tolist() for i in found], report_of(facts).notes

    whole, _ = documents_of("split")
    ids = [token for part in whole for token in part]
    assert [len(part) for part in whole] == [256] * (len(ids) // 256) + [len(ids) % 256]
    assert len(whole) > 2
    (beginning,), notes = documents_of("truncate_end")
    assert beginning == ids[:256]
    assert notes["truncated"] == 1
    (end,), _ = documents_of("truncate_start")
    assert end == ids[-256:]
    assert documents_of("drop")[0] == []


def test_sources_come_as_often_as_they_weigh(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl", rows(400, 1)), write(tmp_path / "two.jsonl", rows(50, 2))
    data = data_plan(source_plan(one, weight=0.5), source_plan(two, weight=3.0))
    facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    taken = report_of(facts).sources[0].used
    assert abs(taken - 200) < 3 * (400 * 0.25) ** 0.5
    assert facts.train_documents == taken + 150
    assert facts.dropped == {"source weight below 1": 400 - taken}


def test_augmented_copies_differ_and_held_out_rows_do_not(tmp_path: Path) -> None:
    function = tmp_path / "mine.py"
    function.write_text(
        "def shout(messages, random):\n"
        "    return [m | {'content': m['content'] + '!' * random.randrange(1, 6)} if m['role'] == 'user' else m\n"
        "            for m in messages]\n"
    )
    train = write(tmp_path / "train.jsonl", rows(40))
    data: DataPlan = data_plan(
        source_plan(train, weight=4.0),
        eval=held_out(rows=10),
        augment=augment_plan(function_file=str(function), function_name="shout"),
    )
    facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    assert (facts.train_documents, facts.eval_documents) == (120, 10)
    documents = Documents(facts.folder)
    variants: dict[str, set[bytes]] = {}
    for number in np.flatnonzero(documents.sets == Set.TRAIN).tolist():
        variants.setdefault(documents.where(number), set()).add(documents.input_ids(number).tobytes())
    assert len(variants) == 30
    assert sum(len(found) for found in variants.values()) > 60
    again = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "again", workers=2)
    assert content(again) == content(facts)
    function.write_text(function.read_text().replace("'!'", "'?'"))
    changed = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    assert changed.folder != facts.folder


def test_hundreds_of_damaged_rows_end_in_a_report(tmp_path: Path) -> None:
    """Every kind of damage among good rows: what cannot be used is listed with its place, the rest learned."""
    for kind in ("prompt_completion", "messages"):
        damaged = [one for one in damaged_rows(7, num_random=40) if one.kind == kind]
        assert len(damaged) > 100
        good = rows(len(damaged), seed=5)
        if kind == "messages":
            roles = (("user", "prompt"), ("assistant", "completion"))
            good = [{"messages": [{"role": role, "content": r[name]} for role, name in roles]} for r in good]
        lines = [line for row, one in zip(good, damaged, strict=True) for line in (json.dumps(row).encode(), one.line)]
        path = tmp_path / f"{kind}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        data = data_plan(
            source_plan(path, format=kind), on_bad_row="drop", max_length=10_000, clean=clean_plan(max_chars=100_000)
        )
        facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
        documents = Documents(facts.folder)
        learned = {documents.where(number) for number in range(len(documents))}
        assert {f"{path}:{line}" for line in range(1, len(lines), 2)} <= learned
        listed = {where for where, _ in dropped(facts)}
        assert all(where.startswith(f"{path}:") for where in listed)
        assert not learned & listed
        assert facts.dropped["too many characters"] == 1
        assert {f"{path}:{2 * i + 2}" for i, one in enumerate(damaged) if one.bad} <= listed


def test_data_that_changes_meanwhile_is_not_kept_under_the_key_of_what_it_was(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(40))

    def append(what: str, done: int, total: int | None) -> None:
        if what == "pack":
            write(train, rows(41))

    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(scratch_model(), data_plan(source_plan(train)), seed=1, cache_dir=tmp_path / "cache", progress=append)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def prepared(tmp_path: Path, *content: list[dict[str, Any]], **changes: Any) -> DataFacts:
    """Facts of training rows, and held-out ones where there are more."""
    train, *others = [write(tmp_path / f"{i}.jsonl", found) for i, found in enumerate(content)]
    if others:
        changes["eval"] = held_out(sources=tuple(map(source_plan, others)))
    return prepare(scratch_model(), data_plan(source_plan(train), **changes), seed=1, cache_dir=tmp_path / "cache")


def chat(*turns: str, **marks: Any) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} | marks.get(turn[1:], {}) for turn in turns]}


@pytest.mark.parametrize(
    "asked",
    [
        chat("sYou are kind.", "uWhat is up?", "aThe sky."),
        chat("uWhat is  up? ", "aNothing."),
        chat("uWhat is up?", "aThe sky.<|endoftext|>"),
    ],
)
def test_a_held_out_question_is_found_behind_what_does_not_change_it(tmp_path: Path, asked: dict[str, Any]) -> None:
    facts = prepared(tmp_path, [asked, chat("uWho?", "aMe.")], [chat("uWhat is up?", "aThe sky.")])
    assert facts.dropped == {"asks what a held-out row asks": 1}


def test_rows_that_become_the_same_are_split_and_dropped_as_the_same(tmp_path: Path) -> None:
    questions = [" ".join(row["prompt"].split()) for row in rows(60)]
    twice = [chat(f"s{system}", f"u{q}", "aYes.") for q in questions for system in ("You are kind.", "Be brief.")]
    facts = prepared(tmp_path, twice, system_turns="drop")
    assert (facts.train_documents, facts.dropped) == (60, {"duplicate": 60})
    # Kept apart by their prompts, they are still never asked on both sides.
    train = source_plan(tmp_path / "0.jsonl")
    kept = data_plan(train, eval=held_out(0.2))
    facts = prepare(scratch_model(), kept, seed=1, cache_dir=tmp_path / "kept")
    documents = Documents(facts.folder)
    lines = [json.loads(line) for line in Path(train.path).read_text().splitlines()]
    said = {f"{train.path}:{i + 1}": line["messages"][1]["content"] for i, line in enumerate(lines)}
    sides = [
        {said[documents.where(i)] for i in np.flatnonzero(documents.sets == kind).tolist()}
        for kind in (Set.TRAIN, Set.EVAL)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_rows_that_differ_in_their_marks_are_no_duplicates(tmp_path: Path) -> None:
    first = chat("uOne?", "a1.", "uTwo?", "a2.", **{"1.": {"train": True}})
    second = chat("uOne?", "a1.", "uTwo?", "a2.", **{"2.": {"train": True}})
    facts = prepared(tmp_path, [first, second], supervise="marked")
    assert (facts.train_documents, facts.dropped) == (2, {})


def test_weights_are_those_of_the_documents_that_there_are(tmp_path: Path) -> None:
    reviewed = reviews({"good": 40, "bad": 40})
    for row in reviewed[50:]:
        row["text"] = " ".join([row["text"]] * 20)
    facts = prepared(tmp_path, reviewed, balance="weights", max_length=300)
    assert facts.dropped == {"too long": 30}
    documents = Documents(facts.folder)
    totals = np.bincount(documents.labels, weights=documents.weights)
    assert totals.tolist() == pytest.approx([25, 25])
    labels = report_of(facts).labels
    assert {name: (label.rows, label.copies) for name, label in labels.items()} == {"good": (40, 40), "bad": (40, 10)}


def test_a_row_of_which_a_part_stays_is_used(tmp_path: Path) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def half(messages, random):\n    return messages if random.random() < 0.5 else None\n")
    train = write(tmp_path / "train.jsonl", rows(40))
    augment = augment_plan(function_file=str(function), function_name="half")
    data = data_plan(source_plan(train, weight=3.0), augment=augment)
    facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    documents = Documents(facts.folder)
    learned = {documents.where(number) for number in range(len(documents))}
    report = report_of(facts)
    assert report.sources[0].used == len(learned)
    assert sum(facts.dropped.values()) == 40 - len(learned) > 0
    assert report.notes["partly_left_out"] + 40 - len(learned) == len(dropped(facts)) == len(set(dropped(facts)))


def test_a_benchmark_without_answers_is_looked_for_too(tmp_path: Path) -> None:
    asked = [row["prompt"] + " and more words to make it thirteen" for row in rows(5)]
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": q, "completion": None} for q in asked])
    learned = [*rows(10, seed=8), *({"prompt": q, "completion": "Yes."} for q in asked)]
    clean = clean_plan(contamination=(source_plan(benchmark, format="prompt_completion"),))
    facts = prepared(tmp_path, learned, clean=clean, on_bad_row="drop")
    assert facts.dropped == {"contamination": 5}


def test_only_near_copies_of_held_out_rows(tmp_path: Path) -> None:
    one = rows(1)[0]
    near = [one | {"completion": one["completion"] + " end"}]
    with pytest.raises(DataError, match="no training row is left; dropped: 1 asks what a held-out row asks"):
        prepared(tmp_path, near, [one], clean=clean_plan(near_duplicates=0.5))
    other = [one | {"prompt": one["prompt"] + "!"}]
    with pytest.raises(DataError, match="no training row is left; dropped: 1 near duplicate"):
        prepared(tmp_path, other, [one], clean=clean_plan(near_duplicates=0.5))


def test_prepared_data_whose_facts_are_damaged_is_prepared_again(tmp_path: Path) -> None:
    facts = prepared(tmp_path, rows(20))
    (Path(facts.folder) / "facts.json").write_text("")
    assert prepared(tmp_path, rows(20)) == facts


def test_test_questions_longer_than_a_row_are_listed(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(20))
    asked = write(tmp_path / "test.jsonl", [{"prompt": "why " * 300, "completion": "So."}, *rows(2, seed=4)])
    data = data_plan(source_plan(train), test=held_out(sources=(source_plan(asked),)), max_length=256)
    facts = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "cache")
    assert (facts.test_documents, dropped(facts)) == (2, [(f"{asked}:1", "too long")])
