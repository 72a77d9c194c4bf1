"""What opens an address is not shown; what is no secret is."""

from __future__ import annotations

import pytest

from launcher.recipe.addresses import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sftp://user:pa:ss@host:22/rows.jsonl", "sftp://***@host:22/rows.jsonl"),
        ("https://ghp_1234@host/a@b.jsonl", "https://***@host/a@b.jsonl"),
        ('{"path": "https://a:b@host/x", "name": "c@d"}', '{"path": "https://***@host/x", "name": "c@d"}'),
        (
            "https://host/x?v=2&X-Amz-Credential=AK%2Fa&X-Amz-Signature=0f&part=1#top",
            "https://host/x?v=2&X-Amz-Credential=***&X-Amz-Signature=***&part=1#top",
        ),
        ("https://host/x?sig=abc%3D&se=2026", "https://host/x?sig=***&se=2026"),
        ("https://host/x?access_token=abc", "https://host/x?access_token=***"),
    ],
)
def test_what_opens_an_address_is_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs/a?versionId=3",
        "hf://datasets/user/set@main/rows.jsonl",
        "meta-llama/Llama-3.1-8B@0e9e39f",
        "max_new_tokens=64 & token=no",
        "who@example.org",
        "",
    ],
)
def test_what_opens_nothing_stays(text: str) -> None:
    assert without_secrets(text) == text
