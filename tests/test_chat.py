"""`polyquant chat`: what can be set on the way, what is kept, and Ctrl-C, which ends an answer and not the session."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import polyquant
import pytest
from polyquant.cli.chatting import Chat, Settings
from polyquant.testing.models import tiny_model

TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model("llama", out), out / "talks")
    tokenizer = AutoTokenizer.from_pretrained(out / "talks")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out / "talks")
    return out / "talks"


@pytest.fixture(scope="module")
def loaded(rowwise, folder):
    return polyquant.load(folder, "rowwise", device="cpu")


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """A session with these lines typed; gives the session, what it answered and what it said beside."""

    def run(*lines, system="", **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chat = Chat(loaded, Settings(**{"temperature": 0.0, "max_tokens": 8, **settings}), system, {})
        chat.talk()
        found = capsys.readouterr()
        return chat, found.out, found.err

    return run


def answer(loaded, *said, **how):
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
    return loaded.generate(messages, max_new_tokens=8, do_sample=False, **how)


def test_a_conversation_goes_on_over_empty_lines(loaded, talk):
    _, out, err = talk("Hello", "", "   ", "And now")
    first = answer(loaded, "Hello")
    assert out == f"{first}\n{answer(loaded, 'Hello', first, 'And now')}\n"
    assert err == ""


def test_settings_change_on_the_way(loaded, talk):
    chat, out, err = talk(
        "/set", "/set temperature 0.5", "/set top_p 0.9", "/set seed 3", "/set max_tokens 4", "Hello", "/clear", "Hello"
    )
    assert "temperature=0.0 top_p=1.0 seed=None max_tokens=8\ntemperature=0.5\ntop_p=0.9\nseed=3\nmax_tokens=4\n" in err
    first, second = (
        out.removesuffix("\n").split("\n")
        if out.count("\n") == 2
        else (out[: len(out) // 2 - 1], out[len(out) // 2 : -1])
    )
    assert first == second, "the same seed, and nothing is remembered"
    assert talk("/set seed 3", "/set seed none")[0]._settings.seed is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sett top_p 1", "/sett is no command; /help shows them. Did you mean 'set'?"),
        ("/set top_k 3", "'top_k' cannot be set; there are temperature, top_p, seed, max_tokens. Did you mean 'top_p'?"),
        ("/set top_p 2", "top_p cannot be '2'"),
        ("/set max_tokens many", "max_tokens cannot be 'many'"),
        ("/save", "name a file, as in /save talk.json"),
        ("/save /nowhere/talk.json", "/nowhere/talk.json cannot be written: No such file"),
        ("/load /nowhere/talk.json", "/nowhere/talk.json cannot be read: No such file"),
        ("/set max_tokens 5000000000000000000000", "max_tokens cannot be"),
    ],
    ids=lambda value: value[:18],
)  # fmt: skip
def test_what_is_wrong_is_said_and_the_session_goes_on(loaded, talk, line, words):
    _, out, err = talk(line, "Hello")
    assert words in err
    assert out == f"{answer(loaded, 'Hello')}\n"


def test_a_question_that_cannot_be_answered_is_forgotten(loaded, talk, monkeypatch):
    chat, out, err = talk("é" * 20, "Hello")
    monkeypatch.setattr(
        loaded.tokenizer,
        "chat_template",
        "{{ raise_exception('not so') if messages|length > 1 else '' }}{{ messages[0].content }}",
    )
    chat, out, err = talk("Hello", "again", "once more")
    assert err.count("does not take these messages: not so") == 2
    assert [message.content for message in chat._said][0] == "Hello"
    assert len(chat._said) == 2


def test_a_system_prompt_is_told_and_changed(loaded, talk):
    _, out, _ = talk("Hello", system="Be brief")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    assert out == f"{loaded.generate(messages, max_new_tokens=8, do_sample=False)}\n"
    assert talk("/system Be brief", "Hello")[1] == out
    assert talk("/system", "Hello", system="Be brief")[1] == f"{answer(loaded, 'Hello')}\n"


def test_a_conversation_is_saved_and_gone_on_with(loaded, talk, tmp_path):
    file = tmp_path / "talk.json"
    first, out, err = talk("Hello", f"/save {file}", f"/save {file}", system="Be brief")
    assert err.count(f"wrote {file}: 2 messages") == 2
    roles = [message["role"] for message in json.loads(file.read_text())["messages"]]
    assert roles == ["system", "user", "assistant"]
    second, _, err = talk(f"/load {file}")
    assert f"read {file}: 2 messages" in err
    assert (second._said, second._system) == (first._said, "Be brief")
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    assert f"{other} is no conversation that /save wrote" in talk(f"/save {other}")[2]
    assert other.read_text() == '{"a": 1}'


def test_help_names_every_command(talk):
    err = talk("/help")[2]
    assert all(f"/{name}" in err for name in ("set", "system", "clear", "save", "load", "help", "exit"))
    assert "never" not in talk("/exit", "never asked")[1]


TAKES_OVER = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell runs the tests in the background
os.execv(sys.executable, [sys.executable, "-m", "polyquant", *sys.argv[1:]])
"""


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *words):
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "POLYQUANT_KERNEL": "library", "TERM": "xterm", "COLUMNS": "200"}
        command = [sys.executable, "-c", TAKES_OVER, *words]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        os.write(self._ours, text.encode())

    def until(self, pattern, seconds=120, typing=""):
        """What is shown up to where `pattern` ends; later calls see what follows. typing: again where nothing comes."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if not select.select([self._ours], [], [], 1)[0]:
                self.type(typing)
            else:
                try:
                    self.seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"it ended: {self.seen}") from None
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_ctrl_c_ends_an_answer_and_not_the_session(folder):
    terminal = Terminal("chat", str(folder), "-b", "bitsandbytes", "--temperature", "0", "--max-new-tokens", "450")
    try:
        begun = terminal.until("you: ")
        assert "loading " in begun
        assert "\u280b" not in begun, "a spinner beside a bar"
        terminal.type("Hello\n")
        terminal.until(r"Hello\r\n.")
        time.sleep(0.2)
        terminal.type("\x03")
        shown = terminal.until(r"\[\d+ tokens, [\d.]+ tokens/s, the first after [\d.]+ s, interrupted\]")
        assert int(re.search(r"\[(\d+) tokens", shown)[1]) < 450
        terminal.until("you: ")
        # readline, once it has shown its prompt, waits for input: a signal before that waits with it
        terminal.until(r"\(Ctrl-D or /exit ends\)\r\nyou: ", typing="\x03")
        terminal.type("\n/set max_tokens 3\n")
        terminal.until("max_tokens=3")
        terminal.type("And now\n")
        terminal.until(r"\[3 tokens, [\d.]+ tokens/s, the first after [\d.]+ s\]\r\nyou: ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
