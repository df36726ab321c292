"""What the documents say and a machine can check."""

import re
from pathlib import Path

from adapters import Code, limits
from adapters.tolerance import TOLERANCES

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
        f"1 to {limits.MAX_PROBE_PROMPTS} prompts of 1 to {limits.MAX_PROBE_PROMPT_TOKENS} tokens, "
        f"and 1 to {limits.MAX_PROBE_ANSWER_TOKENS} tokens in an answer",
        f"at most {limits.MAX_ARCHIVE_MEMBERS} members",
        f"at most {limits.MAX_ARCHIVE_RATIO} bytes for each of its own (from "
        f"{limits.ARCHIVE_RATIO_FROM_BYTES // 2**20} MiB on)",
        f"| {limits.MAX_TEMPLATE_BYTES // 2**20} MiB |",
    ):
        assert said in text


def test_documented_tolerances_are_those_in_force() -> None:
    text = (DOCS / "format.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| ([\d.e-]+) \| ([\d.e-]+) \|", text, re.M)
    said = {form: (float(mean), float(largest)) for form, mean, largest in rows}
    assert said == {
        form: (float(f"{row.mean:.2g}"), row.largest) for form, row in TOLERANCES.items()
    }
