"""Large models: adapters on `meta`, filling shard by shard, costs that grow linearly, and the arithmetic of docs/scale.md."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import socket
import sys
import traceback
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from ledger import Ledger, counted
from safetensors.torch import save_file
from tiny import SUBJECTS, VOCABULARY, output
from torch import Tensor, nn

import veneer
from veneer import filling
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported, VeneerError
from veneer.store import tensors_of
from veneer.study import scale, scale_run

sys.path.insert(0, str(Path(__file__).parent / "conformance"))
from case import Case

SLUGS = [card.slug for card in veneer.methods() if card.family != "strategy"]
EVERYWHERE = "lora(r=2, targets='attn.* mlp.*')"
IDS = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_meta(make: Any = tiny.llama, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return make(**changes).eval()


def written(model: nn.Module, folder: Path, shards: str = "6KB") -> Path:
    """The model as a checkpoint, in shards where its library writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size=shards)
    else:
        save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def llama(**changes: Any) -> nn.Module:
    return tiny.spread(tiny.llama(**changes)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family."""
    top = tmp_path_factory.mktemp("checkpoints")
    return {name: written(subject.build(torch.float32), top / name) for name, subject in SUBJECTS.items()}


# -- on meta --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", SLUGS)
def test_every_method_waits_on_meta_and_starts_as_if_it_had_not(slug: str, folders: dict[str, Path], seed: int) -> None:
    case = Case(slug, seed=seed)
    model = on_meta(case.subject.make)
    if case.method.weighs or case.method.calibrates or case.method.reads_gradients:
        with pytest.raises(VeneerError, match="weights"):
            case.attach(model, seed=seed)
        return
    waiting = case.attach(model, seed=seed)
    assert all(t.is_meta for t in tensors_of(waiting, "default", True).values())
    veneer.fill(model, folders[case.subject.name])
    plain = case.attach(case.base(torch.float32), seed=seed)
    there, here = tensors_of(plain, "default", True), tensors_of(waiting, "default", True)
    assert list(here) == list(there)
    for key in there:
        assert here[key].dtype == there[key].dtype and torch.equal(here[key], there[key]), key
    assert torch.equal(case.answers(model), case.answers(plain.model))


@pytest.mark.parametrize(
    "spec", ["lora(r=2, start=pissa)", "lora(r=2, start=pissa, niter=2) + dora(r=2)", "dora(r=2)", "prompt-tuning(length=2)"]
)
def test_the_call_may_stand_inside_the_meta_device(spec: str, folders: dict[str, Path], seed: int) -> None:
    with torch.device("meta"):
        model = tiny.llama().eval()
        tuned = veneer.attach(model, spec, seed=seed)
    veneer.fill(model, folders["llama"])
    plain = veneer.attach(SUBJECTS["llama"].build(torch.float32), spec, seed=seed)
    for p, q in zip(tuned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_base_filled_by_other_means(seed: int) -> None:
    source, model = llama(), on_meta()
    tuned = veneer.attach(model, "dora(r=2)", seed=seed)
    with pytest.raises(Unsupported, match="no values yet"):
        tuned.save("nowhere")
    with pytest.raises(Unsupported, match="has no weights yet"):
        tuned.materialise()
    model.load_state_dict(source.state_dict(), assign=True, strict=False)
    tuned.materialise().materialise()
    for p, q in zip(tuned.parameters(), veneer.attach(source, "dora(r=2)", seed=seed).parameters(), strict=True):
        assert torch.equal(p, q)


def test_saved_adapters_load_onto_meta(folders: dict[str, Path], tmp_path: Path, seed: int) -> None:
    tuned = veneer.attach(SUBJECTS["llama"].build(torch.float32), "dora(r=2) + vera(r=4)", "one", seed=seed)
    stir(tuned, seed)
    tuned.save(tmp_path)
    model = on_meta()
    veneer.load(model, tmp_path)
    veneer.attach(model, "lora(r=2)", "other", seed=seed)
    veneer.fill(model, folders["llama"])
    for name, plain in (("one", tuned), ("other", veneer.attach(tuned.model, "lora(r=2)", "other", seed=seed))):
        for p, q in zip(veneer.of(model).parameters(name), plain.parameters(name), strict=True):
            assert torch.equal(p, q)


def stir(tuned: veneer.Tuned, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.empty(p.shape).normal_(generator=generator))


def test_a_copy_waits_for_itself(folders: dict[str, Path], seed: int) -> None:
    import copy

    model = on_meta()
    veneer.attach(model, "dora(r=2)", seed=seed)
    twin = copy.deepcopy(model)
    veneer.fill(twin, folders["llama"])
    assert all(p.is_meta for p in model.parameters()) and not any(p.is_meta for p in twin.parameters())


# -- filling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_filled_models_are_the_loaded_ones(name: str, folders: dict[str, Path]) -> None:
    subject = SUBJECTS[name]
    model = veneer.fill(on_meta(subject.make), folders[name])
    loaded = subject.build(torch.float32)
    for (key, a), (other, b) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert key == other and torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(subject.answers(model), subject.answers(loaded))


def test_tied_weights_stay_tied_and_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(tie_word_embeddings=True)
    written(source, tmp_path)
    read = spied(monkeypatch)
    model: Any = veneer.fill(on_meta(tie_word_embeddings=True), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(read) == len(list(source.parameters()))
    assert torch.equal(output(model, {"input_ids": IDS}), output(source, {"input_ids": IDS}))
    assert filling.units(model) == ["model.layers.0", "model.layers.1"]


def test_dtypes_are_the_models(folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        model = tiny.llama().to(torch.bfloat16)
    tuned = veneer.attach(model, EVERYWHERE)
    veneer.fill(model, folders["llama"])
    own = {id(p) for p in tuned.parameters()}
    assert all(p.dtype == (torch.float32 if id(p) in own else torch.bfloat16) for p in model.parameters())


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a checkpoint, as they happen."""
    read: list[int] = []
    whole = filling.Checkpoint.read

    def noted(self: Any, name: str, piece: Any = None) -> Tensor:
        tensor = whole(self, name, piece)
        read.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(filling.Checkpoint, "read", noted)
    return read


@pytest.mark.parametrize("spec", [EVERYWHERE, "dora(r=2, targets='attn.* mlp.*')"])
def test_nothing_is_held_beside_the_model_but_one_tensor(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(depth=6)
    written(source, tmp_path)
    read = spied(monkeypatch)
    model = on_meta(depth=6)
    tuned = veneer.attach(model, spec)
    with Ledger() as ledger:
        veneer.fill(model, tmp_path)
    total, largest = sum(p.nbytes for p in source.parameters()), max(p.nbytes for p in source.parameters())
    own = sum(t.nbytes for t in tensors_of(tuned, "default", True).values())
    assert sum(read) == total  # every tensor once
    assert ledger.peak <= total + own + 3 * largest + 2048, (
        ledger.peak,
        total,
        own,
        largest,
    )  # three: the file's, ours, what a method makes of it


MEMORY = """
import sys, json; sys.path.insert(0, {tests!r})
import torch, veneer, tiny
from ledger import resident
def make():
    with torch.device("meta"):
        return tiny.llama(depth=8, width=512, vocab_size=4096, intermediate_size=2048).eval()
warm = make(); veneer.attach(warm, "dora(r=2)")
torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
model = make()
veneer.attach(model, "dora(r=2, targets='attn.* mlp.*')")
before = resident()
veneer.fill(model, {folder!r})
now, peak = resident(), resident(peak=True)
print(json.dumps({{"model": sum(p.nbytes for p in model.parameters()), "grown": now - before, "peak": peak - before}}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
def test_the_process_grows_by_the_model_and_one_shard(tmp_path: Path) -> None:
    import subprocess

    source = tiny.llama(depth=8, width=512, vocab_size=4096, intermediate_size=2048)
    shard, largest = 16_000_000, max(p.nbytes for p in source.parameters())
    written(source, tmp_path, "16MB")
    script = MEMORY.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["model"] > 100e6
    assert found["peak"] <= found["model"] + shard + largest + 16e6, found


def test_a_head_that_the_checkpoint_lacks_starts_at_random(tmp_path: Path, seed: int) -> None:
    from transformers import LlamaForSequenceClassification

    written(llama(), tmp_path)
    with torch.device("meta"):
        model: Any = LlamaForSequenceClassification(tiny.llama().config)
    tuned = veneer.attach(model, EVERYWHERE, seed=seed)
    with pytest.warns(UserWarning, match="score.weight"):
        veneer.fill(model, tmp_path)
    assert "other" not in [s.role for s in tuned.sites()] and model.score.weight.std() > 0
    assert not any(p.is_meta for p in model.parameters())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = written(llama(), tmp_path / "whole")
    with pytest.raises(Mismatch, match=r"is \[16, 16\], and this model needs \[24, 24\]"):
        veneer.fill(on_meta(width=24), folder)
    with pytest.raises(BadFile, match=r"has no model\.layers\.2\..*class and configuration"):
        veneer.fill(on_meta(depth=3), folder)
    with pytest.raises(BadValue, match="no weight of the model is on meta"):
        veneer.fill(llama(), folder)
    with pytest.raises(BadFile, match=r"expected model\.safetensors"):
        veneer.fill(on_meta(), tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../else.safetensors"}}))
    with pytest.raises(BadFile, match="not a file of this folder"):
        veneer.fill(on_meta(), folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(BadFile, match="no weight_map"):
        veneer.fill(on_meta(), folder)


class Rotating(nn.Module):
    """A buffer that only its constructor knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def test_buffers_that_nobody_can_compute_are_named(tmp_path: Path) -> None:
    save_file({k: t.contiguous() for k, t in Rotating().state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Rotating()
    with pytest.raises(Unsupported, match=r"angles is in no checkpoint.*include_buffers=False"):
        veneer.fill(model, tmp_path)
    model = Rotating()
    model.linear.to("meta")
    assert torch.equal(veneer.fill(model, tmp_path).angles, torch.arange(4.0))  # type: ignore[arg-type]


# -- four bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [EVERYWHERE, "dora(r=2)", "lora(r=2, start=pissa)", "ssf"])
def test_packed_on_meta_is_packed_after_loading(spec: str, tmp_path: Path, seed: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    source = llama(width=64)
    written(source, tmp_path)
    model = veneer.pack(on_meta(width=64))
    tuned = veneer.attach(model, spec, seed=seed)
    veneer.fill(model, tmp_path)
    for name, layer in [(n, m) for n, m in source.named_modules() if type(m) is nn.Linear and "layers" in n]:
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        parent, _, key = name.rpartition(".")
        setattr(source.get_submodule(parent), key, packed.to("cpu"))
    plain = veneer.attach(source, spec, seed=seed)
    for p, q in zip(tuned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        assert torch.equal(output(model, {"input_ids": IDS}), output(source, {"input_ids": IDS}))
    assert tuned.summary().total == plain.summary().total


def test_packing_comes_first(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(Unsupported, match="has its weights already"):
        veneer.pack(llama())
    model = on_meta()
    veneer.attach(model, "lora(r=2)")
    with pytest.raises(Unsupported, match="Pack first"):
        veneer.pack(model)


# -- growth ---------------------------------------------------------------------------------------------------


def work(depth: int, folder: Path) -> dict[str, tuple[int, ...]]:
    """Function calls and bytes of attaching, saving, loading and merging at one depth."""
    found = {}
    model, fresh = llama(depth=depth), llama(depth=depth)
    actions = {
        "attach": lambda: veneer.attach(model, EVERYWHERE),
        "save": lambda: veneer.of(model).save(folder),
        "load": lambda: veneer.load(fresh, folder),
        "merge": lambda: veneer.of(model).merge(keep=False),
    }
    for name, action in actions.items():
        with counted() as calls, Ledger() as ledger:
            action()
        found[name] = (ledger.operations, ledger.made)
        gc.collect()
    model, fresh = llama(depth=depth), llama(depth=depth)
    for name, action in actions.items():
        with counted() as calls:
            action()
        found[name] += (calls[0],)
    return found


def test_work_grows_linearly_with_the_layers(tmp_path: Path) -> None:
    work(2, tmp_path / "2")  # what is worked out once a process
    at = {depth: work(depth, tmp_path / str(depth)) for depth in (4, 8, 16)}
    for name in at[4]:
        for what, four, eight, sixteen in zip(("operations", "bytes", "calls"), at[4][name], at[8][name], at[16][name], strict=True):
            first, second = eight - four, sixteen - eight
            assert abs(second - 2 * first) <= 0.02 * second, f"{name}: {what} at 4, 8 and 16 layers: {four}, {eight}, {sixteen}"


def test_the_base_is_never_copied(tmp_path: Path) -> None:
    model = llama(depth=4)
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    total = sum(p.nbytes for p in model.parameters())
    with Ledger() as ledger:
        tuned = veneer.attach(model, "lora(r=1)")
        tuned.save(tmp_path)
        veneer.load(model, tmp_path, "again")
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters() if "veneer" not in name} == before
    adapter = sum(p.nbytes for p in tuned.parameters())
    assert ledger.made <= 8 * adapter < total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_for_good_needs_one_weight_more(dtype: torch.dtype, seed: int) -> None:
    def stirred(model: nn.Module) -> veneer.Tuned:
        tuned = veneer.attach(model, "dora(r=2, targets='attn.* mlp.*')", seed=seed)
        stir(tuned, seed)
        return tuned

    kept, model = llama(depth=6).to(dtype), llama(depth=6).to(dtype)
    stirred(kept).merge()
    tuned = stirred(model)
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    old = [weakref.ref(m._parameters["weight"]) for m in linear]
    merged, largest = sum(m.weight.nbytes for m in linear), max(m.weight.numel() for m in linear)
    with Ledger() as ledger:
        tuned.merge(keep=False)
    gc.collect()
    assert all(ref() is None for ref in old)  # each original went
    assert ledger.peak - merged <= 6 * 4 * largest, (ledger.peak, merged, largest)  # what the method makes of one weight in float32
    with torch.no_grad():
        assert torch.equal(output(model, {"input_ids": IDS}), output(kept, {"input_ids": IDS}))
    with pytest.raises(Unsupported, match="keep=False"):
        tuned.unmerge()
    with pytest.raises(Unsupported, match="already merged"):
        tuned.merge()
    plain = tuned.detach()
    with torch.no_grad():
        assert torch.equal(output(plain, {"input_ids": IDS}), output(kept, {"input_ids": IDS}))


def test_a_tied_weight_merged_for_good_is_untied(seed: int) -> None:
    model: Any = llama(tie_word_embeddings=True)
    table = model.model.embed_tokens.weight.clone()
    tuned = veneer.attach(model, "lora(r=2, targets='head')", seed=seed)
    stir(tuned, seed)
    with pytest.warns(UserWarning, match="untied"):
        tuned.merge(keep=False)
    assert torch.equal(model.model.embed_tokens.weight, table) and not torch.equal(model.lm_head.weight, table)
    assert model.config.tie_word_embeddings is False


# -- two processes --------------------------------------------------------------------------------------------

SHARDED = ["lora(r=3, start=pissa) + ssf", "dora(r=3)", "vera(r=4)", "wegeft(r=2)", "prompt-tuning(length=2)", "prefix-tuning(length=2)"]


def process(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    failed = []
    try:
        for action, options in [*((sharded, (spec, Path(folder))) for spec in SHARDED), (torchao, ())]:
            try:
                action(*options)  # type: ignore[operator]
            except Exception:
                failed.append(f"{action.__name__}{options}, rank {rank}:\n{traceback.format_exc(limit=-5)}")
    finally:
        dist.destroy_process_group()
    assert not failed, "\n".join(failed)


def sharded(spec: str, folder: Path) -> None:
    """Filled into shards: the same first values, outputs and files as in one process; each process reads its half."""
    from torch.distributed.fsdp import fully_shard

    plain = veneer.attach(llama(), spec, seed=3)
    model = on_meta()
    tuned = veneer.attach(model, spec, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        read = spied(patch)
        veneer.fill(model, folder, shard=fully_shard)
    odd = sum(p[0].nbytes for n, p in plain.model.named_parameters() if "veneer" not in n)
    assert 2 * sum(read) <= sum(p.nbytes for n, p in plain.model.named_parameters() if "veneer" not in n) + odd
    for p, q in zip(tuned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(output(model, {"input_ids": IDS}), output(plain.model, {"input_ids": IDS}))
    place = folder / f"saved{dist.get_rank()}"
    tuned.save(place)
    assert all(torch.equal(a, b) for a, b in zip(veneer.load(llama(), place).parameters(), plain.parameters(), strict=True))
    if spec.startswith("dora"):
        with pytest.raises(Unsupported, match="sharded over processes"):
            tuned.merge()


def torchao() -> None:
    """torchao's NF4 under FSDP2: outputs of two processes are those of one."""
    from torch.distributed.fsdp import fully_shard

    try:
        from torchao.quantization import to_nf4
    except ImportError:
        return

    def packed() -> nn.Module:
        model: Any = llama(width=64)
        for name, layer in model.named_modules():
            if type(layer) is nn.Linear and "layers" in name:
                layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 8), requires_grad=False)
        veneer.attach(model, "dora(r=2)", seed=3)
        return model

    one, two = packed(), packed()
    for name in filling.units(two):
        fully_shard(two.get_submodule(name))
    fully_shard(two)
    with torch.no_grad():
        torch.testing.assert_close(output(two, {"input_ids": IDS}), output(one, {"input_ids": IDS}), rtol=1e-5, atol=1e-5)


gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")


@gloo
def test_two_processes_fill_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    written(llama(), tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]


# -- the arithmetic -------------------------------------------------------------------------------------------


@gloo
def test_two_processes_hold_and_send_what_the_formulas_say() -> None:
    pytest.importorskip("bitsandbytes")
    found = scale_run.measured()
    for (spec, four_bit), one in zip(scale_run.CASES, found, strict=True):
        assert one["bytes"] == scale_run.predicted(spec, four_bit), spec
        assert one["law"]["gap of gradients"] < 1e-5 and not one["law"]["other first values"]
    page = builder()
    written = page.PAGE.read_text("utf-8")
    for section in (page.HEAD, *("\n".join(part) for part in (page.parameters(), page.checked(found)))):
        assert section in written, "docs/scale.md is out of date: run python docs/scale.py"


@gloo
@pytest.mark.slow
def test_the_scale_page_is_current() -> None:
    page = builder()
    assert page.page(scale_run.measured()) == page.PAGE.read_text("utf-8"), "docs/scale.md is out of date: run python docs/scale.py"


def builder() -> Any:
    path = Path(__file__).parents[1] / "docs" / "scale.py"
    spec = importlib.util.spec_from_file_location("docs_scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape, published", [(scale.LLAMA_70B, 70_553_706_496), (scale.LLAMA_405B, 405_853_388_800)])
def test_closed_formulas_count_the_models(shape: scale.Llama, published: int) -> None:
    model = shape.empty()
    assert shape.total == sum(p.numel() for p in model.parameters()) == published
    account = scale.Account(model)
    assert account.base(1) == 2 * shape.total and account.scales == 0
    assert sum(account.whole(1).values()) == account.base(1)


def test_one_step_is_added_up(seed: int) -> None:
    """On a shape small enough to do by hand: 4 bits, three processes."""
    shape = scale.Llama("small", 2, 64, 4, 2, 16, 96, 100)
    model = shape.empty(four_bit=True)
    veneer.attach(model, "lora(r=2, targets='attn.q')", seed=seed)
    account = scale.Account(model)
    q, kv, mlp = 64 * 64, 64 * 32, 64 * 96
    words = [n // 4 for n in (q, kv, kv, q, mlp, mlp, mlp)]  # two codes a byte, two bytes a word
    block = sum(2 * -(-n // 3) for n in words) + 2 * 2 * 22  # norms of 64: 22 rows at most, two bytes each
    assert account.base(3) == 2 * block + 2 * (2 * 34 * 64) + 2 * 22
    assert account.scales == 2 * sum(n // 64 + 4 * -(-n // 64 // 256) + 4 for n in (q, kv, kv, q, mlp, mlp, mlp))
    piece = 4 * (1 * 64 + 22 * 2)  # A [2, 64], B [64, 2] in float32
    assert account.adapter(3) == account.gradients(3) == 2 * piece
    assert account.optimiser(3) == 2 * (2 * piece + 2 * 4)
    assert account.reduced(3) == 3 * account.gradients(3)
    assert account.gathered(3) == 2 * 3 * (account.base(3) + account.adapter(3)) - 3 * 2 * 22
    step = scale.Step(shape, account, 3, True, length=8)
    assert step.total == sum(step.memory().values()) + scale.RESERVE and step.fits
    longest = step.longest(1)
    assert scale.Step(shape, account, 3, True, length=longest).fits and not scale.Step(shape, account, 3, True, length=longest + 2).fits


def bf16(layers: int, **changes: int) -> tuple[scale.Llama, Any]:
    shape = scale.Llama("small", **{**dict(layers=layers, width=64, heads=8, kv_heads=2, head_dim=8, mlp=224, vocabulary=64), **changes})
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shape.config()).to(torch.bfloat16).train()
    veneer.attach(model, EVERYWHERE)
    return shape, model


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    tokens, kept = 256, {}
    for layers in (2, 4):
        shape, model = bf16(layers)
        model.gradient_checkpointing_enable()
        with Ledger() as ledger:
            logits = model(input_ids=torch.zeros(1, tokens, dtype=torch.long)).logits
            kept[layers] = ledger.now()
        assert logits.requires_grad
    step = scale.Step(shape, scale.Account(shape.empty()), 1, False, 1, tokens)
    assert kept[4] - kept[2] == step.memory()["inputs"] / 2


def test_one_block_keeps_what_the_formula_says() -> None:
    tokens = 256
    shape, model = bf16(1)
    x = torch.randn(1, tokens, shape.width, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(tokens)[None]
    angles = model.model.rotary_emb(x, places)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *angles)}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model.model.layers[0](x, position_embeddings=angles, position_ids=places)
    thin = 2 * sum(p.numel() for p in veneer.of(model).parameters()) + 2 * 7 * 2 * tokens  # factors in bf16, and what they make of x
    assert y.requires_grad
    assert tokens * scale.block_bytes(shape) <= sum(saved.values()) <= tokens * scale.block_bytes(shape) + thin


def test_a_logit_takes_what_the_formula_says() -> None:
    tokens, words = 256, 4096
    _, model = bf16(1, width=16, heads=2, mlp=16, vocabulary=words)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with Ledger() as ledger:
        model(input_ids=ids, labels=ids).loss.backward()
    assert scale.LOGIT <= ledger.peak / (tokens * words) <= 1.05 * scale.LOGIT
