"""Does a 4-bit base learn as well? SmolLM2 on the support tickets, many times over.

    python nbs/experiments/learning.py nbs/results/learning.json [--steps 150] [--workers 6] [--limit SECONDS]

Each row is one fine-tune: a method, the number format of the base, a rank, targets, a learning rate, a seed. The
steps, the batches and their order depend on the seed alone. `full` trains all weights (float32, autocast), `lora`
adapters on the 16-bit base, `qlora` adapters on bitsandbytes' NF4 with double quantization; `rounded` trains adapters
on a 16-bit base whose weights were rounded to a format first, which is what a frozen quantized base computes with.
Rows are written as they come in. Times and memory are measured apart, one after the other.
`nbs/5_evaluation/56_data_types.ipynb` and `nbs/5_evaluation/57_methods.ipynb` show the results.
"""
import argparse, json, os, statistics, tempfile, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

FORMATS = [("int4", 64, False), ("fp4", 64, False), ("nf4", 64, False), ("nf4", 64, True), ("int8", 64, False)]
SEEDS = (0, 1, 2)


def tasks(groups="methods targets formats ranks"):
    "What to fine-tune. The base of `formats` without rounding is `lora` of `methods`."
    base = dict(format="bf16", block=None, double=False, rank=16, targets="all-linear", lr=2e-3)
    nf4 = base | dict(format="nf4", block=64, double=True)
    for seed in SEEDS:
        if "methods" in groups:
            for lr in (2e-3, 5e-4):
                yield nf4 | dict(method="qlora", seed=seed, lr=lr)
                yield base | dict(method="lora", seed=seed, lr=lr)
            for lr in (5e-5, 2e-4, 5e-4): yield base | dict(method="full", seed=seed, lr=lr, rank=None, targets=None)
    for seed in SEEDS:
        if "formats" in groups:
            for name, block, double in FORMATS:
                yield base | dict(method="rounded", seed=seed, format=name, block=block, double=double)
    for seed in SEEDS:
        if "targets" in groups: yield nf4 | dict(method="qlora", seed=seed, targets=["q_proj", "v_proj"])
        if "ranks" in groups:
            for rank in (1, 4, 64): yield nf4 | dict(method="qlora", seed=seed, rank=rank)


def load(task):
    import torch
    from qlora_nb.evaluation.data_types import round_weights
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    dtype = torch.bfloat16 if torch.cuda.is_available() else None   # None: the faster one here
    model = load_model(bits=4 if task["method"] == "qlora" else None, dtype=dtype)
    if task["method"] == "rounded": round_weights(model, task["format"], task["block"], task["double"])
    return model, load_tokenizer()


def trainer_for(model, tokenizer, rows, task, steps, folder):
    from qlora_nb.foundations.adapters import add_adapters
    from qlora_nb.base.core import set_seed
    from qlora_nb.training.data import encode_rows
    from qlora_nb.training.finetune import make_trainer
    set_seed(task["seed"])
    if task["method"] == "full": model.requires_grad_(True)
    else: model = add_adapters(model, task["rank"], 2*task["rank"], 0., task["targets"])
    return model, make_trainer(model, tokenizer, encode_rows(rows, tokenizer), folder, progress=False, max_steps=steps,
                               learning_rate=task["lr"], seed=task["seed"], save_steps=10**6, optim="adamw_torch")


def learn(task, steps, n_eval, workers):
    "One fine-tune: what it scored, what it cost in the prose that it never saw."
    import torch
    torch.set_num_threads(max(1, os.cpu_count()//workers))
    from qlora_nb.training.data import load_rows
    from qlora_nb.evaluation.evaluation import evaluate, answer_loss
    from qlora_nb.evaluation.perplexity import perplexity, prose
    held = load_rows("tickets", "test")[:n_eval]
    model, tok = load(task)
    before = dict(prose_before=perplexity(model, tok, prose()), answer_loss_before=answer_loss(model, tok, held))
    with tempfile.TemporaryDirectory() as folder:
        model, trainer = trainer_for(model, tok, load_rows("tickets"), task, steps, folder)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    for p in model.parameters(): p.grad = None
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if task["method"] == "full" and torch.cuda.is_available(): base.bfloat16()
    s = evaluate(model, tok, held, batch_size=256)._asdict()
    s["answers"] = s["answers"][:3]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return task | before | s | dict(prose_after=perplexity(base, tok, prose()), trainable_parameters=trainable,
                                    losses=losses, steps=steps, seconds_shared=seconds)


def cost(wanted, steps=30):
    "Time of a step and peak memory, one after the other, with nothing else on the machine."
    import torch
    from qlora_nb.base.core import free_memory
    from qlora_nb.training.data import load_rows
    out = []
    for task in wanted:
        free_memory()
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        model, tok = load(task)
        with tempfile.TemporaryDirectory() as folder:
            model, trainer = trainer_for(model, tok, load_rows("tickets"), task, steps, folder)
            stamps, real = [], trainer.training_step
            def step(*a, **k):
                if torch.cuda.is_available(): torch.cuda.synchronize()
                stamps.append(time.perf_counter())
                return real(*a, **k)
            trainer.training_step = step
            trainer.train()
        times = sorted(b - a for a, b in zip(stamps[5:], stamps[6:]))
        peak = torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else None
        out.append(dict(method=task["method"], targets=task["targets"], step_ms=1e3*statistics.median(times),
                        step_ms_low=1e3*times[len(times)//4], step_ms_high=1e3*times[3*len(times)//4], peak_gb=peak))
        del model, trainer, real, step
    return out


def formats(n_tokens=8192, blocks=(32, 64, 128, 256, 1024)):
    "Perplexity on prose for each format and block size, without training."
    import torch
    from qlora_nb.evaluation.data_types import bits_per_weight, round_weights
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.evaluation.perplexity import perplexity, prose
    tok, out = load_tokenizer(), []
    def measure(dtype="float32", **how):
        model = load_model(bits=None, dtype=getattr(torch, dtype))
        if how["format"] != "none": round_weights(model, how["format"], how["block"], how["double"])
        bits = bits_per_weight(how["format"], how["block"], how["double"]) if how["block"] else 16 if dtype == "bfloat16" else 32
        row = how | dict(perplexity=perplexity(model, tok, prose(), max_tokens=n_tokens), bits=bits, dtype=dtype)
        # a slice that the page measures again on every run
        if dtype == "float32" and how["block"] in (None, 64): row["first_512"] = perplexity(model, tok, prose(), max_tokens=512)
        out.append(row)
    measure(format="none", block=None, double=False)
    for name, block, double in [("none", None, False), *FORMATS]:   # as a 16-bit model computes
        measure("bfloat16", format=name, block=block, double=double)
    for block in blocks:
        for name in ("int4", "fp4", "nf4", "int8"): measure(format=name, block=block, double=False)
        measure(format="nf4", block=block, double=True)
    return out


def slices(rows):
    "The slices of `rows` of `formats` once more, as the pages measure them."
    import torch
    from qlora_nb.evaluation.data_types import round_weights
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.evaluation.perplexity import perplexity, prose
    tok = load_tokenizer()
    for r in rows:
        if r["dtype"] != "float32" or r["block"] not in (None, 64): continue
        model = load_model(bits=None, dtype=torch.float32)
        if r["format"] != "none": round_weights(model, r["format"], r["block"], r["double"])
        r["first_512"] = perplexity(model, tok, prose(), max_tokens=512)
        print(r, flush=True)
    return rows


def main():
    import multiprocessing, torch
    from qlora_nb.base.core import versions
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--parts", default="formats cost learn", help="which of them to measure; others in `out` are kept")
    ap.add_argument("--groups", default="methods targets formats ranks", help="of fine-tunes; see `tasks`")
    ap.add_argument("--name", default="learn", help="of the fine-tunes in `out`")
    for name, default in dict(steps=150, workers=6, limit=100000, eval_rows=256, only=0, tokens=8192).items():
        ap.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args, start = ap.parse_args(), time.time()
    doc = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    def keep(part, rows, **settings):
        doc[part] = dict(hardware=hardware, versions=versions(), settings=settings, rows=rows)
        args.out.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
    todo = list(tasks(args.groups))[:args.only or None]
    spawn = multiprocessing.get_context("spawn")
    def alone(f, *a):   # in a process of its own: no memory of another one
        with ProcessPoolExecutor(1, mp_context=spawn) as pool: return pool.submit(f, *a).result()
    if "formats" in args.parts:
        keep("formats", alone(formats, args.tokens, (64,) if args.only else (32, 64, 128, 256, 1024)), tokens=args.tokens)
    if "cost" in args.parts:
        main_ones = [next(t for t in todo if t["method"] == m) for m in ("qlora", "lora", "full")]
        keep("cost", alone(cost, main_ones), batch_size=4)
    if "slices" in args.parts:   # beside what is stored of `formats`
        rows = slices(doc["formats"]["rows"])
        keep("formats", rows, **doc["formats"]["settings"])
    print("formats and cost", round(time.time() - start), "s", flush=True)
    if "learn" not in args.parts: return
    rows = []
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        waiting = [pool.submit(learn, t, args.steps, args.eval_rows, args.workers) for t in todo]
        for done in as_completed(waiting):
            try: rows.append(done.result())
            except Exception as e:
                print("failed:", repr(e)[:500], flush=True)
                continue
            keep(args.name, rows, steps=args.steps, batch_size=4, eval_rows=args.eval_rows)
            print(round(time.time() - start), "s", len(rows), {k: rows[-1].get(k) for k in
                  ("method", "format", "rank", "lr", "seed", "exact_match", "answer_loss", "prose_after")}, flush=True)
            if time.time() - start > args.limit:
                for p in pool._processes.values(): p.kill()
                os._exit(0)


if __name__ == "__main__": main()
