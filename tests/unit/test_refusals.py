"""What is refused says why in a few words, and what to do about this reason and no other."""

import json
import re

import pytest
from PIL import Image
from raw_entries import chat, openai, qwen

from megatron_vl.cli.main import Parser, run
from megatron_vl.data.conversation import REASONS, BadEntry
from megatron_vl.data.raw.refusals import MENDS
from megatron_vl.data.raw.source_files import OTHERS
from megatron_vl.errors import MAX_VALUE, CheckFailed, InputError, shortened

GOOD = {"conversations": chat("What?", "x")}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    path.write_bytes(value if isinstance(value, bytes) else value.encode())
    return path


def prepared(capsys, source, *words):
    """The code of `prepare`, and what it printed."""
    code = run(["prepare", str(source), str(source.parent / "out"), "--split", "1,0,0", "--quiet",
                *map(str, words)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


# ---- each reason its own mend -----------------------------------------------------------------

IMAGE = {"conversations": chat("<image>?", "x"), "image": "0.png"}
REFUSED = {  # reason -> a file of one entry that is refused for it, and options
    "wrong shape": ([{"conversations": [{"from": "human"}]}], ()),
    "bad text": ([{"conversations": chat("a", "\ud83d")}], ()),
    "reserved mark": ([{"conversations": chat("a <|image_pad|>", "x")}], ()),
    "unknown role": ([{"conversations": chat("a", "x", roles=("Q", "A"))}], ()),
    "mark count": ([{**IMAGE, "image": ["0.png"] * 2}], ()),
    "empty answer": ([{"conversations": chat("a", " ")}], ()),
    "no answer": ([{"conversations": chat("a", "b", "c")}], ()),
    "bad box": ([qwen("<box>(9,9)</box>")], ("--format", "qwen_vl")),
    "missing media": ([{**IMAGE, "image": "no.png"}], ()),
    "unusable media": ([{**IMAGE, "image": "data.json"}], ()),
    "not served": ([{**GOOD, "rejected": "y"}], ()),
    "too long": None, "chat template": None,  # need a tokenizer; they pass the same door
}


def test_every_reason_has_a_mend():
    assert MENDS.keys() == set(REASONS) - {"too many patches"}  # of a row, which training makes
    assert REFUSED.keys() == MENDS.keys()
    assert len(set(MENDS.values())) == len(MENDS)


@pytest.mark.parametrize("reason", [name for name, given in REFUSED.items() if given])
def test_a_reason_has_its_own_mend(reason, tmp_path, capsys):
    entries, words = REFUSED[reason]
    Image.new("RGB", (40, 30)).save(write(tmp_path / "in" / "0.png", b""))
    write(tmp_path / "in" / "data.json", entries)
    code, said = prepared(capsys, tmp_path / "in", *words)
    assert code == 2 and f"can be used: 1 x {reason}, such as: " in said, said
    assert f"; {MENDS[reason]}." in said
    assert not [other for name, other in MENDS.items() if name != reason and other in said]


def test_too_few_that_can_be_used_say_why_the_others_cannot(tmp_path, capsys):
    source = write(tmp_path / "data.json", [GOOD] * 5 + [{**IMAGE, "image": "no.png"}] * 15)
    code, said = prepared(capsys, source, "--split", "9,1,0")
    assert code == 2 and "at least 10 samples but 5 are usable" in said
    assert "15 entries were refused: 15 x missing media, such as: " in said
    assert f"; {MENDS['missing media']}." in said


def test_the_summary_has_a_mend_for_each_reason(tmp_path, capsys):
    bad = [{"conversations": chat("a", " ")}, {"conversations": chat("a")}]
    code, said = prepared(capsys, write(tmp_path / "data.json", [GOOD, *bad, *bad[:1]]))
    assert code == 0
    example = "the answer in turn 2 is empty"
    assert f"  2 x empty answer, such as: {example}; {MENDS['empty answer']}\n" in said
    assert f"; {MENDS['no answer']}\n" in said
    code, said = prepared(capsys, tmp_path / "data.json", "--strict", "--overwrite")
    assert code == 2 and f"is empty; {MENDS['empty answer']}, or prepare without --strict." in said


@pytest.mark.parametrize(("entry", "format", "meant"), [
    ({"instruction": "a", "output": "b"}, "llava", "alpaca"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                   {"role": "assistant", "content": "b"}]}, "sharegpt", "messages"),
    (GOOD, "alpaca", "llava or sharegpt or chatml or messages or qwen_vl"),
])  # fmt: skip
def test_the_format_that_is_meant_is_named(entry, format, meant, tmp_path, capsys):
    code, said = prepared(capsys, write(tmp_path / "a.json", [entry]), "--format", format)
    assert code == 2 and said.endswith(f"but some can be read with --format {meant}.\n"), said


# ---- long values ------------------------------------------------------------------------------

LONG = {"letters": "iVBORw0KGgo" * 40_000, "words": "one two 'three' " * 30_000}


def values(said):
    """What a message shows of values: stretches without blanks, and in quotes."""
    return [*said.split(), *re.findall(r"(?<!\w)'[^']*'|\"[^\"]*\"", said)]


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("door", [InputError, CheckFailed, lambda m: BadEntry("bad text", m)])
def test_no_door_lets_a_long_value_through(kind, door):
    long = LONG[kind]
    said = str(door(f"--x is {long!r}, users' isn't; give {long[:MAX_VALUE - 9]!r} or 'y'."))
    assert max(map(len, values(said))) <= MAX_VALUE
    assert said.startswith("--x is ") and said.endswith(" or 'y'.")
    assert f"{len(repr(long)):,} characters" in said
    assert len(str(door(f"{long} is no file."))) <= 2000


def test_what_is_not_long_stays_as_it_is():
    said = f"users' data isn't {'a' * 150!r}, but {'b ' * 90!r} and " + "c " * 400
    assert shortened(said) == said


MEDIUM = {"conversations": chat("<image>?", "x")}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("entry", [
    lambda long: {**MEDIUM, "image": long},
    lambda long: {**MEDIUM, "image": f"data:image/png;base64,{long}!"},
    lambda long: {**MEDIUM, "image": f"https://{long}"},
    lambda long: {**MEDIUM, "image": {"a": long}},
    lambda long: {"conversations": chat("?", "x", roles=(long, "gpt"))},
    lambda long: {"conversations": [long]},
    lambda long: {"messages": [{"role": "user", "content": [{"type": long}]}]},
    lambda long: {"messages": openai("?", "x"), "system": [long]},
    lambda long: {"conversations": chat(f"<box>{long}</box>", "x")},
])  # fmt: skip
def test_no_entry_prints_a_long_value(entry, kind, tmp_path, capsys):
    write(tmp_path / "data.json", [GOOD, entry(LONG[kind])])
    for format in ("llava", "messages", "qwen_vl"):
        _, said = prepared(capsys, tmp_path / "data.json", "--overwrite", "--format", format)
        refused = (tmp_path / "out/refused.jsonl").read_text()
        assert len(said) < 3000 and len(refused) < 5000, (format, said[:500])
        assert max(map(len, values(said))) <= MAX_VALUE


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("words", [
    ("--format", "{}"), ("--split", "{}"), ("--marks", "{}"), ("--columns", "{}"),
    ("--columns", "images={}"), ("--dataset", "{}"), ("--json", "{}"), ("--media-root", "{}"),
    ("--num-workers", "{}"), ("--{}",), ("--tokenizer", "{}", "--max-length", "1"), ("{}",),
])  # fmt: skip
def test_no_option_prints_a_long_value(words, kind, tmp_path, capsys):
    write(tmp_path / "in" / "data.json", [{"conversations": 1}])
    words = [word.format(LONG[kind]) for word in words]
    try:
        code = run(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet", *words])
    except SystemExit as left:  # argparse's own
        code = left.code
    said = capsys.readouterr().err
    assert code == 2 and len(said) < 3000 and "Traceback" not in said
    assert max(map(len, values(said))) <= MAX_VALUE


def test_the_parser_is_a_door(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["y" * 10_000])
    assert len(capsys.readouterr().err) < 400


# ---- files of other kinds ---------------------------------------------------------------------

CHINESE = [{"conversations": chat("图里有什么？", "红色的圆")}]
TEXTS = {
    "json": json.dumps(CHINESE, ensure_ascii=False),
    "jsonl": json.dumps(CHINESE[0], ensure_ascii=False) + "\n",
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(("encoding", "looks"), [
    ("utf-16", "it looks like UTF-16"), ("utf-16-le", "it looks like UTF-16"),
    ("utf-16-be", "it looks like UTF-16"), ("utf-32", "it looks like UTF-32"),
    ("gbk", "it may be GBK"), ("gb18030", "it may be GBK"),
])  # fmt: skip
def test_another_encoding_asks_for_utf8(kind, encoding, looks, tmp_path, capsys):
    path = write(tmp_path / f"data.{kind}", TEXTS[kind].encode(encoding))
    code, said = prepared(capsys, path)
    assert code == 2 and f"is not UTF-8 ({looks}); save it as UTF-8" in said, said


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", TEXTS)
def test_utf8_is_read(kind, encoding, tmp_path, capsys):
    path = write(tmp_path / f"data.{kind}", TEXTS[kind].encode(encoding))
    assert prepared(capsys, path)[0] == 0


def test_a_dataset_info_in_another_encoding_asks_for_utf8(tmp_path, capsys):
    text = '{"图片数据": {"file_name": "data.json"}}'
    write(tmp_path / "in" / "dataset_info.json", text.encode("gbk"))
    code, said = prepared(capsys, tmp_path / "in", "--dataset", "图片数据")
    assert code == 2 and "dataset_info.json: it is not UTF-8 (it may be GBK); save it" in said


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("end", OTHERS)
def test_a_file_of_another_kind_is_named(end, alone, tmp_path, capsys):
    path = write(tmp_path / "in" / f"data{end.upper()}", b"image,question,answer\n0.png,?,x\n")
    code, said = prepared(capsys, path if alone else path.parent)
    assert code == 2 and said.startswith(f"megatron-vl prepare: {path} {OTHERS[end]}"), said


@pytest.mark.parametrize(("value", "what"), [
    ({"data": [GOOD]}, None),
    ({"version": "1.0", "data": [GOOD, GOOD], "splits": []}, None),
    ({"data": []}, "holds no list of entries; give a file with [{...}, ...]"),
    ({"data": [GOOD], "images": [{"id": 0}]}, "is an object with lists under 'data', 'images';"),
    ({"train": [GOOD]}, "is an object with lists under 'train'; write the list of entries alone"),
    (GOOD, "is a single entry; write a list of them"),
    ({"instruction": "a", "output": "b"}, "is a single entry"),
])  # fmt: skip
def test_an_object_is_read_where_its_list_is_certain(value, what, tmp_path, capsys):
    path = write(tmp_path / "data.json", json.dumps(value, indent=1))
    code, said = prepared(capsys, path)
    assert (code, f"{path} {what}" in said) == ((0, False) if what is None else (2, True)), said
