"Our 4-bit tensors against bitsandbytes', bit for bit, on tensors that hypothesis invents; and every refusal."
import copy, math

import bitsandbytes as bnb, pytest, torch
from bitsandbytes import functional as BF
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch.nn import functional as F

from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import cpu_kind
from qlora_nb.foundations.double_quantization import DoubleQuantized, QuantizedTensor, double_quantize, quantize
from qlora_nb.foundations.nf4 import CODEBOOKS, levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
TINY = 2.**-126  # the smallest normal float32 and bfloat16
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def small_and_eager():
    "Compiling a fallback of bitsandbytes for each shape, and threads that wait for each other, take most of the time."
    threads = torch.get_num_threads()
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def same_bits(a, b):
    a, b = a.reshape(-1), b.reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_values(a, b):
    "The same bits, but for the sign of a zero: without AVX-512 bitsandbytes gives FP4's second zero as -0."
    return same_bits(a.masked_fill(a == 0, 0), b.masked_fill(b == 0, 0))


def bnb_dequantize(data, state, dtype=None):
    "bitsandbytes' own arithmetic, with each block as a row: its AVX-512 kernel needs rows of whole blocks."
    n, blocks, flat = math.prod(state.shape), -(-math.prod(state.shape)//state.blocksize), copy.copy(state)
    flat.shape, flat.dtype = (blocks, state.blocksize), dtype or state.dtype
    data = F.pad(data.reshape(-1), (0, blocks*state.blocksize//2 - data.numel()))
    return BF.dequantize_4bit(data.view(-1, 1), flat).reshape(-1)[:n].view(state.shape)


def check_equal(W, codebook, block_size, double):
    "All that is stored, and the weights that come back in each dtype."
    before = W.clone()
    ours = quantize(W, codebook, block_size, double)
    data, state = BF.quantize_4bit(W, blocksize=block_size, quant_type=codebook, compress_statistics=double)
    assert same_bits(W.contiguous(), before.contiguous()), "the input was changed"
    assert same_bits(ours.packed, data)
    if double:
        assert same_bits(ours.scales.codes, state.absmax) and same_bits(ours.scales.offset, state.offset)
        assert same_bits(ours.scales.absmax, state.state2.absmax) and same_bits(ours.scales.code, state.state2.code)
        scales = BF.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else: scales = state.absmax
    assert same_bits(ours.absmax, scales)
    for dtype in {W.dtype, *DTYPES}:
        a, b = ours.dequantize(dtype), bnb_dequantize(data, state, dtype)
        assert a.dtype == dtype and a.shape == W.shape
        if dtype == torch.bfloat16 and "AVX512" in cpu_kind():  # AVX-512 flushes what is below, PyTorch does not
            flushed = ours.dequantize(torch.float32).abs() < TINY
            a, b = a.masked_fill(flushed, 0), b.masked_fill(flushed, 0)
        if dtype == torch.float16 and bnb.cextension.lib.compiled_with_cuda:  # rounds otherwise beside a GPU:
            exact = ours.dequantize(torch.float32)
            a = torch.where((exact - a).abs() == (exact - b).abs(), b, a)  # halves not to even,
            a = a.masked_fill(exact.abs() < 2**-24, 0)                     # and nothing up to the smallest number
        assert same_values(a, b)
    theirs, back = QuantizedTensor.from_bnb(data, state), ours.to_bnb()
    assert same_bits(theirs.dequantize(), ours.dequantize())
    assert same_bits(back[0], data) and back[0].shape == data.shape and back[1] == state
    assert same_bits(bnb_dequantize(*back), bnb_dequantize(data, state))


# ---- tensors that are invented ----

shapes = st.one_of(st.tuples(st.integers(1, 700)), st.tuples(st.integers(1, 40), st.integers(1, 200)),
                   st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 70)))
kinds = "normal heavy uniform integers sparse zeros constant middles zero_block one_outlier".split()
two_codebooks = st.sampled_from(["nf4", "fp4"])
seeds = st.integers(0, 2**32 - 1)


def make(kind, shape, seed, scale):
    "A float32 tensor of one of the `kinds`."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    n = x.numel()
    if kind == "heavy": x = x**5
    elif kind == "uniform": x = torch.rand(shape, generator=g) - .5
    elif kind == "integers": x = torch.randint(-7, 8, shape, generator=g).float()
    elif kind == "sparse": x = x*(torch.rand(shape, generator=g) < .05)
    elif kind == "zeros": x = torch.zeros(shape)
    elif kind == "constant": x = torch.full(shape, x.view(-1)[0].item())
    elif kind == "middles":
        v = torch.cat([levels("nf4"), levels("fp4")]).sort().values
        x = torch.cat([v, (v[1:] + v[:-1])/2])[torch.randint(63, shape, generator=g)]
    elif kind == "zero_block": x.view(-1)[n//3:n//3 + 300] = 0
    elif kind == "one_outlier": x.view(-1)[n//2] = 1000
    return x*scale


@SETTINGS
@given(kind=st.sampled_from(kinds), shape=shapes, seed=seeds, scale=st.sampled_from([1., .02, 1e-7, 1e4]),
       dtype=st.sampled_from(DTYPES), codebook=two_codebooks, block_size=st.sampled_from(BLOCKS), double=st.booleans())
@example("normal", (1,), 0, 1., torch.float32, "fp4", 64, True)
@example("zeros", (3, 100), 0, 1., torch.bfloat16, "nf4", 64, True)
@example("constant", (16, 64), 0, 1., torch.float16, "nf4", 64, True)
def test_equals_bitsandbytes(kind, shape, seed, scale, dtype, codebook, block_size, double):
    W = make(kind, shape, seed, scale).to(dtype)
    if W.isfinite().all(): check_equal(W, codebook, block_size, double)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@SETTINGS
@given(values=st.lists(finite, min_size=1, max_size=150), codebook=two_codebooks, double=st.booleans())
@example([3e38, -3e38]*40, "nf4", False)
@example([1e-45, 0., -1e-40], "fp4", True)
def test_any_float32(values, codebook, double):
    "Every finite float32, from the smallest subnormal to the largest; bitsandbytes gives NaN where our mean overflows."
    W = torch.tensor(values)
    try: check_equal(W, codebook, 64, double)
    except QLoRAError as e:
        state = BF.quantize_4bit(W, blocksize=64, quant_type=codebook, compress_statistics=True)[1]
        assert double and "overflows" in str(e) and not state.offset.isfinite()


@SETTINGS
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=300), dtype=st.sampled_from(DTYPES[1:]),
       codebook=two_codebooks, block_size=st.sampled_from(BLOCKS))
def test_any_16_bit_pattern(bits, dtype, codebook, block_size):
    W = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(dtype)
    check_equal(W.nan_to_num(nan=0, posinf=1, neginf=-1), codebook, block_size, False)


@SETTINGS
@given(seed=seeds, n=st.integers(1, 3000), power=st.sampled_from([1, 3, 9]), scale=st.sampled_from([1e-6, 1., 1e6]))
def test_scales_alone(seed, n, power, scale):
    "Double quantization of any scales, against `quantize_blockwise`, as `quantize_4bit` calls it."
    absmax = torch.randn(n, generator=torch.Generator().manual_seed(seed)).abs()**power*scale
    ours = double_quantize(absmax)
    codes, state = BF.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert same_bits(ours.codes, codes) and same_bits(ours.absmax, state.absmax)
    assert same_bits(ours.dequantize(), BF.dequantize_blockwise(codes, state) + absmax.mean())


# ---- a grid, so that no combination depends on luck ----

@pytest.mark.parametrize("dtype", DTYPES, ids=lambda o: str(o)[6:])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_grid(codebook, double, dtype):
    for i,shape in enumerate([(1,), (3,), (5, 33), (3, 96), (2, 3, 32), (64, 128), (130, 70)]):
        for block_size in BLOCKS:
            for kind in ("normal", "zero_block", "middles"):
                check_equal(make(kind, shape, i, 1.).to(dtype), codebook, block_size, double)


def test_linear4bit_both_ways():
    layer = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=True)
    W = layer.weight.detach().clone()
    layer = layer.to("cpu")
    theirs, ours = QuantizedTensor.from_bnb(layer.weight, layer.weight.quant_state), quantize(W)
    assert same_bits(theirs.packed, ours.packed) and same_bits(theirs.dequantize(), ours.dequantize())
    assert type(theirs.packed) is torch.Tensor and not theirs.packed.requires_grad
    data, state = ours.to_bnb()
    stored = BF.QuantState.from_dict(state.as_dict(packed=True), device="cpu")  # what a checkpoint holds
    assert same_bits(bnb_dequantize(data, stored), ours.dequantize())
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QLoRAError, match="rearranged"): QuantizedTensor.from_bnb(layer.weight, layer.weight.quant_state)


def test_other_storage_dtype():
    "bitsandbytes can keep the bytes under another dtype (FSDP wants that); the bytes are the same."
    W = torch.randn(64, 64)
    data, state = BF.quantize_4bit(W, quant_type="nf4", quant_storage=torch.bfloat16)
    assert same_bits(QuantizedTensor.from_bnb(data, state).packed, quantize(W, double=False).packed)


# ---- without the library ----

@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [2, 16, 64, 8192])
def test_each_value_gets_its_nearest_level(codebook, block_size):
    W = torch.randn(37, 53)
    q = quantize(W, codebook, block_size, double=False)
    absmax = F.pad(W.view(-1), (0, -W.numel() % block_size)).view(-1, block_size).abs().amax(1)
    assert torch.equal(q.absmax, absmax)
    scale = absmax.repeat_interleave(block_size)[:W.numel()]
    best = (W.view(-1, 1) - scale[:,None]*levels(codebook)).abs().amin(1)
    error = (q.dequantize() - W).abs().view(-1)
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)  # a rounding of float32 in values up to 4
    assert q.to("cpu").nbytes == q.nbytes == q.packed.nbytes + 4*len(absmax)


@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (64, 64)])
def test_bytes_and_bits(shape):
    q = quantize(torch.randn(shape))
    n = math.prod(shape)
    assert q.nbytes == -(-n//2) + -(-n//64) + 4*-(-n//(64*256)) + 4 == sum(r[3] for r in q.table().rows[:-1])
    assert q.bits_per_param == 8*q.nbytes/n and q.dequantize().shape == shape
    assert "<table>" in q._repr_html_() and "nf4, block 64" in repr(q)


def test_strides_do_not_matter():
    W = torch.randn(96, 64)
    for view in (W.T, W[::2], W[:,::3], W.expand(2, 96, 64)):
        assert not view.is_contiguous()
        a, b = quantize(view), quantize(view.contiguous())
        assert same_bits(a.packed, b.packed) and same_bits(a.dequantize(), b.dequantize())


def test_parameter_and_meta_context():
    p = torch.nn.Parameter(torch.randn(64, 64))
    assert not quantize(p).dequantize().requires_grad
    levels.cache_clear()
    with torch.device("meta"): assert levels("nf4").device.type == "cpu"


def test_dtypes_come_back():
    for dtype in DTYPES:
        q = quantize(torch.randn(8, 64).to(dtype))
        assert q.dequantize().dtype == dtype and q.dequantize(torch.float32).dtype == torch.float32
        assert isinstance(q.scales, DoubleQuantized)


BAD = {
    "nan": (torch.tensor([1., math.nan, 2.]), {}, r"1 of 3 values are NaN or infinite, the first at \[1\]"),
    "inf": (torch.tensor([[1., 2.], [math.inf, 2.]]), {}, r"the first at \[1, 0\]"),
    "empty": (torch.empty(0, 8), {}, r"shape \(0, 8\): there is nothing to quantize"),
    "integer": (torch.arange(8), {}, r"int64.*only 16- and 32-bit floats"),
    "bool": (torch.tensor([True]), {}, "bool.*only 16- and 32-bit floats"),
    "float64": (torch.randn(8).double(), {}, r"float64.*\.float\(\)"),
    "block 0": (torch.randn(8), dict(block_size=0), "a block of 0 is not possible"),
    "block 48": (torch.randn(8), dict(block_size=48), "power of two"),
    "block 1": (torch.randn(8), dict(block_size=1), "a block of 1"),
    "block 64.0": (torch.randn(8), dict(block_size=64.), "a block of 64.0"),
    "codebook": (torch.randn(8), dict(codebook="nf5"), "no codebook is called 'nf5'. Choose from: nf4, fp4, int4"),
    "overflow": (torch.full((256,), 3e38), {}, "mean of the scales overflows.*double=False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    W, kw, message = BAD[name]
    with pytest.raises(QLoRAError, match=message): quantize(W, **kw)


@pytest.mark.parametrize("kw", [dict(codebook="int4"), dict(block_size=16), dict(block_size=8192)])
def test_bitsandbytes_has_no_such_format(kw):
    with pytest.raises(QLoRAError, match="bitsandbytes has no"): quantize(torch.randn(8, 64), **kw).to_bnb()
