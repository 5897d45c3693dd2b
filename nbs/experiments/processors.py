"""What depends on the kind of processor: the same few measurements on each, one row for each kind.

    python nbs/experiments/processors.py                            # measure here, and store the row of this kind
    python tools/plain_cpu.py python nbs/experiments/processors.py  # and as on a processor without AVX-512

bitsandbytes and PyTorch choose their CPU kernels by the processor, and with them: weights that come back with the scale
of another block (`nf4_config`, Rows that end within a block), the sign of an FP4 zero (`04_double_quantization`, Equal to bitsandbytes), gradients after
an evaluation (`08_loading`), and copies of the output head (`42_inference`). These pages measure it again where they
run, and show the stored row of the other kind beside it. Rows of other kinds in the file are kept. Nothing is timed.
"""
import argparse, json, os, platform, re, tempfile, warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler itself

import bitsandbytes as bnb, torch
from bitsandbytes import functional as BF
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_nb.base.core import cpu_kind, set_seed, versions
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import nf4_config, quiet
from qlora_nb.foundations.loading import disable_cpu_repacking
from qlora_nb.foundations.double_quantization import QuantizedTensor

RESULTS = Path(__file__).parent.parent/"results"/"processors.json"
SHAPES = [(576, 1536, 64), (576, 1536, 1024), (64, 96, 64), (64, 80, 32)]   # rows, columns, block


def wrong_scales():
    "Shares of the weights that come back different from level times scale, for each of `SHAPES`."
    set_seed(0)
    for rows, columns, size in SHAPES:
        data, state = BF.quantize_4bit(torch.randn(rows, columns), blocksize=size, quant_type="nf4")
        differs = BF.dequantize_4bit(data, state) != QuantizedTensor.from_bnb(data, state).dequantize()
        yield dict(shape=[rows, columns], block=size, wrong=differs.float().mean().item())


def zeros():
    "FP4 weights of a normal matrix that come back as 0, and how many of them as -0."
    set_seed(0)
    back = BF.dequantize_4bit(*BF.quantize_4bit(torch.randn(512, 512), quant_type="fp4"))
    return dict(zeros=(back == 0).sum().item(), negative=(back.signbit() & (back == 0)).sum().item())


def adapter_grads(model, evaluate_first):
    "One flat vector of adapter gradients, after an optional evaluation."
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(3, 500, (2, 16))
    if evaluate_first:
        with torch.no_grad(): model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in sorted(model.named_parameters()) if p.requires_grad])


def gradient_cosine(disarmed):
    "Cosine of the gradients of a small 4-bit Llama after an evaluation and those of the same weights written out."
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings(action="ignore"):
        tiny_model().save_pretrained(folder)
        how = dict(quantization_config=nf4_config(torch.float32), dtype=torch.float32, device_map="cpu")
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        twin = tiny_model()
        for n, m in model.named_modules():
            if not isinstance(m, bnb.nn.Linear4bit): continue
            twin.get_submodule(n).weight.data = BF.dequantize_4bit(m.weight.data, m.weight.quant_state).float()
        want = adapter_grads(twin, False)
        return torch.cosine_similarity(adapter_grads(disable_cpu_repacking(model) if disarmed else model, True), want, dim=0).item()


@torch.no_grad()
def head_copies():
    "Bytes that a product in bfloat16 allocates, in units of its weight: for rows with gaps between them, and without."
    W, last = torch.randn(4096, 64, dtype=torch.bfloat16), torch.randn(16, 40, 64, dtype=torch.bfloat16)[:, -1:]
    def allocated(h):
        with torch.profiler.profile(profile_memory=True) as prof: torch.nn.functional.linear(h, W)
        return sum(max(e.self_cpu_memory_usage, 0) for e in prof.events())/W.nbytes
    return dict(with_gaps=allocated(last), closed=allocated(last.contiguous()))


def processor():
    "Its name, and whether it was made to look plainer than it is."
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)", info.read_text(encoding="utf-8"), re.M) if info.exists() else None
    masked = ", seen through tools/plain_cpu.py" if "plain_cpu" in os.environ.get("LD_PRELOAD", "") else ""
    return (name[1] if name else platform.processor() or platform.machine()) + masked


def measure():
    return dict(cpu=cpu_kind(), hardware=processor(), wrong_scales=list(wrong_scales()), fp4=zeros(),
                cosine=gradient_cosine(False), cosine_disarmed=gradient_cosine(True), head=head_copies())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    row = measure() | dict(threads=torch.get_num_threads(), versions=versions())
    doc = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else dict(rows=[])
    doc["rows"] = sorted([*(r for r in doc["rows"] if r["cpu"] != row["cpu"]), row], key=lambda r: r["cpu"])
    doc |= dict(hardware=[r["hardware"] for r in doc["rows"]], versions=row["versions"])
    RESULTS.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))
