"""Preparing: files to tokens once, found again at once, every row that is left out named with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.prepare import prepare
from launcher.data.prepare.report import Report
from launcher.data.store import Documents, Set, read_lists
from launcher.errors import DataError, ModelError, RunFolderError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan
from tests import plans
from tests.plans import held_out, source_plan

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
SENTIMENT = GSM8K.parent / "sentiment" / "rotten_tomatoes.jsonl"
NAMES = ["documents/00000.arrow", "eval.arrow", "packs.arrow", "test.jsonl", "dropped.jsonl", "report.json"]


def rows(start: int, end: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}." + " Yes." * (n % 7)}
        for n in range(start, end)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def data_plan(train: Path, test: Path | None = None, evaluation: Path | None = None, **changes: Any) -> DataPlan:
    split = changes.pop("eval_split", 0.1)
    plan: dict[str, Any] = {
        "eval": held_out(split, sources=(source_plan(evaluation),) if evaluation else ()),
        "test": held_out(sources=(source_plan(test),) if test else ()),
        "max_length": 128,
    }
    format = changes.pop("train_format", "auto")
    return plans.data_plan(source_plan(train, format=format), **(plan | changes))


def model_plan(vocab_size: int = 300, tokenizer: str | None = None, chat_template: str | None = None) -> ModelPlan:
    scratch = {"model_type": "llama", "vocab_size": vocab_size}
    return plans.model_plan(
        "/nowhere/base", source="scratch", scratch=scratch, tokenizer=tokenizer, chat_template=chat_template
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def places(folder: str, kind: Set) -> set[str]:
    documents = Documents(folder)
    return {documents.where(i) for i in np.flatnonzero(documents.sets == kind).tolist()}


def notes(facts: DataFacts) -> dict[str, int]:
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    return report.notes


def test_the_whole_folder(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", rows(0, 200)), write(tmp_path / "test.jsonl", rows(200, 210))
    said: list[tuple[str, int, int | None]] = []
    facts = prepare(
        model_plan(), data_plan(train, test), seed=1, cache_dir=tmp_path / "cache", progress=lambda *x: said.append(x)
    )
    folder = Path(facts.folder)
    assert folder.is_absolute()
    assert folder.parent == tmp_path / "cache"
    assert DataFacts.model_validate_json((folder / "facts.json").read_text()) == facts
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")] == []
    assert facts.train_documents + facts.eval_documents == 200
    assert 8 <= facts.eval_documents <= 35
    assert facts.test_documents == 10
    assert facts.dropped == {}
    assert facts.vocab_size == 300
    assert facts.formats == {str(train): "question_answer", str(test): "question_answer"}
    assert said[-1] == ("pack", facts.train_documents, facts.train_documents)
    assert ("tokenize", 210, 210) in said

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents = Documents(folder)
    training = np.flatnonzero(documents.sets == Set.TRAIN)
    assert len(training) == facts.train_documents
    assert int(documents.lengths[training].sum()) == facts.train_tokens
    assert int(documents.num_targets[training].sum()) == facts.train_supervised_tokens
    assert read_lists(folder / "eval.arrow")[0].tolist() == np.flatnonzero(documents.sets == Set.EVAL).tolist()
    originals = rows(0, 200)
    for index in training.tolist():
        row = originals[int(documents.where(index).removeprefix(f"{train}:")) - 1]
        ids, mask = documents.input_ids(index), documents.supervised(index)
        assert tokenizer.decode(ids[mask == 1]) == row["answer"] + "<|endoftext|>"
        assert (
            tokenizer.decode(ids)
            == f"### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}<|endoftext|>"
        )
    packs = read_lists(folder / "packs.arrow")
    assert len(packs) == facts.train_rows < facts.train_documents
    together = [packs[i] for i in range(len(packs))]
    assert sorted(np.concatenate(together).tolist()) == training.tolist()
    assert max(int(documents.lengths[pack].sum()) for pack in together) <= 128
    first = lines(folder / "test.jsonl")[0]
    assert first["where"] == f"{test}:1"
    assert first["prompt_text"] == "### Instruction:\nWhat is 200 plus 200?\n\n### Response:\n"
    assert tokenizer.decode(first["prompt_ids"]) == first["prompt_text"]
    assert first["answer"] == rows(200, 201)[0]["answer"]


def test_prepared_twice_is_equal_to_the_byte(tmp_path: Path) -> None:
    data = data_plan(write(tmp_path / "train.jsonl", rows(0, 150)), write(tmp_path / "test.jsonl", rows(150, 155)))
    one = prepare(model_plan(), data, seed=1, cache_dir=tmp_path / "one")
    two = prepare(model_plan(), data, seed=1, cache_dir=tmp_path / "two")
    assert one == two.model_copy(update={"folder": one.folder})
    names = sorted(str(path.relative_to(one.folder)) for path in Path(one.folder).rglob("*") if path.is_file())
    assert set(NAMES) | {"facts.json", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"} <= set(names)
    for name in names:
        if name not in ("facts.json", "report.json"):  # they name the folder and how long it took
            assert (Path(one.folder) / name).read_bytes() == (Path(two.folder) / name).read_bytes(), name


def test_found_again_without_loading_anything(tmp_path: Path) -> None:
    data = data_plan(write(tmp_path / "train.jsonl", rows(0, 100)))
    facts = prepare(model_plan(), data, seed=1, cache_dir=tmp_path / "cache")
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    stamp = Path(moved, Path(facts.folder).name, "packs.arrow").stat().st_mtime_ns
    start = time.perf_counter()
    found = prepare(model_plan(), data, seed=1, cache_dir=moved)
    assert time.perf_counter() - start < 0.5
    assert found == facts.model_copy(update={"folder": str(moved / Path(facts.folder).name)})
    assert Path(found.folder, "packs.arrow").stat().st_mtime_ns == stamp
    script = (
        "import sys; from pathlib import Path; from launcher.plan.plan import DataPlan, ModelPlan\n"
        "from launcher.data.prepare import prepare\n"
        "model, data = ModelPlan.model_validate_json(sys.argv[1]), DataPlan.model_validate_json(sys.argv[2])\n"
        "prepare(model, data, seed=1, cache_dir=Path(sys.argv[3]))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    arguments = [model_plan().model_dump_json(), data.model_dump_json(), str(moved)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_key_follows_everything_that_decides_the_tokens(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(0, 60))
    data, cache = data_plan(train), tmp_path / "cache"
    first = prepare(model_plan(), data, seed=1, cache_dir=cache)
    saved = str(Path(first.folder) / "tokenizer")
    longer = "{% for m in messages %}{{ '# ' + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    longer += "{% if add_generation_prompt %}# assistant: {% endif %}"
    others = [
        prepare(model_plan(301), data, seed=1, cache_dir=cache),
        prepare(model_plan(), data, seed=2, cache_dir=cache),
        prepare(model_plan(tokenizer=saved), data, seed=1, cache_dir=cache),
        prepare(model_plan(chat_template=longer), data, seed=1, cache_dir=cache),
        prepare(model_plan(), data_plan(train, supervise="last"), seed=1, cache_dir=cache),
        prepare(model_plan(), data_plan(train, packing=False), seed=1, cache_dir=cache),
    ]
    write(train, rows(0, 61))
    others.append(prepare(model_plan(), data, seed=1, cache_dir=cache))
    assert len({facts.folder for facts in [first, *others]}) == 8
    hashes = [facts.content_hash for facts in others]
    # The seed, the tokenizer's way in and `last` on single turns change no token; the rest does.
    assert [facts_hash == first.content_hash for facts_hash in hashes] == [False, True, True, False, True, False, False]
    assert others[5].train_rows == others[5].train_documents


def test_held_out_rows_stay_when_rows_are_added(tmp_path: Path) -> None:
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    write(few, rows(0, 100) + rows(0, 20))  # twenty of them twice
    write(many, rows(0, 100) + rows(0, 20) + rows(100, 200))
    kept = plans.clean_plan(duplicates="keep")
    one = prepare(model_plan(), data_plan(few, clean=kept), seed=1, cache_dir=tmp_path / "cache")
    two = prepare(model_plan(), data_plan(many, clean=kept), seed=9, cache_dir=tmp_path / "cache")
    held_out = {int(place.split(":")[1]) for place in places(one.folder, Set.EVAL)}
    later = {int(place.split(":")[1]) for place in places(two.folder, Set.EVAL)}
    assert held_out == {line for line in later if line <= 120}
    assert len(held_out) == one.eval_documents > 0
    assert {line for line in held_out if line <= 20} == {line - 100 for line in held_out if line > 100}
    assert not places(one.folder, Set.EVAL) & places(one.folder, Set.TRAIN)


def test_evaluation_from_files_of_its_own(tmp_path: Path) -> None:
    train, other = write(tmp_path / "train.jsonl", rows(0, 50)), write(tmp_path / "eval.jsonl", rows(50, 60))
    facts = prepare(
        model_plan(), data_plan(train, evaluation=other, eval_split=None), seed=1, cache_dir=tmp_path / "cache"
    )
    assert (facts.train_documents, facts.eval_documents) == (50, 10)
    assert places(facts.folder, Set.EVAL) == {f"{other}:{line}" for line in range(1, 11)}


def test_dropped_rows_are_counted_and_listed(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    long = {"question": "Why?", "answer": "Because " * 200}
    asked = {"question": "Why? " * 200, "answer": "So."}
    good = [json.dumps(row) for row in rows(0, 50)]
    train.write_text("\n".join([*good, "{", '{"question": "a"}', json.dumps(long), json.dumps(asked)]) + "\n")
    facts = prepare(
        model_plan(), data_plan(train, on_bad_row="drop", eval_split=None), seed=1, cache_dir=tmp_path / "cache"
    )
    assert facts.train_documents == 50
    assert facts.dropped == {"bad row": 2, "too long": 2}
    listed = lines(Path(facts.folder) / "dropped.jsonl")
    assert [(row["where"], row["reason"]) for row in listed] == [
        (f"{train}:51", "bad row"),
        (f"{train}:52", "bad row"),
        (f"{train}:53", "too long"),
        (f"{train}:54", "too long"),
    ]
    assert listed[0]["detail"].startswith("not JSON: ")
    assert "data.max_length is 128" in listed[2]["detail"]

    cut = data_plan(train, on_bad_row="drop", eval_split=None, too_long="truncate_end")
    facts = prepare(model_plan(), cut, seed=1, cache_dir=tmp_path / "cache")
    # The long answer keeps its beginning; the long question has no answer left within the limit.
    assert facts.train_documents == 51
    assert facts.dropped == {"bad row": 2, "nothing supervised": 1}
    assert notes(facts)["truncated"] == 2
    documents = Documents(facts.folder)
    assert documents.lengths.max() == 128
    assert documents.where(50) == f"{train}:53"


@pytest.mark.parametrize(
    ("content", "changes", "message", "hint"),
    [
        ("", {}, "{path}: no rows in it", "one JSON object a line"),
        ('{"question": "a", "answer": "b"}\n{"question"\n', {}, "{path}:2: not JSON", "on_bad_row=drop"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', {}, "{path}:1: no assistant turn", "role is assistant"),
        ('{"words": "a"}\n', {}, "{path}:1: the format cannot be told", "known formats"),
        ('{"words": "a"}\n{\n', {"on_bad_row": "drop"}, "{path}:1: the format cannot be told", "known formats"),
        (
            '{"question": "a"}\n{"question": "b"}\n',
            {"on_bad_row": "drop", "train_format": "question_answer", "eval_split": None},
            "no training row is left; dropped: 2 bad row",
            "the first: ",
        ),
        (
            '{"question": "a", "answer": "b"}\n' * 3,
            {"max_length": 4, "eval_split": None},
            "no training row is left; dropped: 2 duplicate, 1 too long",
            "the shortest has 1",
        ),
        (
            '{"question": "a", "answer": "b"}\n',
            {"max_length": 4, "too_long": "stop", "eval_split": None},
            "{path}:1: 1",
            "data.too_long to drop, truncate_end",
        ),
        (
            '{"question": "a", "answer": "b"}\n',
            {"max_length": 4, "too_long": "truncate_end", "eval_split": None},
            "no training row is left; dropped: 1 nothing supervised",
            "no supervised token in its first 4 tokens",
        ),
        ('{"question": "a", "answer": "b"}\n', {"eval_split": 1.0}, "no training row is left: ", "hold out less"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, content: str, changes: dict[str, Any], message: str, hint: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        prepare(model_plan(), data_plan(path, **changes), seed=1, cache_dir=tmp_path / "cache")
    assert error.value.message.startswith(message.format(path=path))
    assert hint in str(error.value.hint)
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"] == []


def test_what_else_stops_it(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(0, 20))
    with pytest.raises(DataError, match="no such file"):
        prepare(model_plan(), data_plan(tmp_path / "none.jsonl"), seed=1, cache_dir=tmp_path)
    with pytest.raises(DataError, match="names no file"):
        prepare(model_plan(), data_plan(train).model_copy(update={"train": ()}), seed=1, cache_dir=tmp_path)
    with pytest.raises(ModelError, match="vocab_size is 10"):
        prepare(model_plan(10), data_plan(train), seed=1, cache_dir=tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        prepare(model_plan(tokenizer=str(tmp_path / "none")), data_plan(train), seed=1, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        prepare(model_plan(), data_plan(train), seed=1, cache_dir=tmp_path / "file" / "cache")


def test_two_at_once_make_one_folder(tmp_path: Path) -> None:
    data = data_plan(write(tmp_path / "train.jsonl", rows(0, 100)))
    found: list[DataFacts] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(model_plan(), data, seed=1, cache_dir=tmp_path / "c")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len([entry for entry in (tmp_path / "c").iterdir() if entry.is_dir()]) == 1


@pytest.mark.skipif(not GSM8K.exists(), reason="real data is not here: ../shared/data/gsm8k")
def test_gsm8k(tmp_path: Path) -> None:
    data = data_plan(GSM8K / "train.jsonl", eval_split=0.02, max_length=2048)
    facts = prepare(model_plan(4096), data, seed=17, cache_dir=tmp_path)
    assert facts.train_documents + facts.eval_documents == 7473
    assert 1 - facts.train_tokens / (facts.train_rows * 2048) <= 0.01


@pytest.mark.skipif(not SENTIMENT.exists(), reason="real data is not here: ../shared/data/sentiment")
def test_completions_that_end_in_a_spelled_out_end(tmp_path: Path) -> None:
    facts = prepare(
        model_plan(),
        data_plan(SENTIMENT, SENTIMENT, max_length=2048, clean=plans.clean_plan(overlap="keep")),
        seed=1,
        cache_dir=tmp_path,
    )
    assert notes(facts)["end_markers_removed"] == 200
    assert {row["answer"] for row in lines(Path(facts.folder) / "test.jsonl")} == {"positive"}
    documents = Documents(facts.folder)
    assert all((documents.input_ids(i) == 0).sum() == 1 for i in range(len(documents)))
