"""Configs in, models out; and what is no config ends in one line."""

from __future__ import annotations

import json
import os
import random
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rooflm.roofline import datafiles
from rooflm.roofline.config import load_model, model_names, model_source, published_parameters
from rooflm.roofline.datafiles import data_path, read_json_object
from rooflm.roofline.families import ALIASES, FAMILIES
from rooflm.roofline.model import Model

COUNTS = json.loads(
    (Path(__file__).parent / "data" / "parameter_counts.json").read_text(encoding="utf-8")
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MISTRAL = LLAMA | {"model_type": "mistral"}


def message(source: Any, **more: Any) -> str:
    """The one line in which loading `source` ends."""
    with pytest.raises(ValueError) as caught:
        load_model(source, **more)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    return text


def without(config: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in fields}


# What the released models have


@pytest.mark.parametrize("row", COUNTS, ids=[row["name"] for row in COUNTS])
def test_parameters_are_those_of_the_tensors_that_transformers_builds(row: dict[str, Any]) -> None:
    assert load_model(row["config"]).parameters == row["parameters"]


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_the_published_count(name: str) -> None:
    assert load_model(name).parameters == published_parameters(name)


@pytest.mark.parametrize("name", model_names())
def test_every_model_states_its_source(name: str) -> None:
    config = read_json_object(data_path("models", *f"{name}.json".split("/")))
    assert model_source(name) == config["_source"]
    assert config["_source"].startswith("https://")
    assert config["_published_source"]
    assert config["_retrieved"]


def test_every_family_has_at_least_two_counted_models() -> None:
    kinds = [row["config"]["model_type"] for row in COUNTS]
    assert {kind for kind in FAMILIES if kinds.count(kind) < 2} <= {
        "internlm", "deci", "kimi_k2",  # no class of transformers; those of llama, deepseek_v3
    }  # fmt: skip
    assert len(COUNTS) >= 60


def test_the_gpt_j_card_counts_more_than_its_tensors_hold() -> None:
    # The card's table says 6053381344.
    assert load_model("EleutherAI/gpt-j-6b").parameters == 6_050_882_784


@pytest.mark.parametrize(
    ("name", "kv_heads", "head_dim"),
    [
        ("meta-llama/Llama-2-7b-hf", 32, 128),
        ("meta-llama/Llama-2-70b-hf", 8, 128),
        ("huggyllama/llama-13b", 40, 128),  # its config names no KV heads
        ("Qwen/Qwen3-32B", 8, 128),  # 64 heads of 128 are not the hidden width, 5120
        ("google/gemma-2-9b", 8, 256),
        ("EleutherAI/gpt-j-6b", 16, 256),
    ],
)
def test_kv_heads_and_head_dim(name: str, kv_heads: int, head_dim: int) -> None:
    mixer = load_model(name).blocks[0][1].mixer
    assert (mixer.kv_heads, mixer.head_dim) == (kv_heads, head_dim)


def test_falcon_7b_has_one_kv_head_whatever_num_kv_heads_says() -> None:
    row = next(row for row in COUNTS if row["name"] == "tiiuae/falcon-7b")
    assert row["config"]["num_kv_heads"] == 71
    assert load_model(row["config"]).blocks[0][1].mixer.kv_heads == 1


def test_opt_350m_has_no_final_norm_and_a_narrow_embedding() -> None:
    row = next(row for row in COUNTS if row["name"] == "facebook/opt-350m")
    model = load_model(row["config"])
    assert (model.final_norm, model.embedding_dim, model.positions) == (False, 512, 2050)


# How a model is asked for


def test_names_are_found_in_any_case_and_by_their_last_part() -> None:
    model = load_model("meta-llama/Llama-2-7b-hf")
    assert load_model("META-LLAMA/llama-2-7B-HF") == model
    assert load_model("llama-2-7b-hf") == model
    assert model.name == "meta-llama/Llama-2-7b-hf"
    assert published_parameters("llama-2-7b-hf") == 6_738_415_616


def test_names_a_path_and_a_dict_give_the_same_model(tmp_path: Path) -> None:
    path = data_path("models", "Qwen", "Qwen3-8B.json")
    by_name = load_model("Qwen/Qwen3-8B", name="q")
    assert load_model(path, name="q") == by_name
    assert load_model(str(path), name="q") == by_name
    assert load_model(json.loads(path.read_text(encoding="utf-8")), name="q") == by_name
    copy = tmp_path / "config"  # no suffix: it is read because it exists
    copy.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_model(str(copy), name="q") == by_name


def test_a_model_passes_through() -> None:
    model = load_model(LLAMA)
    assert load_model(model) is model
    assert load_model(model, name="other").name == "other"
    assert model.name == "llama"


def test_a_model_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    assert load_model(path).name == str(path)
    assert load_model(path, name="mine").name == "mine"


def test_an_installed_wheel_reads_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rooflm"
    (package / "_data").mkdir(parents=True)
    monkeypatch.setattr(datafiles, "__file__", str(package / "roofline" / "datafiles.py"))
    assert data_path("models") == package / "_data" / "models"


# What a config says, and how


def test_every_alias_is_read() -> None:
    plain = load_model(LLAMA)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        for alias in ALIASES[field]:
            assert load_model(without(LLAMA, field) | {alias: LLAMA[field]}) == plain


def test_null_counts_as_absent() -> None:
    nulls = {"head_dim": None, "tie_word_embeddings": None, "attention_bias": None, "n_embd": None}
    assert load_model(LLAMA | nulls) == load_model(LLAMA)


def test_absent_kv_heads_are_the_default_of_the_family_and_null_ones_are_all_heads() -> None:
    mistral = LLAMA | {"model_type": "mistral", "num_attention_heads": 16}
    absent = load_model(without(mistral, "num_key_value_heads"))
    null = load_model(mistral | {"num_key_value_heads": None})
    assert absent.blocks[0][1].mixer.kv_heads == 8
    assert null.blocks[0][1].mixer.kv_heads == 16


def test_quantization_and_windows_change_no_shape() -> None:
    more = {"quantization_config": {"bits": 4}, "sliding_window": 16, "torch_dtype": "float16"}
    model = load_model(MISTRAL | more)
    assert model.parameters == load_model(MISTRAL).parameters
    assert windows(model) == [16]
    assert windows(load_model(LLAMA | more)) == [0]  # transformers' llama has none


def windows(model: Model) -> list[int]:
    """The window of each kind of layer, 0 where it sees everything."""
    return [block.mixer.window for _, block in model.blocks]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mistralai/Mistral-7B-v0.1", {4096: 32}),
        ("microsoft/Phi-3-mini-4k-instruct", {2047: 32}),
        ("Qwen/Qwen2.5-7B", {0: 28}),  # published with use_sliding_window false
        ("meta-llama/Llama-2-7b-hf", {0: 32}),
        # Gemma-2's report, section 2: every other layer; Gemma-3's, section 2.1: five of six.
        ("google/gemma-2-9b", {4096: 21, 0: 21}),
        ("google/gemma-3-27b-pt", {1024: 52, 0: 10}),
        ("google/gemma-3-1b-pt", {512: 22, 0: 4}),
        # The gpt-oss model card, section 2.2: alternating banded and full.
        ("openai/gpt-oss-120b", {128: 18, 0: 18}),
        ("Qwen/Qwen3-30B-A3B", {0: 48}),
    ],
)
def test_windows_stand_in_the_layers_that_the_report_names(name, layers) -> None:
    found = {block.mixer.window: count for count, block in load_model(name).blocks}
    assert found == layers


def test_hybrids_have_the_layers_that_their_reports_name() -> None:
    def kinds(name: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for count, block in load_model(name).blocks:
            found[type(block.mixer).__name__] += count
        return dict(found)

    # Qwen3-Next: three Gated DeltaNet layers to one of gated attention, 48 in all.
    assert kinds("Qwen/Qwen3-Next-80B-A3B-Instruct") == {"GatedDeltaNet": 36, "Attention": 12}
    # arXiv 2504.03624, table 1: 118 layers, 10 of attention, 54 of Mamba-2, 54 MLPs.
    nemotron = kinds("nvidia/Nemotron-H-56B-Base-8K")
    assert nemotron == {"Mamba2": 54, "NoneType": 54, "Attention": 10}
    # arXiv 2501.08313, section 2: one layer of softmax attention after seven of lightning.
    minimax = kinds("MiniMaxAI/MiniMax-Text-01")
    assert minimax == {"LinearAttention": 70, "Attention": 10}
    scout = load_model("meta-llama/Llama-4-Scout-17B-16E")
    assert {block.mixer.chunk: count for count, block in scout.blocks} == {8192: 36, 0: 12}


@pytest.mark.parametrize(
    ("name", "printed", "embeddings"),
    [
        ("openai/gpt-oss-20b", "3.61", False),  # arXiv 2508.10925, table 1: without the embedding
        ("openai/gpt-oss-120b", "5.13", False),
        ("deepseek-ai/DeepSeek-V3", "37", False),  # arXiv 2412.19437: 37B
        ("deepseek-ai/DeepSeek-V2-Lite", "2.4", False),  # arXiv 2405.04434, appendix B; 2.45
        ("meta-llama/Llama-4-Scout-17B-16E", "17", True),
        ("mistralai/Mixtral-8x7B-v0.1", "13", True),  # arXiv 2401.04088
        ("Qwen/Qwen3-30B-A3B", "3.3", True),  # its card: 3.3B; 3.35
    ],
)
def test_active_parameters_are_the_published_ones(name, printed, embeddings) -> None:
    model = load_model(name)
    found = model.active_parameters - (0 if embeddings else model.vocab * model.hidden)
    decimals = len(printed.partition(".")[2])
    cut = int(found / 1e9 * 10**decimals) / 10**decimals  # two cards cut where others round
    assert float(printed) in (round(found / 1e9, decimals), cut)


def test_dense_models_are_those_without_experts_states_and_latents() -> None:
    families = {"gpt_oss", "deepseek_v2", "deepseek_v3", "qwen3_next", "mamba2", "nemotron_h"}
    others = families | {"llama4_text", "minimax", "mixtral", "qwen3_moe"}
    for name in model_names():
        config = read_json_object(data_path("models", *f"{name}.json".split("/")))
        assert load_model(name).is_dense == (config["model_type"] not in others)


def test_minimax_prints_its_active_parameters_without_embedding_and_head() -> None:
    model = load_model("MiniMaxAI/MiniMax-Text-01")
    tables = 2 * model.vocab * model.hidden
    assert round((model.active_parameters - tables) / 1e9, 1) == 45.9  # arXiv 2501.08313


def test_nemotron_3_prints_its_active_parameters_with_and_without_the_embedding() -> None:
    # arXiv 2512.20848: 31.6B, of which 3.6B, or 3.2B without the embedding, are active.
    model = load_model("nvidia/Nemotron-3-Nano-30B-A3B")
    assert round(model.parameters / 1e9, 1) == 31.6
    assert round(model.active_parameters / 1e9, 1) == 3.6
    assert round((model.active_parameters - model.vocab * model.hidden) / 1e9, 1) == 3.2


def test_a_list_of_kinds_says_what_a_pattern_says() -> None:
    listed = without(NEMOTRON, "hybrid_override_pattern", "num_hidden_layers")
    listed["layers_block_type"] = ["mamba", "attention"]
    assert load_model(listed) == load_model(NEMOTRON)
    listed["layers_block_type"] = ["linear_attention", "full_attention"]  # as it is saved today
    assert load_model(listed) == load_model(NEMOTRON)


def test_llama_4_without_a_chunk_sees_everything() -> None:
    chunks = [block.mixer.chunk for _, block in load_model(LLAMA4).blocks]
    assert chunks == [8192]
    none = load_model(LLAMA4 | {"attention_chunk_size": None})
    assert [block.mixer.chunk for _, block in none.blocks] == [0]


def test_kv_heads_may_differ_from_layer_to_layer() -> None:
    deci = LLAMA | {"model_type": "deci", "num_key_value_heads_per_layer": [4, 2]}
    assert [block.mixer.kv_heads for _, block in load_model(deci).blocks] == [4, 2]
    heads = load_model(deci).cache_bytes(1, 10, 2) / (2 * 10 * 16 * 2)
    assert heads == 4 + 2


def test_a_whole_float_is_a_size() -> None:
    model = load_model(LLAMA | {"hidden_size": 64.0})
    assert model == load_model(LLAMA)
    assert type(model.hidden) is int


# What is refused

NEMOTRON = LLAMA | {"model_type": "nemotron_h", "hybrid_override_pattern": "M*"}
NEMOTRON |= {"mamba_num_heads": 8, "mamba_head_dim": 8}
LLAMA4 = LLAMA | {"model_type": "llama4_text"}
NEXT = LLAMA | {"model_type": "qwen3_next", "full_attention_interval": 2}
GPTJ = {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50}
BAD = [
    (without(LLAMA, "hidden_size"), "hidden_size is missing; allowed names: also n_embd"),
    (without(LLAMA, "vocab_size"), "vocab_size is missing"),
    (without(LLAMA, "model_type"), "model_type is missing"),
    (LLAMA | {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    (LLAMA | {"model_type": "llamma"}, "unknown model_type 'llamma'; nearest: llama"),
    (LLAMA | {"model_type": "qwen3x"}, "nearest: qwen3"),
    (LLAMA | {"model_type": 7}, "unknown model_type 7"),
    (LLAMA | {"model_type": ["llama"]}, "unknown model_type ['llama']"),
    (LLAMA | {"hidden_size": 0}, "hidden_size is 0; allowed: a whole number from 1 to 2^40"),
    (LLAMA | {"hidden_size": -64}, "hidden_size is -64"),
    (LLAMA | {"hidden_size": 64.5}, "hidden_size is 64.5"),
    (LLAMA | {"hidden_size": True}, "hidden_size is True"),
    (LLAMA | {"hidden_size": "64"}, "hidden_size is '64'"),
    (LLAMA | {"hidden_size": [64]}, "hidden_size is [64]"),
    (LLAMA | {"hidden_size": {"a": 1}}, "hidden_size is {'a': 1}"),
    (LLAMA | {"hidden_size": float("nan")}, "hidden_size is nan"),
    (LLAMA | {"hidden_size": float("inf")}, "hidden_size is inf"),
    (LLAMA | {"hidden_size": 2**41}, "hidden_size is 2199023255552"),
    (LLAMA | {"hidden_size": 10**5000}, "hidden_size is an integer of 16610 bits"),
    (LLAMA | {"hidden_size": "x\ny" * 1000}, "hidden_size is 'x\\ny"),
    (LLAMA | {"num_hidden_layers": 100_001}, "num_hidden_layers is 100001"),
    (LLAMA | {"n_embd": 65}, "hidden_size is 64 but n_embd is 65"),
    (LLAMA | {"n_embd": "x"}, "n_embd is 'x'"),
    (LLAMA | {"hidden_size": 65}, "hidden_size is 65; allowed: a multiple"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed: a divisor"),
    (LLAMA | {"num_key_value_heads": 8}, "num_key_value_heads is 8; allowed: a divisor"),
    (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; allowed: true or"),
    (LLAMA | {"attention_bias": 1}, "attention_bias is 1; allowed: true or false"),
    (LLAMA | {"num_local_experts": 8}, "num_local_experts is 8; allowed: a dense MLP"),
    (LLAMA | {"model_type": "mixtral", "num_local_experts": 1}, "num_experts_per_tok is 2"),
    (LLAMA | {"model_type": "mixtral", "num_local_experts": "8"}, "num_local_experts is '8'"),
    (LLAMA | {"model_type": "deepseek_v3"}, "kv_lora_rank is missing"),
    (LLAMA | {"model_type": "llama4_text", "layer_types": ["full_attention"]}, "a list of 2"),
    (NEMOTRON | {"hybrid_override_pattern": "MX"}, "letters M, *, -"),
    (NEMOTRON | {"hybrid_override_pattern": "M"}, "2 of the letters M, *, -"),
    (NEMOTRON | {"layers_block_type": ["mamba"]}, "layers_block_type is ['mamba']; allowed: a li"),
    (NEMOTRON | {"layers_block_type": ["mamba", "M"]}, "layers_block_type holds 'M'; allowed: mam"),
    (NEMOTRON | {"layers_block_type": [["mamba"], "moe"]}, "layers_block_type holds ['mamba']"),
    (without(NEMOTRON, "num_hidden_layers"), "num_hidden_layers is missing"),
    (NEMOTRON | {"moe_latent_size": 1024}, "moe_latent_size is 1024; allowed in this family: none"),
    (NEMOTRON | {"attention_bias": True}, "attention_bias is True; allowed in this family: none"),
    (NEMOTRON | {"mlp_bias": True}, "mlp_bias is True; allowed in this family: none"),
    (LLAMA | {"use_sliding_window": True}, "use_sliding_window is True; allowed in this family"),
    (LLAMA | {"layer_types": ["sliding_attention"] * 2}, "layer_types holds 'sliding_attention'"),
    (MISTRAL | {"layer_types": "full_attention"}, "layer_types is 'full_attention'; allowed: a l"),
    (MISTRAL | {"layer_types": [[], None]}, "layer_types holds []; allowed: full_attention, slid"),
    (LLAMA4 | {"no_rope_layers": [1]}, "no_rope_layers is [1]; allowed: a list of 2"),
    (LLAMA4 | {"no_rope_layers": [1, 2]}, "no_rope_layers is [1, 2]; allowed: a list of 0 and 1"),
    (LLAMA4 | {"moe_layers": 3}, "moe_layers is 3; allowed: a list of layer numbers"),
    (LLAMA4 | {"moe_layers": [0.5]}, "moe_layers is [0.5]"),
    (LLAMA | {"model_type": "minimax"}, "layer_types is missing; allowed: a list of full_attent"),
    (NEXT | {"num_key_value_heads_per_layer": [2, 2]}, "num_key_value_heads_per_layer is given"),
    (LLAMA | {"model_type": "deci", "num_key_value_heads_per_layer": [4]}, "allowed: a list of 2"),
    (LLAMA | {"model_type": "deci", "num_key_value_heads_per_layer": [4, 3]}, "a divisor"),
    (LLAMA | {"model_type": "mamba2", "num_heads": 6, "head_dim": 16}, "n_groups is 8"),
    (LLAMA | {"model_type": "gpt_oss", "moe_layer_freq": 2}, "moe_layer_freq is 2"),
    (LLAMA | {"num_experts": 128}, "num_experts is 128"),
    (LLAMA | {"n_routed_experts": 256}, "n_routed_experts is 256"),
    (LLAMA | {"kv_lora_rank": 512}, "kv_lora_rank is 512"),
    (LLAMA | {"state_size": 16}, "state_size is 16"),
    (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    (LLAMA | {"add_cross_attention": True}, "add_cross_attention is True"),
    (LLAMA | {"vision_config": {"depth": 2}}, "vision_config is {'depth': 2}"),
    ({"model_type": "gemma3", "text_config": LLAMA}, "pass its text_config"),
    (LLAMA | {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
    (GPTJ | {"head_dim": 32}, "head_dim is 32; allowed: hidden_size / num_attention_heads (16)"),
    (GPTJ | {"num_key_value_heads": 2}, "num_key_value_heads is 2; allowed: num_attention_heads"),
    ({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50}
     | {"intermediate_size": 100}, "intermediate_size is 100; allowed: 4 x hidden_size"),
    ({"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 50}
     | {"attn_config": {"attn_type": "multiquery_attention"}}, "'multiquery_attention'"),
    ({"model_type": "falcon", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50}
     | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
    ({}, "model_type is missing"),
    ("", "unknown model ''"),
    ("llama-2-7b", "nearest: Llama-2-7b-hf"),
    ("meta-llama/Llama-2-7b", "nearest: meta-llama/Llama-2-7b-hf"),
    ("no such model at all", "unknown model 'no such model at all'"),
    ("x\ny\0z", "unknown model 'x\\ny\\x00z'"),
    ("z" * 100_000, "unknown model 'zzz"),
    ("./no/such", "cannot read './no/such': No such file"),
    ("no/such/config.json", "cannot read 'no/such/config.json': No such file"),
    ("bad\0name.json", "cannot read 'bad\\x00name.json': embedded null byte"),
    ("x" * 5000 + ".json", "File name too long"),
    (None, "model is None; allowed: a name, a path to a config.json, a dict"),
    (7, "model is 7"),
    ([LLAMA], "model is [{"),
    (b"llama", "model is b'llama'"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "part"), BAD, ids=[part[:60] for _, part in BAD])
def test_bad_input_ends_in_one_line_that_names_it(source: Any, part: str) -> None:
    assert part in message(source)


def test_published_counts_of_unknown_models_are_refused() -> None:
    for ask in (published_parameters, model_source):
        with pytest.raises(ValueError, match="unknown model 'gpt-5'"):
            ask("gpt-5")


def test_a_name_that_is_no_string_is_refused() -> None:
    assert "name is 7" in message(LLAMA, name=7)


# Files

NOISE = random.Random(0).randbytes(10_000_000)
FILES = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"{'model_type': 'llama'}", "is not JSON"),
    (NOISE[:1000], "is not UTF-8"),
    (NOISE, "more than 1000000 bytes"),
    (b"\0" * 1000, "is not JSON"),
    (b"[" * 500_000, "nests too deeply"),
    (b'{"a":' * 100_000, "nests too deeply"),
    (b"[1, 2]", "holds an array; allowed: a JSON object"),
    (b'"llama"', "holds a string"),
    (b"7", "holds a number"),
    (b"7.5", "holds a number"),
    (b"null", "holds null"),
    (b"true", "holds true or false"),
    (b'{"hidden_size": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
    (b'{"hidden_size": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"hidden_size": 1, "hidden_size": 2}', "the name 'hidden_size' stands twice"),
    (b'{"model_type": "llama", "hidden_size": 1e400}', "hidden_size is inf"),
    (b'{"model_type": "\\ud800"}', "unknown model_type"),
]


@pytest.mark.parametrize(("content", "part"), FILES, ids=[part for _, part in FILES])
def test_a_file_that_holds_no_config_ends_in_one_line(
    tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert part in message(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "it is a folder; allowed: a config.json file" in message(tmp_path)
    assert "it is a folder" in message(str(tmp_path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    assert "it is not a regular file" in message(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_a_device_is_refused() -> None:
    assert "it is not a regular file" in message("/dev/zero")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    path.chmod(stat.S_IWUSR)
    if os.access(path, os.R_OK):  # root reads everything: refuse in its stead

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in message(path)


def test_a_message_stays_on_one_line_whatever_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\u2028c.json"
    path.write_text("[]", encoding="utf-8")
    assert "holds an array" in message(path)


# Whatever comes in, a Model or one line comes out

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**42),
    st.integers(1, 64),
    st.floats(),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=3,
)
NAMES = sorted(
    {name for row in COUNTS for name in row["config"]}
    | {"text_config", "num_experts", "num_key_value_heads_per_layer", "moe_latent_size"}
)
FIELDS = st.one_of(st.sampled_from(NAMES), st.text(max_size=12))


def survives(source: Any) -> None:
    try:
        model = load_model(source)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(model, Model)
        assert type(model.parameters) is int
        assert model.parameters > 0


@given(st.dictionaries(FIELDS, VALUES, max_size=8), st.sampled_from([*FAMILIES, None]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_random_object_gives_a_model_or_one_line(config: dict[str, Any], kind: Any) -> None:
    survives(config if kind is None else config | {"model_type": kind})


@given(
    st.sampled_from([row["config"] for row in COUNTS]),
    st.dictionaries(FIELDS, VALUES, max_size=3),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_real_config_with_fields_changed_gives_a_model_or_one_line(
    config: dict[str, Any], changes: dict[str, Any], dropped: set[str]
) -> None:
    survives(without(config | changes, *dropped))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_file_of_noise_gives_one_line(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.json"
    path.write_bytes(content)
    survives(path)


@given(st.one_of(st.text(max_size=40), VALUES))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_random_source_gives_a_model_or_one_line(source: Any) -> None:
    survives(source)
