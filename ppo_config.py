"""The options of ppo_dialog.py: groups of settings. Docstrings are the help texts, and types hold the ranges.

support/options.py has the groups that the engine and the run's surroundings read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from support.config import OF_ONES_OWN, name_of_hidden
from support.errors import UserError, need_package
from support.hub import check_hub
from support.llm_judge import JudgeConfig
from support.options import (
    Above0,
    EngineOptions,
    FormatOptions,
    NamedValues,
    Number,
    PartnerOptions,
    Positive,
    RewardWeights,
    RunOptions,
    SampleOptions,
    Sampling,
    Share,
    TextOptions,
    Weight,
    check_values,
    checked_value,
)
from support.paths import check_data, check_models, check_reward_path, check_template, is_class, same_model

DEFAULT_REWARD = {"intent": 0.5, "meteor": 0.5}  # that of OpenRL's tutorial
SMALL_MODEL = 10_000_000  # parameters, below which a model learns at the rates of the built-in one
ESTIMATORS: dict[str, dict[str, Any]] = {  # defaults that depend on `advantage`; docs/estimators.md has the papers
    "gae": dict(
        samples_per_prompt=1, value_coef=0.5, gae_lambda=0.95, normalize_advantages=True, divide_by_length=False
    ),
    "rloo": dict(
        samples_per_prompt=4, value_coef=0.0, gae_lambda=1.0, normalize_advantages=False, divide_by_length=False
    ),
    "grpo": dict(
        samples_per_prompt=8, value_coef=0.0, gae_lambda=1.0, normalize_advantages=False, divide_by_length=True
    ),
    "reinforce": dict(
        samples_per_prompt=1, value_coef=0.0, gae_lambda=1.0, normalize_advantages=True, divide_by_length=False
    ),
}


@dataclass
class ModelOptions:
    """What is trained, on what."""

    model_path: str = "builtin"
    """Supervised model to start from: hub name, folder, or 'builtin' (comes with the code)."""
    tokenizer_path: str = ""
    """Tokenizer, where it is not the model's own."""
    data_path: str = "builtin"
    """Dialogues: 'builtin', a hub name, a folder or a file (see docs/data.md)."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    use_share_model: bool = True
    """Policy and value share one network. Off: a second network, made from the same model, estimates values."""
    model_class: str = ""
    """Import path of your own network for policy and value (see ActorCritic). It is called with these settings."""
    policy_class: str = ""
    """Import path of your own policy network, with the interface of a causal LM. It is called with these settings."""
    critic_class: str = ""
    """Import path of your own value network. It is called with these settings."""


@dataclass
class RewardOptions:
    """Reward, KL penalty and length penalty."""

    reward: RewardWeights = field(default_factory=lambda: dict(DEFAULT_REWARD))
    """Parts of the reward, with weights (0: measure only): intent, meteor, consensus, commonplace, repetition, copying,
    a reward model (folder or hub name), a judge (YAML file), your own (my_file.py:name). See docs/reward.md."""
    turn_reward: RewardWeights = field(default_factory=dict)
    """With --partner: parts of the reward for each reply of a conversation; --reward scores the whole at its end."""
    reward_args: NamedValues = field(default_factory=dict)
    """Arguments for a part of your own: --reward-args weight=2 word=please; of several parts, polite.word=please."""
    intent_model: str = "builtin"
    """Dialogue-act classifier, the judge of intent: hub name, folder or 'builtin' ('': none)."""
    intent_coef: Annotated[Weight | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Earlier name of the weight of intent in `reward` (0: no judge is loaded)."""
    meteor_coef: Annotated[Weight | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Earlier name of the weight of meteor."""
    consensus_coef: Annotated[Weight | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Earlier name of the weight of consensus."""
    commonplace_coef: Annotated[Weight | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Earlier name of the weight of commonplace."""
    ref_model: str = ""
    """Frozen reference of the KL penalty; left out: the model in model_path."""
    reward_timeout: Weight = 0.0
    """Seconds that a call of the reward may take before the run ends (0: no limit)."""
    kl_coef: Weight = 0.2
    """Initial coefficient (alpha) of the KL penalty (0: no penalty, KL is only measured)."""
    kl_target: Positive = 0.05
    """Target of the KL per token, in nats; alpha adapts to it."""
    kl_rate: Annotated[float, Field(ge=0, lt=5)] = 0.1
    """How fast alpha adapts after each rollout (0: it stays)."""
    kl_clip: Annotated[Weight, tyro.conf.Fixed, tyro.conf.Suppress] = 0.2
    """Bound on the relative error of KL by which alpha adapts."""
    length_rate: Weight = 0.0
    """How strongly a penalty on tokens keeps the mean length of replies at its target (0: no penalty)."""
    length_ratio: Positive = 1.0
    """Target of the mean length, as a multiple of the mean length before training."""


@dataclass
class AlgorithmOptions:
    """PPO: how much is sampled, and how it is learned from."""

    total_time_steps: PositiveInt = 30_000
    """Environment steps (generated tokens) to train for."""
    env_num: PositiveInt | None = None
    """Dialogues at a time, over all processes [128, fewer where texts are long]."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """Estimator of advantages: gae learns values; the others compare whole replies. See docs/estimators.md."""
    samples_per_prompt: PositiveInt | None = None
    """Replies to each prompt of a rollout [1; 4 with rloo, 8 with grpo]. With several, gae subtracts from each score
    the mean score of the others."""
    episode_length: PositiveInt = 20
    """Environment steps of each dialogue slot in a rollout, counted in full replies of max_new_tokens."""
    ppo_epoch: PositiveInt = 2
    """Passes over each rollout."""
    num_mini_batch: PositiveInt = 4
    """Mini-batches, and optimizer steps, in a pass."""
    lr: Weight | None = None
    """Learning rate of the policy [2e-4 for small models such as the built-in one, 1e-5 for others, 1e-4 for LoRA]."""
    critic_lr: Weight | None = None
    """Learning rate of the value head or network [3e-3 for small models, 1e-3 for others]."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """Learning rates stay, or fall linearly to zero over total_time_steps."""
    weight_decay: Weight = 0.0
    """AdamW's weight decay."""
    gamma: Share = 1.0
    """Discount of a token."""
    gae_lambda: Share | None = None
    """Lambda of generalised advantage estimation [0.95]."""
    clip_range: Above0 = 0.2
    """Clipping range of the policy's probability ratio."""
    value_clip_range: Above0 = 0.2
    """Clipping range of the value's change, in normalised units."""
    value_coef: Weight | None = None
    """Weight of the value loss [0.5; 0 without a critic: rloo, grpo, reinforce]."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus. A negative one makes the policy sharper, as a lower temperature does."""
    max_grad_norm: Above0 = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: Annotated[NonNegativeInt, tyro.conf.Fixed, tyro.conf.Suppress] = 20
    """Optimizer steps with a loss or gradient that is not finite that a run may skip before it stops."""
    early_stop_kl: Above0 | None = None
    """Stop the passes over a rollout early when approx_kl exceeds this value (CleanRL's target_kl)."""
    normalize_advantages: bool | None = None
    """Whiten the advantages of a rollout over all its tokens [with gae and reinforce]."""
    divide_by_length: bool | None = None
    """Average the loss within each reply first. Else every token has the same weight [with grpo]."""
    normalize_values: bool = True
    """Normalise the returns that the value network predicts by their running mean and deviation."""
    temperature: float = 1.0
    """Softmax temperature of the rollouts."""
    top_k: int = 0
    """Sample from the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""


@dataclass
class PPOConfig(
    ModelOptions,
    TextOptions,
    SampleOptions,
    FormatOptions,
    RewardOptions,
    PartnerOptions,
    AlgorithmOptions,
    EngineOptions,
    RunOptions,
):
    """PPO on dialogues. Names are those of the OpenRL tutorial where it has one."""

    def __post_init__(self):
        """Put what the earlier names say (`reward: default`, intent_coef, ...) into `reward`.

        Options that were left out, and that ESTIMATORS has, take the estimator's defaults.
        """
        self.reward = checked_value(PPOConfig, "reward", self.reward)
        if "default" in self.reward:
            times = self.reward.pop("default")
            self.reward = {name: times * weight for name, weight in DEFAULT_REWARD.items()} | self.reward
        if self.intent_coef == 0:
            self.intent_model = ""
        for name in ("intent", "meteor", "consensus", "commonplace"):
            if getattr(self, f"{name}_coef") is not None:
                weight = checked_value(PPOConfig, f"{name}_coef", getattr(self, f"{name}_coef"))
                self.reward = {n: w for n, w in self.reward.items() if n != name} | ({name: weight} if weight else {})
                setattr(self, f"{name}_coef", None)
        self.advantage = checked_value(PPOConfig, "advantage", self.advantage)
        for name, value in ESTIMATORS[self.advantage].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.partner:
            self._fit_partner()

    def _fit_partner(self) -> None:
        """Replace defaults that are for single replies to the built-in dialogues."""
        self.turn_reward = checked_value(PPOConfig, "turn_reward", self.turn_reward)
        if self.reward == DEFAULT_REWARD:
            self.reward = {} if self.turn_reward else {"partner": 1.0}
        if self.intent_model == "builtin":
            self.intent_model = ""
        if self.partner == "desk" and self.model_path == "builtin":
            self.model_path = "desk"

    def check(self) -> None:
        """UserError for values that cannot work, before anything is loaded."""
        check_values(self)
        self.check_partner()
        self.sampling  # noqa: B018  raises where temperature, top_k or top_p cannot be
        super().check()
        self.check_estimator()
        if self.model_class and (self.policy_class or self.critic_class):
            raise UserError("model_class is policy and value together; give it, or policy_class and critic_class.")
        if self.lora_rank and (self.model_class or self.policy_class or self.ref_model):
            raise UserError(
                "lora_rank puts an adapter on the model in model_path, which without it is the reference; leave "
                "model_class, policy_class and ref_model out, or lora_rank."
            )
        if self.lora_rank:
            need_package("peft", "--lora-rank")
        if self.deepspeed_config:
            need_package("deepspeed", "--deepspeed-config")
        for name in sorted(set(self.track)):
            need_package(name, f"--track {name}")
        if self.lora_merge and not self.lora_rank:
            raise UserError("lora_merge needs lora_rank: without an adapter there is nothing to merge.")
        for option in OF_ONES_OWN:
            if name := name_of_hidden(getattr(self, option), option):
                again = option.replace("_", "-")
                raise UserError(f"{name} looks like a secret and was not stored; give --{again} again.")
        if not any([*self.reward.values(), *self.turn_reward.values()]):
            raise UserError(f"reward is {self.reward or 'empty'}: nothing is rewarded; expected a part with a weight.")
        for name in ("consensus", "commonplace"):
            if name in self.reward and self.samples_per_prompt == 1:
                raise UserError(
                    f"the reward '{name}' needs other replies to the same prompt: set samples_per_prompt to 2 or more."
                )
        if "intent" in self.reward and not self.intent_model:
            raise UserError("intent is rewarded, and intent_model is empty; name the judge, or leave intent out.")
        self.check_processes(int(os.environ.get("WORLD_SIZE", 1)))  # as the launcher has set it
        check_models(
            model=self.model_path,
            tokenizer=self.tokenizer_path,
            ref_model=self.ref_model,
            intent_model=self.intent_model,
        )
        for name in (*self.reward, *self.turn_reward):
            check_reward_path(name)
            if name.endswith((".yaml", ".yml")):
                JudgeConfig.load(name)
        check_data(self.data_path)
        check_template(self.template)
        if self.push_to_hub:
            check_hub(self.push_to_hub)

    def check_partner(self) -> None:
        """UserError for settings of conversations that do not fit together."""
        super().check_partner()
        if not self.partner:
            if self.turn_reward:
                raise UserError("turn_reward is for conversations; give --partner as well, or leave it out.")
            if "partner" in self.reward:
                raise UserError("the reward 'partner' is what a partner gives a conversation; give --partner as well.")
            return
        for name in (*self.reward, *self.turn_reward):
            if name in ("intent", "meteor", "consensus", "commonplace"):
                raise UserError(
                    f"the reward '{name}' compares replies to one recorded prompt, and a conversation with a partner "
                    "has none; reward 'partner', a reward model, a judge or your own (docs/conversations.md)."
                )
        if "partner" in self.reward and not is_class(self.partner):
            raise UserError(
                f"the reward 'partner' is the score of a class, and partner '{self.partner}' is a model, not 'desk' or "
                "a class; name another with --reward or --turn-reward, such as a reward model or my_file.py:my_reward."
            )
        if "partner" in self.turn_reward:
            raise UserError("a partner scores whole conversations; put 'partner' into --reward, not --turn-reward.")
        if self.intent_model:
            raise UserError(
                f"intent_model is '{self.intent_model}', and intent compares a reply with a recorded one; leave it out "
                "with --partner."
            )
        if self.partner == "self" and self.ref_model and not same_model(self.ref_model, self.model_path):
            raise UserError(
                f"partner is 'self', the policy before training, and ref_model is '{self.ref_model}', another model; "
                f"leave ref_model out, or give --partner {self.ref_model} to play against that model."
            )
        if not self.gather:
            raise UserError("conversations end at different times, so they need whole weights; leave --no-gather out.")

    def check_estimator(self) -> None:
        """UserError for settings without a meaning for the estimator of advantages."""
        name = self.advantage
        if name == "gae":
            return
        default = ESTIMATORS[name]["samples_per_prompt"]
        if default > 1 and self.samples_per_prompt == 1:
            raise UserError(
                f"samples_per_prompt is 1, and advantage {name} compares a reply with others to its prompt; expected 2 "
                f"or more, or leave it out for {default}."
            )
        of_critic = {"value_coef": 0, "critic_class": "", "use_share_model": True}
        for setting, expected in of_critic.items():
            if (given := getattr(self, setting)) != expected:
                raise UserError(
                    f"{setting} is {given}, and advantage {name} has no critic; leave {setting} out, or give "
                    "--advantage gae."
                )
        for setting in ("gae_lambda", "gamma"):
            if (given := getattr(self, setting)) != 1:
                raise UserError(
                    f"{setting} is {given:g}, and with advantage {name} all tokens of a reply have the same "
                    "advantage; expected 1, or give --advantage gae."
                )

    def check_processes(self, processes: int) -> None:
        """UserError where the dialogues cannot be divided among so many processes."""
        if self.env_num is None:  # it is chosen to fit
            return
        if self.env_num % processes:
            raise UserError(f"env_num is {self.env_num}; expected a multiple of the {processes} processes.")
        if self.env_num // processes % self.samples_per_prompt:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}; expected a divisor of the "
                f"{self.env_num // processes} dialogues (env_num) of a process."
            )

    def fitted(self, parameters: int, text_tokens: int, processes: int, on_gpu: bool) -> PPOConfig:
        """Return the settings with those that were left out chosen for the model and its texts; see `choices`."""
        chosen = self.choices(parameters, text_tokens, processes, on_gpu)
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def choices(self, parameters: int, text_tokens: int, processes: int, on_gpu: bool) -> dict[str, Any]:
        """Choose learning rates and env_num for a model and its texts. The estimator's defaults are with them.

        `text_tokens` is the length of the longest prompt with its reply. The key/value cache of env_num such texts must
        fit into memory: 32,768 tokens on a CPU, four times as many on a GPU.
        """
        small = parameters < SMALL_MODEL
        policy_lr = 2e-4 if small else 1e-4 if self.lora_rank else 1e-5
        fitting = max(1, 32_768 * (4 if on_gpu else 1) // text_tokens)
        dialogues = min(128, 2 ** (fitting.bit_length() - 1))
        unit = processes * self.samples_per_prompt
        return ESTIMATORS[self.advantage] | {
            "lr": policy_lr,
            "critic_lr": 3e-3 if small else 1e-3,
            "env_num": unit * max(1, dialogues // unit),
        }

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def rewards_intent(self) -> bool:
        """Whether the reward asks the judge."""
        return "intent" in self.reward
