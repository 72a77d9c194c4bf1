"""E3: the sequence of global batches is a function of (data, seed, global batch size); nothing is padded or lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.data.loader import EvalData, MicroBatch, TestRows, TrainData
from launcher.data.masks import Document
from launcher.plan.batch import batch_layout
from tests.prepared import write_prepared

NUM_DOCUMENTS, CAPACITY = 90, 64


def document(index: int, num_tokens: int) -> Document:
    """Tokens that name their document and place; the second half is supervised, and so is the first token."""
    input_ids = np.arange(num_tokens, dtype=np.int32) + 1000 * index
    supervised = (np.arange(num_tokens) >= num_tokens // 2).astype(np.uint8)
    supervised[0] = 1
    return Document(input_ids, supervised)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [document(index, 2 + index * 37 % 38) for index in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="module")
def packs(documents: list[Document]) -> list[list[int]]:
    from launcher.data.pack import best_fit

    return [pack.tolist() for pack in best_fit(np.array([len(d.input_ids) for d in documents]), CAPACITY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[Document], packs: list[list[int]]) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_prepared(folder, documents, documents, packs)
    with (folder / "test.jsonl").open("w") as stream:
        for i in range(3):
            stream.write(json.dumps({"where": f"t:{i}", "prompt_text": "é?", "prompt_ids": [i], "answer": "a"}) + "\n")
    return folder


def places(batches: list[MicroBatch]) -> list[str]:
    return sorted(place for batch in batches for place in batch.where)


def flat(batches: list[MicroBatch]) -> list[int]:
    return [token for batch in batches if batch.num_tokens for token in batch.input_ids[0].tolist()]


def step_of(data: TrainData, step: int, global_batch: int, micro: int, world: int) -> list[MicroBatch]:
    """A step's micro batches over all ranks, in slot order."""
    layout = batch_layout(global_batch, micro, world)
    per_rank = [list(data.micro_batches(step, layout, rank)) for rank in range(world)]
    assert [len(batches) for batches in per_rank] == [layout.num_micro_steps] * world
    return [per_rank[rank][micro_step] for micro_step in range(layout.num_micro_steps) for rank in range(world)]


@pytest.mark.parametrize("global_batch", [4, 6, 7])
def test_e3_same_rows_at_any_number_of_ranks_and_any_micro_batch(folder: Path, global_batch: int) -> None:
    data = TrainData(folder, global_batch, seed=17)
    for step in (0, 1, data.steps_per_epoch - 1, data.steps_per_epoch + 2):
        batch = data.global_batch(step)
        alone = places(step_of(data, step, global_batch, global_batch, 1))
        for world in (1, 2, 3, 4):
            for micro in (1, 2, 3, 8):
                batches = step_of(data, step, global_batch, micro, world)
                assert places(batches) == alone, (step, world, micro)
                assert sum(len(b.targets) for b in batches) == batch.supervised_tokens
                assert sum(b.num_tokens for b in batches) == batch.tokens


def test_e3_an_epoch_is_every_row_once_in_an_order_of_the_seed(folder: Path, packs: list[list[int]]) -> None:
    data = TrainData(folder, 4, seed=17)
    assert data.num_rows == len(packs)
    assert data.steps_per_epoch == -(-len(packs) // 4)
    epochs = []
    for epoch in range(3):
        batches = [data.global_batch(epoch * data.steps_per_epoch + i) for i in range(data.steps_per_epoch)]
        assert {batch.epoch for batch in batches} == {epoch}
        assert [len(batch.rows) for batch in batches[:-1]] == [4] * (data.steps_per_epoch - 1)
        rows = [row for batch in batches for row in batch.rows]
        assert sorted(rows) == list(range(len(packs)))
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    # Asked in any order, from a fresh reader, with another batch size: the same rows in the same order of batches.
    again = TrainData(folder, 8, seed=17)
    later = [set(again.global_batch(again.steps_per_epoch + i).rows) for i in reversed(range(again.steps_per_epoch))]
    assert list(reversed(later)) == [set(epochs[1][start : start + 8]) for start in range(0, len(packs), 8)]
    assert TrainData(folder, 4, seed=18).global_batch(0).rows != data.global_batch(0).rows


def test_the_order_is_the_same_on_every_machine(folder: Path) -> None:
    # Philox is specified (Salmon et al., 2011); these numbers must not change, or a resumed run would see other rows.
    draws = np.random.Philox(key=np.array([17, 0], dtype=np.uint64)).random_raw(2)
    assert draws.tolist() == [5789060593502342483, 7726179307141663495]
    assert set(TrainData(folder, 8, seed=17).global_batch(0).rows) == {16, 7, 20, 13, 28, 4, 3, 2}


def test_ranks_get_rows_that_cost_alike(tmp_path: Path) -> None:
    """Packs of as many tokens, some of one long document and some of many short ones."""
    long, short = document(0, 512), [document(index, 16) for index in range(1, 33)]
    packs = [[0] if i % 2 else list(range(1, 33)) for i in range(16)]
    write_prepared(tmp_path, [long, *short], packs=packs)
    data = TrainData(tmp_path, 16, seed=3)
    for micro in (1, 2, 4):
        layout = batch_layout(16, micro, 4)
        per_rank = [list(data.micro_batches(0, layout, rank)) for rank in range(4)]
        for at_once in zip(*per_rank, strict=True):
            longest = [sorted(batch.cu_seqlens.diff().tolist())[-1] for batch in at_once]
            assert len(set(longest)) == 1, "one rank would wait for another that attends over a long document"


def test_weights_reach_the_targets(tmp_path: Path) -> None:
    documents = [document(index, 10) for index in range(4)]
    write_prepared(tmp_path, documents, weights=[0.5, 2.0, 1.0, 0.5])
    data = TrainData(tmp_path, 4, seed=3)
    (batch,) = data.micro_batches(0, batch_layout(4, 4, 1), 0)
    assert batch.weights is not None
    expected = {"train.jsonl:1": 0.5, "train.jsonl:2": 2.0, "train.jsonl:3": 1.0, "train.jsonl:4": 0.5}
    assert batch.weights.tolist() == [expected[place] for place in batch.where for _ in range(5)]
    assert data.global_batch(0).weight == 5 * 4.0
    write_prepared(tmp_path / "alike", documents)
    assert next(TrainData(tmp_path / "alike", 4, seed=3).micro_batches(0, batch_layout(4, 4, 1), 0)).weights is None


def test_a_micro_batch_is_its_documents_end_to_end(
    folder: Path, documents: list[Document], packs: list[list[int]]
) -> None:
    data = TrainData(folder, 4, seed=1)
    (batch,) = data.micro_batches(0, batch_layout(4, 4, 1), 0)
    expected = [documents[index] for row in data.global_batch(0).rows for index in packs[row]]
    lengths = [len(d.input_ids) for d in expected]
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(lengths))
    assert batch.input_ids[0].tolist() == [i for d in expected for i in d.input_ids.tolist()]
    assert batch.position_ids[0].tolist() == [i for length in lengths for i in range(length)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.max_seqlen == max(lengths)
    assert batch.num_tokens == sum(lengths)
    assert batch.where == tuple(f"train.jsonl:{index + 1}" for row in data.global_batch(0).rows for index in packs[row])
    # A target is the next token of the same document; a document's first token, though supervised, has none before it.
    assert batch.supervised_index.dtype == batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == batch.input_ids[0][batch.supervised_index + 1].tolist()
    assert batch.targets.tolist() == [i for d in expected for i in d.input_ids[1:][d.supervised[1:] == 1].tolist()]
    assert (batch.input_ids[0][batch.supervised_index] // 1000).tolist() == (batch.targets // 1000).tolist()
    batch.input_ids[0, 0] = 7  # tensors are the rank's own, not views of the mapped file


def test_an_empty_slot_is_the_first_row_s_smallest_document_without_targets(
    folder: Path, documents: list[Document], packs: list[list[int]]
) -> None:
    data = TrainData(folder, 4, seed=1)
    layout = batch_layout(4, 1, 3)  # two micro steps of three slots for four rows
    batches = [list(data.micro_batches(0, layout, rank)) for rank in range(3)]
    assert [[b.num_tokens > 0 for b in of_rank] for of_rank in batches] == [[True, True], [True, False], [True, False]]
    empty = batches[2][1]
    smallest = min(packs[data.global_batch(0).rows[0]], key=lambda i: len(documents[i].input_ids))
    assert empty.input_ids[0].tolist() == documents[smallest].input_ids.tolist()
    assert (len(empty.targets), len(empty.supervised_index), empty.num_tokens, empty.where) == (0, 0, 0, ())
    assert empty.cu_seqlens.tolist() == [0, len(documents[smallest].input_ids)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_every_document_once(folder: Path, documents: list[Document], world: int) -> None:
    data = EvalData(folder)
    per_rank = [list(data.micro_batches(100, world, rank)) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1
    batches = [batch for of_rank in per_rank for batch in of_rank]
    assert sorted(flat(batches)) == sorted(i for d in documents for i in d.input_ids.tolist())
    assert max(batch.num_tokens for batch in batches) <= 100
    assert sum(len(batch.targets) for batch in batches) == data.supervised_tokens
    assert data.supervised_tokens == sum(d.num_targets for d in documents)
    assert sum(batch.num_tokens == 0 for batch in batches) < world


def test_evaluation_of_few_rows_and_of_long_ones(folder: Path, tmp_path: Path) -> None:
    few = EvalData(folder, max_rows=5)
    assert few.num_documents == 5
    places = [place for batch in few.micro_batches(1000, 1, 0) for place in batch.where]
    assert sorted(places) == [f"eval.jsonl:{i}" for i in range(1, 6)]
    assert all(len(batch.where) <= 1 for batch in few.micro_batches(1, 2, 1))
    write_prepared(tmp_path, [])
    nothing = EvalData(tmp_path)
    assert (nothing.num_documents, nothing.supervised_tokens, list(nothing.micro_batches(100, 2, 1))) == (0, 0, [])


def test_test_rows(folder: Path) -> None:
    assert len(TestRows(folder)) == 3
    two = TestRows(folder, limit=2)
    assert [row.where for row in two] == ["t:0", "t:1"]
    assert (two[1].prompt_text, two[1].prompt_ids, two[1].answer) == ("é?", [1], "a")


def test_the_loader_imports_no_tokenizer() -> None:
    script = "import sys, launcher.data.loader; print([n for n in ('transformers', 'datasets') if n in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
