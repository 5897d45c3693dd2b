"""The article's recipe on a falcon-rw-1b shape against the same rows packed and the fast step: useful tokens a second.

    python benchmarks/falcon_article.py benchmarks/results/falcon_article.json [--models /dev/shm/models] [--repeat 32]

The article's three rows, `--repeat` times. Its recipe: no layer in 4 bits (`FalconLinear` is passed over), all frozen
weights in float32, float16 autocast, checkpointing, rows padded to 512, 2 rows a pass and 4 passes an update. Ours: NF4
with double quantization, bfloat16, no dropout (the fused layers have none), rows packed, `make_fast`. What counts are
the tokens of the rows, without padding. "as many updates" gives each update the same 8 rows; the others fill packs and
make fewer updates of more tokens. The first epochs, which compile and record, are timed apart: `warmup_s` is what they
took more. Peaks are those of the timed epochs; of ours, which replays recordings, those of all.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT, SHAPE = Path(__file__).resolve().parent.parent, dict(alibi=True, bias=True, multi_query=False, bos_token_id=1,
    eos_token_id=2, parallel_attn=False, new_decoder_architecture=False)
SIZES = {"falcon-rw-1b": dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32),
         "tiny": dict(vocab_size=49152, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)}
ROWS = [("Tell me a joke about programming.", "Why do programmers prefer dark mode? Because the light attracts bugs!"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Explain the concept of overfitting in machine learning.",
         "Overfitting occurs when a model learns the training data too well, including its noise.")]
LORA = dict(r=8, lora_alpha=32, target_modules=["query_key_value"], bias="none", task_type="CAUSAL_LM")
WAYS = {"article": {}, "ours, as many updates": dict(rows=8, width=264), "ours, packs of 1024": dict(width=1024),
        "ours, packs of 1536": dict(width=1536),
        "ours, all linear layers, packs of 1536": dict(width=1536, targets="all-linear")}


def make(folder, size, device):
    import torch
    from transformers import FalconConfig, FalconForCausalLM
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.base.nf4_config import quiet
    torch.manual_seed(0)
    with torch.device(device), quiet(): model = FalconForCausalLM._from_config(FalconConfig(**SHAPE | SIZES[size]),
                                                                               dtype=torch.bfloat16)
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part), load_tokenizer().save_pretrained(part)
    part.replace(folder)


def sync(device):
    if device == "cuda": import torch; torch.cuda.synchronize()


def peak(device):
    if device != "cuda": return None
    import torch
    return torch.cuda.max_memory_allocated()/1e9


def article(folder, device, repeat, epochs):
    "The script of the article: its first epoch is the warm-up."
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForLanguageModeling,
                              Trainer, TrainingArguments)
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True),
                                                 device_map={"": 0 if device == "cuda" else "cpu"}, dtype=torch.float16)
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(**LORA, lora_dropout=0.05))
    texts = [f"### Instruction:\n{p}\n\n### Response:\n{r}" for p, r in ROWS*repeat]
    rows = Dataset.from_dict(dict(text=texts)).map(
        lambda e: tok(e["text"], truncation=True, padding="max_length", max_length=512), remove_columns=["text"])
    times = []
    for epoch in range(1 + epochs):
        with tempfile.TemporaryDirectory() as out:
            args = TrainingArguments(output_dir=out, per_device_train_batch_size=2, gradient_accumulation_steps=4,
                                     num_train_epochs=1, logging_steps=5, save_strategy="no", fp16=device == "cuda",
                                     learning_rate=2e-4, report_to="none", disable_tqdm=True, use_cpu=device == "cpu")
            trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tok,
                              data_collator=DataCollatorForLanguageModeling(tokenizer=tok, mlm=False))
            if epoch == 1 and device == "cuda": torch.cuda.reset_peak_memory_stats()
            sync(device)
            t = time.perf_counter()
            done = trainer.train()
            sync(device)
            times.append(time.perf_counter() - t)
    return dict(useful_tokens=sum(len(tok(t).input_ids) for t in texts), computed_tokens=len(rows)*512, times=times,
                updates=done.global_step, loss=done.training_loss)


def ours(folder, device, repeat, epochs, width, rows=None, memory=1., targets=None):
    "The same rows, packed; the first epochs compile and record."
    import torch
    from peft import LoraConfig, get_peft_model
    from qlora_nb.training.data import encode_rows
    from qlora_nb.speed.fast_training import make_fast
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.training.document_mask import collate_packed, separate_documents
    from qlora_nb.training.packing import pack
    tok = load_tokenizer(folder)
    examples = encode_rows([dict(prompt=p, response=r) for p, r in ROWS]*repeat, tok, "article")
    groups = [examples[i:i + rows] for i in range(0, len(examples), rows)] if rows else [examples]
    batches = [collate_packed([o], multiple=width) for g in groups for o in pack(g, width)]
    batches = [{k: v.to(device) for k, v in b.items()} for b in batches]
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA | (dict(target_modules=targets) if targets else {}))).train()
    separate_documents(model)
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    print(make_fast(model, memory=memory), flush=True)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    times = []
    for epoch in range(3 + epochs):   # the first three compile and record
        sync(device)
        t = time.perf_counter()
        for b in batches:
            loss = model.step_loss(b)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
        sync(device)
        times.append(time.perf_counter() - t)
    return dict(useful_tokens=sum(len(e["input_ids"]) for e in examples), loss=loss.item(), updates=len(batches),
                computed_tokens=sum(b["input_ids"].numel() for b in batches), times=times)


def measure(way, folder, device, repeat, epochs):
    import torch
    from qlora_nb.base.core import versions
    how = WAYS[way]
    r = ours(folder, device, repeat, epochs, **how) if how else article(folder, device, repeat, epochs)
    times = r.pop("times")
    first, seconds = times[:-epochs], statistics.median(times[-epochs:])
    row = dict(way=way, **r, rows=len(ROWS)*repeat, epochs=epochs, epoch_s=seconds, warmup_s=sum(first) - len(first)*seconds,
               useful_tokens_per_s=r["useful_tokens"]/seconds, useful_share=r["useful_tokens"]/r["computed_tokens"],
               peak_allocated_gb=peak(device), ok=True, error=None)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print("\nROW " + json.dumps(dict(row=row, hardware=gpu, versions=versions())), flush=True)


def line(r):
    if not r["ok"]: return f"{r['way']:40} {r['error'][:100]}"
    gb = f"{r['peak_allocated_gb']:6.2f} GB" if r["peak_allocated_gb"] else ""
    return f"{r['way']:40} {r['rows']:5} rows {r['useful_tokens_per_s']:9.0f} useful tokens/s " \
           f"({r['useful_share']:.0%} of those computed), {r['updates']} updates in {r['epoch_s']:.2f} s, " \
           f"first {r['warmup_s']:.1f} s more {gb} loss {r['loss']:.3f}"


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--models", type=Path, default=Path("/dev/shm/models"))
    ap.add_argument("--size", default="falcon-rw-1b", choices=SIZES)
    ap.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    ap.add_argument("--repeat", nargs="+", type=int, default=[32])
    ap.add_argument("--epochs", type=int, default=5)
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--gpu", default=None)
    ap.add_argument("--limit", type=float, default=float("inf"), help="seconds, after which no process is started")
    ap.add_argument("--patience", type=float, default=240, help="seconds, after which a process is ended")
    ap.add_argument("--one", help=argparse.SUPPRESS)
    args = ap.parse_args()
    folder = (args.models/f"{args.size}-bf16").resolve()
    if args.one == "make": return make(folder, args.size, args.device)
    if args.one: return measure(args.one, str(folder), args.device, args.repeat[0], args.epochs)
    t0, doc = time.monotonic(), dict(hardware=None, versions={}, rows=[])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.gpu is not None: env["CUDA_VISIBLE_DEVICES"] = args.gpu
    def run(way, repeat):
        cmd = [sys.executable, __file__, str(args.out), "--one", way, "--models", str(args.models), "--size", args.size,
               "--device", args.device, "--repeat", str(repeat), "--epochs", str(args.epochs)]
        try: return subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=args.patience)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(cmd, 124, "", f"not done after {args.patience:g} s")
    if not folder.exists():
        args.models.mkdir(parents=True, exist_ok=True)
        if (res := run("make", 1)).returncode: raise SystemExit(f"no model was written: {res.stderr[-1500:]}")
        print(f"the model was written in {time.monotonic() - t0:.0f} s", flush=True)
    for repeat in args.repeat:
        for way in args.ways:
            if time.monotonic() - t0 > args.limit: print(f"not started within {args.limit:g} s: {way}"); continue
            res = run(way, repeat)
            said = [json.loads(o[4:]) for o in res.stdout.splitlines() if o.startswith("ROW {")]
            row = said[-1]["row"] if said else dict(way=way, rows=len(ROWS)*repeat, ok=False,
                                                    error=" ".join(res.stderr.split())[-300:])
            if said: doc |= {k: said[-1][k] for k in ("hardware", "versions")}
            doc["rows"].append(row)
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(doc, indent=1) + "\n")
            os.replace(part, args.out)
            print(line(row), flush=True)


if __name__ == "__main__": main()
