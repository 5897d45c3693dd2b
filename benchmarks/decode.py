"""Decoding multiplies a 4-bit weight with one vector: can one Triton kernel beat bitsandbytes at it? CUDA; `--check` on a CPU.

    python benchmarks/decode.py benchmarks/results/decode.json [--sweep]

Each way multiplies with as many copies of a weight as do not fit into the cache, recorded as one CUDA graph, so that
Python's time does not count; `eager_us` is the time of a call from Python. `--sweep` tries sizes of the kernel first.
"""
import argparse, itertools, json, statistics
from pathlib import Path

import torch
from qlora_nb.core import load_triton, versions

triton, tl = load_triton()   # before bitsandbytes, which would import it without the interpreter
from qlora_nb.fused import packed_of
from qlora_nb.kernels import bytes_moved

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192)]   # of Llama-3-8B, and of a 70B's MLP


@triton.jit
def multiply_kernel(X, Q, SCALES, CODE, SCALES2, CODE2, OFFSET, OUT, N, K, BLOCK: tl.constexpr, BLOCK2: tl.constexpr,
                    ROWS: tl.constexpr, COLS: tl.constexpr, APART: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)*ROWS + tl.arange(0, ROWS)
    inside, sums = (n < N)[:, None], tl.zeros((ROWS,), tl.float32)
    for k0 in range(0, K, COLS):
        k, half, g = k0 + tl.arange(0, COLS), k0//2 + tl.arange(0, COLS//2), k0//BLOCK + tl.arange(0, COLS//BLOCK)
        at, there = n[:, None]*(K//BLOCK) + g[None, :], inside & (g < K//BLOCK)[None, :]
        scale = tl.load(SCALES + at, mask=there, other=0)
        if BLOCK2:
            scale2 = tl.load(SCALES2 + at//BLOCK2, mask=there, other=0)
            scale = tl.load(CODE2 + scale.to(tl.int32))*scale2 + tl.load(OFFSET)
        q = tl.load(Q + n[:, None]*(K//2) + half[None, :], mask=inside & (half < K//2)[None, :], other=0).to(tl.int32)
        if APART:   # high and low halves of the bytes for themselves
            x0 = tl.load(X + 2*half, mask=half < K//2, other=0).to(tl.float32)
            x1 = tl.load(X + 2*half + 1, mask=half < K//2, other=0).to(tl.float32)
            wx = tl.load(CODE + (q >> 4))*x0[None, :] + tl.load(CODE + (q & 15))*x1[None, :]
            wx = tl.reshape(wx, (ROWS, COLS//BLOCK, BLOCK//2))
        else:
            w = tl.reshape(tl.join(tl.load(CODE + (q >> 4)), tl.load(CODE + (q & 15))), (ROWS, COLS//BLOCK, BLOCK))
            wx = w*tl.reshape(tl.load(X + k, mask=k < K, other=0).to(tl.float32), (1, COLS//BLOCK, BLOCK))
        sums += tl.sum(tl.sum(wx, 2)*scale, 1)
    tl.store(OUT + n, sums.to(OUT.dtype.element_ty), mask=n < N)


def multiply(x, shape, packed, block, block2, rows=4, cols=1024, warps=4, apart=True):  # (K,) → (N,)
    (N, K), p = shape, packed
    out = torch.empty(N, dtype=x.dtype, device=x.device)
    multiply_kernel[(triton.cdiv(N, rows),)](x, p.q, p.scales, p.code, p.scales2, p.code2, p.offset, out, N, K, block, block2,
                                             rows, cols, apart, num_warps=warps)
    return out


def layer(N, K, device, dtype):
    import bitsandbytes as bnb
    m = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    m.weight = bnb.nn.Params4bit(torch.randn(N, K, dtype=dtype)*.02, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return m.to(device).requires_grad_(False)


def ways(layers, dense, x, how):
    import bitsandbytes as bnb
    packed = [packed_of(m) for m in layers]
    states = [(m.weight.data.t(), m.weight.quant_state) for m in layers]
    def ours(): return [multiply(x.view(-1), m.weight.quant_state.shape, p, *rest[:2], **how) for m, (p, *rest) in zip(layers, packed)]
    def theirs(): return [bnb.functional.gemv_4bit(x, w, state=s) for w, s in states]
    def full(): return [torch.nn.functional.linear(x, w) for w in dense]
    return {"ours": ours, "bitsandbytes": theirs, "16 bits": full}


def timed(call, n, rounds=20):
    "Median microseconds of one of the `n` products in `call`: recorded, and called from Python."
    def clock(work, times):
        for _ in range(times):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(), work(), b.record(), torch.cuda.synchronize()
            yield 1e3*a.elapsed_time(b)/n
    for _ in range(3): call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): call()
    graph.replay()
    return statistics.quantiles(clock(graph.replay, rounds), n=4), statistics.median(clock(call, rounds))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path, nargs="?")
    ap.add_argument("--sweep", action="store_true")
    ap.add_argument("--check", action="store_true", help="compare results on a small weight, and end")
    args = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if args.check:
        for N, K in ((64, 128), (70, 320), (33, 1024)):
            m, x = layer(N, K, device, torch.float32), torch.randn(K, device=device)
            packed, block, block2, _ = packed_of(m)
            for apart in (False, True):
                got, want = multiply(x, (N, K), packed, block, block2, rows=4, cols=256, apart=apart), m(x[None])[0]
                print(N, K, ((got - want).norm()/want.norm()).item())
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        return
    doc = dict(hardware=torch.cuda.get_device_name(), versions=versions(), rows=[])
    sizes = itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8), (False, True)) if args.sweep else [(4, 1024, 4, True)]
    sizes = [dict(zip(("rows", "cols", "warps", "apart"), o)) for o in sizes if o[0]*o[1] <= 128*32*o[2]]   # what registers hold
    for N, K in SHAPES:
        n = max(2, int(200e6/bytes_moved(N*K, 0)) + 1)   # more than the cache holds
        layers = [layer(N, K, device, torch.bfloat16) for _ in range(min(n, 64))]
        dense = [torch.randn(N, K, device=device, dtype=torch.bfloat16)*.02 for _ in range(min(len(layers), 6))]
        x = torch.randn(1, K, device=device, dtype=torch.bfloat16)
        best = min(sizes, key=lambda how: timed(ways(layers, dense, x, how)["ours"], len(layers), 5)[0][1]) if args.sweep else sizes[0]
        for way, call in ways(layers, dense, x, best).items():
            (low, mid, high), eager = timed(call, len(dense) if way == "16 bits" else len(layers))
            nbytes = 2*N*K if way == "16 bits" else bytes_moved(N*K, 0)
            row = dict(peer=way, rows=N, cols=K, us=mid, us_low=low, us_high=high, eager_us=eager, gb_per_s=nbytes/mid/1e3,
                       how=best if way == "ours" else None)
            doc["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.out: args.out.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__": main()
