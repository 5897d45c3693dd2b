"Mixtures of experts through `finetune` as a whole: evaluated, stopped, interrupted and resumed, checkpointed."
import copy, warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, TrainerCallback

from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import set_seed
from qlora_nb.training.data import load_rows
from qlora_nb.base.nf4_config import quiet
from qlora_nb.evaluation.evaluation import evaluate
from qlora_nb.foundations.expert_weights import dequantize_stacks
from qlora_nb.foundations.loading import load_model
from qlora_nb.foundations.qlora import load_scratch
from qlora_nb.training.finetune import finetune

from common import small_tokenizer

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4,
             pad_token_id=2, bos_token_id=1, eos_token_id=2)
KINDS = dict(Mixtral=dict(num_attention_heads=4), GraniteMoe=dict(num_attention_heads=4), JetMoe=dict(kv_channels=32))
HOW = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-2, save_steps=2, device="cpu", progress=False)


@pytest.fixture(scope="session")
def tok(): return small_tokenizer(400)


@pytest.fixture(scope="session")
def make(tok, tmp_path_factory):
    "A folder with a small random model of a kind."
    def made(kind, **more):
        folder = tmp_path_factory.mktemp(kind)
        set_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tok), **SIZES | KINDS[kind] | more)
        with quiet(): AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder), tok.save_pretrained(folder)
        return folder
    return made


class CtrlC(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3: raise KeyboardInterrupt


FACTS = "losses", "eval_losses", "best_step", "best_eval_loss", "steps"


def test_a_whole_run(make, tmp_path):
    "A run that is interrupted and resumed has the bits of one that was left alone; so has a checkpointed one."
    base, rows, how = make("GraniteMoe"), load_rows("tickets")[:16], dict(HOW, max_steps=4, eval_steps=1, early_stopping_patience=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # its config lacks a name that TRL asks for, so its own loss is trained on
        run = finetune(base, rows, tmp_path/"whole", **how)
        with pytest.raises(KeyboardInterrupt): finetune(base, rows, tmp_path/"run", callbacks=[CtrlC()], **how)
        again = finetune(base, rows, tmp_path/"run", resume=True, **how)
        assert again.info["resumed_from"] == "checkpoint-2" and [again.info[k] for k in FACTS] == [run.info[k] for k in FACTS]
        assert finetune(base, rows, tmp_path/"twice", **dict(how, gradient_checkpointing=True)).info["losses"] == run.info["losses"]


def test_checkpointing_that_is_not_possible(make, tmp_path):
    "JetMoE's code knows none; that is said before the first step, in one sentence."
    with pytest.raises(QLoRAError, match="checkpointing is not possible"):
        finetune(make("JetMoe"), load_rows("tickets")[:4], tmp_path/"run", **HOW, max_steps=1, gradient_checkpointing=True)


@pytest.mark.parametrize("kind, said", [("Mixtral", "error"), ("GraniteMoe", "ignore")])
def test_the_loss_of_the_routers_counts_once_a_step(make, tmp_path, kind, said):
    "However a step is divided into batches; it is a mean over them, in TRL's loss and in the model's own."
    base, rows = make(kind, router_aux_loss_coef=.5), load_rows("tickets")[:4]
    warnings.filterwarnings(said, message="trained on the model's own loss")
    one, two = (finetune(base, rows, tmp_path/str(n), **HOW | dict(max_steps=1, per_device_train_batch_size=4//n, gradient_accumulation_steps=n)).info["losses"][0] for n in (1, 2))
    assert one == pytest.approx(two, abs=.2), (one, two)   # counted twice, it is off by 1


def test_a_trained_mixture_answers_at_once(make, tmp_path):
    "TRL asks the model for its routers' logits while it trains; afterwards they are not asked for, and answers need none."
    base, rows = make("Mixtral"), load_rows("tickets")[:4]
    run = finetune(base, rows, tmp_path/"run", **HOW | dict(max_steps=1))
    assert run.model.config.output_router_logits is False
    assert evaluate(run.model, run.tokenizer, rows[:2]).n == 2


def test_answers_of_different_lengths_need_no_loss_of_routers(make, tok):
    "A config that asks for it, as that of a model which somebody has trained: it would be computed in each step, and fails on padding."
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.using.inference import generate
    model, prompts = load_model(make("Mixtral", output_router_logits=True), device="cpu"), ["a", "b c d e"]
    assert model.config.output_router_logits
    assert generate(model, tok, prompts, 3) == [generate(model, tok, o, 3) for o in prompts]


def test_codes_that_are_written_over_are_an_error(make):
    "As they would be if transformers no longer heeded `_is_hf_initialized`, which is none of its public names."
    from qlora_nb.foundations.expert_weights import packing_stacks
    folder = make("Mixtral")
    with quiet(), pytest.raises(QLoRAError, match="its codes were written over.*constraints.txt"), packing_stacks():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        codes = next(p for n, p in model.named_parameters() if ".parametrizations." in n)
        with torch.no_grad(): codes.zero_()


def test_our_own_backend_packs_experts_while_they_are_read(make, monkeypatch):
    "None of them is wide when the model has been read, and all of it is what quantizing it whole would give."
    from qlora_nb.foundations import qlora
    from qlora_nb.foundations.loading import load_model
    seen, base = [], make("Mixtral")
    def load(*args, **how):
        model = load_model(*args, **how)
        seen.extend(n for n, p in model.named_parameters() if p.ndim > 2)
        return model
    monkeypatch.setattr(qlora, "load_model", load)
    ours, whole = qlora.load_scratch(base, device="cpu", dtype=torch.float32), load_model(base, bits=None, device="cpu", dtype=torch.float32)
    assert not seen and any(p.ndim > 2 for p in whole.parameters())
    qlora.quantize_model(whole)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad(): assert torch.equal(ours(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("backend", ["bnb", "scratch"])
def test_a_model_whose_scales_would_be_lost_is_not_saved(backend, tmp_path):
    "`save_pretrained` wrote the codes of experts, and of layers of ours, without their scales; a folder that an older one has written is told by its tensors."
    base, torn = tmp_path/"base", tmp_path/"torn"
    config = MixtralConfig(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    with quiet(): AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    model = (load_model if backend == "bnb" else load_scratch)(base, device="cpu", dtype=torch.float32)
    for o in (model, copy.deepcopy(model)):
        with pytest.raises(QLoRAError, match="MixtralForCausalLM: transformers would write .* without their scales"): o.save_pretrained(torn)
    assert not torn.exists()
    with quiet(): type(model).save_pretrained(model, torn)
    with pytest.raises(QLoRAError, match="holds codes without their scales: a mixture of experts .* Give the folder that it was loaded from"): load_model(torn, device="cpu")
    if backend == "bnb":   # written out again, it can be saved as any other
        with quiet(): dequantize_stacks(model).save_pretrained(tmp_path/"wide")
        assert (tmp_path/"wide"/"model.safetensors").exists()
