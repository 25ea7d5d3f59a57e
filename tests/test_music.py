"""Adapters of music models: golden numbers, their definitions, their places in MusicGen, and the measures of generated sound."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_golden import HOME, Case, FunctionCall, site
from tiny import SUBJECTS, spread
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer import anatomy, assets_music
from veneer.errors import BadFile, BadValue
from veneer.maths.looking_back import decoding
from veneer.method import Method, Params
from veneer.models.note_music import Codebooks, delayed, medium, musicgen, prompt, sampled, spectra
from veneer.site import Site
from veneer.study.budget import count, nearest
from veneer.study.sound_distances import frechet, inception_score, kl_sigmoid, kl_softmax

SAME = FunctionCall(lambda x: x)
BLOCK = site("block", "block", 8, 8)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moved(method: Method, at: Site, size: float = 0.3) -> Params:
    p = method.init(at, Generator().manual_seed(0))
    return {k: t.double() + size * draw(*t.shape) for k, t in p.items()}


def near(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- golden numbers ---------------------------------------------------------------------------------------------


def test_the_distances_are_the_studys() -> None:
    case = Case("music-adapters", 0)
    case.agree("score.frechet", torch.tensor(frechet(case["gen"], case["ref"]), dtype=torch.float64))
    case = Case("music-adapters", 1)
    mean, deviation = inception_score(case["gen_logits"], case.hyper["isc_splits"])
    found = {"kl_softmax": kl_softmax(case["gen_logits"], case["ref_logits"]), "isc_mean": mean, "isc_std": deviation}
    found["kl_sigmoid"] = kl_sigmoid(case["gen_logits"], case["ref_logits"])
    for name, value in found.items():
        case.agree(f"score.{name}", torch.tensor(value, dtype=torch.float64))


def test_the_convolution_adapter_is_the_released_one() -> None:
    case = Case("music-adapters", 2)
    given, p = case.params(), {}
    for ours, theirs in (("down", "adapter_proj_down"), ("up", "adapter_proj_up")):
        p[f"{ours}_w"] = torch.stack([given[f"blocks.{i}.{theirs}.weight"].flatten(1) for i in range(case.hyper["blocks"])])
        p[f"{ours}_b"] = torch.stack([given[f"blocks.{i}.{theirs}.bias"] for i in range(case.hyper["blocks"])])
    p |= {"ln_w": given["norm.weight"], "ln_b": given["norm.bias"]}
    method = registry.method("conv-adapter", m=case.hyper["bottleneck"], blocks=case.hyper["blocks"], norm=True, dims=2)
    for kind in ("block", "norm"):
        case.agree("y", method.forward(SAME, case["x"], p, site("other", kind, 8, 8)))


def test_the_linear_adapter_is_the_released_one() -> None:
    case = Case("music-adapters", 3)
    given = case.params()
    p = {f"{w}_{t[0]}": given[f"adapter_{w}.{t}"][None] for w in ("down", "up") for t in ("weight", "bias")}
    method, at = registry.method("conv-adapter", m=case.hyper["bottleneck"]), site("block", "block", 10, 10)
    assert {k: t.shape for k, t in method.init(at, Generator()).items()} == {k: t.shape for k, t in p.items()}
    case.agree("y", method.forward(SAME, case["x"], p, at))
    published = json.loads((HOME / "music-adapters.json").read_text())["counts"][0]["trainable"]
    wave = registry.method("conv-adapter", m=32).init(site("block", "block", 32_000, 32_000), Generator())
    assert sum(t.numel() for t in wave.values()) == published == 2_080_032


# -- distances --------------------------------------------------------------------------------------------------


def test_frechet_laws(seed: int) -> None:
    chance = np.random.default_rng(seed)
    a, b = chance.normal(size=(40, 5)), chance.normal(size=(25, 5)) * 2
    shift = chance.normal(size=5)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, a + shift) == pytest.approx(float(shift @ shift), rel=1e-6)
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * frechet(a, b), rel=1e-9)
    assert frechet(a[:3], b[:3]) >= 0  # fewer clips than features: singular covariances


def test_divergences_laws(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(12, 6))
    assert kl_softmax(logits, logits) == pytest.approx(0, abs=1e-4) and kl_softmax(logits, logits[::-1]) > 0
    assert inception_score(np.zeros((8, 4)), 2) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(50 * np.eye(4), 1)[0] == pytest.approx(4, rel=1e-6)  # as many classes as clips, each certain


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: frechet(np.zeros((1, 3)), np.zeros((4, 3))), "the generated set must be finite numbers .* at least 2 clips"),
        (lambda: frechet(np.zeros((4, 3)), np.full((4, 3), np.nan)), "the reference set must be finite"),
        (lambda: frechet(np.zeros((4, 3)), np.zeros((4, 2))), "3 and 2 features; both must come from the same model"),
        (lambda: kl_softmax(np.zeros((4, 3)), np.zeros((5, 3))), "4 generated and 5 reference clips cannot be paired"),
        (lambda: inception_score(np.zeros((4, 3)), 5), "choose 1 to 4"),
    ],
)
def test_distances_refuse_what_they_cannot_use(call: Any, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        call()


# -- the transformer adapter ------------------------------------------------------------------------------------


def reference(p: Params, m: int, heads: int, blocks: int, causal: bool) -> Any:
    """The same from torch's own modules: down, pre-norm encoder layers, up."""

    def run(y: Tensor) -> Tensor:
        h = F.linear(y, p["down_w"], p["down_b"])
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=torch.float64) if causal else None
        for i in range(blocks):
            layer = nn.TransformerEncoderLayer(m, heads, len(p["ffn_1_b"][i]), 0.0, F.gelu, batch_first=True, norm_first=True).double()
            names = {
                "self_attn.in_proj_weight": "qkv_w", "self_attn.in_proj_bias": "qkv_b", "self_attn.out_proj.weight": "o_w",
                "self_attn.out_proj.bias": "o_b", "linear1.weight": "ffn_1_w", "linear1.bias": "ffn_1_b", "linear2.weight": "ffn_2_w",
                "linear2.bias": "ffn_2_b", "norm1.weight": "ln_1_w", "norm1.bias": "ln_1_b", "norm2.weight": "ln_2_w",
                "norm2.bias": "ln_2_b",
            }  # fmt: skip
            layer.load_state_dict({theirs: p[ours][i] for theirs, ours in names.items()})
            h = layer(h, src_mask=mask)
        return y + F.linear(h, p["up_w"], p["up_b"])

    return run


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "heads", "blocks"), [(6, 3, 1), (4, 1, 2)])
def test_transformer_adapter_is_torchs_encoder_layers(m: int, heads: int, blocks: int, causal: bool) -> None:
    method = registry.method("transformer-adapter", m=m, heads=heads, blocks=blocks, ratio=3, causal=causal)
    p, y = moved(method, BLOCK), draw(2, 7, 8)
    expected = reference(p, m, heads, blocks, causal)(y)
    near(method.forward(SAME, y, p, BLOCK), expected)
    behind = site("block", "block", 8, 8, batch_dim=1)
    near(method.forward(SAME, y.transpose(0, 1), p, behind), expected.transpose(0, 1))
    near(method.forward(SAME, y, {k: t.double() for k, t in method.init(BLOCK, Generator()).items()}, BLOCK), y)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transformer_adapter_on_maps_takes_places_for_tokens(axes: int) -> None:
    method = registry.method("transformer-adapter", m=4, heads=2, dims=axes)
    p, y = moved(method, BLOCK), draw(2, 8, *(3, 4, 2)[:axes])
    expected = reference(p, 4, 2, 1, False)(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
    near(method.forward(SAME, y, p, BLOCK), expected)
    at = site("conv", "conv", 8, 72, kernel=(3,) * axes)
    near(registry.method("transformer-adapter", m=4, heads=2).forward(SAME, y, p, at), expected)


@pytest.mark.parametrize(
    "spec", ["transformer-adapter(m=4, heads=2, blocks=2, causal=True)", "conv-adapter(form='deep', m=6, blocks=3, causal=True)"]
)
def test_causal_adapters_do_not_see_later_tokens(spec: str) -> None:
    method, y = veneer.parse(spec), draw(2, 12, 8)
    p = moved(method, BLOCK)
    whole = method.forward(SAME, y, p, BLOCK)
    for t in (1, 5, 11):
        near(method.forward(SAME, y[:, :t], p, BLOCK), whole[:, :t])
    assert float((method.forward(SAME, y + F.one_hot(torch.tensor(2), 12)[None, :, None], p, BLOCK) - whole)[:, 3:].abs().max()) > 1e-6


def test_causal_convolutions_are_their_definition() -> None:
    method = registry.method("conv-adapter", form="deep", m=6, blocks=2, causal=True)
    p, y = moved(method, BLOCK), draw(2, 9, 8)
    h = F.linear(y, p["down_w"], p["down_b"]).transpose(1, 2)
    for i in range(2):
        z, new = F.gelu(h), []
        for t in range(9):  # taps at t, t − 2^i, t − 2·2^i; nothing before the first token
            taps = [
                (z[..., t - (2 - k) * 2**i] if t >= (2 - k) * 2**i else torch.zeros(2, 6).double()) @ p["conv_w"][i][..., k].T
                for k in range(3)
            ]
            new.append(h[..., t] + sum(taps) + p["conv_b"][i])
        h = torch.stack(new, -1)
    means = torch.stack([h[..., : t + 1].mean(-1) for t in range(9)], 1)
    gate = torch.sigmoid(F.relu(means @ p["gate_1"].T) @ p["gate_2"].T)
    near(method.forward(SAME, y, p, BLOCK), y + F.linear(h.transpose(1, 2) * gate, p["up_w"], p["up_b"]))


@pytest.mark.parametrize(
    "spec",
    ["transformer-adapter(m=4, heads=2, causal=True)", "transformer-adapter(m=4, heads=2)", "conv-adapter(form='deep', m=4, causal=True)"],
)
def test_gradients_and_half_precision(spec: str) -> None:
    method = veneer.parse(spec)
    p, x = {k: t.requires_grad_() for k, t in moved(method, BLOCK).items()}, draw(2, 5, 8)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return method.forward(FunctionCall(torch.tanh), x, dict(zip(p, tensors)), BLOCK)

    assert torch.autograd.gradcheck(run, (x.clone().requires_grad_(), *p.values()), fast_mode=True, atol=1e-6, rtol=1e-4)
    single = {k: t.detach().float() for k, t in p.items()}
    exact, half = (method.forward(SAME, x.to(dtype), single, BLOCK) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16 and float((half.float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


def refusal(action: Any) -> str:
    with pytest.raises(BadValue) as caught:
        action()
    return str(caught.value)


def test_refusals() -> None:
    assert "heads=4 does not divide m=6; choose heads = 3 or 6" in refusal(lambda: registry.method("transformer-adapter", m=6))
    automatic = registry.method("transformer-adapter", reduction=4)
    assert "heads=4 does not divide m=2 at site; choose heads = 2, or another m" in refusal(lambda: automatic.check(BLOCK))
    for slug, more in (("transformer-adapter", {}), ("conv-adapter", {"form": "deep"})):
        for back, at in (({}, site("conv", "conv", 8, 72, kernel=(3, 3))), ({"dims": 2}, BLOCK)):
            method = registry.method(slug, causal=True, m=4, **more, **back)
            assert "not for maps, at site; choose dims=0" in refusal(lambda: method.check(at))  # noqa: B023
        ahead = registry.method(slug, m=4, **more)
        for targets in ("block", "norm.final"):
            chosen = veneer.parse(f"{ahead} ") if targets == "block" else registry.method(slug, m=4, targets=targets, **more)
            assert "choose causal=True" in refusal(lambda: veneer.attach(SUBJECTS["llama"].build(), chosen, head=False))  # noqa: B023
    method = registry.method("transformer-adapter", m=4)
    p = moved(method, BLOCK)
    assert "choose dims=2" in refusal(lambda: method.forward(SAME, draw(2, 8, 3, 3), p, BLOCK))
    assert "choose dims=0" in refusal(lambda: registry.method("transformer-adapter", m=4, dims=1).forward(SAME, draw(2, 5, 8), p, BLOCK))


# -- in MusicGen ------------------------------------------------------------------------------------------------

WORDS, BOOKS = 12, 3
PLACES = {
    "text_encoder.encoder.final_layer_norm": False,
    "cross": True,
    "block": True,
    "decoder.model.decoder.layer_norm": True,
}


def tiny() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 20, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    return spread(musicgen({"vocab_size": WORDS, "num_codebooks": BOOKS, **sizes}, text)).double().eval()


def music(seed: int = 0, length: int = 9) -> dict[str, Tensor]:
    generator = Generator().manual_seed(seed)
    tokens = [torch.randint(WORDS, (n, BOOKS), generator=generator) for n in (length, length - 3)]
    return {"input_ids": torch.randint(20, (2, 5), generator=generator), **delayed(tokens, length, WORDS)}


def specs(place: str) -> list[str]:
    causal = ", causal=True" if PLACES[place] else ""
    deep, small = (
        f"conv-adapter(form='deep', m=8, targets='{place}'{causal}",
        f"transformer-adapter(m=8, heads=2, targets='{place}'{causal}",
    )
    found = [f"conv-adapter(m=8, targets='{place}')", f"{deep})", f"{small})"]
    return [s.replace("targets='block'", "targets='block', leave_out=(0, 1)") for s in found]  # the decoder's blocks only


@pytest.mark.parametrize("place", PLACES)
def test_adapters_at_the_studys_places(place: str) -> None:
    batch = music()
    with torch.no_grad():
        plain = tiny()(**batch)
    for spec in specs(place):
        model = tiny()
        tuned = veneer.attach(model, spec, head=False)
        near(model(**batch).logits, plain.logits)
        optimiser = torch.optim.Adam(tuned.param_groups(1e-2))
        for _ in range(4):
            optimiser.zero_grad()
            model.train()(**batch).loss.backward()
            optimiser.step()
        after = model.eval()(**batch)
        assert after.loss.item() < plain.loss.item() - 1e-3
        ids = batch["decoder_input_ids"]
        near(model(input_ids=batch["input_ids"], decoder_input_ids=ids[:, :4]).logits, after.logits[:, :4])  # what comes later is not seen
        with tuned.disabled():
            near(model(**batch).logits, plain.logits)


def test_decoders_own_sites_are_known() -> None:
    sites = anatomy.sites(tiny())
    names = decoding(sites)
    assert "decoder.model.decoder.layer_norm" in names and "decoder.model.decoder.layers.1.cross" in names
    assert not any(name.startswith("text_encoder") for name in names)


def test_sampling_is_the_uncached_model(seed: int) -> None:
    model = tiny()
    veneer.attach(model, "transformer-adapter(m=8, heads=2, targets='decoder.model.decoder.layer_norm', causal=True)", head=False)
    prompts = torch.randint(20, (2, 5), generator=Generator().manual_seed(seed))
    found = sampled(model, prompts, 6, WORDS, Generator().manual_seed(seed))
    assert found.shape == (2, 6, BOOKS) and int(found.min()) >= 0 and int(found.max()) < WORDS
    with torch.no_grad():
        for head in model.decoder.lm_heads:  # certain answers: each codebook its own word
            head.weight.zero_()
        hidden = model.decoder.model.decoder.layer_norm
        hidden.weight.zero_()
        hidden.bias.copy_(F.one_hot(torch.tensor(0), 16))
        for k, head in enumerate(model.decoder.lm_heads):
            head.weight[k + 2, 0] = 100
    assert torch.equal(sampled(model, prompts, 6, WORDS, Generator()), (torch.arange(BOOKS) + 2).expand(2, 6, BOOKS))


def test_delayed_is_musicgens_pattern() -> None:
    tokens = torch.arange(4 * BOOKS).view(4, BOOKS) % WORDS
    made = delayed([tokens], 4, WORDS)
    assert made["labels"].shape == (1, 6, BOOKS)
    ids = torch.cat([torch.full((BOOKS, 1), WORDS), F.pad(tokens.T, (0, BOOKS - 1), value=-1)], 1)
    _, pattern = tiny().decoder.build_delay_pattern_mask(ids[:, :1], WORDS, max_length=7)
    theirs = torch.full((BOOKS, 7), WORDS)
    for k in range(BOOKS):
        theirs[k, 1 + k : 5 + k] = tokens[:, k]
    assert torch.equal(theirs[pattern[:, :7] == WORDS], torch.full_like(theirs[pattern[:, :7] == WORDS], WORDS))  # empty where theirs is
    assert torch.equal(made["decoder_input_ids"], theirs[:, :6])
    assert torch.equal(made["labels"][0].T.masked_fill(made["labels"][0].T < 0, WORDS), theirs[:, 1:])


def test_budgets_are_met_in_musicgen_medium() -> None:
    model = medium()
    sites = anatomy.sites(model)
    total = sum(p.numel() for p in model.decoder.parameters())
    assert total == 1_837_556_736
    for spec in ("conv-adapter", "conv-adapter(form='deep', causal=True)", "transformer-adapter(causal=True)"):
        for budget in (2_000_000, 40_000_000):
            found = nearest(spec, sites, budget, model=model, targets="decoder.model.decoder.layer_norm")
            assert found.spec is not None and found.distance is not None and abs(found.distance) < 0.01
            assert count(veneer.parse(found.spec), sites, model) == found.trained


# -- notes ------------------------------------------------------------------------------------------------------


def sound_font(notes: list[tuple[str, list[int], int, int]]) -> bytes:
    """A SoundFont 2 file of these samples: name, values, rate, pitch."""
    wave = b"".join(struct.pack(f"<{len(v)}h", *v) for _, v, _, _ in notes)
    heads, at = b"", 0
    for name, values, rate, pitch in [*notes, ("EOS", [], 0, 0)]:
        heads += struct.pack("<20sIIIIIBbHH", name.encode(), at, at + len(values), at, at, rate, pitch, 0, 0, 1)
        at += len(values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    lists = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd")) + chunk(b"LIST", b"sdta" + chunk(b"smpl", wave))
    return chunk(b"RIFF", b"sfbk" + lists + chunk(b"LIST", b"pdta" + chunk(b"shdr", heads)))


def test_sound_fonts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.sf2"
    path.write_bytes(sound_font([("Flute C4", [1, -2, 3], 8000, 60), ("nothing", [], 8000, 1), ("Drum", [7] * 5, 44100, 35)]))
    found = assets_music.read_sound_font(path)
    assert [(n.name, n.samples.tolist(), n.rate, n.pitch) for n in found] == [
        ("Flute C4", [1, -2, 3], 8000, 60),
        ("Drum", [7] * 5, 44100, 35),
    ]
    for damage in (path.read_bytes()[:-60], b"RIFF", b"nothing of the kind, but long enough to look at"):
        path.write_bytes(damage)
        with pytest.raises(BadFile, match="cannot be read as a SoundFont 2 file"):
            assets_music.read_sound_font(path)


def test_spectra_hear_pitch_and_codebooks_come_closer_one_by_one() -> None:
    tones = [(8000 * np.sin(2 * np.pi * f * np.arange(4000) / 22050)).astype(np.int16) for f in (220, 440, 880, 1760, 3520)]
    frames = [spectra(tone, 22050) for tone in tones]
    peaks = [int(f.mean(0).argmax()) for f in frames]
    assert peaks == sorted(set(peaks)) and float(frames[0].max()) == 0 and float(frames[0].min()) >= -8
    every = torch.cat(frames)
    books = Codebooks(every, codebooks=3, words=8)
    tokens = books.encode(every)
    assert tokens.shape == (len(every), 3) and int(tokens.max()) < 8
    left = [float((every - sum(c[tokens[:, k]] for k, c in enumerate(books.centres[:n]))).pow(2).mean()) for n in (1, 2, 3)]  # type: ignore[union-attr]
    assert left[0] > left[1] > left[2] and torch.allclose(books.decode(tokens), every, atol=4)
    assert torch.equal(Codebooks(every, 3, 8).encode(every), tokens)
    with pytest.raises(BadValue, match="too few for 512 words"):
        Codebooks(every, words=512)


def test_prompts_tell_pitch_and_length() -> None:
    assert prompt(60, 8) == [61, 154] and prompt(200, 10**9) == [128, 199] and prompt(0, 0) == [1, 130]
