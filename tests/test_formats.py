"""Number formats: bits by hand, and the rate at which operands compute."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import sympy

from rooflm import Format, Precision, load_format
from rooflm.roofline.formats import format_names, operand_rate
from rooflm.roofline.sparsity import INDEXES, Layout

# Bits of one group written out: elements, scale, zero point or minimum, over its elements.
BITS_BY_HAND = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "fp8": 8,
    "int8": 8,
    "int4": 4,
    "int3": 3,
    "int2": 2,
    "binary": 1,
    "ternary": 2,
    "int4-g128": Fraction(128 * 4 + 16 + 4, 128),
    "int4-g128-sym": Fraction(128 * 4 + 16, 128),
    "int3-g64": Fraction(64 * 3 + 16 + 3, 64),
    "int2-g32-sym": Fraction(32 * 2 + 16, 32),
    "int8-g32": Fraction(32 * 8 + 16 + 8, 32),
    "mxfp4": Fraction(32 * 4 + 8, 32),
    "nvfp4": Fraction(16 * 4 + 8, 16),
    "nf4": Fraction(64 * 4 + 32, 64),
    "q4_1": Fraction(32 * 4 + 16 + 16, 32),
    # Of four elements two are kept, each with two bits for its place.
    "fp16-2:4": Fraction(2 * 16 + 2 * 2, 4),
    "int8-2:4": Fraction(2 * 8 + 2 * 2, 4),
    "int4-g128-2:4": Fraction(2 * 4 + 2 * 2, 4) + Fraction(16 + 4, 128),
    "fp16-4:8": Fraction(4 * 16 + 4 * 3, 8),
    "fp16-1:4": Fraction(1 * 16 + 1 * 2, 4),
    # Of a hundred elements fifty or thirty are kept.
    "fp16-50%-bitmap": Fraction(50 * 16 + 100, 100),
    "int4-50%-bitmap": Fraction(50 * 4 + 100, 100),  # SparseGPT, section 3.5: 3 bits
    "int4-g64-sym-50%-bitmap": 3 + Fraction(16, 64),
    "fp16-50%-csr16": Fraction(50 * (16 + 16), 100),
    "fp16-50%-csr32": Fraction(50 * (16 + 32), 100),
    "bf16-75%-tiled-csl": Fraction(25 * 32, 100) + Fraction(32, 128 * 64),
    "fp16-0%-bitmap": 17,
}


@pytest.mark.parametrize(("name", "bits"), BITS_BY_HAND.items())
def test_bits_per_element_count_the_scales_of_a_group(name, bits):
    assert Fraction(load_format(name).bits) == bits
    assert Fraction(load_format(name).bytes) == Fraction(bits) / 8


def test_double_quantized_nf4_is_the_papers_0_127_bits_above_four():
    # QLoRA, arXiv 2305.14314, section 3: 8/64 + 32/(64 * 256) = 0.127 bits per parameter.
    assert load_format("nf4-dq").bits - 4 == pytest.approx(8 / 64 + 32 / (64 * 256), rel=1e-12)
    assert round(load_format("nf4-dq").bits, 3) == 4.127


def test_ideal_ternary_is_the_entropy_of_three_symbols():
    assert 2 ** load_format("ternary-ideal").bits == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "rate"),
    [
        ("int4-g128", "fp16", "fp16"),  # W4A16 computes at FP16
        ("int8", "int8", "int8"),  # W8A8 at INT8
        ("int4", "int8", "int8"),
        ("int8", "fp8", "fp16"),  # equal widths of different kinds
        ("fp16", "bf16", "fp16"),
        ("bf16", "bf16", "bf16"),
        ("nf4", "bf16", "bf16"),
        ("mxfp4", "nvfp4", "fp4"),
        ("mxfp4", "fp8", "fp8"),
        ("binary", "int8", "int8"),
        ("tf32", "fp16", "tf32"),
        ("tf32", "fp32", "fp32"),
    ],
)
def test_a_product_computes_at_the_wider_operands_rate(x, y, rate):
    assert operand_rate(load_format(x), load_format(y)) == rate
    assert operand_rate(load_format(y), load_format(x)) == rate


@pytest.mark.parametrize(
    "name",
    ["int5", "int4-g0", "fp17", "", "int4-g128-asym", "x" * 10_000, "fp16-4:2", "fp16-2:2",
     "fp16-0:4", "fp16-2:100", "fp16-100%-bitmap", "fp16-50%", "fp16-50%-csr", "fp16-bitmap",
     "int4-50%-tiled-csl", "fp16-2:4-2:4", "fp17-2:4", "-2:4", "fp16--5%-bitmap", "fp16-5.%-csr16",
     "fp16-2:4-50%-bitmap"],
)  # fmt: skip
def test_an_unknown_format_is_named_in_one_line(name):
    with pytest.raises(ValueError, match="unknown number format") as error:
        load_format(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


def test_a_format_must_be_a_name():
    for wrong in (16, ["int4"], None):
        with pytest.raises(ValueError, match="named by a string"):
            Precision(weights=wrong)


def test_the_nearest_format_is_offered():
    with pytest.raises(ValueError, match="nearest: mxfp4"):
        load_format("mxfp-4")


def test_every_named_format_loads_in_any_case():
    for name in format_names():
        assert load_format(name.upper()) is load_format(name)


@pytest.mark.parametrize("name", ["fp16-2:4", "int4-g128-50%-bitmap", "fp8-99.5%-csr32"])
def test_a_sparse_format_keeps_what_its_values_are(name):
    values, form = load_format(name.split("-")[0]), load_format(name.upper())
    assert form is load_format(name.upper()) and form == load_format(name)
    assert form.name == name and form.is_sparse and not values.is_sparse
    assert (form.element_bits, form.computes_as) == (values.element_bits, values.computes_as)
    assert pickle.loads(pickle.dumps(form)) == form and pickle.loads(pickle.dumps(form)).is_sparse
    assert not pickle.loads(pickle.dumps(values)).is_sparse


def test_an_alias_gives_a_sparse_format_its_own_name():
    assert load_format("half-2:4").name == "fp16-2:4"
    assert load_format("fp8-e4m3-50%-bitmap").name == "fp8-50%-bitmap"


@pytest.mark.parametrize("field", ["activations", "kv_cache", "state"])
def test_only_weights_may_be_sparse(field):
    with pytest.raises(ValueError, match=f"{field} is 'fp16-2:4'; allowed: a dense format"):
        Precision(**{field: "fp16-2:4"})
    assert Precision(weights="fp16-2:4").w == 9 / 8


def test_the_density_of_a_format_may_be_a_sweep_or_a_symbol():
    shares, d = np.array([0.1, 0.5]), sympy.Symbol("d", positive=True)
    for density in (shares, d):
        layout = Layout("sweep", density, INDEXES["bitmap"])
        w = Precision(weights=Format("sweep", 16, "fp16", layout=layout)).w
        assert np.all((w - (16 * density + 1) / 8) == 0)
