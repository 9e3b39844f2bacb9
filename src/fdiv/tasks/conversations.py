"""From a record to the text of a prompt and of its response."""

from string import Formatter
from typing import Any, NamedTuple

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # of the keys from and value


class Exchange(NamedTuple):
    """The text of a prompt and of its response, with the end of text, both as a tokenizer reads them."""

    prompt: str
    response: str


def exchange(task: Any, tokenizer: Any, record: dict) -> Exchange | None:
    """As the task's template writes it; None where the record has no prompt or no response."""
    turns = conversation(task, record)
    if len(turns) < 2 or not all(turn["content"].strip() for turn in turns[-2:]):
        return None
    if task.template == "chat":
        return _chat(tokenizer, turns)
    if len(turns) > 2:
        raise ValueError(
            f"{len(turns)} turns need template='chat'; a text has room for a prompt and a response"
        )
    prompt = turns[-2]["content"] if task.template == "plain" else _filled(task.template, record)
    return Exchange(prompt, turns[-1]["content"] + end_of_text(tokenizer))


def richer(task: Any, tokenizer: Any, record: dict) -> str | None:
    """The prompt with what `task.hint` adds; None where the record has nothing to add."""
    turns = conversation(task, record)
    chat, told = task.template == "chat", exchange(task, tokenizer, record)
    asked = turns[-2]["content"] if chat or told is None else told.prompt
    fields = record | {"prompt": asked, "response": turns[-1]["content"]}
    names = [name for _, name, _, _ in Formatter().parse(task.hint) if name]
    if any(fields.get(name, "?") in (None, "") for name in names):
        return None
    hint = _filled(task.hint, fields)
    return _asked(tokenizer, [*turns[:-2], turns[-2] | {"content": hint}]) if chat else hint


def conversation(task: Any, record: dict) -> list[dict[str, str]]:
    """Turns of roles such as system, user and assistant; the last is the response, or there is none."""
    if task.messages:
        turns = _turns(_value(record, task.messages), None)
    else:
        turns = _turns(_value(record, task.prompt), "user")
        turns += _turns(_value(record, task.response), "assistant")
    if turns and turns[-1]["role"] != "assistant":
        return []
    if task.system and turns and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": task.system}, *turns]
    return turns


def end_of_text(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token: no response would end"
        )
    return tokenizer.eos_token


def _turns(value: Any, role: str | None) -> list[dict[str, str]]:
    """A text of a role, or a list of turns with the keys role and content, or from and value."""
    if value is None:
        return []
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"a conversation is a list of turns with role and content, got {value!r:.200}")
    return [_turn(turn) for turn in value]


def _turn(turn: dict) -> dict[str, str]:
    if "from" in turn and "value" in turn:
        turn = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    if not isinstance(turn.get("content"), str) or not isinstance(turn.get("role"), str):
        raise ValueError(f"a turn has a role and a content, which are text, got {turn!r:.200}")
    return {"role": turn["role"], "content": turn["content"]}


def _value(record: dict, column: str) -> Any:
    if column not in record:
        raise ValueError(
            f"a record has no field {column!r}; write Instructions(prompt=..., response=...) or messages=... "
            f"with some of {sorted(record)}"
        )
    return record[column]


def _filled(template: str, record: dict) -> str:
    try:
        return template.format_map(record)
    except KeyError as error:
        raise ValueError(f"{template!r} asks for {error}; a record has {sorted(record)}") from None


def _chat(tokenizer: Any, turns: list[dict]) -> Exchange:
    begin, whole = _asked(tokenizer, turns[:-1]), tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(begin):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} begins a conversation otherwise than a prompt "
            "that is to be answered; give a template as text, or template='plain'"
        )
    return Exchange(begin, _ended(tokenizer, whole[len(begin) :], turns[-1]["content"].strip()))


def _asked(tokenizer: Any, turns: list[dict]) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; write template='plain', or a "
            "text such as template='Question: {prompt} Answer: '"
        )
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _ended(tokenizer: Any, text: str, content: str) -> str:
    """Up to the mark with which the template ends a turn, which is what a model stops at."""
    added = tokenizer.added_tokens_decoder.values()
    marks = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
    place = text.rfind(content)
    after = place + len(content) if place >= 0 else max(text.rfind(mark) for mark in marks)
    found = [(text.find(mark, after), mark) for mark in marks if text.find(mark, max(after, 0)) >= 0]
    if not found:
        return text + end_of_text(tokenizer)
    first, mark = min(found, key=lambda pair: (pair[0], -len(pair[1])))
    return text[: first + len(mark)]
