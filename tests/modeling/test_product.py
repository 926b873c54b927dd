"""The forms of the attention product against each other and against the formula in float64."""

import copy

import pytest
import torch

from blsam.modeling.attention import Attention
from blsam.modeling.product import BLOCK, FORMS, choose_form
from tests.helpers import gap, randomize


def inputs(windows=3, heads=2, size=(5, 7), n=9, d=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((windows, heads, n, d), (windows, heads, n, size[0]), (windows, heads, n, size[1]))
    q, rel_h, rel_w = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    kv = torch.randn(2, windows, heads, *size, d, generator=generator).to(dtype)
    return q, rel_h, rel_w, kv


def by_hand(q, rel_h, rel_w, kv):
    """One query after the other, in float64."""
    q, rel_h, rel_w, kv = (t.double() for t in (q, rel_h, rel_w, kv))
    (k, v), out = kv, torch.empty_like(q)
    for g, head, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        logits = (k[g, head] @ q[g, head, i]) * q.shape[-1] ** -0.5
        logits = logits + rel_h[g, head, i][:, None] + rel_w[g, head, i][None]
        out[g, head, i] = (logits.flatten().softmax(0)[:, None] * v[g, head].flatten(0, 1)).sum(0)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FORMS))
@torch.no_grad()
def test_every_form_is_the_formula(name, dtype):
    q, rel_h, rel_w, kv = inputs(dtype=dtype)
    product = FORMS[name]((5, 7), 16)
    out = product(q, rel_h * product.scale, rel_w * product.scale, product.keys(kv))
    difference = gap(out.double(), by_hand(q, rel_h, rel_w, kv))
    assert out.shape == q.shape and difference < (1e-5 if dtype == torch.float32 else 0.1), difference


@torch.no_grad()
def test_blocks_cut_windows_and_queries():
    q, rel_h, rel_w, kv = inputs(windows=5, heads=3, size=(40, 40), n=1500)
    assert q.shape[2] * 1600 > BLOCK, "one window's logits fill more than a block"
    plain, blocked = (FORMS[name]((40, 40), 16) for name in ("plain", "blocked"))
    a, b = (product(q, rel_h, rel_w, product.keys(kv)) for product in (plain, blocked))
    assert gap(b, a) < 1e-5, gap(b, a)
    # in bfloat16 its blocks share two pieces of memory
    half = [t.bfloat16() for t in (q, rel_h, rel_w)]
    c = blocked(*half, blocked.keys(kv.bfloat16()))
    error = (c - a).square().mean().sqrt() / a.std()
    assert error < 0.01, error


@pytest.mark.parametrize("name", ["plain", "folded"])
def test_gradients_are_those_of_the_formula(name):
    given = [t.double().requires_grad_() for t in inputs()]
    product = FORMS[name]((5, 7), 16)
    q, rel_h, rel_w, kv = given
    weight = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = product(q, rel_h * product.scale, rel_w * product.scale, product.keys(kv))
    expected = torch.autograd.grad((by_hand(*given) * weight).sum(), given)
    for name_of, a, b in zip(
        ("q", "rel_h", "rel_w", "kv"), torch.autograd.grad((ours * weight).sum(), given), expected
    ):
        assert gap(a, b) < 1e-6, f"{name_of}: {gap(a, b):.1e}"


@pytest.mark.parametrize(
    ("dtype", "device", "gradient", "count", "weights", "form"),
    [
        (torch.float32, "cpu", False, 64, 2**12, "blocked"),
        (torch.float32, "cpu", True, 64, 2**12, "folded"),
        (torch.bfloat16, "cpu", False, 64, 2**12, "folded"),
        (torch.bfloat16, "cpu", True, 64, 2**30, "plain"),
        (torch.bfloat16, "cpu", True, 4096, 2**26, "plain"),
        (torch.bfloat16, "cpu", True, 4096, 2**28, "folded"),
        (torch.bfloat16, "cuda", True, 64, 2**12, "folded"),
        (torch.bfloat16, "cuda", True, 4096, 2**26, "folded"),
        (torch.float32, "cuda", False, 64, 2**12, "folded"),
    ],
)
def test_the_form_is_chosen_by_dtype_device_gradient_and_sizes(
    dtype, device, gradient, count, weights, form, monkeypatch
):
    monkeypatch.setattr("blsam.modeling.product.HELD", 2**27)  # whatever this processor has
    monkeypatch.setattr("blsam.modeling.product.KIND", "amx")
    assert choose_form(dtype, torch.device(device), gradient, count, weights) == form


def test_with_a_matrix_unit_weights_are_held_in_windows_alone(monkeypatch):
    monkeypatch.setattr("blsam.modeling.product.HELD", 0)
    chosen = [choose_form(torch.bfloat16, torch.device("cpu"), True, count, 2**20) for count in (196, 4096)]
    assert chosen == ["plain", "folded"]


@pytest.mark.parametrize(
    ("kind", "device", "gradient", "form"),
    [
        ("avx512_bf16", "cpu", False, "blocked"),
        ("avx512_bf16", "meta", False, "blocked"),
        ("avx512_bf16", "cpu", True, "folded"),
        ("avx512_bf16", "cuda", False, "folded"),
        ("amx", "cpu", False, "folded"),
        ("avx512", "cpu", False, "folded"),
        ("aarch64", "cpu", False, "folded"),
    ],
)
def test_bfloat16_is_blocked_where_that_was_measured(kind, device, gradient, form, monkeypatch):
    monkeypatch.setattr("blsam.modeling.product.KIND", kind)
    assert choose_form(torch.bfloat16, torch.device(device), gradient, 4096, 2**30) == form


@torch.no_grad()
def test_between_products_in_bfloat16_the_values_are_float32():
    q, rel_h, rel_w, kv = inputs(windows=2, heads=2, size=(14, 14), n=50, dtype=torch.bfloat16)
    exact, errors = by_hand(q, rel_h, rel_w, kv), {}
    for name, form in FORMS.items():
        product = form((14, 14), 16)
        out = product(q, rel_h * product.scale, rel_w * product.scale, product.keys(kv))
        errors[name] = ((out.double() - exact).square().mean().sqrt() / exact.std()).item()
    assert errors["folded"] < errors["blocked"] < 0.5 * errors["plain"] < 0.005, errors


@pytest.mark.parametrize("window", [0, 7])
@torch.no_grad()
def test_attention_under_autocast_is_near_that_in_float64(window):
    """Of all tokens; the form that only some processors choose."""
    attention = randomize(Attention(32, 32, 2, window, (10, 10))).eval()
    x = torch.randn(2, 10, 10, 32, generator=torch.Generator().manual_seed(0))
    exact, half = copy.deepcopy(attention).double()(x.double()), copy.deepcopy(attention)
    half.form = "blocked"
    with torch.autocast("cpu", torch.bfloat16):
        out = half(x)
    assert out.dtype == torch.bfloat16 and gap(out.double(), exact) < 0.05, gap(out.double(), exact)


@pytest.mark.parametrize("name", ["plain", "folded"])
def test_gradients_under_autocast_are_near_those_in_float64(name):
    attention = randomize(Attention(32, 32, 2, 7, (10, 10)))
    x = torch.randn(2, 10, 10, 32, generator=torch.Generator().manual_seed(0))
    exact, half = (copy.deepcopy(attention) for _ in range(2))
    exact.double()(x.double()).square().sum().backward()
    half.form = name
    with torch.autocast("cpu", torch.bfloat16):
        out = half(x)
    out.float().square().sum().backward()
    for (key, a), b in zip(half.named_parameters(), exact.parameters()):
        if key != "qkv.bias":  # that of the keys is zero but for rounding
            error = (a.grad.double() - b.grad).norm() / b.grad.norm()
            assert error < 0.03, f"{key}: {error:.1e}"


@pytest.mark.parametrize("trained", ["rel_pos_h", "rel_pos_w", "qkv.bias", "qkv.weight"])
@pytest.mark.parametrize("window", [0, 7], ids=["global", "window"])
def test_any_parameter_can_be_trained_alone(window, trained):
    attention = randomize(Attention(32, 32, 2, window, (10, 10))).requires_grad_(False)
    attention.get_parameter(trained).requires_grad_()
    attention(torch.randn(1, 10, 10, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert attention.get_parameter(trained).grad.abs().sum() > 0
