"""AdapterFusion: attention over trained adapters of any method (arXiv:2005.00247)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import SUBJECTS, loss, moved
from torch import Tensor, nn

import veneer
from veneer.errors import BadValue, NoMatch, UnknownName, Unsupported
from veneer.methods.strategy.adapterfusion import AdapterFusion
from veneer.tuned import Tuned

OTHERS = {
    "bert": ("bottleneck-adapter(m=3)", "adaptformer(m=3)", "lora(r=2)", "bottleneck-adapter(m=2, variant='pfeiffer')", "ln-tuning"),
    "vit": ("lora(r=2, targets='attn.* mlp.*')", "ssf", "bottleneck-adapter(m=3, variant='parallel')"),
    "gpt2": ("lora(r=2)", "ia3", "bottleneck-adapter(m=3)"),
}


def fused(subject: str, seed: int, spec: str = "adapterfusion") -> Tuned:
    """A model with an adapter of each of these methods, all moved, and the fusion of them, active."""
    model = SUBJECTS[subject].build()
    for n, other in enumerate(OTHERS[subject]):
        moved(veneer.attach(model, other, f"task{n}", head=False), seed + n, name=f"task{n}")
    return veneer.attach(model, spec, "fusion", head=False)


def answers(model: nn.Module, subject: str, seed: int) -> Tensor:
    with torch.no_grad():
        return SUBJECTS[subject].answers(model.eval(), seed)


def test_the_equations_by_hand() -> None:
    """Two adapters at one layer of two channels, all numbers whole."""
    layer = nn.Sequential()
    layer.add_module("first", nn.Linear(2, 2, bias=False))
    layer.first.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for name, B in (("a", [[2.0], [0.0]]), ("b", [[0.0], [3.0]])):
        tuned = veneer.attach(layer, "lora(r=1, targets='first')", name)
        for key, t in tuned.named_parameters(name):
            t.data = torch.tensor([[1.0, 1.0]]) if key.endswith("A") else torch.tensor(B)
    tuned = veneer.attach(layer, "adapterfusion(T=2)", "fusion")
    p = next(iter(tuned.entries("fusion")))[2]
    for key, value in {
        "W_q": torch.eye(2),
        "W_k": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        "W_v": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
    }.items():
        p[key].data = value
    x = torch.tensor([[1.0, 2.0]])  # h = (1, 2); changes (6, 0) and (0, 9); keys (0, 6) and (9, 0); products 12 and 9
    s = torch.tensor([12.0, 9.0]).div(2).softmax(0)
    torch.testing.assert_close(layer(x), torch.tensor([[1 + 6 * s[0], 2 + 2 * 9 * s[1]]]))


@pytest.mark.parametrize("subject", OTHERS)
def test_one_adapter_is_itself(subject: str, seed: int) -> None:
    """Fusing one adapter starts as that adapter, exactly, whatever its method; of several, at the mean of their changes, nearly."""
    model = SUBJECTS[subject].build()
    for n, other in enumerate(OTHERS[subject]):
        moved(veneer.attach(model, other, "one", head=False), seed + n, name="one")
        alone = answers(model, subject, seed)
        tuned = veneer.attach(model, "adapterfusion", "fusion", head=False)
        torch.testing.assert_close(answers(model, subject, seed), alone, rtol=0, atol=1e-10)
        tuned.remove("fusion")
        tuned.remove("one")


@pytest.mark.parametrize("subject", OTHERS)
def test_all_train_together(subject: str, seed: int) -> None:
    """Gradients reach the fusion alone, at every place, with checkpoints the same; one step lowers the loss; the others stay."""
    tuned = fused(subject, seed)
    assert {site.name for site in tuned.sites("fusion")} == {s.name for n in range(len(OTHERS[subject])) for s in tuned.sites(f"task{n}")}
    before = {key: t.clone() for n in range(len(OTHERS[subject])) for key, t in tuned.named_parameters(f"task{n}")}
    model, batch = tuned.model.train(), SUBJECTS[subject].batch(seed)
    moved(tuned, seed, name="fusion")
    first = loss(model, batch)
    grads = torch.autograd.grad(first, tuned.parameters("fusion"))
    assert all(torch.isfinite(g).all() for g in grads)
    reached = {key.rpartition("/")[2] for (key, _), g in zip(tuned.named_parameters("fusion"), grads) if g.abs().max() > 0}
    assert reached >= {"W_q", "W_k", "W_v", "b_q"}  # one offset of all keys is none: b_k moves only with W_q's help
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    again = torch.autograd.grad(loss(model, batch), tuned.parameters("fusion"))
    for g, e in zip(again, grads):
        torch.testing.assert_close(g, e)
    optimiser = torch.optim.Adam(tuned.param_groups(1e-3))
    loss(model, batch).backward()
    optimiser.step()
    assert loss(model, batch) < first
    after = {key: t for n in range(len(OTHERS[subject])) for key, t in tuned.named_parameters(f"task{n}")}
    assert all(torch.equal(t, before[key]) for key, t in after.items())


def test_fused_rows_and_compiled(seed: int) -> None:
    """In one batch with rows of single adapters and of the base; as one graph."""
    tuned = moved(fused("vit", seed), seed, name="fusion")
    whole = answers(tuned.model, "vit", seed)
    single = answers(tuned.activate("task1").model, "vit", seed)
    rows = answers(tuned.activate(per_row=["fusion", "task1", "fusion", None]).model, "vit", seed)
    torch.testing.assert_close(rows[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(rows[1], single[1])
    tuned.activate("fusion")
    compiled = torch.compile(tuned.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answers(compiled, "vit", seed), whole)
    assert torch.equal(answers(copy.deepcopy(tuned.model), "vit", seed), whole)


def test_files(tmp_path: Path, seed: int) -> None:
    """Loaded behind its adapters, under their names, it is what it was; without them, one sentence."""
    tuned = moved(fused("bert", seed, "adapterfusion(adapters=('task2', 'task0'))"), seed, name="fusion")
    before = answers(tuned.model, "bert", seed)
    for name in ("task0", "task2", "fusion"):
        tuned.activate(name).save(tmp_path / name)
    with pytest.raises(NoMatch, match=r"AdapterFusion mixes 'task2', 'task0', not attached to this model; attach or load them"):
        veneer.load(SUBJECTS["bert"].build(), tmp_path / "fusion")
    model = SUBJECTS["bert"].build()
    for name in ("task0", "task2", "fusion"):
        again = veneer.load(model, tmp_path / name, name)
    assert torch.equal(answers(model, "bert", seed), before)
    with pytest.raises(Unsupported, match="remove: 'fusion' mixes 'task0'; remove 'fusion' first"):
        again.remove("task0")
    again.remove("fusion")
    again.remove("task0")
    assert list(again.adapters) == ["task2"]


def test_targets_and_counts(seed: int) -> None:
    """3 d² + 2 d numbers at every place chosen."""
    tuned = fused("bert", seed, "adapterfusion(targets='mlp', leave_out=(0,))")
    assert {(s.role, s.depth) for s in tuned.sites("fusion")} == {("mlp", 1)}
    places = tuned.sites("fusion")
    assert tuned.summary("fusion").trained == len(places) * (3 * 16 * 16 + 2 * 16)


def test_what_it_refuses(seed: int) -> None:
    model = SUBJECTS["bert"].build()
    with pytest.raises(NoMatch, match="AdapterFusion: no adapter is attached to this model yet; attach or load the trained ones first"):
        veneer.attach(model, "adapterfusion", head=False)
    assert not any("veneer" in name for name, _ in model.named_modules())
    tuned = fused("bert", seed)
    with pytest.raises(UnknownName, match=r"no adapter named 'tsk1' is attached; there are: task0, .* Nearest: 'task1'"):
        veneer.attach(model := tuned.model, "adapterfusion(adapters=('tsk1',))", "other", head=False)
    with pytest.raises(NoMatch, match="targets='conv' names none of the adapters' places"):
        veneer.attach(model, AdapterFusion(targets="conv"), "other", head=False)
    veneer.attach(model, "prompt-tuning(length=2)", "prompts", head=False)
    with pytest.raises(BadValue, match=r"adapter 'prompts' acts on the model at input, and only changes of layers .* adapters="):
        veneer.attach(model, AdapterFusion(adapters=("task0", "prompts")), "other", head=False)
    tuned.activate("fusion")
    with pytest.raises(Unsupported, match="its weights depend on the input"):
        tuned.merge()
