"""A corpus of malformed adapters: each breaks one rule, and names the code that it is refused with.

`build(folder)` writes them all. Every case starts from the same right adapter, so that what is
refused is what was changed.
"""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

Change = Callable[[Path], object]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
QUERY, VALUE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
MIB = 1024 * 1024


@dataclass(frozen=True)
class Case:
    """A malformed adapter and the code of the rule that it breaks."""

    name: str
    code: str
    change: Change
    suffix: str = ""  # of an archive; a folder if empty


CASES: list[Case] = []


def case(code: str, *, suffix: str = "") -> Callable[[Change], Change]:
    """Register a function that breaks one rule, under its own name."""

    def register(change: Change) -> Change:
        CASES.append(Case(change.__name__, code, change, suffix))
        return change

    return register


def build(folder: Path) -> list[tuple[Case, Path]]:
    """Write every case below `folder`; return where."""
    built = []
    for one in CASES:
        path = folder / f"{one.name}{one.suffix}"
        if one.suffix:
            one.change(path)
        else:
            right(path)
            one.change(path)
        built.append((one, path))
    return built


def right(folder: Path) -> Path:
    """Write the adapter that breaks no rule."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(KEYS))
    (folder / WEIGHTS).write_bytes(save(tensors()))
    (folder / "rora.json").write_text('{"format": 1}')
    return folder


PROBE: Mapping[str, Any] = {
    "dtype": "float32",
    "prompts": [
        {
            "token_ids": [1, 9690],
            "base": {"token_ids": [504, 7], "log_probs": [-0.21, -2.5]},
            "adapter": {"token_ids": [3681, 504], "log_probs": [-0.03, -4.0]},
        }
    ],
}


def change_probe(folder: Path, change: Callable[[Any], object]) -> None:
    """Write a right probe with one change of it into rora.json."""
    probe = json.loads(json.dumps(PROBE))
    change(probe)
    (folder / "rora.json").write_text(json.dumps({"format": 1, "probe": probe}))


KEYS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {VALUE: 3},
    "target_modules": ["q_proj", "v_proj"],
}


def tensors() -> dict[str, Any]:
    """Return the right adapter's tensors."""
    generator = np.random.default_rng(0)
    made = {}
    for module, rank in ((QUERY, 2), (VALUE, 3)):
        made[f"{PREFIX}{module}.lora_A.weight"] = generator.normal(size=(rank, 8)).astype("f4")
        made[f"{PREFIX}{module}.lora_B.weight"] = generator.normal(size=(6, rank)).astype("f4")
    return made


# Ways of changing it.


def change_keys(folder: Path, **keys: Any) -> None:
    """Set keys of adapter_config.json."""
    (folder / CONFIG).write_text(json.dumps({**KEYS, **keys}))


def change_tensors(folder: Path, **new: Any) -> None:
    """Add or replace tensors; a value of None takes one away."""
    made = tensors()
    for name, value in new.items():
        made.pop(name, None)
        if value is not None:
            made[name] = np.asarray(value)
    (folder / WEIGHTS).write_bytes(save(made))


def factor(module: str, side: str) -> str:
    """Return the name of a factor."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def write_frame(
    folder: Path, header: object, data: bytes = b"", *, claim: int | None = None
) -> None:
    """Write a weights file from its parts; `claim` is a header length that is not true."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if claim is None else claim
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + data)


def entry(
    shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32"
) -> dict[str, object]:
    """Return one tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# The folder and its files.


@case("folder-missing")
def no_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@case("config-missing")
def no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


@case("weights-missing")
def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@case("weights-pickle")
def pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@case("file-link")
def weights_are_a_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to("elsewhere")


@case("file-link")
def config_is_a_link_out_of_the_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/passwd")


@case("file-not-regular")
def weights_are_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@case("file-not-regular")
def config_is_a_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


@case("file-too-large")
def config_of_ten_megabytes(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b" " * 10 * MIB)


@case("file-too-large")
def weights_of_a_tebibyte_of_nothing(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 2**40)


@case("file-too-large")
def template_of_two_megabytes(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"x" * 2 * MIB)


@case("template-not-text")
def template_of_bytes(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")


# JSON.


@case("json-not-text")
def config_in_latin_1(folder: Path) -> None:
    (folder / CONFIG).write_bytes(json.dumps(dict(KEYS))[:-1].encode() + b', "x": "\xe9"}')


@case("json-not-text")
def half_a_character(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({**KEYS, "task_type": "\ud800"}))


@case("json-syntax")
def config_cut_short(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(dict(KEYS))[:-5])


@case("json-syntax")
def config_of_brackets(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)


@case("json-syntax")
def number_of_ten_thousand_digits(folder: Path) -> None:
    (folder / CONFIG).write_text('{"r": ' + "9" * 10_000 + "}")


@case("json-too-many-values")
def config_of_a_million_lists(folder: Path) -> None:
    (folder / CONFIG).write_text('{"x": [' + "[]," * 1_000_000 + "[]]}")


@case("json-too-many-values")
def provenance_of_a_million_numbers(folder: Path) -> None:
    (folder / "rora.json").write_text('{"x": [' + "1," * 1_000_000 + "1]}")


@case("json-duplicate-key")
def rank_said_twice(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(dict(KEYS))[:-1] + ', "r": 64}')


@case("json-duplicate-key")
def tensor_said_twice(folder: Path) -> None:
    one = json.dumps({factor(QUERY, "A"): entry()})[1:-1]
    write_frame(folder, f"{{{one}, {one}}}".encode(), b"1234")


@case("json-not-object")
def config_is_a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@case("json-syntax")
def provenance_a_thousand_levels_deep(folder: Path) -> None:
    (folder / "rora.json").write_text('{"x": ' + "[" * 500 + "]" * 500 + ', "y": "\\u0041"}')


@case("json-syntax")
def number_above_any(folder: Path) -> None:
    (folder / "rora.json").write_text('{"metrics": {"loss": 1e999}}')


@case("json-syntax")
def probe_of_nan(folder: Path) -> None:
    (folder / "rora.json").write_text('{"probe": {"log_probs": [NaN]}}')


@case("probe-form")
def probe_of_a_prompt_longer_than_any(folder: Path) -> None:
    change_probe(folder, lambda probe: probe["prompts"][0].update(token_ids=[1] * 400_000))


@case("probe-form")
def probe_of_a_hundred_thousand_prompts(folder: Path) -> None:
    probe = dict(PROBE, prompts=[[]] * 100_000)
    (folder / "rora.json").write_text(json.dumps({"probe": probe}))


@case("probe-form")
def probe_that_is_a_list(folder: Path) -> None:
    (folder / "rora.json").write_text('{"probe": [1, 2]}')


# The header.


@case("header-cut")
def empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@case("header-past-end")
def header_of_an_exbibyte(folder: Path) -> None:
    write_frame(folder, {}, claim=2**60)


@case("header-past-end")
def weights_cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 60)


@case("header-too-large")
def header_of_a_gigabyte(folder: Path) -> None:
    write_frame(folder, {}, claim=2**30)
    os.truncate(folder / WEIGHTS, 2**30 + 8)


@case("json-too-many-values")
def header_of_small_lists(folder: Path) -> None:
    write_frame(folder, b'{"x": [' + b"[]," * 2_000_000 + b"[]]}")


@case("json-not-object")
def header_is_a_number(folder: Path) -> None:
    write_frame(folder, 5)


@case("header-metadata")
def metadata_of_numbers(folder: Path) -> None:
    write_frame(folder, {"__metadata__": {"format": 1}})


@case("tensors-too-many")
def forty_five_thousand_tensors(folder: Path) -> None:
    names = (f"{PREFIX}m.{number}.lora_A.weight" for number in range(45_000))
    write_frame(folder, {name: entry([0], [0, 0]) for name in names})


@case("tensor-name")
def tensor_name_of_a_megabyte(folder: Path) -> None:
    write_frame(folder, {"a" * MIB: entry()}, b"1234")


@case("json-not-text")
def tensor_name_of_five_megabytes_with_an_emoji(folder: Path) -> None:
    """One such character makes the whole text take four bytes for each."""
    text = json.dumps({"a" * 5 * MIB + "🙂": entry()}, ensure_ascii=False).encode()
    write_frame(folder, text, b"1234")


@case("tensor-name")
def tensor_name_of_five_megabytes_with_an_escape(folder: Path) -> None:
    write_frame(folder, {"a" * 5 * MIB + "🙂": entry()}, b"1234")


@case("tensor-name")
def tensor_name_with_a_line_break(folder: Path) -> None:
    write_frame(folder, {"a\nb": entry()}, b"1234")


@case("tensor-name")
def tensor_name_that_climbs(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}../../etc/passwd.lora_A.weight": np.ones((2, 8), "f4")})


@case("tensor-entry")
def tensor_without_a_shape(folder: Path) -> None:
    write_frame(folder, {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234")


@case("tensor-dtype")
def tensor_of_an_unknown_dtype(folder: Path) -> None:
    write_frame(folder, {"a": entry(dtype="F128")}, b"1234")


@case("tensor-shape")
def tensor_of_negative_size(folder: Path) -> None:
    write_frame(folder, {"a": entry([-1])}, b"1234")


@case("tensor-shape")
def tensor_of_a_thousand_dimensions(folder: Path) -> None:
    write_frame(folder, {"a": entry([1] * 1000)}, b"1234")


@case("tensor-offsets")
def tensor_with_one_offset(folder: Path) -> None:
    write_frame(folder, {"a": entry(offsets=[0])}, b"1234")


@case("tensor-offsets")
def tensor_with_an_offset_of_true(folder: Path) -> None:
    write_frame(folder, {"a": entry(offsets=[False, 4])}, b"1234")


@case("tensor-size")
def shape_that_overflows(folder: Path) -> None:
    write_frame(folder, {"a": entry([2**62, 2**62])}, b"1234")


@case("tensor-size")
def tensor_that_ends_before_it_begins(folder: Path) -> None:
    write_frame(folder, {"a": entry(offsets=[4, 0])}, b"1234")


@case("tensor-gap")
def gap_between_tensors(folder: Path) -> None:
    write_frame(folder, {"a": entry(), "b": entry(offsets=[8, 12])}, b"123412341234")


@case("tensor-overlap")
def tensors_that_overlap(folder: Path) -> None:
    write_frame(folder, {"a": entry([2], [0, 8]), "b": entry(offsets=[4, 8])}, b"12341234")


@case("tensor-past-end")
def weights_cut_in_the_tensors(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 4)


@case("bytes-after-tensors")
def bytes_after_the_tensors(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"MZ and a program")


# Which tensors there are.


@case("tensors-none")
def no_tensor(folder: Path) -> None:
    write_frame(folder, {})


@case("tensor-unknown")
def tensor_that_is_no_factor(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}{QUERY}.something": np.ones(2, "f4")})


@case("tensor-base-weight")
def embedding_saved_beside_lora(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}model.embed_tokens.weight": np.ones((9, 8), "f4")})


@case("tensor-base-weight")
def output_layer_saved_beside_lora(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}lm_head.weight": np.ones((9, 8), "f4")})


@case("tensor-base-weight")
def output_layer_as_peft_saves_it(folder: Path) -> None:
    name = f"{PREFIX}lm_head.base_layer.weight"
    change_tensors(folder, **{name: np.ones((9, 8), "f4")})


@case("kind-chosen-layers")
def layer_zero_alone(folder: Path) -> None:
    change_keys(folder, layers_to_transform=0)


@case("rank-too-large")
def rank_of_four_thousand_in_a_large_module(folder: Path) -> None:
    change_keys(folder, r=4096, rank_pattern={}, target_modules=["q_proj"])
    size = 4096 * 1500 * 2
    header = {
        factor(QUERY, "A"): entry([4096, 1500], [0, size], "F16"),
        factor(QUERY, "B"): entry([1500, 4096], [size, 2 * size], "F16"),
    }
    write_frame(folder, header, np.full(size, 0.001, "f2").tobytes())


@case("rank-too-large")
def rank_of_two_hundred_thousand(folder: Path) -> None:
    change_keys(folder, r=200_000, rank_pattern={}, target_modules=["q_proj"])
    header = {
        factor(QUERY, "A"): entry([200_000, 1], [0, 800_000]),
        factor(QUERY, "B"): entry([1, 200_000], [800_000, 1_600_000]),
    }
    write_frame(folder, header, b"\0" * 1_600_000)


@case("pattern-too-costly")
def expressions_that_ignore_case(folder: Path) -> None:
    wide = "".join(f"(?i:[\\0-\\uffff]){n}" for n in range(40))
    change_keys(folder, alpha_pattern={f"{wide}{n}": 3 for n in range(20)})


@case("pattern-too-costly")
def back_reference_to_a_twelfth_group(folder: Path) -> None:
    change_keys(folder, alpha_pattern={"(?:" + "()" * 12 + r"\12q_proj|v_proj)": 3})


@case("tensor-dora")
def magnitudes_of_dora(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}{QUERY}.lora_magnitude_vector": np.ones(6, "f4")})


@case("tensor-bias")
def bias_of_a_factor(folder: Path) -> None:
    change_tensors(folder, **{f"{PREFIX}{QUERY}.lora_B.bias": np.ones(6, "f4")})


@case("tensor-saved-module")
def trained_module_beside_lora(folder: Path) -> None:
    name = f"{PREFIX}score.modules_to_save.default.weight"
    change_tensors(folder, **{name: np.ones((2, 8), "f4")})


@case("tensor-adapter-name")
def state_dict_with_an_adapters_name(folder: Path) -> None:
    made = {name.replace(".weight", ".default.weight"): value for name, value in tensors().items()}
    (folder / WEIGHTS).write_bytes(save(made))


@case("tensor-foreign-layout")
def kohyas_layout(folder: Path) -> None:
    change_tensors(folder, **{"lora_te_text_model_q_proj.lora_down.weight": np.ones((2, 8), "f4")})


@case("factor-missing")
def factor_without_its_partner(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "B"): None})


@case("factor-kinds")
def linear_layer_and_embedding(folder: Path) -> None:
    change_tensors(
        folder,
        **{
            f"{PREFIX}{QUERY}.lora_embedding_A": np.ones((2, 8), "f4"),
            f"{PREFIX}{QUERY}.lora_embedding_B": np.ones((6, 2), "f4"),
        },
    )


@case("factor-dtype")
def factor_of_integers(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "A"): np.ones((2, 8), "i8")})


@case("factor-shape")
def factor_of_three_dimensions(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "A"): np.ones((2, 8, 1), "f4")})


@case("factor-shape")
def factor_of_rank_zero(folder: Path) -> None:
    empty = {factor(QUERY, "A"): np.ones((0, 8), "f4"), factor(QUERY, "B"): np.ones((6, 0), "f4")}
    change_tensors(folder, **empty)


@case("rank-factors")
def factors_of_two_ranks(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "A"): np.ones((3, 8), "f4")})


@case("rank-config")
def rank_that_the_config_does_not_say(folder: Path) -> None:
    change_keys(folder, r=3)


@case("rank-config")
def rank_that_the_pattern_does_not_say(folder: Path) -> None:
    change_keys(folder, rank_pattern={VALUE: 2})


@case("rank-too-large")
def rank_above_what_is_served(folder: Path) -> None:
    change_keys(folder, r=600, rank_pattern={VALUE: 3})
    change_tensors(
        folder,
        **{
            factor(QUERY, "A"): np.ones((600, 8), "f4"),
            factor(QUERY, "B"): np.ones((6, 600), "f4"),
        },
    )


@case("target-missing")
def module_that_peft_would_leave_out(folder: Path) -> None:
    change_keys(folder, target_modules=["v_proj"])


# adapter_config.json.


@case("config-key-unknown")
def misspelt_key(folder: Path) -> None:
    change_keys(folder, use_rslorra=True)


@case("config-peft-type")
def another_method(folder: Path) -> None:
    change_keys(folder, peft_type="IA3")


@case("config-rank")
def rank_of_true(folder: Path) -> None:
    change_keys(folder, r=True)


@case("config-rank")
def rank_of_two_to_the_hundredth(folder: Path) -> None:
    change_keys(folder, r=2**100)


@case("config-alpha")
def alpha_that_overflows(folder: Path) -> None:
    change_keys(folder, lora_alpha=1.1e308)


@case("config-use-rslora")
def rslora_of_yes(folder: Path) -> None:
    change_keys(folder, use_rslora="yes")


@case("config-initialisation")
def pissa(folder: Path) -> None:
    change_keys(folder, init_lora_weights="pissa")


@case("config-targets")
def targets_of_numbers(folder: Path) -> None:
    change_keys(folder, target_modules=[1])


@case("config-rank-pattern")
def rank_pattern_of_texts(folder: Path) -> None:
    change_keys(folder, rank_pattern={VALUE: "3"})


@case("config-alpha-pattern")
def alpha_pattern_of_zero(folder: Path) -> None:
    change_keys(folder, alpha_pattern={VALUE: 0.0})


@case("pattern-syntax")
def pattern_that_is_none(folder: Path) -> None:
    change_keys(folder, alpha_pattern={"(q_proj": 3})


@case("pattern-too-long")
def pattern_of_a_megabyte(folder: Path) -> None:
    change_keys(folder, alpha_pattern={"q" * MIB: 3})


@case("pattern-too-costly")
def pattern_that_looks_ahead(folder: Path) -> None:
    change_keys(folder, target_modules="(?!.*vision).*_proj")


@case("pattern-too-costly")
def twenty_thousand_expressions(folder: Path) -> None:
    change_keys(folder, alpha_pattern={f"(x|y){{1,900}}{number}": 3 for number in range(20_000)})


@case("pattern-without-match")
def pattern_that_matches_nothing(folder: Path) -> None:
    change_keys(folder, alpha_pattern={"k_proj": 3})


@case("pattern-without-match")
def four_hundred_large_expressions(folder: Path) -> None:
    change_keys(folder, alpha_pattern={f"(x|y){{1,300}}{number}": 3 for number in range(400)})


@case("pattern-without-match")
def pattern_that_backtracks_for_ever_in_python(folder: Path) -> None:
    change_keys(folder, alpha_pattern={"(([a-z._0-9]+)+)+!": 3})


def register_kinds() -> None:
    """Register a case for every kind of adapter that is not served."""
    kinds: dict[str, tuple[str, Any]] = {
        "kind-activated-lora": ("alora_invocation_tokens", [1, 2]),
        "kind-arrow": ("arrow_config", {"top_k": 2}),
        "kind-bias": ("bias", "lora_only"),
        "kind-block-diagonal": ("use_bdlora", True),
        "kind-changed-base": ("loftq_config", {"loftq_bits": 4}),
        "kind-chosen-layers": ("layers_to_transform", [0]),
        "kind-dora": ("use_dora", True),
        "kind-excluded-modules": ("exclude_modules", ["q_proj"]),
        "kind-kasa": ("kasa_config", {"beta": 1}),
        "kind-layer-replication": ("layer_replication", [[0, 2]]),
        "kind-lora-bias": ("lora_bias", True),
        "kind-modules-to-save": ("modules_to_save", ["lm_head"]),
        "kind-monteclora": ("monteclora_config", {"x": 1}),
        "kind-parameters": ("target_parameters", ["experts.gate_up_proj"]),
        "kind-qalora": ("use_qalora", True),
        "kind-tied-weights": ("ensure_weight_tying", True),
        "kind-tokens": ("trainable_token_indices", [0]),
        "kind-velora": ("velora_config", {"x": 1}),
    }
    for code, (key, value) in kinds.items():

        def change(folder: Path, key: str = key, value: Any = value) -> None:
            change_keys(folder, **{key: value})

        CASES.append(Case(code.replace("-", "_"), code, change))


register_kinds()


# Numbers.


@case("values-not-finite")
def factor_with_nan(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "A"): np.full((2, 8), np.nan, "f4")})


@case("values-not-finite")
def factor_with_infinity(folder: Path) -> None:
    change_tensors(folder, **{factor(VALUE, "B"): np.full((6, 3), -np.inf, "f4")})


@case("values-too-large")
def delta_that_overflows(folder: Path) -> None:
    change_tensors(folder, **{factor(QUERY, "A"): np.full((2, 8), 3e38, "f4")})


@case("delta-zero")
def dead_adapter(folder: Path) -> None:
    zero = {factor(module, "B"): np.zeros((6, r), "f4") for module, r in ((QUERY, 2), (VALUE, 3))}
    change_tensors(folder, **zero)


@case("delta-zero")
def dead_adapter_whose_factors_are_not_zero(folder: Path) -> None:
    """A has other ranks than B, so that B @ A is zero."""
    lora_a, lora_b = np.zeros((2, 8), "f4"), np.zeros((6, 2), "f4")
    lora_a[0], lora_b[:, 1] = 1, 1
    change_keys(folder, rank_pattern={}, target_modules=["q_proj"])
    write = {factor(QUERY, "A"): lora_a, factor(QUERY, "B"): lora_b}
    change_tensors(folder, **write, **{factor(VALUE, side): None for side in "AB"})


@case("pattern-without-match")
def forty_thousand_keys_that_match_nothing(folder: Path) -> None:
    change_keys(folder, alpha_pattern={f"k{number}": 3 for number in range(40_000)})


@case("pattern-too-costly")
def a_quarter_of_a_million_keys(folder: Path) -> None:
    text = json.dumps({f"{number:x}": 1 for number in range(240_000)}, separators=(",", ":"))
    (folder / CONFIG).write_text(json.dumps(dict(KEYS))[:-1] + f', "alpha_pattern": {text}}}')


@case("target-missing")
def as_many_targets_as_fit(folder: Path) -> None:
    change_keys(folder, target_modules=[f"m{number}" for number in range(300_000)])


@case("delta-zero")
def dead_adapter_of_orthogonal_factors(folder: Path) -> None:
    """As PEFT initialises one, so that it is zero but for rounding."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0].astype("f4")
    lora_a = (np.eye(4, 8) + np.eye(4, 8)[:, ::-1]).astype("f4")
    pairs = np.array([[1, 0, -1, 0]] * 2 + [[0, 1, 0, -1]] * 4, "f4")
    lora_a[2:] = lora_a[:2] * np.float32(1 + 1e-8)
    change_keys(folder, r=4, rank_pattern={}, target_modules=["q_proj"])
    change_tensors(
        folder,
        **{factor(QUERY, "A"): lora_a, factor(QUERY, "B"): basis @ pairs},
        **{factor(VALUE, side): None for side in "AB"},
    )


@case("delta-zero")
def dead_adapter_whose_scaling_underflows(folder: Path) -> None:
    change_keys(folder, lora_alpha=5e-324, alpha_pattern={})


@case("delta-zero")
def dead_adapter_of_three_hundred_megabytes(folder: Path) -> None:
    size = 150 * MIB
    header = {
        factor(QUERY, "A"): entry([2, size // 8], [0, size]),
        factor(QUERY, "B"): entry([size // 8, 2], [size, 2 * size]),
    }
    change_keys(folder, rank_pattern={}, target_modules=["q_proj"])
    write_frame(folder, header)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + 2 * size)


# Archives.


def write_tar(path: Path, members: Mapping[str, bytes], *, mode: str = "w:gz") -> None:
    """Write a tar archive of plain files."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))


def tar_member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """Return the header of one member."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


def write_tar_members(path: Path, *members: tarfile.TarInfo) -> None:
    """Write a tar archive of the right adapter and of members without content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in right_files().items():
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))
        for member in members:
            archive.addfile(member)


def write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a zip archive of plain files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def right_files(folder: str = "a") -> dict[str, bytes]:
    """Return the right adapter's files, below a folder."""
    config, weights = json.dumps(dict(KEYS)).encode(), save(tensors())
    return {f"{folder}/{CONFIG}": config, f"{folder}/{WEIGHTS}": weights}


@case("archive-syntax", suffix=".tar")
def archive_of_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(100_000))


@case("archive-syntax", suffix=".tar.gz")
def tar_cut_short(path: Path) -> None:
    write_tar(path, right_files())
    os.truncate(path, path.stat().st_size // 2)


@case("archive-syntax", suffix=".tar.gz")
def tar_with_a_bit_flipped_and_a_checksum_that_says_so(path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in right_files().items():
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))
    with gzip.open(path, "wb", compresslevel=0) as file:  # stored, so that only the sum is wrong
        file.write(buffer.getvalue())
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(tensors()[factor(VALUE, "B")].tobytes())] ^= 1
    path.write_bytes(flipped)


@case("archive-syntax", suffix=".zip")
def zip_cut_short(path: Path) -> None:
    write_zip(path, right_files())
    os.truncate(path, path.stat().st_size - 30)


@case("archive-syntax", suffix=".zip")
def zip_with_a_wrong_checksum(path: Path) -> None:
    write_zip(path, right_files())
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)


@case("archive-climbs", suffix=".tar.gz")
def tar_that_climbs(path: Path) -> None:
    write_tar(path, {**right_files(), f"a/../../{CONFIG}": b"{}"})


@case("archive-climbs", suffix=".tar.gz")
def tar_with_an_absolute_path(path: Path) -> None:
    write_tar(path, {**right_files(), f"/tmp/{CONFIG}": b"{}"})


@case("archive-climbs", suffix=".zip")
def zip_that_climbs(path: Path) -> None:
    write_zip(path, {**right_files(), f"../{CONFIG}": b"{}"})


@case("archive-climbs", suffix=".zip")
def zip_that_climbs_backwards(path: Path) -> None:
    write_zip(path, {**right_files(), f"..\\{CONFIG}": b"{}"})


@case("archive-link", suffix=".tar.gz")
def tar_with_a_symbolic_link(path: Path) -> None:
    link = tar_member("a/rora.json", kind=tarfile.SYMTYPE)
    link.linkname = "/etc/passwd"
    write_tar_members(path, link)


@case("archive-link", suffix=".tar.gz")
def tar_with_a_hard_link(path: Path) -> None:
    link = tar_member("a/rora.json", kind=tarfile.LNKTYPE)
    link.linkname = f"a/{CONFIG}"
    write_tar_members(path, link)


@case("archive-link", suffix=".zip")
def zip_with_a_symbolic_link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/rora.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


@case("archive-special-file", suffix=".tar.gz")
def tar_with_a_device(path: Path) -> None:
    write_tar_members(path, tar_member("a/rora.json", kind=tarfile.CHRTYPE))


@case("archive-special-file", suffix=".tar.gz")
def tar_with_a_pipe(path: Path) -> None:
    write_tar_members(path, tar_member("a/rora.json", kind=tarfile.FIFOTYPE))


@case("archive-special-file", suffix=".zip")
def zip_with_a_pipe(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/rora.json")
        info.external_attr = 0o010777 << 16
        archive.writestr(info, "")


@case("archive-duplicate", suffix=".tar.gz")
def tar_with_a_file_twice(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in [*right_files().items(), (f"a/{CONFIG}", b"{}")]:
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))


@case("archive-encrypted", suffix=".zip")
def zip_with_a_password(path: Path) -> None:
    write_zip(path, right_files())
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@case("archive-compression", suffix=".zip")
def zip_with_lzma(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(f"a/{CONFIG}", "{}")


@case("archive-too-many", suffix=".tar.gz")
def tar_with_two_thousand_files(path: Path) -> None:
    write_tar(path, {f"a/{number}": b"" for number in range(2000)})


@case("archive-bomb", suffix=".tar.gz")
def tar_bomb(path: Path) -> None:
    zeros = b"\0" * MIB
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(tar_member(f"a/{WEIGHTS}", 10_000 * MIB).tobuf())
        for _ in range(200):
            file.write(zeros)


@case("archive-bomb", suffix=".tar.gz")
def tar_bomb_in_a_file_that_is_skipped(path: Path) -> None:
    zeros = b"\0" * MIB
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(tar_member("a/optimizer.pt", 200 * MIB).tobuf())
        for _ in range(200):
            file.write(zeros)


@case("archive-bomb", suffix=".tar")
def tar_with_a_header_of_a_gigabyte(path: Path) -> None:
    member = tar_member("././@PaxHeader", 2**30, tarfile.XHDTYPE)
    path.write_bytes(member.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, 2**30 + 512)


@case("archive-bomb", suffix=".tar")
def tar_with_a_large_global_header(path: Path) -> None:
    keys = {f"key{number}": "x" * 50 for number in range(16_000)}
    header = tarfile.TarInfo.create_pax_global_header(keys)
    members = b"".join(tar_member(f"a/{number}").tobuf() for number in range(900))
    path.write_bytes(header + members + b"\0" * 1024)


@case("archive-bomb", suffix=".tar")
def tar_with_a_sparse_map_of_a_million_holes(path: Path) -> None:
    holes = b"1000000\n" + b"0\n0\n" * 1_000_000
    member = tar_member("a/x", len(holes))
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + holes + b"\0" * 10_240)


@case("archive-bomb", suffix=".tar.gz")
def tar_with_a_global_header_for_each_file(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(250):
            keys = {f"key{number}-{key}": "x" for key in range(3000)}
            file.write(tarfile.TarInfo.create_pax_global_header(keys))
            file.write(tar_member(f"a/{number}").tobuf())


@case("archive-bomb", suffix=".tar")
def tar_with_a_chain_of_long_names(path: Path) -> None:
    member = tar_member("././@LongLink", 32 * 1024, tarfile.GNUTYPE_LONGNAME)
    path.write_bytes((member.tobuf() + b"a" * 32 * 1024) * 400 + b"\0" * 1024)


@case("archive-bomb", suffix=".zip")
def zip_bomb(path: Path) -> None:
    write_zip(path, {f"a/{WEIGHTS}": b"\0" * 100 * MIB})


@case("file-too-large", suffix=".zip")
def zip_with_a_large_template(path: Path) -> None:
    noise = np.random.default_rng(0).bytes(2 * MIB)
    write_zip(path, {**right_files(), "a/chat_template.jinja": noise})


@case("archive-no-adapter", suffix=".zip")
def zip_without_an_adapter(path: Path) -> None:
    write_zip(path, {"readme.txt": b"hello"})


@case("archive-several-adapters", suffix=".tar.gz")
def tar_with_two_adapters(path: Path) -> None:
    write_tar(path, {**right_files("a"), **right_files("b")})


@case("weights-pickle", suffix=".tar.gz")
def tar_with_a_pickle(path: Path) -> None:
    write_tar(path, {f"a/{CONFIG}": right_files()[f"a/{CONFIG}"], "a/adapter_model.bin": b"\x80"})


@case("rank-config", suffix=".zip")
def zip_with_a_wrong_rank(path: Path) -> None:
    files = right_files()
    write_zip(path, {**files, f"a/{CONFIG}": json.dumps({**KEYS, "r": 5}).encode()})
