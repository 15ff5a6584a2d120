"""An interactive chat whose knobs can be moved between turns."""

from __future__ import annotations

from refusal_tokens.errors import InputError
from refusal_tokens.policy import Policy
from refusal_tokens.steering import Reply, SteeredModel

HELP = """\
/bias CATEGORY NATS   move a knob, for example /bias safety 2; positive refuses more readily
/show                 the knobs, and what the last reply was decided on
/retry                the last message again, under the knobs as they are now
/reset                forget the conversation
/quit                 leave (Ctrl-D too)"""


class Chat:
    """A conversation and its knobs.

    Attributes:
        policy: as the last ``/bias`` left it.
        messages: the conversation so far.
        last: the last reply.
    """

    def __init__(
        self, model: SteeredModel, policy: Policy, system: str | None, max_new_tokens: int
    ) -> None:
        self._model = model
        self._start = [{"role": "system", "content": system}] if system else []
        self._max_new_tokens = max_new_tokens
        self.policy = policy
        self.messages = list(self._start)
        self.last: Reply | None = None

    def command(self, line: str) -> str | None:
        """Run one ``/`` command; return what to print, or None to leave.

        Raises:
            InputError: for an unknown command or knob.
        """
        name, *arguments = line.split()
        if name in ("/quit", "/exit"):
            return None
        if name == "/help":
            return HELP
        if name == "/show":
            return self._show()
        if name == "/reset":
            self.messages = list(self._start)
            return "conversation forgotten"
        if name == "/bias":
            return self._bias(arguments)
        raise InputError(f"unknown command {name}; allowed:\n{HELP}")

    def _bias(self, arguments: list[str]) -> str:
        try:
            knob, value = arguments[0], float(arguments[1])
        except (IndexError, ValueError):
            raise InputError("allowed: /bias CATEGORY NATS, such as /bias safety 2") from None
        moved = self.policy.with_bias({knob: value})
        moved.knobs(self._model.checkpoint.info.taxonomy)
        self.policy = moved
        return self._knobs()

    def _knobs(self) -> str:
        taxonomy = self._model.checkpoint.info.taxonomy
        values = self.policy.knobs(taxonomy).bias
        pairs = zip(taxonomy.knobs, values, strict=True)
        return f"rule {self.policy.rule}; " + ", ".join(f"{k} {v:+g}" for k, v in pairs)

    def _show(self) -> str:
        if self.last is None:
            return self._knobs()
        shares = [f"  {token:26}{p:.4f}" for token, p in self.last.probabilities.items()]
        decided = self.last.category or self.last.decision
        return "\n".join([self._knobs(), f"last reply: {decided}, from", *shares])

    def say(self, text: str) -> None:
        """Send a message, print the reply as it comes, and remember both."""
        self.messages.append({"role": "user", "content": text})
        stream = self._model.stream(
            self.messages, self.policy, max_new_tokens=self._max_new_tokens, do_sample=False
        )
        try:
            while True:
                print(next(stream), end="", flush=True)
        except StopIteration as end:
            self.last = end.value
        except (KeyboardInterrupt, InputError):
            self.messages.pop()
            raise
        assert self.last is not None
        print(f"\n[{self.last.category or self.last.decision}]")
        self.messages.append({"role": "assistant", "content": self.last.text or "..."})

    def retry(self) -> None:
        """Take back the last exchange and send its message again.

        Raises:
            InputError: if nothing was said yet.
        """
        if len(self.messages) - len(self._start) < 2:
            raise InputError("nothing to retry")
        self.messages.pop()
        self.say(self.messages.pop()["content"])


def chat_loop(
    model: SteeredModel, policy: Policy, *, system: str | None, max_new_tokens: int
) -> None:
    """Read messages and commands from standard input until it ends or ``/quit``."""
    chat = Chat(model, policy, system, max_new_tokens)
    print("Type a message, or /help. Knobs: " + ", ".join(model.checkpoint.info.taxonomy.knobs))
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if line == "/retry":
                chat.retry()
            elif line.startswith("/"):
                answer = chat.command(line)
                if answer is None:
                    return
                print(answer)
            elif line:
                chat.say(line)
        except InputError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            # Ctrl-C stops a reply, not the chat.
            print("\n[stopped]")
