"NF4 filled in another way: quantization='nf4-search', from loading to a merged model."
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, GPT2Config

from qlora_nb.apps.quantize import quantize_model
from qlora_nb.base.adapter_files import INPUTS, read_json
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.ranks import on_ranks, rank
from qlora_nb.beyond.scale_search import search_quantize
from qlora_nb.foundations.adapters import attach_adapter
from qlora_nb.foundations.loading import QUANTIZATIONS, load_model
from qlora_nb.foundations.qlora import load_scratch
from qlora_nb.training.finetune import finetune
from qlora_nb.training.saved_adapters import load_adapter
from qlora_nb.using.merge import merge_and_save

ROWS = [dict(prompt=f"What is {i}?", response=f"It is {i}.") for i in range(6)]
HOW = dict(device="cpu", progress=False, max_steps=2, per_device_train_batch_size=2, r=2, fast=False, max_length=64)


def logits(model):
    with torch.no_grad(): return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("base"), load_tokenizer()
    tiny_model("llama", hidden_size=64, vocab_size=len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")/"run"
    run = finetune(base, ROWS, folder, quantization="nf4-search", **HOW)
    return folder, logits(run.model)


def four(model): return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def test_codes_and_scales_are_those_of_the_search_and_bitsandbytes_reads_them(base):
    wide = load_model(base, bits=None, device="cpu", dtype=torch.float32)
    model = load_model(base, device="cpu", dtype=torch.float32, quantization="nf4-search")
    assert len(four(model)) == 14
    for n, m in four(model).items():
        Q = search_quantize(wide.get_submodule(n).weight.detach(), weights=model.qlora_nb_inputs[n], signed=True)
        assert torch.equal(dequantize_4bit(m.weight.data, m.weight.quant_state), Q.dequantize()), n


def test_the_usual_way_is_what_it_was(base):
    model = load_model(base, device="cpu")
    assert model.qlora_nb_quantization == "nf4" and not hasattr(model, "qlora_nb_inputs")


def test_a_run_keeps_how_its_base_was_quantized_and_loads_to_the_same_bits(run):
    folder, want = run
    notes = read_json(folder/"adapter"/"qlora_nb.json")
    assert notes["quantization"] == "nf4-search" and (folder/"adapter"/INPUTS).exists()
    assert read_json(folder/"settings.json")["quantization"] == "nf4-search"
    assert torch.equal(logits(load_adapter(folder, device="cpu").model), want)


def test_a_base_in_other_bits_is_refused(run, base):
    for load in (load_model, load_scratch):
        with pytest.raises(QLoRAError, match="quantized by 'nf4-search', and the model is quantized by 'nf4'"):
            attach_adapter(load(base, device="cpu"), run[0]/"adapter")
    squares = {n: torch.rand(m.in_features) for n, m in four(load_model(base, device="cpu")).items()}
    other = load_model(base, device="cpu", quantization="nf4-search", inputs=squares)
    with pytest.raises(QLoRAError, match="has given this base other scales"): attach_adapter(other, run[0]/"adapter")
    with pytest.raises(QLoRAError, match="which the backend 'scratch' has not"): load_adapter(run[0], device="cpu", backend="scratch")


def test_without_its_inputs_an_adapter_is_refused(run, tmp_path):
    shutil.copytree(run[0]/"adapter", tmp_path/"a")
    (tmp_path/"a"/INPUTS).unlink()
    with pytest.raises(QLoRAError, match=f"{INPUTS} is missing"): load_adapter(tmp_path/"a", device="cpu")


def test_it_is_resumed_as_it_was_and_not_otherwise(base, tmp_path):
    how = HOW | dict(save_steps=1)
    whole = finetune(base, ROWS, tmp_path/"whole", quantization="nf4-search", **how)
    finetune(base, ROWS, tmp_path/"part", quantization="nf4-search", **how)
    shutil.rmtree(tmp_path/"part"/"adapter"), shutil.rmtree(tmp_path/"part"/"checkpoints"/"checkpoint-2")
    with pytest.raises(QLoRAError, match="quantization was nf4-search, now nf4"): finetune(base, ROWS, tmp_path/"part", resume=True, **how)
    again = finetune(base, ROWS, tmp_path/"part", quantization="nf4-search", resume=True, **how)
    assert again.info["resumed_from"] == "checkpoint-1" and torch.equal(logits(again.model), logits(whole.model))


def test_a_second_stage_takes_over_the_way_of_the_first(run, base, tmp_path):
    with pytest.raises(QLoRAError, match="quantization nf4 instead of nf4-search"):
        finetune(base, ROWS, tmp_path/"no", adapter=str(run[0]), quantization="nf4", **HOW | dict(r=None))
    more = finetune(None, ROWS, tmp_path/"more", adapter=str(run[0]), **HOW | dict(r=None))
    assert torch.equal(logits(load_adapter(tmp_path/"more", device="cpu").model), logits(more.model))


def test_a_loaded_model_brings_its_way_along(base, tmp_path):
    with pytest.raises(QLoRAError, match="quantized by 'nf4', not by 'nf4-search'"):
        finetune(load_model(base, device="cpu"), ROWS, tmp_path/"no", quantization="nf4-search", **HOW)
    model = load_model(base, device="cpu", quantization="nf4-search")
    run = finetune(model, ROWS, tmp_path/"yes", **HOW)
    assert run.info["settings"]["quantization"] == "nf4-search" and (tmp_path/"yes"/"adapter"/INPUTS).exists()


def test_merged_it_is_the_model_that_was_trained(run, tmp_path):
    merge_and_save(run[0], tmp_path/"merged")   # compares the logits before and after itself
    merged = load_model(str(tmp_path/"merged"), bits=None, device="cpu", dtype=torch.float32)
    assert (logits(merged) - run[1].float()).norm() < .02*run[1].float().norm()


@pytest.mark.parametrize("how, words", [(dict(bits=None), "bits=None asks for none"), (dict(quantization="nf4-x"), "Choose nf4 or nf4-search")])
def test_what_cannot_be_had_is_said(base, how, words):
    with pytest.raises(QLoRAError, match=words): load_model(base, device="cpu", **dict(quantization="nf4-search") | how)


def test_names_of_the_table_are_those_of_the_help():
    from qlora_nb.training.settings import Settings
    said = Settings.__dataclass_fields__["quantization"].metadata["help"]
    assert all(o in said for o in QUANTIZATIONS)


def test_processes_take_the_inputs_of_the_first(base, tmp_path):
    def load(folder):
        from qlora_nb.beyond import scale_search
        squares = scale_search.input_squares
        scale_search.input_squares = lambda *a: {n: s*(1 + rank()*torch.rand(len(s))) for n, s in squares(*a).items()}
        return load_model(base, device="cpu", quantization="nf4-search", inputs=folder/INPUTS).qlora_nb_scales
    one, two = on_ranks(2, load, tmp_path)
    assert one == two and (tmp_path/INPUTS).exists()


def test_layers_of_gpt2_and_a_device_map(tmp_path):
    config = GPT2Config(vocab_size=49152, n_embd=64, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path), load_tokenizer().save_pretrained(tmp_path)
    wide, model = load_model(tmp_path, bits=None, device="cpu"), load_model(tmp_path, device_map={"": "cpu"}, quantization="nf4-search")
    assert len(four(model)) == 4
    for n, m in four(model).items():
        Q = search_quantize(wide.get_submodule(n).weight.detach().T.contiguous(), weights=model.qlora_nb_inputs[n], signed=True)
        assert torch.equal(dequantize_4bit(m.weight.data, m.weight.quant_state), Q.dequantize()), n


@pytest.fixture(scope="session")
def learned(base, tmp_path_factory):
    text, out = tmp_path_factory.mktemp("text")/"text.txt", tmp_path_factory.mktemp("four")/"four"
    text.write_text(" ".join(f"It is {i}." for i in range(400)), encoding="utf-8")
    quantize_model(base, out, text, device="cpu", max_steps=4, learning_rate=1e-2, max_length=32, progress=False)
    return out


def test_a_checkpoint_with_learned_scales_trains_and_merges(learned, base, tmp_path):
    facts, model = read_json(learned/"quantization.json"), load_model(learned, device="cpu")
    assert facts["learned"] and facts["kl_after"] < facts["kl_before"] and model.qlora_nb_quantization == "nf4"
    assert read_json(learned/"config.json")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    run = finetune(str(learned), ROWS, tmp_path/"run", **HOW)
    want = logits(run.model).float()
    assert torch.equal(logits(load_adapter(tmp_path/"run", device="cpu").model).float(), want)
    merge_and_save(tmp_path/"run", tmp_path/"merged")   # compares the logits before and after itself
    merged = load_model(str(tmp_path/"merged"), bits=None, device="cpu", dtype=torch.float32)
    assert (logits(merged) - want).norm() < .02*want.norm()


def test_the_layers_of_gpt2_learn(tmp_path):
    config = GPT2Config(vocab_size=49152, n_embd=64, n_layer=1, n_head=2, resid_pdrop=.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/"wide"), load_tokenizer().save_pretrained(tmp_path/"wide")
    quantize_model(tmp_path/"wide", tmp_path/"four", device="cpu", max_steps=6, learning_rate=1e-2, max_length=16, progress=False)
    assert read_json(tmp_path/"four"/"quantization.json")["learned"]


def test_what_cannot_be_quantized_is_said(base, learned, tmp_path, monkeypatch):
    with pytest.raises(QLoRAError, match="in 4 bits already"): quantize_model(learned, tmp_path/"a")
    with pytest.raises(QLoRAError, match="qlora_quantize MODEL FOLDER"): load_model(base, quantization="nf4-learned")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QLoRAError, match="by one process"): quantize_model(base, tmp_path/"a")
