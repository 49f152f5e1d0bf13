"""What a reward is, and what becomes of the values that it returns: rewards.py has the rewards themselves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from support.errors import UserError
from support.samples import Sample
from support.text import Reply
from support.timeouts import call_own
from support.words import WordTokenizer

LENGTH_PENALTY = "length_price"  # the name of LengthController's penalty among the parts of the reward


@dataclass
class Scores:
    """What a reward returns for N replies. Each array is (N,), but for `by_token`."""

    total: np.ndarray
    """The scores that PPO maximises: finite numbers."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """Weighted parts, logged as means reward_NAME and share_NAME. They must add up to the total (not checked)."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Other numbers, logged as means NAME. NaN for a reply does not count. A name reward_NAME makes it a part."""
    by_token: np.ndarray | None = None
    """(N, T): how much of the total was earned at each token. The rest is earned at the reply's last token."""
    skipped: np.ndarray | None = None
    """(N,) bool: replies for which the reward returned None. They score 0, and do not count in its mean."""

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Metrics and parts under the names that they are logged with."""
        return self.metrics | {f"reward_{name}": values for name, values in self.parts.items()}

    def row(self, i: int) -> Scores:
        """Return the scores of one reply."""

        def one(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: values[i : i + 1] for name, values in columns.items()}

        by_token, skipped = (None if x is None else x[i : i + 1] for x in (self.by_token, self.skipped))
        return Scores(self.total[i : i + 1], one(self.parts), one(self.metrics), by_token, skipped)

    def __iter__(self) -> Iterator[Any]:
        """Unpack as a pair of total and statistics, the form that a reward of your own may return."""
        return iter((self.total, self.statistics))


class Reward:
    """A score for each reply. Subclass it, define `__call__`, and name it in the configuration.

    The constructor gets `reward_args` of the configuration as keyword arguments. Before the first call a run sets
    `device`, `eou_marker` (the text between the utterances of a prompt; "" with a chat template) and `word_tokenizer`
    (support/words.py).
    """

    device: torch.device | str = "cpu"
    eou_marker: str = "<EOU>"
    word_tokenizer: WordTokenizer = "unicode"
    unbounded: bool = False
    """Whether scores have no natural scale. They are then given in deviations from the mean of the supervised model's
    replies, which is measured before training."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str], acts: Sequence[int]
    ) -> Scores | tuple[Sequence[Any], dict[str, Sequence[float]]] | Sequence[Any]:
        """Return `Scores` of N replies; or N values; or a pair of N values and statistics by name.

        A value is a number; None, which counts as 0; a number for each token of the reply (`response.token_ids`); or
        spans of characters, (start, end, number) each, whose numbers are earned at the tokens that complete them.
        Values may be a list, an array or a tensor. In a pair, statistics called reward_NAME are parts of the reward,
        and the others are metrics.

        `prompts` are the contexts as the policy sees them; `prompt.messages` is the conversation of one, and
        `prompt.columns` has the other columns of its row. `references` are the human replies ("" without one), `acts`
        their dialogue acts (1 inform, 2 question, 3 directive, 4 commissive; 0 without a label).
        """
        raise NotImplementedError

    def setup(self, device: torch.device | str, eou_marker: str) -> None:
        """Load models here and put them on `device`. A run calls this once, before the first batch."""
        self.device, self.eou_marker = device, eou_marker


class FunctionReward(Reward):
    """A plain function of (prompts, responses, references, acts) that returns scores, or scores and statistics."""

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]):
        self.function, self.args = function, args

    def __call__(self, prompts, responses, references, acts):
        return self.function(prompts, responses, references, acts, **self.args)


class CompletionFunction(Reward):
    """A function in the form of TRL's GRPOTrainer: f(prompts, completions, **columns), which may be async.

    Where a row of the data has its prompt as text, prompts and completions are texts; otherwise they are lists of
    messages. The columns of the data come by name. The function also gets what else it has parameters for:
    completion_ids, trainer_state (with global_step, the number of calls so far), log_metric and log_extra.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]):
        self.function, self.args, self.calls = function, dict(args), 0
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.required = {p.name for p in parameters if p.name in self.named and p.default is p.empty}

    def __call__(self, prompts, responses, references, acts):
        metrics: dict[str, float] = {}
        columns = self._columns(prompts)
        given = columns | {
            "prompts": [as_data_has_it(prompt) for prompt in prompts],
            "completions": [completion_of(p, r) for p, r in zip(prompts, responses)],
            "completion_ids": [list(getattr(response, "token_ids", ())) for response in responses],
            "trainer_state": SimpleNamespace(global_step=self.calls),
            "log_metric": functools.partial(_log_metric, metrics),
            "log_extra": lambda column, values: None,  # a column of TRL's table of completions
        }
        given = {name: value for name, value in given.items() if self.takes_all or name in self.named} | self.args
        if missing := sorted(self.required - given.keys()):
            known = ", ".join(sorted(columns)) or "none"
            raise UserError(
                f"the reward function has the parameter '{missing[0]}', and the data has no such column (columns: "
                f"{known}); give it in reward_args, as {missing[0]}=VALUE, or give the parameter a default."
            )
        self.calls += 1
        values = self.function(**given)
        values = _awaited(values) if inspect.isawaitable(values) else values
        return (values, metrics) if metrics else values

    def _columns(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of the prompts' rows, N values each; None where a row lacks one."""
        rows = [getattr(prompt, "columns", {}) for prompt in prompts]
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        return {name: [row.get(name) for row in rows] for name in names}


class CompletionObject(CompletionFunction):
    """An object that is called as TRL's reward functions are, and may have what a Reward has: setup(), unbounded."""

    def __init__(self, made: Callable[..., Any], args: Mapping[str, Any]):
        super().__init__(made, args)
        self.unbounded = bool(getattr(made, "unbounded", False))

    @property
    def models(self) -> Sequence[Any]:
        """Its networks, which a run places."""
        return getattr(self.function, "models", ())

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        if callable(setup := getattr(self.function, "setup", None)):
            setup(device, eou_marker)


def _log_metric(metrics: dict[str, float], name: str, value: float) -> None:
    """Keep a metric that a function logs. One called reward_NAME is no part of the reward here."""
    metrics[f"logged_{name}" if name.startswith("reward_") else name] = value


def _awaited(values: Any) -> Any:
    """Return what a coroutine returns, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaitable(values))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _awaitable(values)).result()


async def _awaitable(values: Any) -> Any:
    return await values


def is_completion_function(target: Any) -> bool:
    """Whether a callable has the parameters of TRL's reward functions."""
    if not callable(target) or inspect.isclass(target):
        return False
    try:
        return not {"completions", "completion_ids"}.isdisjoint(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def as_data_has_it(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as text if the row of the data has it as text, or if no messages are known; else as messages."""
    messages = getattr(prompt, "messages", ())
    if isinstance(text := getattr(prompt, "columns", {}).get("prompt"), str):
        return text
    return [dict(message) for message in messages] if messages else str(prompt)


def completion_of(prompt: str, response: str) -> str | list[dict[str, str]]:
    """A reply as text or as a list of one message, as its prompt is given."""
    return str(response) if isinstance(as_data_has_it(prompt), str) else [{"role": "assistant", "content": response}]


# ---------------------------------------------------------------------------------------------------------------------
# Values that a reward returned


def score_episodes(reward: Callable[..., Any], prompts, responses, references, acts, timeout: float = 0.0) -> Scores:
    """Call a reward, and check what it returns (see `checked_scores`).

    UserError also for what the reward raises, and for a call that takes longer than `timeout` seconds, if that is set.
    """
    return checked_scores(
        call_own("the reward", "reward_timeout", timeout, reward, prompts, responses, references, acts), responses
    )


def checked_scores(result: Any, responses: Sequence[str]) -> Scores:
    """Return as `Scores` what a reward returned. UserError unless each reply has a value (see Reward)."""
    scores, statistics, by_token, skipped = result, {}, None, None
    if isinstance(result, Scores):
        scores, statistics, by_token, skipped = result.total, result.statistics, result.by_token, result.skipped
    elif isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping):
        scores, statistics = result
    if scores is None or isinstance(scores, (str, Mapping)):
        raise UserError(
            f"the reward returned {'nothing' if result is None else f'a {type(result).__name__}'}; expected scores "
            "(one each is due, in a list or an array), or scores and statistics, (list, dict)."
        )
    if isinstance(scores, (list, tuple)) and any(value is None for value in scores):
        skipped = np.array([value is None for value in scores])
        scores = [0.0 if value is None else value for value in scores]
    try:
        if isinstance(scores, (list, tuple)) and any(map(_is_sequence, scores)):
            scores, by_token = split_values(scores, responses)
        scores = _numbers(scores)
        statistics = {name: _numbers(values) for name, values in statistics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward gave something that is no number: {error}.") from error
    if scores.shape != (len(responses),):
        raise UserError(
            f"the reward gave scores of shape {scores.shape} for {len(responses)} replies; one each is due."
        )
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(f"the reward gave {scores[at]} for the reply {responses[at]!r:.80}; expected a finite number.")
    for name, values in statistics.items():
        if values.shape not in ((), scores.shape):
            raise UserError(f"the reward's statistic '{name}' has shape {values.shape} for {len(responses)} replies.")
        if name == f"reward_{LENGTH_PENALTY}":
            raise UserError(f"the reward calls a statistic '{name}', which is length_rate's own metric; rename it.")
    statistics = {name: np.broadcast_to(values, scores.shape) for name, values in statistics.items()}
    parts = {n.removeprefix("reward_"): v for n, v in statistics.items() if n.startswith("reward_")}
    metrics = {n: v for n, v in statistics.items() if not n.startswith("reward_")}
    return Scores(scores, parts, metrics, by_token, skipped)


def split_values(values: Sequence[Any], responses: Sequence[str]) -> tuple[list[float], np.ndarray]:
    """Return one number for each reply (N,), and the numbers of tokens (N, T), of values of which some have such.

    UserError for numbers that do not fit a reply's tokens, and for spans outside it.
    """
    if len(values) != len(responses):
        raise UserError(f"the reward gave {len(values)} values for {len(responses)} replies; one each is due.")
    pairs = list(zip(values, responses))
    rows = [token_values(value, response) if _is_sequence(value) else np.zeros(0) for value, response in pairs]
    totals = [float(row.sum()) if _is_sequence(value) else value for value, row in zip(values, rows)]
    by_token = np.zeros((len(rows), max(1, *map(len, rows))))
    for i, row in enumerate(rows):
        by_token[i, : len(row)] = row
    return totals, by_token


def token_values(value: Any, response: str) -> np.ndarray:
    """Return (T,): what is earned at each token of a reply, of numbers for its tokens or for spans of its characters.

    A reply that is known as text alone, such as a human one, earns all of it at once: T is 1.
    """
    items = list(value)
    tokens = len(getattr(response, "token_ids", ()))
    if not any(map(_is_sequence, items)):
        numbers = _numbers(items)
        if tokens and len(numbers) != tokens:
            raise UserError(
                f"the reward gave {len(numbers)} numbers for the {tokens} tokens of the reply {response!r:.60}; one "
                "for each of response.token_ids is due, or one number for the reply."
            )
        return numbers if tokens else numbers.sum(keepdims=True)
    found = np.zeros(max(1, tokens))
    for span in items:
        if not _is_sequence(span) or len(span) != 3:
            raise UserError(f"the reward gave {span!r:.60} as a span; expected (start, end, number).")
        (start, end), number = map(int, span[:2]), float(span[2])
        if not 0 <= start < end <= len(response):
            raise UserError(
                f"the reward gave the span ({start}, {end}) for a reply of {len(response)} characters "
                f"({response!r:.40}); expected 0 <= start < end <= {len(response)}."
            )
        found[response.token_at(end) if tokens else 0] += number
    return found


def _is_sequence(value: Any) -> bool:
    """Whether a value is several numbers; an array of one is a number."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim > 0 and len(value) != 1
    return isinstance(value, (list, tuple))


def _numbers(values: Any) -> np.ndarray:
    """Return a number, or numbers in a list, an array or a tensor on any device, as an array."""
    if isinstance(values, (list, tuple)):
        values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def check_reward(score: Callable, sample: Sample, group: int) -> None:
    """Try the reward on a human reply and an empty one, so that its faults appear before the first rollout.

    The two alternate, max(2, group) replies to one prompt in all. `score` is a checked call of the
    reward (score_episodes). Random numbers that the reward draws do not change those of the run.
    """
    replies = [sample.reply.strip(), ""] * (-(-max(2, group) // 2))
    replies = [Reply(reply) for reply in replies[: max(2, group)]]

    def repeat(value):
        return [value] * len(replies)

    try:
        with keep_random_states():
            score(repeat(sample.prompt), replies, repeat(sample.reply.strip()), repeat(sample.act))
    except UserError as error:
        raise UserError(f"{error} (It was tried before training, on a human reply and an empty one.)") from error


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
