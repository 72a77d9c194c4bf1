"""`slipway chat`: talk to a finished run or any model folder, by its own chat template."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import render
from launcher.errors import ModelError


def command(
    model: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or a model folder")],
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Answer this and end, instead of a conversation")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token")] = 0.0,
) -> None:
    """Talk to a finished run or a model folder. Reads lines from the terminal or a pipe; an empty line starts over."""
    folder = model / "model" if (model / "plan.json").exists() else model
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist", hint=f"write it with slipway export {model}")
    speaker = Speaker(folder, max_new_tokens, temperature)
    if prompt:
        print(speaker.answer([{"role": "user", "content": " ".join(prompt)}]))
        return
    conversation: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    if interactive:
        render.note("an empty line starts a new conversation, Ctrl-D ends")
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


class Speaker:
    """A model folder that answers conversations."""

    def __init__(self, folder: Path, max_new_tokens: int, temperature: float) -> None:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if (folder / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            from launcher.export.verify import adapter_arguments

            self.model: Any = AutoPeftModelForCausalLM.from_pretrained(folder, **adapter_arguments(folder))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model.eval()
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
