"The chunked loss against PyTorch's own, in every shape and with every way to call it."
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from qlora_nb.base.errors import QLoRAError
from qlora_nb.speed.chunked_loss import chunked_loss


def case(B, T, V, D, part):
    g = torch.Generator().manual_seed(B*1000 + T*100 + V)
    hidden, weight = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g)
    labels = torch.randint(V, (B, T), generator=g).masked_fill(torch.rand(B, T, generator=g) > part, -100)
    labels[0, -1] = 1
    return hidden, weight, labels


def usual(hidden, weight, labels, bias=None, n=None):
    scores = F.linear(hidden[:, :-1], weight, bias).reshape(-1, len(weight))
    return F.cross_entropy(scores, labels[:, 1:].reshape(-1), reduction="sum")/(n or (labels[:, 1:] != -100).sum())


@given(B=st.integers(1, 4), T=st.integers(2, 20), V=st.integers(2, 60), part=st.floats(0, 1), chunk_size=st.integers(1, 50),
       with_bias=st.booleans(), n=st.sampled_from([None, 7]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equal_to_pytorch(B, T, V, part, chunk_size, with_bias, n):
    hidden, weight, labels = case(B, T, V, 8, part)
    bias = torch.linspace(-1, 1, V) if with_bias else None
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    one, two = usual(a, weight, labels, bias, n), chunked_loss(b, weight, labels, bias, n, chunk_size)
    (one*3).backward(), (two*3).backward()   # what comes from above is not always 1
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_loss_scale_of_float16_survives():
    "Divided by 4,096 labels before it is scaled, this gradient would lose a seventh of itself to float16."
    hidden, weight, labels = case(2, 2049, 64, 16, 1.)
    hidden, weight = hidden/2000, weight/2000
    a, b = hidden.clone().requires_grad_(), hidden.half().requires_grad_()
    usual(a, weight, labels).backward()
    (chunked_loss(b, weight.half(), labels)*2**14).backward()
    off = (b.grad.float()/2**14 - a.grad).norm()/a.grad.norm()
    early = (a.grad.half().float() - a.grad).norm()/a.grad.norm()   # what dividing first would leave
    assert off < 2e-3 and early > .1, (off, early)


def test_the_graph_is_used_once():
    hidden, weight, labels = case(1, 5, 7, 4, 1.)
    loss = chunked_loss(h := hidden.requires_grad_(), weight, labels)
    grad, = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError): grad.sum().backward()


def test_refusals():
    hidden, weight, labels = case(1, 5, 7, 4, 1.)
    with pytest.raises(QLoRAError, match="head is trained"): chunked_loss(hidden, weight.requires_grad_(), labels)
    with pytest.raises(QLoRAError, match="no position"): chunked_loss(hidden, weight.detach(), labels.fill_(-100))
