"""LLaMA-Adapter: zero gates change nothing, and the added attention is that of the paper's equations (arXiv:2303.16199)."""

from __future__ import annotations

import pytest
import torch
from tiny import SUBJECTS, llama, moved, spread
from torch import Tensor, nn

import veneer
from veneer.errors import NoMatch, Unsupported


def rotated(q: Tensor, model: nn.Module) -> Tensor:
    """q [B, heads, T, d] turned by position, as Llama turns it."""
    cos, sin = model.model.rotary_emb(q, torch.arange(q.shape[2])[None])
    half = q.shape[-1] // 2
    return q * cos + torch.cat([-q[..., half:], q[..., :half]], -1) * sin


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_equations(name: str, seed: int) -> None:
    """In the top layer: the attention module's output grows by W_o of g ⊙ softmax(q (P W_kᵀ)ᵀ / √d) (P W_vᵀ)."""
    model = spread(llama(attn_implementation=name)).double().eval()
    layer, close = model.model.layers[1].self_attn, 1e-5 if name == "eager" else 1e-10  # transformers' own softmax is float32
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True)
    batch = SUBJECTS["llama"].batch(seed)
    with torch.no_grad():
        before = model(**batch)["logits"]
        tuned = veneer.attach(model, "llama-adapter(length=3, layers=1)")
        assert [s.depth for s in tuned.sites()] == [1]
        torch.testing.assert_close(model(**batch)["logits"], before, rtol=0, atol=close)
        moved(tuned, seed)
        model(**batch)
    (x, plain), (_, adapted) = seen[0], seen[-1]
    p = next(p for _, _, p in tuned.entries())
    q, keys, values = (
        (y @ w.weight.T).unflatten(-1, (-1, 4)).transpose(-3, -2)
        for y, w in ((x, layer.q_proj), (p["P"], layer.k_proj), (p["P"], layer.v_proj))
    )
    q, keys, values = rotated(q, model), keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
    heads = (q @ keys.mT / 2).softmax(-1) @ values * p["g"][:, None, None]
    expected = plain + heads.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    torch.testing.assert_close(adapted, expected, rtol=0, atol=close)


def test_gates_learn_first(seed: int) -> None:
    model = SUBJECTS["llama"].build().train()
    tuned = veneer.attach(model, "llama-adapter(length=3)")
    model(**SUBJECTS["llama"].batch(seed))["logits"].sum().backward()
    grads = {key.rpartition("/")[2]: p.grad for key, p in tuned.named_parameters()}
    assert grads["g"].abs().max() > 0 and grads["P"].abs().max() == 0


def test_generation_with_a_cache(seed: int) -> None:
    """Step by step with keys and values kept: the same tokens as reading everything anew."""
    model = SUBJECTS["llama"].build().eval()
    moved(veneer.attach(model, "llama-adapter(length=3) + lora(targets='attn.k')"), seed)
    ids = SUBJECTS["llama"].batch(seed)["input_ids"]
    ways = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0) for cache in (True, False)]
    assert torch.equal(*ways)


def test_beside_a_prefix_and_counts(seed: int) -> None:
    """With prefix tuning both act; 1.2 M numbers for LLaMA-7B: 30 layers of 10 tokens of 4096, and 32 gates each."""
    model = SUBJECTS["llama"].build().eval()
    batch = SUBJECTS["llama"].batch(seed)
    tuned = moved(veneer.attach(model, "prefix-tuning(length=2) + llama-adapter(length=3)"), seed)
    both = model(**batch)["logits"]
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if key.endswith("/g"):
                p.zero_()
    assert (model(**batch)["logits"] - both).abs().max() > 1e-6
    with torch.device("meta"):
        large = llama(depth=32, width=4096, num_attention_heads=32, num_key_value_heads=32, vocab_size=32)
    found = veneer.attach(large, "llama-adapter").summary()
    assert found.trained == 30 * (10 * 4096 + 32)


def test_where_it_cannot_be() -> None:
    with pytest.raises((Unsupported, NoMatch)):
        veneer.attach(SUBJECTS["encoder"].build(), "llama-adapter", head=False)
