"""The main job, `qlora_finetune` with its defaults, timed phase by phase on this processor.

    python nbs/experiments/main_job.py nbs/results                                  # this processor
    python tools/plain_cpu.py python nbs/experiments/main_job.py nbs/results        # as on one without AVX-512
    python nbs/experiments/main_job.py nbs/results --seeds 0 1 2 --options '{"fast": false}' --name usual

Each run is a process of its own. Its `run.json` is kept as finetune_cpu.json (AVX512-BF16) or finetune_cpu_avx2.json,
for the first seed and the default options; what each phase took goes into main_job.json, one row for each kind of
processor, name and seed. Imports are counted, installing and fetching the model are not.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TRAINING, EVALUATION = "qlora_nb.training.finetune", "qlora_nb.evaluation.evaluation"
PHASES = (TRAINING, "load_base"), (TRAINING, "prepare"), (EVALUATION, "answer_rows"), (EVALUATION, "mark_rows")
FILES = {"AVX512-BF16": "finetune_cpu", "AVX2": "finetune_cpu_avx2"}


def timed(module, name, found):
    "Add the seconds of each call of a function to `found[name]`."
    f = getattr(module, name)
    def g(*args, **how):
        start = time.perf_counter()
        try: return f(*args, **how)
        finally: found.setdefault(name, []).append(round(time.perf_counter() - start, 1))
    setattr(module, name, g)


def run(seed, options):
    "One run in this process: (what each phase took, what run.json holds)."
    start, took = time.perf_counter(), {}
    from qlora_nb.evaluation import evaluation
    from qlora_nb.training import finetune as _  # loads it
    took["imports"] = round(time.perf_counter() - start, 1)
    for module, name in PHASES: timed(sys.modules[module], name, took)
    with tempfile.TemporaryDirectory() as folder:
        report = evaluation.finetune_and_evaluate(output_dir=f"{folder}/run", device="cpu", seed=seed, progress=False, **options)
        info = json.loads((report.run.folder/"run.json").read_text(encoding="utf-8"))
    took["answer_losses"] = took.pop("mark_rows")
    info |= dict(adapter="runs/.../adapter", loss_curve="runs/.../loss.png")   # of a folder that is gone
    took |= dict(training=info["train_seconds"], in_all=round(time.perf_counter() - start, 1))
    return took, info


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--options", type=json.loads, default={}), p.add_argument("--name", default="default")
    p.add_argument("--one", action="store_true", help="used by the script itself")
    a = p.parse_args()
    if not a.one:
        for seed in a.seeds:
            how = ["--seeds", str(seed), "--options", json.dumps(a.options), "--name", a.name, "--one"]
            subprocess.run([sys.executable, __file__, str(a.out), *how], check=True)
        return
    took, info = run(a.seeds[0], a.options)
    if hasattr(os, "sched_getaffinity"): info["versions"]["cores"] = len(os.sched_getaffinity(0))   # what this run may use
    kind, file = info["versions"]["cpu"], a.out/"main_job.json"
    doc = json.loads(file.read_text(encoding="utf-8")) if file.exists() else dict(rows=[])
    row = dict(cpu=kind, name=a.name, seed=a.seeds[0], steps=info["steps"], seconds=took, exact_match=info["after"]["exact_match"],
               answer_loss=info["after"]["answer_loss"], peak_memory_gb=info["peak_memory_gb"], versions=info["versions"])
    key = ("cpu", "name", "seed")
    doc["rows"] = [r for r in doc["rows"] if [r[k] for k in key] != [row[k] for k in key]] + [row]
    file.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
    if a.name == "default" and a.seeds[0] == 0 and kind in FILES:
        (a.out/f"{FILES[kind]}.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row))


if __name__ == "__main__": main()
