"""Memory and time of `finetune` against the number of rows, on short rows and a tiny model: is it constant?

    python nbs/experiments/many_rows.py nbs/results/many_rows.json --rows 10000 100000 1000000
    python nbs/experiments/many_rows.py nbs/results/many_rows.json --rows 10000 100000 --large false              # as lists
    python nbs/experiments/many_rows.py nbs/results/many_rows.json --rows 10000 100000 --command --packing true   # of the command

Each run is a process of its own, which trains two steps on a hundred rows first, so that what is loaded only once is there.
What counts is how much more memory it has at its peak than then: `anonymous` is what only a larger memory could hold
(RssAnon of Linux), `file` are pages of mapped files, which the system takes back when it needs the room. Seconds are those of
the processor. `--large` and `--packing` are options of the command; rows of other settings in the file are kept.
"""
import argparse, contextlib, io, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path

PHASES = (("training.finetune", "load_rows"), ("evaluation.evaluation", "load_rows"), ("evaluation.evaluation", "rows_to_score"),
          ("training.schedule", "encode_rows"), ("training.finetune", "prepare"), ("training.finetune", "train_run"))


def resident():
    "Bytes of this process: (anonymous, of files)."
    lines = (o.split() for o in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    found = {o[0]: int(o[1])*1024 for o in lines if o[0].startswith("Rss")}
    return found["RssAnon:"], found["RssFile:"]


class Watch:
    "The peak of `resident` in a block beyond what there was before, looked at every few milliseconds; phases by name."
    def __enter__(self):
        self.start, self.peak, self.phases, self.inside, self.over = resident(), [0, 0], {}, [], threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self
    def look(self):
        while not self.over.wait(.01): self.see()
    def see(self):
        now = [o - was for o, was in zip(resident(), self.start)]
        self.peak = list(map(max, self.peak, now))
        for o in [*self.inside]: self.phases[o]["anonymous"] = max(self.phases[o]["anonymous"], now[0])
    def __exit__(self, *args):
        self.over.set(), self.thread.join()
    def add(self, module, name):
        "Measure the calls of a function: seconds of the processor, and the peak of what is anonymous."
        f = getattr(module, name)
        def g(*args, **how):
            found = self.phases.setdefault(name, dict(seconds=0, anonymous=0))
            self.inside.append(name)
            start = time.process_time()
            try: return f(*args, **how)
            finally:
                self.see()
                self.inside.remove(name)
                found["seconds"] = round(found["seconds"] + time.process_time() - start, 1)
        setattr(module, name, g)


def write_rows(path, n):
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n): f.write(json.dumps(dict(prompt=f"What comes after {i}?", response=str(i + 1))) + "\n")
    return path


def save_tiny(folder):
    "A tiny model whose vocabulary is tiny as well: with a real one, a step would take far more than the rows do."
    from qlora_nb.base.model_files import load_tokenizer, tiny_model
    tokenizer = load_tokenizer().train_new_from_iterator([f"What comes after {i}?" for i in range(1000)], 400)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)


def run(n, command, options):
    "One run in this process, what it took, and what the table of the rows takes on the disk."
    from importlib import import_module
    from qlora_nb.apps.cli import finetune_main
    from qlora_nb.training.settings import check_settings as _   # of a package whose functions are wrapped
    from qlora_nb.training.finetune import finetune
    modules = {o: import_module(f"qlora_nb.{o}") for o, _ in PHASES}
    with tempfile.TemporaryDirectory() as folder:
        import datasets
        datasets.config.HF_DATASETS_CACHE = str(cache := Path(folder)/"cache")
        datasets.disable_progress_bars()
        save_tiny(f"{folder}/model")
        how = dict(model=f"{folder}/model", max_steps=2, fast=False, device="cpu") | options
        def one(data, name):
            o = how | dict(data=str(data), output_dir=f"{folder}/{name}")
            if not command: return finetune(**o, progress=False)
            argv = [v for k, v in o.items() for v in (f"--{k.replace('_', '-')}", str(v).lower() if v in (True, False) else str(v))]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): finetune_main(argv)
        one(write_rows(Path(folder)/"few.jsonl", 100), "few")
        file = write_rows(Path(folder)/"rows.jsonl", n)
        with Watch() as watch:
            for module, name in PHASES: watch.add(modules[module], name)
            start = time.process_time()
            one(file, "run")
            seconds = time.process_time() - start
        disk = sum(o.stat().st_size for o in cache.rglob("*.arrow"))
        return dict(rows=n, command=command, options=options, anonymous=watch.peak[0], file=watch.peak[1], seconds=round(seconds, 1),
                    phases=watch.phases, bytes=file.stat().st_size, tables=disk)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    p.add_argument("--command", action="store_true", help="qlora_finetune, which holds rows out and scores them")
    p.add_argument("--large", type=json.loads), p.add_argument("--packing", type=json.loads)
    p.add_argument("--one", action="store_true", help="used by the script itself")
    a = p.parse_args()
    options = {k: v for k in ("large", "packing") if (v := getattr(a, k)) is not None}
    if a.one: return print("found", json.dumps(run(a.rows[0], a.command, options)))
    from qlora_nb.base.core import cpu_kind, versions
    for n in a.rows:
        argv = [sys.executable, *(o for o in sys.argv if not o.isdigit() and o != "--rows"), "--rows", str(n), "--one"]
        said = subprocess.run(argv, env=os.environ | dict(HF_HUB_OFFLINE="1"), stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(next(o for o in said.splitlines() if o.startswith("found")).removeprefix("found"))
        doc = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(rows=[])
        key = ("rows", "command", "options")
        doc["rows"] = [o for o in doc["rows"] if [o[k] for k in key] != [row[k] for k in key]] + [row]
        doc["rows"].sort(key=lambda o: (o["command"], json.dumps(o["options"]), o["rows"]))
        a.out.write_text(json.dumps(doc | dict(cpu=cpu_kind(), versions=versions()), indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row))


if __name__ == "__main__": main()
