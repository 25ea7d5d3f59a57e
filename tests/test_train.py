"""Runs on tiny random models: they resume to the same numbers, stop cleanly, and refuse what cannot work before working."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from veneer.errors import BadFile, BadValue, UnknownName, VeneerError
from veneer.train import Outcome, Recipe, evaluate, predict, train

WORDS = 40
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 6,000 random parameters with a tokenizer of 44 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 texts whose label depends on their words."""
    chance = random.Random(0)
    lines = ["text,label"]
    for _ in range(120):
        words = [chance.randrange(WORDS) for _ in range(chance.randrange(3, 12))]
        lines.append(" ".join(f"w{w}" for w in words) + "," + ("pos" if sum(words) / len(words) > 20 else "neg"))
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines))
    return path


def recipe(model: Path, data: Path, out: Path, **changes: object) -> Recipe:
    """A run of 30 steps with dropout, evaluated every 7 and checkpointed every 2."""
    settings = {"model": str(model), "data": str(data), "method": "lora(r=2)", "out": str(out), "steps": 30, "batch_size": 8}
    return Recipe.of({**settings, "eval_every": 7, "checkpoint_every": 2, "lr": 0.01, "device": "cpu", **changes})


def quiet(line: str) -> None:
    pass


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["veneer.train.run", "veneer.train.loop", "veneer.train.use", "veneer.store"])


def command(settings: dict, out: Path) -> None:
    """What the command line does: trains, prints, exits with the error's code."""
    from veneer.train import Interrupted

    with out.open("w") as file, contextlib.redirect_stdout(file):
        try:
            train(Recipe.of(settings), progress=False)
        except Interrupted as error:
            print(error, flush=True)
            os._exit(error.code)


def start(wanted: Recipe) -> BaseProcess:
    """The run in a process of its own."""
    wanted.folder.parent.mkdir(parents=True, exist_ok=True)
    process = PROCESSES.Process(target=command, args=(wanted.settings, printed(wanted)))
    process.start()
    return process


def printed(wanted: Recipe) -> Path:
    return wanted.folder.parent / f"{wanted.folder.name}.txt"


def steps_logged(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.exists() else 0


def wait_for_steps(process: BaseProcess, folder: Path, more: int) -> None:
    goal = steps_logged(folder) + more
    while process.is_alive() and steps_logged(folder) < goal:
        time.sleep(0.002)


def finish(process: BaseProcess) -> None:
    process.join(300)
    assert process.exitcode == 0


def same_run(a: Path, b: Path) -> None:
    """Losses, summary and adapter of two runs are equal."""
    import torch

    from veneer.store import read

    one, two = Outcome.load(a), Outcome.load(b)
    assert one.curve == two.curve
    assert one.metrics == two.metrics and one.correct == two.correct and one.base_metrics == two.base_metrics
    assert (one.steps, one.best_step, one.trained) == (two.steps, two.best_step, two.trained)
    first, second = (read(folder / "adapter") for folder in (a, b))
    assert first.about == second.about and first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


@pytest.fixture(scope="session")
def whole(tiny_bert: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    wanted = recipe(tiny_bert, reviews, folder)
    finish(start(wanted))
    assert len(printed(wanted).read_text().splitlines()) <= 25
    return folder


def test_killed_at_random_points_it_ends_as_if_nothing_had_happened(whole: Path, tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    wanted = recipe(tiny_bert, reviews, tmp_path / "killed")
    for _ in range(2):
        process = start(wanted)
        wait_for_steps(process, wanted.folder, chance.randrange(1, 14))
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.join()
    finish(start(wanted))
    same_run(whole, wanted.folder)


def test_ctrl_c_saves_the_step_and_tells_how_to_go_on(whole: Path, tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    wanted = recipe(tiny_bert, reviews, tmp_path / "stopped")
    process = start(wanted)
    wait_for_steps(process, wanted.folder, random.randrange(3, 20))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    before = steps_logged(wanted.folder)
    process.join(300)
    assert process.exitcode == 130
    saved, advice = printed(wanted).read_text().splitlines()[-2:]
    done = steps_logged(wanted.folder)
    assert f"step {done} of 30 is saved" in saved and done <= before + 2
    assert "veneer train" in advice and str(tiny_bert) in advice
    finish(start(wanted))
    same_run(whole, wanted.folder)


def test_a_finished_run_says_so_and_changes_nothing(whole: Path, tiny_bert: Path, reviews: Path) -> None:
    files = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    said: list[str] = []
    outcome = train(recipe(tiny_bert, reviews, whole), say=said.append, progress=False)
    assert "finished" in said[0] and "--again" in said[0] and len(said) == 1
    assert outcome == Outcome.load(whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == files


def test_other_settings_in_the_same_folder_are_refused(whole: Path, tiny_bert: Path, reviews: Path) -> None:
    with pytest.raises(BadValue, match=r"lr 0\.01 → 0\.5.*--again"):
        train(recipe(tiny_bert, reviews, whole, lr=0.5), say=quiet, progress=False)


def test_the_record_of_a_run_is_whole(whole: Path) -> None:
    outcome = Outcome.load(whole)
    assert len(outcome.curve) == 30 and all("loss" in row for row in outcome.curve)
    assert [row["step"] for row in outcome.curve if "eval_accuracy" in row] == [7, 14, 21, 28, 30]
    assert outcome.correct is not None and sum(outcome.correct) == round(outcome.metrics["accuracy"].value * len(outcome.correct))
    assert outcome.base_metrics["accuracy"].n == len(outcome.correct)
    assert outcome.metrics["accuracy"].low < outcome.metrics["accuracy"].value < outcome.metrics["accuracy"].high
    assert outcome.peak_memory > 0 and outcome.seconds > 0 and outcome.adapter_bytes > 0
    events = [json.loads(line)["event"] for line in (whole / "log.jsonl").read_text().splitlines()]
    assert events.count("step") == 30 and events[-1] == "finished"
    assert not (whole / "checkpoints").exists()


def test_it_is_used_again_from_its_folder(whole: Path) -> None:
    assert evaluate(whole) == Outcome.load(whole).metrics
    answers = predict(whole, ["w1 w2", "w38 w39 w37"])
    assert all(a["label"] in ("neg", "pos") and abs(sum(a["scores"].values()) - 1) < 1e-5 for a in answers)
    with pytest.raises(BadValue, match="not a text"):
        predict(whole, [3])


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    from veneer.train.trainer import last_checkpoint

    wanted = recipe(tiny_bert, reviews, tmp_path / "nan", lr=1e30, warmup=0.5, clip=0)
    with pytest.raises(VeneerError, match=r"The loss became (nan|inf) at step \d+") as caught:
        train(wanted, say=quiet, progress=False)
    saved = last_checkpoint(wanted.folder / "checkpoints")
    assert (str(saved.resolve()) in str(caught.value)) if saved else ("no checkpoint yet" in str(caught.value))


def test_checkpoints_hold_no_base_and_no_pickle(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    from veneer.train import loop

    wanted = recipe(tiny_bert, reviews, tmp_path / "run", steps=6, base=False)
    found: list[set[str]] = []

    class Looking(loop.RunTrainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            found.extend({p.name for p in c.iterdir()} for c in Path(self.args.output_dir).glob("checkpoint-*"))

    whole_class, loop.RunTrainer = loop.RunTrainer, Looking
    try:
        train(wanted, say=quiet, progress=False)
    finally:
        loop.RunTrainer = whole_class
    expected = {"adapter.safetensors", "veneer.json", "optimizer.safetensors", "random-0.safetensors", "trainer_state.json"}
    assert found and all(names == expected for names in found)


def test_half_written_and_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    from veneer.train.state import write_state
    from veneer.train.trainer import last_checkpoint

    good, bad = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    for folder in (good, bad):
        folder.mkdir()
        write_state(folder / "optimizer.safetensors", {"a": 1})
        (folder / "trainer_state.json").write_text("{}")
    (bad / "optimizer.safetensors").write_bytes((bad / "optimizer.safetensors").read_bytes()[:20])
    (tmp_path / ".partial-6").mkdir()
    assert last_checkpoint(tmp_path) == good
    assert not (tmp_path / ".partial-6").exists()


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    import torch

    from veneer.train.state import random_state, read_state, set_random_state, write_state

    state = {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {"m": torch.randn(2, 3)}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}],
        "none": None,
    }
    write_state(tmp_path / "s.safetensors", state)
    back = read_state(tmp_path / "s.safetensors")
    assert back["groups"] == state["groups"] and back["none"] is None and list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][1]["m"], state["state"][1]["m"])
    write_state(tmp_path / "r.safetensors", random_state())
    drawn = (torch.rand(3), random.random())
    set_random_state(read_state(tmp_path / "r.safetensors"))
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


def test_early_stopping_and_regression(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    rows = reviews.read_text().splitlines()
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("\n".join(["text,score", *(f"{r.split(',')[0]},{len(r) / 7:.3f}" for r in rows[1:])]))
    wanted = recipe(tiny_bert, numbers, tmp_path / "run", patience=1, eval_every=2, lr=1e-9, method="bitfit")
    outcome = train(wanted, say=quiet, progress=False)
    assert outcome.steps < 30
    assert {"rmse", "mae", "pearson"} == set(outcome.metrics) and outcome.correct is None
    assert evaluate(wanted.folder)["rmse"].value == pytest.approx(outcome.metrics["rmse"].value, rel=1e-4)


def test_users_own_trainer_gets_extra_losses_rates_and_small_checkpoints(tiny_bert: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    import veneer
    from veneer.train import AdapterTrainerMixin

    class Mine(AdapterTrainerMixin, Trainer):
        pass

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    tuned = veneer.attach(model, "adalora(init_r=3, target_r=2)")
    rows = [{"input_ids": torch.arange(5), "labels": torch.tensor(i % 2)} for i in range(16)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Mine(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "adapter.safetensors").is_file()
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("model.safetensors"))
    model.train()
    batch = {"input_ids": torch.arange(5)[None], "labels": torch.tensor([1])}
    torch.manual_seed(0)
    full = trainer.compute_loss(model, dict(batch))
    torch.manual_seed(0)
    plain = model(**batch).loss
    assert torch.allclose(full, plain + sum(tuned.loss_terms().values()), atol=1e-6)


def test_a_run_that_ends_before_its_test_takes_no_step_more(
    tiny_bert: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train.run import Run

    whole = train(recipe(tiny_bert, reviews, tmp_path / "whole"), progress=False, say=quiet)
    real = Run.test

    def dies(self: Run, *args: object) -> object:
        if args[-1] == "adapted":
            raise OSError("out of power")
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "test", dies)
    with pytest.raises(OSError, match="out of power"):
        train(recipe(tiny_bert, reviews, tmp_path / "cut"), progress=False, say=quiet)
    monkeypatch.undo()
    again = train(recipe(tiny_bert, reviews, tmp_path / "cut"), progress=False, say=quiet)
    assert (again.steps, again.best_step, again.metrics) == (whole.steps, whole.best_step, whole.metrics)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_strategy_does_not_slow_what_it_goes_with() -> None:
    import veneer
    from veneer.train.run import default_rate

    alone = default_rate(veneer.parse("probe"))
    assert default_rate(veneer.parse("probe + deft")) == alone > default_rate(veneer.parse("lora + probe + deft"))


# -- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"data": "movie-sentiment"}, BadValue, "model is missing"),
        ({"model": "minilm", "data": "movie-sentiment", "epoch": 3}, UnknownName, "'epochs'"),
        ({"model": "minilm", "data": "movie-sentiment", "lr": -1}, BadValue, "more than 0"),
        ({"model": "minilm", "data": "movie-sentiment", "batch_size": 0}, BadValue, "at least 1"),
        ({"model": "minilm", "data": "movie-sentiment", "precision": "fp8"}, BadValue, "'bf16'"),
        ({"model": "minilm", "data": "movie-sentiment", "steps": 3, "epochs": 1}, BadValue, "exclude"),
        ({"model": "minilm", "data": "movie-sentiment", "method": "lorra"}, UnknownName, "lora"),
        ({"model": "minilm", "data": "movie-sentiment", "method": "lora(rank=1.5, q=2)"}, VeneerError, ""),
        ({"model": "minilm", "data": "movie-sentiment", "task": "text-clasification"}, UnknownName, "text-classification"),
        ({"model": "minlm", "data": "movie-sentiment"}, UnknownName, "minilm"),
        ({"model": "./nowhere", "data": "movie-sentiment"}, BadFile, "nowhere"),
    ],
)
def test_mistakes_in_recipes_are_told(settings: dict, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        Recipe.of(settings).check()
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_recipes_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: minilm\ndata: movie-sentiment\nlr: 1e-3\nbatch-size: 16\n")
    assert Recipe.read(path, {"seed": 3}) == Recipe(model="minilm", data="movie-sentiment", lr=1e-3, batch_size=16, seed=3)
    path.write_text("model: [minilm\ndata: x")
    with pytest.raises(BadFile, match="line 2"):
        Recipe.read(path)
    with pytest.raises(BadFile, match=r"r\.yaml"):
        Recipe.read(tmp_path / "q.yaml")


def test_the_recipes_that_come_along_are_right() -> None:
    from veneer.assets import MODELS

    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        found = Recipe.read(path)
        assert (found.model in MODELS or found.model.startswith("runs/")) and found.method  # runs/…: what another recipe makes


def test_a_folder_in_use_is_refused(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    from veneer.train.run import _claimed

    wanted = recipe(tiny_bert, reviews, tmp_path / "run")
    with _claimed(wanted.folder), pytest.raises(BadValue, match="Another process"):
        train(wanted, say=quiet, progress=False)


def test_mistakes_are_told_before_torch_is_loaded(tiny_bert: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\na,1\nb\n")
    code = (
        "import sys\n"
        "from veneer.train import Recipe, train\n"
        "from veneer.errors import VeneerError\n"
        "try:\n"
        "    train(Recipe.of(dict(model=sys.argv[1], data=sys.argv[2])))\n"
        "except VeneerError as error:\n"
        "    assert 'line 3' in str(error), error\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tiny_bert), str(bad)], check=True, env=env, cwd=tmp_path)


def test_trl_trains_with_the_same_mixin(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import datasets
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import veneer
    from veneer.train import AdapterTrainerMixin

    class Mine(AdapterTrainerMixin, trl.SFTTrainer):
        pass

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "</s>", *"abcdefgh"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))
    tuned = veneer.attach(model, "lora(r=2)")
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = datasets.Dataset.from_dict({"text": ["a b c d", "e f g h a"] * 8})
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, save_steps=3, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    Mine(model=model, args=config, train_dataset=rows, processing_class=tokenizer).train()
    assert any(bool(p.any()) for name, p in model.named_parameters() if p.requires_grad and name.endswith("B"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert (tmp_path / "checkpoint-3" / "adapter.safetensors").is_file() and not list(tmp_path.rglob("model.safetensors"))
    assert tuned.active == ["default"]


def test_two_processes_train_one_model(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:
    """`torchrun` on the command line: one log, one adapter, and the loss of a batch is the mean over both processes."""
    wanted = recipe(tiny_bert, reviews, tmp_path / "run", steps=4, batch_size=4)
    names = ("model", "data", "method", "out", "steps", "batch_size")
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(wanted, name)))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "veneer.cli.main", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *flags, "--device", "cpu"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("To use it") == 1
    losses = [e["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "loss" in (e := json.loads(line))]
    assert len(losses) == 4 and all(0.4 < loss < 1.0 for loss in losses)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
