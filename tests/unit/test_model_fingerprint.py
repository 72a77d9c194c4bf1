"""One hash for a base model's weights, and what a resume says when they are not what they were."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import ModelError
from launcher.model.fingerprint import check_unchanged, fingerprint

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 9000,  # more than two blocks
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"not a weight",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def rewrite(file: Path, content: bytes) -> None:
    """Other bytes under the same time of change."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_it_names_the_weights_and_not_their_place(base: Path, tmp_path: Path) -> None:
    first = fingerprint(base)
    assert len(first) == 64
    elsewhere = shutil.copytree(base, tmp_path / "other" / "name")
    assert fingerprint(elsewhere) == first
    (elsewhere / "tokenizer.json").write_bytes(b"trained with its own")
    (elsewhere / "README.md").write_bytes(b"hello")
    assert fingerprint(elsewhere) == first


@pytest.mark.parametrize("name", [name for name in FILES if name != "tokenizer.json"])
def test_every_byte_counts(base: Path, name: str) -> None:
    first = fingerprint(base)
    content = bytearray(FILES[name])
    content[-1] ^= 1
    (base / name).write_bytes(bytes(content))
    assert fingerprint(base) != first


def test_names_count_and_bin_only_where_there_is_nothing_better(base: Path) -> None:
    first = fingerprint(base)
    (base / "pytorch_model.bin").write_bytes(b"the same weights once more")
    assert fingerprint(base) == first
    (base / "model-00002-of-00002.safetensors").rename(base / "model-00003-of-00003.safetensors")
    renamed = fingerprint(base)
    assert renamed != first
    for file in base.glob("*.safetensors"):
        file.unlink()
    only_bin = fingerprint(base)
    assert only_bin not in (first, renamed)
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    assert fingerprint(base) != only_bin


def test_a_stamp_spares_the_reading_where_size_and_time_agree(base: Path, tmp_path: Path) -> None:
    stamps, weights = tmp_path / "base.json", base / "model-00002-of-00002.safetensors"
    first = fingerprint(base, stamps)
    said = json.loads(stamps.read_text())
    assert said.keys() == FILES.keys() - {"tokenizer.json"}
    assert said[weights.name]["bytes"] == 6
    assert said[weights.name]["mtime_ns"] == weights.stat().st_mtime_ns
    rewrite(weights, b"SECOND")
    assert fingerprint(base, stamps) == first, "it was read again"
    assert fingerprint(base) != first
    rewrite(weights, b"longer than before")
    assert fingerprint(base, stamps) != first
    rewrite(weights, b"second")
    stamps.write_text('{"model-00002-of-00002.safetensors": {"bytes": 6}}')
    assert fingerprint(base, stamps) == first, "stamps that cannot be understood are none"


def test_a_base_that_was_only_copied_is_read_once_more(base: Path, tmp_path: Path) -> None:
    stamps, weights = tmp_path / "base.json", base / "model-00002-of-00002.safetensors"
    first = fingerprint(base, stamps)
    os.utime(weights, ns=(1, 1))
    check_unchanged(base, first, stamps)
    assert json.loads(stamps.read_text())[weights.name]["mtime_ns"] == 1
    stamps.unlink()
    check_unchanged(base, first, stamps)
    assert json.loads(stamps.read_text()).keys() == FILES.keys() - {"tokenizer.json"}


def test_what_has_changed_is_named(base: Path, tmp_path: Path) -> None:
    stamps = tmp_path / "base.json"
    first = fingerprint(base, stamps)
    before = stamps.read_text()
    (base / "model-00001-of-00002.safetensors").unlink()
    (base / "model-00002-of-00002.safetensors").write_bytes(b"SECOND")
    (base / "model-00003.safetensors").write_bytes(b"third")
    for _ in range(2):  # asking does not make it right
        with pytest.raises(ModelError) as caught:
            check_unchanged(base, first, stamps)
        assert caught.value.exit_code == 2
        assert caught.value.message.endswith(
            "is not the one that this run began with: model-00001-of-00002.safetensors is missing; "
            "model-00002-of-00002.safetensors has changed; model-00003.safetensors is new"
        )
        assert "start a new run" in str(caught.value.hint)
    assert stamps.read_text() == before
    stamps.unlink()
    with pytest.raises(ModelError, match="its files have another hash"):
        check_unchanged(base, first, stamps)


def test_a_base_that_is_gone_or_holds_no_weights(base: Path, tmp_path: Path) -> None:
    first = fingerprint(base)
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="base is gone") as caught:
        check_unchanged(base, first, tmp_path / "base.json")
    assert "bring it back" in str(caught.value.hint)
    base.mkdir()
    (base / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        fingerprint(base)


def test_it_needs_no_torch() -> None:
    code = "import launcher.model.fingerprint, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
