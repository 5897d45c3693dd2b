"""Does the fast step learn the same? SmolLM2 on the support tickets with `fast` and without, from the same seeds.

    python benchmarks/curves.py benchmarks/results/curves.json [--steps 150] [--seeds 0 1] [--ways usual fast float32]

`float32` is the usual step in 32 bits, and the judge of the others. `scratch` is the usual step on this course's own
layers, the same mathematics once more in another order. Rows of other ways in the file are kept.
"""
import argparse, json, tempfile
from pathlib import Path

import torch


def main():
    from qlora_nb.base.core import versions
    from qlora_nb.training.data import load_rows
    from qlora_nb.evaluation.evaluation import evaluate
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.training.finetune import finetune
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--steps", type=int, default=150)
    ap.add_argument("--seeds", nargs="+", type=int, default=[0])
    ap.add_argument("--eval-rows", type=int, default=256)
    ap.add_argument("--ways", nargs="+", default=["usual", "scratch", "fast"])
    args = ap.parse_args()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    doc, held = dict(hardware=hardware, versions=versions(), rows=[]), load_rows("tickets", "test")[:args.eval_rows]
    if args.out.exists(): doc["rows"] = json.loads(args.out.read_text())["rows"]
    for seed in args.seeds:
        for way in args.ways:
            if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
            backend = "scratch" if way == "scratch" else "bnb"
            how = dict(packing=True, per_device_train_batch_size=1, max_length=512) if "packing" in way else {}
            if way == "float32": how = dict(model=load_model(dtype=torch.float32), tokenizer=load_tokenizer())
            with tempfile.TemporaryDirectory() as folder:
                run = finetune(output_dir=Path(folder)/"run", max_steps=args.steps, seed=seed, fast="fast" in way, backend=backend,
                               progress=False, **how)
                peak = torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else None
                score = evaluate(run.model, run.tokenizer, held, batch_size=64)
            row = dict(way=way, hardware=hardware, seed=seed, losses=run.info["losses"], peak_gb=peak,
                       train_seconds=run.info["train_seconds"], exact_match=score.exact_match, answer_loss=score.answer_loss)
            doc["rows"] = [r for r in doc["rows"] if (r["way"], r["seed"]) != (way, seed)] + [row]
            args.out.write_text(json.dumps(doc, indent=1) + "\n")
            print({k: v for k, v in row.items() if k != "losses"}, row["losses"][:2], row["losses"][-1], flush=True)


if __name__ == "__main__": main()
