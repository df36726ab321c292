"""What the documents say and a machine can check."""

import re
from pathlib import Path

from adapters import Code, limits

DOCS = Path(__file__).parents[1] / "docs"


def test_every_code_is_documented_once_and_no_other() -> None:
    text = (DOCS / "format.md").read_text()
    table = text[text.index("## Codes") :]
    documented = re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M)))
    assert sorted(documented) == sorted(str(code) for code in Code)


def test_documented_limits_are_those_in_force() -> None:
    text = " ".join((DOCS / "format.md").read_text().split())
    for said in (
        f"| {limits.MAX_ADAPTER_BYTES // 2**30} GiB |",
        f"at most {limits.MAX_HEADER_BYTES // 2**20} MiB and {limits.MAX_TENSORS:,} tensors",
        f"at most {limits.MAX_JSON_VALUES:,} values",
        f"1 to {limits.MAX_NAME_LENGTH} printable",
        f"(at most {limits.MAX_DIMENSIONS} sizes)",
        f"at most {limits.MAX_LORA_RANK} to be stored",
        f"at most {limits.MAX_PATTERN_LENGTH} characters",
        f"more than {limits.MAX_EXPRESSIONS} expressions",
        f"{limits.MAX_PATTERN_STEPS // 10**6} million steps",
        f"at most {limits.MAX_ARCHIVE_MEMBERS} members",
        f"at most {limits.MAX_ARCHIVE_RATIO} bytes for each of its own (from "
        f"{limits.ARCHIVE_RATIO_FROM_BYTES // 2**20} MiB on)",
        f"| {limits.MAX_TEMPLATE_BYTES // 2**20} MiB |",
    ):
        assert said in text
