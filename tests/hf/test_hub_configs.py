"""Files of the hub: what stands in them beside the model is let through, and what would change it is not."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.families import FAMILIES
from dpo_jax.hf.keys import AGAIN, FIXED
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import Attention, DecoderSpec
from tests.support.hub_configs import HUB

PARAMETERS = {
    "starcoder2-3b": 3_030_371_328,
    "phi-1": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3-mini-128k-instruct": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "phi-4": 14_659_507_200,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Ministral-8B-Instruct-2410": 8_019_808_256,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "SmolLM2-135M-Instruct": 134_515_008,
    "TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "Yi-6B": 6_061_035_520,
    "SmolLM3-3B": 3_075_098_624,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-30B-A3B": 30_532_122_624,
    "OLMo-1B-hf": 1_176_764_416,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Olmo-3-1025-7B": 7_298_011_136,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "granite-3.1-2b-instruct": 2_533_531_648,
    "c4ai-command-r-v01": 34_980_831_232,
    "c4ai-command-r7b-12-2024": 8_028_033_024,
    "stablelm-2-1_6b": 1_644_515_328,
    "stablelm-3b-4e1t": 2_795_443_200,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "GLM-4-9B-0414": 9_400_279_040,
    "Nemotron-Mini-4B-Instruct": 4_190_509_056,
    "AFM-4.5B": 4_619_184_640,
    "EXAONE-4.0-1.2B": 1_279_391_488,
    "EXAONE-4.0-32B": 32_003_216_384,
    "HunyuanImage-2.1-reprompt": 7_504_568_320,
    "Hunyuan-1.8B-Instruct": 1_791_080_448,
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "Apertus-8B-2509": 8_053_338_240,
    "helium-1-preview-2b": 2_172_643_840,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "pythia-70m": 70_426_624,
    "pythia-1.4b": 1_414_647_808,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-j-6b": 6_050_882_784,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "bloom-560m": 559_214_592,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "gpt_bigcode-santacoder": 1_124_886_528,
    "starcoder": 15_517_456_384,
    "gemma-3-12b-it": 11_766_034_176,
    "gemma-3-4b-it": 3_880_263_168,
    "gemma-4-26B-A4B": 25_212_956_190,
    "gemma-4-31B-it": 30_620_274_492,
    "gemma-4-E2B-it": 4_614_412_579,
    "Ministral-3-3B-Instruct-2512": 3_429_006_336,
    "Devstral-Small-2-24B-Instruct-2512": 23_572_403_200,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-27B": 26_895_998_464,
    "DeepSeek-V3": 671_026_419_200,
    "Moonlight-16B-A3B": 15_960_110_208,
}
"""Numbers of parameters without those of towers and of heads that predict further tokens, and with the numbers that a
model keeps and does not train: a bias for each expert of DeepSeek-V3, a scalar for each layer of Gemma 4, two constants
for each of Apertus."""


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(name: str, **changes: Any) -> dict[str, Any]:
    """The file as one writes it who has the weights as they are, and needs no code of the model's own."""
    return {key: value for key, value in HUB[name].items() if key not in ("auto_map", "quantization_config")} | changes


def spec_of(name: str, folder: Path) -> DecoderSpec:
    return read_spec(write(folder, plain(name)))


def attentions_of(name: str, folder: Path) -> list[Attention]:
    mixers = [layer.mixer for layer in spec_of(name, folder).layers]
    return [mixer for mixer in mixers if isinstance(mixer, Attention)]


def refusal(config: dict[str, Any], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_spec(write(folder, config))
    assert "\n" not in str(caught.value) and "config.json: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_of_the_hub_have_the_size_they_are_known_for(name, tmp_path):
    assert trees.num_parameters(abstract_params(spec_of(name, tmp_path))) == PARAMETERS[name]


def test_a_file_stands_for_every_family():
    kinds = {config.get("text_config", config)["model_type"] for config in HUB.values()}
    assert set(FAMILIES) - kinds == {"ministral"} and PARAMETERS.keys() == HUB.keys()


# Each row: how many layers look back how far, kinds of rotation (None: no rotation), and the size of the first.
DETAILS: dict[str, tuple[dict[int | None, int], set[str | None], int | None]] = {
    "gpt2": ({None: 12}, {None}, None),
    "pythia-70m": ({None: 6}, {"default"}, 16),
    "bloom-560m": ({None: 24}, {None}, None),
    "phi-1": ({None: 24}, {"default"}, 32),
    "Phi-3-mini-4k-instruct": ({2047: 32}, {"default"}, 96),
    "Phi-3-mini-128k-instruct": ({262144: 32}, {"longrope"}, 96),
    "Phi-4-mini-instruct": ({262144: 32}, {"longrope"}, 96),
    "gemma-2-2b-it": ({4096: 13, None: 13}, {"default"}, 256),
    "gemma-3-1b-it": ({512: 22, None: 4}, {"default"}, 256),
    "gemma-3-12b-it": ({1024: 40, None: 8}, {"default", "linear"}, 256),
    "gemma-4-26B-A4B": ({1024: 25, None: 5}, {"default", "proportional"}, 256),
    "Mistral-7B-v0.1": ({4096: 32}, {"default"}, 128),
    "Mistral-7B-Instruct-v0.3": ({None: 32}, {"default"}, 128),
    "Devstral-Small-2-24B-Instruct-2512": ({None: 40}, {"yarn"}, 128),
    "Llama-3.1-8B-Instruct": ({None: 32}, {"llama3"}, 128),
    "SmolLM3-3B": ({None: 36}, {"default", None}, 128),
    "DeepSeek-R1-Distill-Qwen-1.5B": ({None: 28}, {"default"}, 128),
    "Olmo-3-1025-7B": ({4096: 24, None: 8}, {"default", "yarn"}, 128),
    "gpt-oss-20b": ({128: 12, None: 12}, {"yarn"}, 64),
    "c4ai-command-r7b-12-2024": ({4096: 24, None: 8}, {"default", None}, 128),
    "stablelm-3b-4e1t": ({None: 32}, {"default"}, 20),
    "GLM-4-9B-0414": ({None: 40}, {"default"}, 64),
    "AFM-4.5B": ({None: 36}, {"yarn"}, 128),
    "EXAONE-4.0-1.2B": ({None: 30}, {"llama3"}, 64),
    "EXAONE-4.0-32B": ({4096: 48, None: 16}, {"llama3", None}, 128),
}


@pytest.mark.parametrize("name", DETAILS)
def test_windows_and_rotations_are_those_of_the_file(name, tmp_path):
    mixers = attentions_of(name, tmp_path)
    windows = [mixer.window for mixer in mixers]
    turns = [mixer.rope for mixer in mixers]
    found = {window: windows.count(window) for window in windows}
    assert (found, {rope and rope.kind for rope in turns}, turns[0] and turns[0].channels) == DETAILS[name]


def test_other_details_are_those_of_the_file(tmp_path):
    gpt2, opt, bloom = (spec_of(name, tmp_path) for name in ("gpt2", "opt-350m", "bloom-560m"))
    assert (gpt2.positions, gpt2.position_offset, gpt2.tied, bloom.positions) == (1024, 0, True, None)
    assert (opt.positions, opt.position_offset, opt.embed_width, opt.final_norm) == (2048, 2, 512, False)
    hunyuan, ministral, oss = (
        attentions_of(name, tmp_path)[0]
        for name in ("HunyuanImage-2.1-reprompt", "Ministral-3-3B-Instruct-2512", "gpt-oss-20b")
    )
    assert hunyuan.rope and hunyuan.rope.kind == "default"
    assert hunyuan.rope.theta == pytest.approx(10000.0 * 1000.0 ** (128 / 126))
    assert ministral.rope and (ministral.temperature, ministral.rope.magnitude) == ((0.1, 16384), 1.0)
    assert oss.rope and (oss.sinks, oss.rope.truncate) == (True, False)


def test_experts_are_those_of_the_file(tmp_path):
    """Each row: how many layers have none, and of the last their number, how many are chosen, and what scales them."""
    wanted = {
        "DeepSeek-V3": (3, 256, 8, "sigmoid", True, 2.5),
        "gemma-4-26B-A4B": (0, 128, 8, "softmax", True, 1.0),
        "Mixtral-8x7B-v0.1": (0, 8, 2, "softmax", True, 1.0),
        "OLMoE-1B-7B-0924": (0, 64, 8, "softmax", False, 1.0),
        "Qwen3-30B-A3B": (0, 128, 8, "softmax", True, 1.0),
    }
    for name, row in wanted.items():
        found = [layer.experts for layer in spec_of(name, tmp_path).layers]
        last = found[-1]
        assert last and row == (
            *(found.count(None), last.count, last.chosen),
            *(last.scores, last.normalised, last.scaling),
        )


# ------------------------------------------------------------------------------------------------ what is refused


def test_models_with_code_of_their_own_are_refused_and_packed_ones_are_read_as_plain_ones(tmp_path):
    packed = {name for name, config in HUB.items() if "quantization_config" in config}
    coded = {name for name, config in HUB.items() if "auto_map" in config}
    assert len(packed) >= 3 and len(coded) >= 5
    for name in packed:
        config = {key: value for key, value in HUB[name].items() if key != "auto_map"}
        assert read_spec(write(tmp_path, config)) == spec_of(name, tmp_path)
        three_bits = config | {"quantization_config": {"quant_method": "gptq", "bits": 3}}
        assert "quantization_config.bits = 3" in refusal(three_bits, tmp_path)
    for name in coded:
        assert "auto_map = " in refusal(HUB[name], tmp_path)


def of_family(kind: str, **changes: Any) -> dict[str, Any]:
    """A file of the hub of this family, with changes where its decoder is described."""
    name = next(name for name, config in HUB.items() if config.get("text_config", config)["model_type"] == kind)
    inner = HUB[name].get("text_config")
    return plain(name, **changes) if inner is None else plain(name, text_config=inner | changes)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in FIXED.items() for key in keys])
def test_a_key_that_is_passed_over_must_say_what_is_computed(kind, key, tmp_path):
    read_spec(write(tmp_path, of_family(kind, **{key: FIXED[kind][key]})))
    other = "all" if key == "use_bidirectional_attention" else 7
    assert re.search(rf"{key} = \S+: not supported, only", refusal(of_family(kind, **{key: other}), tmp_path))


@pytest.mark.parametrize("kind", FIXED)
def test_transformers_passes_over_these_keys(kind):
    package = find_spec("transformers")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "models" / kind.removesuffix("_text")
    code = "".join(path.read_text() for path in folder.glob("[cm]o*_*.py"))
    read = {key for key in FIXED[kind] if re.search(rf"config\.{key}\b|^    {key}:", code, re.MULTILINE)}
    assert "config.hidden_size" in code and read <= {"use_bidirectional_attention"}


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("falcon", "n_head"),
        ("falcon", "n_layer"),
        ("gpt2", "n_ctx"),
        ("gpt_oss", "experts_per_token"),
        ("hunyuan_v1_dense", "attention_head_dim"),
        ("starcoder2", "layer_norm_epsilon"),
    ],
)
def test_an_older_name_must_say_the_same_as_the_newer(kind, key, tmp_path):
    assert f"{key} = 3: differs from {AGAIN[key]} = " in refusal(of_family(kind, **{key: 3}), tmp_path)


def test_a_family_may_have_two_names_for_one_key_but_not_two_values(tmp_path):
    config = of_family("qwen3_moe")
    assert read_spec(write(tmp_path, config | {"num_local_experts": 128})) == read_spec(write(tmp_path, config))
    assert "experts = " in refusal(config | {"num_local_experts": 64}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
        ("llama", {"num_experts": 8}),
        ("bloom", {"n_embed": "wide"}),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("falcon", {"alibi": True}),
    ],
)
def test_what_would_change_the_model_is_refused(kind, changes, tmp_path):
    refusal(of_family(kind, **changes), tmp_path)
