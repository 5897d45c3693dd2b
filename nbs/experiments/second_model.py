"""A second model, whose weights have never been in fewer than 16 bits: a small Llama trained from nothing on the Python source files
of its environment. The findings about finer quantization, which SmolLM2 gave, are tried again on it.

    python nbs/experiments/second_model.py train FOLDER nbs/results/second_model.json [--seconds 420]
    python nbs/experiments/finer.py nbs/results/second_finer.json --model FOLDER --text FOLDER/held_out.txt --rows 16 --device cuda
    python nbs/experiments/scales_and_bits.py scales nbs/results/second_scales.json --model FOLDER --text FOLDER/held_out.txt

Why not a model from the Hub: the packaged SmolLM2 comes from a file of 4 bits (Q4_1), and a finding about rounding to 4 bits wants a
model that was not rounded before. The files that train it are those under the standard library and site-packages, each content once;
every fortieth, by a hash of its content, is held out for all measurements. The rate follows a cosine over the time given.
"""
import argparse, hashlib, json, os, random, sys, sysconfig, time
from pathlib import Path

import torch
from torch.nn import functional as F

SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4,
             max_position_embeddings=2048, tie_word_embeddings=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"   # a CPU would take days: only to see that it runs
LENGTH, ROWS, LR, WARM = 1024, 128, 2e-3, .02   # tokens of a row, rows of a step, highest rate, share of the time


def sources(least=500, most=200_000):
    "(Texts to train on, texts held out): each content once, in an order that a seed gives."
    seen, train, held = set(), [], []
    own = [o for o in sys.path if o.rstrip("/").endswith("-packages")]
    for root in sorted({sysconfig.get_path(k) for k in ("stdlib", "purelib", "platlib")} | set(own)):
        for f in sorted(Path(root).rglob("*.py")):
            try: text = f.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError): continue
            mark = hashlib.sha256(text.encode()).hexdigest()
            if mark in seen or not least <= len(text) <= most: continue
            seen.add(mark)
            (held if int(mark, 16) % 40 == 0 else train).append((mark, text))
    order = random.Random(0)
    train, held = ([t for _, t in sorted(o)] for o in (train, held))   # by mark: whatever the folders are called
    order.shuffle(train), order.shuffle(held)
    return train, held


def tokens(tok, texts, batch=512):
    parts = []
    for k in range(0, len(texts), batch):
        for ids in tok(texts[k:k + batch], add_special_tokens=False).input_ids: parts += ids + [tok.eos_token_id]
    return torch.tensor(parts, dtype=torch.int32)


@torch.no_grad()
def loss_of(model, ids, n=64):
    rows = ids[:n*LENGTH].view(n, LENGTH).long().to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        return sum(model(input_ids=r[None], labels=r[None]).loss.item() for r in rows)/n


def train(folder, out, seconds):
    from transformers import LlamaConfig, LlamaForCausalLM
    from qlora_nb.base.core import cpu_kind, versions
    from qlora_nb.base.model_files import load_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    torch.backends.cuda.matmul.allow_tf32 = True
    tok, (texts, held) = load_tokenizer(), sources()
    begin = time.time()
    ids, test = tokens(tok, texts), tokens(tok, held[:2000])
    print(f"{len(texts)} files, {len(ids)/1e6:.1f} M tokens, {len(held)} files held out, {time.time() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, **SHAPE)).to(DEVICE)
    decay = [p for p in model.parameters() if p.dim() > 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=.1), dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.)],
                            lr=LR, betas=(.9, .95), fused=True)

    @torch.compile
    def step_loss(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            h = model.model(input_ids=x, use_cache=False).last_hidden_state
            logits = F.linear(h[:, :-1], model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    rows, draw, curve, step, passes = len(ids)//LENGTH, torch.Generator().manual_seed(0), [], 0, 0
    all_rows, order, start = ids[:rows*LENGTH].view(rows, LENGTH).to(DEVICE), torch.empty(0, dtype=torch.long), None
    while True:
        if len(order) < ROWS: order, passes = torch.cat([order, torch.randperm(rows, generator=draw)]), passes + 1
        x, order = all_rows[order[:ROWS].to(DEVICE)].long(), order[ROWS:]
        done = 0. if start is None else (time.time() - start)/seconds
        if done >= 1: break
        for g in opt.param_groups: g["lr"] = LR*min(1, done/WARM)*(.05 + .95*(1 + torch.cos(torch.tensor(torch.pi*done)).item())/2)
        opt.zero_grad()
        loss = 0.
        for part in x.split(ROWS//2):   # two halves: the logits of all rows would take 26 GB
            half = step_loss(part)/2
            half.backward()
            loss += half.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        step += 1
        if step == 3: start = time.time()   # compiled by now
        if step % 50 == 0:
            curve.append((step, round(loss.item(), 4)))
            print(step, curve[-1][1], f"{done:.2f}", flush=True)
    model = model.to(torch.bfloat16)
    got = dict(files=len(texts), tokens=len(ids), held_out_files=len(held), shape=SHAPE, parameters=sum(p.numel() for p in model.parameters()),
               steps=step, tokens_a_step=LENGTH*ROWS, passes=step*ROWS/rows, seconds=seconds, highest_rate=LR, curve=curve,
               held_out_loss=loss_of(model, test), hardware=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_kind(), versions=versions())
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (Path(folder)/"held_out.txt").write_text("\n".join(held)[:2_000_000], encoding="utf-8")
    text = json.dumps(got, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    print(text[-900:], flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train"]), p.add_argument("folder"), p.add_argument("out", type=Path)
    p.add_argument("--seconds", type=float, default=420.)
    a = p.parse_args()
    train(a.folder, a.out, a.seconds)


if __name__ == "__main__": main()
