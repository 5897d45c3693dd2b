"""Finer quantization on SmolLM2-135M: errors of the weights, KL to the unquantized logits and perplexity, row by row.

    python nbs/experiments/finer.py nbs/results/finer.json [--groups plain alpha search ...] [--rows 4] [--only "nf4 64" ...] [--again]
    ... [--model FOLDER --text FILE --device cuda]   # another model, another text, another place to measure

The text is the Python reference in rows of 512 tokens: its first 4 rows, or 16, the 8,192 tokens of the other pages, with --rows 16. The
second moments of the layers' inputs come from 2,048 other tokens of it, from token 32,768 on. Weights and their errors are computed in
float32, the model in bfloat16, in about 10 s of one core for a format and 4 rows. The packaged weights come from a file of 4 bits
(Q4_1), so "unquantized" means: not quantized by us. Formats that are stored with as many rows are kept, unless --again.

The rule for decisions, written before the first run:
- a method *helps* when the paired 95 % interval over the rows of its KL less that of the same format without it, at the same
  storage, lies below zero; it *harms* when the interval lies above; else it is *not told apart*. Perplexity is shown, not decided on.
- an error *predicts* the model when its rank correlation with KL over the plain formats is above 0.9, and when in pairs of formats
  whose KL differ beyond their interval it names the better one more often than the weight error does.
- the linear rule (KL as a sum over groups of layers of a constant times the squared relative error) *holds* when NF4's sum of the
  groups alone lies within 10 % of NF4's own KL, and the constants predict the KL of the other 4-bit formats within 10 %.
- a default changes only on a gain outside its interval on two models. The second one is that of `second_model.py`.
"""
import argparse, json, platform, time
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_nb.base.core import cpu_kind, versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.beyond.codebooks import af4, bof4, equal_use, fp8_levels, power_scales, round_to, to_e4m3
from qlora_nb.beyond.error_into_adapter import closed_form, loftq, low_rank
from qlora_nb.beyond.error_feedback import feedback_codes, feedback_quantize
from qlora_nb.beyond.scale_search import search_quantize, search_scales
from qlora_nb.beyond.which_error import divergence, input_moments, linear_layers, log_probs, relative_errors
from qlora_nb.evaluation.data_types import bits_per_weight, round_tensor
from qlora_nb.evaluation.perplexity import prose
from qlora_nb.foundations.double_quantization import double_quantize
from qlora_nb.foundations.loading import load_model
from qlora_nb.foundations.nf4 import book, nf4_codebook, to_blocks

WINDOW, CALIBRATION = 512, (32768, 2048)   # first token, tokens


def noise(W, seed):
    "NF4's error of each layer in size, in a random direction."
    size = (round_tensor(W, "nf4") - W).square().mean().sqrt()
    return W + size*torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))


def plain():
    "{name: (bits a weight, W, H → what stands in its place)}: formats that round each weight to the nearest level, and noise."
    def rounding(kind, block, double=False): return bits_per_weight(kind, block, double), lambda W, H: round_tensor(W, kind, block, double)
    out = {f"{kind} {block}": rounding(kind, block) for kind in ("nf4", "fp4", "int4") for block in (32, 64, 128, 256, 1024)}
    out["nf4 64 double"] = rounding("nf4", 64, True)
    for kind, bits in (("NF", 3), ("NF", 5), ("Int", 5), ("FP", 5), ("Int", 6)):
        out[f"{kind.lower()}{bits} 64"] = bits + .5, lambda W, H, code=book(kind, bits): round_to(W, code)
    out["noise as nf4 64"] = None, lambda W, H: noise(W, W.shape[0])
    first = "nf4 64", "nf4 64 double", "int4 64", "fp4 64"
    return {k: out[k] for k in [*first, *out]}


def search():
    "Scales that are searched, beside absmax."
    out = {}
    ways = dict(search={}, weighted=dict(weighted=True), signed=dict(signed=True), both=dict(weighted=True, signed=True))
    for double in (True, False):
        for name, how in ways.items():
            def f(W, H, double=double, how=how):
                kw = dict(weights=H.diagonal()) if how.get("weighted") else {}
                return search_quantize(W, double=double, signed=how.get("signed", False), **kw).dequantize()
            out[f"nf4 64 {name}" + " double"*double] = bits_per_weight("nf4", 64, double), f
    return out


def codebooks():
    "Other levels, and levels that FP8 holds, in blocks of 64."
    s, nf4 = bof4(signed=True), nf4_codebook()
    exact, _ = fp8_levels(nf4)

    def twice(W, H):
        Q = round_tensor(W, "nf4")
        row = Q.abs().amax(1, keepdim=True)/448
        return to_e4m3(Q/row)*row
    def searched(W, H): return round_to(W, s, scales=search_scales(W, s, signed=True))
    out = {"bof4s 64": lambda W, H: round_to(W, s, signed=True), "equal use 64": lambda W, H, v=equal_use(): round_to(W, v),
           "af4 64": lambda W, H, v=af4(): round_to(W, v), "bof4 64": lambda W, H, v=bof4(): round_to(W, v),
           "bof4s 64 search": searched, "nf4 on e4m3 64": lambda W, H: round_to(W, exact), "nf4 then e4m3 64": twice,
           "nf4 on e4m3 64, powers of two": lambda W, H: round_to(W, exact, scales=power_scales(W, exact))}
    return {k: (4.5, f) for k, f in out.items()}


def rotated(W, H):
    "NF4 after a random Hadamard rotation of each 64 inputs, and turned back."
    R = torch.ones(1, 1)
    while len(R) < 64: R = torch.cat([torch.cat([R, R], 1), torch.cat([R, -R], 1)])
    signs = torch.randint(0, 2, (W.shape[1],), generator=torch.Generator().manual_seed(0))*2. - 1
    turned = ((W*signs).view(-1, 64)@R/8).view_as(W)
    return (round_tensor(turned, "nf4", 64, True).view(-1, 64)@R/8).view_as(W)*signs


def feedback():
    "Error feedback into NF4, and a rotation, in blocks of 64 with double quantization."
    fed = {"nf4 64 feedback double": lambda W, H: feedback_quantize(W, H).dequantize(),
           "nf4 64 feedback, no search double": lambda W, H: no_search(W, H), "nf4 64 rotated double": rotated}
    return {k: (bits_per_weight("nf4", 64, True), f) for k, f in fed.items()}


def no_search(W, H):
    "Error feedback with absmax as it is, to tell the two apart."
    scales = double_quantize(to_blocks(W.reshape(-1), 64).abs().amax(1)).dequantize()
    return feedback_codes(W, H, scales, nf4_codebook())


def adapter(most=64):
    """NF4 with double quantization and the start of an adapter, before any training: what the layer computes, Q + BA. A start of rank
    16 is the first 16 directions of one of rank 64, which is computed once."""
    found = {}

    def nf4(W): return round_tensor(W, "nf4", 64, True)

    def BA(name, W, make, r):
        A, B = found.get((name, W.data_ptr())) or found.setdefault((name, W.data_ptr()), make())
        return B[:, :r]@A[:r]
    def lost(W, H, r=16): return nf4(W) + BA("lost", W, lambda: low_rank(W - nf4(W), most), r)
    def closed(W, H, r=16): return nf4(W) + BA("closed", W, lambda: closed_form(W - nf4(W), H, most), r)
    def top(W, r=16): return BA("top", W, lambda: low_rank(W, most), r)

    def again(W, H):
        A, B, Q = loftq(W, 16, rounds=5)
        return Q.dequantize() + B@A

    def fed(W, H):
        Q = feedback_quantize(W, H).dequantize()
        A, B = closed_form(W - Q, H, 16)
        return Q + B@A
    out = {"closed form": closed, "LoftQ, 1 round": lost, "feedback, closed form": fed, "QPiSSA": lambda W, H: nf4(W - top(W)) + top(W),
           "PiSSA on quantized": lambda W, H: nf4(W) + top(W), "LoftQ, 5 rounds": again,
           "closed form, rank 64": lambda W, H: closed(W, H, 64), "LoftQ, 1 round, rank 64": lambda W, H: lost(W, H, 64)}
    return {k: (bits_per_weight("nf4", 64, True), f) for k, f in out.items()}


def option():   # of the packaged model alone
    "What `load_model(quantization='nf4-search')` gives: its inputs are those of the model in 4 bits, on the text that everyone has."
    four = load_model(device="cpu", dtype=torch.bfloat16, quantization="nf4-search")
    found = (dequantize_4bit(m.weight.data, m.weight.quant_state).float() for m in linear_layers(four).values())
    return {"nf4-search": (bits_per_weight("nf4", 64, True), lambda W, H: next(found))}


GROUPS = dict(plain=plain, search=search, codebooks=codebooks, feedback=feedback, adapter=adapter, option=option)


def group_of(name, layers=30):
    "A layer's kind and third of the depth: 21 groups."
    _, _, i, *_, kind = name.split(".")
    return f"{kind} {3*int(i)//layers}"


def read(text): return Path(text).read_text(encoding="utf-8") if text else prose()


class Bench:
    "The model, its weights, its answers, and the moments of its layers' inputs."
    def __init__(self, n, window=WINDOW, dtype=torch.bfloat16, device="cpu", name="smollm2", text=None, make_on=None):
        self.model, tok = load_model(name, bits=None, dtype=dtype, device=device), load_tokenizer(name)
        self.ids = ids = tok(read(text), add_special_tokens=False, return_tensors="pt").input_ids[0].to(device)
        self.rows, self.layers = ids[:n*window].view(n, window), linear_layers(self.model)
        self.W = {n: m.weight.detach().to(make_on or device, torch.float32) for n, m in self.layers.items()}
        self.H = {n: H.to(make_on or device) for n, H in input_moments(self.model, ids[CALIBRATION[0]:sum(CALIBRATION)]).items()}
        self.reference = [log_probs(self.model, row).exp() for row in self.rows]
        self.loss = [-p[:-1].gather(1, r[1:, None]).log().mean().item() for p, r in zip(self.reference, self.rows)]

    @torch.no_grad()
    def put(self, f, only=None):
        "Each layer's weight replaced by f(W, H), or only those of one group; the three errors of each layer."
        errors = {}
        for n, m in self.layers.items():
            m.weight.copy_(self.W[n])
            if only and only != group_of(n) and only not in group_of(n).split(): continue
            m.weight.copy_(Q := f(self.W[n], self.H[n]))
            errors[n] = relative_errors(self.W[n], Q, self.H[n])
        return errors

    def measure(self, n=None): return divergence(self.model, self.reference[:n], self.rows[:n])


def mean_square(errors): return [sum(e[i]**2 for e in errors)/len(errors) for i in range(3)]


def row_of(bench, name, group, bits, f):
    start = time.process_time()
    errors = bench.put(f)
    made = time.process_time() - start
    kl, loss = bench.measure()
    groups = {}
    for n, e in errors.items(): groups.setdefault(group_of(n), []).append(e)
    weight, weighted, output = (o**.5 for o in mean_square(errors.values()))
    return dict(name=name, group=group, bits=bits, weight=weight, weighted=weighted, output=output, kl=sum(kl)/len(kl),
                perplexity=torch.tensor(loss).double().mean().exp().item(), kl_rows=kl, loss_rows=loss,
                groups={g: mean_square(o) for g, o in groups.items()}, seconds_to_make=round(made, 1))


def alphas(bench, n=2):
    "NF4 on one group of layers at a time, on the first rows: KL and the three squared errors."
    out = {}
    for g in dict.fromkeys(map(group_of, bench.layers)):   # 7 kinds in 3 thirds
        errors = bench.put(lambda W, H: round_tensor(W, "nf4"), only=g)
        kl, _ = bench.measure(n)
        out[g] = dict(kl=sum(kl)/n, kl_rows=kl, layers=len(errors), squares=mean_square(errors.values()))
        print(g, out[g]["kl"], flush=True)
    return out


def flip(bench, n=2):
    "Int4 and FP4 on one kind of layer, or one third of the depth, at a time: KL on the first rows."
    out = {}
    for part in dict.fromkeys(o for n in bench.layers for o in group_of(n).split()):
        for kind in ("int4", "fp4"):
            errors = bench.put(lambda W, H: round_tensor(W, kind), only=part)
            kl, _ = bench.measure(n)
            out[f"{part} {kind}"] = dict(kl=sum(kl)/n, kl_rows=kl, layers=len(errors), squares=mean_square(errors.values()))
            print(part, kind, out[f"{part} {kind}"]["kl"], flush=True)
    return out


def rounded(o):
    if isinstance(o, float): return float(f"{o:.6g}")
    if isinstance(o, dict): return {k: rounded(v) for k, v in o.items()}
    return [rounded(v) for v in o] if isinstance(o, (list, tuple)) else o


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--groups", nargs="+", default=[*GROUPS, "alpha", "flip"])
    p.add_argument("--again", action="store_true"), p.add_argument("--rows", type=int, default=4)
    p.add_argument("--only", nargs="+", help="names of formats")
    p.add_argument("--model", default="smollm2"), p.add_argument("--text"), p.add_argument("--device", default="cpu")
    p.add_argument("--python", default=".".join(platform.python_version_tuple()[:2]), help="of which the reference in --text is")
    a = p.parse_args()
    bench = Bench(a.rows, device=a.device, name=a.model, text=a.text, make_on="cpu")
    kept = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(rows=[], alpha={})
    kept |= dict(hardware=torch.cuda.get_device_name() if a.device == "cuda" else cpu_kind(), versions=versions(), settings=dict(window=WINDOW, calibration=CALIBRATION, text_of_python=a.python,
                 dtype="bfloat16", model="SmolLM2-135M-Instruct, from Q4_1" if a.model == "smollm2" else Path(a.model).name))
    if a.rows >= len(kept.get("unquantized", dict(loss_rows=[]))["loss_rows"]):
        kept["unquantized"] = dict(loss_rows=bench.loss, perplexity=torch.tensor(bench.loss).double().mean().exp().item())

    def save():
        text = json.dumps(rounded(kept), separators=(",", ":")).replace('{"name"', '\n{"name"')
        a.out.write_text(text + "\n", encoding="utf-8")
    print("unquantized", kept["unquantized"]["perplexity"], flush=True)
    for g in a.groups:
        if g in ("alpha", "flip"):
            kept[g] = dict(alpha=alphas, flip=flip)[g](bench)
            save()
            continue
        for name, (bits, f) in GROUPS[g]().items():
            stored = any(r["name"] == name and len(r["kl_rows"]) >= a.rows for r in kept["rows"])
            if a.only and name not in a.only or stored and not a.again: continue
            row = row_of(bench, name, g, bits, f)
            kept["rows"] = [r for r in kept["rows"] if r["name"] != name] + [row]
            save()
            print(name, *(f"{k} {row[k]:.5g}" for k in ("weight", "weighted", "output", "kl", "perplexity", "seconds_to_make")), flush=True)


if __name__ == "__main__": main()
