"""Files of the shapes that public data sets and their tools have: what each is read as, or what is said instead.

The rows are made up. What stands in the tables of `test_data.py` and `test_formats.py` is not repeated here."""
import json, warnings

import pytest

from qlora_nb.base.errors import QLoRAError
from qlora_nb.training.data import load_rows, map_rows

def system(text): return dict(role="system", content=text)
def user(text, **more): return dict(role="user", content=text, **more)
def assistant(text, **more): return dict(role="assistant", content=text, **more)
def messages(*turns, **more): return dict(messages=list(turns), **more)
def share(*turns, **more): return dict(conversations=[{"from": r, "value": c} for r, c in turns], **more)
def lines(*rows): return "\n".join(json.dumps(o, ensure_ascii=False) for o in rows) + "\n"
def pair(prompt, response, **more): return dict(prompt=prompt, response=response, **more)

CITIES = dict(text=["Ostby", "Tellin"], label=["A", "B"])
RIVER = "The Morva passes Tellin and ends in the sea."
TOOLS = [dict(type="function", function=dict(name="tide", parameters=dict(type="object", properties={})))]
TIDE = dict(type="function", function=dict(name="tide", arguments=dict(port="Ostby")))
TEXT_TIDE = dict(id="call_7", type="function", function=dict(name="tide", arguments='{"port": "Ostby"}'))
READ_TIDE = dict(type="function", function=TIDE["function"], id="call_7")
SKIP = "Correct this row, or leave such rows out: skip_bad_rows=True, or --skip-bad-rows."
def name_columns(**c): return f"columns=dict({', '.join(f'{k}={v!r}' for k, v in c.items())}), or --columns {','.join(f'{k}={v}' for k, v in c.items())}."


# ---- files that are read: (name, content, rows, what is noted) ----

READ = {
    "instruction, context, response": ("dolly.jsonl", lines(
        dict(instruction="Where does the Morva end?", context="", response="In the sea.", category="open_qa"),
        dict(instruction="Where does the Morva end?", context=RIVER, response="In the sea.", category="closed_qa")),
        [pair("Where does the Morva end?", "In the sea."), pair(f"Where does the Morva end?\n\n{RIVER}", "In the sea.")],
        ["`category` (2 rows, the first is row 1, 'open_qa')"]),
    "instruction, input, output, history": ("alpaca_zh.json", json.dumps([
        dict(instruction="把地名Ostby写成中文", input="Ostby，海边", output="奥斯特比。", history=[]),
        dict(instruction="把地名Tellin写成中文", input="", output="特林。", history=[["你好", "您好！"]])], ensure_ascii=False, indent=1),
        [pair("把地名Ostby写成中文\n\nOstby，海边", "奥斯特比。"),
         messages(user("你好"), assistant("您好！"), user("把地名Tellin写成中文"), assistant("特林。"))], []),
    "system_prompt, question, response": ("orca.jsonl", lines(dict(id="flan.3", system_prompt="Think first.", question="Where is Ostby?", response="At the sea.")),
        [pair("Where is Ostby?", "At the sea.", system="Think first.")], ["`id` (1 row, the first is row 1, 'flan.3')"]),
    "question, answer": ("sums.jsonl", lines(dict(question="3+4?", answer="3+4=<<3+4=7>>7\n#### 7")), [pair("3+4?", "3+4=<<3+4=7>>7\n#### 7")], []),
    "parts of text": ("parts.jsonl", lines(messages(user([dict(type="text", text="Hi "), dict(type="text", text="Ostby")]), assistant([dict(type="text", text="Hello")]))),
        [messages(user("Hi Ostby"), assistant("Hello"))], []),
    "a spreadsheet": ("sheet.csv", ('\ufeff,instruction,input,output\r\n0,"A guest from Ostby says ""it rains"".\r\nWhat now?","A) stay\nB) go","A, ""stay"", see §3"\r\n'
                                    '1,Who rows?,,Ida\r\n'),
        [pair('A guest from Ostby says "it rains".\r\nWhat now?\n\nA) stay\nB) go', 'A, "stay", see §3'), pair("Who rows?", "Ida")],
        ["`the column without a name` (2 rows, the first is row 1, '0')"]),
    "a spreadsheet of Excel's, with semicolons": ("sheet.csv", "sep=;\r\nQuestion;Answer\r\n\"When; exactly?\";At nine, or ten\r\n", [pair("When; exactly?", "At nine, or ten")], []),
    "names in capitals": ("capitals.json", json.dumps([dict(Instruction="Say it.", Input="Ostby", Output="OSTBY")]), [pair("Say it.\n\nOstby", "OSTBY")], []),
    "text and calls in one turn": ("calls.jsonl", lines(messages(system("Use tools."), user("Tide at Ostby?"), assistant("I'll look.", tool_calls=[TEXT_TIDE]), tools=TOOLS, parallel_tool_calls=False)),
        [messages(system("Use tools."), user("Tide at Ostby?"), assistant("I'll look.", tool_calls=[READ_TIDE]), tools=TOOLS)],
        ["`parallel_tool_calls` (1 row, the first is row 1, 'False')"]),
    "a result that says nothing": ("silent.jsonl", lines(*[messages(user("Tide?"), assistant(None, tool_calls=[TEXT_TIDE]), dict(role="tool", tool_call_id="call_7", content=o), assistant("None.")) for o in ("", None)]),
        [messages(user("Tide?"), assistant("", tool_calls=[READ_TIDE]), dict(role="tool", content="", tool_call_id="call_7"), assistant("None."))]*2, []),
    "calls in the text, as Hermes writes them": ("hermes.jsonl", lines(share(("system", "You have tide(port)."), ("human", "Tide?"), ("gpt", '<tool_call>\n{"name": "tide", "arguments": {"port": "Ostby"}}\n</tool_call>'),
                                                                          ("tool", "low"), ("gpt", "It is low."))),
        [messages(system("You have tide(port)."), user("Tide?"), assistant('<tool_call>\n{"name": "tide", "arguments": {"port": "Ostby"}}\n</tool_call>'), dict(role="tool", content="low"), assistant("It is low."))], []),
    "what is not to be learned, in four programs' words": ("flags.jsonl", lines(*[messages(user("Hi", **{k: no}), assistant("BAD", **{k: no}), user("Again"), assistant("GOOD", **{k: yes}))
                                                                              for k, no, yes in (("weight", 0, 1), ("train", False, True), ("training", False, None), ("loss", 0., 1.))]),
        [messages(user("Hi"), assistant("BAD", weight=0), user("Again"), assistant("GOOD"))]*4, []),
    "roles in capitals": ("roles.jsonl", lines(share(("User", "Hi"), ("Assistant", "Hello")), share(("Human", "Hi"), ("AI", "Hello"))), [messages(user("Hi"), assistant("Hello"))]*2, []),
    "reasoning beside the answer": ("thoughts.jsonl", lines(dict(question="3+4?", reasoning="Count on from 3.", answer="7"), dict(question="1+1?", reasoning=None, answer="2")),
        [messages(user("3+4?"), assistant("7", reasoning_content="Count on from 3.")), pair("1+1?", "2")], []),
    "the question in `input` alone": ("inputs.json", json.dumps([dict(instruction="", input="Where is Ostby?", output="At the sea.")]), [pair("Where is Ostby?", "At the sea.")], []),
    "numbers as text": ("numbers.csv", "prompt,response\n3,4\n", [pair("3", "4")], []),
    "chats without a name": ("chats.jsonl", lines([user("Hi"), assistant("Hello")], [user("Bye"), assistant("See you")]), [messages(user("Hi"), assistant("Hello")), messages(user("Bye"), assistant("See you"))], []),
    "chats in a list": ("chats.json", json.dumps([[user("Hi"), assistant("Hello")]]), [messages(user("Hi"), assistant("Hello"))], []),
    "rows under a key": ("export.json", json.dumps(dict(version="2", data=[pair("Hi", "Hello")])), [pair("Hi", "Hello")], []),
    "rows under two keys": ("export.json", json.dumps(dict(dataset=dict(name="x", rows=[pair("Hi", "Hello")]))), [pair("Hi", "Hello")], []),
    "each row under its own": ("export.json", json.dumps(dict(q7=pair("Hi", "Hello"), q9=pair("Bye", "See you"))), [pair("Hi", "Hello"), pair("Bye", "See you")], []),
    "rows within rows": ("viewer.json", json.dumps(dict(rows=[dict(row_idx=0, row=pair("Hi", "Hello"), truncated_cells=[])])), [pair("Hi", "Hello")], ["`row_idx` (1 row, the first is row 1, '0')"]),
    "ends of lines from long ago": ("old.jsonl", '{"prompt": "Hi", "response": "Hello"}\r{"prompt": "Bye", "response": "See you"}\r', [pair("Hi", "Hello"), pair("Bye", "See you")], []),
    "two files joined, each with its mark": ("joined.jsonl", '\ufeff{"prompt": "Hi", "response": "Hello"}\n\ufeff{"prompt": "Bye", "response": "See you"}\n', [pair("Hi", "Hello"), pair("Bye", "See you")], []),
    "spaces after the commas": ("spaced.csv", 'prompt, response\nHi, "Hello, you"\n', [pair("Hi", "Hello, you")], []),
    "columns and rows that a spreadsheet adds": ("sheet.csv", "prompt,response,,\nHi,Hello,,\n,,,\n,,,\n", [pair("Hi", "Hello")], []),
    "parts without a kind": ("parts.jsonl", lines(messages(user([dict(text="Hi")]), assistant("Hello"))), [messages(user("Hi"), assistant("Hello"))], []),
    "one chat under a key": ("export.json", json.dumps(dict(version="2", data=messages(user("Hi"), assistant("Hello")))), [messages(user("Hi"), assistant("Hello"))], ["`version` (1 row, the first is row 1, '2')"]),
    "bare chats under a key": ("export.json", json.dumps(dict(train=[[user("Hi"), assistant("Hello")]])), [messages(user("Hi"), assistant("Hello"))], []),
    "a chat in columns": ("columns.jsonl", lines(dict(conversations={"from": ["human", "gpt"], "value": ["Hi", "Hello"]})), [messages(user("Hi"), assistant("Hello"))], []),
    "roles with spaces": ("roles.jsonl", lines(messages(dict(role=" User", content="Hi"), dict(role="assistant\n", content="Hello"))), [messages(user("Hi"), assistant("Hello"))], []),
    "calls as LangChain and Anthropic write them": ("calls.jsonl", lines(*[messages(user("Tide?"), assistant(None, tool_calls=[{"id": "call_7", "name": "tide", "type": "tool_call", k: dict(port="Ostby")}])) for k in ("args", "input")]),
        [messages(user("Tide?"), assistant("", tool_calls=[READ_TIDE]))]*2, []),
    "a call without arguments": ("calls.jsonl", lines(*[messages(user("Tide?"), assistant(None, tool_calls=[dict(name="tide", arguments=o)])) for o in (None, "", "{}", {})]),
        [messages(user("Tide?"), assistant("", tool_calls=[dict(type="function", function=dict(name="tide", arguments={}))]))]*4, []),
    "the whole prompt once more, with its context": ("stanford.json", json.dumps([dict(instruction="Where does it end?", input=RIVER, output="In the sea.",
        text=f"Below is an instruction.\n\n### Instruction:\nWhere does it end?\n\n### Input:\n{RIVER}\n\n### Response:\nIn the sea.")]),
        [pair(f"Where does it end?\n\n{RIVER}", "In the sea.")], ["`text` (1 row, the first is row 1, 'Below is an instruction. ### Instruction…')"]),
    "tables in columns, with a null first and with chats": ("columns.json", json.dumps(dict(instruction=["Hi", "Where?"], input=[None, "Ostby"], output=["Hello", "At the sea."])), [pair("Hi", "Hello"), pair("Where?\n\nOstby", "At the sea.")], []),
    "chats in a column": ("columns.json", json.dumps(dict(messages=[[user("Hi"), assistant("Hello")]]*2)), [messages(user("Hi"), assistant("Hello"))]*2, []),
    "lines ended in two ways": ("old.jsonl", '{"prompt": "Hi", "response": "Hello"}\r{"prompt": "Bye", "response": "See you"}\n', [pair("Hi", "Hello"), pair("Bye", "See you")], []),
    "two tables joined, the second without a header": ("joined.csv", "\ufeffprompt,response\nHi,Hello\n\ufeffBye,See you\n", [pair("Hi", "Hello"), pair("Bye", "See you")], []),
    "an input of blanks": ("blank.json", json.dumps([dict(instruction="Hi", input=" \n", output="Hello")]), [pair("Hi", "Hello")], []),
    "results and calls as turns of their own": ("calls.jsonl", lines(*[share(("human", "Tide?"), (a, '{"name": "tide", "arguments": {"port": "Ostby"}}'), (b, "low"), ("gpt", "Low.")) for a, b in (("tool_call", "tool_response"), ("function-call", "ipython"))]),
        [messages(user("Tide?"), assistant("", tool_calls=[TIDE]), dict(role="tool", content="low"), assistant("Low."))]*2, []),
    "a mark in the header of a joined file": ("joined.csv", "\ufeff\ufeffprompt,response\nHi,Hello\n", [pair("Hi", "Hello")], []),
    "Cohere's word for the assistant": ("chatbot.jsonl", lines(messages(dict(role="User", content="Hi"), dict(role="Chatbot", content="Hello"))), [messages(user("Hi"), assistant("Hello"))], []),
    "a date beside them": ("dates.jsonl", lines(pair("Hi", "Hello", when="2024-01-01")), [pair("Hi", "Hello")], ["`when` (1 row, the first is row 1, '2024-01-01')"]),
    "turns beside a text, as TRL and Nemotron have them": ("sides.jsonl", lines(dict(prompt=[system("S"), user("Hi")], completion="Hello"), dict(prompt=[user("Hi"), assistant("no"), user("Again")], completion=[assistant("Hello")]), dict(prompt="Hi", completion=[assistant("Hello")])),
        [messages(system("S"), user("Hi"), assistant("Hello")), messages(user("Hi"), assistant("no", weight=0), user("Again"), assistant("Hello")), messages(user("Hi"), assistant("Hello"))], []),
    "the same in the cells of a table": ("sides.csv", 'prompt,completion\n"[{\'content\': \'Hi\', \'role\': \'user\'}]","[{\'content\': \'Hello\', \'role\': \'assistant\'}]"\n"[{""role"": ""user"", ""content"": ""Bye""}]",See you\n',
        [messages(user("Hi"), assistant("Hello")), messages(user("Bye"), assistant("See you"))], []),
    "an answer that is a list of turns, to a question that is none": ("made.jsonl", lines(pair("Make a chat.", json.dumps([user("Hi"), assistant("Hello")]))), [pair("Make a chat.", json.dumps([user("Hi"), assistant("Hello")]))], []),
    "question and answer in one turn": ("capybara.jsonl", lines(dict(source="x", conversation=[dict(input="Hi", output="Hello"), dict(input="Bye", output="See you")])), [messages(user("Hi"), assistant("Hello"), user("Bye"), assistant("See you"))],
        ["`source` (1 row, the first is row 1, 'x')"]),
    "a system message that says nothing": ("silent.jsonl", lines(*[messages(system(o), user("Hi"), assistant("Hello")) for o in ("", " \n", None)]), [messages(user("Hi"), assistant("Hello"))]*3, ["`empty system message` (3 rows, the first is row 1)"]),
    "rows of several parts": ("parts.csv", "prompt,response,split\nHi,Hello,train\nBye,See you,train\nHow?,So.,test\n", [pair("Hi", "Hello"), pair("Bye", "See you"), pair("How?", "So.")],
        ["`split=train` (2 rows, the first is row 1, 'train')", "`split=test` (1 row, the first is row 3, 'test')"]),
    "calls beside the tools, as xLAM has them": ("xlam.jsonl", lines(*[dict(query="Tide?", tools=o(TOOLS), answers=o([dict(name="tide", arguments=dict(port="Ostby"))])) for o in (json.dumps, list)]),
        [messages(user("Tide?"), assistant("", tool_calls=[TIDE]), tools=TOOLS)]*2, []),
    "tools as texts in a list, and what a tokenizer leaves beside": ("when2call.jsonl", lines(messages(user("Tide?"), assistant("Which port?"), tools=[json.dumps(TOOLS[0])], attention_mask=[1, 1])),
        [messages(user("Tide?"), assistant("Which port?"), tools=TOOLS)], ["`attention_mask` (1 row, the first is row 1, '[1, 1]')"]),
    "calls that are no JSON": ("toolace.jsonl", lines(*[share(("user", "Tide?"), ("assistant", o), ("tool", "low"), ("assistant", "Low.")) for o in ('[tide(port="Ostby")]', "<tool_call>{'name': 'tide'}</tool_call>")]),
        [messages(user("Tide?"), assistant(o), dict(role="tool", content="low"), assistant("Low.")) for o in ('[tide(port="Ostby")]', "<tool_call>{'name': 'tide'}</tool_call>")], []),
    "texts in turn, as LIMA has them": ("lima.jsonl", lines(dict(conversations=["Hi", "Hello", "Bye", "See you"])), [messages(user("Hi"), assistant("Hello"), user("Bye"), assistant("See you"))], []),
    "a system prompt within the first pair, as XTuner has it": ("xtuner.json", json.dumps([dict(conversation=[dict(system="Be kind.", input="Hi", output="Hello"), dict(input="Bye", output="See you")])]),
        [messages(system("Be kind."), user("Hi"), assistant("Hello"), user("Bye"), assistant("See you"))], []),
    "one system prompt in two places": ("twice.jsonl", lines(share(("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"), system_prompt="Be kind.")), [messages(system("Be kind."), user("Hi"), assistant("Hello"))], []),
    "a system prompt in parts, as Bedrock has it": ("bedrock.jsonl", lines(messages(dict(role="user", content=[dict(text="Hi")]), dict(role="assistant", content=[dict(text="Hello")]), system=[dict(text="Be kind.")])), [messages(system("Be kind."), user("Hi"), assistant("Hello"))], []),
    "the names of FLAN, Aya and Firefly": ("flan.jsonl", lines(dict(inputs="Where is Ostby?", targets="At the sea."), dict(inputs="Who rows?", targets="Ida")), [pair("Where is Ostby?", "At the sea."), pair("Who rows?", "Ida")], []),
    "a target": ("firefly.jsonl", lines(dict(kind="QA", input="谁划船？", target="伊达。")), [pair("谁划船？", "伊达。")], ["`kind` (1 row, the first is row 1, 'QA')"]),
    "switches that are no thoughts": ("nemotron.jsonl", lines(pair("Hi", "Hello", reasoning="on"), pair("Bye", "See you", thinking="off")),
        [pair("Hi", "Hello"), pair("Bye", "See you")], ["`reasoning` (1 row, the first is row 1, 'on')", "`thinking` (1 row, the first is row 2, 'off')"]),
    "a switch of an answer": ("nemotron.jsonl", lines(messages(user("Hi"), assistant("Hello", thinking=True))), [messages(user("Hi"), assistant("Hello"))], ["`thinking of a message` (1 row, the first is row 1, 'True')"]),
    "a list of choices and the letter of one": ("arc.jsonl", lines(dict(question="Where?", choices=CITIES, answerKey="B"), dict(question=dict(stem="Where?", choices=[dict(label="1", text="Ostby"), dict(label="2", text="Tellin")]), answerKey="2")),
        [pair("Where?\n\nA. Ostby\nB. Tellin", "B"), pair("Where?\n\n1. Ostby\n2. Tellin", "2")], []),
    "choices and the text of one": ("choices.jsonl", lines(dict(question="Which?", choices=["oar", "sail"], answer="oar"), dict(question="Which, an oar or a sail?", endings=["oar", "sail"], answer="It is the sail.")),
        [pair("Which?\n\nA. oar\nB. sail", "oar"), pair("Which, an oar or a sail?", "It is the sail.")], []),
    "choices that have their letters": ("letters.jsonl", lines(dict(question="Which?", options=["(A) oar", "(B) sail"], answer="B", answer_index=1)), [pair("Which?\n\nA. oar\nB. sail", "B")], []),
    "choices in columns": ("choices.csv", "question,A,B,answer\nWhich?,oar,sail,A\n", [pair("Which?\n\nA. oar\nB. sail", "A")], []),
    "numbers to choose from": ("sums.jsonl", lines(dict(question="2+2?", choices=[3, 4], answer=4)), [pair("2+2?\n\nA. 3\nB. 4", "4")], []),
    "choices as the text of a list": ("choices.csv", "question,choices,answer\nWhich?,\"['oar', 'sail']\",sail\n", [pair("Which?\n\nA. oar\nB. sail", "sail")], []),
    "tags and names that are no pictures": ("tags.jsonl", lines(pair("Close this:\n<video>\n<source>\n</video>", "Done."), pair("What is <image> in a prompt?", "A mark.")), [pair("Close this:\n<video>\n<source>\n</video>", "Done."), pair("What is <image> in a prompt?", "A mark.")], []),
    "an answer that is marked as right": ("marked.jsonl", lines(pair("Hi", "Hello", is_correct=True)), [pair("Hi", "Hello")], ["`is_correct` (1 row, the first is row 1, 'True')"]),
    "a mark and two ends of lines": ("marked.jsonl", '\ufeff{"prompt": "Hi", "response": "Hello"}\r\n\r\n{"prompt": "Bye", "response": "See you"}', [pair("Hi", "Hello"), pair("Bye", "See you")], []),
}

@pytest.mark.parametrize("case", READ)
def test_what_a_file_is_read_as(case, tmp_path):
    name, content, rows, noted = READ[case]
    (path := tmp_path/name).write_text(content, encoding="utf-8", newline="")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_rows(path) == rows
    assert [str(o.message) for o in said] == [f"{path}: not used: {'; '.join(noted)}."]*bool(noted)


# ---- files that are refused: (name, content, the message after the name of the file) ----

def one(*turns, **more): return "x.jsonl", lines(messages(user("Hi"), assistant("Hello")), messages(*turns, **more))
LOST = "If it belongs to the question, map it by columns=dict(context={!r}, ...); if it is not needed, name the columns that are: {}"
WEIGHS = "If it says what is learned, leave out the rows that are not; if it is not needed, name the columns that are: "
NUMBER = "whether the first is 0 or 1 is not said. Write its label (A, B) into `{}`."
SFT = "this is a preference pair (`chosen`, `rejected`), made for DPO; here one answer is learned (SFT). To learn the chosen answers: "
KTO = "this is an answer judged good or bad (`label`), made for KTO; here each answer is learned as it stands. Keep the rows whose label is true: "

REFUSED = {
    "preferences": ("dpo.jsonl", lines(dict(prompt="Hi Ostby", chosen="Hello!", rejected="Go.")), ", row 1: " + SFT + name_columns(prompt="prompt", response="chosen")),
    "judged pairs": ("kto.jsonl", lines(pair("Hi", "Hello", label=True)), ", row 1: " + KTO + name_columns(prompt="prompt", response="response")),
    "pairs judged in numbers": ("kto.csv", "prompt,completion,label\nHi,Hello,1\nHi,Go.,0\n", ", row 1: " + KTO + name_columns(prompt="prompt", response="completion")),
    "two answers": ("two.jsonl", lines(dict(question="Hi?", answer_a="Hello!", answer_b="Go.", winner="a")), ", row 1: the row has several answers ('answer_a', 'answer_b'), and one is learned. Name it: " + name_columns(prompt="question", response="answer_a")),
    **{f"a picture or a sound beside it, {k}": one(user("What is it?"), assistant("A bay."), **{k: v}) + (f", row 2: the field `{k}` ({v!r}) would be lost. " + LOST.format(k, name_columns(messages="messages")),)
       for k, v in dict(image_url="http://x/1.jpg", audio="a.wav", img_path="1.png").items()},
    "the error of a cell": ("sheet.csv", "prompt,response\nHi,Hello\n1/0?,#DIV/0!\n", f", row 2: `response` is #DIV/0!, an error of a spreadsheet. {SKIP}"),
    "a turn whose role is its type": ("langchain.jsonl", lines(messages(dict(type="human", content="Hi"), dict(type="ai", content="Hello"))), f", row 1: message 1 has no `role` (found: 'type', 'content'). {SKIP}"),
    "a field beside a context, whose cure keeps the context": ("why.jsonl", lines(pair("Where?", "In the sea.", context=RIVER, explanation="since all rivers do")),
        ", row 1: the field `explanation` ('since all rivers do') would be lost. " + LOST.format("explanation", name_columns(prompt="prompt", response="response", context="context"))),
    "equal texts, and a third": ("echo.jsonl", lines(pair("Say yes to me", "Say yes to me", explanation="it is an echo of me")),
        ", row 1: the field `explanation` ('it is an echo of me') would be lost. " + LOST.format("explanation", name_columns(prompt="prompt", response="response"))),
    "judged chats": ("kto.jsonl", lines(messages(user("Hi"), assistant("Hello"), label=False)), ", row 1: " + KTO + name_columns(messages="messages")),
    "trees": ("oasst.jsonl", lines(dict(message_id="m1", parent_id=None, text="Tell me of Ostby", role="prompter", lang="en")),
              ", row 1: this is one message of a tree (`parent_id`), not a chat. Follow each answer up to its root and save the path as one row of `messages`, a list of {role, content}."),
    "one message a row": ("turns.json", json.dumps([user("Hi"), assistant("Hello")]), ', row 1: this is one message, not a chat. Save each chat as one row: {"messages": [{"role": ...}, ...]}.'),
    "the user twice and last": (*one(user("Hi"), assistant("Hello"), user("q"), user("an answer under the wrong role")), f", row 2: the last message is the user's, not the assistant's (message 4 of 4). {SKIP}"),
    "the assistant first": ("share.json", json.dumps([share(("gpt", "How can I help?"), ("human", "Hi"), ("gpt", "Hello"))]), f", row 1: message 1 is an answer of the assistant that follows no question. {SKIP}"),
    "two systems": (*one(system("a"), system("b"), user("Hi"), assistant("Hello")), f", row 2: message 2 is a system message; only the first one can be. {SKIP}"),
    "a picture": (*one(user([dict(type="text", text="What?"), dict(type="image_url", image_url=dict(url="a.png"))]), assistant("A boat")),
                  f", row 2: `content of message 1` holds a part of the kind 'image_url'; only text can be trained here. {SKIP}"),
    "no content": (*one(user("Hi"), assistant(None)), f", row 2: `content of message 2` must be text, not null. {SKIP}"),
    "empty answer": (*one(user("Hi"), assistant("")), f", row 2: `content of message 2` is empty. {SKIP}"),
    "a result of an answer that calls nothing": (*one(user("Tide?"), assistant("I'll look."), dict(role="tool", content="low"), assistant("Low.")), f", row 2: message 3 is the result of a tool that was not called. {SKIP}"),
    "a mask that may mean either": (*one(user("Hi"), assistant("Hello", masked=True)), f", row 2: the field 'masked' of message 2 ('True') would be lost. {SKIP}"),
    "a weight that is text": (*one(user("Hi"), assistant("Hello", weight="0")), f", row 2: the weight of message 2 is '0', and only 0 and 1 are known. {SKIP}"),
    "a mask of a row": ("mask.jsonl", lines(share(("User", "Hi"), ("Assistant", "Hello"), mask="User")), ", row 1: the field `mask` ('User') would be lost. " + LOST.format("mask", name_columns(messages="conversations"))),
    "a context beside messages": ("context.jsonl", lines(dict(prompt=[user("Q")], completion=[assistant("A")], context=RIVER)), f", row 1: the field `context` ({RIVER[:40]!r}".rstrip("'") + "…') would be lost. " + LOST.format("context", name_columns(prompt="prompt", response="completion"))),
    "an answer under another name": ("squad.jsonl", lines(dict(context=RIVER, question="Where?", answers=dict(text=["the sea"]))), f", row 1: the field `answer` is missing, and `answers` is no text but dict. Write one text into `answer`. {SKIP}"),
    "an answer under another name, beside a context": ("sql.jsonl", lines(dict(context=RIVER, question="Where?", db="x", canonical_solution="the sea")), ", row 1: the field `answer` is missing. The row has 'context', 'question', 'db', 'canonical_solution'. If one of them is meant, "
                                     f"name the columns, such as {name_columns(prompt='question', response='canonical_solution', context='context')} {SKIP}"),
    "two answers, the better one first": ("two.jsonl", lines(dict(question="Hi?", response_j="Hello!", response_k="Go.")), ", row 1: the row has several answers ('response_j', 'response_k'), and one is learned. Name it: " + name_columns(prompt="question", response="response_j")),
    "a pair whose question is in the text": ("hh.jsonl", lines(dict(chosen="Human: Hi\n\nAssistant: Hello!", rejected="Human: Hi\n\nAssistant: Go.")), ", row 1: this is a preference pair (`chosen`, `rejected`), made for DPO; here one answer is learned (SFT). The question stands in the text of `chosen`. "
                                             "Save its turns as one row of `messages`, a list of {role, content}."),
    "a pair as OpenAI has it": ("dpo.jsonl", lines(dict(input=messages(user("Hi")), preferred_output=[assistant("Hello!")], non_preferred_output=[assistant("Go.")])), ", row 1: this is a preference pair (`preferred_output`, `non_preferred_output`), made for DPO; "
                                "here one answer is learned (SFT). To learn the chosen answers: " + name_columns(prompt="input", response="preferred_output")),
    "a tree as a whole": ("tree.jsonl", lines(dict(prompt=dict(text="Hi", role="prompter", replies=[]), tree_state="ready")), ", row 1: this is one message of a tree (`replies`), not a chat. Follow each answer up to its root and save the path as one row of `messages`, a list of {role, content}."),
    "turns under another name": ("dialogue.jsonl", lines(dict(dialogue=[user("Hi"), assistant("Hello")])), ", row 1: the row has none of the known fields; `dialogue` holds the turns of a chat. Name it: " + name_columns(messages="dialogue")),
    "tokens": ("tokens.jsonl", lines(dict(input_ids=[1, 2], labels=[-100, 2])), ", row 1: the row holds tokens (`input_ids`), and text is wanted. Give the rows as they were before they were tokenized."),
    "a mask of tokens": ("mask.jsonl", lines(pair("Hi", "Hello", loss_mask=[0, 1])), ", row 1: the field `loss_mask` ('[0, 1]') would be lost. " + WEIGHS + name_columns(prompt="prompt", response="response")),
    "a row of a table that is not to be learned": ("flags.csv", "prompt,response,train\nHi,Hello,true\nHi,Bye,False\n", ", row 2: the field `train` ('False') would be lost. " + WEIGHS + name_columns(prompt="prompt", response="response")),
    "two system prompts that differ": ("twice.jsonl", lines(messages(system("Be kind."), user("Hi"), assistant("Hello"), system="Be brief.")), f", row 1: there is a system message beside the messages ('Be brief.'), and message 1 is another one. {SKIP}"),
    "a turn beside a system prompt, by its own number": ("bing.jsonl", lines(share(("bing", "Hi"), ("gpt", "Hello"), system="Be kind.")), f", row 1: message 1 has the unknown role 'bing', not system, user, assistant or tool. {SKIP}"),
    "thoughts under another name": ("cot.jsonl", lines(dict(Question="3+4?", Complex_CoT="Count on from 3.", Response="7")), ", row 1: the field `Complex_CoT` ('Count on from 3.') would be lost. If it is the reasoning before the answer, map it by columns=dict(reasoning='Complex_CoT', ...); "
                                    "if it is not needed, name the columns that are: " + name_columns(prompt="question", response="response")),
    "three texts of which two have known names": ("code.jsonl", lines(dict(seed="x = 1 + 1", problem="Write f.", solution="def f(): pass")), ", row 1: the row has none of the known fields; it has 'seed', 'problem', 'solution'. Name the columns: " + name_columns(prompt="problem", response="solution")),
    "texts in turn, one too many": ("lima.jsonl", lines(dict(conversations=["Be kind.", "Hi", "Hello"])), f", row 1: message 1 needs `role` and `content`, and is a str. {SKIP}"),
    "a question under another name": ("maths.jsonl", lines(dict(problem="3+4?", solution="3 and 4 are 7.", answer="7")), ", row 1: the field `question` is missing. The row has 'problem', 'solution', 'answer'. If one of them is meant, "
                                      f"name the columns, such as {name_columns(prompt='problem', response='answer')} {SKIP}"),
    "a chat in one text": ("glaive.jsonl", lines(dict(system="SYSTEM: You help.", chat="USER: Hi ASSISTANT: Hello")), ", row 1: `chat` is a whole conversation in one text ('USER: Hi ASSISTANT: Hello'). Save its turns as one row of `messages`, a list of {role, content}."),
    "an answer that is a number": ("numbers.jsonl", lines(pair("3", "4"), pair("3+4?", 7)), f", row 2: `response` must be text, not int. {SKIP}"),
    "a class of a text": ("classes.csv", "text,label\nI like it.,positive\n", f", row 1: `label` ('positive') is a class of 'text', and what is asked of them is not in the row. Say it in a system prompt, system=..., and name the columns: {name_columns(prompt='text', response='label')}"),
    "the number of a class": ("sst2.jsonl", lines(dict(idx=1, sentence="I like it.", label=1)), f", row 1: `label` is 1, a class of 'sentence', and its name is not in the row. Write the name into `label`, and say in a system prompt what is asked: {name_columns(prompt='sentence', response='label')}"),
    "two texts and their relation": ("nli.jsonl", lines(dict(premise="It rains.", hypothesis="It is wet.", label=0)), ", row 1: `label` is 0, a class of 'premise', 'hypothesis', and its name is not in the row. "
                                     f"Write the name into `label`, and say in a system prompt what is asked: {name_columns(prompt='premise', context='hypothesis', response='label')}"),
    "endings to choose from": ("swag.jsonl", lines(dict(ctx="He", endings=["rows", "sails"], label="1")), ", row 1: 'endings' hold several texts, of which `label` ('1') names the right one. Save what comes before as `prompt`, the right one as `response`."),
    "the number of a choice": ("mmlu.jsonl", lines(dict(question="Where?", subject="x", choices=["Ostby", "Tellin"], answer=1)), ", row 1: `answer` is 1, the number of one of 'choices', and " + NUMBER.format("answer")),
    "the number of a choice, from columns": ("med.csv", "question,opa,opb,cop\nWhere?,Ostby,Tellin,1\n", ", row 1: `cop` is 1, the number of one of 'opa', 'opb', and " + NUMBER.format("cop")),
    "an answer that is no choice": ("mmlu.jsonl", lines(dict(question="Where?", choices=["Ostby", "Tellin"], answer="C")), f", row 1: `answer` ('C') is none of the choices: 'Ostby', 'Tellin'. {SKIP}"),
    "a number that is a text and a place": ("sums.jsonl", lines(dict(question="1+0?", choices=[1, 2], answer=1)), ", row 1: `answer` is 1, the number of one of 'choices', and " + NUMBER.format("answer")),
    "a letter that is a label and a text": ("letters.jsonl", lines(dict(question="Which letter?", choices=["B", "A"], answer="A")), f", row 1: `answer` ('A') names two choices. {SKIP}"),
    "two answers to one choice": ("med.jsonl", lines(dict(question="Where?", options=dict(A="Ostby", B="Tellin"), answer="Ostby", answer_idx="B")), f", row 1: `answer` ('Ostby') and `answer_idx` ('B') name two choices. {SKIP}"),
    "thoughts beside choices": ("aqua.jsonl", lines(dict(question="Where?", options=["A)Ostby", "B)Tellin"], rationale="It is inland.", correct="B")), ", row 1: the field `rationale` ('It is inland.') would be lost. If it is the reasoning before the answer, "
                                "map it by columns=dict(reasoning='rationale', ...); if it is not needed, name the columns that are: " + name_columns(prompt="question", response="correct", choices="options")),
    "an answer that is marked as wrong": ("marked.jsonl", lines(pair("Hi", "Go.", is_correct=False)), ", row 1: this is an answer marked as wrong (`is_correct`), and here each answer is learned. Keep the rows whose is_correct is true: " + name_columns(prompt="prompt", response="response")),
    "an answer that was deleted": ("oasst.jsonl", lines(pair("Hi", "Go.", deleted=True)), ", row 1: this is an answer marked as wrong (`deleted`), and here each answer is learned. Leave out the rows whose deleted is true: " + name_columns(prompt="prompt", response="response")),
    "an answer that is not safe": ("beaver.jsonl", lines(pair("Hi", "Go.", is_safe=False)), ", row 1: this is an answer marked as wrong (`is_safe`), and here each answer is learned. Keep the rows whose is_safe is true: " + name_columns(prompt="prompt", response="response")),
    "a chat and its system prompt under other names": ("gemini.jsonl", lines(dict(systemInstruction="Be kind.", contents=[user("Hi"), assistant("Hello")])), ", row 1: the row has none of the known fields; `contents` holds the turns of a chat. Name it: " + name_columns(messages="contents", system="systemInstruction")),
    "an answer judged by a number": ("wiki.jsonl", lines(dict(question="Where?", answer="In it.", label=0)), ", row 1: " + KTO + name_columns(prompt="question", response="answer")),
    "the place of a picture": (*one(user("<image>\nWhat is it?"), assistant("A bay.")), f", row 2: '<image>' in the question stands for a picture or a sound, and only text can be trained here. {SKIP}"),
    "the place of a sound": ("audio.jsonl", lines(pair("Who sings? <|audio_1|>", "Ida")), f", row 1: '<|audio_1|>' in the question stands for a picture or a sound, and only text can be trained here. {SKIP}"),
    "two roles": (*one(user("Hi"), {"role": "assistant", "from": "human", "content": "Hello"}), f", row 2: message 2 has both `role` and `from`, and they differ. {SKIP}"),
    "two contents": (*one(user("Hi", value="Bye"), assistant("Hello")), f", row 2: message 1 has both `content` and `value`, and they differ. {SKIP}"),
    "two tables joined": ("joined.csv", "prompt,response\nHi,Hello\nprompt,response\nBye,See you\n", f", row 2: the header stands here once more. {SKIP}"),
    "quotes within quotes, the wrong way": ("quotes.csv", 'prompt,response\n"Say \\"hi\\"",Hi\n', """, row 1: this is not valid CSV (',' expected after '"'). Each "quote" must be closed, and one within quotes written twice: ""."""),
    "an end that was never written": ("cut.jsonl", '{"prompt": "Hi", "response": "Hello"}\n\0\0\0', ", row 2: the file ends in zero bytes: its end is lost. " + SKIP + ' A .jsonl file holds one object a line, such as {"prompt": ..., "response": ...}.'),
    "two bytes a letter, without a mark": ("wide.csv", "p\0r\0o\0m\0p\0t\0", ": this is UTF-16 or UTF-32 without its mark, or no text at all. Save the file as UTF-8."),
    "the page around a file": ("page.jsonl", "\n<!DOCTYPE html>\n<html>", ": this is a web page. Download the file itself, by its raw address."),
    "a pointer": ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", ": this is a pointer of Git LFS, not the file. Run git lfs pull."),
    "a workbook": ("sheet.csv", "PK\3\4...", ": this is a ZIP archive or a workbook. Unpack it, or save a sheet as 'CSV UTF-8'."),
    "arguments that break off": (*one(user("Tide?"), assistant(None, tool_calls=[dict(name="tide", arguments='{"port": "Ost')])), f", row 2: the arguments of the tool call of message 2 are no JSON object. {SKIP}"),
    "more in a call": (*one(user("Tide?"), assistant(None, tool_calls=[dict(name="tide", arguments={}, result="low")])), f", row 2: the field 'result' of the tool call of message 2 ('low') would be lost. {SKIP}"),
    "calls in two fields": (*one(user("Tide?"), assistant(None, tool_calls=[TEXT_TIDE], function_call=dict(name="wind", arguments="{}"))), f", row 2: message 2 has both `tool_calls` and `function_call`. {SKIP}"),
    "lists of text": ("lists.jsonl", lines(pair(["a", "c"], ["b", "d"])), f", row 1: `prompt` must be text, not list. {SKIP}"),
    "a column twice": ("split.json", json.dumps(dict(columns=["prompt", "response", "prompt"], index=[0], data=[["a", "b", "c"]])), ": the column 'prompt' is there twice. Rename one, such as prompt."),
    "a row that is too short": ("split.json", json.dumps(dict(columns=["prompt", "response"], index=[0], data=[["a"]])), ": a row has another length than the list of columns."),
    "a row around another, with a field of the same name": ("viewer.jsonl", lines(dict(note=RIVER, row=pair("Hi", "Hello", note="x"))), f", row 1: the field `note beside it` ({RIVER[:40]!r}".rstrip("'") + "…') would be lost. " + LOST.format("note beside it", name_columns(prompt="prompt", response="response"))),
    "a header with its mark once more": ("joined.csv", "\ufeffprompt,response\nHi,Hello\n\ufeffprompt,response\n", f", row 2: the header stands here once more. {SKIP}"),
    "a table of Markdown's": ("table.csv", "| prompt | response |\n|:---|---:|\n| Hi | Hello |\n", f", row 1: this is the rule of a Markdown table. {SKIP}"),
    "a document": ("rows.csv", "%PDF-1.7\n", ": this is a PDF. Put each question with its answer into a row of a .jsonl file."),
    "columns of different lengths": ("columns.json", json.dumps(dict(prompt=["a", "b"], response=["c"])), ": the columns have different rows, 'prompt', 'response'. Each column needs a value for each row, perhaps null."),
    "a name with a space, twice": ("spaced.jsonl", lines({"prompt": "a", "prompt ": "b", "response": "c"}), ", row 1: the field `prompt ` ('b') would be lost. " + LOST.format("prompt ", name_columns(prompt="prompt", response="response"))),
    "a row that is not to be learned": ("flags.jsonl", lines(pair("Hi", "Hello", train=True), pair("Hi", "Bye", train=False)), ", row 2: the field `train` ('False') would be lost. " + WEIGHS + name_columns(prompt="prompt", response="response")),
    "a row that counts half": ("flags.jsonl", lines(pair("Hi", "Hello", sample_weight=.5)), ", row 1: the field `sample_weight` ('0.5') would be lost. " + WEIGHS + name_columns(prompt="prompt", response="response")),
    "two thoughts": (*one(user("Hi"), assistant("Hello", reasoning="Short.", reasoning_content="Long.")), f", row 2: message 2 has both `reasoning_content` and `reasoning`, and they differ. {SKIP}"),
    "an argument twice": (*one(user("Tide?"), assistant(None, tool_calls=[dict(name="tide", arguments='{"port": "a", "port": "b"}')])), f", row 2: the key 'port' is there twice. {SKIP}"),
    "half a letter in an argument": (*one(user("Tide?"), assistant(None, tool_calls=[dict(name="tide", arguments=r'{"port": "\ud83d"}')])), f", row 2: `arguments of the tool call of message 2` holds half of a surrogate pair: no character. {SKIP}"),
    "an answer that nobody sees": ("unseen.jsonl", lines(pair("Hi", "\u200b\0")), f", row 1: `response` is empty. {SKIP}"),
    "a chat as NumPy prints it": ("printed.csv", "messages\n\"[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant'}]\"\n", f""", row 1: the list of messages is text that is no JSON ("[{{'role': 'user', 'content': 'Hi'}} {{'rol…"). {SKIP}"""),
    "a pair under names of its own": ("pair.jsonl", lines(dict(prompt="Hi", chosen_answer="Hello!", rejected_answer="Go.")), ", row 1: this is a preference pair (`chosen_answer`, `rejected_answer`), made for DPO; here one answer is learned (SFT). "
                                      f"To learn the chosen answers: {name_columns(prompt='prompt', response='chosen_answer')}"),
    "a verdict under a name of its own": ("kto.jsonl", lines(pair("Hi", "Go.", kto_tag=False)), ", row 1: this is an answer judged good or bad (`kto_tag`), made for KTO; here each answer is learned as it stands. "
                                          f"Keep the rows whose kto_tag is true: {name_columns(prompt='prompt', response='response')}"),
    "a split in one file": ("both.json", json.dumps(dict(train=[pair("a", "b")], test=[pair("c", "d")])), ": the file holds several lists of rows: 'train', 'test'. Save the one that is meant as a .jsonl file."),
}

@pytest.mark.parametrize("case", REFUSED)
def test_what_is_said_of_a_file(case, tmp_path):
    name, content, message = REFUSED[case]
    (path := tmp_path/name).write_text(content, encoding="utf-8")
    with pytest.raises(QLoRAError) as e: load_rows(path)
    assert str(e.value) == f"{path}{message}"


def test_files_are_mapped_as_they_are_read(tmp_path):
    "The same rows from a table on the disk."
    for case in ("names in capitals", "rows within rows", "roles in capitals", "what is not to be learned, in four programs' words"):
        name, content, rows, _ = READ[case]
        given = json.loads(content) if name.endswith(".json") else list(map(json.loads, content.splitlines()))
        (path := tmp_path/f"{len(case)}.jsonl").write_text(lines(*(given["rows"] if isinstance(given, dict) else given)), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert list(map_rows(path, cache_dir=tmp_path/"cache")) == list(load_rows(path))


def test_who_names_the_chat_has_seen_the_rest(tmp_path):
    "Fields of a message are noted then, as WildChat has them; what changes the learning is refused all the same."
    browser = dict(agent="Mozilla/5.0 (X11; Linux)")
    rows = [dict(conversation=[user("Hi", header=browser), assistant("Hello", **more)], place="United States") for more in ({}, dict(train_detail=[dict(train=False)]))]
    for n, said in ((1, "the field 'header' of message 1 .* would be lost. If it is not needed, say which column is: columns=dict.messages=.*--columns messages="), (2, "the field 'train_detail' of message 2")):
        (path := tmp_path/f"{n}.jsonl").write_text(lines(rows[n-1]), encoding="utf-8")
        with pytest.raises(QLoRAError, match=said): load_rows(path, columns=dict(messages="conversation") if n == 2 else None)
    with pytest.warns(UserWarning, match="`place` .1 row.*`header of a message` .1 row"): assert load_rows(tmp_path/"1.jsonl", columns=dict(messages="conversation")) == [messages(user("Hi"), assistant("Hello"))]


def test_answers_that_may_be_empty_cells_are_said(tmp_path):
    (path := tmp_path/"cells.csv").write_text("prompt,response\nHi,nan\nWhich?,None\n", encoding="utf-8")
    for large, first, second in ((False, ", 'nan'", ", 'None'"), (True, "", "")):
        with pytest.warns(UserWarning) as said: assert list(load_rows(path, large=large)) == [pair("Hi", "nan"), pair("Which?", "None")]
        assert [str(o.message) for o in said] == [f"{path}: learned as it stands, perhaps an empty cell: `nan in response` (1 row, the first is row 1{first}); "
                                                  f"`None in response` (1 row, the first is row 2{second})."]


def test_bytes_that_are_cut_and_lines_of_old_files(tmp_path):
    "The same from memory and from a table on the disk: rows, or where the file breaks."
    old, wide, cut = tmp_path/"old.jsonl", tmp_path/"wide.csv", tmp_path/"cut.csv"
    old.write_bytes(b'{"prompt": "a", "response": "b"}\r{"prompt": "c"}\r')
    wide.write_bytes("prompt,response\n".encode("utf-16-le")), cut.write_bytes("prompt,response\nHi,né".encode()[:-1])
    (half := tmp_path/"half.csv").write_bytes("prompt,response\nHi,Hello".encode("utf-16")[:-1])
    (pair := tmp_path/"pair.csv").write_bytes("prompt,response\nHi,".encode("utf-16") + b"\x3d\xd8")
    for path, said in {old: ", row 2: the field `response` is missing", wide: ": this is UTF-16 or UTF-32 without its mark", cut: ", row 1: the file ends within a letter",
                       half: "the file ends within a letter", pair: ", row 1: `response` holds half of a surrogate pair"}.items():
        for large in (False, True):
            with pytest.raises(QLoRAError, match=f"{path.name}.*{said}"): load_rows(path, large=large)


def test_what_can_be_no_data(tmp_path, monkeypatch):
    "Refused at once, wherever it is asked for."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"rows.jsonl").write_text(lines(pair("Hi", "Hello")), encoding="utf-8")
    cases = {(o for o in "ab"): "data of the type generator", "-": "this is a pipe or a device", "a"*300 + ".jsonl": "this cannot be opened .File name too long", tmp_path: "this is a folder",
             "rows.xlsx": "there is no such file", "ROWS.JSONL": "there is no such file. Did you mean 'rows.jsonl'"}
    for data, said in cases.items():
        for large in (False, True):
            with pytest.raises(QLoRAError, match=said): load_rows(data, large=large)
    with pytest.raises(QLoRAError, match="the weight of a data set is 1000000000.0, and has to be a number above zero and below"): load_rows([("rows.jsonl", 1e9)])


# ---- what is no file ----

def test_folders_links_and_addresses(tmp_path):
    import datasets
    table = datasets.Dataset.from_list([pair("Hi", "Hello")])
    table.save_to_disk(tmp_path/"one"), datasets.DatasetDict(train=table).save_to_disk(tmp_path/"two"), (tmp_path/"model").mkdir()
    (tmp_path/"model"/"config.json").write_text("{}", encoding="utf-8"), (tmp_path/"link.jsonl").symlink_to(tmp_path/"nowhere")
    said = {tmp_path/"one": "the folder of a data set, as `save_to_disk` writes one. Give what datasets.load_from_disk", tmp_path/"two": r"as `save_to_disk`.*; to a command the file that .to_json\('rows.jsonl'\) makes of a split",
            tmp_path/"model": "the folder of a model, and rows are wanted", tmp_path: "this is a folder. Give one", tmp_path/"link.jsonl": "this link leads to no file",
            "https://a.org/x.jsonl": "this is an address, and nothing is fetched from there"}
    for data, what in said.items():
        with pytest.raises(QLoRAError, match=what): load_rows(data)


def test_tables_of_every_kind():
    import pandas as pd, pyarrow as pa
    row, frame = pair("Hi", "Hello"), pd.DataFrame([["Hi", "Hello"]])
    assert load_rows(pa.Table.from_pylist([row])) == load_rows(frame, columns=dict(prompt=0, response=1)) == [row]
    with pytest.raises(QLoRAError, match="none of the known fields; it has '0', '1'"): load_rows(frame)
    with pytest.raises(QLoRAError, match="the column 'response' is there twice"): load_rows(pd.DataFrame([["Hi", "Hello", "Bye"]], columns=["prompt", "response", "response"]))


def test_text_beside_the_only_list_is_named(tmp_path):
    (path := tmp_path/"export.json").write_text(json.dumps(dict(preamble=RIVER, version="2", meta=dict(tags=[dict(a=1)]), data=[pair("Hi", "Hello")])), encoding="utf-8")
    with pytest.warns(UserWarning, match=f"not used, beside the rows: `preamble` \\('{RIVER[:20]}.*`meta`"): assert load_rows(path) == [pair("Hi", "Hello")]


def test_columns_that_are_there_twice_and_broken_parquet(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "response", "prompt"])
    pq.write_table(table, path := tmp_path/"twice.parquet")
    pq.write_table(pa.table(dict(prompt=["Hi"]*99, response=["Hello"]*99)), broken := tmp_path/"broken.parquet")
    broken.write_bytes((o := broken.read_bytes())[:20] + b"\xff"*30 + o[50:])
    for data in (table, path):
        with pytest.raises(QLoRAError, match="the column 'prompt' is there twice"): load_rows(data)
    with pytest.raises(QLoRAError, match="not a Parquet file .*Write it again"): load_rows(broken)


def test_arrays_formats_and_other_frames():
    "What tables hold besides text: arrays within arrays, tensors, NA; a table shown as another library's."
    import datasets, numpy as np, pandas as pd, torch
    row, table = pair("Hi", "Hello"), datasets.Dataset.from_list([pair("Hi", "Hello", extra="x")])
    for kind in ("arrow", "pandas", "numpy", "torch"):
        assert load_rows(table.with_format(kind, columns=["prompt", "response"])) == [row]
    class Frame:   # as polars has it
        columns = ["prompt", "response"]
        def to_dicts(self): return [row]
        def to_dict(self): raise AssertionError
    assert load_rows(Frame()) == [row]
    calls = np.array([user("Tide?"), assistant("", tool_calls=np.array([READ_TIDE]))], dtype=object)
    for data in (pd.DataFrame(dict(messages=[calls])), [dict(messages=calls)]):
        assert load_rows(data) == [messages(user("Tide?"), assistant("", tool_calls=[READ_TIDE]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # `seen` is named
        assert load_rows([row | dict(seen=o) for o in (np.array([1, 2]), torch.ones(2), pd.NA, pd.NaT)]) == [row]*4
    with pytest.raises(QLoRAError, match="the field `places`"): load_rows([row | dict(places=np.array(["oar", "sail"]))])


@pytest.mark.parametrize("options, said", [
    (dict(columns="prompt=q"), "columns is 'prompt=q', and has to name a column of its own"), (dict(columns=["q", "a"]), "columns is"),
    (dict(columns=dict(prompt="q", response="q")), "columns is"), (dict(system=3), "`system` must be text, not int"), (dict(system="  "), "`system` is empty")])
def test_options_with_which_no_row_can_be_read(options, said, tmp_path):
    rows = [dict(q="Hi", a="Hello")]
    for read in (load_rows, lambda o, **k: map_rows(o, cache_dir=tmp_path, **k)):
        with pytest.raises(QLoRAError, match=said) as e: read(rows, **dict(columns=dict(prompt="q", response="a")) | options)
        assert not e.value.where


def test_rows_are_scored_without_a_padding_token_and_wrong_ones_named():
    from qlora_nb.base.model_files import load_tokenizer, tiny_model
    from qlora_nb.evaluation.answer_loss import answer_loss, fit_rows
    from qlora_nb.evaluation.evaluation import evaluate
    from qlora_nb.training.data import encode_prompt
    from qlora_nb.using.inference import generate
    tok, bare, rows = load_tokenizer("smollm2"), load_tokenizer("smollm2"), [pair("Where is Ostby?", "At the sea."), pair("Hi", "Hello")]
    bare.pad_token, model = None, tiny_model("llama", vocab_size=len(tok), hidden_size=64)
    prompts = [encode_prompt(o, tok) for o in rows]
    assert generate(model, tok, prompts, max_new_tokens=2) == generate(model, bare, prompts, max_new_tokens=2)
    bare.pad_token = None
    assert answer_loss(model, tok, rows) == answer_loss(model, bare, rows)
    with pytest.raises(QLoRAError, match="tickets: this is a name, and rows are wanted"): evaluate(model, tok, "tickets")
    with pytest.raises(QLoRAError, match="no row to evaluate on is left"): evaluate(model, tok, [])
    tok.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + tok.chat_template
    with pytest.warns(UserWarning, match="1 of 3 rows to evaluate on cannot be written: the first is row 1: .*no system"):
        assert fit_rows([rows[0] | dict(system="Be kind."), *rows], tok) == rows
    with pytest.raises(QLoRAError, match="no system"): fit_rows([rows[0] | dict(system="Be kind.")], tok)


def test_columns_that_leave_the_choices_out(tmp_path):
    "A letter is no answer without its choices; with their column, or for a text, it is."
    (path := tmp_path/"o.jsonl").write_text(lines(dict(stem="Where?", choices=CITIES, key="B", text="Tellin")), encoding="utf-8")
    with pytest.raises(QLoRAError, match="the answer 'B' is one of 'choices', which would be lost. columns=dict.prompt='stem', response='key', choices='choices'."):
        load_rows(path, columns=dict(prompt="stem", response="key"))
    with pytest.warns(UserWarning, match="`text`"): assert load_rows(path, columns=dict(prompt="stem", response="key", choices="choices")) == [pair("Where?\n\nA. Ostby\nB. Tellin", "B")]
    with pytest.warns(UserWarning, match="`choices`"): assert load_rows(path, columns=dict(prompt="stem", response="text")) == [pair("Where?", "Tellin")]
