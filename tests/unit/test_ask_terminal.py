"""What a person types to `megatron-vl chat`: lines, keys and arguments."""

from __future__ import annotations

import io
import itertools
import os
import pty
import select
import signal
import sys
import time

import pytest
from mixed_data import write_image

from megatron_vl.ask import terminal
from megatron_vl.ask.answerer import Answerer, Sampling
from megatron_vl.ask.dialogue import Dialogue
from megatron_vl.cli.main import run


def test_every_line_that_is_piped_is_a_question(model_dir, tmp_path, monkeypatch, capsys):
    image, sampling = write_image(tmp_path / "a.png", (90, 64)), Sampling(max_new_tokens=12)
    lines = f"a?\n\n/image '{image}'\nwhat?\n/reset\na?\n/exit\nunheard\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    one, again = (Dialogue(Answerer.from_hf_dir(model_dir), sampling=sampling) for _ in range(2))
    capsys.readouterr()  # of making the model
    terminal.talk(one)
    said = ["".join(again.ask("a?"))]
    again.show("image", image)
    said.append("".join(again.ask("what?")))
    out, err = capsys.readouterr()
    assert out == "".join(f"{terminal.printable(text)}\n" for text in (*said, said[0]))
    assert err == "cut off after --max-new-tokens 12\n" * 3
    assert len(one.turns) == 2 and not one.media


def test_ctrl_c_ends_an_answer_and_then_the_program(tmp_path):
    hf_dir = str(tmp_path / "model")  # whose large weights find more words than one
    assert run(["tiny", hf_dir, "--model-type", "qwen2", "--hidden-size", "64", "--ffn-size", "96",
                "--ranks", "1500", "--init-std", "0.5", "--dtype", "float32"]) == 0
    child, typed = pty.fork()
    if child == 0:  # in a terminal of its own
        os.execv(sys.executable, [sys.executable, "-m", "megatron_vl", "chat", hf_dir,
                                  "--max-new-tokens", "20000"])
    said, deadline = b"", time.monotonic() + 120

    def wait(enough) -> None:
        nonlocal said
        while not enough():
            assert time.monotonic() < deadline, said
            if select.select([typed], [], [], 1)[0]:
                said += os.read(typed, 2**16)

    try:
        wait(lambda: said.endswith(b"> "))
        os.write(typed, b"a?\n")
        wait(lambda: len(said.partition(b"a?\r\n")[2]) > 40)
        os.write(typed, b"\x03")
        wait(lambda: said.endswith(b"\r\n> "))
        os.write(typed, b"/image x.png\n")
        wait(lambda: said.endswith(b"takes text alone; leave it out.\r\n> "))
        # Python prints the prompt before it waits for a key, and would see the signal at the next.
        time.sleep(1)
        os.write(typed, b"\x03")
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(ended[1]) == 130
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(typed)


def test_a_question_is_one_argument_wherever_it_stands(model_dir, capsys):
    words = [str(model_dir), "a question"], ["--max-new-tokens", "2"]
    for order in (words, words[::-1], ([words[0][0]], words[1], ["a question"])):
        assert run(["chat", *itertools.chain(*order)]) == 0
    out, err = capsys.readouterr()
    assert out and out == out[: len(out) // 3] * 3
    assert err == "cut off after --max-new-tokens 2\n" * 3
    with pytest.raises(SystemExit):
        run(["chat", str(model_dir), "a", "question"])
    assert "QUESTION is 2 words, a and so on; put it in quotes" in capsys.readouterr().err
