"""What is said about a recipe that is wrong, word for word."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from launcher.errors import RecipeError, UserError
from launcher.recipe.load import load

GOOD = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(text: str, *overrides: str, name: str = "x.yaml") -> str:
    """The problems as the command prints them."""
    Path(name).write_text(text)
    with pytest.raises(RecipeError) as raised:
        load(name, overrides)
    assert raised.value.exit_code == 2
    lines = [
        f"{problem}\n  hint: {problem.hint}" if problem.hint else str(problem) for problem in raised.value.problems
    ]
    return "\n".join(lines)


def test_three_errors_at_once_in_the_order_of_the_file() -> None:
    text = GOOD + "optimizer:\n  lr_rate: 1\ntrain:\n  epochs: many\n  max_time: 3 weeks\n"
    assert report(text) == (
        "x.yaml:4: optimizer.lr_rate: unknown key\n"
        "  hint: did you mean lr?\n"
        "x.yaml:6: train.epochs: expected a number, got the text 'many'\n"
        "x.yaml:7: train.max_time: '3 weeks' is no length of time\n"
        "  hint: write it as 90s, 30m, 2h or 1h30m"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optimiser: {lr: 1}", "optimiser: unknown key\n  hint: did you mean optimizer?"),
        ("train: {lr: 1}", "train.lr: unknown key\n  hint: did you mean optimizer.lr?"),
        ("optimizer: {learning_rate: 1}", "optimizer.learning_rate: unknown key\n  hint: did you mean optimizer.lr?"),
        (
            "schedule: {foo: 1}",
            "schedule.foo: unknown key\n  hint: the keys of schedule are kind, warmup, min_lr_ratio",
        ),
        (
            "logging: {trackers: [wandb, wandb]}",
            "logging.trackers: 'wandb' is given twice\n  hint: name each tracker once",
        ),
        (
            "logging: {trackers: [tensorboard], project: mine}",
            "logging.project: W&B's project and MLflow's experiment, and neither is in logging.trackers\n"
            "  hint: add wandb or mlflow to logging.trackers, or leave it out",
        ),
        ("zzz: 1", "zzz: unknown key\n  hint: `slipway recipes schema` lists every key"),
        (
            "train: {seed: '3'}",
            "train.seed: expected a whole number, got the text '3'\n  hint: write it without quotes",
        ),
        ("train: {seed: true}", "train.seed: expected a whole number, got true"),
        ("train: {seed: 1.5}", "train.seed: expected a whole number, got 1.5"),
        ("train: {epochs: 0}", "train.epochs: expected a number above 0, got 0"),
        ("train: {max_steps: -1}", "train.max_steps: expected a number above 0, got -1"),
        (
            "train: {micro_batch_size: x}",
            "train.micro_batch_size: expected a whole number or `auto`, got the text 'x'",
        ),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected a finite number, got inf"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: expected 2 values, got a list of 1"),
        ("optimizer: {betas: [0.9, 0.9, 0.9]}", "optimizer.betas: expected 2 values, got a list of 3"),
        (
            "method: {kind: qlra}",
            "method.kind: expected `full`, `lora`, `qlora` or `freeze`, got the text 'qlra'\n"
            "  hint: did you mean qlora?",
        ),
        ("method: {targets: [q, 1]}", "method.targets.1: expected text, got 1\n  hint: put it in quotes: '1'"),
        ("parallel: {zero: 4}", "parallel.zero: expected `auto`, `0`, `1`, `2` or `3`, got 4"),
        ("name: 7", "name: expected text, got 7\n  hint: put it in quotes: '7'"),
        ("schedule: cosine", "schedule: expected a section of keys, got the text 'cosine'"),
        ("schedule:", "schedule: expected a section of keys, got nothing"),
        (
            "evaluate: {generate: {}}",
            "evaluate.generate: needs data.test\n  hint: name a file of held-out rows there, or "
            "set evaluate.generate to null",
        ),
        ("model: {path: b}", "model: given twice, first on line 1\n  hint: keep one of them"),
        ("3: x", "3: a key must be text\n  hint: put it in quotes"),
        ("<<: {name: x}", "<<: YAML's merge key is not supported\n  hint: use `extends`"),
        (
            "name: !!python/name:os.system x",
            "name: the YAML tag tag:yaml.org,2002:python/name:os.system is not supported\n  hint: write plain values",
        ),
        ("name: a/b", "name: 'a/b' cannot name a folder\n  hint: give a word without slashes"),
        (
            "export: {max_shard_size: big}",
            "export.max_shard_size: 'big' is no size\n  hint: write it as 5GB, 500MB or 2GiB",
        ),
        ("train: {max_time: 0s}", "train.max_time: '0s' is nothing\n  hint: give more than zero"),
        (
            "parallel: {zero: 0, offload: cpu}",
            "parallel.offload: ZeRO 0 has nothing to offload\n  hint: set parallel.zero to 1, 2, 3 or auto",
        ),
        ("cluster: {workers: 0}", "cluster.workers: expected a number above 0, a section of keys or `auto`, got 0"),
        ("cluster: {workers: {min: 2}}", "cluster.workers.max: missing\n  hint: give max"),
        (
            "cluster: {workers: {min: 3, max: 2}}",
            "cluster.workers.min: 3 is more than cluster.workers.max, 2\n  hint: such as {min: 2, max: 16}",
        ),
        ("cluster: {wait_s: 0}", "cluster.wait_s: expected a number above 0, got 0"),
        (
            "schedule: {warmup: 2.5}",
            "schedule.warmup: 2.5 is neither a share of the steps nor a whole number of them\n"
            "  hint: below 1 it is a share, otherwise a number of steps",
        ),
    ],
)
def test_one_wrong_line(line: str, message: str) -> None:
    assert report(GOOD + line + "\n") == f"x.yaml:3: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train: [{path: a}]}",
            "x.yaml: model.path: missing\n"
            "  hint: give a model folder or hub id, or model.scratch to start from random weights",
        ),
        (
            "model: {path: gpt2, scratch: {model_type: gpt2}}\ndata: {train: [{path: a}]}",
            "x.yaml:1: model.path: given together with model.scratch\n"
            "  hint: keep one; `scratch: null` drops an inherited one",
        ),
        (
            "data: {train: [{path: a}]}\nmodel:\n  scratch: {hidden_size: 8}",
            "x.yaml:3: model.scratch: needs model_type\n  hint: such as `model_type: llama`",
        ),
        (
            "model: {path: gpt2}",
            "x.yaml: data.train: nothing to train on\n  hint: such as `train: [{path: train.jsonl}]`",
        ),
        (
            "model: {path: gpt2}\ndata:\n  train:\n  - {format: auto}",
            "x.yaml:4: data.train.0.path: missing\n  hint: give path",
        ),
        (
            "model: {path: gpt2}\ndata:\n  train: [{path: a}]\n  eval: {split: 0.1, sources: [{path: b}]}",
            "x.yaml:4: data.eval.split: given together with data.eval.sources\n"
            "  hint: hold out a share or name files, not both",
        ),
        (
            "model: {path: gpt2}\ndata: {train: [{path: a}]}\nname: x: y",
            "x.yaml:3: not YAML: mapping values are not allowed here\n"
            "  hint: YAML is indented with spaces, and text with `: ` or `#` in it needs quotes",
        ),
        ("- 1", "x.yaml:1: a recipe is a list of `key: value` lines"),
        (
            "zz: &a [*a]",
            "x.yaml:1: zz.0: an alias that contains itself\nx.yaml:1: zz: unknown key\n"
            "  hint: `slipway recipes schema` lists every key",
        ),
    ],
)
def test_one_wrong_file(text: str, message: str) -> None:
    found = report(text)
    # Where a file is no YAML there is nothing to compare across keys; elsewhere the rest is complete.
    assert message in found
    if not text.startswith("zz:"):
        assert found == message


DATA = "model: {path: gpt2}\ndata:\n  train: [{path: a.jsonl}]\n"
ALPACA = "model: {path: gpt2}\ndata:\n  train: [{path: a.jsonl, format: alpaca}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            DATA + "  eval: {split: 0.1, rows: 20}",
            "data.eval.split: given together with data.eval.rows\n"
            "  hint: hold out a share or a number of rows, not both",
        ),
        (
            DATA + "  test: {rows: 20, sources: [{path: b}]}",
            "data.test.rows: given together with data.test.sources\n"
            "  hint: hold out a number of rows or name files, not both",
        ),
        (
            DATA + "  test: {split: 0.1, sources: [{path: b}]}",
            "data.test.split: given together with data.test.sources\n  hint: hold out a share or name files, not both",
        ),
        (
            DATA + "  eval: {split: 0.0}",
            "data.eval.split: nothing would be held out\n"
            "  hint: give a share between 0 and 1, or null for no evaluation",
        ),
        (
            DATA + "  test: {split: 1.0}",
            "data.test.split: nothing would be left to train on\n"
            "  hint: give a share between 0 and 1, or null for no test",
        ),
        (
            DATA + "  eval: {split: 0.7}\n  test: {split: 0.3}",
            "data.eval.split: with data.test.split, nothing would be left to train on\n  hint: keep their sum below 1",
        ),
        (
            ALPACA + "  stratify: true",
            "data.stratify: needs data.label\n  hint: name the column with each row's class",
        ),
        (
            ALPACA + "  balance: weights",
            "data.balance: needs data.label\n  hint: name the column with each row's class",
        ),
        (
            "model: {path: gpt2}\ndata:\n\n  train: [{path: a, format: classification, labels: [no, 'yes', 'yes']}]",
            "data.train.0.labels: 'yes' is given twice\n  hint: one word for each number, from 0",
        ),
        (
            "model:\n\n  path: gpt2\n  template_kwargs: {enable-thinking: false}\ndata: {train: [{path: a}]}",
            "model.template_kwargs.enable-thinking: no name of a variable\n  hint: such as enable_thinking",
        ),
        (
            "model:\n\n  path: gpt2\n  add_tokens: ['<|a|>', ' ']\ndata: {train: [{path: a}]}",
            "model.add_tokens.1: blank\n  hint: such as `<|im_start|>`",
        ),
        (
            "model:\n\n  path: gpt2\n  add_tokens: ['<|a|>', '<|a|>']\ndata: {train: [{path: a}]}",
            "model.add_tokens.1: '<|a|>' is given twice\n  hint: name each token once",
        ),
        (
            "model: {path: gpt2}\ndata:\n\n  train: [{path: a, format: classification, labels: ['1', '2']}]",
            "data.train.0.labels: '1' is a word that reads as the number of another\n"
            "  hint: write the words for 0, 1, 2, ...: `[one star, two stars]`",
        ),
        (
            DATA + "  clean: {include: '(a'}",
            "data.clean.include: '(a' is no regular expression: missing ), unterminated subpattern at position 0\n"
            "  hint: write it in Python's syntax; in YAML, between single quotes",
        ),
        (
            DATA + "  clean: {exclude: ['[[a]', '*', b]}",
            "data.clean.exclude.1: '*' is no regular expression: nothing to repeat at position 0\n"
            "  hint: write it in Python's syntax; in YAML, between single quotes",
        ),
        (
            DATA + "  clean: {languages: [en, zh-CN]}",
            "data.clean.languages.1: 'zh-CN' is no language that can be told\n  hint: did you mean zh?",
        ),
        (
            DATA + "  clean: {languages: [english]}",
            "data.clean.languages.0: 'english' is no language that can be told\n"
            "  hint: two letters of ISO 639-1, such as en, de or zh",
        ),
        (
            DATA + "  augment: {wordings: ['{instruction} {input}', 'Do: {instructions}']}",
            "data.augment.wordings.1: unknown part {instructions}\n"
            "  hint: a row's parts are {instruction} and {input}; write a brace that is meant as one twice",
        ),
        (
            DATA + "  augment: {wordings: ['Do it: {instruction']}",
            "data.augment.wordings.0: not a wording: expected '}' before end of string\n"
            "  hint: write a brace that is meant as one twice: {{ or }}",
        ),
        (
            DATA + "  augment: {wordings: ['{input!r}']}",
            "data.augment.wordings.0: a part is put in as it is\n  hint: a row's parts are {instruction} and {input}",
        ),
        (
            DATA + "  augment: {wordings: ['Do it, {{please}}']}",
            "data.augment.wordings.0: names no part of the row\n  hint: a row's parts are {instruction} and {input}",
        ),
    ],
)
def test_data_keys_that_do_not_go_together(text: str, message: str) -> None:
    assert report(text) == f"x.yaml:4: {message}"


@pytest.mark.parametrize(
    "lines",
    [
        "  stratify: true\n  balance: weights\n  eval: {split: 0.5}\n  test: {split: 0.4}",  # `auto` may have classes
        "  label: kind\n  balance: oversample\n  eval: {rows: 5}\n  test: {rows: 5}",
        "  clean: {languages: [en, nn], include: '[[a]', exclude: ['(?i)b']}",
        "  augment: {wordings: ['{instruction}\\n\\n{input}', '{{ {input} }}']}",
    ],
)
def test_data_keys_that_go_together(lines: str) -> None:
    Path("x.yaml").write_text(DATA + lines)
    load("x.yaml")


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_over_a_scratch_model_are_fine(kind: str) -> None:
    Path("x.yaml").write_text("model: {scratch: {model_type: llama}}\ndata: {train: [{path: a}]}\n")
    assert load("x.yaml", [f"method.kind={kind}"]).recipe.method.kind == kind


def test_a_loop_of_extends_names_the_chain() -> None:
    Path("b.yaml").write_text("extends: c.yaml\n")
    Path("c.yaml").write_text("# a comment\nextends: b.yaml\n")
    assert report("extends: b.yaml\n" + GOOD) == (
        "c.yaml:2: extends: goes in a circle: b.yaml -> c.yaml -> b.yaml\n"
        "  hint: a recipe cannot extend itself; cut one link"
    )


def test_an_extended_recipe_that_is_not_there_hides_no_other_mistake() -> None:
    Path("base.yaml").write_text(GOOD)
    assert report("extends: bse.yaml\noptimizer: {lr: fast}\n") == (
        "x.yaml:1: extends: not found: bse.yaml (looked for bse.yaml, and for a packaged recipe)\n"
        "  hint: did you mean base.yaml?\n"
        "x.yaml:2: optimizer.lr: expected a number, got the text 'fast'"
    )


def test_mistakes_of_an_extended_file_name_that_file() -> None:
    Path("base.yaml").write_text(GOOD + "optimizer: {lrr: 1}\n")
    assert report("extends: base.yaml\ntrain: {epoch: 1}\n", "train.sed=3") == (
        "x.yaml:2: train.epoch: unknown key\n  hint: did you mean epochs?\n"
        "base.yaml:3: optimizer.lrr: unknown key\n  hint: did you mean lr?\n"
        "command line: train.sed: unknown key\n  hint: did you mean seed?"
    )


def test_a_file_that_is_no_text() -> None:
    Path("x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="x.yaml: cannot be read: not UTF-8 text"):
        load("x.yaml")


def test_problems_survive_a_process_border() -> None:
    Path("x.yaml").write_text(GOOD + "zzz: 1")
    with pytest.raises(RecipeError) as raised:
        load("x.yaml")
    assert pickle.loads(pickle.dumps(raised.value)).problems == raised.value.problems


def test_8_bit_moments_fit_one_size_but_for_stage_0() -> None:
    elastic = GOOD + "optimizer: {name: adamw_8bit}\ncluster: {workers: {min: 2, max: 3}}\n"
    assert report(elastic) == (
        "x.yaml:4: cluster.workers.min: the 8-bit moments of adamw_8bit fit one number of workers only: the run cannot "
        "change its size\n  hint: give cluster.workers one number, or set optimizer.name to adamw, or "
        "parallel.zero to 0"
    )
    Path("x.yaml").write_text(elastic + "parallel: {zero: 0}\n")
    assert load("x.yaml").recipe.parallel.zero == 0
