"""How long does one row take to be multiplied with a 4-bit weight? The kernel of `73_kernels` beside bitsandbytes and a 16-bit weight. CUDA.

    python benchmarks/decode.py benchmarks/results/decode.json [--sweep]

Each way multiplies with as many copies of a weight as do not fit into the cache, one after another, recorded as one CUDA
graph; the ways take turns. `eager_us` is the time of a call from Python. `off` is the distance from the product in 64
bits. `--sweep` also tries other sizes of the kernel and prints them.
"""
import argparse, itertools, json, statistics
from pathlib import Path

import torch
import bitsandbytes as bnb
from step import gpu_ms
from qlora_nb.base.core import versions
from qlora_nb.speed.kernels import bytes_moved, dequantize_nf4, multiply_nf4

SHAPES = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]   # of Llama-3-8B, and of a 70B's MLP


def quantized(N, K):
    w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)*.02
    return bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)


def recorded(call):
    "A function that replays `call`, after three rehearsals."
    for _ in range(3): call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): call()
    graph.replay()
    return graph.replay


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--sweep", action="store_true")
    ap.add_argument("--rounds", type=int, default=30)
    args = ap.parse_args()
    torch.manual_seed(0)
    doc = dict(hardware=torch.cuda.get_device_name(), versions=versions(), rows=[])
    for N, K in SHAPES:
        n = min(64, int(200e6/bytes_moved(N*K, 0)) + 2)
        weights, x = [quantized(N, K) for _ in range(n)], torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
        dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16)*.02 for _ in range(min(n, 8))]
        ways = {"ours": lambda: [multiply_nf4(x, q, s) for q, s in weights],
                "bitsandbytes": lambda: [bnb.matmul_4bit(x, q.t(), quant_state=s) for q, s in weights],
                "bitsandbytes, gemv_4bit": lambda: [bnb.functional.gemv_4bit(x, q.t(), state=s) for q, s in weights],
                "16 bits": lambda: [torch.nn.functional.linear(x, w) for w in dense]}
        exact = dequantize_nf4(weights[0][0], weights[0][1], torch.empty(N, K, device="cuda")).double() @ x[0].double()
        replay, counts = {k: recorded(f) for k, f in ways.items()}, {k: len(dense) if k == "16 bits" else n for k in ways}
        times, eager = {k: [] for k in ways}, {k: [] for k in ways}
        for _ in range(args.rounds):
            for k in ways: times[k].append(1e3*gpu_ms(replay[k])/counts[k]), eager[k].append(1e3*gpu_ms(ways[k])/counts[k])
        for k in ways:
            low, mid, high = statistics.quantiles(times[k], n=4)
            off = None if k == "16 bits" else ((ways[k]()[0].view(-1) - exact).norm()/exact.norm()).item()
            nbytes = 2*N*K if k == "16 bits" else bytes_moved(N*K, 0)
            doc["rows"].append(dict(peer=k, rows=N, cols=K, us=mid, us_low=low, us_high=high, eager_us=statistics.median(eager[k]),
                                    gb_per_s=nbytes/mid/1e3, off=off))
            print(json.dumps(doc["rows"][-1]), flush=True)
        args.out.write_text(json.dumps(doc, indent=1) + "\n")
        del replay
        if args.sweep and N >= 4096:
            found = []
            for rows, cols, warps in itertools.product((4, 8, 16), (1024, 2048, 4096), (2, 4, 8)):
                if not 64 <= rows*cols/32/warps <= 256: continue
                call = recorded(lambda: [multiply_nf4(x, q, s, rows, cols, warps) for q, s in weights])
                found.append((round(statistics.median(1e3*gpu_ms(call)/n for _ in range(8)), 2), rows, cols, warps))
            print("sweep", N, K, sorted(found)[:6], flush=True)


if __name__ == "__main__": main()
