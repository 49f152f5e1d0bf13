"""The environments: they return prompts and score replies (Gymnasium's vector API).

DialogueVectorEnv has the replies of recorded dialogues, one to an episode:

    dialogues = load_dialogues("builtin", "train")            # support/data.py: hub names, folders and files as well
    codec = load_codec("gpt2")                                # support/models.py: tokenizer and chat template
    env = DialogueVectorEnv(make_samples(dialogues, codec), codec, env_num=2, reward=my_reward)
    observations, infos = env.reset(seed=0)
    observations, rewards, terminations, truncations, infos = env.step(["Sure, why not.", "At six."])

Episode ends are those of the OpenRL and RL4LMs DailyDialog task. In ConversationVectorEnv an episode is a conversation
of several turns with a partner who answers (support/partners.py):

    task = ConversationTask(ScriptedPartners(Customer, slots=2), max_turns=8)
    env = ConversationVectorEnv(task, codec, env_num=2)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from support.conversations import Conversation, ConversationTask, prompt_of, score_replies, with_system_prompt
from support.errors import UserError
from support.samples import Sample, Samples, pick
from support.scoring import Scores, checked_scores
from support.text import DialogueCodec, Message, Prompt, Reply, drop_torn_characters


class DialogueVectorEnv(VectorEnv):
    """`env_num` dialogues at a time; an action is a whole response and ends the episode.

    Observations: `{"input_ids": (n, max_prompt_tokens), "attention_mask": the same}`, int64, padded on the left.
    Actions: response tokens (n, max_new_tokens), int64, padded on the right with -1; a list of n strings works too.
    Rewards: what `reward(prompts, responses, references, acts)` returns (see rewards.py), 0 without one.
    Every step terminates every episode and returns the next prompt (`AutoresetMode.SAME_STEP`); the finished episode is
    in `infos["final_obs"]` and `infos["final_info"]`.

    The order of the dialogues depends on the seed alone. Each pass over the data is one permutation, distributed over
    all `env_num` slots, or over groups of `samples_per_prompt` neighbours that answer the same prompt. Each process has
    `env_num / num_processes` of the slots.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        samples: Samples | Sequence[Sample],
        codec: DialogueCodec,
        env_num: int,
        reward: Callable[..., Any] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        samples_per_prompt: int = 1,
    ):
        if not samples:
            least = 2 if codec.format.template else codec.format.context_utterances + 1
            raise UserError(f"there is no sample: no dialogue has {least} utterances or more, with a reply to learn.")
        if env_num < 1 or env_num % num_processes:
            raise UserError(f"env_num is {env_num}; expected a positive multiple of the {num_processes} process(es).")
        self.samples_per_prompt = samples_per_prompt
        self.samples, self.codec, self.reward = samples, codec, reward
        self.env_num, self.num_envs = env_num, env_num // num_processes
        self.slots = slice(process_index * self.num_envs, (process_index + 1) * self.num_envs)  # of all env_num
        _set_spaces(self, codec)
        self.scores: Scores | None = None  # of the last step
        self.seed, self.rounds, self._current = 0, 0, None  # rounds: calls of _next_dialogues

    @property
    def finished_rounds(self) -> int:
        """The dialogues that each slot has finished."""
        return self.rounds - 1

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Observations and infos of the first dialogues. A seed restarts the order; without one it continues.

        With a seed, `options={"round": n}` starts at the dialogues that come after n steps.
        """
        if seed is not None:
            super().reset(seed=seed)
            self.seed, self.rounds = seed, (options or {}).get("round", 0)
        return self._next_dialogues()

    def step(self, actions: np.ndarray | Sequence[str]):
        if self._current is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if len(actions) != self.num_envs:
            raise UserError(f"step() was given {len(actions)} responses for {self.num_envs} dialogues.")
        responses = [_text(a, self.codec) if isinstance(a, str) else self.codec.decode_response(a) for a in actions]
        finished, final_obs = self._current, self._observations
        self.scores = Scores(np.zeros(self.num_envs))
        if self.reward is not None:
            columns = [s.prompt for s in finished], responses, [s.reply.strip() for s in finished]
            self.scores = checked_scores(self.reward(*columns, [s.act for s in finished]), responses)
        final_info = _infos(finished) | _columns({"response": responses})
        for name in self.scores.statistics.keys() & final_info.keys():
            raise UserError(f"the reward calls a statistic '{name}', which the environment uses itself; rename it.")
        final_info |= _columns(self.scores.statistics)
        observations, infos = self._next_dialogues()
        everyone = np.ones(self.num_envs, dtype=bool)
        infos |= {"final_obs": final_obs, "_final_obs": everyone, "final_info": final_info, "_final_info": everyone}
        return observations, np.asarray(self.scores.total, np.float64), everyone.copy(), ~everyone, infos

    def _next_dialogues(self):
        first = self.rounds * self.env_num + self.slots.start
        self._current = self._take([(first + slot) // self.samples_per_prompt for slot in range(self.num_envs)])
        self.rounds += 1
        ids, mask = self.codec.encode_prompts([s.prompt_ids for s in self._current], pad_to_max=True)
        self._observations = {"input_ids": ids, "attention_mask": mask}
        return self._observations, _infos(self._current)

    def _take(self, positions: Sequence[int]) -> list[Sample]:
        """The samples at these places of an endless sequence of epochs."""
        places = [divmod(position, len(self.samples)) for position in positions]
        indices = [int(_epoch_order(self.seed, epoch, len(self.samples))[i]) for epoch, i in places]
        return pick(self.samples, indices)


class ConversationVectorEnv(VectorEnv):
    """`env_num` conversations at a time. An action is a reply; then the partner speaks, or ends the conversation.

    Observations, actions and processes are those of DialogueVectorEnv. A conversation is terminated by the partner, and
    truncated after `max_turns` replies. Its slot then gets the next conversation (`AutoresetMode.SAME_STEP`).
    `reset(options={"rounds": k})` limits each slot to k conversations. A slot without one is not `active`: its mask is
    zero, and its actions are ignored.

    A conversation depends on the seed and its number alone, and not on other conversations or processes. Slot i of all
    `env_num` has the numbers i, i + env_num, ... Groups of `samples_per_prompt` neighbours have the same partner.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        task: ConversationTask,
        codec: DialogueCodec,
        env_num: int,
        process_index: int = 0,
        num_processes: int = 1,
        samples_per_prompt: int = 1,
    ):
        if env_num < 1 or env_num % (num_processes * samples_per_prompt):
            raise UserError(
                f"env_num is {env_num}; expected a positive multiple of the {num_processes} process(es) times "
                f"samples_per_prompt ({samples_per_prompt})."
            )
        if task.max_turns < 1:
            raise UserError(f"max_turns is {task.max_turns}; expected 1 or more.")
        self.task, self.codec, self.samples_per_prompt = task, codec, samples_per_prompt
        self.env_num, self.num_envs = env_num, env_num // num_processes
        self.slots = slice(process_index * self.num_envs, (process_index + 1) * self.num_envs)  # of all env_num
        _set_spaces(self, codec)
        self.seed, self.finished_rounds = 0, 0
        self.conversations: list[Conversation | None] = [None] * self.num_envs  # in progress
        self.finished: list[Conversation] = []  # those that ended in the last step
        self._rounds = np.zeros(self.num_envs, int)  # conversations that each slot has begun

    @property
    def active(self) -> np.ndarray:
        """Which slots (n,) have a conversation."""
        return np.array([conversation is not None for conversation in self.conversations])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begin a conversation in each slot. A seed restarts their order; without one it continues.

        Options: `round` begins, with a seed, after so many conversations of each slot; `rounds` limits their number.
        """
        options = options or {}
        if seed is not None:
            super().reset(seed=seed)
            self.seed, self._rounds[:] = seed, options.get("round", 0)
        self._rounds[:] = self.finished_rounds = int(self._rounds.max())
        self._last_round = self.finished_rounds + options["rounds"] if options.get("rounds") else None
        self.conversations, self.finished = [None] * self.num_envs, []
        self._begin(range(self.num_envs))
        return self._observe()

    def step(self, actions: np.ndarray | Sequence[str]):
        if not self._rounds.any():
            raise gym.error.ResetNeeded("call reset() before step()")
        if len(actions) != self.num_envs:
            raise UserError(f"step() was given {len(actions)} responses for {self.num_envs} conversations.")
        slots = [int(slot) for slot in np.flatnonzero(self.active)]
        talks = [self.conversations[slot] for slot in slots]
        for slot, talk in zip(slots, talks):
            action = actions[slot]
            reply = _text(action, self.codec) if isinstance(action, str) else self.codec.decode_response(action)
            talk.prompts.append(Prompt.of(self._prompts[slot], talk.messages))
            talk.replies.append(reply)
            talk.messages = [*talk.messages, {"role": "assistant", "content": str(reply)}]
        rewards = np.zeros(self.num_envs)
        rewards[slots] = self._score_turns(talks)
        self._let_partners_speak(slots, talks)
        ended = [(slot, talk) for slot, talk in zip(slots, talks) if talk.end]
        self.finished = [talk for _, talk in ended]
        at_end = self._score_ends([slot for slot, _ in ended], self.finished)
        for (slot, _), reward in zip(ended, at_end):
            rewards[slot] += reward
            self.conversations[slot] = None
        terminations, truncations = (
            np.array([talk is not None and talk.end == end for talk in self._spread(slots, talks)])
            for end in ("terminated", "truncated")
        )
        done, final_obs = terminations | truncations, self._observations
        final_info = _masked({"conversation": self._spread(slots, talks)}, done) if ended else {}
        self._begin([slot for slot, _ in ended])
        observations, infos = self._observe()
        if ended:
            infos |= {"final_obs": final_obs, "_final_obs": done, "final_info": final_info, "_final_info": done}
        return observations, rewards, terminations, truncations, infos

    def _spread(self, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """One value for each slot of this process, None where there is none."""
        found = dict(zip(slots, values))
        return [found.get(slot) for slot in range(self.num_envs)]

    def _begin(self, slots: Sequence[int]) -> None:
        """Begin the next conversation of each of these slots, if it may have one more."""
        slots = [slot for slot in slots if self._last_round is None or self._rounds[slot] < self._last_round]
        numbers = [int(self._rounds[slot]) * self.env_num + self.slots.start + slot for slot in slots]
        self._rounds[slots] += 1
        of_partners = [number // self.samples_per_prompt for number in numbers]
        for slot, number, of_partner, opening in zip(
            slots, numbers, of_partners, self.task.partners.begin(slots, of_partners, self.seed)
        ):
            if opening is None:
                messages = with_system_prompt(self._recorded(of_partner), self.codec)
            else:
                messages = opening
                self._check_words(*(message["content"] for message in opening))
            self.conversations[slot] = Conversation(number, list(messages), len(messages))

    def _check_words(self, *words: str) -> None:
        """UserError for words of a partner that would end a turn of the prompt, and forge another."""
        stop = self.codec.stop.strip()
        for text in words:
            if stop and stop in text:
                raise UserError(
                    f"the partner said {stop!r}, the text that ends a turn for this model ({text!r:.60}); leave it out "
                    "of what the partner says."
                )

    def _recorded(self, number: int) -> tuple[Message, ...]:
        """The recorded beginning for a conversation."""
        if not len(self.task.openings):
            raise UserError(
                "the partner begins no conversation (its reset() returned None), and there are no recorded beginnings: "
                "return a text from reset(), or give dialogues with --data-path."
            )
        epoch, i = divmod(number, len(self.task.openings))
        return self.task.openings[int(_epoch_order(self.seed, epoch, len(self.task.openings))[i])].messages

    def _let_partners_speak(self, slots: Sequence[int], talks: Sequence[Conversation]) -> None:
        """Add what the partners say next, and mark the conversations that end."""
        numbers = [talk.number // self.samples_per_prompt for talk in talks]
        turns = [len(talk.replies) for talk in talks]
        said = self.task.partners.reply(slots, [talk.messages for talk in talks], numbers=numbers, turns=turns)
        for talk, words in zip(talks, said):
            if words is None:
                talk.end = "terminated"
                continue
            self._check_words(words)
            talk.messages = [*talk.messages, {"role": "user", "content": words}]
            if len(talk.replies) >= self.task.max_turns:
                talk.end = "truncated"

    def _score_turns(self, talks: Sequence[Conversation]) -> np.ndarray:
        """Score the last reply of each conversation; return the rewards."""
        if self.task.turn_reward is None or not talks:
            return np.zeros(len(talks))
        scores = score_replies(self.task.turn_reward, [t.prompts[-1] for t in talks], [t.replies[-1] for t in talks])
        for i, talk in enumerate(talks):
            talk.turn_scores.append(scores.row(i))
        return scores.total

    def _score_ends(self, slots: Sequence[int], talks: Sequence[Conversation]) -> np.ndarray:
        """Score conversations that have ended; return the rewards."""
        if not talks:
            return np.zeros(0)
        for talk, note in zip(talks, self.task.partners.notes(slots, [t.messages for t in talks])):
            talk.note = note
        if self.task.reward is None:
            return np.zeros(len(talks))
        if self.task.partners.has_score:
            for talk, score in zip(talks, self.task.partners.score(slots, [t.messages for t in talks])):
                talk.partner_score = score
        scores = score_replies(self.task.reward, [t.end_prompt for t in talks], [t.replies[-1] for t in talks])
        for i, talk in enumerate(talks):
            talk.scores = scores.row(i)
        return scores.total

    def _observe(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        ids, prompts = [], []
        for talk in self.conversations:
            shown, row = ([], []) if talk is None else prompt_of(talk.messages, self.codec, "the policy")
            ids.append(row)
            prompts.append(shown)
        written = iter(self.codec.write_prompts([shown for shown in prompts if shown]))
        self._prompts = [next(written) if shown else Prompt("") for shown in prompts]
        ids, mask = self.codec.encode_prompts(ids, pad_to_max=True)
        self._observations = {"input_ids": ids, "attention_mask": mask}
        return self._observations, _masked({"prompt": self._prompts}, self.active)


def _set_spaces(env: VectorEnv, codec: DialogueCodec) -> None:
    """Set the spaces of an environment whose observations are prompts and whose actions are replies."""
    fmt, vocabulary = codec.format, len(codec.tokenizer)
    env.single_observation_space = spaces.Dict(
        {
            "input_ids": spaces.Box(0, vocabulary - 1, (fmt.max_prompt_tokens,), np.int64),
            "attention_mask": spaces.Box(0, 1, (fmt.max_prompt_tokens,), np.int64),
        }
    )
    env.single_action_space = spaces.Box(-1, vocabulary - 1, (fmt.max_new_tokens,), np.int64)
    env.observation_space = batch_space(env.single_observation_space, env.num_envs)
    env.action_space = batch_space(env.single_action_space, env.num_envs)


def _text(action: str, codec: DialogueCodec) -> Reply:
    """A reply that was given as text."""
    text, stop = drop_torn_characters(action), codec.stop
    return codec.as_reply((text.partition(stop)[0] if stop else text).strip())


def _masked(columns: dict[str, Sequence[Any]], mask: np.ndarray) -> dict[str, np.ndarray]:
    """A Gymnasium vector info of objects, of which some environments have one."""
    infos = {}
    for name, values in columns.items():
        infos[name], infos[f"_{name}"] = np.empty(len(values), object), mask
        infos[name][:] = values
    return infos


@functools.lru_cache(2)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _infos(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    return _columns({name: [getattr(s, name) for s in samples] for name in ("prompt", "reply", "act")})


def _columns(columns: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """A Gymnasium vector info: arrays, each with the mask of who has it."""
    infos = {}
    for name, values in columns.items():
        infos[name] = np.array(values, dtype=object) if isinstance(values[0], str) else np.asarray(values)
        infos[f"_{name}"] = np.ones(len(values), dtype=bool)
    return infos
