"Formats in and templates out: ShareGPT, Alpaca, chats, Parquet; our masks beside TRL's; long rows; files larger than memory."
import json, re, warnings
from copy import copy, deepcopy
from pathlib import Path
from unittest.mock import patch

import datasets, pyarrow as pa, pyarrow.parquet as pq, pytest, tokenizers, trl
from hypothesis import given, settings, strategies as st

from qlora_nb.core import QLoRAError
from qlora_nb.data import (answer_of, as_messages, digest, encode, encode_prompt, encode_rows, is_large, load_rows,
                           make_tickets, map_rows, shorten, stream_rows)
from qlora_nb.models import load_tokenizer, quiet, tiny_model
from qlora_nb.templates import render

datasets.disable_progress_bars()
def lines(*rows): return "\n".join(map(json.dumps, rows))
def chat(*turns): return dict(messages=[dict(role=r, content=c) for r, c in turns])
def share(*turns, **more): return dict(conversations=[{"from": r, "value": c} for r, c in turns], **more)

HI = chat(("user", "Hi"), ("assistant", "Hello"))
SYSTEM_HI = chat(("system", "s"), ("user", "Hi"), ("assistant", "Hello"))


# ---- formats in ----

GOOD = {
    "ShareGPT": (share(("human", "Hi"), ("gpt", "Hello")), HI),
    "ShareGPT's synonyms": (share(("user", "Hi"), ("chatgpt", "Hello")), HI),
    "ShareGPT with roles": (dict(conversations=HI["messages"]), HI),
    "ShareGPT's system turn": (share(("system", "s"), ("human", "Hi"), ("model", "Hello")), SYSTEM_HI),
    "ShareGPT, system beside": (share(("human", "Hi"), ("gpt", "Hello"), system="s", id=3), SYSTEM_HI),
    "ShareGPT, empty system": (share(("human", "Hi"), ("bot", "Hello"), system=""), HI),
    "messages": (HI | dict(source="x"), HI),
    "messages, more keys": (dict(messages=[m | dict(weight=1) for m in HI["messages"]]), HI),
    "messages, system beside": (HI | dict(system="s"), SYSTEM_HI),
    "pair": (dict(prompt="Hi", response="Hello", system=None), dict(prompt="Hi", response="Hello")),
    "pair with system": (dict(prompt="Hi", response="Hello", system="s"), dict(system="s", prompt="Hi", response="Hello")),
    "Alpaca": (dict(instruction="Hi", input="you", output="Hello"), dict(prompt="Hi\n\nyou", response="Hello")),
    "Alpaca with system": (dict(instruction="Hi", output="Hello", system="s"), dict(system="s", prompt="Hi", response="Hello")),
}

@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_good_format(case, kind, tmp_path):
    row, wanted = GOOD[case]
    path = tmp_path/f"a.{kind}"
    if kind == "parquet": pq.write_table(pa.Table.from_pylist([row]*2), path)
    else: path.write_text(lines(row, row) if kind == "jsonl" else json.dumps([row, row]), encoding="utf-8")
    assert load_rows(path) == [wanted]*2


BAD = {
    "unknown speaker": (share(("human", "Hi"), ("narrator", "f()")), "message 2 has the unknown role 'narrator'"),
    "a call that is none": (share(("human", "Hi"), ("function_call", "f()")), "the tool call of message 2 ('f()') is no JSON"),
    "no speaker": (dict(conversations=[{"value": "Hi"}]), "message 1 has the unknown role None"),
    "speaker is a list": (dict(conversations=[{"from": ["human"], "value": "Hi"}]), "unknown role"),
    "no value": (dict(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "content of message 1` must be text, not null"),
    "value is a number": (share(("human", "Hi"), ("gpt", 4)), "content of message 2` must be text, not int"),
    "turn is text": (dict(conversations=["Hi", "Hello"]), "message 1 needs `role`"),
    "not a list": (dict(conversations="Hi"), "must be a list"),
    "human last": (share(("human", "a"), ("gpt", "b"), ("human", "c")), "last message is the user's"),
    "answer first": (share(("gpt", "a"), ("human", "b"), ("gpt", "c")), "message 1 is an answer of the assistant that follows no question"),
    "two answers": (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 is an answer"),
    "answer to the system": (chat(("system", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "message 2 is an answer"),
    "two systems": (SYSTEM_HI | dict(system="t"), "message 2 is a system message"),
    "system is a number": (dict(prompt="a", response="b", system=3), "`system` must be text, not int"),
    "system of spaces": (dict(prompt="a", response="b", system="  "), "`system` is empty"),
    "half a surrogate": (share(("human", "\ud83d"), ("gpt", "b")), "surrogate"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_format(case, tmp_path):
    row, what = BAD[case]
    good = share(("human", "Hi"), ("gpt", "Hello")) if "conversations" in row else GOOD["messages"][0] if "messages" in row else GOOD["pair"][0]
    (path := tmp_path/"a.jsonl").write_text(lines(good, row), encoding="utf-8")
    for read in (load_rows, lambda p: map_rows(p, load_tokenizer("smollm2"), cache_dir=tmp_path/"cache")):
        with pytest.raises(QLoRAError) as e: read(path)
        assert e.value.where == f"{path}, row 2" and what in e.value.what and "skip_bad_rows" in e.value.cure
        assert "\n" not in str(e.value)


def test_formats_cannot_be_mixed(tmp_path):
    (path := tmp_path/"a.jsonl").write_text(lines(GOOD["ShareGPT"][0], GOOD["messages"][0]), encoding="utf-8")
    with pytest.raises(QLoRAError, match="row 2: the row has the shape messages, but row 1 has conversations"): load_rows(path)
    (path := tmp_path/"a.csv").write_text("conversations\nx\n", encoding="utf-8")
    with pytest.raises(QLoRAError, match="row 1: `messages` must be a list"): load_rows(path)


def test_parquet_can_be_broken(tmp_path):
    pq.write_table(pa.Table.from_pylist([dict(prompt="a", response="b"), dict(prompt="c", response=None)]), tmp_path/"a.parquet")
    with pytest.raises(QLoRAError, match="row 2: `response` must be text, not null"): load_rows(tmp_path/"a.parquet")
    (tmp_path/"b.parquet").write_bytes((tmp_path/"a.parquet").read_bytes()[:100])
    with pytest.raises(QLoRAError, match="this is not a Parquet file") as e: load_rows(tmp_path/"b.parquet")
    assert "\n" not in str(e.value)
    (tmp_path/"c.parquet").write_bytes(b"")
    with pytest.raises(QLoRAError, match="not a Parquet file"): load_rows(tmp_path/"c.parquet")


# ---- our masks beside TRL's ----

@pytest.fixture(scope="module")
def tok(): return load_tokenizer("smollm2")

SHELF = Path(trl.__file__).parent/"chat_templates"
SOURCES = {o.stem: o.read_text(encoding="utf-8") for o in sorted(SHELF.glob("*.jinja"))}
ORIGINALS = [o for o in SOURCES if not o.endswith("_training")]
FRAME = re.compile(r"<[^\s<>'\"{}]{1,40}>|\[/?[A-Z_]+\]")
RULE = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def stand_in(tok):
    "A tokenizer that knows the frames of all of TRL's templates, and cuts line breaks as Llama 3 and Qwen do."
    t, pre = deepcopy(tok), tokenizers.pre_tokenizers
    t.add_special_tokens(dict(additional_special_tokens=sorted({*FRAME.findall("".join(SOURCES.values()))})))
    t.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(RULE), "isolated"),
                                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    return t


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "A function: TRL's ids and labels of rows."
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("trl")
    def f(row, t, **how):
        args = trl.SFTConfig(str(folder), max_length=None, report_to="none", use_cpu=True, bf16=False, **how)
        with quiet(): trainer = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list([row]), processing_class=t)
        b = trainer.data_collator([trainer.train_dataset[0]])
        return dict(input_ids=b["input_ids"][0].tolist(), labels=b["labels"][0].tolist())
    return f


def differences(ours, other, t):
    "What TRL trains and we do not, before an answer and after it. Everything else has to be equal."
    n = len(ours["input_ids"])
    assert other["input_ids"][:n] == ours["input_ids"]
    pairs = list(zip(other["labels"], ours["labels"] + [-100]*(len(other["labels"]) - n)))
    assert all(b in (a, -100) for a, b in pairs), "TRL trains less"
    text = "".join(t.decode([a]) if a != b else "\0" if a == -100 else "\1" for a, b in pairs)
    return {(o, "after" if p else "before") for p, o in re.findall("(\1?)([^\0\1]+)", text)}


ONE = dict(prompt="Say yes or no.", response="yes, yes")
MULTI = chat(("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "It is 6."))
SYSTEM = chat(("system", "Be brief."), *[(m["role"], m["content"]) for m in MULTI["messages"]])
NEVER = {("\n", "after")}                                  # the line break behind an end token
THINKS = "deepseek_r1_distill deepseekv3 nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra qwen3_5_think qwen3_6 qwen3_8".split()
LOSES = ["idefics3", "smolvlm"]                            # templates of vision models that drop plain text
REFUSED = {**{o: "follows|shares a token" for o in THINKS}, **{o: "changes" for o in LOSES},
           "glm4moe": "without an end token", "llava_next": "refuses"}
REFUSED_CHATS = REFUSED | {"gptoss": "without an end token", "qwen3": "changes", "qwen3_5_nothink": "changes"}
BEFORE = {"muse_glimmer": "<|start|>assistant", "qwen2_5": "\n"}


def dressed(t, source):
    t = copy(t)
    t.chat_template = source
    return t


@pytest.mark.parametrize("name", ORIGINALS or ["none"])
def test_completion_as_trl(name, stand_in, theirs):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    t, messages = dressed(stand_in, SOURCES[name]), as_messages(ONE)
    if name in REFUSED:
        with pytest.raises(QLoRAError, match=REFUSED[name]): encode(ONE, t)
        return
    other = theirs(dict(prompt=messages[:1], completion=messages[1:]), t)
    assert differences(encode(ONE, t), other, t) <= NEVER


@pytest.mark.parametrize("row", ["MULTI", "SYSTEM"])
@pytest.mark.parametrize("name", ORIGINALS or ["none"])
def test_chat_as_trl(name, row, stand_in, theirs):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    t, row = dressed(stand_in, SOURCES[name]), globals()[row]
    if name in REFUSED_CHATS or name == "gemma" and row is SYSTEM:
        with pytest.raises(QLoRAError, match=REFUSED_CHATS.get(name, "refuses")): encode(row, t)
        return
    ours = encode(row, t)
    try: other = theirs(row, t, assistant_only_loss=True)
    except ValueError as e:
        assert "not training-compatible" in str(e) and name.startswith(("gemma4", "llama3_")), "TRL refuses"
        return
    assert differences(ours, other, t) - {(BEFORE.get(name), "before")} <= NEVER


@pytest.mark.parametrize("name", [o for o in SOURCES if o.endswith("_training")] or ["none"])
def test_marked_template_as_trl(name, stand_in, theirs):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    t, base = dressed(stand_in, SOURCES[name]), name.removesuffix("_training")
    row = MULTI
    if base in {**REFUSED_CHATS} and base not in ("glm4moe", "qwen3", "qwen3_5_nothink"):
        with pytest.raises(QLoRAError): encode(row, t)
        return
    thought = {("<think>\n\n</think>\n\n", "before")} if base == "qwen3_5_nothink" else set()
    assert differences(encode(row, t), theirs(row, t, assistant_only_loss=True), t) - {(BEFORE.get(base), "before")} - thought <= NEVER


@pytest.mark.parametrize("name", [o for o in THINKS if not o.startswith("deepseek")])
def test_thinking_switched_off_as_trl(name, stand_in, theirs):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    t, messages = dressed(stand_in, SOURCES[name]), as_messages(ONE)
    row = dict(prompt=messages[:1], completion=messages[1:], chat_template_kwargs=dict(enable_thinking=False, thinking=False))
    ours = encode(ONE, t, "no-thinking")
    assert differences(ours, theirs(row, t), t) <= NEVER
    prompt = t(encode_prompt(ONE, t, "no-thinking"), add_special_tokens=False).input_ids
    assert ours["input_ids"][:len(prompt)] == prompt


@pytest.mark.parametrize("name", [o for o in THINKS if not o.startswith("deepseek")] + ["qwen3", "qwen3_5_nothink"])
def test_chats_with_thinking_switched_off_as_trl(name, stand_in, theirs):
    "TRL's marks hold the empty thought that our prompt holds."
    if not SOURCES: pytest.skip("this TRL ships no templates")
    t = dressed(stand_in, SOURCES[name + "_training"])
    other = theirs(SYSTEM | dict(chat_template_kwargs=dict(enable_thinking=False, thinking=False)), t, assistant_only_loss=True)
    more = differences(encode(SYSTEM, t, "no-thinking"), other, t) - NEVER
    assert more <= {(o, "before") for o in ("<think></think>", "<think>\n\n</think>\n\n")}


def test_article_as_trl(tok, theirs):
    for row in (ONE, ONE | dict(system="Be brief.")):
        other = theirs(dict(prompt=encode_prompt(row, tok, "article"), completion=answer_of(row) + tok.eos_token), tok)
        assert encode(row, tok, "article") == other


def test_trl_trains_lost_text_and_open_ends(stand_in, theirs):
    "Why we refuse: what TRL would train on."
    if not SOURCES: pytest.skip("this TRL ships no templates")
    messages = as_messages(ONE)
    for name in LOSES:
        other = theirs(dict(prompt=messages[:1], completion=messages[1:]), t := dressed(stand_in, SOURCES[name]))
        assert "yes" not in t.decode(other["input_ids"])
    other = theirs(dict(prompt=messages[:1], completion=messages[1:]), t := dressed(stand_in, SOURCES["glm4moe"]))
    assert t.decode(other["input_ids"]).endswith("yes, yes")


# ---- rows that are too long ----

LONG_CHAT = chat(("system", "Be brief."), *[(r, f"{r} says {i} things") for i in range(6) for r in ("user", "assistant")])

@given(limit=st.integers(20, 200), n=st.integers(0, 80), template=st.sampled_from(["chat", "article"]))
@settings(max_examples=60, deadline=None)
def test_shorten_keeps_what_matters(tok, limit, n, template):
    for row in (LONG_CHAT, dict(prompt="Tell me about this: " + "word "*n + "Thank you!", response="It is a word.")):
        short = shorten(row, tok, template, limit)
        whole = encode(row, tok, template)
        alone = chat(*[(m["role"], m["content"] if m["role"] != "user" else " […] ") for m in as_messages(row)[:1] + as_messages(row)[-2:]
                       if m["role"] == "system" or m in as_messages(row)[-2:]])
        if short is None:
            assert len(encode(alone, tok, template)["input_ids"]) > limit
            continue
        e = encode(short, tok, template)
        assert len(e["input_ids"]) <= limit and answer_of(short) == answer_of(row) and e["labels"][-1] == tok.eos_token_id
        if len(whole["input_ids"]) <= limit: assert e == whole
        before, after = as_messages(row), short["messages"]
        if before[0]["role"] == "system": assert after[0] == before[0]
        if len(after) > 3: assert after[1:] == before[-len(after) + 1:]


def test_shorten_uses_the_room(tok):
    row = dict(prompt="Begin " + "middle "*200 + "end", response="yes")
    for limit in (60, 100, 150):
        assert limit - 4 <= len(encode(shorten(row, tok, "auto", limit), tok)["input_ids"]) <= limit
    text = shorten(row, tok, "auto", 60)["messages"][0]["content"]
    assert text.startswith("Begin") and text.endswith("end") and " […] " in text


def test_reports(tok):
    rows = [dict(prompt="Hi", response="Hello"), dict(prompt="word "*100, response="Hello"), dict(prompt="Hi", response="word "*100)]
    with pytest.warns(UserWarning, match="2 of 3 rows are longer than max_length=64 tokens: 1 cut in the prompt, the first is row 2; "
                                         "1 left out as the answer alone has no room, the first is row 3. Set max_length="):
        cut = encode_rows(rows, tok, max_length=64, long="cut")
    assert len(cut) == 2 and all(len(o["input_ids"]) <= 64 for o in cut) and cut.report["first"] == {"cut": 2, "no room": 3}
    assert {k: cut.report[k] for k in ("rows", "kept", "cut", "dropped", "no room", "turns")} == {
        "rows": 3, "kept": 1, "cut": 1, "dropped": 0, "no room": 1, "turns": 1}
    with pytest.warns(UserWarning, match="2 left out"): assert len(encode_rows(rows, tok, max_length=64)) == 1
    with pytest.raises(QLoRAError, match="row 2: the example has .* tokens, but max_length is 64. Set max_length="):
        encode_rows(rows, tok, max_length=64, long="error")
    with pytest.raises(QLoRAError, match="no choice long='truncate'. Choose from: drop, cut, error"): encode_rows(rows, tok, long="truncate")
    with pytest.raises(QLoRAError, match="all rows are longer"), warnings.catch_warnings(): encode_rows(rows[2:], tok, max_length=64, long="cut")


# ---- files larger than memory ----

def write(path, rows):
    if path.suffix == ".parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    else: path.write_text("\ufeff" + "\n \n".join(json.dumps(o, ensure_ascii=False) for o in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("how", [dict(), dict(max_length=105), dict(max_length=105, long="cut", num_proc=2), dict(template="article")])
def test_mapped_as_listed(tok, kind, how, tmp_path):
    path = write(tmp_path/f"a{kind}", make_tickets("test", 60) + [dict(prompt="a\u2028b\x85c", response="d")])
    same = {k: v for k, v in how.items() if k != "num_proc"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = encode_rows(load_rows(path), tok, **same)
        mapped = map_rows(path, tok, cache_dir=tmp_path/"cache", **how)
        streamed = stream_rows(path, tok, **same)
        assert list(mapped) == list(listed) == list(streamed) == list(streamed)
    assert mapped.report == listed.report and mapped.column_names == ["input_ids", "labels"]


def test_mapped_chats_of_every_shape(tok, tmp_path):
    for i, row in enumerate([SYSTEM, GOOD["ShareGPT, system beside"][0], GOOD["Alpaca with system"][0]]):
        path = write(tmp_path/f"{i}.jsonl", [row]*3)
        assert list(map_rows(path, tok, cache_dir=tmp_path/"cache")) == list(encode_rows(load_rows(path), tok))


@pytest.mark.parametrize("text,what", [('{"prompt": "a"}', "`response` is missing"), ('{"prompt": "a", "resp', "not valid JSON"),
                                       ('["a"]', "the row is a list"), (lines(HI), "has the shape messages")])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_mapped_errors_name_the_row(tok, text, what, num_proc, tmp_path):
    path = write(tmp_path/"a.jsonl", make_tickets(n=30))
    path.write_text(path.read_text(encoding="utf-8") + "\n\n" + text + "\n", encoding="utf-8")
    with pytest.raises(QLoRAError) as e: map_rows(path, tok, num_proc=num_proc, cache_dir=tmp_path/"cache")
    assert e.value.where == f"{path}, row 31" and what in e.value.what
    with pytest.raises(QLoRAError, match="row 31"): list(stream_rows(path, tok))


def test_mapped_errors_before_any_work(tok, tmp_path):
    (bad := tmp_path/"a.jsonl").write_bytes(lines(ONE).encode() + "\n\n{\"prompt\": \"é\"}".encode("latin-1"))
    for f in (map_rows, stream_rows):
        with pytest.raises(QLoRAError, match="row 2: byte 0xe9 is not UTF-8"): f(bad, tok)
        with pytest.raises(QLoRAError, match="no such file. Did you mean '"): f(tmp_path/"b.jsonl", tok)
        with pytest.raises(QLoRAError, match="in memory already"): f([ONE], tok)
        with pytest.raises(QLoRAError, match="in memory already"): f("tickets", tok)
        (tmp_path/"blank.jsonl").write_text("\n \n", encoding="utf-8")
        with pytest.raises(QLoRAError, match="there are no rows"): f(tmp_path/"blank.jsonl", tok)
        (tmp_path/"a.csv").write_text("prompt,response\na,b\n", encoding="utf-8")
        with pytest.raises(QLoRAError, match="cannot be read row by row"): f(tmp_path/"a.csv", tok)
        with pytest.raises(QLoRAError, match="no choice long"): list(f(write(tmp_path/"c.jsonl", [ONE]), tok, long="x"))


def test_mapped_again_only_when_something_changed(tok, tmp_path, monkeypatch):
    path, calls = write(tmp_path/"a.jsonl", make_tickets(n=5)), []
    import qlora_nb.data as data
    fit = data._fit
    monkeypatch.setattr(data, "_fit", lambda *a, **k: calls.append(1) or fit(*a, **k))
    def run(**how):
        calls.clear()
        rows = list(map_rows(path, how.pop("tok", tok), cache_dir=tmp_path/"cache", **how))
        return len(calls), rows
    assert run()[0] == 5 and run()[0] == 0
    assert run(template="article")[0] == 5 and run(max_length=400)[0] == 5
    other = dressed(tok, tok.chat_template.replace("helpful", "kind"))
    assert run(tok=other)[0] == 5
    write(path, make_tickets(n=6))
    n, rows = run()
    assert n == 6 == len(rows) and run()[0] == 0


def test_hub_tables_are_mapped(tok, monkeypatch, tmp_path):
    table = datasets.Dataset.from_list([ONE, dict(prompt="a", response="")])
    monkeypatch.setattr("datasets.load_dataset", lambda name, split, **how: table)
    with pytest.raises(QLoRAError, match="someone/x, row 2: `response` is empty"): map_rows("someone/x", tok)


def test_identity_and_size(tmp_path):
    path = write(tmp_path/"a.jsonl", [ONE])
    first = digest(path)
    assert digest(str(path)) == first and digest(write(tmp_path/"b.jsonl", [ONE])) == first
    write(path, [ONE | dict(prompt="Say no or yes.")])
    assert digest(path) != first and digest([ONE]) == digest([dict(reversed(ONE.items()))]) != digest([MULTI])
    assert not is_large(path) and is_large(path, 10) and not is_large([ONE], 0) and not is_large("someone/x", 0)
    assert not is_large(tmp_path/"none.jsonl", 0) and not is_large("tickets", 0)


def test_a_row_does_not_ask_for_the_whole_vocabulary():
    "With tokenizers 0.22, which Colab has, the length of a tokenizer takes 40 ms: as much as encoding thirty rows."
    tok = load_tokenizer()
    with patch.object(type(tok), "__len__", side_effect=AssertionError("asked")):
        assert encode(dict(prompt="Hello", response="Hi."), tok)["labels"][-1] == tok.eos_token_id
