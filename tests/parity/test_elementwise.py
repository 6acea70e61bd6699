"""Norms, rotary embedding and gated products against float64, on every back end."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import (
    add,
    add_norm,
    gated_rms_norm,
    look_up,
    rms_norm,
    rotary,
    sigmoid_mul,
    silu_mul,
)

#: Around the widths of all vectors, of four of them, and the widths of real models.
WIDTHS = (1, 7, 16, 33, 64, 131, 2048)
#: An exponential, a division, a square root and up to five products, each rounded once: found at
#: most 5e-7. The sum of squares is of positive terms, so it loses nothing.
RTOL = 1.5e-6
EPS = 1e-6
BACKENDS = ["reference", *dispatch.ISAS]
ONE, MANY = Compute(threads=1), Compute(threads=5)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each back end and instruction set in turn; one this machine lacks is skipped by name."""
    if request.param == "reference":
        monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    elif request.param not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {request.param}")
    else:
        monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
        monkeypatch.setenv("NYBBLE_ISA", request.param)
    fresh = torch.empty

    def filled(*size: object, **options: object) -> Tensor:  # outputs that a kernel forgets show
        x = fresh(*size, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)
    return str(request.param)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=RTOL, atol=1e-37)


def normed(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_equals_float64(backend: str, width: int, offset: float) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(3, 2, width) * 4, torch.rand(width)
    x[1, 1] *= 1e-3  # where eps counts
    found = rms_norm(x, weight, EPS, offset=offset, compute=MANY)
    assert_close(found, normed(x, weight, offset))


def test_a_norm_is_written_into_part_of_a_wider_row(backend: str) -> None:
    torch.manual_seed(3)
    x, weight, wide = torch.randn(5, 37), torch.rand(37), torch.full((5, 90), 7.0)
    found = rms_norm(x, weight, EPS, offset=1.0, out=wide[:, 20:57], compute=MANY)
    assert found.data_ptr() == wide[:, 20:].data_ptr()
    assert torch.equal(wide[:, 20:57], rms_norm(x, weight, EPS, offset=1.0, compute=ONE))
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 57:] == 7).all()


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_rms_norm_equals_float64(backend: str, width: int, activation: str) -> None:
    torch.manual_seed(width)
    x, z, weight = torch.randn(3, 5, width), torch.randn(3, 5, width) * 8, torch.randn(width)
    gate = z.double().sigmoid() * (z.double() if activation == "silu" else 1)
    wanted = normed(x, weight, 0.0) * gate
    for form in (z, z.reshape(3, -1)):
        found = gated_rms_norm(x, form, weight, EPS, activation=activation, compute=MANY)
        assert_close(found, wanted)


@pytest.mark.parametrize(("dim", "rotated"), [(256, 64), (64, 64), (50, 22), (8, 2), (9, 0)])
def test_rotary_turns_pairs_and_leaves_the_rest(backend: str, dim: int, rotated: int) -> None:
    torch.manual_seed(dim)
    x, angle = torch.randn(5, 3, dim), torch.rand(5, rotated // 2) * 6.3
    cos, sin = angle.cos(), angle.sin()
    before = x.clone()
    pairs = torch.complex(
        before[..., : rotated // 2].double(), before[..., rotated // 2 : rotated].double()
    )
    turned = pairs * torch.complex(cos.double(), sin.double())[:, None]
    assert rotary(x, cos, sin, MANY) is None
    wanted = torch.cat([turned.real, turned.imag], dim=-1)
    # Each is a difference of two products, which may cancel: a unit of the pair, not of the result.
    torch.testing.assert_close(x[..., :rotated].double(), wanted, rtol=RTOL, atol=1e-6)
    assert torch.equal(x[..., rotated:], before[..., rotated:])


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_products_equal_float64(backend: str, width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(6, 2 * width) * 8
    gate, up = x.double().chunk(2, dim=1)
    assert_close(silu_mul(x, MANY), gate * gate.sigmoid() * up)
    x, gate = torch.randn(2, 3, width), torch.randn(2, 3, width) * 8
    assert_close(sigmoid_mul(x, gate, MANY), x.double() * gate.double().sigmoid())


def test_activations_hold_at_the_ends_of_float32(backend: str) -> None:
    values = [-3e38, -200.0, -88.0, -80.0, -1e-30, 0.0, 1e-30, 80.0, 88.0, 200.0, 3e38]
    gate = torch.tensor(values)
    x = torch.ones(len(values))
    found = sigmoid_mul(x, gate, ONE).double()
    wanted = gate.double().sigmoid()
    # Below -88, where the result is smaller than any normal number, some give 0.
    torch.testing.assert_close(found, wanted, rtol=RTOL, atol=1.2e-38)
    found = silu_mul(torch.stack([gate, x]).reshape(1, -1), ONE)[0].double()
    torch.testing.assert_close(found, gate.double() * wanted, rtol=RTOL, atol=2e-36)


CALLS: dict[str, Callable[[Tensor, Compute], Tensor]] = {
    "rms_norm": lambda x, c: rms_norm(
        x, torch.linspace(0, 1, x.shape[1]), EPS, offset=1.0, compute=c
    ),
    "gated": lambda x, c: gated_rms_norm(
        x[:, None], x.flip(1), torch.ones(x.shape[1]), EPS, activation="silu", compute=c
    )[:, 0],
    "rotary": lambda x, c: _rotated(x, c),
    "silu_mul": lambda x, c: silu_mul(x, c),
    "sigmoid_mul": lambda x, c: sigmoid_mul(x, x.flip(1).contiguous(), c),
    "add": lambda x, c: add(x, x.flip(1).contiguous(), c),
    "add_norm": lambda x, c: add_norm(
        x, x, torch.linspace(0, 1, x.shape[1]), EPS, offset=1.0, compute=c
    )[1],
}


def _rotated(x: Tensor, compute: Compute) -> Tensor:
    y = x[:, None].clone()
    rotary(y, x[:, :100].contiguous(), x[:, 100:200].contiguous(), compute)
    return y[:, 0]


@pytest.mark.parametrize("name", CALLS)
def test_rows_do_not_see_each_other_nor_the_threads(backend: str, name: str) -> None:
    if backend == "reference":
        pytest.skip("torch cuts tensors into vectors across rows")
    torch.manual_seed(5)
    x = torch.randn(900, 302)  # enough for several tasks
    many = CALLS[name](x, MANY)
    assert torch.equal(many, CALLS[name](x, ONE))
    for row in (0, 477, 899):
        assert torch.equal(CALLS[name](x[row : row + 1].contiguous(), ONE)[0], many[row])


@pytest.mark.parametrize("name", CALLS)
def test_nan_stays_in_its_row(backend: str, name: str) -> None:
    x = torch.ones(9, 202)
    x[4] = torch.nan
    rows = CALLS[name](x, MANY).isnan()
    assert rows[4, :101].all()
    assert not rows[[0, 1, 2, 3, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_their_norms_equal_float64(backend: str, width: int) -> None:
    torch.manual_seed(width)
    x, y, weight = torch.randn(5, width), torch.randn(5, width), torch.rand(width)
    assert torch.equal(add(x, y, MANY), x + y)
    total, found = add_norm(x, y, weight, EPS, offset=1.0, compute=MANY)
    assert torch.equal(total, x + y)
    assert_close(found, normed(total, weight, 1.0))
    if backend != "reference":
        assert torch.equal(found, rms_norm(total, weight, EPS, offset=1.0, compute=ONE))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_looked_up(backend: str, dtype: type[np.generic]) -> None:
    values = np.random.default_rng(3).normal(size=(7, 33)) * np.logspace(-8, 4, 7)[:, None]
    table = values.astype(dtype)[:, ::1]
    index = torch.tensor([6, 0, 3, 3])
    found = look_up(table, index, ONE)
    assert np.array_equal(found.numpy(), table[index.numpy()].astype(np.float32))
    wide = np.concatenate([table, table], axis=1)[:, 5:20]  # rows that lie apart
    assert np.array_equal(look_up(wide, index, ONE).numpy(), wide[[6, 0, 3, 3]].astype(np.float32))
    with pytest.raises(EngineError, match="rows 0 to 7 of a table of 7"):
        look_up(table, torch.tensor([0, 7]), ONE)


def test_parts_of_wider_rows_are_read_in_place(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch sums rows that lie apart in another order")
    torch.manual_seed(8)
    wide = torch.randn(6, 3 * 2 * 20 + 7)
    heads = wide[:, :120].view(6, 3, 40)
    first, second = heads[..., :20], heads[..., 20:]
    weight = torch.rand(20)
    found = rms_norm(first, weight, EPS, offset=0.0, compute=MANY)
    assert torch.equal(found, rms_norm(first.contiguous(), weight, EPS, offset=0.0, compute=MANY))
    assert torch.equal(
        sigmoid_mul(first, second, MANY), sigmoid_mul(first.contiguous(), second.contiguous(), ONE)
    )
    cos, sin = torch.rand(6, 5), torch.rand(6, 5)
    alone, before = first.contiguous(), wide.clone()
    rotary(alone, cos, sin, ONE)
    rotary(first, cos, sin, MANY)
    assert torch.equal(first, alone)
    assert torch.equal(second, before[:, :120].view(6, 3, 40)[..., 20:])
    assert torch.equal(wide[:, 120:], before[:, 120:])
    x = torch.randn(6, 1, 7)
    gate = wide[:, 120:]
    assert torch.equal(
        gated_rms_norm(x, gate, weight[:7], EPS, activation="silu", compute=MANY),
        gated_rms_norm(x, gate.contiguous(), weight[:7], EPS, activation="silu", compute=ONE),
    )


def test_no_rows_are_no_work(backend: str) -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), EPS, offset=0.0, compute=ONE).shape == (0, 8)
    assert silu_mul(torch.empty(0, 8), ONE).shape == (0, 4)
    rotary(torch.empty(0, 2, 8), torch.empty(0, 4), torch.empty(0, 4), ONE)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    x = torch.ones(4, 6)
    with pytest.raises(EngineError, match=r"weight must be contiguous torch.float32 \[6\]"):
        rms_norm(x, torch.ones(5), EPS, offset=0.0, compute=ONE)
    with pytest.raises(EngineError, match=r"out must be float32 \[4, 6\]"):
        rms_norm(x, torch.ones(6), EPS, offset=0.0, out=torch.ones(4, 5), compute=ONE)
    with pytest.raises(EngineError, match=r"with out, x must be \[T, H\], found \[4, 2, 3\]"):
        rms_norm(x.view(4, 2, 3), torch.ones(3), EPS, offset=0.0, out=x, compute=ONE)
    with pytest.raises(EngineError, match="found torch.bfloat16"):
        silu_mul(x.bfloat16(), ONE)
    with pytest.raises(EngineError, match=r"\[M, 2 I\]"):
        silu_mul(torch.ones(4, 5), ONE)
    with pytest.raises(EngineError, match=r"strides \[1, 4\]"):
        sigmoid_mul(x, torch.ones(6, 4).t(), ONE)
    with pytest.raises(EngineError, match="8 rotated dims in heads of 6"):
        rotary(torch.ones(4, 1, 6), torch.ones(4, 4), torch.ones(4, 4), ONE)
    with pytest.raises(EngineError, match="z must be"):
        gated_rms_norm(
            x[:, None], torch.ones(4, 5), torch.ones(6), EPS, activation="silu", compute=ONE
        )
    with pytest.raises(EngineError, match="'gelu'; expected one of silu, sigmoid"):
        gated_rms_norm(x[:, None], x, torch.ones(6), EPS, activation="gelu", compute=ONE)  # type: ignore[arg-type]
