"The NF4 kernel against bitsandbytes, in Triton's interpreter where there is no GPU."
from copy import copy

import bitsandbytes.functional as BF
import pytest, torch
from hypothesis import given, settings, strategies as st

from qlora_nb.speed import fused, kernels
from qlora_nb.base.errors import QLoRAError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def eager():
    "Compiling a fallback of bitsandbytes for each odd shape takes most of the time."
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def quantized(shape, dtype=torch.float16, **how):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)
    return BF.quantize_4bit(W, **(dict(quant_type="nf4", blocksize=64, compress_statistics=True) | how))


def theirs(packed, state):
    "bitsandbytes' answer, asked for as one long row: its CPU code begins a new block with each row, and the data do not."
    flat = copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return BF.dequantize_4bit(packed, flat).view(state.shape)


@given(rows=st.integers(1, 200), cols=st.integers(1, 130), block=st.sampled_from([64, 128, 256, 512]),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), double=st.booleans(),
       kind=st.sampled_from(["nf4", "fp4"]), per_program=st.sampled_from([1, 8, 64]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bits_are_those_of_bitsandbytes(rows, cols, block, dtype, double, kind, per_program):
    packed, state = quantized((rows, cols), dtype, blocksize=block, compress_statistics=double, quant_type=kind)
    ours = kernels.dequantize_nf4(packed, state, rows=per_program)
    assert ours.dtype == dtype and torch.equal(ours, theirs(packed, state))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 65), (64, 64)])
def test_nothing_is_written_behind_the_end(shape):
    packed, state = quantized(shape)
    n = state.shape.numel()
    room = torch.full((n + 5000,), 7., dtype=torch.float16, device=DEVICE)
    out = kernels.dequantize_nf4(packed, state, out=room[:n].view(shape))
    assert out.data_ptr() == room.data_ptr() and torch.equal(out, theirs(packed, state))
    assert (room[n:] == 7).all()


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
def test_the_bytes_may_be_dressed_up(storage):
    packed, state = quantized((64, 256), quant_storage=storage)
    assert packed.dtype == storage and torch.equal(kernels.dequantize_nf4(packed, state), theirs(packed, state))


def test_a_layer_on_two_devices():
    packed, state = quantized((64, 64))
    with pytest.raises(QLoRAError, match="its scales on"): kernels.dequantize_nf4(packed.to("meta"), state)


def test_a_large_offset():
    W = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).abs() + 100
    packed, state = BF.quantize_4bit(W.to(DEVICE), quant_type="nf4", blocksize=64, compress_statistics=True)
    assert state.offset > 50 and torch.equal(kernels.dequantize_nf4(packed, state), theirs(packed, state))


@given(rows=st.integers(1, 20), blocks=st.integers(1, 9), block=st.sampled_from([32, 64, 256]), double=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), kind=st.sampled_from(["nf4", "fp4"]),
       size=st.sampled_from([(None, None), (1, 256), (4, 1024)]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_row_times_a_packed_weight(rows, blocks, block, double, dtype, kind, size):
    packed, state = quantized((rows, blocks*block), blocksize=block, compress_statistics=double, quant_type=kind)
    x = torch.randn(blocks*block, generator=torch.Generator().manual_seed(blocks)).to(DEVICE, dtype)
    W = kernels.dequantize_nf4(packed, state, out=torch.empty(state.shape, device=DEVICE)).double()
    got, scale = kernels.multiply_nf4(x[None], packed, state, *size), W.abs() @ x.double().abs()   # a sum may be next to nothing
    step = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype] + 4e-3*(DEVICE == "cuda" and dtype != torch.float32)
    assert got.dtype == dtype and got.shape == (1, rows)
    assert ((got[0].double() - W @ x.double()).abs() <= step*scale).all()


def test_what_cannot_be_multiplied_says_so():
    packed, state = quantized((8, 128))
    for x in (torch.zeros(64), torch.zeros(2, 128), torch.zeros(128, 1), torch.zeros(()), torch.zeros(128, dtype=torch.int64)):
        with pytest.raises(QLoRAError, match="one row of 128.*dequantize_nf4"): kernels.multiply_nf4(x.to(DEVICE), packed, state)
    with pytest.raises(QLoRAError, match="96 weights are no multiple of the block size 64"):
        kernels.multiply_nf4(torch.zeros(96, device=DEVICE), *quantized((8, 96)))


@cuda
def test_more_weights_than_32_bits_count():
    n = 2**31 + 64*1000
    W = torch.randn(64*1024, device=DEVICE, dtype=torch.float16)
    packed, state = BF.quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=False)
    times = -(-n//W.numel())
    packed, state.absmax = packed.view(-1).repeat(times), state.absmax.repeat(times)
    state.shape = torch.Size([times*W.numel()])
    out = kernels.dequantize_nf4(packed, state).view(times, -1)
    assert (out == out[0]).all()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("double, kind", [(True, "nf4"), (False, "nf4"), (True, "fp4")])
@pytest.mark.parametrize("rows, cols, block, r", [(32, 256, 64, 8), (33, 192, 64, 3), (5, 64, 32, 16), (64, 1024, 512, 20)])
def test_an_adapter_is_added_while_a_weight_is_dequantized(rows, cols, block, r, double, kind, fold):
    "The kernel of the fused layer, whole tiles and ragged ones, beside the dequantized weight and alpha*B@A in float32."
    packed, state = quantized((rows, cols), torch.float32, blocksize=block, compress_statistics=double, quant_type=kind)
    draw, dtype = torch.Generator().manual_seed(rows), torch.float32
    A, B = (torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in ((r, cols), (rows, r)))
    (scales2, code2, offset), block2 = kernels.second_scales(packed, state)
    out = torch.full((rows + 1, cols), 99., dtype=dtype, device=DEVICE)
    n, k = 32, max(256, block)   # a program's tile, as in `fused.dequantize`
    fused.folded_kernel[(-(-rows//n), -(-cols//k))](
        packed.view(-1).view(torch.uint8), state.absmax, state.code, scales2, code2, offset, A, B, out, rows, cols, .7, r,
        max(16, 1 << (r - 1).bit_length()), n, k, block, block2, fold, rows % n == cols % k == 0, num_warps=4, enable_fp_fusion=False)
    want = theirs(packed, state)
    if not fold: assert torch.equal(out[:rows], want)
    else: torch.testing.assert_close(out[:rows], want + .7*B @ A, rtol=1e-5, atol=1e-5)
    assert (out[rows:] == 99).all(), "it wrote behind the end"
