"""The requests that a served teacher is asked with."""

import time
from typing import Any

from fdiv.teachers._signal import TeacherError

try:
    import httpx2
except ImportError as error:
    raise ImportError('Served() needs httpx2: pip install "fdiv[train]"') from error

FIRST_WAIT = 0.5  # seconds before the second try; twice as long before each further one
PROBED = 512  # tokens of the vocabulary that a probe text is made of
# Scripts, spaces and digits that tokenizers cut differently.
PROBE = "The 12,345 naïve cafés\n\n\tdef f(x): return x**2  # Ünïcode 你好, мир! 🙂 don't"


class Server:
    """A server at `url`, which ends in /v1."""

    def __init__(self, url: str, model: str, key: str | None, timeout: float, retries: int):
        self.url, self.model, self.retries = url.rstrip("/"), model, retries
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(headers=headers, timeout=timeout)

    # -- what is asked --------------------------------------------------------------------------------------

    def scores(self, prompt: list[int], k: int) -> list[Any]:
        """vLLM's `prompt_logprobs` of a sequence of ids: None, then {id: {"logprob": ...}} of each token."""
        # Written out, for a server's default is what its model's generation_config.json says.
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        choice = self._complete({"prompt": prompt, "prompt_logprobs": k} | plain)
        echoed, scores = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
        if echoed is None or scores is None:
            raise TeacherError(
                f"{self.url}/completions answers without "
                f"{'prompt_token_ids' if echoed is None else 'prompt_logprobs'}, so that nothing shows which "
                "tokens its numbers belong to; a current vLLM gives both"
            )
        if echoed != prompt or len(scores) != len(prompt):
            raise TeacherError(
                f"the server scored {len(scores)} places of {len(echoed)} tokens where {len(prompt)} were "
                "sent, or other tokens; it may truncate prompts, or add tokens of its own"
            )
        return scores

    def longest(self) -> int | None:
        """The most tokens of a sequence, if the server says; refused if it has no such model."""
        models = self._json("GET", f"{self.url}/models").get("data", [])
        named = {entry.get("id"): entry for entry in models}
        if self.model not in named:
            raise TeacherError(
                f"{self.url} serves {', '.join(sorted(map(str, named))) or 'no model'}, not {self.model!r}; "
                "write one of its names as model="
            )
        return named[self.model].get("max_model_len")

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise TeacherError unless the server cuts a probe text into the tokens that `tokenizer` does."""
        text = probe(tokenizer)
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = self._tokens(text)
        if theirs is None:
            raise TeacherError(
                f"{self.url} does not tell how it cuts a text into tokens (neither /tokenize nor "
                "prompt_token_ids); write Served(..., trust_vocabulary=True) if its tokenizer is known to be "
                "the student's"
            )
        if theirs != ours:
            at = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1), None)
            at = min(len(ours), len(theirs)) if at is None else at
            raise TeacherError(
                f"the server's tokenizer is not the student's: of a text of {len(text)} letters they give "
                f"{len(theirs)} and {len(ours)} tokens, that differ from the {at}-th on. Use a "
                "cross-tokenizer method (ULD, GOLD, DSKD), or serve a teacher with the student's tokenizer"
            )

    def _tokens(self, text: str) -> list[int] | None:
        root = self.url.removesuffix("/v1")
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        found = self._json("POST", f"{root}/tokenize", body, absent=(404, 405, 501))
        if found is not None:
            return found.get("tokens")
        return self._complete({"prompt": text, "add_special_tokens": False}).get("prompt_token_ids")

    def _complete(self, more: dict[str, Any]) -> dict[str, Any]:
        # vLLM always makes a token: max_tokens=0 is refused but for `echo`.
        body = {"model": self.model, "max_tokens": 1, "return_token_ids": True} | more
        try:
            return self._json("POST", f"{self.url}/completions", body)["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise TeacherError(f"{self.url}/completions gave an answer without `choices`") from None

    # -- how ------------------------------------------------------------------------------------------------

    def _json(self, verb: str, url: str, body: Any = None, absent: tuple[int, ...] = ()) -> Any:
        """The answer; None for a status in `absent`. What may pass is tried again."""
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                response = self.client.request(verb, url, json=body)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in absent:
                return None
            if response.status_code != 429 and response.status_code < 500:
                return self._answer(response, url)
            said = f"status {response.status_code}: {response.text[:200]}"
        raise TeacherError(
            f"{url} did not answer in {self.retries + 1} tries ({said}); is the server up, and does it take "
            "longer than `timeout`? What was cached stays, and the same command goes on"
        )

    def _answer(self, response: Any, url: str) -> Any:
        if response.status_code >= 400:
            said = response.text[:300]
            hint = "; start vLLM with a larger --max-logprobs" if "logprobs" in said else ""
            if response.status_code in (401, 403):
                hint = "; write Served(..., api_key_env='NAME') with the variable that holds the key"
            raise TeacherError(f"{url} refuses the request with status {response.status_code}: {said}{hint}")
        try:
            return response.json()
        except ValueError:
            raise TeacherError(
                f"{url} answered with something else than JSON: {response.text[:80]!r}"
            ) from None


def probe(tokenizer: Any) -> str:
    """A text that two tokenizers are unlikely to cut alike: tokens from all over the vocabulary."""
    size = len(tokenizer)
    some = range(0, size, max(1, size // PROBED))
    words = [tokenizer.decode([number]) for number in some]
    # A token of a part of a letter decodes to the sign of a broken one.
    return "\n".join([PROBE, " ".join(word for word in words if "�" not in word)])
