"""What a user may write under `data`: where rows come from, which are used, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from launcher.recipe.section import Auto, Fraction, Section

SourceFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "classification",
    "self_instruct",
    "text",
]

WORDING_PARTS = ("instruction", "input")
"""What `data.augment.wordings` may name: the parts of alpaca, classification and self_instruct rows."""


class Source(Section):
    """Rows of one kind: a file, a folder, a glob, a URL or a data set on the hub."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, each also as .gz, .bz2, .xz or .zst), a folder of such
    files or one written by `datasets.save_to_disk`, a glob, a URL that fsspec knows (`s3://...`), or a Hugging Face hub
    id. Looked up beside the recipe, then in the current directory."""
    format: SourceFormat = "auto"
    """`auto` tells the format from the columns and says which it took."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where the columns have other names: `{prompt: question_text, completion: best_answer}`."""
    split: str | None = None
    """Which split of a folder or hub id that holds several."""
    subset: str | None = None
    """Which configuration of a hub id that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the Plan pins it to a commit."""
    limit: PositiveInt | None = None
    """Take only the first rows."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row comes in an epoch: 2 is twice; 0.5 takes half of the rows, chosen by a hash of each."""
    system: str | None = None
    """System prompt for rows that have none."""
    instruction: str | None = None
    """What a `classification` row is asked, before its text: `Is this review positive or negative?`."""
    labels: tuple[str, ...] = ()
    """Words for the numbered labels of a `classification` source: `[negative, positive]`. A head's outputs are in their
    order."""


class HeldOut(Section):
    """Rows that are never trained on."""

    split: Fraction | None = None
    """This share of the training rows, chosen by a hash of each row, so that adding rows moves none."""
    rows: PositiveInt | None = None
    """So many of the training rows, those with the lowest hashes."""
    sources: tuple[Source, ...] = ()
    """Files of their own, instead of training rows."""


class Clean(Section):
    """Which training rows are left out. Each one is listed with its reason, and counted in the report."""

    duplicates: Literal["drop", "keep"] = "drop"
    """Rows with the same words as an earlier one."""
    near_duplicates: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Leave out a row that shares at least this much of its words with an earlier one: the Jaccard similarity of their
    word 5-grams, estimated by MinHash, such as 0.8. Needs the extra `clean`."""
    overlap: Literal["drop", "keep", "stop"] = "drop"
    """Training rows that ask what a held-out row asks."""
    contamination: tuple[Source, ...] = ()
    """Benchmarks that must stay unseen: a row that shares 13 words in a row with one of theirs is left out."""
    min_tokens: PositiveInt | None = None
    """Fewest tokens of a row."""
    max_chars: PositiveInt | None = None
    """Most characters of a row; a guard against whole books in one field."""
    languages: tuple[str, ...] = ()
    """Keep only rows in these languages (ISO 639-1, such as `en`). Needs the extra `clean`."""
    include: str | None = None
    """Keep only rows in whose text this regular expression is found."""
    exclude: tuple[str, ...] = ()
    """Leave out rows in whose text one of these regular expressions is found."""
    mend_encoding: bool = False
    """Undo text that was read in the wrong encoding (`cafÃ©`), and normalize to NFC. Mended rows are counted."""


class Replay(Section):
    """Rows of what the model learned earlier, mixed in so that it does not forget it."""

    sources: tuple[Source, ...]
    """Where they come from."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of all documents of an epoch, once rows are cleaned and what is too long is left out; chosen by a hash of each,
    repeated where there are too few."""


class Augment(Section):
    """Variations of training rows, drawn from a hash of each row and the seed. Held-out rows are never varied."""

    function: str | None = None
    """`file.py:name` of a function of your own, from a list of messages and a seeded `random.Random` to a list of
    messages, or to None to leave the row out. The file is looked up beside the recipe."""
    wordings: tuple[str, ...] = ()
    """Ways to put an alpaca or classification row's parts, one drawn for each row: `"{instruction}\\n\\n{input}"`."""
    truncate_turns: Fraction = 0.0
    """Share of conversations of several answers that are cut after one of them."""
    drop_system: Fraction = 0.0
    """Share of rows whose system prompt is left out."""


class Data(Section):
    """What is trained on."""

    train: tuple[Source, ...] = ()
    """Training conversations."""
    eval: HeldOut = HeldOut()
    """Held-out rows whose loss is measured while training."""
    test: HeldOut = HeldOut()
    """Held-out rows that the model answers in words before and after training (`evaluate.generate`)."""
    label: str | None = None
    """Column with each row's class, for `stratify`, `balance` and sequence classification; `classification` rows have
    theirs already."""
    group: str | None = None
    """Column whose value keeps rows together: all of a group are held out, or none."""
    stratify: bool = False
    """Hold out the same share of every class."""
    balance: Literal["none", "weights", "oversample", "undersample"] = "none"
    """What is done where classes differ in size. `weights`: each class has the same weight in the loss; `oversample`:
    rows of rare classes come several times an epoch; `undersample`: rows of frequent classes are left out."""
    replay: Replay | None = None
    """Rows of what the model learned earlier, mixed in."""
    clean: Clean = Clean()
    augment: Augment = Augment()
    max_length: PositiveInt = 2048
    """Tokens in a row, at most."""
    packing: bool = True
    """Put several conversations into one row of `max_length` tokens; they never see each other. Off in a sequence
    classification, whose head reads one document a row."""
    too_long: Literal["drop", "truncate_end", "truncate_start", "split", "stop"] = "drop"
    """What happens to a conversation of more than `max_length` tokens: left out, cut at an end, or cut into several
    documents. Each is counted and listed."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """What happens to a row that is no JSON or has no assistant turn. Dropped rows are counted and listed."""
    supervise: Literal["all", "last", "marked"] = "all"
    """Which assistant turns are learned: all but those that a row marks `train: false` or `weight: 0`, the last, or
    only those that a row marks `train: true` or `weight: 1`."""
    special_tokens: Literal["text", "strip"] = "text"
    """What becomes of a control token that is spelled out in a message, such as `<|im_start|>`: the text that it is
    written as, or nothing. Never the control token."""
    system_turns: Literal["keep", "merge", "drop"] = "keep"
    """System prompts, for chat templates that know none: `merge` puts them before the first user's words."""
    workers: PositiveInt | Auto = "auto"
    """Processes that prepare the data on this machine; `auto`: one for little data, otherwise one a CPU core."""
    prepare_on: Literal["auto", "machine", "cluster"] = "auto"
    """Where the data is tokenized: on this machine, or with Ray Data over the cluster. `auto`: on the cluster where one
    is joined (`--address`) and the training files hold more than 8 GiB."""
