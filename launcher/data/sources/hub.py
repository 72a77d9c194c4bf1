"""A data set of the Hugging Face hub, at a commit, through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.data.sources.ranges import File, Row, Span
from launcher.data.sources.saved_dataset import dataset_rows, even_spans
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(source: SourcePlan) -> SourcePlan:
    """A hub id with its branch or tag resolved to a commit; any other source as it is.

    Offline, or where the hub does not answer, the commit is the one that the cache has for the branch or tag. Raises
    DataError for a data set or revision that is not there, and for a gated one.
    """
    if source.kind != "hub" or _COMMIT.fullmatch(source.revision or ""):
        return source
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        _remember(source)
    except RevisionNotFoundError as error:
        raise DataError(
            f"{source.path} has no revision {source.revision!r}", hint="give a branch, tag or commit"
        ) from error
    except GatedRepoError as error:
        raise _gated(source.path) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _missing(source.path) from error
    except Exception as error:  # offline mode, the connection and the HTTP client each raise their own
        commit = _cached_commit(source.path, source.revision or "main")
        if commit is None:
            said = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else _said(error)
            raise DataError(
                f"{source.path} is no file here, and the hub cannot be reached: {said}",
                hint="check the path or id; to work offline, run once online before",
            ) from error
    return source.model_copy(update={"revision": commit})


def hub_file(source: SourcePlan) -> File:
    """The data set that `source` names, which is read as one file."""
    source = pinned(source)
    assert source.revision is not None
    parts = [source.path, source.subset, source.split]
    return File("/".join(part for part in parts if part is not None), source.revision)


def whole(source: SourcePlan, file: File) -> Span:
    """All rows. Loads the data set, which downloads it once on each machine."""
    return Span(0, len(_loaded(source.path, source.subset, source.split, file.stamp)))


def spans(whole: Span, num_rows: int) -> Iterator[Span]:
    """`whole` in parts of `num_rows`."""
    return even_spans(whole, num_rows)


def rows(source: SourcePlan, file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`, with their number in the split."""
    return dataset_rows(_loaded(source.path, source.subset, source.split, file.stamp), file.name, span)


@lru_cache(maxsize=4)
def _loaded(path: str, subset: str | None, split: str | None, commit: str) -> Any:
    # Imported here because it takes seconds, which a .jsonl file should not cost.
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        # The prefix keeps it from taking a folder of that name in the current directory instead.
        builder = datasets.load_dataset_builder(f"hf://datasets/{path}", subset, revision=commit)
        if builder.hash != commit:  # offline it takes whatever version was loaded last, without a word
            raise DataError(
                f"{path}: the hub does not answer, and the cache has {str(builder.hash)[:8]}, not commit {commit[:8]}",
                hint="load this revision once while online, or give the one that is there as `revision`",
            )
        if subset is None and isinstance(builder, Cache) and builder.config.name != "default":
            raise DataError(
                f"{path}: the hub does not answer, so whether it has subsets besides the cached one is unknown",
                hint=f"give subset: {builder.config.name}",
            )
        builder.download_and_prepare()
        splits = sorted(builder.info.splits or ())
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            asked = f"no split {split!r}" if split else "several splits and none asked for"
            raise DataError(f"{path}: {asked}", hint=f"give split: one of {', '.join(splits)}")
        return builder.as_dataset(split=split)
    except DataError:
        raise
    except Exception as error:  # the hub, the network, the file readers and the cache each raise their own
        raise _unloadable(path, subset, commit, error) from error


def _unloadable(path: str, subset: str | None, commit: str, error: Exception) -> DataError:
    from datasets.exceptions import DatasetNotFoundError

    said = _said(error)
    if "gated" in said:
        return _gated(path)
    if isinstance(error, DatasetNotFoundError):
        return _missing(path)
    if "scripts are no longer supported" in said:
        return DataError(
            f"{path} is loaded by a script, which is never run here",
            hint="take its files in another form: many have a revision refs/convert/parquet",
        )
    if isinstance(error, ConnectionError) or said.startswith("Couldn't find cache"):
        part = f" with subset {subset!r}" if subset else ""
        return DataError(
            f"{path}: the hub does not answer, and commit {commit[:8]}{part} is not in the cache of loaded data sets",
            hint="load it once while online, or give its downloaded files as a folder",
        )
    if isinstance(error, ValueError) and (subsets := _subsets(path, commit)) and subset not in subsets:
        asked = f"no subset {subset!r}" if subset else "several subsets and none asked for"
        return DataError(f"{path}: {asked}", hint=f"give subset: one of {', '.join(subsets)}")
    return DataError(f"{path}: cannot be loaded: {said}", hint="try datasets.load_dataset on it, which says more")


def _subsets(path: str, commit: str) -> list[str]:
    import datasets

    try:
        return sorted(datasets.get_dataset_config_names(f"hf://datasets/{path}", revision=commit))
    except Exception:  # only asked to explain another error better
        return []


def _missing(path: str) -> DataError:
    return DataError(
        f"{path} is neither a file here nor a data set on the hub",
        hint="check the path or id; set HF_TOKEN for private data sets",
    )


def _gated(path: str) -> DataError:
    return DataError(f"{path} is gated", hint="accept its terms on the data set's page and set HF_TOKEN")


def _remember(source: SourcePlan) -> None:
    """Let the cache know which commit a branch or tag is, for times without the hub: any download notes it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        hf_hub_download(source.path, "README.md", repo_type="dataset", revision=source.revision)


def _cached_commit(path: str, revision: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset"))
    try:
        return (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
