"""How fast is one QLoRA training step, and in how much memory? Each peer in a process of its own, in turns.

    python benchmarks/step.py --make --models /dev/shm/models --shapes llama-3-8b          # once: random weights in NF4
    python benchmarks/step.py benchmarks/results/step.json --models /dev/shm/models --shapes llama-3-8b \
        [--peers ours peft unsloth] [--batches 1 2 8] [--seqs 2048] [--memory 0 0.5 1] [--rounds 3] [--gpu 0 1] [--limit 500]

All peers load the same packed bytes and take the same steps: LoRA of rank 16 on every linear layer, bfloat16, fused
AdamW, the same token ids, all of them labels. Steps are timed after a warm-up, compiling included in that; a row holds
the median and the quartiles of all rounds. Peaks are those of the timed steps; of ours, which replays recordings whose
memory counts while they are made, those of all steps. `--gpu` with several numbers runs a process on each at a time.
`--peers-path` is a folder with Unsloth and Liger, which only their own processes see.
"""
import argparse, contextlib, gc, importlib.metadata, json, math, os, queue, statistics, subprocess, sys, tempfile, threading
import time
from pathlib import Path

LLAMA = dict(num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
             rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=2)
SHAPES = {
    "falcon-rw-1b": ("FalconConfig", dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, alibi=True,
        num_attention_heads=32, bias=True, multi_query=False, parallel_attn=False, new_decoder_architecture=False,
        bos_token_id=1, eos_token_id=2)),
    "llama-3.2-1b": ("LlamaConfig", LLAMA | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        head_dim=64, tie_word_embeddings=True)),
    "llama-3-8b": ("LlamaConfig", LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        head_dim=128, tie_word_embeddings=False)),
    "tiny": ("LlamaConfig", LLAMA | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=49152,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)),
    "tiny-falcon": ("FalconConfig", dict(vocab_size=49152, hidden_size=64, num_hidden_layers=2, alibi=True,
        num_attention_heads=4, bias=True, multi_query=False, parallel_attn=False, new_decoder_architecture=False))}
TARGETS = dict(LlamaConfig="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
               FalconConfig="query_key_value dense dense_h_to_4h dense_4h_to_h".split())
WAYS = {"ours": ("device", "host", "host-not-recorded"),
        "unsloth": ("unsloth",), "unsloth-none": ("off",), "unsloth-small-loss": ("unsloth",),
        "peft": ("on", "off"), "trl": ("on", "off"), "liger": ("on", "off"), "peft+compile": ("on", "off"),
        "peft+regions": ("on", "off")}
ENV = dict(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
LR, ROOT = 2e-4, Path(__file__).resolve().parent.parent


def make(shape, folder, device):
    "Random weights, made where they are packed, in a folder that `from_pretrained` takes for an NF4 checkpoint."
    import bitsandbytes as bnb, torch, transformers
    from safetensors.torch import save_file
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.base.nf4_config import nf4_config, plain_linears, quiet
    t0, (kind, fields) = time.perf_counter(), SHAPES[shape]
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    with torch.device(device), plain_linears(), quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, m in list(model.named_modules()):
        if not isinstance(m, torch.nn.Linear) or name == "lm_head": continue
        new = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=m.bias is not None, device="meta",
                                compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
        new.weight = bnb.nn.Params4bit(m.weight.data, requires_grad=False, quant_type="nf4", blocksize=64,
                                       compress_statistics=True, module=new).to(device)
        if m.bias is not None: new.bias = m.bias
        model.set_submodule(name, new)
        del m
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings: state.pop("lm_head.weight", None)
    part = folder.with_name(folder.name + ".part")   # a folder without an end is never taken for a model
    part.mkdir(parents=True, exist_ok=True)
    save_file(state, part/"model.safetensors", metadata=dict(format="pt"))
    how = nf4_config(torch.bfloat16)
    how.llm_int8_skip_modules = ["lm_head"]
    config.dtype, config.quantization_config = torch.bfloat16, how.to_dict()
    config.architectures = [type(model).__name__]
    config.save_pretrained(part), load_tokenizer().save_pretrained(part)
    part.replace(folder)
    gb = sum(o.stat().st_size for o in folder.iterdir())/1e9
    print(f"{shape}: {gb:.2f} GB in {time.perf_counter() - t0:.0f} s", flush=True)


class Clock:
    "Times steps, the first few apart; peaks are counted from the end of those, or with them."
    def __init__(self, device, warmup, all_peaks):
        self.cuda, self.warmup, self.warmup_s, self.n, self.t, self.times = device == "cuda", warmup, None, 0, None, []
        self.all_peaks = all_peaks

    def now(self):
        import torch
        if not self.cuda: return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        if self.t is None: self.t = time.perf_counter()
        self.began = self.now()

    def stop(self):
        self.n += 1
        if self.n > self.warmup: self.times.append((self.began, self.now()))
        if self.cuda: import torch; torch.cuda.synchronize()
        if self.n == self.warmup:
            self.warmup_s = time.perf_counter() - self.t
            if not self.all_peaks: reset_peaks(self.cuda)

    def ms(self): return [a.elapsed_time(b) if self.cuda else 1e3*(b - a) for a, b in self.times]


def gpu_ms(work):
    "Milliseconds that the GPU takes for what `work` asks of it."
    import torch
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(), work(), end.record(), torch.cuda.synchronize()
    return start.elapsed_time(end)


def reset_peaks(cuda):
    if not cuda: return
    import torch
    gc.collect(), torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError): torch._C._host_emptyCache()   # or pinned memory of the batch before would count
    torch.cuda.reset_peak_memory_stats(), torch.cuda.reset_peak_host_memory_stats()


def peaks(cuda):
    import torch
    if not cuda: return {}
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)   # owned; the bytes in use are not counted right
    return dict(peak_allocated_gb=torch.cuda.max_memory_allocated()/1e9,
                peak_reserved_gb=torch.cuda.max_memory_reserved()/1e9, pinned_host_gb=pinned/1e9)


def lora(job):
    from peft import LoraConfig
    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                      target_modules=TARGETS[SHAPES[job["shape"]][0]])


def load(job):
    "The packed model, as transformers loads it; Falcon's layers too are 4-bit ones."
    import torch
    from transformers import AutoModelForCausalLM
    from qlora_nb.base.nf4_config import plain_linears
    from qlora_nb.foundations.loading import audit_4bit, disable_cpu_repacking
    torch.manual_seed(0)   # the adapters that follow
    with plain_linears():
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16, attn_implementation="sdpa",
                                                     device_map={"": 0 if job["device"] == "cuda" else "cpu"})
    if job["device"] == "cpu": disable_cpu_repacking(model)
    audit_4bit(model)
    model.config.use_cache = False
    return model


def with_peft(model, job):
    "As PEFT documents QLoRA."
    from peft import get_peft_model, prepare_model_for_kbit_training
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job["way"] == "on",
                                            gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return get_peft_model(model, lora(job)).train()


def loop(model, job, autocast=True, **inputs):
    "A plain training loop over a model that returns its loss: (ids, clock) → the last loss."
    import torch
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=LR, fused=True)
    cast = (lambda: torch.autocast(job["device"], dtype=torch.bfloat16)) if autocast else contextlib.nullcontext
    def run(ids, clock):
        for p in params: p.grad = None
        for _ in range(job["warmup"] + job["steps"]):
            clock.start()
            with cast(): loss = model(input_ids=ids, labels=ids, **{k: f(ids) for k, f in inputs.items()}).loss
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            clock.stop()
        return loss.item()
    return run


def ours(job):
    import torch
    from peft import get_peft_model
    from qlora_nb.speed.fast_training import make_fast
    model = get_peft_model(load(job), lora(job)).train()
    class Loss(torch.nn.Module):   # what `loop` calls
        parameters = staticmethod(model.parameters)
        def forward(self, **batch): return argparse.Namespace(loss=model.step_loss(batch))
    run = loop(Loss(), job, autocast=False)
    def anew(ids, clock):   # without what was recorded for another batch
        make_fast(model, memory=job["memory"], offload="host" in job["way"], record=False if "not" in job["way"] else None)
        gc.collect(), reset_peaks(job["device"] == "cuda")
        return run(ids, clock)
    return anew


def peft(job): return loop(with_peft(load(job), job), job)


def peft_compile(job):
    model = with_peft(load(job), job)
    if job["peer"] == "peft+regions":   # accelerate's regional compilation: each of the repeated layers
        for m in model.modules():
            if hasattr(m, "self_attn") or hasattr(m, "self_attention"): m.compile(dynamic=False)
    else: model.compile(dynamic=False)
    return loop(model, job)


def liger(job):
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    model = load(job)
    if model.config.model_type not in known: raise NotImplementedError(f"Liger does not know {model.config.model_type}")
    _apply_liger_kernel_to_instance(model=model)
    return loop(with_peft(model, job), job)


def unsloth(job):
    from unsloth import FastLanguageModel   # first: it changes the others
    import torch
    from qlora_nb.base.nf4_config import plain_linears
    from qlora_nb.foundations.loading import audit_4bit
    with plain_linears():
        model, _ = FastLanguageModel.from_pretrained(job["folder"], max_seq_length=max(job["seqs"]), load_in_4bit=True,
                                                     dtype=torch.bfloat16)
    audit_4bit(model)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS[SHAPES[job["shape"]][0]],
        use_gradient_checkpointing="unsloth" if job["way"] == "unsloth" else False)
    model = FastLanguageModel.for_training(model) or model
    return loop(model, job, attention_mask=torch.ones_like)


def trl(job):
    "TRL's trainer as it is, except that rows come in order; its loss makes no matrix of all scores."
    import torch, trl as lib
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    class Ticks(TrainerCallback):
        def __init__(self, clock): self.clock = clock
        def on_step_begin(self, *args, **kw): self.clock.start()
        def on_step_end(self, *args, **kw): self.clock.stop()
    class Trainer(lib.SFTTrainer):
        def _get_train_sampler(self, dataset=None): return torch.utils.data.SequentialSampler(self.train_dataset)
        def training_step(self, *args, **kw):
            self.last_loss = super().training_step(*args, **kw)
            return self.last_loss
    model, config, tok = load(job), lora(job), AutoTokenizer.from_pretrained(job["folder"])
    def run(ids, clock):
        nonlocal model, config
        n = job["warmup"] + job["steps"]
        with tempfile.TemporaryDirectory() as out:
            args = lib.SFTConfig(
                output_dir=out, per_device_train_batch_size=len(ids), max_length=ids.shape[1], max_steps=n,
                logging_steps=n, bf16=True, gradient_checkpointing=job["way"] == "on", learning_rate=LR,
                optim="adamw_torch_fused",
                gradient_checkpointing_kwargs=dict(use_reentrant=False) if job["way"] == "on" else None,
                lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=job["device"] == "cpu")
            rows = Dataset.from_dict(dict(input_ids=ids.tolist()*n))
            trainer = Trainer(model, args=args, train_dataset=rows, processing_class=tok, peft_config=config,
                              callbacks=[Ticks(clock)])
            model, config = trainer.model, None   # with adapters from now on
            trainer.train()
            return float(trainer.last_loss)
    return run


PEERS = {"ours": ours, "peft": peft, "trl": trl, "liger": liger, "unsloth": unsloth, "unsloth-none": unsloth,
         "unsloth-small-loss": unsloth, "peft+compile": peft_compile, "peft+regions": peft_compile}


def say(kind, **what): print(f"\n{kind} {json.dumps(what)}", flush=True)


def near_gpu():
    "Bind this process to the CPUs beside its GPU, where the system tells: pinned memory on the other side is slower."
    import torch
    with contextlib.suppress(OSError, ValueError, AttributeError):
        p = torch.cuda.get_device_properties(0)
        name = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
        ends = [list(map(int, o.split("-"))) for o in Path(f"/sys/bus/pci/devices/{name}/local_cpulist").read_text().split(",")]
        os.sched_setaffinity(0, {c for e in ends for c in range(e[0], e[-1] + 1)} & os.sched_getaffinity(0))


def about(job):
    from qlora_nb.base.core import versions
    found = versions()
    for o in ("triton", "unsloth", "unsloth_zoo", "liger_kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError): found[o] = importlib.metadata.version(o)
    say("ABOUT", hardware=hardware(job), versions=found)


def hardware(job):
    import torch
    return torch.cuda.get_device_name() if job["device"] == "cuda" else "CPU"


def measure(job):
    "One process: one peer on one shape, for each batch; a row is printed as soon as it is known."
    error = None
    try:
        if job["device"] == "cuda": near_gpu()
        run = PEERS[job["peer"]](job)
    except Exception as e: error = describe(e)
    import torch
    if job["device"] == "cuda" and not torch.cuda.is_available(): error = error or "there is no GPU"
    about(job)
    sizes = [(b, seq) for seq in sorted(job["seqs"]) for b in sorted(job["batches"])]
    if error: return [say("ROW", batch=b, seq=seq, ok=False, error=error) for b, seq in sizes]
    cuda = job["device"] == "cuda"
    base = torch.cuda.memory_allocated()/1e9 if cuda else None
    ids = torch.randint(0, 32000, (max(job["batches"]), max(job["seqs"])), generator=torch.Generator().manual_seed(0))
    for batch, seq in sizes:
        clock = Clock(job["device"], job["warmup"], job["peer"] == "ours")
        row = dict(batch=batch, seq=seq, base_gb=base, hardware=hardware(job))
        with contextlib.suppress(AttributeError): torch._dynamo.reset()   # each length of batch is compiled for itself
        reset_peaks(cuda)
        try:
            loss = run(ids[:batch, :seq].to(job["device"]), clock)
            if not math.isfinite(loss): raise ArithmeticError(f"its loss is {loss}")
            row |= dict(ok=True, error=None, ms=clock.ms(), warmup_s=clock.warmup_s, loss=loss, **peaks(cuda))
        except Exception as e: row |= dict(ok=False, error=describe(e))
        say("ROW", **row)
        gc.collect()


def describe(e):
    if type(e).__name__ == "OutOfMemoryError" or "out of memory" in str(e): return "out of memory"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def start(job, args, gpu, tell):
    "Run `measure` in a process; `tell(kind, what)` for all it says. A batch it says nothing of becomes an error."
    env = {**os.environ, **ENV, "CUDA_VISIBLE_DEVICES": str(gpu)}
    outside = job["peer"].startswith(("unsloth", "liger")) and args.peers_path
    paths = [args.peers_path.resolve() if outside else None, ROOT, os.environ.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(str(o) for o in paths if o)
    if job["peer"] == "unsloth-small-loss": env["UNSLOTH_CE_LOSS_TARGET_GB"] = str(args.loss_gb)
    said, error = [], None
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryDirectory() as work:   # Unsloth writes where it runs
        process = subprocess.Popen([sys.executable, Path(__file__).resolve(), "-", "--one", json.dumps(job)], env=env,
                                   stdout=subprocess.PIPE, stderr=err, text=True, cwd=work, errors="replace")
        timer = threading.Timer(args.patience, process.kill)
        timer.start()
        for line in process.stdout:
            kind, _, rest = line.partition(" ")
            if kind not in ("ABOUT", "ROW"): continue
            what = json.loads(rest)
            if kind == "ROW": said.append((what["batch"], what["seq"]))
            tell(kind, what)
        rc = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        err.seek(0)
        last = err.read()[-3000:]
    if missing := [(b, seq) for seq in job["seqs"] for b in job["batches"] if (b, seq) not in said]:
        if args.verbose or not late: print(last, file=sys.stderr)
        error = f"not done after {args.patience:g} s" if late else f"the process ended with {rc}: {last.strip()[-200:]}"
        for b, seq in missing: tell("ROW", dict(batch=b, seq=seq, ok=False, error=error))


KEY = ("peer", "shape", "batch", "seq", "checkpointing", "memory")
PEAKS = ("peak_allocated_gb", "peak_reserved_gb", "pinned_host_gb", "base_gb")
FOUND = ("hardware", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "step_ms", *PEAKS, "warmup_s", "loss")


def summary(key, runs):
    "One row from what the rounds have said: a failure only where no round succeeded."
    row, good = dict(zip(KEY, key)), [r for r in runs if r["ok"]]
    if not good: return row | dict.fromkeys(FOUND) | dict(rounds=len(runs), ok=False, error=runs[-1]["error"])
    low, mid, high = statistics.quantiles([t for r in good for t in r["ms"]], n=4, method="inclusive")
    tokens = row["batch"]*row["seq"]
    def top(k): return max((r[k] for r in good if r.get(k) is not None), default=None)
    return row | dict(tokens_per_s=1e3*tokens/mid, tokens_per_s_low=1e3*tokens/high, tokens_per_s_high=1e3*tokens/low,
                      step_ms=mid, hardware=good[-1]["hardware"], **{k: top(k) for k in PEAKS},
                      warmup_s=statistics.median(r["warmup_s"] for r in good), loss=good[-1]["loss"],
                      rounds=len(good), ok=True, error=None if len(good) == len(runs) else "a round failed")


def line(r):
    "A row, for a person."
    how = r["checkpointing"] if r["memory"] is None else f"memory {r['memory']:g}" + r["checkpointing"].replace("device", "").replace("host", ", host", 1)
    head = f"{r['peer']:18} {r['shape']:13} {how:29} {r['batch']:2} x {r['seq']}"
    if not r["ok"]: return f"{head}  {r['error'][:90]}"
    gb = "".join(f"{r[k]:7.2f}" if r[k] is not None else "      -" for k in PEAKS)
    return f"{head} {r['tokens_per_s']:8.0f} {r['step_ms']:9.1f}{gb} {r['warmup_s']:6.1f} {r['loss']:8.4f}"


HEAD = f"{'peer':18} {'shape':13} {'checkpoints':29} {'batch':9}{'tokens/s':>7} {'ms':>9} {'alloc.':>6} {'resv.':>6} " \
       f"{'pinned':>6} {'base':>6} {'warm':>6} {'loss':>8}   (GB, s)"


def jobs(args):
    "Round after round, so that a run cut short has measured everything at least once."
    for shape in args.shapes:
        for peer in args.peers:
            for way in WAYS[peer]:
                if way == "off" and len(WAYS[peer]) > 1 and peer not in args.without: continue
                if peer.startswith("unsloth") and "falcon" in shape: continue   # not among its models
                for memory in [None] if peer != "ours" else args.host if "host" in way else args.memory:
                    if "not" in way and memory != max(args.host): continue   # recording costs a little memory: how much?
                    yield dict(peer=peer, shape=shape, way=way, memory=memory,
                               folder=str((args.models/shape).resolve()), batches=sorted(args.batches),
                               seqs=sorted(args.seqs), device=args.device, warmup=args.warmup, steps=args.steps)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path, nargs="?")
    ap.add_argument("--models", type=Path, default=Path("/dev/shm/models"))
    ap.add_argument("--make", action="store_true", help="write the models and end")
    ap.add_argument("--shapes", nargs="+", default=["llama-3-8b"], choices=SHAPES)
    ap.add_argument("--peers", nargs="+", default=["ours", "peft"], choices=WAYS)
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8])
    ap.add_argument("--seqs", nargs="+", type=int, default=[2048], help="tokens of a row")
    ap.add_argument("--memory", nargs="+", type=float, default=[0, 0.5, 0.85, 1], help="ours: how much to keep")
    ap.add_argument("--host", nargs="*", type=float, default=[0, 0.25], help="ours: how much to keep in memory of the host")
    ap.add_argument("--without", nargs="*", default=["peft"], help="peers that run without checkpointing as well")
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--warmup", type=int, default=4)
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--gpu", nargs="+", default=["0"], help="each runs one process at a time")
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--limit", type=float, default=float("inf"), help="seconds, after which no process is started")
    ap.add_argument("--patience", type=float, default=300, help="seconds, after which a process is ended")
    ap.add_argument("--peers-path", type=Path)
    ap.add_argument("--loss-gb", type=float, default=0.5, help="unsloth-small-loss: GB for a piece of the scores")
    ap.add_argument("--add", action="store_true", help="keep the rows that the file has and this run does not measure")
    ap.add_argument("--verbose", action="store_true")
    ap.add_argument("--one", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.one: return measure(json.loads(args.one))
    if args.make:
        for o in args.shapes:
            if not (args.models/o).exists(): make(o, args.models/o, args.device)
        return
    if not args.out: ap.error("a file for the results is needed")
    if gone := [o for o in args.shapes if not (args.models/o).exists()]:
        ap.error(f"{args.models} has no {', '.join(gone)}: run this with --make first")
    t0, found, lock, todo = time.monotonic(), {}, threading.Lock(), queue.Queue()
    doc = dict(hardware=None, versions={}, rows=[])
    if args.add and args.out.exists(): doc = json.loads(args.out.read_text())
    old = doc["rows"]

    def write():
        new = [summary(k, v) for k, v in found.items()]
        doc["rows"] = [r for r in old if tuple(r[k] for k in KEY) not in found] + new
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(doc, indent=1) + "\n")
        os.replace(part, args.out)

    def listen(job):
        def tell(kind, what):
            with lock:
                if kind == "ABOUT":
                    doc["hardware"] = what["hardware"]
                    doc["versions"].setdefault(job["peer"], {}).update(what["versions"])
                    return
                key = (job["peer"], job["shape"], what["batch"], what["seq"], job["way"], job["memory"])
                found.setdefault(key, []).append(what)
                write()
                print(f"{time.monotonic() - t0:5.0f} s  {line(summary(key, [what]))}", flush=True)
        return tell

    for _ in range(args.rounds):
        for job in jobs(args): todo.put(job)
    total = todo.qsize()

    def work(gpu):
        while time.monotonic() - t0 < args.limit:
            try: job = todo.get_nowait()
            except queue.Empty: return
            try: start(job, args, gpu, listen(job))
            except Exception as e: print(f"{job['peer']}: {describe(e)}", file=sys.stderr, flush=True)

    workers = [threading.Thread(target=work, args=[g]) for g in args.gpu]
    for o in workers: o.start()
    for o in workers: o.join()
    if left := todo.qsize(): print(f"{left} of {total} processes were not started within {args.limit:g} s", flush=True)
    if not found: raise SystemExit("nothing was measured; nothing is written.")
    print(HEAD, *map(line, doc["rows"]), sep="\n")


if __name__ == "__main__": main()
