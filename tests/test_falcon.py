"The Falcon trap and its cure, on each architecture that the family has: `58_falcon` shows falcon-rw-1b's alone."
import re

import bitsandbytes as bnb, pytest, torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common import NBS, code_cells, read
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import audit_4bit, load_model

SHAPES = {"rw-1b": {},
          "7b": dict(alibi=False, bias=False, multi_query=True, parallel_attn=True),
          "40b": dict(alibi=False, bias=False, parallel_attn=True, new_decoder_architecture=True, num_kv_heads=2)}


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path):
    with quiet(): tiny_model("falcon", **SHAPES[request.param]).save_pretrained(tmp_path)
    return tmp_path


def test_transformers_says_4bit_and_is_not(folder):
    how = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"})
    with quiet(): model = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert model.is_loaded_in_4bit and not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    with pytest.raises(QLoRAError, match=r"8 of 8 linear layers are not in 4 bits \(FalconLinear\)"): audit_4bit(model)


def test_load_model_is_4bit_and_computes_the_same(folder):
    model = load_model(folder, device="cpu", dtype=torch.float32)
    assert len(audit_4bit(model).four_bit) == 8
    twin = load_model(folder, bits=None, device="cpu", dtype=torch.float32)
    for n, m in model.named_modules():
        if not isinstance(m, bnb.nn.Linear4bit): continue
        W = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        assert not torch.equal(W, twin.get_submodule(n).weight), "nothing was rounded"
        twin.get_submodule(n).weight = nn.Parameter(W)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad(): a, b = (m(input_ids=ids).logits for m in (model, twin))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_claim_of_the_article_is_settled():
    "The tables at the end of `58_falcon` and `87_falcon_claims`: each claim with a number or a word on it, and with pages that exist."
    seen = 0
    for page in (NBS/"5_evaluation"/"58_falcon.ipynb", NBS/"7_speed"/"87_falcon_claims.ipynb"):
        cell = next(c for c in code_cells(read(page)) if "Markdown(Table(claims" in c.source)
        rows = cell.outputs[-1]["data"]["text/markdown"].splitlines()[2:]
        seen += len(rows)
        for row in rows:
            links = re.findall(r"\]\(([^)]+)\)", row)
            assert links and all((page.parent/o).exists() for o in links), row
    assert seen >= 32
