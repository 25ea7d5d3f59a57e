"""Mona and NOAH: hand-computed cases and laws from their equations (arXiv:2408.08345, arXiv:2206.04673)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import SUBJECTS, moved, vit
from torch import Generator, Tensor

import veneer
from veneer import anatomy
from veneer.errors import BadValue
from veneer.methods.activation.mona import Mona
from veneer.methods.prompt.noah import NOAH
from veneer.site import Site

HERE = Site("here", "here", "mlp", "branch", 0, 8, 8)


def drawn(method: Mona, seed: int) -> dict[str, Tensor]:
    made = Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=made, dtype=torch.float64) for k, t in method.init(HERE, made).items()}


def by_hand(h: Tensor, p: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """One picture's h [1 + rows · columns, D], filters patch by patch."""
    u = (p["s1"] * F.layer_norm(h, h.shape[-1:], p["ln_w"], p["ln_b"]) + p["s2"] * h) @ p["down_w"].T + p["down_b"]
    z = u.clone()
    for k in (3, 5, 7):
        for i in range(rows):
            for j in range(columns):
                total = p[f"b{k}"].clone()
                for a in range(k):
                    for b in range(k):
                        y, x = i + a - k // 2, j + b - k // 2
                        if 0 <= y < rows and 0 <= x < columns:
                            total = total + p[f"w{k}"][:, 0, a, b] * u[1 + y * columns + x]
                z[1 + i * columns + j] = z[1 + i * columns + j] + total / 3
    return F.gelu(z + z @ p["mix_w"].T + p["mix_b"]) @ p["up_w"].T + p["up_b"]


def test_mona_by_hand(seed: int) -> None:
    method = Mona(m=3, grid=(2, 4))
    p = drawn(method, seed)
    h = torch.randn(2, 9, 8, dtype=torch.float64, generator=Generator().manual_seed(seed))
    found = method.change(h, p, HERE, False)
    for i in range(2):
        torch.testing.assert_close(found[i], by_hand(h[i], p, 2, 4))
    torch.testing.assert_close(method.change(h[:, 1:].unflatten(1, (2, 4)), p, HERE, False).flatten(1, 2), found[:, 1:])


def test_mona_finds_the_grid() -> None:
    for tokens, side in ((197, 14), (198, 14), (261, 16), (3136, 56), (5, 2)):
        assert Mona().sides(tokens, HERE) == (side, side)
    with pytest.raises(BadValue, match=r"Mona: 60 tokens at here are no grid of 7 × 7 patches .* choose grid=\(rows, columns\)"):
        Mona().sides(60, HERE)
    with pytest.raises(BadValue, match="must be two numbers"):
        Mona(grid=(3,))


def test_mona_moves_with_the_picture(seed: int) -> None:
    """Away from the border, a shifted picture gives shifted changes."""
    method = Mona(m=3)
    p = drawn(method, seed)
    h = torch.randn(1, 12, 12, 8, dtype=torch.float64, generator=Generator().manual_seed(seed))
    a, b = method.change(h, p, HERE, False), method.change(h.roll((1, 1), (1, 2)), p, HERE, False)
    torch.testing.assert_close(b[:, 5:8, 5:8], a[:, 4:7, 4:7])


def test_mona_acts_on_the_sum(seed: int) -> None:
    """h + f(h) after each sub-layer: written out for one block of a ViT."""
    model = vit(depth=1).double().eval()
    tuned = moved(veneer.attach(model, "mona(m=4)", head=False), seed)
    (_, attn, p), (_, _, q) = sorted(tuned.entries(), key=lambda e: e[0].role)
    sites = {s.role: s for s, _, _ in tuned.entries()}
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=Generator().manual_seed(seed))
    found = model.vit.layers[0](x)
    block = tuned.detach().vit.layers[0]
    x = x + block.attention(block.layernorm_before(x))[0]
    x = x + attn.change(x, p, sites["attn"], False)
    x = x + block.mlp(block.layernorm_after(x))
    torch.testing.assert_close(x + attn.change(x, q, sites["mlp"], False), found)


def test_noah_is_its_parts(seed: int) -> None:
    """The union answers as "vpt + lora + bottleneck-adapter" with the same numbers; each size of 0 leaves its part out."""
    batch = SUBJECTS["vit"].batch(seed)
    union = moved(veneer.attach(SUBJECTS["vit"].build(), "noah(length=3, r=2, m=4)", head=False), seed)
    spec = "vpt(length=3) + lora(r=2) + bottleneck-adapter(m=4, targets='mlp')"
    parts = veneer.attach(SUBJECTS["vit"].build(), spec, head=False)
    values = {f"{site.name}/{key}": t for site, _, p in union.entries() for key, t in p.items()}
    with torch.no_grad():
        for site, _, p in parts.entries():
            for key, t in p.items():
                t.copy_(values.pop(f"{site.name}/{key}"))
        assert not values
        torch.testing.assert_close(union.model(**batch)["logits"], parts.model(**batch)["logits"])
    for changes, kind in (({"length": 0}, "block"), ({"r": 0}, "linear"), ({"m": 0}, "branch")):
        tuned = veneer.attach(SUBJECTS["vit"].build(), NOAH(**changes), head=False)  # type: ignore[arg-type]
        assert kind not in {site.kind for site, _, p in tuned.entries() if p}
        assert tuned.model(**batch)["logits"].shape == (4, 3)


def test_noah_sizes_of_single_blocks(seed: int) -> None:
    tuned = veneer.attach(SUBJECTS["vit"].build(), "noah", head=False, overrides={"layers.0": {"length": 0, "r": 3}})
    shapes = {f"{site.depth} {key}": tuple(t.shape) for site, _, p in tuned.entries() for key, t in p.items()}
    assert "0 P0" not in shapes and shapes["0 A"] == (3, 16) and shapes["1 P_deep"] == (8, 16) and shapes["1 A"] == (8, 16)


def test_what_they_refuse() -> None:
    with pytest.raises(BadValue, match="NOAH: length, r and m are all 0"):
        NOAH(length=0, r=0, m=0)
    for spec in ("noah", "mona"):
        with pytest.raises(BadValue, match="this model reads tokens, not images"):
            veneer.attach(SUBJECTS["bert"].build(), spec, head=False)
    assert {s.role for s in NOAH().select(anatomy.sites(SUBJECTS["vit"].build()))} == {"block", "attn.q", "attn.v", "mlp"}
