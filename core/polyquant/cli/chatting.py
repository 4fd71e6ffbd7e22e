"""`polyquant chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from msgspec import Meta
from msgspec.structs import asdict

from polyquant.cli import choosing
from polyquant.cli.arguments import Loading, MaxTokens, Model, Temperature, sampling
from polyquant.cli.loading import load_model
from polyquant.cli.output import say, say_piece
from polyquant.errors import ConfigError, PolyquantError, did_you_mean
from polyquant.types import UNREADABLE

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel

HELP = """/set temperature|top_p|seed|max_tokens VALUE   how to answer; without a value: what is set
/system TEXT   what the model is told before the conversation; without a text: nothing
/clear         forget the conversation
/save FILE     write the conversation, JSON
/load FILE     go on with one that was written
/help          these lines
/exit          end; so does Ctrl-D. Ctrl-C ends an answer."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of a conversation, as a file has it."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /save writes."""

    messages: list[Message]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to answer."""

    temperature: Annotated[float, Meta(ge=0)] = 0.7  # 0: greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0)] | None = None  # of each answer; None: another each time
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] = 512

    def parameters(self) -> dict[str, Any]:
        """Those of `LoadedModel.tokens`."""
        narrower = {} if self.top_p == 1 else {"top_p": self.top_p}
        return {"seed": self.seed, "max_new_tokens": self.max_tokens, **sampling(self.temperature, **narrower)}


def chat(
    model: Model,
    loading: Loading,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this much.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn, for each answer.", min=0)] = None,
    template: Annotated[
        str | None, typer.Option(help="Switches of the chat template, as in enable_thinking=false,level=2.")
    ] = None,
) -> None:
    """Talk with a model through its chat template. /help shows what can be set on the way; Ctrl-D ends it.

    Without a backend, a dense model is quantized as `polyquant recommend MODEL --needs on_the_fly` puts first.

    Example: polyquant chat builtin:smollm2 -b bitsandbytes:nf4
    """
    from polyquant.cli.options import switches_of

    settings, switches = Settings(temperature, top_p, seed, max_new_tokens), switches_of(template)
    loaded = load_model(model, choosing.with_backend(model, loading))
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise ConfigError(f"{model} has no chat template: polyquant run continues a text with it")
    Chat(loaded, settings, system, switches).talk()


class Chat:
    """One session."""

    def __init__(self, loaded: LoadedModel, settings: Settings, system: str, switches: dict[str, Any]) -> None:
        self._loaded, self._settings, self._switches = loaded, settings, switches
        self._system, self._said = system, list[Message]()

    def talk(self) -> None:
        """Until the input or the user ends it."""
        shown = sys.stdin.isatty()
        if shown:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  input() then edits lines and remembers them
            say("/help shows what can be set; Ctrl-D ends", error=True)
        while True:
            try:
                line = input("you: " if shown else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit ends)", error=True)
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line[1:].split(None, 1))
                elif line:
                    self._answer(line)
            except PolyquantError as error:
                say(f"polyquant: {error}", error=True)

    def _command(self, name: str = "", rest: str = "") -> None:
        commands: dict[str, Callable[[str], None]] = {
            "set": self._set, "system": self._tell, "clear": self._clear, "save": self._save, "load": self._load,
            "help": lambda _: say(HELP, error=True),
        }  # fmt: skip
        if name not in commands:
            raise ConfigError(f"/{name} is no command; /help shows them.{did_you_mean(name, commands)}")
        commands[name](rest.strip())

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        known = asdict(self._settings)
        if name and name not in known:
            raise ConfigError(f"{name!r} cannot be set; there are {', '.join(known)}.{did_you_mean(name, known)}")
        if value:
            wanted = None if value.strip() == "none" else value.strip()
            try:
                changed = msgspec.convert({**known, name: wanted}, Settings, strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{name} cannot be {value.strip()!r}: {str(error).partition(' - at')[0]}") from error
            self._settings = changed
        shown = {name: getattr(self._settings, name)} if name else asdict(self._settings)
        say(*(f"{each}={one}" for each, one in shown.items()), error=True)

    def _tell(self, rest: str) -> None:
        self._system = rest

    def _clear(self, _: str) -> None:
        self._said.clear()

    def _save(self, rest: str) -> None:
        path = _file(rest, "/save")
        if path.exists():
            _read(path)  # what is no conversation stays
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(Conversation(self._messages())), indent=2) + b"\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        say(f"wrote {path}: {len(self._said)} messages", error=True)

    def _load(self, rest: str) -> None:
        path = _file(rest, "/load")
        messages = _read(path).messages
        if messages and messages[0].role == "system":
            self._system, messages = messages[0].content, messages[1:]
        self._said = messages
        say(f"read {path}: {len(self._said)} messages", error=True)

    def _messages(self) -> list[Message]:
        return [*([Message("system", self._system)] if self._system else []), *self._said]

    def _answer(self, question: str) -> None:
        """A question that cannot be answered is forgotten; an answer that was ended stays as far as it came."""
        from polyquant.models.prompts import encode_prompt

        asked = Message("user", question)
        messages = [asdict(message) for message in [*self._messages(), asked]]
        text, count, began, first, decoder = "", 0, monotonic(), 0.0, self._loaded.decoder()
        with _until_interrupted() as interrupted:
            ids = encode_prompt(self._loaded.tokenizer, messages, self._switches)
            made = self._loaded.tokens(ids, **self._settings.parameters())
            try:
                for token in made:
                    count, first = count + 1, first or monotonic()
                    piece = decoder.feed(token.id)
                    say_piece(piece)
                    text += piece
                    if interrupted.is_set():
                        break
            finally:
                made.close()
        rest = decoder.end()
        say_piece(rest)
        say()
        self._said += [asked, Message("assistant", text + rest)]
        if sys.stderr.isatty():
            speed = (count - 1) / max(monotonic() - first, 1e-9) if count > 1 else 0.0
            say(f"[{count} tokens, {speed:.1f} tokens/s, the first after {first - began if first else 0:.1f} s"
                f"{', interrupted' if interrupted.is_set() else ''}]", error=True)  # fmt: skip


@contextmanager
def _until_interrupted() -> Iterator[Event]:
    """What the first Ctrl-C sets; the second is one as usual."""
    interrupted = Event()

    def note(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise ConfigError(f"name a file, as in {command} talk.json")
    return Path(rest).expanduser()


def _read(path: Path) -> Conversation:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Conversation)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.ValidationError, *UNREADABLE) as error:
        raise ConfigError(f"{path} is no conversation that /save wrote: {error}") from error
