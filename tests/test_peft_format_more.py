"""Hugging Face PEFT's files of fifteen more methods: the same outputs, bit-equal tensors and the same options, both ways."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_models import TASKS, answers, by_peft, changed, close, in_peft, ours_on, peft, same_files
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported
from veneer.tools.peft import load_peft, save_peft
from veneer.tools.peft.rotations import nearest_divisor


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


def same_options(one, other):
    a, b = (json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in (one, other))
    if isinstance(a.get("target_modules"), list):
        a["target_modules"], b["target_modules"] = sorted(a["target_modules"]), sorted(b["target_modules"])
    assert a == b


# -- from PEFT to us and back ----------------------------------------------------------------------------------


LLAMA, BERT, GPT2, MIXED = ["q_proj", "v_proj"], ["query", "value"], ["c_attn", "c_fc"], ["q_proj", "up_proj", "down_proj"]
PICTURE, CONVS = ["conv", "point", "last"], ["point", "last"]
CASES = {
    "vera": ("bert", "Vera", dict(r=4, target_modules=BERT)),
    "vera of many shapes": ("llama", "Vera", dict(r=4, target_modules=MIXED, projection_prng_key=3)),
    "vera without its matrices": ("llama", "Vera", dict(r=4, target_modules=MIXED, save_projection=False)),
    "vera gpt2": ("gpt2", "Vera", dict(r=4, target_modules=GPT2, fan_in_fan_out=True)),
    "vera biases": ("bert", "Vera", dict(r=4, target_modules=BERT, bias="all")),
    "randlora": ("bert", "RandLora", dict(r=4, randlora_alpha=8, target_modules=BERT)),
    "randlora of many shapes": ("llama", "RandLora", dict(r=3, randlora_alpha=8, target_modules=MIXED)),
    "randlora without its matrices": (
        "llama",
        "RandLora",
        dict(r=3, randlora_alpha=8, target_modules=MIXED, save_projection=False, projection_prng_key=5),
    ),
    "randlora gpt2": ("gpt2", "RandLora", dict(r=4, randlora_alpha=8, target_modules=GPT2, fan_in_fan_out=True)),
    "randlora sparse": ("llama", "RandLora", dict(r=4, randlora_alpha=8, target_modules=MIXED, sparse=True)),
    "randlora sparse without its matrices": (
        "llama",
        "RandLora",
        dict(r=4, randlora_alpha=8, target_modules=MIXED, sparse=True, save_projection=False),
    ),
    "randlora very sparse": ("llama", "RandLora", dict(r=4, randlora_alpha=8, target_modules=MIXED, very_sparse=True)),
    "randlora very sparse drawn": (
        "llama",
        "RandLora",
        dict(r=4, randlora_alpha=8, target_modules=MIXED, very_sparse=True, save_projection=False),
    ),
    "delora": ("bert", "Delora", dict(r=4, target_modules=BERT)),
    "delora patterns": ("llama", "Delora", dict(r=4, target_modules=LLAMA, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 3})),
    "gralora": ("llama", "Gralora", dict(r=4, alpha=6, target_modules=MIXED)),
    "gralora gpt2 hybrid": ("gpt2", "Gralora", dict(r=4, hybrid_r=2, gralora_k=4, target_modules=GPT2, fan_in_fan_out=True)),
    "loha": ("bert", "LoHa", dict(r=3, alpha=5, target_modules=BERT)),
    "loha patterns": ("llama", "LoHa", dict(r=3, target_modules=LLAMA, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.*": 3})),
    "loha conv": ("picture", "LoHa", dict(r=3, target_modules=PICTURE)),
    "loha conv 1d": ("net", "LoHa", dict(r=3, target_modules=["conv", "last"])),
    "lokr": ("bert", "LoKr", dict(r=3, alpha=5, target_modules=BERT)),
    "lokr thin": ("llama", "LoKr", dict(r=1, target_modules=MIXED, decompose_both=True)),
    "lokr factor": ("llama", "LoKr", dict(r=2, target_modules=MIXED, decompose_factor=2)),
    "lokr patterns": ("llama", "LoKr", dict(r=2, target_modules=LLAMA, rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 3})),
    "lokr conv": ("picture", "LoKr", dict(r=4, target_modules=PICTURE)),
    "lokr conv thin": ("picture", "LoKr", dict(r=1, decompose_factor=2, target_modules=PICTURE)),
    "fourierft": ("bert", "FourierFT", dict(n_frequency=30, scaling=40, target_modules=BERT)),
    "fourierft patterns": ("llama", "FourierFT", dict(n_frequency=30, n_frequency_pattern={"q_proj": 9}, target_modules=MIXED, scaling=20)),
    "fourierft gpt2": ("gpt2", "FourierFT", dict(n_frequency=30, scaling=20, random_loc_seed=4, target_modules=GPT2, fan_in_fan_out=True)),
    "waveft": ("bert", "WaveFT", dict(n_frequency=30, scaling=3, target_modules=BERT)),
    "waveft db3": (
        "llama",
        "WaveFT",
        dict(n_frequency=30, scaling=3, wavelet_family="db3", n_frequency_pattern={"q_proj": 9}, target_modules=MIXED),
    ),
    "waveft in proportion": ("llama", "WaveFT", dict(n_frequency=30, scaling=3, proportional_parameters=True, target_modules=MIXED)),
    "waveft gpt2": ("gpt2", "WaveFT", dict(n_frequency=30, scaling=3, use_idwt=False, target_modules=GPT2, fan_in_fan_out=True)),
    "c3a": ("bert", "C3A", dict(block_size=8, target_modules=BERT)),
    "c3a patterns": ("llama", "C3A", dict(block_size=8, block_size_pattern={"q_proj": 4}, target_modules=MIXED)),
    "oft": ("bert", "OFT", dict(oft_block_size=4, target_modules=BERT)),
    "oft exact by number": ("llama", "OFT", dict(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=MIXED)),
    "oft of a size that PEFT moves": ("llama", "OFT", dict(oft_block_size=5, num_cayley_neumann_terms=3, target_modules=MIXED)),
    "oft shared and bounded": ("llama", "OFT", dict(oft_block_size=4, block_share=True, coft=True, eps=0.1, target_modules=LLAMA)),
    "oft conv and table": ("picture", "OFT", dict(oft_block_size=4, target_modules=["point", "last", "table"])),
    "oft token table": ("llama", "OFT", dict(oft_block_size=4, target_modules=["embed_tokens", "q_proj"])),
    "oft head": ("roberta", "OFT", dict(oft_block_size=4, target_modules=BERT)),
    "boft": ("bert", "BOFT", dict(boft_block_size=4, target_modules=BERT)),
    "boft biases": ("bert", "BOFT", dict(boft_block_size=4, target_modules=BERT, bias="boft_only")),
    "boft by number": ("llama", "BOFT", dict(boft_block_size=0, boft_block_num=4, target_modules=MIXED)),
    "boft conv": ("picture", "BOFT", dict(boft_block_size=4, target_modules=PICTURE)),
    "hra": ("bert", "HRA", dict(r=4, target_modules=BERT)),
    "hra odd": ("llama", "HRA", dict(r=3, target_modules=MIXED)),
    "hra at right angles": ("llama", "HRA", dict(r=3, apply_GS=True, init_weights=False, target_modules=MIXED)),
    "hra conv": ("picture", "HRA", dict(r=4, target_modules=PICTURE)),
    "road 1": ("bert", "Road", dict(group_size=8, target_modules=BERT)),
    "road 2": ("bert", "Road", dict(variant="road_2", group_size=4, target_modules=BERT)),
    "road 4": ("llama", "Road", dict(variant="road_4", group_size=8, target_modules=MIXED)),
    "shira": ("bert", "Shira", dict(r=2, target_modules=BERT)),
    "shira with a seed": ("llama", "Shira", dict(r=2, random_seed=3, target_modules=MIXED)),
    "miss": ("bert", "Miss", dict(r=4, target_modules=BERT)),
    "miss uneven": ("llama", "Miss", dict(r=5, target_modules=MIXED)),
    "miss bat": ("llama", "Miss", dict(r=4, init_weights="bat", target_modules=MIXED)),
    "miss mini": ("llama", "Miss", dict(r=4, init_weights="mini", mini_r=8, target_modules=MIXED)),
    "a regular expression": ("llama", "Miss", dict(r=4, target_modules=r".*layers\.1\.(self_attn\.q_proj|mlp\.up_proj)")),
    "a saved module": ("llama", "LoHa", dict(r=2, target_modules=LLAMA, modules_to_save=["lm_head"])),
}


def config_of(case):
    family, kind, options = CASES[case]
    return family, getattr(peft, f"{kind}Config")(task_type=TASKS[family], **options)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_answers_the_same_here_and_goes_back_bit_for_bit(case, tmp_path):
    family, config = config_of(case)
    base, tuned, batch = by_peft(family, config, tmp_path / "theirs")
    theirs, plain = answers(tuned, batch), answers(base, batch)
    ours = load_peft(base, tmp_path / "theirs")
    close(answers(base, batch), theirs)
    assert float((theirs - plain).abs().max()) > 1e-3  # the adapter does something
    save_peft(ours, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")
    same_options(tmp_path / "theirs", tmp_path / "back")
    clean = ours.detach()
    assert torch.equal(answers(clean, batch), plain)
    again = peft.PeftModel.from_pretrained(clean, tmp_path / "back").eval()
    close(answers(again, batch), theirs)


THROUGH_OURS = (
    "vera of many shapes", "vera without its matrices", "randlora of many shapes", "randlora without its matrices", "randlora gpt2",
    "delora patterns", "gralora gpt2 hybrid", "loha patterns", "lokr conv", "fourierft patterns", "waveft in proportion", "c3a patterns",
    "oft of a size that PEFT moves", "oft conv and table", "oft head", "boft by number", "boft conv", "boft biases", "hra odd", "road 4",
    "shira", "shira with a seed", "miss bat", "miss mini", "a saved module",
)  # fmt: skip


@pytest.mark.parametrize("case", THROUGH_OURS)
def test_what_came_from_peft_is_saved_and_loaded_as_ours(case, tmp_path):
    family, config = config_of(case)
    base, _, batch = by_peft(family, config, tmp_path / "theirs")
    plain = copy.deepcopy(base)
    load_peft(base, tmp_path / "theirs").save(tmp_path / "ours")
    tuned = veneer.load(plain, tmp_path / "ours")
    assert torch.equal(answers(plain, batch), answers(base, batch))
    tuned.save(tmp_path / "twice")
    assert load_file(tmp_path / "twice" / "adapter.safetensors").keys() == load_file(tmp_path / "ours" / "adapter.safetensors").keys()
    save_peft(tuned, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")
    same_options(tmp_path / "theirs", tmp_path / "back")


def test_only_matrices_that_no_seed_gives_here_are_kept_in_our_files(tmp_path):
    for case, kept in (("vera", False), ("randlora", True), ("shira with a seed", False), ("shira", True), ("fourierft", False)):
        family, config = config_of(case)
        base, *_ = by_peft(family, config, tmp_path / case)
        load_peft(base, tmp_path / case).save(tmp_path / "ours" / case)
        names = {key.rpartition("/")[2] for key in load_file(tmp_path / "ours" / case / "adapter.safetensors")}
        assert bool(names & {"A", "B", "indices"}) == kept, case


def test_one_factor_where_peft_had_no_kernel_for_two(tmp_path):
    base, tuned, batch = by_peft("llama", peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=LLAMA), tmp_path)
    ours = load_peft(base, tmp_path)
    close(answers(base, batch), answers(tuned, batch))
    save_peft(ours, tmp_path / "back")
    same_files(tmp_path, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


@pytest.fixture
def kernel(monkeypatch):
    """PEFT's block-diagonal kernel for butterflies, which it has for CUDA alone."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(factors):
            return torch.stack([torch.block_diag(*factor) for factor in factors])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


@pytest.mark.parametrize("options", [dict(boft_block_size=4), dict(boft_block_size=0, boft_block_num=4)])
@pytest.mark.parametrize("family, targets", [("llama", ["q_proj", "up_proj"]), ("picture", ["point", "last"])])
def test_butterflies(family, targets, options, kernel, tmp_path):
    options = {"boft_block_size": 2, **options} if family == "picture" and options["boft_block_size"] else options
    config = peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=targets, **options)
    base, tuned, batch = by_peft(family, config, tmp_path / "theirs")
    ours = load_peft(base, tmp_path / "theirs")
    assert {method.m for _, method, _ in ours.entries()} == {2}
    close(answers(base, batch), answers(tuned, batch))
    save_peft(ours, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")
    same_options(tmp_path / "theirs", tmp_path / "back")


def test_sizes_that_peft_moves_to_a_divisor():
    from peft.tuners.oft.layer import OFTLayer

    for size in range(1, 60):
        for wanted in range(1, 70):
            assert nearest_divisor(size, wanted) == OFTLayer.adjust_oft_parameters(None, size, wanted), (size, wanted)


# -- from ours to PEFT -----------------------------------------------------------------------------------------


OURS = {
    "vera": ("llama", "vera(r=5, seed=3, targets='attn.* mlp.*')"),
    "vera and head": ("roberta", "vera(r=5)"),
    "vera and biases": ("bert", "vera(r=5) + bitfit(targets='attn.q attn.v')"),
    "vera and all biases": ("bert", "vera(r=5) + bitfit"),
    "randlora": ("llama", "randlora(r=3, alpha=8, form='peft', targets='attn.q attn.v mlp.up mlp.down')"),
    "randlora sparse": ("gpt2", "randlora(r=3, alpha=8, form='peft', bases='sparse', targets='attn.o mlp.up mlp.down')"),
    "randlora of the paper": ("bert", "randlora(r=5, alpha=8)"),
    "randlora of the paper, one basis": ("llama", "randlora(r=24, alpha=8, targets='attn.q mlp.up mlp.down')"),
    "delora": ("llama", "delora(r=3)"),
    "gralora": ("gpt2", "gralora(r=4, hybrid_r=2, dropout=0.1, targets='attn.o mlp.up')"),
    "loha": ("t5", "loha(r=3)"),
    "loha on ranges": ("phi3", "loha(r=2, alpha=3)"),
    "loha conv": ("picture", "loha(r=2, targets='conv point')"),
    "lokr": ("llama", "lokr(r=1, decompose_both=True, targets='attn.q mlp.up')"),
    "lokr conv": ("picture", "lokr(r=4, alpha=2, targets='conv point last')"),
    "fourierft": ("llama", "fourierft(n=20, seed=5, alpha=40.5)"),
    "waveft": ("gpt2", "waveft(n=20, wavelet='db2', targets='attn.o mlp.up')"),
    "waveft by density": ("llama", "waveft(density=0.1, targets='attn.q mlp.up')"),
    "c3a": ("bert", "c3a(b=4)"),
    "c3a on ranges": ("phi3", "c3a(b=4, targets='attn.q attn.v mlp.up')"),
    "oft": ("llama", "oft(k=4, block_dropout=0.3)"),
    "oft by number": ("llama", "oft(r=4, targets='attn.q mlp.down', use_cayley_neumann=False)"),
    "oft table": ("llama", "oft(k=4, targets='embed.token attn.q')"),
    "boft": ("llama", "boft(k=4, targets='attn.q mlp.up mlp.down')"),
    "boft conv": ("picture", "boft(k=4, targets='conv point last')"),
    "hra": ("llama", "hra(r=4)"),
    "hra conv": ("picture", "hra(r=2, targets='conv point last')"),
    "road": ("bert", "road(variant='road_2', group_size=4)"),
    "road on ranges": ("phi3", "road(variant='road_4', group_size=8, targets='attn.k mlp.gate')"),
    "shira": ("llama", "shira(r=2, seed=7)"),
    "shira band": ("llama", "shira(r=1, mask='band', targets='attn.q mlp.up')"),
    "shira magnitude": ("bert", "shira(r=2, mask='magnitude')"),
    "miss": ("llama", "miss(r=5, dropout=0.2)"),
    "miss on ranges": ("phi3", "miss(r=5, targets='attn.q attn.v mlp.up')"),
    "miss bat": ("llama", "miss(r=4, structure='bat', targets='attn.q mlp.up')"),
    "miss bat on ranges": ("phi3", "miss(r=4, structure='bat', targets='attn.v mlp.up')"),
    "miss mini": ("llama", "miss(r=4, mini_r=4, targets='attn.q mlp.up')"),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_save_answers_the_same_in_peft_and_here_again(case, tmp_path):
    family, method = OURS[case]
    plain, tuned, batch = ours_on(family, method)
    save_peft(tuned, tmp_path / "one")
    ours = answers(tuned.model, batch)
    assert float((ours - answers(plain, batch)).abs().max()) > 1e-3
    close(in_peft(plain, tmp_path / "one", family, batch), ours)
    again = copy.deepcopy(plain)
    loaded = load_peft(again, tmp_path / "one")
    close(answers(again, batch), ours)
    save_peft(loaded, tmp_path / "two")
    same_files(tmp_path / "one", tmp_path / "two")
    same_options(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "method, overrides",
    [
        ("loha(r=3, alpha=4)", {"layers.1": {"r": 2}, "layers.0.self_attn.v_proj": {"alpha": 9.0}}),
        ("lokr(r=2)", {"layers.1": {"r": 1}, "layers.0.self_attn.v_proj": {"alpha": 9.0}}),
        ("delora(r=3)", {"layers.1": {"r": 2}}),
        ("c3a(b=4)", {"layers.1": {"b": 8}}),
        ("fourierft(n=9)", {"layers.1": {"n": 5}}),
        ("waveft(n=9)", {"layers.1": {"n": 5}}),
    ],
)
def test_sizes_that_differ_by_site(method, overrides, tmp_path):
    plain, tuned, batch = ours_on("llama", method, overrides=overrides)
    save_peft(tuned, tmp_path)
    close(in_peft(plain, tmp_path, "llama", batch), answers(tuned.model, batch))


# -- as LoRA ---------------------------------------------------------------------------------------------------


LOW_RANK = {
    "vera": ("llama", "vera(r=5, targets='attn.* mlp.*')", None),
    "vera on ranges": ("gpt2", "vera(r=3)", None),
    "delora": ("llama", "delora(r=3)", None),
    "delora on ranges": ("gpt2", "delora(r=3)", None),
    "gralora": ("gpt2", "gralora(r=4, hybrid_r=2)", None),
    "fourierft": ("llama", "fourierft(n=4)", None),
    "loha": ("llama", "loha(r=2)", None),
    "lokr": ("llama", "lokr(r=1)", None),
    "miss": ("llama", "miss(r=5)", None),
    "miss mini": ("llama", "miss(r=4, mini_r=4)", None),
    "a stack": ("llama", "vera(r=3) + lora(r=2) + delora(r=2, targets='attn.q mlp.up')", None),
    "randlora": ("llama", "randlora(r=3, alpha=8)", 16),
    "waveft": ("gpt2", "waveft(n=20)", 16),
    "c3a": ("llama", "c3a(b=4)", 16),
    "oft": ("gpt2", "oft(k=4)", 16),
    "boft": ("llama", "boft(k=4, m=2, targets='attn.q mlp.up')", 16),
    "hra": ("bert", "hra(r=2)", 16),
    "road with biases": ("bert", "road(group_size=4)", 16),
    "shira": ("llama", "shira(r=2)", 16),
    "miss bat": ("llama", "miss(r=4, structure='bat', share='col')", 16),
}


@pytest.mark.parametrize("case", LOW_RANK)
def test_any_change_of_a_weight_as_plain_lora(case, tmp_path):
    family, method, rank = LOW_RANK[case]
    plain, tuned, batch = ours_on(family, method)
    said: list[str] = []
    save_peft(tuned, tmp_path, as_lora=True, rank=rank, tell=said.append)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    ours, theirs = answers(tuned.model, batch), in_peft(plain, tmp_path, family, batch)
    assert float((ours - answers(plain, batch)).abs().max()) > 1e-3
    assert float((ours - theirs).abs().max()) < (1e-5 if rank is None else 1e-4)
    assert bool(said) == (rank is not None)


# -- refusals --------------------------------------------------------------------------------------------------


REFUSED = {
    "a table": ("llama", "delora(r=2, targets='embed.token')", "of the kind embedding"),
    "a transposed layer": ("gpt2", "hra(r=2, targets='mlp.up')", "stored as"),
    "a convolution": ("picture", "delora(r=2, targets='conv')", "of the kind conv"),
    "overlapping patches": ("picture", "oft(k=4, targets='conv')", "more than one pixel"),
    "1-d kron": ("net", "lokr(r=2, targets='conv')", "1-d convolution"),
    "1-d mirrors": ("net", "hra(r=2, targets='conv')", "no square 2-d convolution"),
    "vera on ranges": ("phi3", "vera(r=2)", "cannot do what this one does to q, v"),
    "hra on ranges": ("phi3", "hra(r=2)", "one adapter for all of"),
    "mini on ranges": ("phi3", "miss(r=2, mini_r=4, targets='attn.q attn.v')", "one adapter for all of"),
    "blocks by column": ("llama", "miss(r=4, structure='bat', share='col', targets='attn.q')", "share='row'"),
    "the paper's pairing": ("llama", "randlora(r=4)", "form='peft'"),
    "biases": ("bert", "loha(r=2) + bitfit", "cannot train biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(case, tmp_path):
    family, method, words = REFUSED[case]
    _, tuned, _ = ours_on(family, method, head=False)
    with pytest.raises(Unsupported, match=words):
        save_peft(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, overrides", [("road(group_size=4)", {"layers.1": {"group_size": 8}}), ("hra(r=2)", {"layers.1": {"r": 4}})]
)
def test_options_that_differ_by_site_without_a_pattern_are_refused(method, overrides, tmp_path):
    _, tuned, _ = ours_on("llama", method, overrides=overrides)
    with pytest.raises(Unsupported, match="differs by site"):
        save_peft(tuned, tmp_path)


UNREAD = {
    "loha's kernel": ("picture", "LoHa", dict(r=2, target_modules=PICTURE, use_effective_conv2d=True), "use_effective_conv2d"),
    "lokr's kernel": ("picture", "LoKr", dict(r=1, target_modules=PICTURE, use_effective_conv2d=True), "use_effective_conv2d"),
    "lokr in 1-d": ("net", "LoKr", dict(r=4, target_modules=["conv"]), "1-d convolution"),
    "oft over patches": ("picture", "OFT", dict(oft_block_size=4, target_modules=PICTURE), "more than one pixel"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_computed_here_is_not_read(case, tmp_path):
    family, kind, options, words = UNREAD[case]
    base, *_ = by_peft(family, getattr(peft, f"{kind}Config")(**options), tmp_path)
    with pytest.raises(Unsupported, match=words):
        load_peft(base, tmp_path)


def test_wavelets_and_series_that_are_not_computed_are_named(tmp_path):
    base, *_ = by_peft("llama", peft.WaveFTConfig(n_frequency=20, wavelet_family="sym4", target_modules=LLAMA), tmp_path)
    with pytest.raises(BadValue, match="sym4"):
        load_peft(base, tmp_path)
    base, *_ = by_peft("llama", peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=1, target_modules=LLAMA), tmp_path / "oft")
    with pytest.raises(BadValue, match="num_cayley_neumann_terms"):
        load_peft(base, tmp_path / "oft")


def test_the_series_of_older_versions_is_not_read(tmp_path):
    base, *_ = by_peft("llama", peft.OFTConfig(oft_block_size=4, target_modules=LLAMA), tmp_path)
    for version in ("0.17.1", None):
        changed(tmp_path, peft_version=version)
        with pytest.raises(Unsupported, match="another series"):
            load_peft(base, tmp_path)
    changed(tmp_path, use_cayley_neumann=False)
    load_peft(base, tmp_path)


@pytest.mark.parametrize("damage", [lambda at: at + 30, lambda at: at.flip(1), lambda at: -at])
def test_positions_that_are_none_are_not_read(damage, tmp_path):
    base, *_ = by_peft("llama", peft.ShiraConfig(r=1, target_modules=LLAMA), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: damage(t).contiguous() if k.endswith("shira_indices") else t for k, t in tensors.items()}, weights)
    with pytest.raises(BadFile, match="not positions in its weight"):
        load_peft(base, tmp_path)


def test_matrices_that_are_drawn_again_are_told(tmp_path):
    base, *_ = by_peft("llama", peft.VeraConfig(r=2, save_projection=False, target_modules=LLAMA), tmp_path)
    with pytest.warns(UserWarning, match="drawn again"):
        load_peft(base, tmp_path)


def test_dropouts_of_peft_alone_are_told(tmp_path):
    base, *_ = by_peft("llama", peft.DeloraConfig(r=2, module_dropout=0.1, target_modules=LLAMA), tmp_path)
    with pytest.warns(UserWarning, match=r"module_dropout=0\.1 acts in training only"):
        load_peft(base, tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    base, *_ = by_peft("llama", peft.VeraConfig(r=2, target_modules=LLAMA), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if k.endswith("lambda_b"))
    save_file({**tensors, key: torch.zeros(5)}, weights)
    with pytest.raises(Mismatch, match="this model needs"):
        load_peft(base, tmp_path)
    save_file({k: t for k, t in tensors.items() if k != key}, weights)
    with pytest.raises(BadFile, match="not whole"):
        load_peft(base, tmp_path)
    save_file({k: t for k, t in tensors.items() if not k.endswith("vera_A")}, weights)
    with pytest.raises(BadFile, match=r"vera_A; the file is not whole"):
        load_peft(base, tmp_path)
    save_file({**tensors, "base_model.vera_B": torch.zeros(3, 2)}, weights)
    with pytest.raises(Mismatch, match="vera_B"):
        load_peft(base, tmp_path)
    save_file({**tensors, "base_model.vera_C": torch.zeros(3, 2)}, weights)
    with pytest.raises(Unsupported, match="vera_C"):
        load_peft(base, tmp_path)
    save_file({**tensors, "base_model.vera_A": torch.randn(2, 99), "base_model.vera_B": torch.randn(99, 2)}, weights)
    load_peft(base, tmp_path)  # of a second adapter beside a larger one
