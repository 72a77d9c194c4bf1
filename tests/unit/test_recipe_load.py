"""Reading recipes: layers, overrides, origins, paths, and the merged text."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError, UserError
from launcher.recipe import catalog
from launcher.recipe.load import LoadedRecipe, load, resolve_path

BASE = """\
description: what others build on
model:
  scratch: {model_type: llama, hidden_size: 64}
data:
  train:
    - {path: a.jsonl, format: messages}
    - path: b.jsonl
optimizer: {lr: 2e-5}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/base.yaml").write_text(BASE)
    return tmp_path


def write(folder: Path, text: str, name: str = "recipes/x.yaml") -> str:
    (folder / name).write_text(text)
    return name


def problems(name: str, *overrides: str) -> list[tuple[str, str | None]]:
    with pytest.raises(RecipeError) as raised:
        load(name, overrides)
    return [(str(problem), problem.hint) for problem in raised.value.problems]


def test_mappings_merge_lists_replace_and_each_value_knows_its_line(folder: Path) -> None:
    name = write(
        folder, "extends: base.yaml\nmodel:\n  scratch:\n    hidden_size: 128\ndata:\n  train:\n  - path: c.jsonl\n"
    )
    loaded = load(name, ["train.seed=3"])
    assert loaded.recipe.model.scratch == {"model_type": "llama", "hidden_size": 128}
    assert [source.path for source in loaded.recipe.data.train] == ["c.jsonl"]
    assert loaded.recipe.description is None, "a description speaks of its own file"
    assert {key: str(origin) for key, origin in loaded.origins.items()} == {
        "model.scratch.model_type": "recipes/base.yaml:3",
        "model.scratch.hidden_size": "recipes/x.yaml:4",
        "data.train.0.path": "recipes/x.yaml:7",
        "optimizer.lr": "recipes/base.yaml:8",
        "train.seed": "command line",
    }
    assert str(loaded.origin("optimizer.eps")) == "default"
    assert loaded.files == (folder / "recipes/x.yaml", folder / "recipes/base.yaml")


@pytest.mark.parametrize(
    ("written", "value"), [("2e-5", 2e-5), ("2.0E-4", 2e-4), ("1e-4", 1e-4), ("1", 1.0), (".5", 0.5)]
)
def test_numbers_are_read_as_people_write_them(folder: Path, written: str, value: float) -> None:
    assert load("recipes/base.yaml", [f"optimizer.lr={written}"]).recipe.optimizer.lr == value
    assert load(write(folder, f"extends: base.yaml\noptimizer: {{lr: {written}}}\n")).recipe.optimizer.lr == value


def test_a_whole_number_may_have_an_exponent_and_words_are_no_booleans(folder: Path) -> None:
    loaded = load("recipes/base.yaml", ["train.max_steps=1e3", "name=on"])
    assert loaded.recipe.train.max_steps == 1000
    assert loaded.recipe.name == "on"


def test_overrides_reach_into_lists_and_append(folder: Path) -> None:
    loaded = load("recipes/base.yaml", ["data.train.0.path=x", "data.train.2.path=y", "data.test.sources.0.path=z"])
    assert [source.path for source in loaded.recipe.data.train] == ["x", "b.jsonl", "y"]
    assert loaded.recipe.data.train[0].format == "messages", "the rest of the element stays"
    assert loaded.recipe.data.test.sources[0].path == "z"
    assert str(loaded.origin("data.train.2.path")) == "command line"
    assert str(loaded.origin("data.train.0.format")) == "recipes/base.yaml:6"


def test_an_override_replaces_whole_values(folder: Path) -> None:
    loaded = load("recipes/base.yaml", ["data.train=[{path: q}]", "model.scratch=null", "model.path=gpt2"])
    assert [source.path for source in loaded.recipe.data.train] == ["q"]
    assert str(loaded.origin("data.train.0.path")) == "command line"
    assert "data.train.1.path" not in loaded.origins


def test_bad_overrides_are_reported_together(folder: Path) -> None:
    found = problems(
        "recipes/base.yaml", "optimizer.lr_rate=1", "fast", "data.train.7.path=x", "name=[1", "extends=y", "seed=1"
    )
    assert found == [
        ("command line: optimizer.lr_rate: unknown key", "did you mean lr?"),
        ("command line: `fast` is no override", "write key=value, such as optimizer.lr=1e-4"),
        ("command line: data.train.7: no such element: the list has 2", "count from 0; 2 appends"),
        (
            "command line: name: `[1` is not a YAML value",
            "quote it for YAML inside the shell's quotes: 'key=\"value\"'",
        ),
        ("command line: extends: cannot be given on the command line", "write a recipe file that extends it"),
        ("command line: seed: unknown key", "did you mean train.seed?"),
    ]


def test_the_merged_text_is_a_recipe_that_runs_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "recipes/a.jsonl").touch()
    first = load(write(folder, "extends: base.yaml\n"), ["name='1e5'"])
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/recipe.yaml").write_text(first.text)
    monkeypatch.chdir(folder / "elsewhere")
    again = load("recipe.yaml")
    assert again.recipe.data.train[0].path == str(folder / "recipes/a.jsonl")
    assert again.recipe.data.train[1].path == "b.jsonl", "a file that is not there keeps its name"
    assert again.recipe.name == "1e5"
    assert again.recipe.optimizer == first.recipe.optimizer
    assert again.recipe.extends is None


def test_the_hash_is_of_the_values_alone(folder: Path) -> None:
    copy = write(folder, "# another file, another order\noptimizer:\n  lr: 0.00002\n" + BASE.split("optimizer")[0])
    assert load(copy).hash == load("recipes/base.yaml").hash
    assert load(copy, ["train.seed=18"]).hash != load(copy).hash


def test_a_path_is_looked_up_beside_its_file_then_here(folder: Path) -> None:
    loaded: LoadedRecipe = load("recipes/base.yaml", ["data.train.1.path=a.jsonl"])
    from_file, from_command_line = loaded.origin("data.train.0.path"), loaded.origin("data.train.1.path")
    assert resolve_path("a.jsonl", from_file) is None
    (folder / "a.jsonl").touch()
    assert resolve_path("a.jsonl", from_file) == folder / "a.jsonl"
    (folder / "recipes/a.jsonl").touch()
    assert resolve_path("a.jsonl", from_file) == folder / "recipes/a.jsonl"
    assert resolve_path("a.jsonl", from_command_line) == folder / "a.jsonl"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recipes/bse.yaml", "did you mean recipes/base.yaml?"),
        ("recipes/base", "did you mean recipes/base.yaml?"),
        ("nothing-like-it", "`slipway recipes list` shows the packaged ones"),
    ],
)
def test_a_recipe_that_is_not_there(folder: Path, name: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        load(name)
    assert raised.value.message == f"recipe not found: {name} (neither a file nor a packaged recipe)"
    assert raised.value.hint == hint


def test_a_run_folder_is_no_recipe(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/recipe.yaml").touch()
    with pytest.raises(UserError, match="run is a run's folder"):
        load("run")


def test_packaged_recipes_are_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = folder / "packaged"
    for name in ("quickstart", "llama-3.1/8b-qlora", "base/instruct", "_draft"):
        file = packaged / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(BASE)
    monkeypatch.setattr(catalog, "folder", lambda: packaged)
    assert catalog.names() == ["llama-3.1/8b-qlora", "quickstart"]
    assert load("llama-3.1/8b-qlora").file == packaged / "llama-3.1/8b-qlora.yaml"
    assert load(write(folder, "extends: base/instruct\n")).recipe.optimizer.lr == 2e-5
    for wrong, meant in (("quickstrat", "quickstart"), ("8b-qlora", "llama-3.1/8b-qlora")):
        with pytest.raises(UserError) as raised:
            load(wrong)
        assert raised.value.hint == f"did you mean {meant}?"


@pytest.mark.parametrize("name", catalog.names())
def test_every_packaged_recipe_loads(name: str) -> None:
    loaded = load(name)
    assert loaded.recipe.description, "`slipway recipes list` shows it"
