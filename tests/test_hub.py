"""The hub: what is fetched, what is pushed, and the card. No network: huggingface_hub's functions are replaced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from transformers import BertConfig, BertForSequenceClassification

import veneer
from veneer import hub
from veneer.errors import BadFile, BadValue, VeneerError


def bert(name="someone/tiny-bert"):
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    model.config._name_or_path = name
    return model


def answer(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 10)[None]).logits


class Hub:
    """Stands for `HfApi` and `snapshot_download`: keeps what is uploaded, gives it back."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        target = self.root / repo_id
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    def snapshot_download(self, repo_id, revision=None, token=None, allow_patterns=None):
        self.calls.append(("download", repo_id, allow_patterns))
        return str(self.root / repo_id)


@pytest.fixture
def there(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def trained(spec="lora(r=2)", name="someone/tiny-bert"):
    tuned = veneer.attach(bert(name), spec)
    for p in tuned.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return tuned


def card_of(there, repo="me/mine"):
    text = (there.root / repo / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_push_then_load_by_name(there):
    tuned = trained()
    address = tuned.push_to_hub("me/mine", private=True, token="t", message="first")
    assert address == "https://huggingface.co/me/mine"
    assert there.calls == [("token", "t"), ("create", "me/mine", True, True), ("upload", "me/mine", "first")]
    model = bert()
    model.load_state_dict({k: v for k, v in tuned.model.state_dict().items() if "veneer" not in k})
    veneer.load(model, "me/mine")
    assert torch.equal(answer(model), answer(tuned.model))
    assert there.calls[-1] == ("download", "me/mine", hub.FILES)
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or "*" in pattern for pattern in hub.FILES)


def test_the_folder_holds_both_formats_where_peft_has_the_method(there):
    trained().push_to_hub("me/mine")
    assert sorted(p.name for p in (there.root / "me/mine").iterdir()) == sorted(hub.FILES)
    trained("ssf").push_to_hub("me/other")
    assert sorted(p.name for p in (there.root / "me/other").iterdir()) == ["README.md", "adapter.safetensors", "veneer.json"]


def test_the_card_tells_what_it_is_and_how_to_use_it(there):
    trained("lora(r=2) + ssf(targets='norm')").push_to_hub(
        "me/mine", peft=False, metrics={"accuracy": {"value": 0.91, "low": 0.9, "high": 0.92, "n": 500}}
    )
    header, body = card_of(there)
    assert header["library_name"] == "veneer" and header["base_model"] == "someone/tiny-bert"
    assert {"veneer", "lora", "ssf"} <= set(header["tags"]) and "peft" not in header["tags"]
    for words in (
        "# mine",
        "a frozen weight plus a trained product of two thin matrices",
        'veneer.load(model, "me/mine")',
        'BertForSequenceClassification.from_pretrained("someone/tiny-bert", num_labels=3)',
        "| accuracy | 0.91 [0.9, 0.92], 500 examples |",
        "trained parameters",
        "not recorded here",
    ):
        assert words in body, words
    assert "PeftModel" not in body


def test_the_code_in_the_card_is_python(there):
    trained().push_to_hub("me/mine")
    _, body = card_of(there)
    blocks = body.split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        code = block.split("```")[0]
        compile(code, "card", "exec")
        assert len(code.strip().splitlines()) <= 5
    assert "PeftModel.from_pretrained" in body


def test_results_of_the_training_are_told_and_missing_ones_too():
    about = {"spec": "lora", "base": {"name": "a/b", "class": "Net", "parameters": 1000}, "sites": [], "trained": 10}
    assert "None were recorded" in hub.model_card(about)
    text = hub.model_card({**about, "training": {"steps": 7, "metrics": {"f1": 0.5}}})
    assert "Optimiser steps: 7" in text and "| f1 | 0.5 |" in text
    assert "cannot be merged" in hub.model_card({**about, "spec": "prefix-tuning"})


def test_a_method_of_the_users_own_is_named_as_such():
    from veneer import registry

    @veneer.register(slug="twice")
    class Twice(veneer.WeightMethod):
        """W_eff = 2 W"""

    try:
        text = hub.model_card({"spec": "twice", "base": {"name": "a/b", "class": "Net"}, "sites": [], "trained": 10})
        assert "Its code is not part of veneer" in text
    finally:
        registry._registered.pop("twice")


@pytest.mark.parametrize("path", ["/home/someone/models/tiny", r"C:\models\tiny", "./tiny", "~/tiny"])
def test_paths_of_this_machine_are_not_published(there, path):
    tuned = trained(name=path)
    tuned.adapters["default"].facts["data"] = "/home/someone/secret/data.csv"
    tuned.push_to_hub("me/mine")
    for file in (there.root / "me/mine").iterdir():
        content = file.read_bytes()
        assert b"someone/" not in content and b"models" not in content and b"secret" not in content
    facts = json.loads((there.root / "me/mine/veneer.json").read_text())
    assert facts["base"]["name"] == "tiny" and facts["training"]["data"] == "data.csv"


@pytest.mark.parametrize("repo", ["mine", "me/mine/more", "../mine", "me/mi ne", "me/", ""])
def test_names_that_are_none(there, repo):
    with pytest.raises(BadValue, match="owner/name"):
        hub.fetch(repo)
    with pytest.raises(BadValue, match="owner/name"):
        trained().push_to_hub(repo)
    assert there.calls == []


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


FAILURES = {
    "not there": (lambda: errors.RepositoryNotFoundError("404", response=response(404)), BadFile, "no such repository"),
    "gated": (lambda: errors.GatedRepoError("403", response=response(403)), BadFile, "grant you access"),
    "revision": (lambda: errors.RevisionNotFoundError("404", response=response(404)), BadFile, "no such revision"),
    "offline": (lambda: errors.LocalEntryNotFoundError("not cached"), hub.HubError, "cannot be reached"),
    "no network": (lambda: ConnectionError("refused"), hub.HubError, "cannot be reached"),
    "forbidden": (lambda: errors.HfHubHTTPError("403", response=response(403)), hub.HubError, "may not do this"),
    "broken": (lambda: errors.HfHubHTTPError("500 oh", response=response(500)), hub.HubError, "answered 500"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_sentences(failure, monkeypatch):
    make, kind, words = FAILURES[failure]

    def fail(*args, **kwargs):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words) as caught:
        hub.fetch("me/mine")
    assert isinstance(caught.value, VeneerError) and len(str(caught.value).splitlines()) <= 3


def test_a_repository_without_safe_files_is_refused(there):
    (there.root / "me/mine").mkdir(parents=True)
    with pytest.raises(BadFile, match="never read"):
        hub.fetch("me/mine")
