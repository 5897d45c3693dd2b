"Formats in and templates out: ShareGPT, Alpaca, chats, Parquet; our masks beside TRL's; long rows; files larger than memory."
import gzip, json, re, warnings
from copy import copy, deepcopy
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

import datasets, pyarrow as pa, pyarrow.parquet as pq, pytest, tokenizers, trl
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_nb.base.errors import QLoRAError
from qlora_nb.training.data import (answer_of, as_messages, digest, encode, encode_prompt, encode_rows, is_large, load_rows,
                           make_tickets, map_rows, numbered, shorten)
from qlora_nb.base.mapped import Mapped
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.training.chat_templates import render
from qlora_nb.training.schedule import name_rows, source_of, told_of

datasets.disable_progress_bars()
def lines(*rows): return "\n".join(map(json.dumps, rows))
def chat(*turns): return dict(messages=[dict(role=r, content=c) for r, c in turns])
def share(*turns, **more): return dict(conversations=[{"from": r, "value": c} for r, c in turns], **more)

HI = chat(("user", "Hi"), ("assistant", "Hello"))
PAIR = dict(prompt="Hi", response="Hello")
SYSTEM_HI = chat(("system", "s"), ("user", "Hi"), ("assistant", "Hello"))


# ---- formats in ----

GOOD = {
    "ShareGPT": (share(("human", "Hi"), ("gpt", "Hello")), HI),
    "ShareGPT's synonyms": (share(("user", "Hi"), ("chatgpt", "Hello")), HI),
    "ShareGPT with roles": (dict(conversations=HI["messages"]), HI),
    "ShareGPT's system turn": (share(("system", "s"), ("human", "Hi"), ("model", "Hello")), SYSTEM_HI),
    "ShareGPT, system beside": (share(("human", "Hi"), ("gpt", "Hello"), system="s", id=3), SYSTEM_HI),
    "ShareGPT, empty system": (share(("human", "Hi"), ("bot", "Hello"), system=""), HI),
    "ShareGPT, system of spaces": (share(("human", "Hi"), ("bot", "Hello"), system="  "), HI),
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
    "no speaker": (dict(conversations=[{"value": "Hi"}]), "message 1 has no `role` (found: 'value')"),
    "speaker is a list": (dict(conversations=[{"from": ["human"], "value": "Hi"}]), "unknown role"),
    "no value": (dict(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "content of message 1` must be text, not null"),
    "value is a number": (share(("human", "Hi"), ("gpt", 4)), "content of message 2` must be text, not int"),
    "turn is text": (dict(conversations=["Hi", "Hello", "Bye"]), "message 1 needs `role`"),
    "not a list": (dict(conversations="Hi"), "must be a list"),
    "human last": (share(("human", "a"), ("gpt", "b"), ("human", "c")), "last message is the user's"),
    "answer first": (share(("gpt", "a"), ("human", "b"), ("gpt", "c")), "message 1 is an answer of the assistant that follows no question"),
    "two answers": (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 is an answer"),
    "answer to the system": (chat(("system", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "message 2 is an answer"),
    "two systems": (SYSTEM_HI | dict(system="t"), "a system message beside the messages ('t'), and message 1 is another"),
    "system is a number": (dict(prompt="a", response="b", system=3), "`system` must be text, not int"),
    "half a surrogate": (share(("human", "\ud83d"), ("gpt", "b")), "surrogate"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_format(case, tmp_path):
    row, what = BAD[case]
    good = share(("human", "Hi"), ("gpt", "Hello")) if "conversations" in row else GOOD["messages"][0] if "messages" in row else GOOD["pair"][0]
    (path := tmp_path/"a.jsonl").write_text(lines(good, row), encoding="utf-8")
    for read in (load_rows, lambda p: map_rows(p, cache_dir=tmp_path/"cache")):
        with pytest.raises(QLoRAError) as e: read(path)
        assert e.value.where == f"{path}, row 2" and what in e.value.what and "skip_bad_rows" in e.value.cure
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "A.NDJSON", "a.ndjson.gz"])
def test_other_names_of_lines_of_json(name, tmp_path):
    path, row = tmp_path/name, GOOD["messages"][0]
    path.write_bytes((gzip.compress if name.endswith("gz") else bytes)(lines(row, row).encode()))
    assert load_rows(path) == load_rows([row, row]) and is_large(path, 10)
    with pytest.raises(QLoRAError, match="no such file"): load_rows(str(tmp_path/f"b{path.suffix}"))


def test_formats_cannot_be_mixed(tmp_path):
    (path := tmp_path/"a.jsonl").write_text(lines(GOOD["ShareGPT"][0], GOOD["messages"][0]), encoding="utf-8")
    with pytest.raises(QLoRAError, match="row 2: the row has the shape messages, but row 1 has conversations"): load_rows(path)
    (path := tmp_path/"a.csv").write_text("conversations\nx\n", encoding="utf-8")
    with pytest.raises(QLoRAError, match="row 1: `messages` must be a list"): load_rows(path)


# ---- the formats of public data sets, each field with its meaning or refused ----

Q, A = dict(role="user", content="Q"), dict(role="assistant", content="A")
CALL = dict(type="function", function=dict(name="weather", arguments=dict(city="Lyon")))
TEXT_CALL = dict(id="c1", type="function", function=dict(name="weather", arguments='{"city": "Lyon"}'))
TOOLS = [dict(type="function", function=dict(name="weather", description="Says it.", parameters=dict(
    type="object", properties=dict(city=dict(type="string", description="Which?")), required=["city"])))]
def called(**more): return dict(role="assistant", content="", tool_calls=[CALL | more])

READ = {
    "Dolly": (dict(instruction="Q", context="C", response="A"), dict(prompt="Q\n\nC", response="A")),
    "Dolly without context": (dict(instruction="Q", context="", response="A"), dict(prompt="Q", response="A")),
    "RAG": (dict(prompt="Q", context="C", response="A"), dict(prompt="Q\n\nC", response="A")),
    "Orca": (dict(system_prompt="S", question="Q", response="A"), dict(system="S", prompt="Q", response="A")),
    "Orca without system": (dict(system_prompt="", question="Q", response="A"), dict(prompt="Q", response="A")),
    "MetaMath": (dict(type="x", query="Q", original_question="Q, or what?", response="A"), dict(prompt="Q", response="A")),
    "GSM8K": (dict(question="Q", answer="A\n#### 1"), dict(prompt="Q", response="A\n#### 1")),
    "completion": (dict(prompt="Q", completion="A"), dict(prompt="Q", response="A")),
    "input and output": (dict(input="Q", output="A"), dict(prompt="Q", response="A")),
    "Alpaca, zh": (dict(instruction="把", input="Lyon，很美", output="好！", history=[]), dict(prompt="把\n\nLyon，很美", response="好！")),
    "history": (dict(instruction="Q", input="", output="A", history=[["你好", "您好！"]]),
                chat(("user", "你好"), ("assistant", "您好！"), ("user", "Q"), ("assistant", "A"))),
    "history of messages": (dict(query="Q", response="A", system="S", history=[Q, A]), dict(messages=[dict(role="system", content="S"), Q, A, Q, A])),
    "TRL": (dict(prompt=[Q, A, Q], completion=[A]), dict(messages=[Q, A | dict(weight=0), Q, A])),
    "weights": (dict(messages=[Q, A | dict(weight=0), Q | dict(weight=1), A | dict(weight=1), Q, A | dict(weight=0.)]),
                dict(messages=[Q, A | dict(weight=0), Q, A])),
    "parts": (dict(messages=[dict(role="user", content=[dict(type="text", text="Q")]), dict(role="assistant", content=[dict(type="text", text="A")])]), dict(messages=[Q, A])),
    "developer": (dict(messages=[dict(role="developer", content="s"), *HI["messages"]]), SYSTEM_HI),
    "human in messages": (chat(("human", "Hi"), ("gpt", "Hello")), HI),
    "JSON in a cell": (dict(messages=json.dumps(HI["messages"])), HI),
    "Python in a cell": (dict(conversations=repr(HI["messages"])), HI),
    "nothing in words": (dict(instruction="Q", input="nan", output="A"), dict(prompt="Q", response="A")),
    "tools": (dict(messages=[Q, dict(role="assistant", content=None, tool_calls=[TEXT_CALL])], tools=json.dumps(TOOLS)),
              dict(messages=[Q, called(id="c1")], tools=TOOLS)),
    "functions": (dict(messages=[Q, dict(role="assistant", content=None, function_call=TEXT_CALL["function"]), dict(role="function", name="weather", content="sun"), A],
                       functions=[TOOLS[0]["function"]]),
                  dict(messages=[Q, called(), dict(role="tool", content="sun", name="weather"), A], tools=TOOLS)),
    "ShareGPT's calls": (share(("human", "Q"), ("function_call", json.dumps(CALL["function"])), ("observation", "sun"), ("gpt", "A"), tools=json.dumps(TOOLS)),
                         dict(messages=[Q, called(), dict(role="tool", content="sun"), A], tools=TOOLS)),
    "reasoning": (dict(messages=[Q, A | dict(reasoning="R")]), dict(messages=[Q, A | dict(reasoning_content="R")])),
    "copies": (dict(prompt="Q", prompt_id="1", messages=[Q, A]), dict(messages=[Q, A])),
    "Alpaca's text": (dict(instruction="Q", input="", output="A", text="### Instruction:\nQ\n\n### Response:\nA"), dict(prompt="Q", response="A")),
    "names": (dict(messages=[Q | dict(name="bob"), A], usage=dict(total_tokens=5)), dict(messages=[Q, A])),
    "labels": (dict(prompt="Q", response="A", id="a1", label="good", topic="early history", score=3, ok=True, seen=None, tags=["a b"]), dict(prompt="Q", response="A")),
}

@pytest.mark.parametrize("case", READ)
def test_each_format_is_read(case, tmp_path):
    row, wanted = READ[case]
    (path := tmp_path/"a.jsonl").write_text(lines(row, row), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_rows(path) == load_rows([row, row]) == [wanted]*2
        pq.write_table(pa.Table.from_pylist([row, row | dict(other_id="x")]), tmp_path/"a.parquet")
        assert load_rows(tmp_path/"a.parquet") == [wanted]*2


LOST = {
    "preference pairs": (dict(prompt="Q", chosen="A", rejected="B"), "preference pair", "--columns prompt=prompt,response=chosen"),
    "preference chats": (dict(prompt="Q", chosen=[Q, A], rejected=[Q, A]), "preference pair", "--columns messages=chosen"),
    "judged answers": (dict(prompt="Q", completion="A", label=False), "judged good or bad (`label`), made for KTO", "response=completion"),
    "text in an object": (dict(prompt="Q", response="A", extra=dict(n=1, hint="Look it up first.")), "`extra`", "--columns"),
    "OASST": (dict(message_id="b", parent_id=None, text="Q", role="prompter", lang="en"), "one message of a tree", "`messages`"),
    "plain text": (dict(text="### Human: Q ### Assistant: A"), "cannot be told apart", "`prompt` and `response`"),
    "other names": (dict(q="Why is that?", a="It just is."), "none of the known fields; it has 'q', 'a'", "--columns prompt=q,response=a"),
    "a passage": (dict(prompt="Q", passage="A text to be read.", response="A"), "the field `passage` ('A text to be read.') would be lost", "context='passage'"),
    "an unknown text": (dict(question="Q", hintergrund="Ein Text.", answer="A"), "`hintergrund`", "columns=dict(prompt='question', response='answer')"),
    "one word under a known name": (dict(messages=[Q, A], context="Lyon"), "the field `context`", "columns=dict(messages='messages')"),
    "two answers": (dict(question="Q", answer="42", response="It is 41."), "`answer`", "--columns"),
    "two contexts": (dict(instruction="Q", input="I", context="C", output="A"), "'context' and 'input' are both filled", "--columns"),
    "weight of a row": (dict(prompt="Q", response="A", weight=.5), "`weight`", "--columns"),
    "weight between": (dict(messages=[Q, A | dict(weight=.5)]), "weight of message 2 is 0.5", "skip"),
    "only weights of 0": (dict(messages=[Q, A | dict(weight=0)]), "nothing to learn", "skip"),
    "images": (dict(messages=[Q, A], images=["a.png"]), "`images`", "--columns"),
    "an image in a part": (dict(messages=[dict(role="user", content=[dict(type="image_url", image_url="a.png")]), A]), "a part of the kind 'image_url'", "skip"),
    "a field of a message": (dict(messages=[Q, A | dict(plan="Look it up first.")]), "the field 'plan' of message 2", "skip"),
    "history of another kind": (dict(instruction="Q", output="A", history=["a", "b"]), "`history` must hold pairs", "skip"),
    "a result without a call": (dict(messages=[Q, dict(role="tool", content="x"), A]), "message 2 is the result of a tool that was not called", "skip"),
    "tools that are none": (dict(messages=[Q, A], tools="weather"), "`tools` must be a list", "skip"),
    "the user last": (chat(("user", "a"), ("assistant", "b"), ("user", "q"), ("user", "c")), "message 4 of 4", "--skip-bad-rows"),
}

@pytest.mark.parametrize("case", LOST)
def test_what_would_be_lost_is_refused(case, tmp_path):
    row, what, cure = LOST[case]
    (path := tmp_path/"a.jsonl").write_text(lines(row), encoding="utf-8")
    for read in (load_rows, lambda p: map_rows(p, cache_dir=tmp_path/"cache")):
        with pytest.raises(QLoRAError) as e: read(path)
        assert e.value.where == f"{path}, row 1" and what in e.value.what and cure in e.value.cure and "\n" not in str(e.value), str(e.value)


def test_what_is_not_used_is_said_once(tmp_path):
    rows = [dict(prompt="Q", response="A", category="open_qa", source="x y z", note=None) for _ in range(5)]
    del rows[0]["source"]
    (path := tmp_path/"a.jsonl").write_text(lines(*rows), encoding="utf-8")
    with pytest.warns(UserWarning) as said: load_rows(path)
    assert [str(o.message) for o in said] == [f"{path}: not used: `category` (5 rows, the first is row 1, 'open_qa'); "
                                              "`source` (4 rows, the first is row 2, 'x y z')."]


def test_columns_are_mapped(tmp_path, tok):
    row = dict(q="Who?", a="Ada did.", about="A text.", who="Be brief.", more="left out on purpose")
    (path := tmp_path/"a.jsonl").write_text(lines(row, row), encoding="utf-8")
    how = dict(columns=dict(prompt="q", response="a", context="about", system="who"))
    with pytest.warns(UserWarning, match="not used: `more`"): rows = load_rows(path, **how)
    assert rows == [dict(system="Be brief.", prompt="Who?\n\nA text.", response="Ada did.")]*2
    with pytest.warns(UserWarning, match="not used: `more`"): assert list(map_rows(path, cache_dir=tmp_path/"cache", **how)) == rows
    (path := tmp_path/"a.csv").write_text("q;a\nHi;Hello\n", encoding="utf-8")
    assert load_rows(path, columns=dict(prompt="q", response="a")) == [dict(prompt="Hi", response="Hello")]
    with pytest.raises(QLoRAError, match="no place 'answer' for a column. Choose from: prompt, response"): load_rows(path, columns=dict(answer="a"))
    with pytest.raises(QLoRAError, match="row 1: the column `x` is missing; the row has 'q', 'a'"): load_rows(path, columns=dict(prompt="x", response="a"))


def test_a_system_prompt_for_all(tmp_path):
    rows = load_rows([dict(prompt="Q", response="A"), dict(prompt="Q", response="A", system="own")], system="S")
    assert [o["system"] for o in rows] == ["S", "own"]
    assert load_rows([dict(messages=[Q, A])], system="s")[0]["messages"][0] == dict(role="system", content="s")


def test_parquet_can_be_broken(tmp_path):
    pq.write_table(pa.Table.from_pylist([dict(prompt="a", response="b"), dict(prompt="c", response=None)]), tmp_path/"a.parquet")
    with pytest.raises(QLoRAError, match="row 2: `response` must be text, not null"): load_rows(tmp_path/"a.parquet")
    (tmp_path/"b.parquet").write_bytes((tmp_path/"a.parquet").read_bytes()[:100])
    with pytest.raises(QLoRAError, match="this is not a Parquet file") as e: load_rows(tmp_path/"b.parquet")
    assert "\n" not in str(e.value)
    (tmp_path/"c.parquet").write_bytes(b"")
    with pytest.raises(QLoRAError, match="not a Parquet file"): load_rows(tmp_path/"c.parquet")


# ---- our masks beside TRL's ----

@pytest.fixture(scope="session")
def tok(): return load_tokenizer("smollm2")

SHELF = Path(trl.__file__).parent/"chat_templates"
SOURCES = {o.stem: o.read_text(encoding="utf-8") for o in sorted(SHELF.glob("*.jinja"))}
ORIGINALS = [o for o in SOURCES if not o.endswith("_training")]
FRAME = re.compile(r"<[^\s<>'\"{}]{1,40}>|\[/?[A-Z_]+\]")
RULE = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def stand_in(tok):
    "A tokenizer that knows the frames of all of TRL's templates, and cuts line breaks as Llama 3 and Qwen do."
    t, pre = deepcopy(tok), tokenizers.pre_tokenizers
    t.add_special_tokens(dict(additional_special_tokens=sorted({*FRAME.findall("".join(SOURCES.values()))})))
    t.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(RULE), "isolated"),
                                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    return t


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    "A function: TRL's ids and labels of rows."
    model, folder, known = tiny_model("llama"), tmp_path_factory.mktemp("trl"), {}
    def vocabulary(t):   # each trainer asks twice for 49,152 words, whether they hold one
        key = type(t), len(t), *t.get_added_vocab()
        if key not in known: known[key] = get_vocab(t)
        return known[key]
    get_vocab = PreTrainedTokenizerFast.get_vocab
    def f(row, t, **how):
        args = trl.SFTConfig(str(folder), max_length=None, report_to="none", use_cpu=True, bf16=False, **how)
        with quiet(), pytest.MonkeyPatch.context() as m:   # a table in memory needs no name in a cache, which would be made of the vocabulary
            m.setattr(datasets.fingerprint.Hasher, "hash", lambda *_: uuid4().hex)
            m.setattr(PreTrainedTokenizerFast, "get_vocab", vocabulary)
            trainer = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list([row]), processing_class=t)
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


def needs_new_messages(name):
    "LFM2's newer template reads `thinking`, and no None: older transformers hand it what stands in the row."
    if name == "lfm2_2_5" and not hasattr(chat_template_utils, "_REASONING_FIELDS"):
        pytest.skip("this transformers does not put messages right for a template")


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


# ---- tools, reasoning, weights ----

def taught(example, t): return t.decode([o for o in example["labels"] if o != -100])

TOOL_ROW = dict(tools=TOOLS, messages=[dict(role="system", content="Use tools."), dict(role="user", content="Weather in Lyon?"),
                                       dict(role="assistant", content="I'll check.", tool_calls=[CALL]),
                                       dict(role="tool", content="sunny, 20 C", name="weather"), dict(role="assistant", content="It is sunny.")])
WRITES = {"qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>',
          "qwen3_training": '{"name": "weather", "arguments": {"city": "Lyon"}}', "qwen3_instruct_2507": '"arguments": {"city": "Lyon"}',
          "qwen3_vl": '"arguments": {"city": "Lyon"}', "lfm2_2_5": "[weather(city='Lyon')]", "lfm2_v2_training": "[weather(city='Lyon')]",
          "qwen3_5_nothink": "<parameter=city>\nLyon", "glm4moe_training": "<arg_value>Lyon</arg_value>"}

@pytest.mark.parametrize("name", WRITES)
def test_tool_calls_as_trl(name, stand_in, theirs):
    "The call and the end after it are taught; TRL's marks agree but for a piece of the frame."
    if not SOURCES: pytest.skip("this TRL ships no templates")
    needs_new_messages(name)
    t = dressed(stand_in, SOURCES[name])
    ours = encode(load_rows([TOOL_ROW])[0], t)
    frame = {("\n", "before"), ("<think>\n\n</think>\n\n", "before")}
    assert differences(ours, theirs(TOOL_ROW, t, assistant_only_loss=True), t) - frame <= NEVER
    said = taught(ours, t)
    assert WRITES[name] in said and said.index("I'll check.") < said.index(WRITES[name]) < said.index("It is sunny.")
    assert "sunny, 20 C" not in said and "Says it." not in said and "Says it." in t.decode(ours["input_ids"])
    prompt = encode_prompt(TOOL_ROW, t)
    assert "Says it." in prompt and "sunny, 20 C" in prompt and "It is sunny." not in prompt


def test_calls_that_a_template_does_not_write_are_refused(stand_in, tok):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    row = load_rows([TOOL_ROW])[0]
    for t in (tok, dressed(stand_in, SOURCES["lfm2"])):   # the latter writes the tools, and "Lyon" and "city" stand in the question
        with pytest.raises(QLoRAError, match="does not write the tool calls of this row.*--chat-template"): encode(row, t)
    with pytest.raises(QLoRAError, match="changes message 3"): encode(row, dressed(stand_in, SOURCES["llama3_1"]))   # drops the words beside a call
    with pytest.raises(QLoRAError, match="leaves out the tools"): encode(HI | dict(tools=TOOLS), tok)
    with pytest.raises(QLoRAError, match="'article' has no place for tools"): encode(row, tok, "article")
    printed = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    own = dressed(tok, printed + "{% if add_generation_prompt %}{% endif %}")
    assert '{"city": "Lyon"}' in render(row["messages"], own), "given as JSON where objects would be printed as Python"


@pytest.mark.parametrize("name,thought", [("qwen3", "<think>\nTwo and two.\n</think>\n\n4"), ("lfm2_2_5", "<think>Two and two.</think>4"),
                                          ("qwen3_6", "Two and two.\n</think>\n\n4"), ("glm4moe_training", "<think>Two and two.</think>\n4")])
def test_reasoning_as_trl(name, thought, stand_in, theirs):
    if not SOURCES: pytest.skip("this TRL ships no templates")
    needs_new_messages(name)
    t, row = dressed(stand_in, SOURCES[name]), dict(messages=[dict(role="user", content="2+2?"), dict(role="assistant", content="4", reasoning_content="Two and two.")])
    ours = encode(load_rows([row])[0], t)
    assert differences(ours, theirs(row, t, assistant_only_loss=True), t) - {("<think>\n", "before")} <= NEVER
    assert thought in taught(ours, t)
    with pytest.raises(QLoRAError, match="leaves out the reasoning of message 2"): encode(row, dressed(stand_in, SOURCES["qwen2_5"]))


def test_weight_zero_is_not_taught(tok):
    row = load_rows([dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="BAD", weight=0),
                                    dict(role="user", content="b"), dict(role="assistant", content="GOOD", weight=1)])])[0]
    for template in ("chat", "article"):
        e = encode(row, tok, template)
        assert taught(e, tok) == "GOOD<|im_end|>" and "BAD" in tok.decode(e["input_ids"])


FORGETS = ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def test_a_template_that_forgets_is_refused(tok):
    for row in (SYSTEM_HI, dict(system="Be brief.", prompt="Hi", response="Hello")):
        with pytest.raises(QLoRAError, match="leaves out message 1, the system's.*template='article'"): encode(row, dressed(tok, FORGETS))
        assert taught(encode(row, tok), tok) == "Hello<|im_end|>"
    assert taught(encode(HI, dressed(tok, FORGETS)), tok) == "Hello<|im_end|>"
    shouts = dressed(tok, tok.chat_template.replace("message['content']", "(message['content'] if message['role'] == 'assistant' else message['content']|upper)"))
    assert taught(encode(dict(system="be brief", prompt="hi", response="Hello"), shouts), tok) == "Hello<|im_end|>", "rewritten is not lost"


def test_rows_of_several_files_name_theirs(tok, tmp_path):
    "The same from lists and from tables on the disk; a number alone would mean a row in each of them."
    files = [tmp_path/o for o in ("a.jsonl", "b.jsonl")]
    for o in files: o.write_text(lines(PAIR, PAIR | dict(response="word "*99 if o == files[1] else "Hello"), PAIR | dict(response="<|im_end|>")) + "\n", encoding="utf-8")
    a, b = files
    rows, same = load_rows([a, (b, 2)]), dict(template="auto", max_length=64)
    said = [f"2 of 9 rows are longer than max_length=64 tokens: 2 left out, the first is row 2 of {b}.", f"control tokens within the text (3 rows, the first is row 3 of {a}"]
    for of in (rows, load_rows([a, (b, 2)], large=True)):
        with pytest.warns(UserWarning) as caught: examples = encode_rows(of, tok, **same)
        assert all(any(o in str(w.message) for w in caught) for o in said) and examples.report["first"] == {"dropped": 2}
    assert [str(o["number"]) for o in numbered(encode_rows(rows[:4], tok), rows, [2, 4])] == [f"2 of {a}", f"1 of {b}"]
    assert name_rows([0], [dict(row=6)], rows).startswith(f"rows 3 of {b} (")
    assert source_of([a, (b, .5)]) == f"{a}, {b}"
    with pytest.raises(QLoRAError) as e, told_of(source_of([a, b])): encode_rows(rows, tok, max_length=64, long="error")
    assert str(e.value).startswith(f"{b}, row 2: the example has")


def test_a_template_from_a_file(tok, tmp_path):
    (path := tmp_path/"own.jinja").write_text(FORGETS.replace("<|im_start|>", "[x]"), encoding="utf-8")
    by_file, by_text = (encode(HI, tok, o) for o in (str(path), path.read_text(encoding="utf-8")))
    assert by_file == by_text and tok.decode(by_file["input_ids"]).startswith("[x]user\nHi<|im_end|>") and taught(by_file, tok) == "Hello<|im_end|>"
    with pytest.raises(QLoRAError, match="none.jinja: the template cannot be read"): encode(HI, tok, str(tmp_path/"none.jinja"))


def test_text_that_cannot_be_written_is_counted(tok, tmp_path):
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({o: i for i, o in enumerate(["<unk>", "</s>", "yes", "no", "?"])}, unk_token="<unk>"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", unk_token="<unk>", chat_template="{% for m in messages %}{{ m.content }} </s>{% endfor %}")
    rows = load_rows([dict(prompt="yes", response=o) for o in ("no", "你好", "yes", "maybe not")])
    with pytest.warns(UserWarning, match=r"text that the tokenizer cannot write \(2 rows, the first is row 2, '你好'\)"): encode_rows(rows, bare)
    with pytest.warns(UserWarning, match="cannot write .1 row, the first is row 1, 'why so"): encode_rows(load_rows([dict(prompt="why so", response="no")]), bare)
    rows = load_rows([dict(prompt="Hi", response=o) for o in ("Hello", "With <|im_end|> after it", "Hello 你好 𠮷 😀 שלום")])
    with pytest.warns(UserWarning) as said: encode_rows(rows, tok)
    assert "control tokens within the text (1 row, the first is row 2, '<|im_end|>')" in str(said[0].message) and len(said) == 1
    (path := tmp_path/"a.jsonl").write_text(lines(*rows), encoding="utf-8")
    with pytest.warns(UserWarning, match="control tokens within the text .1 row, the first is row 2"): encode_rows(map_rows(path, cache_dir=tmp_path/"cache"), tok)


def test_broken_rows_are_left_out_of_tables_too(tok, tmp_path):
    good = dict(prompt="Hi", response="Hello", topic="a b")
    (path := tmp_path/"a.jsonl").write_text(lines(good, dict(prompt="x"), good) + "\n\n{\n" + lines(good, good | dict(prompt="word "*99)), encoding="utf-8")
    same = dict(max_length=64)
    def said(f):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return list(f()), " ".join(str(o.message) for o in caught)
    listed, one = said(lambda: encode_rows(load_rows(path, skip_bad_rows=True), tok, **same))
    mapped, two = said(lambda: encode_rows(map_rows(path, cache_dir=tmp_path/"cache", skip_bad_rows=True), tok, num_proc=2, **same))
    assert listed == mapped and len(listed) == 3
    for text in (one, two): assert "`response` is missing (1 row, the first is row 2)" in text and "the first is row 4)" in text and "left out, the first is row 6" in text
    assert "`topic` (4 rows, the first is row 1" in one and "`topic` (4 rows, the first is row 1" in two


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
    with pytest.warns(UserWarning, match="1 cut in the prompt, the oldest turns first, with their answers, the first is row 1"):   # an answer to be learned goes
        kept = encode_rows([chat(("user", "word "*100), ("assistant", "first"), ("user", "Hi"), ("assistant", "last"))], tok, max_length=64, long="cut")
    assert tok.decode([o for o in kept[0]["labels"] if o != -100]) == "last<|im_end|>"
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
        rows = map_rows(path, cache_dir=tmp_path/"cache")
        mapped = encode_rows(rows, tok, **how)
    assert list(rows) == load_rows(path) and digest(rows) == digest(load_rows(path)) and list(mapped) == list(listed)
    assert mapped.report == listed.report and [o.number for o in rows] == list(range(1, 62))


def test_mapped_chats_of_every_shape(tok, tmp_path):
    for i, row in enumerate([SYSTEM, GOOD["ShareGPT, system beside"][0], GOOD["Alpaca with system"][0]]):
        path = write(tmp_path/f"{i}.jsonl", [row]*3)
        assert list(encode_rows(map_rows(path, cache_dir=tmp_path/"cache"), tok)) == list(encode_rows(load_rows(path), tok))


@pytest.mark.parametrize("text,what", [('{"prompt": "a"}', "`response` is missing"), ('{"prompt": "a", "resp', "not valid JSON"),
                                       ('["a"]', "the row is a list"), (lines(HI), "has the shape messages")])
def test_mapped_errors_name_the_row(text, what, tmp_path):
    path = write(tmp_path/"a.jsonl", make_tickets(n=30))
    path.write_text(path.read_text(encoding="utf-8") + "\n\n" + text + "\n", encoding="utf-8")
    with pytest.raises(QLoRAError) as e: map_rows(path, cache_dir=tmp_path/"cache")
    assert e.value.where == f"{path}, row 31" and what in e.value.what


@pytest.mark.parametrize("num_proc", [None, 2])
def test_mapped_rows_that_are_too_long_are_named(tok, num_proc, tmp_path):
    rows = map_rows(write(tmp_path/"a.jsonl", [ONE]*30 + [ONE | dict(prompt="word "*99)]), cache_dir=tmp_path/"cache")
    with pytest.raises(QLoRAError, match="a.jsonl, row 31: the example has"): encode_rows(rows[1:], tok, max_length=64, long="error", num_proc=num_proc)


def test_mapped_errors_before_any_work(tok, tmp_path):
    f = lambda p: map_rows(p, cache_dir=tmp_path/"cache")
    (bad := tmp_path/"a.jsonl").write_bytes(lines(ONE).encode() + "\n\n{\"prompt\": \"é\"}".encode("latin-1"))
    with pytest.raises(QLoRAError, match="row 2: byte 0xe9 is not UTF-8"): f(bad)
    (bad := tmp_path/"a.csv").write_bytes("prompt,response\na,b\n\n\"c\nd\",é\n".encode("latin-1"))
    with pytest.raises(QLoRAError, match="a.csv, row 2: byte 0xe9 is not UTF-8"): f(bad)
    with pytest.raises(QLoRAError, match="no such file. Did you mean '"): f(tmp_path/"b.jsonl")
    (tmp_path/"blank.jsonl").write_text("\n \n", encoding="utf-8")
    with pytest.raises(QLoRAError, match="there are no rows"): f(tmp_path/"blank.jsonl")
    (tmp_path/"torn.jsonl.gz").write_bytes(gzip.compress(lines(*[ONE]*99).encode())[:-20])
    with pytest.raises(QLoRAError, match="cannot be unpacked"): f(tmp_path/"torn.jsonl.gz")
    (tmp_path/"list.json").write_text(json.dumps([ONE, ONE]), encoding="utf-8")
    with pytest.raises(QLoRAError, match="list.json: the file holds one list, not one row a line.*leave out large=True"): f(tmp_path/"list.json")
    with pytest.raises(QLoRAError, match="all 2 rows are broken"), warnings.catch_warnings(): map_rows([dict(prompt="x")]*2, skip_bad_rows=True)
    with pytest.raises(QLoRAError, match="no choice long"): encode_rows(f(write(tmp_path/"c.jsonl", [ONE])), tok, long="x")


def every_kind(folder, rows):
    "The same rows in each kind of file that can be read row by row, and in memory."
    cells = lambda mark: "\n" + "\n".join(mark.join('"' + o.replace('"', '""') + '"' for o in row) for row in
                                               [("prompt", "response"), *[(o["prompt"], o["response"]) for o in rows]]) + "\n"
    text = "\n\n".join(json.dumps(o, ensure_ascii=False) for o in rows)
    files = {"a.jsonl": text.encode("utf-8-sig"), "b.jsonl": text.encode("utf-16"), "c.jsonl.gz": gzip.compress(text.encode()),
             "d.csv": cells(";").encode("utf-8-sig"), "e.tsv": cells("\t").encode("utf-16"), "f.csv.gz": gzip.compress(cells(",").replace("\n", "\r\n").encode())}
    for name, data in files.items():
        (folder/name).write_bytes(data)
        yield folder/name
    yield write(folder/"g.parquet", rows)
    table = datasets.Dataset.from_list(rows)
    yield from (table, table.to_iterable_dataset(), table.to_pandas(), datasets.DatasetDict(train=table), rows)


def test_every_source_is_mapped_as_it_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path/"cache"))
    rows = make_tickets("test", 12) + [dict(prompt='a\u2028"b"\nc, d; e', response="你好 𠮷 \x85."), dict(prompt="one\r\ntwo", response="x")]
    for data in every_kind(tmp_path, rows):
        listed, mapped = load_rows(data), load_rows(data, large=True)
        assert isinstance(mapped, Mapped) and isinstance(listed, list if hasattr(data, "__len__") or isinstance(data, Path) else Mapped)
        assert list(mapped) == list(listed) and [(o.number, o.source) for o in mapped] == [(o.number, o.source) for o in listed], data
        assert load_rows(mapped) is mapped and load_rows(mapped, system="S")[13] == dict(system="S", **listed[13])
    both = [tmp_path/"a.jsonl", (tmp_path/"d.csv", .5), ("tickets", 2)]
    assert list(load_rows(both, large=True)) == load_rows(both) and isinstance(load_rows(both, large=True), Mapped)
    monkeypatch.setattr("qlora_nb.base.files.is_large.__defaults__", (1000,))
    assert all(isinstance(load_rows(o), Mapped) for o in (tmp_path/"a.jsonl", tmp_path/"f.csv.gz", both))
    assert isinstance(load_rows(datasets.Dataset.from_list(rows)), Mapped) and isinstance(load_rows(rows), list)
    assert isinstance(load_rows(tmp_path/"a.jsonl", large=False), list)


def test_mapped_again_only_when_something_changed(tok, tmp_path, monkeypatch):
    path, calls = write(tmp_path/"a.jsonl", make_tickets(n=5)), []
    import qlora_nb.training.data as data
    fit = data._fit
    monkeypatch.setattr(data, "_fit", lambda *a, **k: calls.append(1) or fit(*a, **k))
    def run(**how):
        calls.clear()
        rows = list(encode_rows(map_rows(path, cache_dir=tmp_path/"cache"), how.pop("tok", tok), **how))
        return len(calls), rows
    assert run()[0] == 5 and run()[0] == 0
    assert run(template="article")[0] == 5 and run(max_length=400)[0] == 5
    other = dressed(tok, tok.chat_template.replace("helpful", "kind"))
    assert run(tok=other)[0] == 5
    write(path, make_tickets(n=6))
    n, rows = run()
    assert n == 6 == len(rows) and run()[0] == 0


def test_hub_tables_are_mapped(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path/"cache"))
    table = datasets.Dataset.from_list([ONE, dict(prompt="a", response="")])
    monkeypatch.setattr("datasets.load_dataset", lambda name, split, **how: table)
    with pytest.raises(QLoRAError, match="someone/x, row 2: `response` is empty"): load_rows("someone/x", large=True)


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

def test_options_of_the_data_reach_every_reader(tmp_path, monkeypatch):
    from qlora_nb.training import data
    from qlora_nb.base import sources
    path, asked = tmp_path/"a.jsonl", []
    path.write_text('{"q": "1+1", "a": "2"}\n{"q": "", "a": "3"}\n{"q": "2+2", "a": "4"}\n', encoding="utf-8")
    how = dict(columns=dict(prompt="q", response="a"), skip_bad_rows=True)
    for given in (lambda: load_rows(path, **how), lambda: load_rows(sources.Source(path), **how),
                  lambda: load_rows(sources.Source(path, **how)), lambda: load_rows([path], **how)):
        with pytest.warns(UserWarning, match="broken.*1 row, the first is row 2"): rows = given()
        assert [(o.number, o["response"]) for o in rows] == [(1, "2"), (3, "4")]
    assert load_rows(rows, **how) == rows and load_rows(rows, **how, system="S")[0]["system"] == "S"
    def hub(name, split, **kw):
        asked.append((name, split, kw))
        return [dict(prompt="p", response="r")]
    monkeypatch.setattr(data, "from_hub", hub)
    load_rows("someone/x", "test", config="c", revision="abc")
    load_rows(sources.Source("someone/x", revision="abc"), split="test", config="c")
    load_rows("someone/x")
    assert asked == [("someone/x", "test", dict(config="c", revision="abc"))]*2 + [("someone/x", "train", {})]
    assert sources.shared_options(how | dict(split="test", revision="abc")) == how


def test_numbers_are_those_of_the_file_where_broken_rows_were_left_out():
    from qlora_nb.training.schedule import name_rows, overlap, repetitions
    from qlora_nb.training.schedule import number_rows
    rows = [dict(prompt=f"Question {k}", response=f"Answer {k}") if k % 2 else dict(prompt="", response="x") for k in range(8)]
    with pytest.warns(UserWarning, match="broken"): kept = load_rows(rows, skip_bad_rows=True)
    examples = number_rows(kept, [1, 3], load_tokenizer(), "chat", 512)
    assert [(e["row"], e["number"]) for e in examples] == [(1, 2), (3, 6)]   # Question 1 is the file's second row
    assert name_rows([0, 1], examples, kept) == "rows 2 (…'Question 1'), 6 (…'Question 5')"
    tools = lambda name: [dict(type="function", function=dict(name=name, description="", parameters={}))]
    same = [dict(HI, tools=tools("a")), dict(HI, tools=tools("b")), dict(HI, tools=tools("a"))]
    assert repetitions(same) == 1 and overlap(same[:1], same[1:2]) == (0, 0), "rows with other tools are other rows"


def test_a_result_names_a_call_of_its_row():
    def chat(of, *ids):
        calls = [dict(id=o, type="function", function=dict(name="tide", arguments={})) for o in ids]
        return [dict(messages=[dict(role="user", content="Tide?"), dict(role="assistant", tool_calls=calls), dict(role="tool", content="low", tool_call_id=of),
                               dict(role="assistant", content="Low.")])]
    for row in (chat("b", "a", "b"), chat("b", ""), chat(None, "a")): assert len(load_rows(row)[0]["messages"]) == 4
    with pytest.raises(QLoRAError, match="row 1: message 3 is the result of the call 'c', and before it there are 'a', 'b'"): load_rows(chat("c", "a", "b"))


def test_the_article_template_is_written_out(tok):
    chat = [dict(role="system", content="Be kind."), dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
    assert render(chat, tok, "article") == "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello<|im_end|>\n\n"
    with pytest.raises(QLoRAError, match="there is no template 'vicuna'. Choose from: auto, chat,"): render(chat, tok, "vicuna")
