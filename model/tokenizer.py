"""Text to token ids and back, and chats to text: what a checkpoint directory says about both.

`Tokenizer` reads `tokenizer.json`; `ChatTemplate` renders the checkpoint's own Jinja template as transformers does.
Both are foreign programs, and work in a process of their own (`foundation/foreign_text.py`), but for those that ship.
Free of JAX.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from foundation.child import ChildFailure, one_line
from foundation.foreign_text import MOST_BYTES, ForeignTemplate, ForeignTokenizer, is_tame
from foundation.limits import within
from foundation.paths import Outside, inside
from foundation.reading import Unreadable, parse_json, read_text
from foundation.streaming import TextStream, spells_bytes
from model.errors import TokenizerError
from model.hf_config import GENERATION_FILE

# GLM has no token that ends an assistant turn: the turn ends where the next speaker's would begin.
CHAT_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_characters() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself where it can be printed (GPT-2's
    `bytes_to_unicode`)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_characters()
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE_TEMPLATES = "additional_chat_templates"
_MOST_TEMPLATES = 32  # of a checkpoint; those that there are have two or three
# Names that a message's thoughts are passed under: the one that most templates read, that of gpt-oss's, another.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


@contextmanager
def _named(where: str, doing: str = "") -> Iterator[None]:
    """What a foreign program did not do, as a failure of its file."""
    try:
        yield
    except ChildFailure as error:
        raise TokenizerError(f"{where}: {doing.format(error) if doing else error}") from None


def _read_text(folder: Path, name: str) -> str | None:
    """The text of a file in a folder, None where there is none."""
    try:
        return read_text(inside(folder, name), MOST_BYTES)
    except (Outside, Unreadable) as error:
        if error.reason == "absent":
            return None
        raise TokenizerError(f"{folder / name}: cannot be read ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    text = _read_text(path.parent, path.name)
    if text is None:
        return {}
    try:
        raw = parse_json(text)
    except Unreadable as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as the two files that may name them say."""
    raw = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    named = {key: value for key, value in raw.items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in contents.items() if isinstance(value, str)}


class Tokenizer:
    """A tokenizer; `stop_token_ids` (sorted) are the ids that end a generated turn.

    One that this process has made does its work here; `load` makes one that is foreign.
    """

    def __init__(self, inner: tokenizers.Tokenizer, stop_token_ids: tuple[int, ...] = (), where: str = "tokenizer"):
        self._inner, self.stop_token_ids, self.where = inner, stop_token_ids, where
        self.foreign: ForeignTokenizer | None = None
        self._decodes_here = True

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint directory.

        Raises `TokenizerError` where tokenizer.json is missing or corrupt, cannot bear a short text, or a file that may
        name stop tokens is corrupt.
        """
        file = Path(path) / "tokenizer.json"
        text = _read_text(file.parent, file.name)
        if text is None:
            raise TokenizerError(f"{file}: no such file (without it, give token ids instead of text)")
        named = _special_tokens(Path(path))
        with _named(str(file), "not a tokenizer ({})"):
            foreign = ForeignTokenizer(text, [named[key] for key in _NAMED if key in named])
        inner = tokenizers.Tokenizer.from_str(text)  # as in the other process, which it did not end
        # transformers adds special tokens that only the other files name. (It leaves what stands around a plain prompt
        # to tokenizer.json's post-processor: `add_bos_token` of the other files is not read.)
        inner.add_special_tokens(foreign.special)
        made = cls(inner, _stop_token_ids(Path(path), inner), str(file))
        made.foreign, made._decodes_here = foreign, is_tame(inner.decoder)
        return made

    def to_json(self) -> str:
        """A tokenizer.json that says all that the directory's files say of the tokenizer."""
        if self.foreign is None:
            return self._inner.to_str()
        with _named(self.where, "cannot be written ({})"):
            return self.foreign.to_json()

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; a model's `vocab_size` may be larger, padded."""
        return self._inner.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids; a special token spelt out in `text` becomes its one id.

        `add_special_tokens` adds what the tokenizer puts around a plain prompt, one that no chat template rendered.
        Raises `TokenizerError` for a lone surrogate, and where the tokenizer fails or takes too long.
        """
        return self.encode_each([text], add_special_tokens)[0]

    def encode_each(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of several texts, which asks the other process once."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode ({one_line(error)})") from None
        if self.foreign is None:
            return [self._inner.encode(text, add_special_tokens=add_special_tokens).ids for text in texts]
        with _named(self.where, "cannot encode the text ({})"):
            return self.foreign.encode(texts, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        Raises `TokenizerError` for an id that is negative or needs more than 32 bits.
        """
        for token in ids:
            if not 0 <= token < 2**32:
                raise TokenizerError(f"no token has the id {token}")
        if self.foreign is None or self._decodes_here:
            return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        with _named(self.where, "cannot decode ({})"):
            return self.foreign.decode(ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False) -> TextStream:
        """An incremental `decode`."""
        return TextStream(functools.partial(self.decode, skip_special_tokens=skip_special_tokens), self._inner)

    def find(self, token: str) -> int | None:
        """The id of one token, spelt as in tokenizer.json; None where there is none."""
        return self._inner.token_to_id(token)

    def apart(self) -> dict[int, bool]:
        """Tokens that stand beside the vocabulary of plain text, such as `<|user|>`: id -> whether it is special, that
        is, no part of what a reader sees."""
        return {token: added.special for token, added in self._inner.get_added_tokens_decoder().items()}

    def pieces(self) -> list[bytes]:
        """What each id stands for in a text, as bytes: a token may hold a part of a character. b"" for an id that no
        token has."""
        bytewise = spells_bytes(self._inner)
        known, apart = self._inner.get_vocab(with_added_tokens=True), self.apart()
        found = [b""] * (max(known.values(), default=-1) + 1)
        for token, number in known.items():
            if number in apart:
                found[number] = token.encode()
            elif bytewise and all(character in _BYTES for character in token):
                found[number] = bytes(map(_BYTES.__getitem__, token))
            elif _BYTE_TOKEN.fullmatch(token):
                found[number] = bytes([int(token[3:5], 16)])
            else:
                found[number] = token.replace("\u2581", " ").encode()  # of SentencePiece
        return found

    def token_id(self, token: str) -> int:
        """The id of one token, spelt as in tokenizer.json; raises `TokenizerError` where there is none."""
        found = self.find(token)
        if found is None:
            raise TokenizerError(f"{self.where}: has no token {token!r}")
        return found


def _stop_token_ids(folder: Path, inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the configs name, the tokenizer's `eos_token`, and where GLM's next speaker would begin."""
    found: set[int] = set()
    for name in ("config.json", GENERATION_FILE):
        eos = _read_json(folder / name).get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise TokenizerError(f"{folder / name}: `eos_token_id` must be token ids, not {eos!r}")
        found.update(ids)
    names = {*CHAT_STOPS, _special_tokens(folder).get("eos_token", CHAT_STOPS[0])}
    found.update(token for name in names if (token := inner.token_to_id(name)) is not None)
    return tuple(sorted(found))


class ChatTemplate:
    """A checkpoint's chat template, or several of them by name: "default", and others that are asked for.

    `where` names it in errors; `variables` are always passed to it. Raises `TokenizerError` for a default template
    with a syntax error.
    """

    def __init__(
        self, source: str | Mapping[str, str], where: str = "chat template", variables: Mapping[str, Any] | None = None
    ):
        self.where, self.variables = where, dict(variables or {})
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._foreign: dict[str, ForeignTemplate] = {}
        if "default" in self._sources:
            self._chosen("default", None)

    @classmethod
    def load(cls, path: str | Path) -> ChatTemplate:
        """`find`, which raises `TokenizerError` where there is none."""
        found = cls.find(path)
        if found is None:
            raise TokenizerError(f"{path}: has no chat template (chat_template.jinja); pass a plain prompt instead")
        return found

    @classmethod
    def find(cls, path: str | Path) -> ChatTemplate | None:
        """The templates of a checkpoint directory: chat_template.jinja and additional_chat_templates/NAME.jinja, else
        `chat_template` in tokenizer_config.json, a text or a list of names and texts, else None."""
        folder = Path(path)
        file, config, more = folder / "chat_template.jinja", folder / "tokenizer_config.json", folder / _MORE_TEMPLATES
        names = sorted(each.name for each in more.glob("*.jinja"))
        within(f"{more}: chat templates:", len(names), _MOST_TEMPLATES, TokenizerError)
        texts = {
            "default": _read_text(folder, file.name),
            **{name[:-6]: _read_text(folder, f"{more.name}/{name}") for name in names},
        }
        found = {name: text for name, text in texts.items() if text is not None}
        if not found:
            file, raw = config, _read_json(config).get("chat_template")
            entries = raw if isinstance(raw, list) else [{"name": "default", "template": raw}]
            texts = {each.get("name"): each.get("template") for each in entries if isinstance(each, dict)}
            found = {name: text for name, text in texts.items() if isinstance(name, str) and isinstance(text, str)}
        within(f"{file}: chat templates:", len(found), _MOST_TEMPLATES, TokenizerError)
        return cls(found, str(file), _special_tokens(folder)) if found else None

    def to_config(self) -> dict[str, Any]:
        """What a tokenizer_config.json says, so that `find` makes the same of it."""
        named = [{"name": name, "template": text} for name, text in self._sources.items()]
        return {**self.variables, "chat_template": named}

    def _chosen(self, name: str | None, tools: object) -> ForeignTemplate:
        """The template of that name; without one, as transformers 5.23 does (`get_chat_template`): for tools the one
        that is called so, else the default."""
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            names = ", ".join(sorted(map(repr, self._sources)))
            raise TokenizerError(f"{self.where}: has no chat template called {name!r}; there is {names}")
        if name not in self._foreign:
            with _named(self.where if name == "default" else f"{self.where}: {name}"):
                self._foreign[name] = ForeignTemplate(self._sources[name])
        return self._foreign[name]

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        /,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat, special tokens spelt out: `Tokenizer.encode` takes it as it is.

        chat_template: the name of one of several; by default "tool_use" where there are tools, and "default".
        messages: `{"role": .., "content": ..}`, JSON data; a key whose value is None is left out, and thoughts may be
        `reasoning_content`, `thinking` or `reasoning`. variables: what the template offers, for GLM
        `enable_thinking`, `clear_thinking`, `reasoning_effort`; None leaves a variable undefined.
        Raises `TokenizerError` where the template fails, refuses the chat, takes too much time or memory, or does what
        the sandbox forbids.
        """
        return self.render_each([messages], tools, add_generation_prompt, chat_template, **variables)[0]

    def render_each(
        self,
        chats: Iterable[Iterable[Mapping[str, Any]]],
        /,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[str]:
        """`render` of several chats, which asks the other process once."""
        template, contexts = self._contexts(chats, tools, add_generation_prompt, chat_template, variables)
        with self._of_data(), _named(self.where):
            return template.render(contexts)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Iterable[Mapping[str, Any]],
        /,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The token ids of `render`, as `tokenizer.encode` has them. Where both work in the other process, as a
        checkpoint's do, that is asked once."""
        foreign = tokenizer.foreign
        if foreign is None:
            return tokenizer.encode(self.render(messages, tools, add_generation_prompt, chat_template, **variables))
        template, (context,) = self._contexts([messages], tools, add_generation_prompt, chat_template, variables)
        with self._of_data():
            try:
                found = template.to_ids(context, foreign)
            except ChildFailure as error:
                either = "" if error.why == "refused" else f"it or {Path(tokenizer.where).name} "
                raise TokenizerError(f"{self.where}: {either}{error}") from None
        return tokenizer.encode(found) if isinstance(found, str) else found

    def _contexts(
        self,
        chats: Iterable[Iterable[Mapping[str, Any]]],
        tools: Iterable[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        chat_template: str | None,
        variables: Mapping[str, Any],
    ) -> tuple[ForeignTemplate, list[dict[str, Any]]]:
        """Which template, and what it is given for each chat."""
        template = self._chosen(chat_template, tools)
        shared = {
            **self.variables,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else list(tools),
            **{key: value for key, value in variables.items() if value is not None},
        }
        contexts = []
        for messages in chats:
            chat = [self._message(number, message) for number, message in enumerate(messages, start=1)]
            if not chat:
                raise TokenizerError("the chat has no messages; give at least one")
            contexts.append({**shared, "messages": chat})
        return template, contexts

    @staticmethod
    @contextmanager
    def _of_data() -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, RecursionError) as error:
            raise TokenizerError(f"the chat must be JSON data ({one_line(error)})") from None

    @staticmethod
    def _message(number: int, message: Any) -> dict[str, Any]:
        """A message as templates get it, which transformers 5.23 passes on so (`apply_chat_template`)."""
        if not isinstance(message, Mapping):
            raise TokenizerError(f"message {number} of the chat is a {type(message).__name__}, not an object")
        held = {key: value for key, value in message.items() if value is not None}
        for key in _THOUGHTS:
            if key in held:
                return {"thinking": held[key], **held, _THOUGHTS[0]: held[key]}
        return held
