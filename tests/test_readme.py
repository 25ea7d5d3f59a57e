"""The README's Python runs as it stands (on a tiny model in place of the hub's), and what it adds behaves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SUBJECTS, output

import veneer

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny text classifier and tokenizer under any hub name."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32
    )

    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1 + len(word) for word in text.split()]])}

    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification, "from_pretrained", lambda name: transformers.BertForSequenceClassification(config)
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.chdir(tmp_path)


def test_the_python_example_runs(hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(BLOCKS[0], names)
    assert "lora + ssf" in capsys.readouterr().out
    assert Path("my-adapter/adapter.safetensors").exists()
    veneer.load(names["AutoModelForSequenceClassification"].from_pretrained("again"), "my-adapter")


def test_the_added_method_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "rescale.py"
    source.write_text('"""Rescale: rows and columns of the weight, rescaled (an example)."""\n' + BLOCKS[1])
    monkeypatch.syspath_prepend(tmp_path)
    import rescale  # type: ignore[import-not-found]

    method = veneer.parse("rescale(s=0.5)")
    assert isinstance(method, rescale.Rescale)
    W = torch.randn(3, 4)
    p = {"a": torch.randn(3), "c": torch.randn(4)}
    torch.testing.assert_close(method.weight(W, p), torch.diag(1 + 0.5 * p["a"]) @ W @ torch.diag(1 + 0.5 * p["c"]))
    for name, targets in (("llama", "attn.q attn.v"), ("gpt2", "attn.q attn.v"), ("convnet", "conv")):
        model, batch = SUBJECTS[name].build(), SUBJECTS[name].batch()
        tuned = veneer.attach(model, veneer.method("rescale", targets=targets), head=False)
        for parameter in tuned.parameters():
            parameter.data.normal_(0, 0.1)
        before = output(model, batch)
        torch.testing.assert_close(output(tuned.merge().model, batch), before)
        tuned.unmerge().save(tmp_path / name)


def test_the_methods_page_is_current() -> None:
    done = subprocess.run([sys.executable, "docs/build.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
