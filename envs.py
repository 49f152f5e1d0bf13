"""The environment: it returns the prompts of dialogues and scores the replies (Gymnasium's vector API).

    dialogues = load_dialogues("builtin", "train")            # support/data.py: hub names, folders and files as well
    codec = load_codec("gpt2")                                # support/models.py: tokenizer and chat template
    env = DialogueVectorEnv(make_samples(dialogues, codec), codec, env_num=2, reward=my_reward)
    observations, infos = env.reset(seed=0)
    observations, rewards, terminations, truncations, infos = env.step(["Sure, why not.", "At six."])

Episode ends are those of the OpenRL and RL4LMs DailyDialog task.
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

from support.errors import UserError
from support.samples import Sample, Samples, pick
from support.scoring import Scores, checked_scores
from support.text import DialogueCodec, drop_torn_characters


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
        fmt, vocabulary = codec.format, len(codec.tokenizer)
        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, vocabulary - 1, (fmt.max_prompt_tokens,), np.int64),
                "attention_mask": spaces.Box(0, 1, (fmt.max_prompt_tokens,), np.int64),
            }
        )
        self.single_action_space = spaces.Box(-1, vocabulary - 1, (fmt.max_new_tokens,), np.int64)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.scores: Scores | None = None  # of the last step
        self.seed, self.rounds, self._current = 0, 0, None

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
        responses = [self._text(a) if isinstance(a, str) else self.codec.decode_response(a) for a in actions]
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

    def _text(self, action: str) -> str:
        text, stop = drop_torn_characters(action), self.codec.stop
        return self.codec.as_reply((text.partition(stop)[0] if stop else text).strip())


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
