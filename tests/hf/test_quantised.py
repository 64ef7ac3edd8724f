"""Packed weights of every format are read as the numbers that their formula makes of them, and a folder of them is the
plain folder that it stands for: read, trained on, and exported."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import sharding, trees
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import dtypes_written, load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.quantised import Quantised, opened
from dpo_jax.hf.verify import check
from dpo_jax.model.decoder import Model, abstract_params, logits
from tests.support import packed_weights as packed
from tests.support.packed_weights import BF16, E8, Packed
from tests.support.tiny_folders import NUMPY_DTYPES, write_folder, write_index

FOLDERS = (
    *("bnb/llama_nf4_double", "bnb/llama_fp4", "bnb/llama_int8"),
    *("formats/gpt_oss_mxfp4", "formats/qwen3_fp8", "formats/llama_gptq", "formats/llama_awq"),
    *("formats/llama_ct_w4_g32_sym", "formats/llama_ct_fp8_channel"),
)
E5 = np.dtype(ml_dtypes.float8_e5m2)

CASES = {
    "nf4": lambda rng: packed.four_bits(rng, (6, 64)),
    "nf4, blocks across rows, the last one short": lambda rng: packed.four_bits(rng, (7, 30)),
    "nf4, an odd number of numbers": lambda rng: packed.four_bits(rng, (3, 5), block=32),
    "nf4, double": lambda rng: packed.four_bits(rng, (40, 50), block=32, nested=16),
    "nf4, double, the last outer block short": lambda rng: packed.four_bits(rng, (21, 50), nested=10),
    "nf4, stored as bfloat16": lambda rng: packed.four_bits(rng, (8, 30), storage=BF16, nested=256),
    "nf4, stored as float32": lambda rng: packed.four_bits(rng, (9, 11), storage=np.float32),
    "fp4, blocks of 128": lambda rng: packed.four_bits(rng, (24, 40), block=128, kind="fp4"),
    "int8": lambda rng: packed.int8(rng, (5, 13)),
    "mxfp4": lambda rng: packed.mxfp4_experts(rng, 3, 5, 64),
    "mxfp4, scales as float8_e8m0": lambda rng: packed.mxfp4_experts(rng, 1, 4, 32, E8),
    "fp8": lambda rng: packed.fp8(rng, (40, 24), (8, 8)),
    "fp8, ragged both ways": lambda rng: packed.fp8(rng, (130, 150)),
    "fp8, ragged, where equal blocks would fit": lambda rng: packed.fp8(rng, (12, 20), (8, 16)),
    "fp8, less than a block": lambda rng: packed.fp8(rng, (3, 5)),
    "fp8, scales as bytes of ue8m0": lambda rng: packed.fp8(rng, (9, 17), (8, 8), scale="U8"),
    "fp8, scales as float8_e8m0": lambda rng: packed.fp8(rng, (9, 17), (8, 8), scale="F8_E8M0"),
    "fp8, one scale": lambda rng: packed.fp8(rng, (6, 7), None),
    "fp8, e5m2": lambda rng: packed.fp8(rng, (6, 7), (4, 4), kind=E5),
    **{f"gptq, {bits} bits": lambda rng, bits=bits: packed.gptq(rng, (48, 64), bits) for bits in (2, 4, 8)},
    "gptq, second version": lambda rng: packed.gptq(rng, (16, 64), version="gptq_v2"),
    "gptq, by activation": lambda rng: packed.gptq(rng, (24, 64), group=16, order=True),
    "gptq, no numbers of groups": lambda rng: packed.gptq(rng, (8, 64), group=16, with_groups=False),
    "gptq, the last group short": lambda rng: packed.gptq(rng, (8, 40), group=32),
    "gptq, outputs that no word divides": lambda rng: packed.gptq(rng, (13, 40), bits=8, group=8),
    "awq": lambda rng: packed.awq(rng, (40, 64)),
    "awq, the last group short": lambda rng: packed.awq(rng, (8, 50), group=32),
    "words of 4 bits": lambda rng: packed.words(rng, (24, 64)),
    "words of 4 bits, a width that no word divides": lambda rng: packed.words(rng, (5, 37), group=8),
    "words of 8 bits, one scale a row": lambda rng: packed.words(rng, (7, 30), bits=8, group=None),
    "words of 2 bits": lambda rng: packed.words(rng, (6, 35), bits=2, group=16, scale=np.float32),
    "words with zeros": lambda rng: packed.words(rng, (21, 64), zeros="packed"),
    "words with zeros as bytes": lambda rng: packed.words(rng, (5, 64), zeros="bytes"),
    "words by activation": lambda rng: packed.words(rng, (5, 64), group=16, order=True, zeros="packed"),
    "float8 by row": lambda rng: packed.byte_codes(rng, (7, 9)),
    "float8, one scale": lambda rng: packed.byte_codes(rng, (7, 9), strategy="tensor"),
    "float8 by blocks, ragged": lambda rng: packed.byte_codes(rng, (9, 21), strategy="block", block=(4, 8)),
    "float8 by groups": lambda rng: packed.byte_codes(rng, (9, 24), strategy="group", block=(1, 8)),
    "int8 by row": lambda rng: packed.byte_codes(rng, (7, 9), np.int8),
    "int8 by row with zeros": lambda rng: packed.byte_codes(rng, (7, 9), np.int8, zeros=True),
    "nvfp4": lambda rng: packed.fp4_rows(rng, (5, 32), nv=True),
    "nvfp4, the last group short": lambda rng: packed.fp4_rows(rng, (5, 34), nv=True),
    "mxfp4 by row": lambda rng: packed.fp4_rows(rng, (5, 64), nv=False),
    "mxfp4 by row, scales as float8_e8m0": lambda rng: packed.fp4_rows(rng, (5, 64), nv=False, powers=E8),
}


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def equal(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Same shape, dtype and bits."""
    return found.shape == wanted.shape and found.dtype == wanted.dtype and np.array_equal(bits(found), bits(wanted))


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# ------------------------------------------------------------------------------------------------ one weight


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_what_its_formula_says_to_the_last_bit(case, tmp_path):
    one = CASES[case](rng())
    source = opened(packed.write_one(tmp_path, one))
    name = "x" if "_blocks" in one.tensors else "x.weight"
    assert set(source.infos) == {"norm.weight", name}  # nothing else of it is to be seen
    assert source.infos[name].shape == one.weight.shape and source.is_packed(name)
    assert equal(opened(tmp_path, unrounded=True).exact(name), one.weight)
    stated = np.dtype(np.float32)  # what bitsandbytes' state says here; others say nothing
    assert equal(source.exact(name), one.weight.astype(stated))
    wanted = one.weight.astype(tensors.STORED[source.infos[name].dtype])
    assert equal(source.read(name), wanted)
    part = (slice(1, 3), slice(2, 5))
    assert equal(source.read(name, part), wanted[part]) and equal(source.exact(name, part), one.weight[part])
    assert equal(np.concatenate(list(source.pieces(name))), one.weight.reshape(-1))


def test_rows_at_a_time_are_the_same_numbers(tmp_path, monkeypatch):
    for number, case in enumerate(CASES):
        one = CASES[case](rng())
        folder = packed.write_one(tmp_path / str(number), one)
        monkeypatch.setattr("dpo_jax.hf.dequantise.ROWS_AT_ONCE", 20)
        name = "x" if "_blocks" in one.tensors else "x.weight"
        assert equal(opened(folder, unrounded=True).exact(name), one.weight), case


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_four_bits_become_what_is_written_beside_them_whatever_the_config_says(dtype, tmp_path):
    one = packed.four_bits(rng(), (6, 30), dtype=dtype)
    folder = packed.write_one(tmp_path, one, dtype="float32")
    source, named = opened(folder), NUMPY_DTYPES[dtype]
    assert source.infos["x.weight"].dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert equal(source.exact("x.weight"), one.weight.astype(named))
    assert equal(source.read("x.weight"), one.weight.astype(named))
    assert equal(opened(folder, unrounded=True).exact("x.weight"), one.weight)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"torch_dtype": "float32"}, "F32"),
        ({"text_config": {"torch_dtype": "float16"}}, "F16"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"dtype": "auto"}, "BF16"),
        ({}, "BF16"),
    ],
)
def test_other_formats_become_what_the_config_says_and_bfloat16_if_it_says_nothing(config, dtype, tmp_path):
    one = packed.awq(rng(), (8, 32))
    folder = packed.write_one(tmp_path, one)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": one.config}))
    source = opened(folder)
    assert source.infos["x.weight"].dtype == dtype
    assert equal(source.read("x.weight"), one.weight.astype(tensors.STORED[dtype]))
    assert equal(source.exact("x.weight"), one.weight)


def test_numbers_of_groups_that_are_not_set_are_those_of_their_order(tmp_path):
    one = packed.words(rng(), (5, 64), group=16)
    one.tensors[".weight_g_idx"] = np.full(64, -1, np.int32)
    assert equal(opened(packed.write_one(tmp_path, one)).exact("x.weight"), one.weight)


def test_a_weight_of_four_bits_is_to_be_had_packed(tmp_path):
    one = packed.four_bits(rng(), (7, 30), nested=4, storage=BF16)
    source = opened(packed.write_one(tmp_path, one))
    assert isinstance(source, Quantised)
    codes, table, absmax, block, shape = source.four_bits("x.weight") or pytest.fail("it is packed")
    assert codes.shape == (105,) and codes.dtype == np.uint8 and absmax.dtype == np.float32
    high = [codes[k // 2] >> 4 if k % 2 == 0 else codes[k // 2] & 15 for k in range(210)]
    values = np.array([table[code] * absmax[k // block] for k, code in enumerate(high)], np.float32)
    assert equal(values.reshape(shape), one.weight)
    assert source.four_bits("norm.weight") is None


def test_a_folder_without_packed_weights_is_opened_as_it_is(tmp_path):
    folder = write_folder(tmp_path / "m", num_hidden_layers=1)
    assert type(opened(folder)) is tensors.Tensors


def test_floats_of_eight_bits_that_are_carried_along_are_read(tmp_path):
    for kind in (packed.F8, E5, E8):
        array = np.arange(1, 25, dtype=np.uint8).view(kind).reshape(4, 6)
        save_file({"a": array, "none": array[:0]}, tmp_path / "model.safetensors")
        source = tensors.Tensors(tmp_path)
        assert equal(source.read("a"), array) and equal(source.read("a", (slice(1, 3), slice(2))), array[1:3, :2])
        assert equal(source.read("none"), array[:0])


# ------------------------------------------------------------------------------------------------ a whole folder

ENCODERS = {
    "nf4": lambda r, shape: packed.four_bits(r, shape, dtype="bfloat16", nested=8),
    "int8": packed.int8,
    "fp8": lambda r, shape: packed.fp8(r, shape, (20, 20)),
    "gptq": lambda r, shape: packed.gptq(r, shape, group=16, order=True),
    "awq": lambda r, shape: packed.awq(r, shape, group=16),
    "words": lambda r, shape: packed.words(r, shape, group=16, zeros="packed"),
    "float8": packed.byte_codes,
}


def quantised_folder(folder, kind: str, **options):
    """A folder of packed weights, and all tensors of the plain one."""
    shards = options.pop("shards", 1)
    options = {"num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"], **options}
    return folder, packed.pack(write_folder(folder, dtype="bfloat16", **options), ENCODERS[kind], shards)


def plain_folder(folder, arrays, like):
    """The plain folder of these tensors."""
    folder.mkdir()
    table = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if k != "quantization_config"}))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


def leaves(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in trees.paths(model.params).items()}


def same_leaves(left: Model, right: Model) -> bool:
    one, other = leaves(left), leaves(right)
    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_packed_folder_is_the_plain_folder_of_its_dequantised_weights(kind, tmp_path):
    folder, arrays = quantised_folder(tmp_path / "m", kind, shards=3)
    if kind == "nf4":  # these name the dtype that they become
        arrays = {name: array.astype(BF16) for name, array in arrays.items()}
    plain = load_hf(plain_folder(tmp_path / "plain", arrays, folder))
    model = load_hf(folder)
    assert model.spec == plain.spec and same_leaves(model, plain)
    moved = save_hf(model, tmp_path / "export", folder)
    assert moved is not None and moved.weights == 0 and moved.of == sum(array.size for array in arrays.values())
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written == json.loads((tmp_path / "plain" / "config.json").read_text())
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found.keys() == arrays.keys()
    assert all(equal(found[name], array.astype(BF16)) for name, array in arrays.items())
    assert not (tmp_path / "export" / tensors.INDEX).exists() and not tensors.changed_files(tmp_path / "export")
    assert {*dtypes_written(model.spec, folder).values()} == {"bfloat16"}


def test_an_export_in_float32_keeps_every_digit(tmp_path):
    folder, arrays = quantised_folder(tmp_path / "m", "gptq")
    moved = save_hf(load_hf(folder), tmp_path / "export", folder, dtype="float32")
    assert moved is not None and moved.weights == 0
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert all(equal(found[name], array.astype(np.float32)) for name, array in arrays.items())


def test_what_moved_is_counted_against_the_dequantised_weights(tmp_path):
    folder, _ = quantised_folder(tmp_path / "m", "awq")
    model = load_hf(folder)
    params = trees.from_paths(
        {
            name: leaf.at[(0,) * leaf.ndim].add(1.0) if name.endswith("up/kernel") else leaf
            for name, leaf in trees.paths(model.params).items()
        }
    )
    moved = save_hf(Model(model.spec, params), tmp_path / "export", folder)
    assert moved is not None and moved.weights == 1


def test_a_large_export_is_split_and_lists_its_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.hf.shards.MAX_BYTES", 10_000)
    folder, arrays = quantised_folder(tmp_path / "m", "words", shards=2)
    model = load_hf(folder)
    save_hf(model, tmp_path / "export", folder)
    listed = json.loads((tmp_path / "export" / tensors.INDEX).read_text())["weight_map"]
    assert listed.keys() == arrays.keys() and len(set(listed.values())) > 2
    assert {*tensors.Tensors(tmp_path / "export").infos} == {*arrays}


def test_the_index_of_packed_tensors_is_never_taken_over(tmp_path):
    folder, arrays = quantised_folder(tmp_path / "m", "gptq")
    write_index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))
    save_hf(load_hf(folder), tmp_path / "export", folder)
    export = tensors.Tensors(tmp_path / "export")  # refuses an index that does not list what is there
    assert export.infos.keys() == arrays.keys() and {*opened(folder).infos} == {*arrays}


def test_each_device_gets_its_part_and_a_weight_is_computed_once(tmp_path, monkeypatch):
    folder, _ = quantised_folder(tmp_path / "m", "fp8")
    whole, spec = load_hf(folder), read_spec(folder)
    reads = []
    exact = Quantised.exact
    monkeypatch.setattr(Quantised, "exact", lambda self, name, index=(): reads.append(name) or exact(self, name, index))
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    found = load_hf(folder, shardings=sharding.param_shardings(abstract_params(spec), mesh))
    assert same_leaves(whole, found)
    packed_ones = [name for name in reads if name.endswith("proj.weight")]
    assert len(packed_ones) == len(set(packed_ones)) == 14


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_zeros_that_the_model_has_not_are_left_behind(value, tmp_path):
    folder, arrays = quantised_folder(tmp_path / "m", "gptq")
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored |= {f"model.layers.{i}.mlp.down_proj.bias": np.full(32, value, np.float16) for i in range(2)}
    save_file(stored, path, metadata={"format": "pt"})
    if value:
        with pytest.raises(UserError, match=r"down_proj.bias' \(2 such\) belongs to nothing"):
            load_hf(folder)
        return
    save_hf(load_hf(folder), tmp_path / "export", folder)
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == arrays.keys()
    assert check(folder, torch=False).ok


def test_gpt_oss_is_read_as_its_library_does(tmp_path):
    names = write_folder(tmp_path / "m", "gpt_oss", "bfloat16", **GPT_OSS)
    arrays = load_file(names / "model.safetensors")
    stored, one = {}, None
    for name, array in arrays.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = array.shape
            one = packed.mxfp4_experts(rng(), experts, outputs, inputs)
            stored |= {name + suffix: tensor for suffix, tensor in one.tensors.items()}
            arrays[name] = one.weight.astype(BF16)
            assert np.array_equal(arrays[name].astype(np.float32), one.weight)  # they are exact in bfloat16
        else:
            stored[name] = array
    assert one is not None
    save_file(stored, names / "model.safetensors", metadata={"format": "pt"})
    table = json.loads((names / "config.json").read_text())
    (names / "config.json").write_text(json.dumps({**table, "quantization_config": one.config}))
    assert same_leaves(load_hf(names), load_hf(plain_folder(tmp_path / "plain", arrays, names)))


GPT_OSS = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "architectures": ["GptOssForCausalLM"],
}


def test_the_export_of_a_packed_folder_is_checked_against_its_dequantised_weights(tmp_path):
    pytest.importorskip("torch")
    folder, _ = quantised_folder(tmp_path / "m", "words", shards=2)
    (folder / "quantize_config.json").write_text("{}")  # would say of the export that it is packed
    lines: list[str] = []
    report = check(folder, keep=tmp_path / "export", say=lines.append)
    assert report.ok and report.quantised == "compressed-tensors", report
    found = {one.what: one.found for one in report.checks}
    assert found["config.json"] == "the same, without quantization_config"
    assert "not run" in found["PyTorch, original"] and "PyTorch and JAX, logits" in found
    assert 0 < float(found["logits, export"].split()[-1]) < 1  # these weights are many digits long
    assert "quantize_config.json" in found["left behind"]
    assert not (tmp_path / "export" / "quantize_config.json").exists()


# ------------------------------------------------------------------------------------------------ what libraries wrote


@pytest.fixture(scope="module")
def goldens(shared):
    """Tensors and folders that the libraries of these formats wrote."""
    if not (shared / "adapters").is_dir():
        pytest.skip("needs the packed folders of the reference models, which are not part of the repository")
    return shared / "adapters"


def cases_of(file, tmp_path) -> dict[str, dict[str, np.ndarray]]:
    """The cases of a file of goldens: tensors by the rest of their names."""
    folder = tmp_path / file.stem
    folder.mkdir()
    shutil.copy(file, folder / "model.safetensors")
    source = tensors.Tensors(folder)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in source.infos:
        case, _, rest = name.partition(".")
        found.setdefault(case, {})[rest] = source.read(name)
    return found


def apart(tmp_path, arrays, config) -> float:
    """Largest difference of a golden weight from ours."""
    own = {f".{name}": array for name, array in arrays.items() if name not in ("input", "dequantized")}
    wanted = arrays["dequantized"]
    found = opened(packed.write_one(tmp_path, Packed(own, wanted, config), dtype="float32")).exact("x.weight")
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return float(np.abs(found.astype(np.float32) - wanted.astype(np.float32)).max())


def test_every_tensor_of_bitsandbytes_is_read_to_the_bit(goldens, tmp_path):
    cases = cases_of(goldens / "bnb/tensors.safetensors", tmp_path)
    assert len(cases) >= 14
    for case, arrays in cases.items():
        way = {"load_in_8bit": True} if case == "int8" else {"load_in_4bit": True}
        far = apart(tmp_path / case, arrays, {"quant_method": "bitsandbytes", **way})
        assert far <= (2e-8 if case == "int8" else 0.0), case  # the library multiplies by 1/127


def test_every_tensor_of_the_other_formats_is_read_to_the_bit(goldens, tmp_path):
    formats = goldens / "formats"
    for case, arrays in cases_of(formats / "fp8_block_tensors.safetensors", tmp_path).items():
        assert apart(tmp_path / case, arrays, {"quant_method": "fp8", "weight_block_size": [128, 128]}) == 0.0, case
    for case, arrays in cases_of(formats / "gptq_tensors.safetensors", tmp_path).items():
        how = {"bits": 8 if "int8" in case else 4, "group_size": 64 if "g64" in case else 32}
        assert apart(tmp_path / case, arrays, {"quant_method": "gptq", **how}) == 0.0, case
    awq = load_file(formats / "awq_tensors.safetensors")
    assert apart(tmp_path / "awq", awq, {"quant_method": "awq", "bits": 4, "group_size": 32}) == 0.0
    report = json.loads((formats / "report.json").read_text())
    for case, arrays in cases_of(formats / "compressed_tensors.safetensors", tmp_path).items():
        known = report[f"ct_{case}"]
        assert apart(tmp_path / case, arrays, packed.compressed(known["format"], **known["args"])) == 0.0, case
    experts = load_file(formats / "mxfp4_tensors.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        own = {f"_{part}": experts[f"{name}_{part}"] for part in ("blocks", "scales")}
        folder = packed.write_one(tmp_path / name, Packed(own, experts[name], {"quant_method": "mxfp4"}))
        assert equal(opened(folder).exact("x"), experts[name])


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_of_every_folder_are_those_of_its_dequantised_weights(folder, goldens):
    golden = load_file(goldens / folder / "golden.safetensors")

    def far(wanted: str, **options) -> float:
        model = load_hf(goldens / folder, **options)
        found = jax.jit(logits, static_argnums=0)(model.spec, model.params, jnp.asarray(golden["ids"]))
        return float(np.abs(np.asarray(found) - golden[wanted]).max())

    assert far("logits") < 2e-5
    if "logits_unrounded" in golden:
        assert far("logits_unrounded", unrounded=True) < 2e-5
    for name in (name for name in golden if name.startswith("dequantized.")):
        assert equal(opened(goldens / folder).exact(name.removeprefix("dequantized.")), golden[name])
