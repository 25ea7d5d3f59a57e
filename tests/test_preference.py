"""Preferences: DPO's numbers, any method with its base or another adapter as the reference, TRL's losses, runs that go on, stays."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import SUBJECTS, moved
from torch import Tensor

import veneer
from veneer.cli.main import main
from veneer.errors import BadValue, Unsupported
from veneer.maths.preference import advantage, answer_logp, preference_loss, rewards
from veneer.tasks.data import Table
from veneer.tasks.preferences import Pairs, batches, check, for_trl
from veneer.tasks.stays import ASK, Event, Stay, drawn, pairs, rendered, stays, worse
from veneer.train.prefer import Preference, PreferenceRun
from veneer.train.preference import PreferenceTrainer, Reference, measure, pair_logps

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "note-dpo.json").read_text())["cases"]
NUMBERS = load_file(GOLDEN / "note-dpo.safetensors")
SPECS = ["lora(r=2)", "ia3", "bottleneck-adapter(m=4)", "prompt-tuning(length=3)", "prefix-tuning(length=3)", "full(targets='mlp.*')"]


def near(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_the_numbers_of_the_authors_code(i: int) -> None:
    t = {k.partition("/")[2]: v.double() if v.is_floating_point() else v for k, v in NUMBERS.items() if k.startswith(f"case{i}/")}
    beta, eps = CASES[i]["hyper"]["beta"], CASES[i]["hyper"]["label_smoothing"]
    logits = {name: t[f"{name}.logits"].requires_grad_() for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")}
    logp = {name: answer_logp(x, t[f"{name.partition('_')[2]}.labels"]) for name, x in logits.items()}
    for name, value in logp.items():
        near(value, t[f"score.{name}_logp"])
    policy, held = (logp["policy_chosen"], logp["policy_rejected"]), (logp["ref_chosen"].detach(), logp["ref_rejected"].detach())
    h = advantage(policy, held)
    losses = preference_loss(h, beta, eps)
    near(losses, t["out.losses"])
    near(losses.mean().reshape(1), t["loss"])
    near(rewards(policy[0], held[0], beta), t["out.reward_chosen"])
    near(rewards(policy[1], held[1], beta), t["out.reward_rejected"])
    near(beta * h, t["out.margin"])
    near((h > 0).double().mean().reshape(1), t["out.accuracy"])
    losses.mean().backward()
    near(logits["policy_chosen"].grad, t["grad.policy_chosen"])
    near(logits["policy_rejected"].grad, t["grad.policy_rejected"])


def test_laws_of_the_loss() -> None:
    h = torch.randn(5, dtype=torch.float64)
    assert preference_loss(torch.zeros(2), beta=0.7).tolist() == pytest.approx([math.log(2)] * 2)
    near(preference_loss(h, 0.3, 0.2), 0.8 * preference_loss(h, 0.3) + 0.2 * preference_loss(-h, 0.3))
    near(preference_loss(h, 0.5, ipo=True), (h - 1) ** 2)
    logits, labels = torch.randn(2, 600, 11, dtype=torch.float64), torch.randint(0, 11, (2, 600))
    labels[:, :5], labels[0, 300:] = -100, -100
    told = logits.log_softmax(-1)
    for aligned in (False, True):
        shift = 0 if aligned else 1
        wanted = [sum(told[b, t - shift, labels[b, t]] for t in range(shift, 600) if labels[b, t] != -100) for b in range(2)]
        near(answer_logp(logits, labels, aligned=aligned), torch.stack(wanted))


# -- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of width 16 that reads letters, conversations and pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("preference")
    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=128).save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)).save_pretrained(
        folder / "model"
    )
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i * 7 % 10}"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, told)))
    return folder


def loaded(place: Path, spec: str) -> tuple[veneer.tuned.Tuned, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    return veneer.attach(model, spec, head=False), AutoTokenizer.from_pretrained(place / "model")


def trainer_of(
    place: Path, tuned: veneer.tuned.Tuned, tokenizer: Any, out: Path, reference: str | None = None, own_loss: Any = None, **changes: Any
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    rows = Pairs.read(str(place / "pairs.jsonl")).splits.train.rows[:8]
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "beta": 0.3, "report_to": "none", "use_cpu": True}
    args = DPOConfig(
        str(out),
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        **{**settings, **changes},
    )
    data = Dataset.from_list(for_trl(rows, template=False))
    return PreferenceTrainer(tuned.model, reference=reference, own_loss=own_loss, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_starts_at_log_two_and_learns(spec: str, place: Path, tmp_path: Path) -> None:
    tuned, tokenizer = loaded(place, spec)
    base = {k: v.clone() for k, v in tuned.model.state_dict().items()}
    trainer = trainer_of(place, tuned, tokenizer, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    start = "identity" not in tuned.adapters["default"].method.parts[0].limits
    assert (losses[0] == pytest.approx(math.log(2), abs=1e-3)) is start and losses[-1] < losses[0]
    now = tuned.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in base.items() if ".veneer" not in k)


@pytest.mark.parametrize("loss", ["sigmoid", "conservative", "ipo-summed"])
def test_a_step_of_trl_has_our_loss(loss: str, place: Path, tmp_path: Path) -> None:
    tuned, tokenizer = loaded(place, "lora(r=2)")
    moved(tuned)
    form = {"beta": 0.3, "label_smoothing": 0.1 if loss == "conservative" else 0.0, "ipo": loss == "ipo-summed"}
    own = None if loss == "sigmoid" else partial(preference_loss, **form)
    trainer = trainer_of(place, tuned, tokenizer, tmp_path, own_loss=own)
    rows = Pairs.read(str(place / "pairs.jsonl")).splits.train.rows[:8]
    batch = next(iter(trainer.get_train_dataloader()))
    answers = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"])]
    told = [next(row for row in rows if row["chosen"] + "</s>" == text) for text in answers[:4]]
    ours = measure(tuned, batches(told, tokenizer, 4, 512, "cpu"), None, 0.3)
    expected = preference_loss(torch.tensor(ours["h"]), **form).mean()
    tuned.model.train()
    near(trainer.compute_loss(trainer.model, batch).detach(), expected, 1e-4)


def test_the_reference_may_be_another_adapter_that_never_trains(place: Path, tmp_path: Path) -> None:
    tuned, tokenizer = loaded(place, "lora(r=2)")
    moved(tuned)
    tuned.save(tmp_path / "sft")
    veneer.load(tuned.model, tmp_path / "sft", "reference")
    held = [t.clone() for part in tuned.adapters["reference"].parts for t in part.tensors().values()]
    tuned.activate("default")
    trainer = trainer_of(place, tuned, tokenizer, tmp_path / "out", "reference")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0]
    now = [t for part in tuned.adapters["reference"].parts for t in part.tensors().values()]
    assert all(map(torch.equal, held, now))
    assert tuned.active == ["default"]


def test_the_reference_pass_leaves_everything_as_it_was_even_when_it_fails() -> None:
    tuned = veneer.attach(SUBJECTS["llama"].build(torch.float32), "lora(r=2)", head=False)
    moved(tuned)
    before = [(p.requires_grad, p.clone()) for p in tuned.parameters()]
    ids = torch.randint(0, 48, (2, 5))
    y = tuned.model(ids).logits
    with pytest.raises(ZeroDivisionError), tuned.acting():
        assert not torch.equal(tuned.model(ids).logits, y)
        raise ZeroDivisionError
    assert torch.equal(tuned.model(ids).logits, y) and tuned.active == ["default"]
    assert all(p.requires_grad is flag and torch.equal(p, old) for p, (flag, old) in zip(tuned.parameters(), before))
    with pytest.raises(veneer.errors.UnknownName):
        Reference(tuned, "nobody")


def test_padding_and_batching_change_nothing(place: Path) -> None:
    tuned, tokenizer = loaded(place, "lora(r=2)")
    moved(tuned)
    tuned.model.eval()
    rows = [{"prompt": "a", "chosen": "yes indeed, yes", "rejected": "n"}, {"prompt": "a longer one", "chosen": "y", "rejected": "no no"}]
    whole = measure(tuned, batches(rows, tokenizer, 2, 512, "cpu"))
    single = [measure(tuned, batches([row], tokenizer, 1, 512, "cpu")) for row in rows]
    assert whole["h"] == pytest.approx([one["h"][0] for one in single], abs=1e-4)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert measure(tuned, batches(swapped, tokenizer, 2, 512, "cpu"))["h"] == pytest.approx([-h for h in whole["h"]], abs=1e-4)


def test_encoder_decoders_are_scored_without_a_shift() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=30, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)).eval()
    labels = torch.randint(3, 30, (4, 5))
    batch = {"input_ids": torch.randint(3, 30, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long), "labels": labels}
    better, worse_ones = pair_logps(model, batch)
    logits = model(input_ids=batch["input_ids"], labels=labels).logits.log_softmax(-1)
    near(torch.cat([better, worse_ones]), logits.gather(2, labels[..., None]).sum((1, 2)), 1e-4)


def test_an_adapted_output_layer_is_refused(place: Path, tmp_path: Path) -> None:
    tuned, tokenizer = loaded(place, "lora(r=2, targets='head')")
    with pytest.raises(Unsupported, match="lm_head is adapted"):
        trainer_of(place, tuned, tokenizer, tmp_path)


# -- runs ---------------------------------------------------------------------------------------------------------


def test_on_from_a_run_and_on_again(place: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "chat.jsonl"), "--steps", "4", "--batch-size", "8"]
    assert main([*argv, "--method", "ia3", "--device", "cpu", "--out", str(tmp_path / "sft"), "--max-new-tokens", "4"]) == 0
    argv = ["prefer", str(tmp_path / "sft"), "--data", str(place / "pairs.jsonl"), "--steps", "4", "--lr", "1e-2", "--beta", "0.5"]
    argv += ["--batch-size", "4", "--out", str(tmp_path / "dpo")]
    assert main(argv) == 0
    record = json.loads((tmp_path / "dpo" / "run.json").read_text())
    before, after = record["outcome"]["before"], record["outcome"]["after"]
    assert before["loss"]["value"] == pytest.approx(math.log(2), abs=1e-5) and after["loss"]["value"] < before["loss"]["value"]
    assert before["preferred"]["value"] == 0 and before["margin"]["value"] == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "dpo"), "say 3"]) == 0
    assert main(argv) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*argv[:-4], "--batch-size", "2", "--out", str(tmp_path / "dpo")]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(name: str) -> Preference:
        return Preference(
            data=str(place / "pairs.jsonl"), model=str(place / "model"), method="lora(r=2)", out=str(tmp_path / name),
            steps=6, lr=1e-2, batch_size=4, checkpoint_every=2, device="cpu",
        )  # fmt: skip

    whole = PreferenceRun(settings("whole"), None, lambda line: None).go(progress=False)
    step = PreferenceTrainer.training_step

    def stops(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        PreferenceRun(settings("half"), None, lambda line: None).go(progress=False)
    monkeypatch.undo()
    said: list[str] = []
    half = PreferenceRun(settings("half"), None, said.append).go(progress=False)
    assert any("Resuming after step 2 of 6" in line for line in said)
    assert half["after"]["loss"]["value"] == pytest.approx(whole["after"]["loss"]["value"], abs=1e-6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: there is no rejected answer"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "line 2: there is no rejected answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "line 2: both answers are the same"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "line 2: 'prompt' is empty"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"}, "ends with the user's"),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (good, row, good)))
    with pytest.raises(BadValue, match=said):
        Pairs.read(str(file))


def test_other_mistakes(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"no column 'rejected'.*'reject'"):
        check(Table([{"prompt": "a", "chosen": "b", "reject": "c"}], "f"))
    with pytest.raises(BadValue, match="beta=0"):
        Preference(data="x", beta=0)
    with pytest.raises(BadValue, match="conservative, robust"):
        Preference(data="x", label_smoothing=0.1)
    with pytest.raises(BadValue, match="exo_pair"):
        Preference(data="x", loss="exo_pair")
    with pytest.raises(BadValue, match="either a finished run"):
        PreferenceRun(Preference(data=str(place / "pairs.jsonl")), None)
    with pytest.raises(BadValue, match="data is missing"):
        Preference()


# -- stays --------------------------------------------------------------------------------------------------------


def test_events_stand_in_time_and_nothing_after_the_discharge() -> None:
    events = [
        Event(50, "test", "b"),
        Event(10, "note", "n"),
        Event(10, "visit", "v"),
        Event(10, "visit", "v"),
        Event(90, "discharge", "home"),
    ]
    stay = Stay("head", (*events, Event(95, "note", "the summary")), "s", ())
    lines = rendered(stay).splitlines()
    assert lines == ["head", "[day 1 00:10] VISIT: v", "[day 1 00:10] NOTE: n", "[day 1 00:50] TEST: b", "[day 1 01:30] DISCHARGE: home"]
    assert "TEST" not in rendered(stay, budget=len(rendered(stay)) - 1)


def test_summaries_hold_the_facts_and_the_worse_ones_do_not() -> None:
    for seed in range(40):
        draw = random.Random(seed)
        stay = drawn(draw)
        bad = worse(stay, draw)
        assert all(fact in stay.summary for fact in stay.facts)
        assert not all(fact in bad for fact in stay.facts), (stay.summary, bad)
    assert stays(5) == stays(5) and stays(5) != stays(5, seed=2)
    assert not {row["prompt"] for row in pairs(20)} & {row["messages"][0]["content"] for row in stays(20)}
    assert all(row["prompt"].startswith(ASK) for row in pairs(3))
