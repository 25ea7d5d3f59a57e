"""Merged weights without their zeros: every form gives the weight back bit for bit, and the exported model answers as the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.cli.main import main
from veneer.errors import BadFile, BadValue, Mismatch
from veneer.strategies.pruning import n_of_m, prune
from veneer.tools.sparse_weights import FILE, enforce, load_sparse, packed, pattern_of, read_sparse, save_sparse, unpacked


def pruned(shape: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    W = torch.randn(shape).to(dtype)
    W.view(-1)[torch.randperm(W.numel())[: round(share * W.numel())]] = 0  # so many exactly: few zeros fit no pattern by chance
    return W


def bytes_of(parts: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in parts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(12, 20), (7, 300), (3, 40_000), (6, 4, 3, 3), (1, 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_a_weight_comes_back_bit_for_bit(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    W = pruned(shape, share, dtype)
    form, parts = packed(W)
    assert torch.equal(unpacked(form, parts, list(shape)), W) and unpacked(form, parts, list(shape)).dtype == dtype
    assert bytes_of(parts) <= W.numel() * W.element_size()
    assert share not in (0.0, 0.3) or not form
    if form == "csr":  # what torch makes of the same parts
        flat = W.reshape(shape[0], -1)
        csr = torch.sparse_csr_tensor(
            parts["rows"].long(), parts["columns"].long(), parts["values"].double(), flat.shape, check_invariants=True
        )
        assert torch.equal(csr.to_dense(), flat.double())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
def test_patterns_are_found_and_enforced(pattern: str) -> None:
    n, m = pattern_of(pattern)
    W = torch.randn(24, 32)
    fitting = enforce(W, n, m)
    kept = fitting.unflatten(1, (-1, m)) != 0
    assert (kept.sum(-1) == n).all() and torch.equal(fitting[fitting != 0], W[fitting != 0])
    assert torch.equal(enforce(fitting, n, m), fitting)
    assert (fitting.abs().unflatten(1, (-1, m)).sum(-1) >= (W * n_of_m(torch.rand(24, 32), n, m)).abs().unflatten(1, (-1, m)).sum(-1)).all()
    fitting[3] = 0
    form, parts = packed(fitting)
    assert form == pattern and torch.equal(unpacked(form, parts, [24, 32]), fitting)
    for wrong in ("4:2", "two of four", "3:4"):
        with pytest.raises(BadValue, match="is not one of 1:2, 1:4, 2:4"):
            pattern_of(wrong)


def test_a_plain_model_with_a_tied_weight(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False))
        model[2].weight = model[0].weight
        return model

    model, x = build(), torch.randint(40, (5,))
    model[1].weight.data = pruned((16, 16), 0.9)
    assert save_sparse(model, tmp_path) == {"1.weight": "csr"}
    assert {k.partition(".weight")[0] for k in load_file(tmp_path / FILE)} == {"0", "1", "1.bias"}
    again = load_sparse(tmp_path, build())
    assert torch.equal(again(x), model(x)) and again[2].weight is again[0].weight
    with pytest.raises(Mismatch, match=r"differ at 1\.weight"):
        load_sparse(tmp_path, nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 8), nn.Linear(16, 40, bias=False)))


@pytest.mark.parametrize("broken", ["columns", "rows", "missing", "header", "cut", "none"])
def test_files_that_are_not_whole_are_refused(broken: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 16))
    model[0].weight.data = pruned((16, 64), 0.9)
    save_sparse(model, tmp_path)
    path = tmp_path / FILE
    tensors = load_file(path)
    header = {"veneer_sparse": json.dumps({"0.weight": {"shape": [16, 64], "form": "csr"}, "0.bias": {"shape": [16], "form": ""}})}
    if broken == "columns":
        tensors["0.weight.columns"][0] = 64
    elif broken == "rows":
        tensors["0.weight.rows"][-1] += 1
    elif broken == "missing":
        del tensors["0.weight.values"]
    save_file(tensors, path, metadata={} if broken == "header" else header)
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif broken == "none":
        path.unlink()
    with pytest.raises(BadFile, match="there is no" if broken == "none" else "not whole, or not a file of sparse weights"):
        read_sparse(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, and adapters for it: one that prunes, one that does not."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny.bert(width=32).save_pretrained(folder / "model")
    for name, spec in (("pst", "pst(weight_rank=2, mask_rank=2)"), ("lora", "lora(r=2)")):
        from transformers import BertForSequenceClassification

        tuned = veneer.attach(BertForSequenceClassification.from_pretrained(folder / "model"), spec, head=False)
        with torch.no_grad():
            for p in tuned.parameters():
                p += 0.01 * torch.randn_like(p)
        prune(tuned, 0.9)
        tuned.save(folder / name)
    return folder


def exported(place: Path, name: str, out: Path, *more: str) -> int:
    return main(["export", str(place / name), "--to", "sparse-weights", "--model", str(place / "model"), "--out", str(out), *more])


def test_a_pruned_model_is_exported_sparse(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(place, "pst", tmp_path / "out") == 0, capsys.readouterr()
    model = load_sparse(tmp_path / "out")
    tuned = veneer.load(type(model).from_pretrained(place / "model"), place / "pst")  # type: ignore[attr-defined]
    batch = tiny.SUBJECTS["bert"].batch(0, torch.float32)
    before = tiny.output(tuned.model.eval(), batch)
    torch.testing.assert_close(tiny.output(model, batch), before, rtol=1e-5, atol=1e-5)
    plain = tuned.merge().model
    for at in tuned.sites():
        W = model.get_submodule(at.module).weight
        assert torch.equal(W, plain.get_submodule(at.module).weight)
        assert int((W == 0).sum()) == int(0.9 * W.numel())  # type: ignore[operator, arg-type]


def test_a_half_precision_model_keeps_its_dtypes(tmp_path: Path) -> None:
    model = tiny.llama().bfloat16().eval()
    model.model.layers[0].mlp.up_proj.weight.data *= torch.rand(32, 16) < 0.1
    exact = type(model).from_pretrained(_saved(model, tmp_path / "dense"), dtype=torch.bfloat16).eval()
    save_sparse(exact, tmp_path)
    again = load_sparse(tmp_path)
    assert again.dtype == torch.bfloat16 and again.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = tiny.SUBJECTS["llama"].batch(0, torch.bfloat16)
    assert torch.equal(tiny.output(again, batch), tiny.output(exact, batch))


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_pattern_is_enforced_within_the_tolerance(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(place, "lora", tmp_path / "out", "--pattern", "2:4") == 2
    assert "the answers differ by" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert exported(place, "lora", tmp_path / "out", "--pattern", "2:4", "--tolerance", "10") == 0
    model = load_sparse(tmp_path / "out")
    adapted = {s.module for s in veneer.load(type(model).from_pretrained(place / "model"), place / "lora").sites()}  # type: ignore[attr-defined]
    facts = read_sparse(tmp_path / "out")
    for name in adapted:
        assert int((facts[f"{name}.weight"].unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2


def test_what_has_no_zeros_is_not_exported_sparse(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        ((), "No weight of the merged model has zeros enough"),
        (("--pattern", "3:4"), "3:4"),
    ):
        assert exported(place, "lora", tmp_path / "out", *more) == 2
        assert said in capsys.readouterr().err
    argv = ["export", str(place / "lora"), "--to", "merged", "--pattern", "2:4", "--model", str(place / "model")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "--pattern goes with --to sparse-weights." in capsys.readouterr().err
