"Broken files, each answered in one line that names the file, the row and the cure; the masks; and the honest split."
import gzip, json, os, re, subprocess, sys, warnings
from copy import deepcopy
from itertools import product

import pytest, torch
from hypothesis import given, settings, strategies as st

from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.fields import UNSEEN
from qlora_nb.evaluation.scores import exact_match, field_scores
from qlora_nb.training.data import Source, answer_of, collate, encode, encode_prompt, encode_rows, load_rows, make_tickets
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.training.tickets import CATEGORIES, PRIORITIES, WORDS

GOOD = json.dumps(dict(prompt="Hi", response="Hello"))
def lines(*rows): return "\n".join(o if isinstance(o, str) else json.dumps(o) for o in rows)
def chat(*turns): return dict(messages=[dict(role=r, content=c) for r, c in turns])


# ---- broken files: (name, content, where the message must point, what it must say) ----

BROKEN = {
    "missing field": ("a.jsonl", lines(GOOD, dict(prompt="Hi")), "row 2", "`response` is missing"),
    "missing prompt": ("a.jsonl", lines(dict(response="Hi")), "row 1", "`prompt` is missing"),
    "missing output": ("a.jsonl", lines(dict(instruction="Hi", input="")), "row 1", "`output` is missing"),
    "empty field": ("a.jsonl", lines(GOOD, GOOD, dict(prompt="Hi", response=" \n")), "row 3", "`response` is empty"),
    "number for text": ("a.jsonl", lines(dict(prompt="Hi", response=3)), "row 1", "`response` must be text, not int"),
    "null for text": ("a.jsonl", lines(dict(prompt=None, response="Hi")), "row 1", "`prompt` must be text, not null"),
    "input of wrong type": ("a.jsonl", lines(dict(instruction="a", input=[1], output="b")), "row 1", "`input` must be text, not list"),
    "half a surrogate": ("a.jsonl", '{"prompt": "\\ud83d", "response": "x"}', "row 1", "surrogate"),
    "empty file": ("a.jsonl", "", "a.jsonl", "file is empty"),
    "blank lines only": ("a.jsonl", "\n \n\n", "a.jsonl", "file is empty"),
    "empty list": ("a.json", "[]", "a.json", "no rows"),
    "not UTF-8": ("a.jsonl", (GOOD + "\n\n" + GOOD.replace("Hi", "é")).encode("latin-1"), "row 2", "0xe9 at position 51 is not UTF-8"),
    "UTF-16 without its mark": ("a.csv", "prompt,response\nHi,Hell\xf8\n".encode("utf-16")[2:], "a.csv", "UTF-16 or UTF-32 without its mark"),
    "latin CSV": ("a.csv", "prompt,response\nHi,Hello\nCafé?,Yes\n".encode("latin-1"), "row 2", "not UTF-8"),
    "half a line": ("a.jsonl", GOOD + "\n" + GOOD[:20], "row 2", "not valid JSON"),
    "deep nesting": ("a.jsonl", "["*100_000, "row 1", "not valid JSON"),
    "row is a list": ("a.jsonl", lines(GOOD, ["Hi", "Hello"]), "row 2", "the row is a list"),
    "row is a string": ("a.json", '["Hi"]', "row 1", "the row is a str"),
    "one value": ("a.json", "3", "a.json", "holds one int"),
    "list without end": ("a.json", f"[{GOOD}", "a.json", "the list has no end"),
    "more after the list": ("a.json", f"[{GOOD}] {GOOD}", "a.json", "more follows"),
    "key twice": ("a.jsonl", lines(GOOD, GOOD, '{"prompt": "a", "response": "b", "prompt": "c"}'), "row 3", "the key 'prompt' is there twice"),
    "key twice in a list": ("a.json", f'[{GOOD}, {{"messages": [{{"role": "user", "role": "x"}}]}}]', "row 2", "the key 'role' is there twice"),
    "not packed": ("a.jsonl.gz", GOOD, "a.jsonl.gz", "cannot be unpacked"),
    "unknown shape": ("a.jsonl", lines(dict(said="Hi"), dict(said="x")), "row 1", "none of the known fields; it has 'said'"),
    "plain text": ("a.jsonl", lines(dict(text="Hi you", id=1)), "row 1", "question and answer cannot be told apart"),
    "no fields": ("a.jsonl", "{}", "row 1", "none at all"),
    "mixed shapes": ("a.jsonl", lines(GOOD, chat(("user", "Hi"), ("assistant", "Hello"))), "row 2", "but row 1 has prompt/response"),
    "unknown row later": ("a.jsonl", lines(GOOD, dict(said="x")), "row 2", "none of the known fields"),
    "messages not a list": ("a.jsonl", lines(dict(messages="Hi")), "row 1", "must be a list"),
    "no messages": ("a.jsonl", lines(dict(messages=[])), "row 1", "not empty"),
    "no assistant": ("a.jsonl", lines(chat(("user", "Hi"))), "row 1", "no assistant turn"),
    "no user": ("a.jsonl", lines(chat(("assistant", "Hi"))), "row 1", "no user turn"),
    "user speaks last": ("a.jsonl", lines(chat(("user", "a"), ("assistant", "b"), ("user", "c"))), "row 1", "last message is the user's"),
    "unknown role": ("a.jsonl", lines(chat(("narrator", "Hi"), ("assistant", "Hello"))), "row 1", "message 1 has the unknown role 'narrator'"),
    "late system": ("a.jsonl", lines(chat(("user", "Hi"), ("system", "x"), ("assistant", "y"))), "row 1", "message 2 is a system"),
    "message without content": ("a.jsonl", lines(dict(messages=[dict(role="user")])), "row 1", "content of message 1` must be text, not null"),
    "content in parts": ("a.jsonl", lines(dict(messages=[dict(role="user", content=[])])), "row 1", "content of message 1` must be text"),
    "role is a list": ("a.jsonl", lines(dict(messages=[dict(role=["user"], content="a")])), "row 1", "unknown role"),
    "no header": ("a.csv", "Hi,Hello\nYo,Hey\n", "header", "no known columns (found: 'Hi', 'Hello')"),
    "other names": ("a.csv", "q;a\nHi;Hello\n", "header", "found: 'q', 'a'"),
    "header alone": ("a.csv", "prompt,response\n", "a.csv", "no rows"),
    "one column": ("a.csv", "prompt\nHi\n", "row 1", "`response` is missing"),
    "twice the same column": ("a.csv", "prompt,response,prompt\na,b,c\n", "header", "twice"),
    "ragged row": ("a.csv", "prompt,response\nHi,Hello\nOne, two,three\n", "row 2", "has 3 fields, but the header has 2"),
    "short row": ("a.csv", "prompt,response\nHi\n", "row 1", "has 1 fields, but the header has 2"),
    "open quote": ("a.csv", 'prompt,response\nHi,Hello\n"Hi,Hello\n', "row 2", "not valid CSV"),
    "empty cell": ("a.csv", "prompt,response\n\nHi,Hello\n\nHi,\n", "row 2", "`response` is empty"),
    "another kind": ("a.txt", "Hi", "a.txt", "files of the kind '.txt' are not read"),
    "no suffix": ("rows", GOOD, "rows", "the name has no ending"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case, tmp_path):
    name, content, where, what = BROKEN[case]
    path = tmp_path/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(QLoRAError) as e: load_rows(path)
    err, message = e.value, str(e.value)
    assert "\n" not in message and len(message) < 700
    assert err.where.startswith(str(path)) and where in err.where, message
    assert what in err.what, message
    assert re.search(r"prompt|UTF-8|quote|\.jsonl|skip", err.cure), message


def test_missing_file(tmp_path):
    (tmp_path/"tickets_train.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(QLoRAError, match="no such file. Did you mean 'tickets_train.jsonl'"): load_rows(tmp_path/"tickets_trian.jsonl")
    with pytest.raises(QLoRAError, match="no such file"): load_rows("nowhere/at/all.csv")
    with pytest.raises(QLoRAError, match="this is a folder"): load_rows(tmp_path)


def test_unknown_split():
    with pytest.raises(QLoRAError, match="no split 'dev'"): load_rows("tickets", "dev")


def test_hub_out_of_reach(monkeypatch):
    def no_network(*a, **k): raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)\nsecond line")
    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(QLoRAError) as e: load_rows("someone/some_data")
    assert str(e.value).startswith("someone/some_data: the data set cannot be loaded from the Hub (Couldn't reach")
    assert "\n" not in str(e.value) and ".jsonl" in e.value.cure
    with pytest.raises(QLoRAError, match="Did you mean 'tickets'"): load_rows("ticket")


def test_hub_rows_are_checked(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [dict(prompt="a", response=split), dict(prompt="b", response=None)])
    with pytest.raises(QLoRAError, match="someone/x, row 2: `response` must be text, not null"): load_rows("someone/x")


# ---- good files ----

@pytest.mark.parametrize("name,content", [
    ("a.jsonl", "\ufeff" + GOOD + "\r\n\r\n" + GOOD + "\r\n"),
    ("a.json", f"[{GOOD}, {GOOD}]"),
    ("a.csv", "prompt,response\r\nHi,Hello\r\n\r\n  \r\nHi,Hello\r\n"),
    ("a.CSV", '\ufeffid,response,prompt\n1,Hello,Hi\n2,"Hello",Hi'),
    ("b.jsonl", lines(*[dict(instruction="Hi", input=o, output="Hello") for o in ("", None)])),
    ("b.csv", "instruction,output\nHi,Hello\nHi,Hello\n"),
    ("lines.json", GOOD + "\n" + GOOD), ("list.jsonl", f"[{GOOD},\n {GOOD}]"), ("line.jsonl", f"[{GOOD}, {GOOD}]"),
    ("commas.jsonl", f"{GOOD},\n{GOOD},\n"), ("data.json", f'{{"version": "1", "data": [{GOOD}, {GOOD}]}}'),
    ("pandas.json", '{"prompt": {"0": "Hi", "1": "Hi"}, "response": {"0": "Hello", "1": "Hello"}}'),
    ("split.json", '{"columns": ["prompt", "response"], "index": [0, 1], "data": [["Hi", "Hello"], ["Hi", "Hello"]]}'),
    ("lists.json", '{"prompt": ["Hi", "Hi"], "response": ["Hello", "Hello"]}'),
    ("semicolon.csv", "prompt; response\nHi;Hello\nHi;Hello\n"), ("tabs.tsv", "prompt\tresponse\nHi\tHello\nHi\tHello\n"),
    ("utf16.csv", "prompt,response\nHi,Hello\nHi,Hello\n".encode("utf-16")), ("utf16.jsonl", f"{GOOD}\n{GOOD}".encode("utf-16")),
    ("packed.jsonl.gz", gzip.compress(f"{GOOD}\n{GOOD}".encode(), mtime=0)), ("packed.csv.gz", gzip.compress(b"prompt,response\nHi,Hello\nHi,Hello", mtime=0)),
])
def test_good_file(name, content, tmp_path):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load_rows(str(tmp_path/name)) == [json.loads(GOOD)]*2


def test_one_object_is_one_row(tmp_path):
    for row in (json.loads(GOOD), chat(("user", "a"), ("assistant", "b"))):
        (path := tmp_path/"a.json").write_text(json.dumps(row), encoding="utf-8")
        assert load_rows(path) == [row]


def test_a_large_cell(tmp_path):
    (path := tmp_path/"a.csv").write_text(f"prompt,response\n{'word '*40_000},yes\n", encoding="utf-8")
    assert load_rows(path) == [dict(prompt="word "*40_000, response="yes")]


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path/"x.jsonl").write_text(GOOD, encoding="utf-8")
    assert load_rows("~/x.jsonl") == [json.loads(GOOD)]


def test_rows_keep_their_number_and_bad_ones_are_counted(tmp_path):
    (path := tmp_path/"a.jsonl").write_text("\n\n".join([GOOD, "{", GOOD, json.dumps(dict(prompt="a")), GOOD, json.dumps(dict(prompt="b"))]), encoding="utf-8")
    with pytest.raises(QLoRAError, match="row 2: this is not valid JSON.*--skip-bad-rows"): load_rows(path)
    with pytest.warns(UserWarning) as said: rows = load_rows(path, skip_bad_rows=True)
    assert [o.number for o in rows] == [1, 3, 5] and {o.source for o in rows} == {str(path)}
    said = str(said[0].message)
    assert "`response` is missing (2 rows, the first is row 4)" in said and "not valid JSON" in said and "the first is row 2" in said
    again = load_rows(list(reversed(rows)))
    assert [o.number for o in again] == [5, 3, 1], "rows that were checked keep their numbers"
    path.write_text("{\n[", encoding="utf-8")
    with pytest.raises(QLoRAError): load_rows(path, skip_bad_rows=True)
    (path := tmp_path/"a.csv").write_text("prompt,response\na,b\nc\nd,e\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="has 1 fields.*the first is row 2"): rows = load_rows(path, skip_bad_rows=True)
    assert [o.number for o in rows] == [1, 3]


def test_messages_name_the_row_of_the_file(tok, tmp_path):
    good = [dict(prompt="Hi", response="Hello")]*12
    (path := tmp_path/"a.jsonl").write_text(lines(*good, dict(prompt="word "*100, response="x"), *good), encoding="utf-8")
    rows = list(reversed(load_rows(path)))[3:]
    with pytest.raises(QLoRAError) as e: encode_rows(rows, tok, max_length=64, long="error")
    assert e.value.where == f"{path}, row 13"
    with pytest.warns(UserWarning, match="the first is row 13"): assert encode_rows(rows, tok, max_length=64).report["first"] == dict(dropped=13)


def test_tables_in_memory():
    import datasets, pandas as pd
    row = dict(prompt="Hi", response="Hello")
    table = datasets.Dataset.from_list([row, row])
    chats = datasets.Dataset.from_list([chat(("user", "a"), ("assistant", "b"))])
    assert load_rows(table) == load_rows(table.to_pandas()) == load_rows(datasets.DatasetDict(train=table)) == [row, row]
    assert load_rows(chats) == load_rows(chats.to_pandas()) == [chat(("user", "a"), ("assistant", "b"))]
    assert load_rows(datasets.DatasetDict(a=table), "a") == list(load_rows(table.to_iterable_dataset())) == [row, row]
    with pytest.raises(QLoRAError, match="no split 'train' in the DatasetDict given.*: a, b"): load_rows(datasets.DatasetDict(a=table, b=table))
    frame = pd.DataFrame(dict(instruction=["Hi", "Hi"], input=[None, float("nan")], output=["Hello", "Hello"]))
    assert load_rows(frame) == [row, row]
    with pytest.raises(QLoRAError, match="row 2: `response` must be text"): load_rows(pd.DataFrame(dict(prompt=["a", "b"], response=["c", float("nan")])))
    with pytest.raises(QLoRAError, match="type int cannot be read"): load_rows(3)


def test_several_data_sets(tmp_path):
    paths = [tmp_path/f"{i}.jsonl" for i in (1, 2)]
    for p in paths: p.write_text(lines(*[dict(prompt=f"{p.stem} {i}", response="x") for i in range(10)]), encoding="utf-8")
    rows = load_rows([str(paths[0]), (paths[1], .3)])
    assert len(rows) == 13 and {o.source for o in rows[10:]} == {str(paths[1])} and load_rows([paths[0], (paths[1], .3)]) == rows
    assert sorted(o["prompt"] for o in load_rows([(paths[0], 2.5)])).count("1 0") in (2, 3) and len(load_rows([(paths[0], 2.5)])) == 25
    mapped = Source(paths[0], columns=dict(prompt="response", response="prompt"))
    assert load_rows([mapped, paths[1]])[0] == dict(prompt="x", response="1 0")
    with pytest.raises(QLoRAError, match="weight of a data set is 0"): load_rows([(paths[0], 0)])


def test_configuration_and_split(monkeypatch):
    calls = []
    def load(*a, **k): calls.append((a, k)); return [json.loads(GOOD)]
    monkeypatch.setattr("datasets.load_dataset", load)
    load_rows("someone/x", "train_sft", config="socratic")
    assert calls == [(("someone/x", "socratic"), dict(split="train_sft"))]
    def missing(*a, **k): raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nmore")
    monkeypatch.setattr("datasets.load_dataset", missing)
    with pytest.raises(QLoRAError, match=r"\['main', 'socratic'\]\). Choose one by config=..., or --data-config"): load_rows("someone/x")
    def split(*a, **k): raise ValueError('Unknown split "train". Should be one of [\'train_sft\', \'test_sft\'].')
    monkeypatch.setattr("datasets.load_dataset", split)
    with pytest.raises(QLoRAError, match="'train_sft'.*--data-split"): load_rows("someone/x")


def test_rows_given_are_checked():
    row = chat(("system", "s"), ("user", "a"), ("assistant", "b"))
    with pytest.warns(UserWarning, match=r"the rows given: not used: `id` \(1 row, the first is row 1, '7'\)"): assert load_rows([row | dict(id=7)]) == [row]
    with pytest.raises(QLoRAError, match="row 1: the field `response` is missing"): load_rows([dict(prompt="a")])
    with pytest.raises(QLoRAError, match="no rows"): load_rows([])


def visible(text): return not UNSEEN.fullmatch(text)   # what is not, is refused as empty


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(visible)

@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_text_survives_a_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")/"a.jsonl"
    rows = [dict(prompt=p, response=r) for p, r in rows]
    path.write_text("\n".join(json.dumps(o, ensure_ascii=False) for o in rows), encoding="utf-8", newline="")
    assert load_rows(path) == rows


# ---- from a terminal ----

def test_options_of_data_reach_the_rows(tmp_path):
    from qlora_nb.apps.cli import finetune_options
    (path := tmp_path/"a.csv").write_text("q;a;c\n" + "".join(f"What is {i}?;{i};x\n" for i in range(40)) + "lost\n", encoding="utf-8")
    (tmp_path/"own.jinja").write_text("{{ messages }}", encoding="utf-8")
    o = finetune_options(["--data", str(path), "--columns", "prompt=q,response=a", "--system", "S", "--skip-bad-rows", "--eval-data", str(path),
                          "--chat-template", str(tmp_path/"own.jinja")])
    assert o["template"] == "{{ messages }}" and not {"columns", "system", "skip_bad_rows", "data_config", "data_split", "chat_template"} & set(o)
    with pytest.warns(UserWarning) as said: rows, held = load_rows(o["data"]), load_rows(o["eval_data"])
    assert rows[39] == dict(system="S", prompt="What is 39?", response="39") and rows[39].number == 40 and held == rows
    said = [str(o.message) for o in said]
    assert sum("not used: `c` (40 rows" in o for o in said) == 2 and sum("has 1 fields, but the header has 3 (1 row, the first is row 41)" in o for o in said) == 2
    assert len(load_rows(finetune_options([])["data"])) == 800 and finetune_options([])["data"] == "tickets"
    o = finetune_options(["--data", f"{path}:0.5", "tickets:.25", "--columns", "prompt=q,response=a"])
    assert o["data"] == [(str(path), .5), ("tickets", .25)]
    o = finetune_options(["--data", "someone/x", "--data-config", "main", "--data-split", "train_sft"])
    assert o["data"].options == dict(config="main", split="train_sft")


# ---- tokens and labels ----

@pytest.fixture(scope="session")
def tok(): return load_tokenizer("smollm2")


def taught(ids, labels, tok): return tok.decode([o for o in labels if o != -100])


@pytest.mark.parametrize("template", ["chat", "article"])
def test_only_the_answer_is_taught(tok, template):
    for row in make_tickets("test", 20):
        e = encode(row, tok, template)
        k = e["labels"].index(next(o for o in e["labels"] if o != -100))
        assert e["labels"] == [-100]*k + e["input_ids"][k:], "one block, to the end"
        assert tok.decode(e["labels"][k:]) == row["response"] + tok.eos_token and e["labels"][-1] == tok.eos_token_id
        assert tok(encode_prompt(row, tok, template), add_special_tokens=False).input_ids == e["input_ids"][:k]
        assert answer_of(row) == row["response"]


def test_an_indent_that_is_left_out_is_said(tok):
    "Code whose first line begins at the margin is other code."
    from qlora_nb.training.data import map_rows
    rows = [dict(prompt="Go on.", response=o) for o in (" Yes.", "    return x", "\n\tpass")]
    for given in (load_rows(rows), map_rows(rows)):
        with pytest.warns(UserWarning, match=r"answers whose first line is indented, which is left out \(2 rows, the first is row 2"): kept = encode_rows(given, tok)
        assert [tok.decode(o["input_ids"][-4:]).endswith(e) for o, e in zip(kept, ("Yes.<|im_end|>", "return x<|im_end|>", "pass<|im_end|>"))] == [True]*3


def test_auto(tok):
    row, bare = make_tickets(n=1)[0], deepcopy(tok)
    bare.chat_template = None
    assert encode(row, tok) == encode(row, tok, "chat") != encode(row, tok, "article")
    assert encode(row, bare) == encode(row, tok, "article")
    with pytest.raises(QLoRAError, match="no chat template.*article"): encode(row, bare, "chat")
    with pytest.raises(QLoRAError, match="no template 'chatml'"): encode(row, tok, "chatml")


def test_chat_ids_are_the_tokenizers_own(tok):
    row = chat(("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6"))
    own = tok.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
    e = encode(row, tok)
    assert e["input_ids"] == own[:-1] and tok.decode(own[-1:]) == "\n"  # the template ends with a line break that nobody needs
    assert taught(*e.values(), tok) == "4<|im_end|>6<|im_end|>"


def test_no_second_bos(tok):
    from tokenizers.processors import TemplateProcessing
    with_bos = deepcopy(tok)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    with_bos.bos_token = "<|endoftext|>"
    row = make_tickets(n=1)[0]
    assert with_bos("x").input_ids[0] == 0
    assert encode(row, with_bos, "article")["input_ids"].count(0) == 1
    assert encode(row, with_bos, "chat")["input_ids"].count(0) == 0
    assert encode(row, tok, "article")["input_ids"].count(tok.bos_token_id) == 0  # this tokenizer adds none itself


TEMPLATES = {
    "changes the answer": ("{% for m in messages %}{{ m.content|upper }}<|im_end|>{% endfor %}", "changes message 2"),
    "forgets earlier answers": ("{% for m in messages %}{{ m.role }}{{ m.content if loop.last or m.role == 'user' }}<|im_end|>"
                                "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}", "changes message 2"),
    "never stops": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "without an end token"),
    "joins prompt and answer": ("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}",
                                "shares a token"),
    "is broken": ("{{ raise_exception('only users here') }}", "refuses this row"),
}

@pytest.mark.parametrize("case", TEMPLATES)
def test_dishonest_template_is_refused(tok, case):
    other = deepcopy(tok)
    other.chat_template, why = TEMPLATES[case]
    row = chat(("user", "Say hel"), ("assistant", "lo there"), ("user", "More"), ("assistant", " of it"))
    with pytest.raises(QLoRAError, match=why) as e: encode(row, other)
    assert "article" in str(e.value)
    with pytest.raises(QLoRAError, match="row 1"): encode_rows([row], other)


# This tokenizer lacks a few bytes: it drops most control characters and cannot write all that lies above U+2FFF.
LETTERS = st.characters(codec="utf-8", max_codepoint=0x2fff, exclude_characters="<|>", exclude_categories=["Cc", "Cn", "Co"])
SAFE = st.text(LETTERS | st.sampled_from("\n\t "), min_size=1, max_size=30).filter(visible)

@given(turns=st.lists(st.tuples(SAFE, SAFE), min_size=1, max_size=3), template=st.sampled_from(["chat", "article"]))
@settings(max_examples=60, deadline=None)
def test_every_answer_is_taught(tok, turns, template):
    e = encode(chat(*[o for u, a in turns for o in (("user", u), ("assistant", a))]), tok, template)
    assert taught(*e.values(), tok) == "".join(a.strip() + "<|im_end|>" for _, a in turns)
    assert e["labels"][0] == -100 and e["labels"][-1] == tok.eos_token_id


def test_too_long(tok):
    rows = make_tickets(n=6)
    sizes = [len(o["input_ids"]) for o in encode_rows(rows, tok)]
    cut = sorted(sizes)[3]
    n = sum(o > cut for o in sizes)
    with pytest.warns(UserWarning, match=f"{n} of 6 rows.*first is row .*max_length={max(sizes)}"): kept = encode_rows(rows, tok, max_length=cut)
    assert [len(o["input_ids"]) for o in kept] == [o for o in sizes if o <= cut]
    with pytest.raises(QLoRAError, match="all rows are longer than max_length=5"): encode_rows(rows, tok, max_length=5)
    with pytest.raises(QLoRAError, match="has .* tokens"): encode(rows[0], tok, max_length=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode_rows(rows, tok, max_length=max(sizes))) == 6


def test_collate(tok):
    examples = [dict(input_ids=[5, 2, 2], labels=[-100, 2, 2]), dict(input_ids=[7], labels=[7])]
    b = collate(examples, pad_id=2)
    assert b["input_ids"].tolist() == [[5, 2, 2], [7, 2, 2]] and b["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert b["labels"].tolist() == [[-100, 2, 2], [7, -100, -100]] and all(o.dtype == torch.int64 for o in b.values())


# ---- the tickets ----

def test_tickets_repeat():
    assert make_tickets(n=50) == make_tickets(n=800)[:50] and make_tickets(seed=1) != make_tickets()
    code = "from qlora_nb.training.tickets import make_tickets; print(repr(make_tickets('test', 40)))"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert other.strip() == repr(make_tickets("test", 40))


def every(sentences):
    "All that sentences with [choice|in|brackets] can say."
    return ["".join(o) for s in sentences for o in product(*[o.split("|") for o in s.replace("]", "[").split("[")])]


def test_vocabulary_is_rich():
    for split, products, issues, cues in (("train", 60, 100, 30), ("test", 25, 10, 8)):
        assert len(set(WORDS[split]["products"])) >= products
        assert list(WORDS[split]["issues"]) == CATEGORIES and all(len(set(every(o))) >= issues for o in WORDS[split]["issues"].values())
        assert sorted(WORDS[split]["cues"]) == sorted(PRIORITIES) and all(len(set(every(o))) >= cues for o in WORDS[split]["cues"].values())


def words(text): return re.findall(r"[\w@'-]+", text.lower())
def runs(text, k=4): return {tuple(w[i:i+k]) for w in [words(text)] for i in range(len(w) - k + 1)}


def test_the_splits_share_nothing():
    def names(split): return {w for p in WORDS[split]["products"] for w in words(p)}
    assert not names("train") & names("test")
    said = {s: [t for bank in ("issues", "cues") for ts in WORDS[s][bank].values() for t in every(ts)] for s in ("train", "test")}
    seen = set().union(*map(runs, said["train"])) | {tuple(words(o)) for o in said["train"]}
    assert not [o for o in said["test"] if tuple(words(o)) in seen or runs(o) & seen]
    for o in ("hello", "bye", "order"): assert not set(WORDS["train"][o]) & set(WORDS["test"][o])


def test_no_sentence_says_two_things():
    for split in ("train", "test"):
        said = [o for bank in ("issues", "cues") for s in WORDS[split][bank].values() for o in every(s)]
        assert len(said) == len(set(said))
        assert all(o.count("@") == 1 for s in WORDS[split]["issues"].values() for o in every(s))
        assert not [o for o in said if re.search(r"[\[\]|{}/]|  |^ | $", o)]


@pytest.mark.parametrize("seed", range(3))
def test_records_are_right(seed):
    train, test = make_tickets("train", 600, seed), make_tickets("test", 300, seed)
    ids, names = {}, {}
    for split, rows in (("train", train), ("test", test)):
        recs = [json.loads(o["response"]) for o in rows]
        for row, rec in zip(rows, recs):
            assert list(rec) == ["product", "category", "priority", "order_id"] and "\n" not in row["response"]
            text = row["prompt"].split("\n\n", 1)[1]
            assert rec["product"] in text and (split == "train" or rec["product"] in WORDS["test"]["products"])
            assert rec["category"] in CATEGORIES and rec["priority"] in PRIORITIES
            assert (rec["order_id"] or "") in text
        names[split] = {w for o in recs for w in words(o["product"]) if w.isalpha()}
        ids[split] = {o["order_id"] for o in recs} - {None}
        assert 0.25 < sum(o["order_id"] is None for o in recs)/len(recs) < 0.45
        assert len({o["prompt"] for o in rows}) == len(rows)
    assert not ids["train"] & ids["test"] and not names["train"] & names["test"]
    assert not {o["prompt"] for o in train} & {o["prompt"] for o in test}


def test_tickets_are_short(tok):
    sizes = [len(o["input_ids"]) for split in ("train", "test") for o in encode_rows(make_tickets(split, 300), tok)]
    assert sum(sizes)/len(sizes) < 110 and max(sizes) <= 128


# ---- the score ----

REC = '{"product": "Quill", "category": "late", "priority": "low", "order_id": null}'

@pytest.mark.parametrize("pred,right", [
    (REC, True), (f"\n {REC} ", True), (REC.replace(": ", ":"), True), (REC.replace("low", "high"), False), (REC[:-1], False),
    (REC + REC, False), (REC.replace("null", '"null"'), False), (REC.replace("Quill", "quill"), False), ("", False), ("null", False),
    (REC[:-1] + ', "more": 1}', False), ('{"order_id": null, "priority": "low", "category": "late", "product": "Quill"}', True)])
def test_exact_match(pred, right): assert exact_match(pred, REC) is right


def test_scores_of_other_answers():
    assert exact_match(" 42\n", "42") and not exact_match("42.0", "42") and not exact_match("[1]", "[1, 2]")
    assert not exact_match('{"a": true}', '{"a": 1}')
    assert field_scores("anything", "plain text") == {} == field_scores("[1]", "[1]")
    assert field_scores('{"product": "Quill", "order_id": "null"}', REC) == dict(product=True, category=False, priority=False, order_id=False)
    assert set(field_scores("[" * 100_000, REC).values()) == {False} and not exact_match("[" * 100_000, REC)


def test_import_is_light():
    code = "import sys, qlora_nb.training.data; print([o for o in ('datasets', 'transformers', 'trl', 'peft') if o in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


CLOSED = {   # a file's name, what it begins with → what is said
    "sheet.xlsx": (b"PK\3\4", "Save the sheet as 'CSV UTF-8'"), "a.jsonl.zst": (b"", "Unpack it; .gz alone"), "a.zip": (b"PK\3\4", "Unpack it"),
    "a.arrow": (b"ARROW1", "datasets.Dataset.from_file"), "a.txt": (b"Q: 1+1?", "Put each question with its answer into a row"),
    "zst.jsonl": (b"\x28\xb5\x2f\xfd0", "packed by Zstandard"), "bz.jsonl": (b"BZh91AY", "packed by bzip2"), "xz.jsonl": (b"\xfd7zXZ\0", "packed by xz")}

@pytest.mark.parametrize("name", CLOSED)
def test_kinds_that_are_not_read_say_the_way_out(name, tmp_path):
    start, said = CLOSED[name]
    (tmp_path/name).write_bytes(start)
    with pytest.raises(QLoRAError) as e: load_rows(tmp_path/name)
    assert said in str(e.value)


@pytest.mark.parametrize("large", [False, True])
def test_pipes_patterns_and_wide_letters(large, tmp_path):
    "A pipe would be waited for without an end, and is empty the second time; a pattern is no file; UTF-32 begins as UTF-16 does."
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe.jsonl")
        with pytest.raises(QLoRAError, match="this is a pipe or a device"): load_rows(tmp_path/"pipe.jsonl", large=large)
    with pytest.raises(QLoRAError, match="this is a pattern, and none is expanded here"): load_rows(tmp_path/"*.jsonl", large=large)
    (tmp_path/"a.jsonl").write_text(GOOD, encoding="utf-32")
    assert load_rows(tmp_path/"a.jsonl", large=large)[0]["prompt"] == "Hi"
