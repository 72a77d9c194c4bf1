"""`slipway data`: what it shows in a terminal, as JSON and as a page is what lies in the prepared folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from launcher.cli import render
from launcher.cli.app import main
from launcher.data.loader import EvalData, MicroBatch, TestRows, TrainData
from launcher.data.prepare.findings import findings
from launcher.data.prepare.report import (
    Duplicates,
    LabelReport,
    Report,
    SourceReport,
    build,
    describe_long,
    describe_packs,
    describe_set,
)
from launcher.errors import UserError
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import DataFacts
from launcher.report.data_page import page
from launcher.report.data_parts import MOST_TOKENS
from launcher.report.data_rows import Piece, Row, ShownDocument, Words, dropped_rows, rows
from launcher.report.markup import write
from launcher.report.text import visible
from tests.plans import data_plan

RECIPE = """
model: {scratch: {model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
                  num_key_value_heads: 1, vocab_size: 400, max_position_embeddings: 256}}
data: {train: [{path: rows.jsonl}], test: {sources: [{path: test.jsonl}]}, eval: {split: 0.3}, max_length: 200,
       on_bad_row: drop}
train: {max_steps: 2, global_batch_size: 2, micro_batch_size: 1, seed: 3}
"""
ASKED = "<b>bold</b> & [red]markup[/red] :smile: <|endoftext|> spelled out  \n\x1b[31mred\x1b[0m \u202eevil"
ANSWERED = "مرحبا 你好 😀 café<br />\n\nyes"
SEED = 3


def turns(*words: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(words)]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its rows and its prepared data."""
    folder = tmp_path_factory.mktemp("data")
    many = [turns(f"Add {n} and {n}, please.", f"That is {2 * n}." + " Yes!" * (n % 9)) for n in range(60)]
    many += [turns(f"Say {word}.", word, "And again?", f"{word} again") for word in ("tree", "house", "river")]
    good = [json.dumps(row) for row in [*many, turns(ASKED, ANSWERED), turns("Why?", "Because " * 200)]]
    lines = [*good, json.dumps(turns("no answer")), "{broken"]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    tests = [json.dumps(turns(f"Add {n} and 1?", f"That is {n + 1}.")) for n in range(100, 104)]
    (folder / "test.jsonl").write_text("\n".join(tests) + "\n")
    (folder / "x.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(work)
    monkeypatch.setenv("NO_COLOR", "1")
    render.out.cache_clear()
    yield
    render.out.cache_clear()


@pytest.fixture
def facts(work: Path, capsys: pytest.CaptureFixture[str]) -> DataFacts:
    """Of the prepared data, with the report that `measured` makes."""
    found = DataFacts.model_validate(json.loads(said(capsys, "--json"))["facts"])
    measured(found).save(Path(found.folder) / "report.json")
    return found


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints on stdout."""
    capsys.readouterr()
    assert main(["data", "x.yaml", *arguments]) == 0
    return capsys.readouterr().out


def train_batches(folder: str) -> list[MicroBatch]:
    data = TrainData(folder, 1, SEED)
    return [next(data.micro_batches(step, BatchLayout(1, 1, 1), 0)) for step in range(data.num_rows)]


class Stored(NamedTuple):
    """A document as it lies in the prepared folder."""

    where: str
    ids: list[int]
    learned: list[bool]

    @property
    def stretches(self) -> list[list[int]]:
        """Token ids that are learned, neighbours together."""
        runs = groupby(zip(self.ids, self.learned, strict=True), key=lambda token: token[1])
        return [[token for token, _ in run] for learned, run in runs if learned]


def stored(batches: list[MicroBatch]) -> list[Stored]:
    found = []
    for batch in batches:
        ids = batch.input_ids[0].tolist()
        learned = [False] * len(ids)
        for position in batch.supervised_index.tolist():
            learned[position + 1] = True
        for where, (start, stop) in zip(batch.where, pairwise(batch.cu_seqlens.tolist()), strict=True):
            found.append(Stored(where, ids[start:stop], learned[start:stop]))
    return found


def measured(facts: DataFacts) -> Report:
    """A report of what lies in the prepared folder."""
    train, held_out = train_batches(facts.folder), list(EvalData(facts.folder).micro_batches(1, 1, 0))
    described = []
    for documents in (stored(train), stored(held_out)):
        lengths, targets = [len(found.ids) for found in documents], [sum(found.learned) for found in documents]
        described.append(describe_set(np.array(lengths), np.array(targets), np.ones(len(lengths), int), 200))
    prompts = np.array([len(row.prompt_ids) for row in TestRows(facts.folder)])
    return build(
        key=Path(facts.folder).name,
        data=data_plan(max_length=200),
        sources=[
            SourceReport(
                path=path, role="test" if "test" in path else "train", format=kind, rows=64, used=61, dropped={}
            )
            for path, kind in facts.formats.items()
        ],
        train=described[0],
        held_out=described[1],
        test=describe_set(prompts, None, None, 200),
        long=describe_long([413], 65, 200),
        packs=describe_packs(
            np.array([batch.num_tokens for batch in train]), np.array([len(batch.where) for batch in train]), 200
        ),
        duplicates=Duplicates(exact=31),
        labels={"négative <b>": LabelReport(rows=3, copies=6, weight=1.5)},
        notes={"end_markers_removed": 4321, "a new_note": 17},
        seconds={"read": 0.5, "tokenize": 1.5},
        workers=2,
    ).model_copy(update={"dropped": facts.dropped})


def test_every_learned_word_is_marked_and_nothing_else(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--rows", "1000")
    words = Words(Path(facts.folder))
    shown = re.findall(r"^--- ([^,]+), (\d+) tokens, (\d+) learned.*\n((?:(?!---|===).*\n)*)", out, re.MULTILINE)
    documents = stored(train_batches(facts.folder))
    assert len(shown) == len(documents) == facts.train_documents
    for (place, num_tokens, num_learned, text), document in zip(shown, documents, strict=True):
        assert place == Path(document.where).name
        assert (int(num_tokens), int(num_learned)) == (len(document.ids), sum(document.learned))
        assert re.findall(">>(.*?)<<", text, re.DOTALL) == [words.text(ids) for ids in document.stretches]


def test_packs_show_their_borders(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--rows", "2")
    batch = train_batches(facts.folder)[0]
    assert out.startswith(f"=== a row of {len(batch.where)} documents, {batch.num_tokens} tokens\n")
    assert len(re.findall(r"^--- rows.jsonl:\d+, \d+ tokens, \d+ learned$", out, re.MULTILINE)) >= len(batch.where)
    assert said(capsys, "--rows", "0").startswith("\ndocuments\n")


def test_find_shows_the_odd_row_and_obeys_nothing_in_it(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    which = odd_set(facts)
    out = said(capsys, "--find", "[RED]MARKUP", "--set", which)
    head, _, body = out.partition("\n")
    assert re.fullmatch(r"--- rows.jsonl:64, \d+ tokens, \d+ learned, spelled out in it: <\|endoftext\|>", head)
    assert body == (
        "### Instruction:\n<b>bold</b> & [red]markup[/red] :smile: \\<|endoftext|> spelled out··\n"
        "\\x1b[31mred\\x1b[0m \\u202eevil\n\n### Response:\n"
        ">>مرحبا 你好 😀 café<br />\n\nyes<|endoftext|><<\n"
    )
    assert said(capsys, "--find", "rows.jsonl:64", "--set", which) == out, "a place is found as well"


def odd_set(facts: DataFacts) -> str:
    """Which set the odd row is in."""
    places = {place for batch in train_batches(facts.folder) for place in batch.where}
    return "train" if any(place.endswith("rows.jsonl:64") for place in places) else "eval"


def test_find_finds_nothing(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "x.yaml", "--find", "nowhere"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: no document of this set holds 'nowhere'\n")


def test_colour_takes_the_place_of_marks(
    facts: DataFacts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    render.out.cache_clear()
    out = said(capsys, "--find", "spelled out", "--set", odd_set(facts))
    assert ">>" not in out
    green, control = "\x1b[32m", "\x1b[7;32m<|endoftext|>\x1b[0m"
    assert f"{green}مرحبا 你好 😀 café<br />\x1b[0m" in out
    assert f"{green}yes\x1b[0m{control}" in out
    assert ":smile: <|endoftext|> spelled out\x1b[2m··\x1b[0m\n" in out, "spelled out it is plain, its end visible"
    assert "\\x1b[31mred" in out


def test_held_out_and_test_rows(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = said(capsys, "--set", "eval", "--rows", "2")
    assert held_out.count("### Response:") == 2
    out = said(capsys, "--set", "test", "--rows", "1")
    assert out.startswith("--- test.jsonl:1, ")
    assert "### Response:↵\n--- expected answer\nThat is 101.\n" in out
    assert ">>" not in out


def test_dropped_rows_with_their_reasons(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--dropped")
    assert f"3 of 3 rows that were left out; all are in {facts.folder}/dropped.jsonl\n" in out
    assert re.search(r"^rows.jsonl:65: too long: \d+ tokens, and data.max_length is 200$", out, re.MULTILINE)
    assert re.search(r"^rows.jsonl:66: bad row: ", out, re.MULTILINE)
    assert re.search(r"^rows.jsonl:67: bad row: not JSON", out, re.MULTILINE)
    assert "1 of 3 rows" in said(capsys, "--dropped", "--rows", "1")
    assert "1 of 3 rows" in said(capsys, "--dropped", "--find", "MAX_LENGTH")


def test_the_statistics_are_the_report(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    out = said(capsys, "--rows", "0")
    cells = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    sets = (report.sets.train, report.sets.eval, report.sets.test)
    assert cells["documents"][0] == "documents"
    assert re.search(r"^documents +" + " +".join(str(part.documents) for part in sets) + "$", out, re.MULTILINE)
    assert cells["supervised share"][2:] == [f"{part.supervised_share:.1%}" for part in sets[:2]] + ["-"]
    lengths = report.sets.train.lengths
    assert lengths is not None
    assert cells["training"][1:] == [
        *(str(n) for n in (lengths.min, lengths.p10, lengths.p50, lengths.p90, lengths.p99, lengths.max)),
        f"{lengths.mean:.1f}",
    ]
    assert report.packs is not None
    assert cells["padding"][1] == f"{report.packs.padding_share:.2%}"
    assert re.search(r"^too long +1  rows.jsonl:65: \d+ tokens", out, re.MULTILINE)
    assert re.search(r"^négative <b> +3 +100.0% +6 +1.5$", out, re.MULTILINE)
    assert re.search(r"^answers from whose end a spelled-out end of text was taken +4,321$", out, re.MULTILINE)
    assert re.search(r"^a new_note +17$", out, re.MULTILINE)
    for finding in findings(report):
        assert f"\n- {finding}\n" in out
    assert "prepared in 2.0s by 2 processes (read 0.5s, tokenize 1.5s)" in out
    charts = re.findall(r"^ *[\d,]+(?:-[\d,]+)?  [█▏▎▍▌▋▊▉]* +([\d,]+) +[\d.]+%(?: +[\d.]+%)?$", out, re.MULTILINE)
    assert sum(map(int, charts)) == 2 * report.sets.train.documents + report.long.over + report.packs.rows


@pytest.mark.parametrize("width", [80, 120])
def test_charts_fit_the_terminal(
    facts: DataFacts, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = said(capsys, "--rows", "0").splitlines()
    assert max(len(line) for line in lines if "█" in line) <= width


def test_ascii_where_nothing_else_can_be_shown(
    facts: DataFacts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "ascii_only", lambda: True)
    out = said(capsys, "--rows", "0")
    assert "####" in out
    assert "█" not in out


def test_without_a_report_the_facts_are_shown(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(facts.folder) / "report.json").unlink()
    assert main(["data", "x.yaml", "--rows", "0", "--html", "old.html"]) == 0
    assert "another version of Slipway" in capsys.readouterr().err
    assert "no statistics" in Path("old.html").read_text()
    out = said(capsys, "--rows", "0")
    assert re.search(rf"^tokens +{facts.train_tokens:,}$", out, re.MULTILINE)
    assert re.search(r"^left out: too long +1$", out, re.MULTILINE)
    value = json.loads(said(capsys, "--json"))
    assert (value["report"], value["findings"]) == (None, [])


def test_json_has_the_facts_the_report_and_the_findings(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    value = json.loads(said(capsys, "--json"))
    assert list(value) == ["facts", "report", "findings"]
    assert DataFacts.model_validate(value["facts"]) == facts
    report = Report.model_validate(value["report"])
    assert report == Report.load(Path(facts.folder) / "report.json")
    assert value["findings"] == findings(report)
    spread = ["min", "p10", "p50", "p90", "p99", "max", "mean", "histogram"]
    part = ["documents", "tokens", "supervised_tokens", "turns", "lengths", "supervised"]
    keys = {name: list(found) for name, found in value["report"].items() if isinstance(found, dict)}
    assert list(value["report"]) == [
        *("version", "key", "settings", "sources", "sets", "long", "dropped", "duplicates", "labels", "packs", "notes"),
        *("seconds", "tokens_per_s", "workers"),
    ]
    assert keys["sets"] == ["train", "eval", "test", "replay", "retain"]
    assert keys["long"] == ["conversations", "over", "longest", "histogram"]
    assert keys["duplicates"] == ["exact", "near", "overlap_with_held_out", "contaminated"]
    assert keys["packs"] == [
        *("rows", "capacity", "tokens", "padding_share", "lower_bound_rows", "mean_documents", "max_documents", "fill")
    ]
    assert list(value["report"]["sets"]["train"]) == part
    assert list(value["report"]["sets"]["train"]["lengths"]) == spread
    assert list(value["report"]["sources"][0]) == ["path", "role", "format", "rows", "used", "dropped"]
    dropped = json.loads(said(capsys, "--json", "--dropped", "--rows", "1"))["dropped"]
    assert list(dropped[0]) == ["where", "reason", "detail", "text"]


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.words: list[str] = []
        """Text of each document."""
        self.ids: list[list[int]] = []
        """Token ids of each document."""
        self.learned: list[list[int]] = []
        self.controls: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        values = dict(attrs)
        if values.get("class") == "words":
            self.words.append("")
            self.ids.append([])
            self.learned.append([])
        if tag in ("span", "b") and values.get("title"):
            ids = [int(number) for number in (values["title"] or "").split()]
            self.ids[-1] += ids
            self.learned[-1] += ids if any(name == "mark" for name, _ in self.open) else []
        if tag not in self.VOID:
            self.open.append((tag, values))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(name == "svg" for name, _ in self.open), f"<{tag}/> closes itself in SVG alone"
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if any(values.get("class") == "words" for _, values in self.open):
            self.words[-1] += data
        if self.open and self.open[-1][0] == "b" and "title" in self.open[-1][1]:
            self.controls.append(data)


def test_the_page_holds_the_same_words_ids_and_numbers(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--html", "page.html", "--rows", "1000") == "page.html\n"
    found = Page(Path("page.html").read_text(encoding="utf-8"))
    words = Words(Path(facts.folder))
    documents = stored(train_batches(facts.folder))
    assert found.ids == [document.ids for document in documents]
    assert found.words == [visible(words.text(document.ids)) for document in documents]
    assert found.learned == [
        [token for token, is_learned in zip(document.ids, document.learned, strict=True) if is_learned]
        for document in documents
    ]
    assert set(found.controls) == {"<|endoftext|>"}
    num_controls = sum(token in words.controls for document in documents for token in document.ids)
    assert len(found.controls) == num_controls, "spelled out it has no frame"
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    for number in (facts.train_documents, report.sets.train.tokens, report.sets.eval.tokens, 4321):
        assert f"{number:,}" in found.text
    for finding in findings(report):
        assert finding in found.text
    assert "rows.jsonl:65" in found.text
    assert "too long" in found.text


def test_the_page_loads_and_runs_nothing(facts: DataFacts, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "--html", "odd.html", "--find", "spelled out", "--set", odd_set(facts))
    text = Path("odd.html").read_text(encoding="utf-8")
    found = Page(text)
    assert visible(ASKED) in found.words[0], "as it was, tags and all"
    assert ANSWERED in found.words[0]
    assert not {tag for tag, _, _ in found.attributes} & {"script", "link", "img", "iframe", "object", "base"}
    assert not {name for _, name, _ in found.attributes} & {"src", "href", "style", "srcset", "action"}
    assert not any(name.startswith("on") for _, name, _ in found.attributes)
    assert ("meta", "http-equiv", "Content-Security-Policy") in found.attributes
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_a_page_of_many_tokens_says_what_it_leaves_out(facts: DataFacts) -> None:
    row: Row = (ShownDocument("a.jsonl:1", (Piece("x", (1,), False, False),) * (MOST_TOKENS + 5)),)
    found = Page(page("x", facts, None, [], "train", [row, row], []))
    assert len(found.ids[0]) == MOST_TOKENS
    assert "5 more words are not shown" in found.text
    assert "1 more rows are not shown" in found.text


def test_a_page_is_written_whole_and_over_nothing_else(work: Path, tmp_path: Path, facts: DataFacts) -> None:
    target, text = tmp_path / "page.html", page("x", facts, None, [], "train", [], [])
    write(target, text, "--html")
    write(target, text, "--html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text(encoding="utf-8") == text
    assert main(["data", "x.yaml", "--html", "x.yaml"]) == 2
    assert (work / "x.yaml").read_text() == RECIPE
    for path in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(UserError, match="cannot write"):
            write(path, text, "--html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2 has it: words begin with a mark for their space, unknown characters are bytes."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_pieces_are_the_text_token_by_token(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    words = Words(tmp_path)
    end = tokenizer.token_to_id("<|end|>")

    @settings(derandomize=True, max_examples=60, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), at=st.integers(0, 40))
    def check(text: str, at: int) -> None:
        ids = tokenizer.encode("a" + text.replace("▁", ""), add_special_tokens=False).ids
        learned = [position >= at for position in range(len(ids))]
        pieces = words.pieces([*ids, end], [*learned, True])
        assert [token for piece in pieces for token in piece.ids] == [*ids, end]
        assert [piece.learned for piece in pieces for _ in piece.ids] == [*learned, True]
        assert [piece.text for piece in pieces if piece.control] == ["<|end|>"]
        if len(set(learned)) < 2:  # a border inside a character shows what each side has of it
            assert "".join(piece.text for piece in pieces[:-1]).removeprefix(" ") == words.text(ids)

    check()


def test_rows_come_in_the_order_of_the_first_epoch(facts: DataFacts) -> None:
    folder = Path(facts.folder)
    found = [[document.where for document in row] for row in rows(folder, "train", SEED, 10**6)]
    assert found == [[Path(where).name for where in batch.where] for batch in train_batches(facts.folder)]
    assert len(list(rows(folder, "train", SEED, 2))) == 2
    assert list(rows(folder, "train", SEED, 0)) == []
    assert len(list(rows(folder, "eval", SEED, 10**6))) == facts.eval_documents
    assert {row.where for row in dropped_rows(folder)} == {"rows.jsonl:65", "rows.jsonl:66", "rows.jsonl:67"}
