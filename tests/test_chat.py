"The chat, driven as a reader drives it, without a browser: values are set, buttons clicked, the transcript read."
import threading

import ipywidgets as W, pytest, torch
from torch import nn

from qlora_nb.apps import chat as module
from qlora_nb.foundations.adapters import add_adapters, save_adapter
from qlora_nb.apps.chat import Chat, bubble, chat, conversation
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import set_seed
from qlora_nb.using.inference import generate
from qlora_nb.training.data import encode_prompt
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.using.several_adapters import active_adapter, answering_as

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="session")
def tok(): return load_tokenizer()


@pytest.fixture(scope="session")
def model(tok):
    m = add_adapters(tiny_model("llama", vocab_size=len(tok), hidden_size=64, initializer_range=.2, eos_token_id=2, pad_token_id=2))
    set_seed(1)
    for n, p in m.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.3)
    return m.eval().requires_grad_(False)


def say(c, text):
    c.text.value = text
    c.send.click()
    c.wait(60)
    assert not c.busy and not c.thread.is_alive()
    return c.turns[-1]


def scripted(*pieces, error=None, seen=None, gate=None):
    "A stream of known pieces, which can fail, or wait at a gate after the first of them."
    def stream(model, tokenizer, prompt, **how):
        if seen is not None: seen.append((prompt, how))
        for p in pieces:
            yield p
            if gate: gate["there"].set(), gate["go"].wait(10)
        if error: raise error
    return stream


def test_an_answer_is_that_of_generate(model, tok):
    c = Chat(model, tok, max_new_tokens=8)
    turn = say(c, "What is the capital of France?")
    prompt = encode_prompt(dict(prompt="What is the capital of France?"), tok)
    assert turn["answers"]["default"].strip() == generate(model, tok, prompt, 8)
    assert turn["error"] is None and not turn["stopped"]


def test_base_adapter_and_both(model, tok):
    c = Chat(model, tok, dict(turns=1), max_new_tokens=8)
    assert [label for label, _ in c.who.options] == ["default", "base", "base and default"]
    one = say(c, "Hello")["answers"]
    c.who.value = (None,)
    base = say(c, "Hello")["answers"]
    c.who.value = (None, "default")
    both = say(c, "Hello")["answers"]
    assert both == base | one and base["base"] != one["default"] and [*both] == ["base", "default"]
    assert active_adapter(model) == "default" and c.log.children[-1].value.count("<b>") == 3
    with answering_as(model, None):
        assert base["base"].strip() == generate(model, tok, encode_prompt(dict(prompt="Hello"), tok), 8)


def test_a_base_alone(tok):
    c = Chat(tiny_model("llama", vocab_size=len(tok), hidden_size=64), tok, max_new_tokens=3)
    assert [label for label, _ in c.who.options] == ["base"] and [*say(c, "Hi")["answers"]] == ["base"]


def test_text_streams_into_the_bubble(model, tok, monkeypatch):
    monkeypatch.setattr(module, "stream", scripted("a", "b", "c"))
    c, values = Chat(model, tok), []
    c.log.observe(lambda change: change["new"][-1].observe(lambda v: values.append(v["new"]), "value"), "children")
    say(c, "go")
    grown = [v.split("<br>")[-1].split("<")[0] for v in values]
    assert grown == ["a ▌", "ab ▌", "abc ▌", "abc"]


def test_everything_is_escaped(model, tok, monkeypatch):
    evil = "<script>alert('x')</script><img src=x onerror=y>&amp;"
    monkeypatch.setattr(module, "stream", scripted(evil, error=ValueError(evil)))
    c = Chat(model, tok, dict(example=evil))
    say(c, evil)
    shown = c.log.children[0].value + c._repr_html_() + c.box.children[0].value + bubble(evil, evil)
    assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown and "&amp;amp;" in shown
    assert evil in repr(c)


def test_settings_are_those_of_the_click(model, tok, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "stream", scripted("ok", seen=seen))
    c = Chat(model, tok, temperature=.5, top_p=.8, max_new_tokens=7, top_k=9, seed=4)
    say(c, "one")
    c.temperature.value, c.top_p.value, c.longest.value = 1., .9, 50
    say(c, "two")
    assert seen[0][1] == dict(temperature=.5, top_p=.8, max_new_tokens=7, top_k=9, seed=4)
    assert seen[1][1] == dict(temperature=1., top_p=.9, max_new_tokens=50, top_k=9, seed=4)
    assert Chat(model, tok, max_new_tokens=3000, temperature=2.5).longest.value == 3000


def test_stop_in_mid_stream_and_two_quick_sends(model, tok, monkeypatch):
    gate = dict(there=threading.Event(), go=threading.Event())
    monkeypatch.setattr(module, "stream", scripted("first ", "second ", "third ", gate=gate))
    c = Chat(model, tok)
    c.who.value = ("default",)
    c.text.value = "one"
    c.send.click()
    assert gate["there"].wait(10) and c.busy and not c.send.disabled and c.text.value == ""
    c.text.value = "two"
    c.send.click(), c.send.click()
    assert c.text.value == "two" and "Still answering" in c.status.value and len(c.turns) == 1 == len(c.log.children)
    c.stop.click(), gate["go"].set(), c.wait(10)
    assert c.turns[0]["answers"] == dict(default="first second ") and c.turns[0]["stopped"] and "stopped" in c.log.children[0].value
    assert c.status.value == ""
    c.send.click(), c.wait(10)      # the second one, now in its turn
    assert [t["user"] for t in c.turns] == ["one", "two"] and not c.turns[1]["stopped"]


def test_stop_ends_a_real_answer(tok, model):
    c, before = Chat(model, tok, max_new_tokens=50_000), threading.active_count()
    c.log.observe(lambda change: change["new"][-1].observe(lambda v: c.stop.click(), "value"), "children")   # at the first piece
    turn = say(c, "Tell me everything")
    assert turn["stopped"] and 0 < len(turn["answers"]["default"]) < 2000 and threading.active_count() == before


def test_stop_skips_the_second_of_two(model, tok, monkeypatch):
    c = Chat(model, tok)
    monkeypatch.setattr(module, "stream", lambda *a, **k: (c.end() or "x" for _ in range(9)))
    c.who.value = (None, "default")
    assert say(c, "go")["answers"] == dict(base="x") and active_adapter(model) == "default"


@pytest.mark.parametrize("error,shown", [(RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
                                         (QLoRAError("it broke.", cure="Mend it."), "it broke. Mend it."),
                                         (KeyboardInterrupt(), "KeyboardInterrupt: ")], ids=str)
def test_an_error_is_shown_and_the_chat_goes_on(model, tok, monkeypatch, error, shown):
    c = Chat(model, tok)
    with monkeypatch.context() as m:
        m.setattr(module, "stream", scripted("half ", error=error))
        turn = say(c, "one")
    assert turn["error"] == shown and turn["answers"]["default"] == "half " and shown in c.log.children[0].value and shown in repr(c)
    c.longest.value = 4
    assert say(c, "two")["error"] is None and active_adapter(model) == "default"


def test_a_template_that_is_not_there(model, tok):
    assert "there is no template 'chatml'" in say(Chat(model, tok, dict(template="chatml")), "x")["error"]


def test_memory(model, tok, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "stream", scripted("yes", seen=seen))
    for turns, both in ((3, True), (1, False)):
        c = Chat(model, tok, dict(turns=turns))
        say(c, "first question"), seen.clear(), say(c, "second question")
        assert ("first question" in seen[0][0]) is both and "second question" in seen[0][0]
        assert ("remembers" in c.hello()) is both
    c.clear.click()
    assert c.turns == [] and c.log.children == () and repr(c) == "A chat, nothing said yet."


def test_conversation_leaves_out_what_failed():
    old = [dict(user="a", answers=dict(x="1", y="2")), dict(user="b", answers={}), dict(user="c", answers=dict(x=" "))]
    assert [m["content"] for m in conversation(old, "d", "y", True)] == ["a", "2", "d"]
    assert [m["content"] for m in conversation(old, "d", "z", True)] == ["a", "1", "d"]   # somebody new is told another's


def test_clear_while_it_writes(model, tok, monkeypatch):
    gate = dict(there=threading.Event(), go=threading.Event())
    monkeypatch.setattr(module, "stream", scripted(*"abcdef", gate=gate))
    c = Chat(model, tok)
    c.text.value = "x"
    c.send.click(), gate["there"].wait(10)
    threading.Timer(.05, gate["go"].set).start()
    c.clear.click()
    assert c.turns == [] and not c.busy and not c.thread.is_alive()


def test_nothing_to_stop(model, tok):
    c = Chat(model, tok, max_new_tokens=3)
    c.stop.click()
    assert c.status.value == "There is nothing to stop."
    assert say(c, "Hello")["stopped"] is False and c.status.value == ""


def controls(widget):
    "What can be operated in a tree of widgets."
    if hasattr(widget, "children"): return [o for w in widget.children for o in controls(w)]
    return [widget] if not isinstance(widget, (W.HTML, W.Output)) else []


def test_each_control_has_a_name_and_keeps_the_focus(model, tok, monkeypatch):
    monkeypatch.setattr(module, "stream", scripted("yes"))
    c, seen = Chat(model, tok), []
    unnamed = [o for o in controls(c.box) if not o.description]
    assert unnamed == [o.slider for o in (c.longest, c.temperature, c.top_p)]   # each beside its box, which has the name
    c.longest.slider.value = 5
    assert c.longest.value == 5
    for o in controls(c.box): o.observe(lambda change: seen.append(change["owner"]), "disabled")
    say(c, "Hello"), c.stop.click(), c.clear.click()
    assert not seen and not any(o.disabled for o in controls(c.box))


def test_nothing_to_send(model, tok):
    c = Chat(model, tok)
    c.text.value = "  \n"
    c.send.click()
    assert c.turns == [] and c.thread is None and "nothing to send" in c.status.value


def test_it_shows_itself_everywhere(model, tok, monkeypatch):
    monkeypatch.setattr(module, "stream", scripted("forty-two"))
    c = Chat(model, tok)
    say(c, "what?")
    data = c._repr_mimebundle_(include=None, exclude=None)
    assert [*data] == [VIEW, "text/html", "text/plain"] and data["text/plain"] == "you: what?\ndefault: forty-two"
    assert "forty-two" in data["text/html"] and data[VIEW]["model_id"] == c.box.model_id
    assert isinstance(c.box, W.VBox) and not hasattr(c, "_ipython_display_")


def test_nonsense_is_refused_at_once(model, tok):
    with pytest.raises(QLoRAError, match="the top_p is 3"): Chat(model, tok, top_p=3)
    with pytest.raises(QLoRAError, match="the top_k is -1"): Chat(model, tok, top_k=-1)
    with pytest.raises(TypeError): Chat(model, tok, topk=3)


def test_one_call(tok, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QLoRAError, match="no finished run"): chat()
    with quiet(): tiny_model("llama", vocab_size=len(tok), hidden_size=64, initializer_range=.2).save_pretrained("base"), tok.save_pretrained("base")
    run = tmp_path/"runs"/"one"
    run.mkdir(parents=True)
    (run/"settings.json").write_text("{}", encoding="utf-8")
    save_adapter(model, run/"adapter", str(tmp_path/"base"), template="article", turns=1, example="Say it")
    c = chat(device="cpu", max_new_tokens=3)
    assert "Say it" in c.hello() and say(c, "Hi")["error"] is None and c.notes["template"] == "article"
    assert torch.is_tensor(next(c.model.parameters()))
