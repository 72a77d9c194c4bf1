"""`slipway chat`: talk to a finished run or any model folder, by its own chat template."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import render
from launcher.errors import ModelError

ADAPTERS = "adapter_config.json"


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run's folder or URL, or a model folder")],
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Answer this and end, instead of a conversation")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token")] = 0.0,
) -> None:
    """Talk to a finished run or a model folder. Reads lines from the terminal or a pipe; an empty line starts over.

    A sequence classification says the class of each line, and its probability.
    """
    from launcher.export.verify import classifies

    speaker: Speaker | Classifier
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        folder = model_folder(model, Path(scratch))
        speaker = Classifier(folder) if classifies(folder) else Speaker(folder, max_new_tokens, temperature)
    if prompt:
        print(speaker.answer([{"role": "user", "content": " ".join(prompt)}]))
        return
    conversation: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    if interactive:
        render.note(f"{speaker.empty_line}, Ctrl-D ends")
    while True:
        if interactive:
            render.err().print("[bold]you[/] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            conversation = []
            continue
        conversation.append({"role": "user", "content": line.strip()})
        answer = speaker.answer(conversation)
        conversation.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def model_folder(model: str, scratch: Path) -> Path:
    """The model folder of a run, or the one that is named; what must be made anew for it is made in `scratch`.

    Raises:
        ModelError: there is none.
        RunFolderError: the run's store cannot be read.
    """
    from launcher.driver import remote
    from launcher.driver.resume import existing_plan
    from launcher.driver.start import holds_run
    from launcher.store.location import is_url

    if not is_url(model) and not (Path(model) / "plan.json").exists():
        folder, plan = Path(model), None
    elif not holds_run(model):
        raise ModelError(f"{model} holds no run", hint="slipway runs lists them")
    else:
        plan = existing_plan(model)
        remote.fetch(plan, remote.MODEL)
        folder = Path(plan.run_dir) / remote.MODEL
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist", hint=f"write it with slipway export {model}")
    if plan is None or plan.trajectory.model.source != "scratch" or not (folder / ADAPTERS).exists():
        return folder
    remote.fetch(plan, "base")
    return over_base(folder, plan.trajectory.model.path, scratch)


def over_base(folder: Path, base: str, scratch: Path) -> Path:
    """An adapter folder whose base lies in its run, which may have been moved since: the same files by links, but for
    the one that names the base."""
    adapters = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    if adapters["base_model_name_or_path"] == base:
        return folder
    for file in folder.resolve().iterdir():
        if file.name != ADAPTERS:
            (scratch / file.name).symlink_to(file)
    (scratch / ADAPTERS).write_text(json.dumps(adapters | {"base_model_name_or_path": base}), encoding="utf-8")
    return scratch


def loaded(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, and its tokenizer."""
    import torch

    from launcher.export.loaded import load_folder

    return load_folder(folder, torch.device("cpu"))


class Speaker:
    """A model folder that answers conversations."""

    empty_line = "an empty line starts a new conversation"

    def __init__(self, folder: Path, max_new_tokens: int, temperature: float) -> None:
        self.model, self.tokenizer = loaded(folder)
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.settings["temperature"] = temperature

    def answer(self, conversation: list[dict[str, str]]) -> str:
        """The model's next turn."""
        import torch

        prompt = self.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt.pop("token_type_ids", None)
        with torch.no_grad():
            output = self.model.generate(**prompt, **self.settings)
        new = output[0, prompt["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()


class Classifier:
    """A model folder that tells classes apart."""

    empty_line = "each line is a text of its own"

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = loaded(folder)

    def answer(self, conversation: list[dict[str, str]]) -> str:
        """The likeliest class of the last text, and its probability."""
        import torch

        text = self.tokenizer(conversation[-1]["content"], truncation=True, return_tensors="pt")
        with torch.no_grad():
            probabilities = self.model(**text).logits[0].float().softmax(-1)
        number = int(probabilities.argmax())
        return f"{self.model.config.id2label[number]} ({probabilities[number]:.1%})"
