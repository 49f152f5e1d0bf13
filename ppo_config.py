"""The options of ppo_dialog.py: a dataclass whose docstrings are the help texts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from support.config import HIDDEN, NamedValues
from support.controllers import AdaptiveKL, LengthController
from support.errors import UserError
from support.options import Placement, ProgressMode, Sampling, placement_from
from support.paths import check_data, check_models
from support.text import FormatOptions


@dataclass
class PPOConfig(FormatOptions):
    """PPO on dialogues. Names are those of the OpenRL tutorial where it has one."""

    # what is trained, on what
    model_path: str = "builtin"
    """Supervised model to start from: hub name, folder, or 'builtin' (trained at first use)."""
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

    # rewards
    reward: str = "default"
    """'default' (intent and METEOR), a registered name, or the import path of a Reward or function of your own."""
    reward_args: NamedValues = field(default_factory=dict)
    """Arguments for a reward of your own: --reward-args weight=2 word=please."""
    intent_model: str = "builtin"
    """Dialogue-act classifier, the judge of the intent reward: hub name, folder or 'builtin'."""
    intent_coef: float = 0.5
    """Weight of the intent reward (0: no judge is loaded)."""
    meteor_coef: float = 0.5
    """Weight of the METEOR reward."""
    consensus_coef: float = 0.0
    """Weight of METEOR against the other replies to the same prompt."""
    commonplace_coef: float = 0.0
    """Penalty on a reply's share of word pairs that replies to other prompts have too."""
    ref_model: str = ""
    """Frozen reference of the KL penalty; left out: the model in model_path."""
    reward_timeout: float = 0.0
    """Seconds that a call of the reward may take before the run ends (0: no limit)."""
    kl_coef: float = 0.2
    """Initial coefficient (alpha) of the KL penalty (0: no penalty, KL is only measured)."""
    kl_target: float = 0.05
    """Target of the KL per token, in nats; alpha adapts to it."""
    kl_rate: float = 0.1
    """How fast alpha adapts after each rollout (0: it stays)."""
    kl_clip: float = 0.2
    """Bound on the relative error of KL by which alpha adapts."""
    length_rate: float = 0.0
    """How strongly a penalty on tokens keeps the mean length of replies at its target (0: no penalty)."""
    length_ratio: float = 1.0
    """Target of the mean length, as a multiple of the mean length before training."""

    # how much
    total_time_steps: int = 50_000
    """Environment steps (generated tokens) to train for."""
    env_num: int = 128
    """Dialogues at a time, over all processes."""
    samples_per_prompt: int = 1
    """Replies to each prompt of a rollout. With several, the mean score of the others is a reply's baseline (RLOO)."""
    episode_length: int = 20
    """Environment steps of each dialogue slot in a rollout, counted in full replies of max_new_tokens."""
    ppo_epoch: int = 2
    """Passes over each rollout."""
    num_mini_batch: int = 4
    """Mini-batches, and optimizer steps, in a pass."""
    gradient_accumulation_steps: int = 1
    """Least number of parts that a mini-batch is split into; the gradient stays the same."""
    micro_batch_tokens: int = 0
    """Tokens in a forward pass, with prompts; this bounds the memory (0: 1,024 on a CPU, 16,384 on a GPU). A prompt of
    several replies counts once, unless the model cannot be packed."""

    # PPO
    lr: float = 2e-4
    """Learning rate of the policy."""
    critic_lr: float = 3e-3
    """Learning rate of the value head or network."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """Learning rates stay, or fall linearly to zero over total_time_steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gamma: float = 1.0
    """Discount of a token."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: float = 0.2
    """Clipping range of the policy's probability ratio."""
    value_clip_range: float = 0.2
    """Clipping range of the value's change, in normalised units."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. A negative one makes the policy sharper, as a lower temperature does."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: int = 20
    """Optimizer steps with a loss or gradient that is not finite that a run may skip before it stops."""
    target_kl: float | None = None
    """Stop the passes over a rollout early when approx_kl exceeds this value."""
    normalize_advantages: bool = True
    """Whiten the advantages of a rollout over all its tokens."""
    normalize_values: bool = True
    """Normalise the returns that the value network predicts by their running mean and deviation."""

    # sampling in rollouts
    temperature: float = 1.0
    """Softmax temperature."""
    top_k: int = 0
    """Sample from the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""

    # engine
    seed: int = 0
    """Seed of everything random."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Accelerate's mixed precision; left out: what `accelerate launch` was told."""
    use_amp: bool = False
    """The tutorial's switch for mixed precision: fp16 on a GPU, bf16 on a CPU."""
    use_fp16: bool = False
    """The tutorial's switch for fp16 under DeepSpeed."""
    use_deepspeed: bool = False
    """Train with DeepSpeed, configured by deepspeed_config (or use `accelerate config`)."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON file."""
    use_offload: bool = False
    """Keep DeepSpeed's optimizer states in CPU memory."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights of the policy and of a separate critic; bf16 halves their memory and loses small steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time in the update."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on the policy (0: train all weights). The reference is then the policy without the
    adapter, so there is no second copy."""
    lora_alpha: int = 0
    """Scale of the adapter (0: twice its rank)."""
    lora_merge: bool = False
    """Also write merged/ at the end: a plain model with the adapter merged into it."""
    ref_placement: Placement = "replicated"
    """Where the frozen reference is kept: on each device, in CPU memory between its uses, or sharded over the
    processes."""
    ref_weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the reference's weights."""
    intent_placement: Placement = "replicated"
    """Where the judge is kept."""
    gather: bool = True
    """Gather a sharded network once for each rollout. Off: layer by layer in every pass, which is much slower; needed
    for networks that do not fit on one device."""
    ref_ds_config: str = ""
    """The tutorial's DeepSpeed file for the reference; it stands for a ref_placement."""
    intent_ds_config: str = ""
    """The tutorial's DeepSpeed file for the judge; it stands for an intent_placement."""

    # results
    run_dir: str = "runs"
    """Folder for runs."""
    experiment_name: str = "ppo_dialog"
    """Name of this run's folder in run_dir; an earlier run of that name is kept under another."""
    progress: ProgressMode = "auto"
    """A live display, or plain lines; auto: the display on a terminal, lines in a pipe, a file and CI."""
    log_interval: int = 1
    """Updates between two printed and tracked lines; metrics.jsonl has every update."""
    sample_interval: int = 10
    """Updates between two sample dialogues, with the replies before training and now, in samples.jsonl (0: none)."""
    save_interval: int = 10
    """Updates between two checkpoints. The end of a run, Ctrl-C and SIGTERM also write one."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, the newest ones."""
    resume: bool = False
    """Resume from the latest valid checkpoint in the run's folder, with the settings stored there."""
    validation_limit: int = 200
    """Validation samples on which each checkpoint is scored; best/ keeps the best policy (0: no best/)."""
    track: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers that get the metrics as well as metrics.jsonl."""
    use_wandb: bool = False
    """The tutorial's switch for `--track wandb`."""
    wandb_entity: str = ""
    """Team on wandb."""
    wandb_project: str = "ppo_dialog"
    """Project on wandb."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline runs are kept in the run's folder for `wandb sync`."""
    stats: str = ""
    """Import path of your own statistics: a function (or class, made once) of (rollout, metrics) -> dict of numbers."""
    judge_samples: int = 1000
    """Human validation replies on which the judge is measured before training (0: all)."""
    eval_split: Literal["train", "validation", "test"] = "test"
    """Split of the final comparison with the supervised model."""
    eval_limit: int = 1500
    """Samples of the final comparison (0: all; negative: no comparison)."""

    def check(self) -> None:
        """UserError for values that cannot work, before anything is loaded."""
        at_least = {
            1: "total_time_steps env_num samples_per_prompt episode_length ppo_epoch num_mini_batch log_interval "
            "gradient_accumulation_steps save_interval keep_checkpoints",
            0: "seed lr critic_lr weight_decay value_coef intent_coef meteor_coef kl_coef judge_samples "
            "consensus_coef commonplace_coef micro_batch_tokens max_skipped_steps reward_timeout validation_limit "
            "lora_rank lora_alpha sample_interval",
        }
        for low, names in at_least.items():
            for name in names.split():
                if not getattr(self, name) >= low or not math.isfinite(getattr(self, name)):
                    raise UserError(f"{name} is {getattr(self, name)}; expected a number of at least {low}.")
        if not math.isfinite(self.entropy_coef):
            raise UserError(f"entropy_coef is {self.entropy_coef}; expected a number.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected a number from 0 to 1.")
        for name in ("clip_range", "value_clip_range", "max_grad_norm", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected more than 0.")
        if self.model_class and (self.policy_class or self.critic_class):
            raise UserError("model_class is policy and value together; give it, or policy_class and critic_class.")
        if self.lora_rank and (self.model_class or self.policy_class or self.ref_model):
            raise UserError(
                "lora_rank puts an adapter on the model in model_path, which without it is the reference; leave "
                "model_class, policy_class and ref_model out, or lora_rank."
            )
        if self.lora_merge and not self.lora_rank:
            raise UserError("lora_merge needs lora_rank: without an adapter there is nothing to merge.")
        if self.use_deepspeed and not self.deepspeed_config:
            raise UserError("use_deepspeed needs deepspeed_config, the name of DeepSpeed's JSON file.")
        if Path(self.experiment_name).name != self.experiment_name or self.experiment_name in ("", ".", ".."):
            raise UserError(f"experiment_name is '{self.experiment_name}'; expected the name of a folder in run_dir.")
        if HIDDEN in self.reward_args.values():
            name = next(k for k, v in self.reward_args.items() if v == HIDDEN)
            raise UserError(f"reward_args.{name} looks like a secret and was not stored; give --reward-args again.")
        if self.reward == "default" and not (self.intent_coef or self.meteor_coef or self.consensus_coef):
            raise UserError("intent_coef, meteor_coef and consensus_coef are all 0: nothing is rewarded.")
        for name in ("consensus_coef", "commonplace_coef"):
            if getattr(self, name) and self.samples_per_prompt == 1:
                raise UserError(f"{name} needs other replies to the same prompt: set samples_per_prompt to 2 or more.")
        self.sampling  # noqa: B018  raises where temperature, top_k or top_p cannot be
        self.check_processes(int(os.environ.get("WORLD_SIZE", 1)))  # as the launcher has set it
        AdaptiveKL(self.kl_coef, self.kl_target, self.kl_rate, self.kl_clip)
        LengthController(self.length_rate, self.length_ratio)
        check_models(
            model=self.model_path,
            tokenizer=self.tokenizer_path,
            ref_model=self.ref_model,
            intent_model=self.intent_model,
        )
        check_data(self.data_path)

    def check_processes(self, processes: int) -> None:
        """UserError where the dialogues cannot be shared out to so many processes."""
        if self.env_num % processes:
            raise UserError(f"env_num is {self.env_num}; expected a multiple of the {processes} processes.")
        if self.env_num // processes % self.samples_per_prompt:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}; expected a divisor of the "
                f"{self.env_num // processes} dialogues (env_num) of a process."
            )

    @property
    def placements(self) -> tuple[Placement, Placement]:
        """Where reference and judge are kept."""
        ref = placement_from(self.ref_ds_config) if self.ref_ds_config else self.ref_placement
        return ref, placement_from(self.intent_ds_config) if self.intent_ds_config else self.intent_placement

    @property
    def run_folder(self) -> Path:
        return Path(self.run_dir) / self.experiment_name

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def rewards_intent(self) -> bool:
        """Whether the reward asks the judge."""
        return self.reward == "default" and self.intent_coef != 0
