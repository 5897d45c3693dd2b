"Mixtures of experts through `finetune` as a whole: evaluated, stopped, interrupted and resumed, checkpointed."
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from qlora_nb.core import QLoRAError, set_seed
from qlora_nb.data import load_rows
from qlora_nb.models import quiet
from qlora_nb.training import finetune

from common import small_tokenizer

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4,
             pad_token_id=2, bos_token_id=1, eos_token_id=2)
KINDS = dict(Mixtral=dict(num_attention_heads=4), GraniteMoe=dict(num_attention_heads=4), JetMoe=dict(kv_channels=32))
HOW = dict(batch_size=1, accumulation=2, lr=1e-2, save_steps=2, device="cpu", progress=False)


@pytest.fixture(scope="module")
def tok(): return small_tokenizer(400)


@pytest.fixture(scope="module")
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
    "The loss is TRL's; a run that is interrupted and resumed has the bits of one that was left alone; so has a checkpointed one."
    base, rows, how = make("GraniteMoe"), load_rows("tickets")[:16], dict(HOW, steps=4, eval_steps=1, patience=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="trained on the model's own loss")
        run = finetune(base, rows, tmp_path/"whole", **how)
        with pytest.raises(KeyboardInterrupt): finetune(base, rows, tmp_path/"run", callbacks=[CtrlC()], **how)
        again = finetune(base, rows, tmp_path/"run", resume=True, **how)
        assert again.info["resumed_from"] == "checkpoint-3" and [again.info[k] for k in FACTS] == [run.info[k] for k in FACTS]
        assert finetune(base, rows, tmp_path/"twice", **dict(how, checkpointing=True)).info["losses"] == run.info["losses"]


def test_checkpointing_that_is_not_possible(make, tmp_path):
    "JetMoE's code knows none; that is said before the first step, in one sentence."
    with pytest.raises(QLoRAError, match="checkpointing is not possible"):
        finetune(make("JetMoe"), load_rows("tickets")[:4], tmp_path/"run", **HOW, steps=1, checkpointing=True)


def test_the_loss_of_the_routers_counts_once_a_step(make, tmp_path):
    "However a step is divided into batches; it is a mean over them."
    base, rows = make("Mixtral", router_aux_loss_coef=.5), load_rows("tickets")[:4]
    one, two = (finetune(base, rows, tmp_path/str(n), **HOW | dict(steps=1, batch_size=4//n, accumulation=n)).info["losses"][0] for n in (1, 2))
    assert one == pytest.approx(two, abs=.2), (one, two)   # counted twice, it is off by 1
